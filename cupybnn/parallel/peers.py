"""Exchanges between GPUs of one host that read each other's memory.

In one kernel, each rank reads the arrays of the others and combines them. That is faster than NCCL,
in whose rings and trees numbers go from rank to rank. But an all-reduce over more than two ranks
moves more bytes this way than in a ring, so NCCL does it if the arrays are large. A rank opens the
memory of others through CUDA IPC (cudaIpcOpenMemHandle). Other kernels may read it, too: see
`Ranks.distances`. The memory of a process that has died stays until the processes that have opened
it end.
"""

from __future__ import annotations

import contextlib
import socket
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn import settings
from cupybnn.backends.cuda import peers
from cupybnn.backends.devices import Device

__all__ = ["Peers", "SharedMemory", "identity"]

#: Most bytes that a rank may receive in an exchange beyond what it would receive from NCCL.
_MOST_MORE = 4 << 20
_ALIGNED, _PAGE = 256, 2 << 20
_TO_DEVICE = 1  # cudaMemcpyHostToDevice
_SECONDS_TO_MEET = 10.0

#: Returns what each rank gave, in their order.
Gather = Callable[[bytes], list[bytes]]


def identity() -> bytes:
    """Return bytes that identify this host since it was started: its name and boot id."""
    boot = b""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return socket.gethostname().encode() + b" " + boot.strip()


