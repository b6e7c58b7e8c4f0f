"""Exchanges between GPUs that read each other's memory: by NumPy, and by ranks on one GPU."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from gpus_by_numpy import Gpus
from ranks import in_threads
from test_parallel_ranks import as_bfloat16

from cupybnn.backends.devices import Device
from cupybnn.parallel import peers as exchanging
from cupybnn.parallel.meeting import Meeting
from cupybnn.parallel.nccl import NcclRanks
from cupybnn.parallel.peers import Peers


def gathering(size):
    """Return a function for each rank: all get what each gave."""
    given, barrier = [b""] * size, threading.Barrier(size)

    def of(rank):
        def gather(content):
            given[rank] = content
            barrier.wait(60)
            found = list(given)
            barrier.wait(60)
            return found

        return gather

    return of


def numbers_of(rank, count, turn):
    return np.random.default_rng([rank, turn]).integers(-9, 10, count).astype(np.float32)


def check(peers, xp, rank, size, count, wait, turns=3):
    """Check sums and gathered arrays of `count` numbers a rank, one turn after another.

    Nothing but the exchanges keeps a rank from overwriting what others still read.
    """
    whole = size * count
    parts = [(whole, np.float32), (whole, np.uint16), (count, np.uint32)]
    single, half, words = peers.zeros(parts)
    assert not any(bool(array.any()) for array in (single, half, words))
    total, rounded = xp.zeros(whole, np.float32), xp.zeros(whole, np.uint16)
    share, part = xp.zeros(count, np.float32), xp.zeros(count, np.uint16)
    rows = xp.zeros((size, count), np.uint32)
    begun = [
        peers.all_reduce(single, total, "float32"),
        peers.all_reduce(half, rounded, "bfloat16"),
        peers.reduce_scatter(single, share, "float32"),
        peers.reduce_scatter(half, part, "bfloat16"),
        peers.all_gather(words, rows),
    ]
    reduced = begun[0] is not None  # else too large
    outs, own = (total, rounded, share, part, rows), slice(rank * count, (rank + 1) * count)
    for turn in range(turns):
        each = [numbers_of(other, whole, turn) for other in range(size)]
        single.set(each[rank])
        half.set(as_bfloat16(each[rank]))
        words.set(each[rank][:count].view(np.uint32))
        wait()
        for launch in filter(None, begun):
            launch()
        wait()
        expected = sum(each)
        results = [
            (total, expected), (rounded, as_bfloat16(expected)), (share, expected[own]),
            (part, as_bfloat16(expected)[own]),
            (rows, np.stack([numbers[:count].view(np.uint32) for numbers in each])),
        ]  # fmt: skip
        for number, (found, right) in enumerate(results):
            if begun[number] is not None:
                np.testing.assert_array_equal(found.get(), right, err_msg=f"{turn}, {number}")
            found.fill(0)
    assert all(begun[2:]), "not exchanged directly"
    assert all(peers.reduce_scatter(array, out, "float32") is None for array, out in (
        (xp.zeros(whole, np.float32), share), (single, single[:count]), (single, None),
        (single[1:], share), (single, share[1:]),
    ))  # fmt: skip
    del outs
    return reduced


class TestByNumpy:
    """The protocol: what is launched reads and writes other ranks' memory as the kernel does."""

    def ranks(self, monkeypatch, size, function):
        gpus, gather = Gpus(monkeypatch), gathering(size)

        def run(rank):
            device = Device("cuda", rank)
            device.use()
            stream = gpus.module.cuda.Stream()
            return function(Peers(device, rank, size, stream, gather(rank)), gpus, rank)

        return gpus, in_threads(size, run)

    @pytest.mark.parametrize("size", [1, 2, 3])
    @pytest.mark.parametrize("most", [1 << 20, 64])
    def test_sums_and_gathered_arrays(self, monkeypatch, size, most):
        monkeypatch.setattr(exchanging, "_MOST_READ", most)

        def exchange(peers, gpus, rank):
            assert peers.works
            return check(peers, gpus.module, rank, size, 720, lambda: None)

        gpus, found = self.ranks(monkeypatch, size, exchange)
        assert found == [size == 1 or most > 64] * size
        assert not gpus.module.cuda.runtime.opened
        assert not gpus.module.cuda.runtime.allocated

    def test_none_where_a_rank_cannot_read_another_s_memory(self, monkeypatch):
        def look(peers, gpus, rank):
            return peers.works

        class Refusing(Gpus):
            def __init__(self, monkeypatch):
                super().__init__(monkeypatch)
                self.module.cuda.runtime.refused = 1

        monkeypatch.setitem(globals(), "Gpus", Refusing)
        gpus, found = self.ranks(monkeypatch, 3, look)
        assert found == [False] * 3
        assert not gpus.module.cuda.runtime.opened
        assert not gpus.module.cuda.runtime.allocated

    def test_none_on_several_hosts(self, monkeypatch):
        names = iter(range(9))
        monkeypatch.setattr(exchanging, "identity", lambda: b"host %d" % next(names))
        assert self.ranks(monkeypatch, 2, lambda peers, *_: peers.works)[1] == [False] * 2

    def test_none_where_what_others_write_does_not_arrive(self, monkeypatch):
        monkeypatch.setattr(exchanging, "_SECONDS_TO_MEET", 0.1)
        stale = "gpus_by_numpy.Runtime.memcpy"
        monkeypatch.setattr(stale, lambda *given: None)
        assert self.ranks(monkeypatch, 2, lambda peers, *_: peers.works)[1] == [False] * 2

    def test_a_rank_that_does_not_come_is_waited_for_until_the_end(self, monkeypatch):
        def exchange(peers, gpus, rank):
            (array,) = peers.zeros([(64, np.float32)])
            out = gpus.module.zeros(64, np.float32)
            if rank == 1:
                return
            began = time.monotonic()
            threading.Timer(0.3, peers.end).start()
            peers.all_reduce(array, out, "float32")()
            assert time.monotonic() - began > 0.2
            peers.all_reduce(array, out, "float32")()  # nobody waits any more

        assert self.ranks(monkeypatch, 2, exchange)[1] == [None] * 2

    @pytest.mark.parametrize("refused", [-1, 2])
    def test_ranks_of_nccl_use_them(self, monkeypatch, tmp_path, refused):
        gpus = Gpus(monkeypatch)
        gpus.module.cuda.runtime.refused = refused
        xp = gpus.module

        def run(rank):
            device, meeting = Device("cuda", rank + 1), Meeting(tmp_path / "ranks", rank, 2, 20.0)
            with NcclRanks(device, rank, 2, b"an id", meeting) as ranks:
                with device.scope():
                    mine, words = ranks.shared_zeros(xp, [(64, np.float32), (8, np.uint32)])
                    mine[...], words[...] = np.arange(64) + rank, rank + 1
                    out, part = xp.empty(64, np.float32), xp.empty(32, np.float32)
                    rows = xp.empty((2, 8), np.uint32)
                if refused < 0:  # NCCL is not asked
                    ranks._communicator._exchange = None
                total = 2 * np.arange(64) + 1
                assert (ranks.all_reduce(mine, out=out).wait() == total).all()
                assert (
                    ranks.reduce_scatter(mine, out=part).wait() == total[32 * rank :][:32]
                ).all()
                assert (ranks.all_gather(words, out=rows).wait() == [[1] * 8, [2] * 8]).all()
                assert gpus.current() == 0
                return ranks._peers.works

        assert in_threads(2, run) == [refused < 0] * 2


