"""One variant of training, and how its steps are measured."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupybnn.backends.devices import Device
from cupybnn.benchmark.clock import Clock
from cupybnn.benchmark.methods import Unsupported, summarize_error
from cupybnn.benchmark.products import release
from cupybnn.data import Dataset

__all__ = ["CpuContention", "Memory", "Running", "Size", "Variant", "measure"]

#: Maximum number of steps whose kernels are timed, and of seconds that this takes.
KERNEL_STEPS, KERNEL_SECONDS = 10, 0.5


@dataclass(frozen=True)
class Size:
    """Units per hidden layer, and examples per step."""

    hidden: int
    batch: int

    def __str__(self) -> str:
        return f"{self.hidden}x{self.batch}"


class Memory:
    """Peak device memory used since construction, sampled by `update`.

    It compares the driver's free memory, which treats every library alike and counts a library's
    pool as used. No other process may use the device.

    Parameters
    ----------
    device : Device
        On a CPU, nothing is measured.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._before = self._least = self._free()

    def _free(self) -> int:
        return 0 if self._device.kind == "cpu" else self._device.xp.cuda.runtime.memGetInfo()[0]

    def update(self) -> None:
        """Sample the memory that is currently used."""
        self._least = min(self._least, self._free())

    def peak(self) -> int | None:
        """Return the peak in bytes, or None for a CPU."""
        self.update()
        return None if self._device.kind == "cpu" else int(self._before - self._least)


class CpuContention:
    """Measures other programs' use of this process's processors since construction (Linux).

    If another program preempts a thread, those that wait for it at a barrier wait for the scheduler
    too: steps of a millisecond then take half a second, in the median as in the mean.
    """

    def __init__(self) -> None:
        self._began = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Return the CPU seconds of all programs and of this one, and the time."""
        try:
            mine = {f"cpu{i}" for i in os.sched_getaffinity(0)}
            lines = [x.split() for x in Path("/proc/stat").read_text("ascii").splitlines()]
            # user, nice, system, (idle, iowait,) irq, softirq, steal
            ticks = [
                sum(map(int, fields[1:4])) + sum(map(int, fields[6:9]))
                for fields in lines
                if fields and fields[0] in mine
            ]
            second = os.sysconf("SC_CLK_TCK")
        except (AttributeError, OSError, ValueError):  # another system
            return None
        return sum(ticks) / second, time.process_time(), time.perf_counter()

    def processors(self) -> float | None:
        """Return how many processors other programs used on average; None if unknown."""
        now = self._read()
        if now is None or self._began is None:
            return None
        everything, own, seconds = (b - a for a, b in zip(self._began, now, strict=True))
        return max(0.0, everything - own) / max(seconds, 1e-9)


@dataclass
class Running:
    """A network that can be trained step by step.

    Attributes
    ----------
    step : callable() -> None
        Run one step, without waiting for the device.
    loss : callable() -> float
        Loss of the last step.
    pool : callable() -> int or None
        Peak bytes in use according to the library, if it counts them.
    kernels : callable() -> dict of str to float, or None
        Run one step and return seconds on the device by name of the launches.
    """

    step: Callable[[], Any]
    loss: Callable[[], float]
    pool: Callable[[], int | None] = lambda: None
    kernels: Callable[[], dict[str, float]] | None = None


@dataclass(frozen=True)
class Variant:
    """One variant of training.

    Attributes
    ----------
    library : {"cupybnn", "PyTorch"}
    how : str
        "fused + graph", "eager", ...
    product : {"xnor", "matmul", "4 planes", "1 plane"}
        How binary products are computed; with planes, those of the backward pass from rounded
        gradients.
    precision : {"float32", "tf32", "bfloat16"}
        Precision of dense products.
    make : callable(Variant, Size, Device, Dataset, Memory) -> Running
    scope : callable(Variant) -> context manager
        Context for setup and timing.
    """

    library: str
    how: str
    product: str
    precision: str
    make: Callable[[Variant, Size, Device, Dataset, Memory], Running]
    scope: Callable[[Variant], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def ours(self) -> bool:
        """Whether it belongs to this library."""
        return self.library == "cupybnn"

    def __str__(self) -> str:
        product = f"{self.product}, " if self.ours else ""
        return f"{self.library} {product}{self.how}, {self.precision}"


def measure(
    variant: Variant, size: Size, device: Device, data: Dataset, clock: Clock, budget: float
) -> dict[str, Any]:
    """Time the steps of one variant.

    Parameters
    ----------
    variant : Variant
    size : Size
    device : Device
        The current device.
    data : Dataset
    clock : Clock
    budget : float
        Seconds of timing; at least seven groups of steps are timed.

    Returns
    -------
    dict
        JSON values. If the variant cannot run, "error" gives the reason; "failed" marks an
        unexpected error.
    """
    row: dict[str, Any] = {
        "library": variant.library,
        "how": variant.how,
        "product": variant.product,
        "precision": variant.precision,
    }
    release(device)
    try:
        with variant.scope(variant):
            row |= _measured(variant, size, device, data, clock, budget)
    except Unsupported as error:
        row["error"] = str(error)
    except Exception as error:  # a failing variant must not lose the other figures
        row |= {"error": summarize_error(error), "failed": True}
    release(device)
    return row


def _measured(
    variant: Variant, size: Size, device: Device, data: Dataset, clock: Clock, budget: float
) -> dict[str, Any]:
    memory = Memory(device)
    began = time.perf_counter()
    running = variant.make(variant, size, device, data, memory)
    for _ in range(2):  # the second fused step captures the graph
        running.step()
    clock.wait()
    memory.update()
    prepared = time.perf_counter() - began
    contention = CpuContention()
    timing = clock.steady(running.step, budget)
    busy = contention.processors()
    row: dict[str, Any] = {
        "step": timing.as_dict(),
        "examples_per_second": {
            "median": size.batch / timing.median,
            "average": size.batch / timing.mean,
        },
        "prepare_seconds": prepared,
        "others_processors": busy,
        "memory_bytes": memory.peak(),
        "pool_bytes": running.pool(),
        "loss": running.loss(),
    }
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(f"the loss is {row['loss']} after the timed steps")
    if running.kernels is not None:
        steps = max(3, min(KERNEL_STEPS, int(KERNEL_SECONDS / timing.median)))
        row["kernels"] = _kernels(running.kernels, clock, steps)
    return row


def _kernels(kernels: Callable[[], dict[str, float]], clock: Any, steps: int) -> dict[str, float]:
    """Return the median seconds of each kernel over `steps` steps that run without gaps."""
    clock.wait()
    start = time.perf_counter()
    kernels()  # waits for the device, so this is an upper bound on the host's time
    issuing = time.perf_counter() - start
    seen: list[dict[str, float]] = []
    for _ in range(steps):
        clock.backlog(1.5 * issuing)
        seen.append(kernels())
    middle = len(seen) // 2
    return {name: sorted(times[name] for times in seen)[middle] for name in seen[0]}