class SharedMemory:
    """Memory of this rank that the others have opened, and that of the others.

    All ranks create it at the same time, of the same size.

    Parameters
    ----------
    device : Device
    rank : int
    nbytes : int
    gather : callable
        See `Gather`.

    Attributes
    ----------
    addresses : tuple of int
        Where this process finds each rank's memory; empty if a rank could not open another's.
    """

    def __init__(self, device: Device, rank: int, nbytes: int, gather: Gather) -> None:
        from cupy.cuda import runtime

        self._runtime, self._device = runtime, device
        self.nbytes = -(-nbytes // _PAGE) * _PAGE
        self._own, self._opened, handle = 0, list[int](), b""
        with device.scope():
            with contextlib.suppress(runtime.CUDARuntimeError):
                self._own = self._allocate()
                runtime.memset(self._own, 0, self.nbytes)
                runtime.deviceSynchronize()
                handle = bytes(runtime.ipcGetMemHandle(self._own))
            handles = gather(handle)
            addresses = self._open(rank, handles) if all(handles) else []
        done = gather(bytes([bool(addresses)]))
        self.addresses = tuple(addresses) if all(map(any, done)) else ()
        if not self.addresses:
            self.close()

    def _allocate(self) -> int:
        """Return memory from outside CuPy's pool, which frees its unused blocks if necessary."""
        import cupy

        try:
            return int(self._runtime.malloc(self.nbytes))
        except self._runtime.CUDARuntimeError:
            cupy.get_default_memory_pool().free_all_blocks()
            return int(self._runtime.malloc(self.nbytes))

    def _open(self, rank: int, handles: Sequence[bytes]) -> list[int]:
        found = []
        for other, handle in enumerate(handles):
            if other == rank:
                found.append(self._own)
                continue
            try:
                found.append(self._runtime.ipcOpenMemHandle(handle))
            except self._runtime.CUDARuntimeError:
                return []
            self._opened.append(found[-1])
        return found

    def close(self) -> None:
        """Free the memory, and close that of the others."""
        with contextlib.suppress(Exception), self._device.scope():  # at the end of the process
            for address in self._opened:
                self._runtime.ipcCloseMemHandle(address)
            if self._own:
                self._runtime.free(self._own)
        self._own, self._opened = 0, []

    def __del__(self) -> None:
        self.close()


class Peers:
    """Exchanges of one rank with the others of its host.

    All ranks call the same methods in the same order. An exchange is launched on `stream`.

    Parameters
    ----------
    device : Device
    rank, size : int
    stream : cupy.cuda.Stream
    gather : callable
        See `Gather`.

    Attributes
    ----------
    works : bool
        Whether these exchanges can be used, which a trial shows; the same on all ranks.
    """

    def __init__(self, device: Device, rank: int, size: int, stream: Any, gather: Gather) -> None:
        import cupy

        self._device, self._rank, self._size = device, rank, size
        self._stream, self._gather = stream, gather
        self._ended = cupy.cuda.alloc_pinned_memory(8)
        self._word = np.frombuffer(self._ended, np.uint32, 1)
        self._word[0] = 0
        self._memory: list[weakref.ref[SharedMemory]] = []  # what arrays still use
        self.works = False
        hosts = set(gather(identity() if settings.gpus_read_each_other() else b""))
        if size > peers.MOST_RANKS or len(hosts) > 1 or not all(hosts):
            return
        control = SharedMemory(device, rank, peers.CONTROL_BYTES + 2 * _ALIGNED, gather)
        if not control.addresses:
            return
        self._control = control
        self._host = peers.Host(device.index, rank, size, control.addresses, self._ended.ptr)
        with device.scope():
            peers.prepare(device.index, size)
            here = self._can_exchange(control)
        self.works = all(map(any, gather(bytes([here]))))

    def _can_exchange(self, control: SharedMemory) -> bool:
        """Whether each rank's memory is read by all, and in time."""
        import cupy

        sent = [address + peers.CONTROL_BYTES for address in control.addresses]
        mine = np.full(_ALIGNED // 4, self._rank + 1, np.uint32)
        out = cupy.zeros((self._size, mine.size), np.uint32)
        cupy.cuda.runtime.memcpy(sent[self._rank], mine.ctypes.data, mine.nbytes, _TO_DEVICE)
        cupy.cuda.get_current_stream().synchronize()
        self._gather(b"ready")
        self._combine("copied", sent, out.data.ptr, nbytes=mine.nbytes)
        done = self._stream.record()
        began = time.monotonic()
        while not done.done and time.monotonic() - began < _SECONDS_TO_MEET:
            time.sleep(0.001)
        in_time = done.done
        if not in_time:
            self.end()
        self._stream.synchronize()
        expected = np.arange(1, self._size + 1, dtype=np.uint32)[:, None]
        return bool(in_time and (out.get() == expected).all())

    def end(self) -> None:
        """End exchanges that wait for others, and all later ones; their results are arbitrary."""
        self._word[0] = 1

    # Memory --------------------------------------------------------------------------------------

    def zeros(self, parts: Sequence[tuple[int, Any]]) -> list[Any] | None:
        """Return flat arrays of zeros, by size and dtype, that other ranks can read.

        None if some rank's memory cannot be opened by the others.
        """
        import cupy

        starts, end = [], 0
        for count, dtype in parts:
            starts.append(end)
            end += -(-count * np.dtype(dtype).itemsize // _ALIGNED) * _ALIGNED
        memory = SharedMemory(self._device, self._rank, end, self._gather)
        if not memory.addresses:
            return None
        self._memory = [weakref.ref(memory), *(each for each in self._memory if each())]
        with self._device.scope():
            own = cupy.cuda.UnownedMemory(memory.addresses[self._rank], memory.nbytes, memory)
            return [
                cupy.ndarray(count, dtype, cupy.cuda.MemoryPointer(own, start))
                for start, (count, dtype) in zip(starts, parts, strict=True)
            ]

    def distances(self, array: Any) -> tuple[int, ...] | None:
        """Return, by rank, what to add to an address in `array` to get that rank's address.

        None if the array is not from `zeros`.
        """
        start = int(array.data.ptr)
        for reference in self._memory:
            if (memory := reference()) is None:
                continue
            own = memory.addresses[self._rank]
            if own <= start and start + array.nbytes <= own + memory.nbytes:
                return tuple(address - own for address in memory.addresses)
        return None

    def _of_all(self, array: Any, nbytes: int, out: Any) -> list[int] | None:
        """Return the address of each rank's `array`; None if others cannot read this one.

        Also None if the bytes that each rank combines or gets are not a multiple of the kernel's
        pieces, or if `out` begins inside the array, which others read.
        """
        start = int(array.data.ptr)
        if out is None or nbytes % peers.PIECE or (start | int(out.data.ptr)) % peers.PIECE:
            return None
        if start <= int(out.data.ptr) < start + array.nbytes or not array.flags.c_contiguous:
            return None
        distances = self.distances(array)
        return None if distances is None else [start + distance for distance in distances]

    # Exchanges -----------------------------------------------------------------------------------

    def all_reduce(self, array: Any, out: Any, kind: str) -> Callable[[], None] | None:
        """Return a function that launches the exchange; None if it cannot combine these arrays.

        Parameters
        ----------
        array, out : cupy.ndarray
            `array` is from `zeros`.
        kind : str
            "float32" or "bfloat16".
        """
        more = (self._size - 1) * (self._size - 2) * array.nbytes // self._size
        return None if more > _MOST_MORE else self._prepared(kind, array, out, 0, array.nbytes)

    def reduce_scatter(self, array: Any, out: Any, kind: str) -> Callable[[], None] | None:
        """Likewise, for the sum of this rank's part."""
        nbytes = array.nbytes // self._size
        return self._prepared(kind, array, out, self._rank * nbytes, nbytes)

    def all_gather(self, array: Any, out: Any) -> Callable[[], None] | None:
        """Likewise, for the arrays of all ranks, one after another."""
        return self._prepared("copied", array, out, 0, array.nbytes)

    def _prepared(
        self, kind: str, array: Any, out: Any, first: int, nbytes: int
    ) -> Callable[[], None] | None:
        sent = self._of_all(array, nbytes, out)
        if sent is None:
            return None
        return partial(self._combine, kind, sent, out.data.ptr, first=first, nbytes=nbytes)

    def _combine(self, kind: str, sent: Sequence[int], out: int, **more: Any) -> None:
        peers.combine(self._host, kind, sent, out, stream=self._stream, **more)