@pytest.mark.gpu
class TestOnOneGpu:
    """Several ranks in threads of one process, whose memory needs no opening."""

    def ranks(self, monkeypatch, size, function):
        import cupy

        from cupybnn.backends.devices import resolve

        runtime, gather = cupy.cuda.runtime, gathering(size)
        monkeypatch.setattr(runtime, "ipcGetMemHandle", lambda start: start.to_bytes(8, "little"))
        monkeypatch.setattr(
            runtime, "ipcOpenMemHandle", lambda handle: int.from_bytes(handle, "little")
        )
        monkeypatch.setattr(runtime, "ipcCloseMemHandle", lambda start: None)

        def run(rank):
            device = resolve("cuda")
            device.use()
            stream = cupy.cuda.Stream(non_blocking=True)
            made = Peers(device, rank, size, stream, gather(rank))
            with stream:
                found = function(made, stream, rank)
            gather(rank)(b"end")  # memory is given back when nobody uses it
            return found

        return in_threads(size, run)

    @pytest.mark.parametrize(("size", "count"), [(1, 4), (2, 4096), (2, 3 << 20), (3, 1 << 16)])
    def test_sums_and_gathered_arrays(self, monkeypatch, size, count):
        import cupy

        def exchange(peers, stream, rank):
            assert peers.works
            return check(peers, cupy, rank, size, count, stream.synchronize)

        assert self.ranks(monkeypatch, size, exchange) == [count < 1 << 20] * size

    def test_in_a_graph(self, monkeypatch):
        import cupy

        from cupybnn.backends.cuda.graph import capture

        def exchange(peers, stream, rank):
            (mine,) = peers.zeros([(1 << 16, np.float32)])
            out = cupy.zeros(1 << 15, np.float32)
            launch = peers.reduce_scatter(mine, out, "float32")

            def step(more=1):
                launch()
                cupy.add(mine, more, out=mine)

            step(0)  # compiled, and loaded
            graph = capture(stream, step)
            for turn in range(20):
                graph.launch(stream)
                if turn % 7 == rank:
                    time.sleep(0.002)
                expected = peers._size * turn
                assert (out.get(stream=stream) == expected).all(), turn

        assert self.ranks(monkeypatch, 2, exchange) == [None] * 2

    def test_the_end(self, monkeypatch):
        import cupy

        def exchange(peers, stream, rank):
            (mine,) = peers.zeros([(1 << 16, np.float32)])
            out = cupy.zeros(1 << 15, np.float32)
            if rank == 1:
                return
            peers.reduce_scatter(mine, out, "float32")()
            time.sleep(0.1)
            assert not stream.done
            peers.end()
            stream.synchronize()

        assert self.ranks(monkeypatch, 2, exchange) == [None] * 2
