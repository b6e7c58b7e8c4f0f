"""A host's GPUs by NumPy: current devices, and what belongs to one; and NCCL between threads.

It computes nothing that arrays of NumPy do not. It raises an error where CUDA would: a stream and
an event of two devices, an exchange on another device than its communicator's. And it remembers
which devices have been used, because a process pays for each.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
from kernels_by_numpy import Fields, narrowed, widened
from kernels_by_numpy import at as array_at

from cupybnn.backends import devices
from cupybnn.backends.cuda import peers as launches
from cupybnn.parallel import joining, nccl

DTYPES = {number: np.dtype(name) for number, name in enumerate(nccl._DTYPES, 100)}
SUM, MAX = 0, 2


class Gpus:
    """Stands for cupy in a test, with so many GPUs."""

    def __init__(self, monkeypatch, count: int = 4) -> None:
        self._current = threading.local()
        self.count = count
        self.used: set[int] = set()  # devices on which this process has a context
        self.capturing = False
        self.aborted: list[int] = []
        self.boards: dict[bytes, Board] = {}
        self.pooled = 0  # bytes that the pool of arrays would give back
        gpus = self

        class Device:
            def __init__(self, index: int | None = None) -> None:
                self.id = gpus.current() if index is None else int(index)

            def use(self) -> None:
                gpus.make_current(self.id)

            def __enter__(self):
                self._before = gpus.current()
                gpus.make_current(self.id)
                return self

            def __exit__(self, *error) -> None:
                gpus.make_current(self._before)

        class Event:
            def __init__(self, **options) -> None:
                self.device, self.done = gpus.here(), True

            def record(self, stream) -> None:
                assert self.device == stream.device == gpus.here(), "an event of another device"

        class Stream:
            def __init__(self, device=None, **options) -> None:
                self.device = gpus.here() if device is None else device
                self.ptr = self.device  # NCCL gets nothing else

            def wait_event(self, event) -> None:
                assert gpus.current() == self.device, "a stream of another device"

            def is_capturing(self) -> bool:
                return gpus.capturing

            def synchronize(self) -> None:
                gpus.here()

            def record(self) -> Event:
                return Event()

        class Array(np.ndarray):
            device = property(lambda self: SimpleNamespace(id=self._device))

            def __array_finalize__(self, source) -> None:
                made = gpus.current() if source is None else None
                self._device = getattr(source, "_device", made)

            @property
            def data(self):
                return SimpleNamespace(ptr=self.ctypes.data)

            def get(self, stream=None) -> np.ndarray:
                return np.array(self)

            def set(self, array, stream=None) -> None:
                assert gpus.here() == self._device
                self[...] = array

        def placed(array):
            made = np.array(array).view(Array)
            made._device = gpus.here()
            return made

        def contiguous(array):
            assert array._device == gpus.here(), "an array of another device"
            return array if array.flags.c_contiguous else placed(np.array(array, order="C"))

        self.module = SimpleNamespace(
            ndarray=Array,
            asarray=placed,
            empty=lambda shape, dtype: placed(np.empty(shape, dtype)),
            zeros=lambda shape, dtype: placed(np.zeros(shape, dtype)),
            ascontiguousarray=contiguous,
            get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=self._free_blocks),
            cuda=SimpleNamespace(
                Device=Device,
                Event=Event,
                Stream=Stream,
                get_current_stream=lambda: Stream(gpus.current()),
                runtime=Runtime(self),
                alloc_pinned_memory=Pinned,
                UnownedMemory=lambda ptr, size, owner: SimpleNamespace(
                    ptr=ptr, size=size, owner=owner
                ),
                MemoryPointer=memory_pointer,
            ),
        )
        monkeypatch.setitem(sys.modules, "cupy", self.module)
        monkeypatch.setitem(sys.modules, "cupy.cuda", self.module.cuda)
        monkeypatch.setattr(launches, "load_kernel", self._load)
        monkeypatch.setattr(nccl, "_binding", lambda: Binding(self))
        status = devices.CudaStatus(True, "", count, "of a test")
        for module in (devices, joining):
            monkeypatch.setattr(module, "cuda_status", lambda: status)

    def _load(self, source, function, defines, device):
        """Return the one kernel that exchanges."""
        assert (source, function) == ("smxx_peers", "combine")
        assert self.here() == device

        def launch(grid, block, arguments, stream) -> None:
            assert self.here() == device == stream.device, "a launch on another device"
            p, *rest = arguments
            d = dict(defines)
            p = Fields(decode(p), size=d["RANKS"])
            combine(grid[0], d["KIND"], p, *(int(value) for value in rest))

        return launch

    def _free_blocks(self) -> None:
        self.pooled = 0

    def current(self) -> int:
        """Return the current device of this thread: at first the first, which costs nothing."""
        return getattr(self._current, "device", 0)

    def make_current(self, device: int) -> None:
        self._current.device = device
        self.used.add(device)

    def here(self) -> int:
        """Return the current device, which is used now."""
        self.used.add(self.current())
        return self.current()


class Pinned(bytearray):
    """Memory of the host that is not paged."""

    @property
    def ptr(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self))


def memory_pointer(memory, start):
    found = (ctypes.c_char * (memory.size - start)).from_address(memory.ptr + start)
    found.memory = memory  # as long as the array lives
    return found


class Runtime:
    """Stands for `cupy.cuda.runtime`; a handle for another process is an address."""

    CUDARuntimeError = ValueError

    def __init__(self, gpus: Gpus) -> None:
        self._gpus, self.getDevice = gpus, gpus.current
        self.allocated: dict[int, np.ndarray] = {}
        self.opened: list[int] = []
        self.refused = -1  # the device that cannot open others' memory

    def deviceGetPCIBusId(self, index: int) -> str:
        return f"0000:{index:02}:00.0"

    def deviceSynchronize(self) -> None:
        self._gpus.here()

    def malloc(self, nbytes: int) -> int:
        if self._gpus.pooled:
            raise self.CUDARuntimeError("out of memory")
        array = np.full(nbytes + 256, 0xFF, np.uint8)
        start = -(-array.ctypes.data // 256) * 256
        self.allocated[start] = array
        return start

    def free(self, start: int) -> None:
        del self.allocated[start]

    def memset(self, start: int, value: int, nbytes: int) -> None:
        ctypes.memset(start, value, nbytes)

    def memcpy(self, to: int, start: int, nbytes: int, kind: int) -> None:
        ctypes.memmove(to, start, nbytes)

    def ipcGetMemHandle(self, start: int) -> bytes:
        return start.to_bytes(8, "little")

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        if self._gpus.here() == self.refused:
            raise self.CUDARuntimeError("peer access is not supported between these two devices")
        self.opened.append(int.from_bytes(handle, "little"))
        return self.opened[-1]

    def ipcCloseMemHandle(self, start: int) -> None:
        self.opened.remove(start)


def decode(p: np.ndarray) -> Fields:
    found = Fields(
        zip((f.name for f in launches.PEERS.fields),
            launches.PEERS._struct.unpack(p.tobytes()), strict=True)
    )  # fmt: skip
    for name in ("sent", "marks"):
        found[name] = np.frombuffer(found[name], np.uint64).tolist()
    return found


def combine(blocks: int, kind: int, p: Fields, first: int, count: int, out: int) -> None:
    """Do what the kernel does, whose blocks are one here; meetings are as they are there."""
    meetings = array_at(p.meetings, blocks, np.uint32)

    def meet() -> bool:
        meetings[...] += 1
        for other in range(p.size):
            for block in range(blocks if other != p.rank else 0):
                array_at(p.marks[other] + 4 * (8 * block + p.rank), 1, np.uint32)[0] = meetings[
                    block
                ]
        mine = array_at(p.marks[p.rank], (blocks, 8), np.uint32)
        others = [other for other in range(p.size) if other != p.rank]
        while (mine[:, others] < meetings[:, None]).any():
            if array_at(p.ended, 1, np.uint32)[0]:
                return False
            time.sleep(0.0002)
        return True

    if not meet():
        return
    dtype = np.uint8 if kind == 0 else np.float32 if kind == 1 else np.uint16
    size = 16 * count // np.dtype(dtype).itemsize
    parts = [array_at(start + 16 * first, size, dtype) for start in p.sent[: p.size]]
    to = array_at(out, size * (p.size if kind == 0 else 1), dtype)
    if kind == launches.KINDS["copied"]:
        to[...] = np.concatenate(parts)
    else:
        total, *more = (widened(part) if kind == 2 else part.copy() for part in parts)
        for part in more:
            total += part
        to[...] = narrowed(total) if kind == 2 else total
    meet()


class Binding:
    """Stands for `cupy.cuda.nccl`."""

    NCCL_SUM, NCCL_MAX = SUM, MAX
    NcclError = OSError

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        for number, dtype in DTYPES.items():
            setattr(self, f"NCCL_{dtype.name.upper()}", number)

    def get_unique_id(self) -> bytes:
        self._gpus.here()
        return str(id(self)).encode()

    def NcclCommunicator(self, size, unique_id, rank):
        board = self._gpus.boards.setdefault(unique_id, Board(size))
        return Communicator(self._gpus, board, rank)


class Board:
    """Where ranks in threads leave what they send."""

    def __init__(self, size: int) -> None:
        self.sent = [None] * size
        self.barrier = threading.Barrier(size)


class Communicator:
    """One of them; an exchange ends before its call returns."""

    def __init__(self, gpus: Gpus, board: Board, rank: int) -> None:
        self._gpus, self._board, self._rank = gpus, board, rank
        self._device = gpus.here()

    def _exchange(self, sent, received, count, dtype, stream, combine) -> None:
        assert self._gpus.here() == self._device == stream, "NCCL on another device"
        self._board.sent[self._rank] = at(sent, count, dtype).copy()
        self._board.barrier.wait(20)
        found = combine(np.array(self._board.sent))
        self._board.barrier.wait(20)
        at(received, found.size, dtype)[...] = found.reshape(-1)

    def allReduce(self, sent, received, count, dtype, op, stream) -> None:
        how = {SUM: total, MAX: lambda all_: all_.max(axis=0)}[op]
        self._exchange(sent, received, count, dtype, stream, how)

    def reduceScatter(self, sent, received, count, dtype, op, stream) -> None:
        size = len(self._board.sent)
        rows = slice(self._rank * count, (self._rank + 1) * count)
        how = lambda all_: total(all_)[rows]  # noqa: E731
        self._exchange(sent, received, size * count, dtype, stream, how)

    def allGather(self, sent, received, count, dtype, stream) -> None:
        self._exchange(sent, received, count, dtype, stream, lambda all_: all_)

    def broadcast(self, sent, received, count, dtype, root, stream) -> None:
        self._exchange(sent, received, count, dtype, stream, lambda all_: all_[root])

    def abort(self) -> None:
        assert self._gpus.here() == self._device, "an abort on another device"
        self._gpus.aborted.append(self._rank)
        self._board.barrier.abort()

    def destroy(self) -> None:
        assert self._gpus.here() == self._device, "the end on another device"


def total(all_: np.ndarray) -> np.ndarray:
    return all_.sum(axis=0, dtype=all_.dtype)


def at(address: int, count: int, dtype: int) -> np.ndarray:
    dtype = DTYPES[dtype]
    memory = (ctypes.c_char * math.prod((count, dtype.itemsize))).from_address(address)
    return np.frombuffer(memory, dtype)
