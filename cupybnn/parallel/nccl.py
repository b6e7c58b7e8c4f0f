"""Exchanges through NCCL: for GPUs of one host or many.

CuPy's own binding, `cupy.cuda.nccl`, is used. It has what is needed here (reduce-scatter,
bfloat16, abort, asynchronous errors, and no interpreter lock while NCCL runs), it is there with
CuPy, and of NCCL it needs the library alone. `cupyx.distributed`, on top of it, has no bfloat16 and
shares NCCL's id through a server that unpickles what it receives. `nccl4py` adds communicators that
shrink and that need not block, neither of which is used where ranks that are lost are replaced by a
restored run; and its wheels need cuda-core and the CUTLASS DSL.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cupybnn.backends.devices import Device
from cupybnn.errors import DeviceError, RankError
from cupybnn.extras import to_install
from cupybnn.parallel.meeting import Meeting
from cupybnn.parallel.peers import Peers
from cupybnn.parallel.ranks import Pending, Ranks

__all__ = ["NcclRanks", "new_id"]

_BFLOAT16 = 9  # ncclBfloat16
#: Within this time the meeting's thread has looked at each rank.
_SECONDS_TO_NOTICE = 3.0
_DTYPES = ("int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64")


def _binding() -> Any:
    """Return CuPy's binding of NCCL.

    Raises
    ------
    DeviceError
        If NCCL cannot be loaded.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's, about the same fault
        from cupy.cuda import nccl

    if not nccl.available:
        raise DeviceError(
            f"Ranks on GPUs need NCCL, which CuPy cannot load. To install it: "
            f"{to_install('distributed-cuda13')}, or with CUDA 12 "
            f"{to_install('distributed-cuda12')}."
        )
    return nccl


def new_id() -> bytes:
    """Return a new id by which ranks find each other: rank 0 makes it, and all must get it."""
    unique_id: bytes = _binding().get_unique_id()
    return unique_id


def _mark(stream: Any) -> Any:
    """Return an event after all current work of a stream, which may be being captured."""
    import cupy

    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    return event


