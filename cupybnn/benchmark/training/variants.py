"""One way to train, and how its steps are measured."""

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
from cupybnn.benchmark.methods import Unsupported, in_short
from cupybnn.benchmark.products import release
from cupybnn.data import Dataset

__all__ = ["Memory", "Others", "Running", "Size", "Variant", "measure"]

#: Steps whose kernels are timed one by one, and the most seconds that this may take.
KERNEL_STEPS, KERNEL_SECONDS = 10, 0.5


@dataclass(frozen=True)
class Size:
    """Units in each hidden layer, and examples in a step."""

    hidden: int
    batch: int

    def __str__(self) -> str:
        return f"{self.hidden}x{self.batch}"


class Memory:
    """Device memory that was taken since this was made, at the most seen by `look`.

    What the driver counts as free is compared: the measure is the same for every library, and what
    a library keeps in its pool counts as taken. Nobody else may be using the device.

    Parameters
    ----------
    device : Device
        Of a CPU nothing is measured.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._before = self._least = self._free()

    def _free(self) -> int:
        return 0 if self._device.kind == "cpu" else self._device.xp.cuda.runtime.memGetInfo()[0]

    def look(self) -> None:
        """Note how much is taken now."""
        self._least = min(self._least, self._free())

    def peak(self) -> int | None:
        """Return bytes, or None for a CPU."""
        self.look()
        return None if self._device.kind == "cpu" else int(self._before - self._least)


class Others:
    """How busy other programs keep this process's processors, since this was made (Linux).

    A thread that waits at a barrier for another that such a program has displaced waits for the
    scheduler: steps of a millisecond become steps of half a second, by median as by mean.
    """

    def __init__(self) -> None:
        self._began = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Return seconds of all programs' work, of this one's, and of the clock."""
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
        """Return how many processors others used on average; None where it cannot be known."""
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
        Make one step; waits for nothing.
    loss : callable() -> float
        Loss of the last step.
    pool : callable() -> int or None
        Peak of the bytes that the library itself counts, where it does.
    kernels : callable() -> dict of str to float, or None
        Make one step and return seconds on the device by what was launched.
    """

    step: Callable[[], Any]
    loss: Callable[[], float]
    pool: Callable[[], int | None] = lambda: None
    kernels: Callable[[], dict[str, float]] | None = None


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes
    ----------
    library : {"cupybnn", "PyTorch"}
    how : str
        "fused + graph", "eager", ...
    product : {"xnor", "matmul"}
        How binary products are computed.
    precision : {"float32", "tf32", "bfloat16"}
        Of dense products.
    make : callable(Variant, Size, Device, Dataset, Memory) -> Running
    scope : callable(Variant) -> context manager
        Surrounds making and timing.
    """

    library: str
    how: str
    product: str
    precision: str
    make: Callable[[Variant, Size, Device, Dataset, Memory], Running]
    scope: Callable[[Variant], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def ours(self) -> bool:
        """Whether it is this library's."""
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
        Plain JSON values. Where the variant fails, its reason is under "error"; "failed" says that
        it should not have.
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
    except Exception as error:  # one that fails must not lose the other figures
        row |= {"error": in_short(error), "failed": True}
    release(device)
    return row


def _measured(
    variant: Variant, size: Size, device: Device, data: Dataset, clock: Clock, budget: float
) -> dict[str, Any]:
    memory = Memory(device)
    began = time.perf_counter()
    running = variant.make(variant, size, device, data, memory)
    for _ in range(2):  # a fused step captures its graph in the second
        running.step()
    clock.wait()
    memory.look()
    prepared = time.perf_counter() - began
    others = Others()
    timing = clock.steady(running.step, budget)
    busy = others.processors()
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
        raise FloatingPointError(f"the loss is {row['loss']} after the steps that were timed")
    if running.kernels is not None:
        steps = max(3, min(KERNEL_STEPS, int(KERNEL_SECONDS / timing.median)))
        row["kernels"] = _kernels(running.kernels, clock, steps)
    return row


def _kernels(kernels: Callable[[], dict[str, float]], clock: Any, steps: int) -> dict[str, float]:
    """Return the median seconds of each kernel over `steps` steps that ran without gaps."""
    clock.wait()
    start = time.perf_counter()
    kernels()  # which waits for its end: longer than the host alone takes
    issuing = time.perf_counter() - start
    seen: list[dict[str, float]] = []
    for _ in range(steps):
        clock.backlog(1.5 * issuing)
        seen.append(kernels())
    middle = len(seen) // 2
    return {name: sorted(times[name] for times in seen)[middle] for name in seen[0]}
