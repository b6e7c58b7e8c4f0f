"""One way to predict, and how its calls are measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.devices import Device
from cupybnn.benchmark.clock import Clock
from cupybnn.benchmark.inference.network import Network
from cupybnn.benchmark.methods import Unsupported, summarize_error
from cupybnn.benchmark.products import release
from cupybnn.benchmark.training.variants import CpuContention

__all__ = ["Calls", "Variant", "measure"]

#: Rows of a batch that are compared; more take long on the host.
COMPARED = 64


@dataclass(frozen=True)
class Calls:
    """What is timed.

    Attributes
    ----------
    call : callable() -> array
        Return the logits of the batch, of the library's own kind, on the device; waits for nothing.
    host : callable(array) -> ndarray
        Return such a result as a NumPy array of float32.
    """

    call: Callable[[], Any]
    host: Callable[[Any], np.ndarray]


@dataclass(frozen=True)
class Variant:
    """One way to predict.

    Attributes
    ----------
    library : {"cupybnn", "PyTorch", "onnxruntime"}
    how, precision : str
    make : callable(Variant, Network, ndarray, Device) -> Calls
        Of a network and the inputs of a batch, on the host.
    scope : callable(Variant) -> context manager
        Surrounds making and timing.
    binary_first : bool
        Of which network: its first layer is binary, or real. Peers multiply dense matrices
        in any case and are measured with the latter.
    """

    library: str
    how: str
    precision: str
    make: Callable[[Variant, Network, np.ndarray, Device], Calls]
    scope: Callable[[Variant], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    binary_first: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this library's."""
        return self.library == "cupybnn"

    def __str__(self) -> str:
        return f"{self.library} {self.how}, {self.precision}"


def measure(
    variant: Variant,
    network: Network,
    x: np.ndarray,
    expected: np.ndarray,
    device: Device,
    clock: Clock,
    budget: float,
) -> dict[str, Any]:
    """Time the calls of one variant and compare what they gave.

    Parameters
    ----------
    variant : Variant
    network : Network
    x : ndarray of uint8, shape (batch, features)
    expected : ndarray of float32, shape (rows, classes)
        The exact logits of the first inputs.
    device : Device
        The current device.
    clock : Clock
    budget : float
        Seconds of each timing.

    Returns
    -------
    dict
        Plain JSON values. Where the variant fails, its reason is under "error"; "failed" says that
        it should not have. Ours fails also where a timed result is not exact.
    """
    row: dict[str, Any] = {
        "library": variant.library,
        "how": variant.how,
        "precision": variant.precision,
        "binary_first": variant.binary_first,
    }
    release(device)
    try:
        with variant.scope(variant):
            began = time.perf_counter()
            calls = variant.make(variant, network, x, device)
            for _ in range(3):  # ours captures a graph at the second call of a batch size
                calls.call()
            clock.wait()
            row["prepare_seconds"] = time.perf_counter() - began
            results: list[Any] = [None]

            def call() -> None:
                results[0] = calls.call()

            contention = CpuContention()
            timing = clock.steady(call, budget)
            queued = clock.throughput([call], budget) if device.kind == "cuda" else None
            busy = contention.processors()
            clock.wait()
            got = calls.host(results[0])[: len(expected)]
        row |= {
            "call": timing.as_dict(),
            "examples_per_second": len(x) / timing.median,
            "others_processors": busy,
            "equal": bool(np.array_equal(got, expected)),
            "same_classes": float((got.argmax(1) == expected.argmax(1)).mean()),
        }
        if queued is not None:
            row["device"] = queued.as_dict()
        if variant.ours and not row["equal"]:
            i, j = np.argwhere(got != expected)[0]
            row["error"] = f"wrong logit at [{i}, {j}]: {got[i, j]:g}, not {expected[i, j]:g}"
            row["failed"] = True
    except Unsupported as error:
        row["error"] = str(error)
    except Exception as error:  # one that fails must not lose the other figures
        row |= {"error": summarize_error(error), "failed": True}
    release(device)
    return row
