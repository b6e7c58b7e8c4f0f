"""Exchanges between GPUs through the memory of their host, where NCCL cannot be used."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.backends.devices import Device
from cupybnn.parallel.ranks import Pending, Ranks

__all__ = ["StagedRanks"]


class StagedRanks(Ranks):
    """Ranks on GPUs whose arrays travel through ranks on CPUs: by files or MPI.

    For several ranks that have one GPU between them, which NCCL refuses. The host waits for the
    device when an exchange begins, so nothing is hidden behind other work, and no CUDA graph can
    contain one.

    Parameters
    ----------
    host : Ranks
        Exchange arrays of NumPy.
    device : Device
        This rank's GPU.
    """

    def __init__(self, host: Ranks, device: Device) -> None:
        self._through = host
        self._meeting = host._meeting
        self.rank, self.size, self.device = host.rank, host.size, str(device)
        self._gpu = device

    def _begin(self, method: str, array: Any, out: Any, **options: Any) -> Pending:
        import cupy

        with self._gpu.scope():
            sent = cupy.ascontiguousarray(array).get().reshape(array.shape)
        pending = getattr(self._through, method)(sent, **options)

        def finish() -> Any:
            result = pending.wait()
            if out is None:
                return self._own(result)
            with self._gpu.scope():
                out.reshape(-1).set(np.ascontiguousarray(result).reshape(-1))
            return out

        return Pending(finish)

    def all_reduce(self, array: Any, *, out: Any = None, bfloat16: bool = False) -> Pending:
        return self._begin("all_reduce", array, out, bfloat16=bfloat16)

    def reduce_scatter(self, array: Any, *, out: Any = None, bfloat16: bool = False) -> Pending:
        return self._begin("reduce_scatter", array, out, bfloat16=bfloat16)

    def all_gather(self, array: Any, *, out: Any = None) -> Pending:
        return self._begin("all_gather", array, out)

    def all_max(self, array: Any, *, out: Any = None) -> Pending:
        return self._begin("all_max", array, out)

    def broadcast(self, array: Any) -> Pending:
        return self._begin("broadcast", array, None)

    def _own(self, array: np.ndarray) -> Any:
        import cupy

        with self._gpu.scope():
            return cupy.asarray(array)

    def _host(self, array: Any) -> np.ndarray:
        with self._gpu.scope():
            return array.get()  # type: ignore[no-any-return]

    def abort(self) -> None:
        self._through.abort()

    def close(self, error: BaseException | None = None) -> None:
        self._closing()
        self._through.close(error)