class NcclRanks(Ranks):
    """Ranks with a GPU each, which NCCL connects.

    Exchanges run on a stream of their own, behind what the current stream has been given so far and
    beside what it is given next. `Pending.wait` makes the current stream wait. While that one is
    being captured as a CUDA graph, exchanges are captured, too: they need an `out`, and `replayed`
    must be called after each launch.

    Parameters
    ----------
    device : Device
        This rank's GPU.
    rank, size : int
    unique_id : bytes
        From `new_id`.
    meeting : Meeting or None
        Notices ranks that are lost. Exchanges that wait for them are then aborted.
    """

    capturable = True

    def __init__(
        self, device: Device, rank: int, size: int, unique_id: bytes, meeting: Meeting | None
    ) -> None:
        import cupy

        self._nccl = _binding()
        self._meeting = meeting
        self.rank, self.size, self.device = rank, size, str(device)
        self._gpu = device
        self._peers: Peers | None = None
        self._taking = threading.Lock()
        self._unfinished: deque[tuple[Any, float]] = deque()  # events, and when they were issued
        self._types = {
            np.dtype(name): getattr(self._nccl, f"NCCL_{name.upper()}") for name in _DTYPES
        }
        with device.scope():
            try:
                self._communicator = self._nccl.NcclCommunicator(size, unique_id, rank)
            except self._nccl.NcclError as error:
                raise DeviceError(
                    f"NCCL cannot connect the GPUs of {size} ranks: {error}. Run it again with the "
                    f"environment variable NCCL_DEBUG=INFO to see why."
                ) from error
            self._stream = cupy.cuda.Stream(non_blocking=True)
        if meeting is not None:
            meeting.waiting_since = self._waiting_since
            meeting.on_lost.append(self.abort)

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        """Context in which this rank's GPU is the current device.

        In the meeting's thread it stays so. To go back to device 0 would make this process use
        that one, too.
        """
        if self._meeting is not None and self._meeting.is_own_thread():
            self._gpu.use()
            yield
        else:
            with self._gpu.scope():
                yield

    def _issue(
        self,
        array: Any,
        shape: tuple[int, ...],
        call: Callable[..., Any],
        out: Any = None,
        bfloat16: bool = False,
        directly: Callable[[], None] | None = None,
    ) -> Pending:
        """Begin an exchange that fills an array of `shape`.

        `call` gets the communicator, the two addresses, NCCL's number of the dtype, None if it
        knows no such numbers, and the stream. `directly` exchanges without NCCL.
        """
        import cupy

        self.check()
        with self._gpu.scope():  # streams and events have a device: the caller may be on another
            current = cupy.cuda.get_current_stream()
            captured = current.is_capturing()
            sent = cupy.ascontiguousarray(array)
            received = cupy.empty(shape, sent.dtype) if out is None else out
            assert received.flags.c_contiguous
            assert received.size == math.prod(shape)
            self._stream.wait_event(_mark(current))
            if not captured:
                self._count(1)
            addresses = sent.data.ptr, received.data.ptr
            dtype = _BFLOAT16 if bfloat16 else self._types.get(sent.dtype)
            try:
                if directly is None:
                    call(self._communicator, *addresses, dtype, self._stream.ptr)
                else:
                    directly()
            except AttributeError:
                self.check()  # raises, because the meeting's thread has aborted it meanwhile
                raise
            except self._nccl.NcclError as error:
                if captured:  # steps may run without a graph
                    self.check()
                    raise
                self._await_reason()
                raise RankError(f"NCCL cannot exchange arrays between ranks: {error}.") from error
            ended = _mark(self._stream)
            if not captured:
                self._will_end(ended)
        kept = [sent]

        def finish() -> Any:
            with self._gpu.scope():
                cupy.cuda.get_current_stream().wait_event(ended)
            # Not before: the current stream could then use its memory while NCCL still reads it.
            kept.clear()
            return received

        return Pending(finish)

    def _await_reason(self) -> None:
        """Raise RankError if a rank is lost, which NCCL may know before the meeting's thread."""
        until = time.monotonic() + _SECONDS_TO_NOTICE
        while time.monotonic() < until:
            self.check()
            time.sleep(0.05)

    def _count(self, exchanges: int) -> None:
        if self._meeting is not None:
            self._meeting.begun += exchanges
            self._meeting.needed = self._meeting.begun

    def _will_end(self, ended: Any) -> None:
        self._unfinished.append((ended, time.monotonic()))
        if self._meeting is None:
            self._waiting_since()  # forgets those that have ended

    def replayed(self, exchanges: int) -> None:
        import cupy

        self.check()
        self._count(exchanges)
        with self._gpu.scope():
            self._will_end(_mark(cupy.cuda.get_current_stream()))

    def _waiting_since(self) -> float | None:
        """Return when the oldest exchange that has not ended was issued."""
        with self._here():
            while self._unfinished and self._unfinished[0][0].done:
                self._unfinished.popleft()
        return self._unfinished[0][1] if self._unfinished else None

    def shared_zeros(self, xp: Any, parts: Sequence[tuple[int, Any]]) -> list[Any]:
        if self._peers is None:
            with self._gpu.scope():
                self._peers = Peers(
                    self._gpu, self.rank, self.size, self._stream, self.gather_bytes
                )
        arrays = self._peers.zeros(parts) if self._peers.works else None
        return super().shared_zeros(xp, parts) if arrays is None else arrays

    def distances(self, array: Any) -> tuple[int, ...] | None:
        return None if self._peers is None else self._peers.distances(array)

    def _directly(self, method: str, array: Any, out: Any, bfloat16: bool) -> Any:
        """Return what sums arrays without NCCL, or None; see `Peers`."""
        kind = "bfloat16" if bfloat16 else "float32"
        if self._peers is None or (not bfloat16 and array.dtype != np.float32):
            return None
        return getattr(self._peers, method)(array, out, kind)

    def all_reduce(self, array: Any, *, out: Any = None, bfloat16: bool = False) -> Pending:
        def call(nccl: Any, sent: int, received: int, dtype: int, stream: int) -> None:
            nccl.allReduce(sent, received, array.size, dtype, self._nccl.NCCL_SUM, stream)

        directly = self._directly("all_reduce", array, out, bfloat16)
        return self._issue(array, array.shape, call, out, bfloat16, directly)

    def reduce_scatter(self, array: Any, *, out: Any = None, bfloat16: bool = False) -> Pending:
        count = array.size // self.size

        def call(nccl: Any, sent: int, received: int, dtype: int, stream: int) -> None:
            nccl.reduceScatter(sent, received, count, dtype, self._nccl.NCCL_SUM, stream)

        directly = self._directly("reduce_scatter", array, out, bfloat16)
        return self._issue(array, (count,), call, out, bfloat16, directly)

    def all_gather(self, array: Any, *, out: Any = None) -> Pending:
        def call(nccl: Any, sent: int, received: int, dtype: int, stream: int) -> None:
            nccl.allGather(sent, received, array.nbytes, self._nccl.NCCL_UINT8, stream)

        directly = None if self._peers is None else self._peers.all_gather(array, out)
        return self._issue(array, (self.size, *array.shape), call, out, directly=directly)

    def all_max(self, array: Any, *, out: Any = None) -> Pending:
        def call(nccl: Any, sent: int, received: int, dtype: int, stream: int) -> None:
            nccl.allReduce(sent, received, array.size, dtype, self._nccl.NCCL_MAX, stream)

        return self._issue(array, array.shape, call, out)

    def broadcast(self, array: Any) -> Pending:
        def call(nccl: Any, sent: int, received: int, dtype: int, stream: int) -> None:
            nccl.broadcast(sent, received, array.nbytes, self._nccl.NCCL_UINT8, 0, stream)

        return self._issue(array, array.shape, call)

    def _own(self, array: np.ndarray) -> Any:
        import cupy

        with self._gpu.scope():
            return cupy.asarray(array)

    def _host(self, array: Any) -> np.ndarray:
        with self._gpu.scope():
            host = array.get()
        self.check()  # an aborted exchange ends, with any numbers
        return host

    def abort(self) -> None:
        if self._peers is not None:
            self._peers.end()
        if (communicator := self._take()) is not None:
            with self._here():
                communicator.abort()

    def _take(self) -> Any:
        """Return the communicator to the thread that ends it; None if another thread does."""
        with self._taking:
            communicator, self._communicator = self._communicator, None
        return communicator

    def close(self, error: BaseException | None = None) -> None:
        with self._gpu.scope():
            super().close(error)
            if (communicator := self._take()) is not None:
                self._stream.synchronize()
                communicator.destroy()
