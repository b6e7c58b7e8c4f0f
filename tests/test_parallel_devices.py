"""Each rank uses its own GPU and no other, whichever is current: shown without one."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gpus_by_numpy import Gpus
from ranks import in_threads

from cupybnn import parallel
from cupybnn.backends.devices import Device
from cupybnn.errors import RankError, SettingError
from cupybnn.parallel import joining
from cupybnn.parallel.files import FileRanks
from cupybnn.parallel.launch import Launch
from cupybnn.parallel.meeting import Meeting
from cupybnn.parallel.nccl import NcclRanks
from cupybnn.parallel.staged import StagedRanks


def exchange_everything(ranks, gpus):
    """Use what a run uses, with device 0 current, and arrays on the rank's GPU."""
    with ranks._gpu.scope():
        mine = gpus.module.asarray(np.arange(6, dtype=np.float32) + ranks.rank)
        turned = gpus.module.asarray(np.arange(6, dtype=np.float32).reshape(2, 3)).T
        out = gpus.module.empty(6, np.float32)
    total = 2 * np.arange(6) + 1
    results = [
        (ranks.all_reduce(mine).wait(), total),
        (ranks.all_reduce(mine, out=out).wait(), total),
        (ranks.all_reduce(turned).wait(), 2 * np.arange(6).reshape(2, 3).T),
        (ranks.reduce_scatter(mine).wait(), total[3 * ranks.rank :][:3]),
        (ranks.all_max(mine).wait(), np.arange(6) + 1),
        (ranks.all_gather(mine).wait()[1], np.arange(6) + 1),
        (ranks.broadcast(mine).wait(), np.arange(6)),
    ]
    for found, expected in results:
        np.testing.assert_array_equal(found, expected)
        assert found.device.id == ranks._gpu.index
    assert ranks.sums([1.0, ranks.rank]).tolist() == [2, 1]
    assert ranks.gather_bytes(b"x" * ranks.rank) == [b"", b"x"]
    ranks.barrier()
    if ranks.capturable:
        ranks.replayed(3)
    assert gpus.current() == 0  # as before


@pytest.mark.parametrize("kind", ["nccl", "staged"])
def test_exchanges_take_place_on_the_gpu_of_the_rank(monkeypatch, tmp_path, kind):
    gpus = Gpus(monkeypatch)

    def run(rank):
        device, meeting = Device("cuda", rank + 1), Meeting(tmp_path / "ranks", rank, 2, 20.0)
        if kind == "nccl":
            ranks = NcclRanks(device, rank, 2, b"an id", meeting)
        else:
            ranks = StagedRanks(FileRanks(meeting), device)
        with ranks:
            exchange_everything(ranks, gpus)

    assert in_threads(2, run) == [None, None]


def launched(monkeypatch, local_rank=lambda rank: rank + 1):
    """Let each thread be a rank that a launcher started."""
    mine = threading.local()
    monkeypatch.setattr(joining, "detect", lambda variables: mine.launch)

    def launch(rank):
        mine.launch = Launch("torchrun", rank, 2, local_rank(rank), "job")

    return launch


def test_a_rank_uses_no_gpu_but_its_own(monkeypatch, tmp_path):
    """Not even to look after the others, to abort, or to come back from its own to the first."""
    gpus, launch = Gpus(monkeypatch), launched(monkeypatch)

    def run(rank):
        launch(rank)
        with parallel.connect("cuda", tmp_path, seconds=1.0) as ranks:
            assert gpus.current() == ranks._gpu.index == rank + 1
            with ranks._gpu.scope():
                mine = gpus.module.asarray(np.arange(6, dtype=np.float32))
            ranks.all_reduce(mine).wait()
            ranks._will_end(stuck := gpus.module.cuda.Event())
            stuck.done = False
            time.sleep(1.2)  # the meeting's thread has looked at the event
            if rank == 1:
                raise OSError("No space left on device")
            while True:
                ranks.check()
                time.sleep(0.01)

    first, second = in_threads(2, run)
    assert isinstance(second, OSError)
    assert isinstance(first, RankError)
    assert "Rank 1 " in str(first)
    assert sorted(gpus.aborted) == [0, 1]
    assert gpus.used == {1, 2}


