"""Exchanges between GPUs that read each other's memory: by NumPy, and on GPUs."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gpus_by_numpy import Gpus
from kernels_by_numpy import at as array_at
from ranks import in_threads, need_gpus
from test_parallel_ranks import as_bfloat16, environment

from cupybnn.backends.cuda import peers as launches
from cupybnn.backends.devices import Device
from cupybnn.parallel import peers as exchanging
from cupybnn.parallel.meeting import Meeting
from cupybnn.parallel.nccl import NcclRanks
from cupybnn.parallel.peers import Peers
from cupybnn.parallel.ranks import total


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


def number_at(address):
    """Return the number of 16 bits at an address."""
    return int(array_at(address, 1, np.uint16)[0])


def check(peers, xp, rank, size, count, wait, turns=3):
    """Check sums and gathered arrays of `count` numbers a rank, one turn after another.

    Nothing but the exchanges keeps a rank from overwriting what others still read.
    """
    whole = size * count
    parts = [(whole, np.float32), (whole, np.uint16), (count, np.uint32)]
    single, half, words = peers.zeros(parts)
    assert not any(bool(array.any()) for array in (single, half, words))
    single_sum, half_sum = xp.zeros(whole, np.float32), xp.zeros(whole, np.uint16)
    share, part = xp.zeros(count, np.float32), xp.zeros(count, np.uint16)
    rows = xp.zeros((size, count), np.uint32)
    begun = [
        peers.all_reduce(single, single_sum, "float32"),
        peers.all_reduce(half, half_sum, "bfloat16"),
        peers.reduce_scatter(single, share, "float32"),
        peers.reduce_scatter(half, part, "bfloat16"),
        peers.all_gather(words, rows),
    ]
    own = slice(rank * count, (rank + 1) * count)
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
            (single_sum, expected), (half_sum, as_bfloat16(expected)), (share, expected[own]),
            (part, as_bfloat16(expected)[own]),
            (rows, np.stack([numbers[:count].view(np.uint32) for numbers in each])),
        ]  # fmt: skip
        for number, (found, right) in enumerate(results):
            if begun[number] is not None:
                np.testing.assert_array_equal(found.get(), right, err_msg=f"{turn}, {number}")
            found.fill(0)
    assert all(peers.reduce_scatter(array, out, "float32") is None for array, out in (
        (xp.zeros(whole, np.float32), share), (single, single[:count]), (single, None),
        (single[1:], share), (single, share[1:]),
    ))  # fmt: skip
    return [launch is not None for launch in begun]


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
    def test_sums_and_gathered_arrays(self, monkeypatch, size):
        def exchange(peers, gpus, rank):
            assert peers.works
            return check(peers, gpus.module, rank, size, 720, lambda: None)

        gpus, found = self.ranks(monkeypatch, size, exchange)
        assert found == [[True] * 5] * size
        assert not gpus.module.cuda.runtime.opened
        assert not gpus.module.cuda.runtime.allocated

    def test_sums_of_large_arrays_for_many_are_left_to_nccl(self, monkeypatch):
        """Of 3 ranks, each reads two thirds of an array more than a ring would bring it."""
        monkeypatch.setattr(exchanging, "_MOST_MORE", 4096)

        def exchanges(peers, gpus, rank):
            found = []
            for count in (1536, 1560):
                (array,) = peers.zeros([(count, np.float32)])
                whole = gpus.module.zeros(peers._size * count, np.float32)
                part = whole[: count // peers._size]
                found.append(
                    [
                        peers.all_reduce(array, whole[:count], "float32") is not None,
                        peers.reduce_scatter(array, part, "float32") is not None,
                        peers.all_gather(array, whole) is not None,
                    ]
                )
            return found

        assert self.ranks(monkeypatch, 3, exchanges)[1] == [[[True] * 3, [False, True, True]]] * 3
        assert self.ranks(monkeypatch, 2, exchanges)[1] == [[[True] * 3] * 2] * 2

    def test_distances_lead_to_what_other_ranks_have(self, monkeypatch):
        barrier = threading.Barrier(3)

        def read(peers, gpus, rank):
            first, second = peers.zeros([(100, np.float32), (7, np.uint16)])
            second[...] = rank + 1
            barrier.wait(60)
            start = int(second[3:].data.ptr)
            far = peers.distances(second[3:])
            found = [number_at(start + distance) for distance in far]
            assert far[rank] == 0
            assert peers.distances(first) == far
            assert peers.distances(gpus.module.zeros(4, np.float32)) is None
            barrier.wait(60)
            return found

        assert self.ranks(monkeypatch, 3, read)[1] == [[1, 2, 3]] * 3

    def test_memory_that_the_pool_keeps_is_given_back_if_there_is_no_other(self, monkeypatch):
        def allocate(peers, gpus, rank):
            gpus.pooled = 1 << 30
            return peers.zeros([(4, np.float32)]) is not None

        assert self.ranks(monkeypatch, 2, allocate)[1] == [True] * 2

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

    def test_none_where_nccl_may_not_either(self, monkeypatch):
        monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
        assert self.ranks(monkeypatch, 2, lambda peers, *_: peers.works)[1] == [False] * 2

    def test_none_where_what_others_write_does_not_arrive(self, monkeypatch):
        monkeypatch.setattr(exchanging, "_SECONDS_TO_MEET", 0.1)
        stale = "gpus_by_numpy.Runtime.memcpy"
        monkeypatch.setattr(stale, lambda *given: None)
        assert self.ranks(monkeypatch, 2, lambda peers, *_: peers.works)[1] == [False] * 2

    def test_a_rank_that_does_not_come_is_waited_for_until_the_end(self, monkeypatch):
        ended = threading.Event()

        def exchange(peers, gpus, rank):
            (array,) = peers.zeros([(64, np.float32)])
            out = gpus.module.zeros(64, np.float32)
            if rank == 1:
                ended.wait(60)  # the other writes into this one's memory
                return
            try:
                began = time.monotonic()
                threading.Timer(0.3, peers.end).start()
                peers.all_reduce(array, out, "float32")()
                assert time.monotonic() - began > 0.2
                peers.all_reduce(array, out, "float32")()  # nobody waits any more
            finally:
                ended.set()

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
                assert (ranks.distances(words) is None) == (refused >= 0)
                return ranks._peers.works

        assert in_threads(2, run) == [refused < 0] * 2


@pytest.mark.gpu
class TestOnOneGpu:
    """The kernel, with all that it reads on one GPU, where ranks cannot wait for each other."""

    @pytest.mark.parametrize("size", [1, 2, 3, 8])
    @pytest.mark.parametrize("kind", ["copied", "float32", "bfloat16"])
    def test_what_it_combines(self, kind, size):
        """The others came long ago: what they leave is in this rank's memory from the beginning."""
        import cupy

        dtype = np.float32 if kind == "float32" else np.uint16
        random = np.random.default_rng(size)
        numbers = random.standard_normal((size, 4096 * 9)).astype(np.float32)
        each = numbers if dtype == np.float32 else (numbers.view(np.uint32) >> 16).astype(dtype)
        sent, first, count = [cupy.asarray(row) for row in each], 64, 4096 * 8 + 32
        out = cupy.zeros((size if kind == "copied" else 1, count), dtype)
        control = cupy.zeros((size, launches.CONTROL_BYTES // 4), np.uint32)
        most = launches._MOST_BLOCKS
        control[size - 1, : 8 * most] = 1 << 20
        ended = cupy.cuda.alloc_pinned_memory(8)
        np.frombuffer(ended, np.uint32, 1)[0] = 0
        places = tuple(row.data.ptr for row in control)
        host = launches.Host(0, size - 1, size, places, ended.ptr)
        launches.combine(
            host, kind, [array.data.ptr for array in sent], out.data.ptr,
            first=first * out.itemsize, nbytes=count * out.itemsize,
            stream=cupy.cuda.get_current_stream(),
        )  # fmt: skip
        part = each[:, first : first + count]
        expected = part if kind == "copied" else total(part, kind == "bfloat16")
        np.testing.assert_array_equal(out.get(), expected.reshape(out.shape))
        blocks = launches._blocks(count * out.itemsize // 16)
        marks = control[:, : 8 * most].reshape(size, most, 8).get()
        for other in range(size - 1):  # two meetings of each block
            assert (marks[other, :blocks, size - 1] == 2).all()

    @pytest.mark.parametrize("shape", [(96, 256), (70, 37)], ids=str)
    @pytest.mark.parametrize("real", [np.float32, np.uint16])
    @pytest.mark.parametrize("size", [1, 2, 3, 8])
    def test_an_update_that_reads_is_that_of_the_sum(self, size, real, shape):
        """Bit for bit; where the gradients of all ranks lie on one GPU."""
        import cupy

        from cupybnn.backends.cuda.fused import Launcher
        from cupybnn.backends.cuda.fused_update import ParameterUpdate, Update

        random = np.random.default_rng(size)
        numbers = random.standard_normal((size, *shape)).astype(np.float32)
        each = numbers if real == np.float32 else (numbers.view(np.uint32) >> 16).astype(real)
        length = -(-each[0].nbytes // 256) * 256
        memory = cupy.zeros((size, length // each.itemsize), real)
        memory[:, : each[0].size] = cupy.asarray(each.reshape(size, -1))
        own = size // 2
        distances = tuple(length * (other - own) for other in range(size))
        summed = cupy.asarray(total(each, real == np.uint16)).reshape(shape)
        latent, means = (random.uniform(-1, 1, shape).astype(np.float32) for _ in range(2))
        found = []
        for gradient, far in ((summed, ()), (memory[own, : summed.size].reshape(shape), distances)):
            weight, mean, square = (cupy.asarray(x) for x in (latent, means, means**2))
            sent = cupy.zeros((-(-shape[0] // 32), shape[1]), np.uint32)
            kept = cupy.zeros(shape, np.float32)
            share = ParameterUpdate(
                weight=weight, grad=gradient, mean=mean, square=square, sent=sent, binary=True,
                kept_grad=kept, gate="clip", limit=0.9, penalty=1e-3, distances=far,
            )  # fmt: skip
            names = ("weight", "grad", "mean", "square", "kept_grad")
            rest = ParameterUpdate(**{name: cupy.zeros(8, np.float32) for name in names})
            loss = cupy.zeros(1, np.float32)
            update = Update(
                Launcher(0, np.dtype(real)), [[share], [rest]], betas=(0.9, 0.99), penalty="l1",
                keep_gradients=True, rates=cupy.asarray([[1e-2, 1e-2, 1e-8, 0]], np.float32),
                step=cupy.zeros(1, np.int64), mean_loss=cupy.zeros(1, np.float32), loss=loss,
            )  # fmt: skip
            update.launch(0)
            update.launch(1)
            found.append([x.get() for x in (weight, mean, square, sent, kept, loss)])
        for by_sum, by_reading in zip(*found, strict=True):
            np.testing.assert_array_equal(by_reading, by_sum)
        assert (found[0][0] != latent).any()

    def alone(self):
        """Return the exchanges of one rank with itself."""
        import cupy

        from cupybnn.backends.devices import resolve

        stream = cupy.cuda.Stream(non_blocking=True)
        peers = Peers(resolve("cuda"), 0, 1, stream, lambda content: [content])
        assert peers.works
        return peers, stream

    def test_one_rank_with_itself(self):
        import cupy

        peers, stream = self.alone()
        with stream:
            assert all(check(peers, cupy, 0, 1, 4096, stream.synchronize))

    def test_in_a_graph(self):
        import cupy

        from cupybnn.backends.cuda.graph import capture

        peers, stream = self.alone()
        with stream:
            (mine,) = peers.zeros([(1 << 16, np.float32)])
            out = cupy.zeros(1 << 16, np.float32)
            launch = peers.reduce_scatter(mine, out, "float32")

            def step(more=1):
                launch()
                cupy.add(mine, more, out=mine)

            step(0)  # compiled, and loaded
            graph = capture(stream, step)
            for turn in range(3):
                graph.launch(stream)
                assert (out.get(stream=stream) == turn).all()

    def test_a_rank_that_does_not_come_is_waited_for_until_the_end(self):
        import cupy

        stream, control = cupy.cuda.Stream(non_blocking=True), cupy.zeros(1 << 12, np.uint32)
        ended = cupy.cuda.alloc_pinned_memory(8)
        word = np.frombuffer(ended, np.uint32, 1)
        word[0] = 0
        places = (control.data.ptr, control[1 << 11 :].data.ptr)
        host = launches.Host(0, 0, 2, places, ended.ptr)
        launches.prepare(0, 2)
        sent, out = cupy.zeros(4, np.float32), cupy.ones(4, np.float32)
        cupy.cuda.get_current_stream().synchronize()
        launches.combine(
            host, "float32", [sent.data.ptr] * 2, out.data.ptr, nbytes=16, stream=stream
        )
        time.sleep(0.1)
        waited = not stream.done
        word[0] = 1
        stream.synchronize()
        assert waited
        assert (out == 1).all()
        assert control[1 << 11] == 1  # what the other would have seen


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import cupy
import numpy as np
from cupybnn import parallel
from test_parallel_peers import check
with parallel.connect("cuda") as ranks:
    ranks.shared_zeros(cupy, [(1, np.float32)])
    peers, stream = ranks._peers, ranks._stream
    assert peers.works
    for count in (8, 4096, 1 << 18):
        with stream:
            found = check(peers, cupy, ranks.rank, ranks.size, count, stream.synchronize, 5)
        assert all(found)
"""


STEPS = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from cupybnn import parallel
from cupybnn.backends.devices import resolve
from cupybnn.parallel.nccl import NcclRanks
from cupybnn.parallel.ranks import Ranks
from cupybnn.training import TrainConfig, Trainer
from cupybnn.training.fast import exchange, plan
from test_fast_ranks import COMMON, settings_of
direct = NcclRanks.shared_zeros
def steps(name, reads, **more):
    NcclRanks.shared_zeros = direct if reads else Ranks.shared_zeros
    settings = {**settings_of(name), "graph": True, "device": "cuda", **more}
    trainer = Trainer(TrainConfig(**{**COMMON, **settings}), ranks=ranks)
    trainer._team = trainer._join(None)
    with trainer.device.scope():
        losses = [float(trainer.make_step(step).loss) for step in range(20)]
        assert bool(trainer._step.exchange.distances) == reads
        assert trainer._step._graph is not None or not trainer._step._capture, trainer.notices
        trainer._team.gather()
        trainer._team.finish()
        state = trainer.state().arrays
    return losses, {name: np.asarray(array).tobytes() for name, array in state.items()}
with parallel.connect("cuda") as ranks, np.errstate(all="ignore"):
    exchange._READ_FROM = 0  # as if weights were many
    for name, more in (
        ("xnor", {"dtype": "bfloat16", "n_hidden": 1056, "batch_size": 600}),
        ("all binary", {"dtype": "bfloat16"}), ("rounded", {}), ("dropout, penalty", {}),
    ):
        if name == "rounded":
            plan._DENSE_COPY_BYTES = 0  # and from here on, images
        by_sums, by_reading = (steps(name, reads, **more) for reads in (False, True))
        assert by_sums == by_reading, name
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("text", "gpus"),
    # A sum of two is rounded once by NCCL, too; one of four is not.
    [(PROGRAM, 2), (PROGRAM, 4), (STEPS, 2)],
    ids=["exchanges, 2", "exchanges, 4", "steps, 2"],
)
def test_gpus_read_memory_of_other_processes(tmp_path, text, gpus):
    need_gpus(gpus)
    program = tmp_path / "program.py"
    program.write_text(text)
    processes = [
        subprocess.Popen(
            [sys.executable, program, Path(__file__).parent],
            env=environment(tmp_path, RANK=str(r), WORLD_SIZE=str(gpus), LOCAL_RANK=str(r)),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for r in range(gpus)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * gpus, said