def test_two_ranks_with_one_gpu_are_refused_before_nccl(monkeypatch, tmp_path):
    gpus, launch = Gpus(monkeypatch), launched(monkeypatch, lambda rank: 3)

    def run(rank):
        launch(rank)
        parallel.connect("cuda", tmp_path, seconds=5.0)

    errors = in_threads(2, run)
    assert [type(error) for error in errors] == [SettingError] * 2
    assert "got " in str(errors[0])
    assert "0000:03:00.0 for the ranks 0 and 1" in str(errors[0])
    assert [error.report for error in errors] == [True, False]
    assert not gpus.used
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize("captured", [False, True])
def test_an_exchange_that_nccl_refuses(monkeypatch, captured):
    gpus = Gpus(monkeypatch)
    monkeypatch.setattr("cupybnn.parallel.nccl._SECONDS_TO_NOTICE", 0.0)
    ranks = NcclRanks(Device("cuda", 1), 0, 1, b"an id", None)
    with ranks._gpu.scope():
        mine = gpus.module.asarray(np.zeros(3, np.float32))

    def fail(*given):
        raise OSError("NCCL_ERROR_INVALID_USAGE: invalid usage")  # the stand-in's NcclError

    ranks._communicator.allReduce = fail
    gpus.capturing = captured  # then the caller goes on without a graph
    kind = OSError if captured else RankError
    with pytest.raises(kind, match="NCCL_ERROR_INVALID_USAGE"):
        ranks.all_reduce(mine)


def test_a_rank_without_a_gpu_among_others_is_refused(monkeypatch, tmp_path):
    gpus, launch = Gpus(monkeypatch), launched(monkeypatch)

    def run(rank):
        launch(rank)
        parallel.connect("cuda" if rank else "cpu", tmp_path, seconds=5.0)

    errors = in_threads(2, run)
    assert [type(error) for error in errors] == [SettingError] * 2
    assert "got the CPU for rank 0 and " in str(errors[0])
    assert [error.report for error in errors] == [True, False]
    assert not gpus.used


def test_a_rank_that_is_lost_is_named_though_nccl_fails_first(monkeypatch, tmp_path):
    gpus, launch = Gpus(monkeypatch), launched(monkeypatch)

    def run(rank):
        launch(rank)
        with parallel.connect("cuda", tmp_path, seconds=1.0) as ranks:
            if rank == 1:
                time.sleep(0.5)
                raise OSError("No space left on device")

            def fail(*given):
                raise OSError("remote process exited")  # the stand-in's NcclError

            ranks._communicator.allReduce = fail
            ranks.all_reduce(gpus.module.asarray(np.zeros(3, np.float32)))

    first, _ = in_threads(2, run)
    assert isinstance(first, RankError)
    assert "Rank 1 " in str(first)


def test_nccl_that_fails_is_one_sentence(monkeypatch):
    gpus = Gpus(monkeypatch)

    def fail(size, unique_id, rank):
        raise OSError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error")

    monkeypatch.setattr("gpus_by_numpy.Binding.NcclCommunicator", staticmethod(fail))
    with pytest.raises(Exception, match="NCCL cannot connect the GPUs of 2 ranks: NCCL_ERROR"):
        NcclRanks(Device("cuda", 1), 0, 2, b"an id", None)
    assert gpus.current() == 0


def test_a_kernel_is_compiled_on_its_device_alone(monkeypatch):
    from cupybnn.backends.cuda import compiler

    gpus = Gpus(monkeypatch)
    seen = []

    def compile_(source, function, defines):
        seen.append(gpus.here())
        return object()

    monkeypatch.setattr(compiler, "_compile", compile_)
    monkeypatch.setattr(compiler, "_kernels", {})
    compiler.compile_together(
        lambda: compiler.load_kernel("smxx_pack", "pack", (), 2), lambda sentence: None
    )
    assert seen == [2]
    assert gpus.used == {2}
