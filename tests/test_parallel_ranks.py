"""How ranks are started, and what they exchange: by files, MPI and NCCL."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ranks import MPIEXEC, need_gpus, needs_mpi, together

from cupybnn import parallel
from cupybnn.backends import devices
from cupybnn.backends.cuda.sources import kernels_dir
from cupybnn.errors import DeviceError, SettingError
from cupybnn.extras import to_install
from cupybnn.parallel import joining, starting
from cupybnn.parallel import ranks as exchanging
from cupybnn.parallel.launch import detect

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
SLURM = {
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "9",
    "SLURM_STEP_ID": "0",
}


class TestLaunch:
    @pytest.mark.parametrize(
        ("by", "variables"),
        [("torchrun", TORCHRUN), ("mpirun", OPEN_MPI), ("mpirun", MPICH), ("srun", SLURM)],
    )
    def test_each_launcher_is_known_by_its_variables(self, by, variables):
        found = detect({**variables, "HOME": "/home/someone"})
        assert (found.by, found.rank, found.size, found.local_rank) == (by, 2, 4, 1)
        other = {k: "0" if "RANK" in k or "PROCID" in k else v for k, v in variables.items()}
        assert detect(other).job == found.job  # the same for every rank of a job

    def test_jobs_have_different_names(self):
        assert detect(TORCHRUN).job != detect({**TORCHRUN, "MASTER_PORT": "29501"}).job
        assert detect(SLURM).job != detect({**SLURM, "SLURM_STEP_ID": "1"}).job

    def test_one_process_is_no_launch(self):
        assert detect({}) is None
        assert detect({"RANK": "0", "WORLD_SIZE": "1"}) is None
        # In a batch script, outside of srun.
        assert detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "9"}) is None

    def test_srun_with_pmi_is_mpi(self):
        assert detect({**SLURM, **MPICH}).by == "mpirun"

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"RANK": "1"}, "WORLD_SIZE, which torchrun sets, must be a whole number; got nothing"),
            (
                {**TORCHRUN, "RANK": "x"},
                "RANK, which torchrun sets, must be a whole number; got 'x'",
            ),
            ({**TORCHRUN, "RANK": "4"}, "must be from 0 to WORLD_SIZE - 1; got 4 and 4"),
        ],
    )
    def test_inconsistent_variables(self, variables, message):
        with pytest.raises(SettingError, match=message):
            detect(variables)

    def test_outside_of_a_launcher_there_is_one_rank(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "PMI_RANK", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(name, raising=False)
        with parallel.connect("cpu") as ranks:
            assert (ranks.rank, ranks.size) == (0, 1)
            check_exchanges(ranks)

    @pytest.mark.parametrize("file", ["smxx_pack.cu", "include/signs.cuh"])
    def test_the_version_of_a_rank_includes_its_kernels(self, tmp_path, monkeypatch, file):
        copy = tmp_path / "kernels"
        shutil.copytree(kernels_dir(), copy)
        monkeypatch.setattr("cupybnn.backends.cuda.sources.kernels_dir", lambda: copy)
        here = joining._version.__wrapped__()
        assert here == joining._version.__wrapped__()
        with open(copy / file, "a") as source:
            source.write("// another commit\n")
        assert here != joining._version.__wrapped__()

    def test_ranks_take_no_numbered_device(self, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr("cupybnn.parallel.joining.cuda_status", lambda: Gpus())
        with pytest.raises(SettingError, match="each rank takes the GPU of its own number"):
            parallel.connect("cuda:1")

    def test_without_cupy_ranks_on_gpus_are_pointed_to_nccl_too(self, monkeypatch, capsys):
        from cupybnn.cli.main import main

        monkeypatch.setitem(sys.modules, "cupy", None)  # so that it cannot be imported
        monkeypatch.setattr(devices, "_cupy_wheels", list)
        status = devices.cuda_status.__wrapped__()
        for module in (joining, starting):
            monkeypatch.setattr(module, "cuda_status", lambda: status)
        needed = f"{to_install('distributed-cuda13')}, or the extra distributed-cuda12."
        train = ["train", "--dataset", "digits"]
        for words in ([*train, "--gpus", "2"], ["bench", "train", "--gpus", "1,2"]):
            assert main(words) == 2
            said = capsys.readouterr().err
            assert "the number of GPUs, 0; got 2. CuPy is not installed." in said
            assert said.endswith(f"{needed}\n")
        assert main([*train, "--gpus", "1"]) == 2
        assert "NCCL" not in capsys.readouterr().err
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(DeviceError, match="CuPy is not installed") as caught:
            parallel.connect("cuda")
        assert str(caught.value).endswith(needed)
        # With a CuPy that sees no GPU, there is nothing to install.
        monkeypatch.setattr(starting, "cuda_status", lambda: devices.CudaStatus(False, "No GPU."))
        assert starting.why_no_gpus() == "No GPU."


class Gpus:
    available, device_count = True, 2


def check_exchanges(ranks, xp=np):
    """Check every exchange, on whatever connects `ranks`."""
    n, r = ranks.size, ranks.rank
    own = functools.partial(contribution, xp=xp)
    for dtype in ("float32", "float64", "int32", "uint8"):
        for shape in ((), (1,), (7,), (3, 5), (130, 130)):
            total = ranks.all_reduce(own(r, shape, dtype)).wait()
            expected = own(0, shape, dtype)
            for other in range(1, n):
                expected = xp.asarray(expected + own(other, shape, dtype))
            assert total.dtype == dtype
            assert total.shape == shape
            if xp is np:  # added in the order of the ranks, so exactly
                assert total.tobytes() == expected.tobytes()
            else:
                assert float(abs(total - expected).max()) < 1e-4
            most = ranks.all_max(own(r, shape, dtype)).wait()
            assert (
                most == functools.reduce(xp.maximum, (own(k, shape, dtype) for k in range(n)))
            ).all()
            rows = ranks.all_gather(own(r, shape, dtype)).wait()
            assert rows.shape == (n, *shape)
            assert all((rows[k] == own(k, shape, dtype)).all() for k in range(n))
            assert (ranks.broadcast(own(r, shape, dtype)).wait() == own(0, shape, dtype)).all()
        whole = sum(own(k, (n * 6,), "float64") for k in range(n))
        begun = [ranks.reduce_scatter(own(r, (n * 6,), "float64")) for _ in range(3)]
        for pending in reversed(begun):  # several at once, and awaited in another order
            assert float(abs(pending.wait() - whole[r * 6 : r * 6 + 6]).max()) < 1e-12
    check_results_written_elsewhere(ranks, xp)
    assert ranks.sums([1, 2.5, r]).tolist() == [n, 2.5 * n, n * (n - 1) / 2]
    texts = [b"x" * k for k in range(n)]
    assert ranks.gather_bytes(texts[r]) == texts
    ranks.agree("agree", {"a": 1, "b": [1, 2]})
    ranks.barrier()


def check_results_written_elsewhere(ranks, xp):
    """Check exchanges with an `out`, of bit patterns of bfloat16 among others."""
    n, r = ranks.size, ranks.rank
    for count in (3, 5000):  # MPI takes another way for large arrays
        whole = np.random.default_rng(7).integers(-9, 10, (n, n * count)).astype(np.float32)
        total = whole.sum(axis=0)
        for bfloat16 in (False, True):
            mine, expected = (as_bfloat16(x) if bfloat16 else x for x in (whole, total))
            mine = xp.array(mine[r])
            out = xp.empty_like(mine)
            assert ranks.all_reduce(mine, out=out, bfloat16=bfloat16).wait() is out
            assert (out == xp.asarray(expected)).all()
            part = xp.empty(count, mine.dtype)
            ranks.reduce_scatter(mine, out=part, bfloat16=bfloat16).wait()
            assert (part == xp.asarray(expected[r * count :][:count])).all()
            rows = xp.empty((n, count), mine.dtype)
            ranks.all_gather(part, out=rows).wait()
            assert (rows.reshape(-1) == xp.asarray(expected)).all()
            bits = xp.asarray(np.arange(5, dtype=np.int32) * (-1) ** r)
            ranks.all_max(bits, out=bits).wait()
            assert (bits == xp.arange(5)).all()
            ranks.all_reduce(mine, out=mine, bfloat16=bfloat16).wait()
            assert (mine == xp.asarray(expected)).all()


def as_bfloat16(numbers):
    """Return the bit patterns of float32 numbers that bfloat16 holds exactly."""
    patterns = numbers.view(np.uint32)
    assert not (patterns & 0xFFFF).any()
    return (patterns >> 16).astype(np.uint16)


def test_sums_of_bfloat16_are_rounded_once():
    one, least = 0x3F80, 0x3B80  # 1 and 2**-8, half a unit in the last place of 1
    parts = np.array([[one, one, 0x7F80], [least, least, 0xFF80], [0, least, 0]], np.uint16)
    # To even; above the half; infinity less infinity.
    first, second, third = exchanging.total(parts, bfloat16=True).tolist()
    assert (first, second) == (one, one + 1)
    assert third & 0x7FFF > 0x7F80


def contribution(rank, shape, dtype, xp):
    numbers = np.random.default_rng(rank).uniform(-9, 9, shape)
    if np.dtype(dtype).kind != "f":
        numbers = abs(numbers)
    return xp.asarray(np.asarray(numbers).astype(dtype))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_exchanges_by_files(tmp_path, size):
    assert together(tmp_path, size, check_exchanges) == [None] * size
    assert list(tmp_path.iterdir()) == []  # the last one has removed the folder


def test_files_are_removed_as_soon_as_all_have_read_them(tmp_path):
    most = []

    def run(ranks):
        for _ in range(50):
            ranks.barrier()
            most.append(sum("exchange" in p.name for p in ranks._meeting.folder.iterdir()))

    assert together(tmp_path, 2, run) == [None] * 2
    assert max(most) <= 8


@needs_mpi
def test_exchanges_and_training_by_mpi(tmp_path):
    """One start of three processes for all that MPI has to show."""
    program = tmp_path / "program.py"
    program.write_text(
        "import re, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from cupybnn import parallel\n"
        "from test_parallel_ranks import check_exchanges\n"
        "from test_parallel_training import train\n"
        "with parallel.connect('cpu') as ranks:\n"
        "    assert type(ranks).__name__ == 'MpiRanks', ranks\n"
        "    check_exchanges(ranks)\n"
        "    maps = open('/proc/self/maps').read()\n"
        "    names = re.findall(r'/dev/shm/mpich_shm.*', maps)\n"
        "    assert all('deleted' in name for name in names), names  # none is left\n"
        "    losses, result, state = train(ranks, binary=True, keep_prob=0.9)\n"
        "    if ranks.rank == 0:\n"
        "        print(losses)\n"
    )
    done = subprocess.run(
        [MPIEXEC, "-n", "3", sys.executable, program, Path(__file__).parent],
        capture_output=True, text=True, timeout=100, env=environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from test_parallel_training import train

    runs = together(tmp_path / "files", 3, lambda r: train(r, binary=True, keep_prob=0.9))
    assert done.stdout.strip() == str(runs[0][0])  # the same sums in the same order


def environment(folder, **more):
    """Return the environment of a rank: no other launcher's variables, one thread."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI", "SLURM"))}
    root = str(Path(__file__).parent.parent)
    return {
        **kept, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "PYTHONPATH": root, **more
    }  # fmt: skip


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_the_command_needs_no_option_under_a_launcher(tmp_path, launcher):
    options = ["--dataset", "digits", "--device", "cpu", "--n_hidden", "16", "--max_steps", "3"]
    processes = []
    for rank in "01":
        variables = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_PORT": "29500"}
        if launcher == "srun":
            variables = {**SLURM, "SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": "2"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "cupybnn", "train", *options],
                env=environment(tmp_path, **variables),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    (first, _), (second, _) = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "device: cpu, 2 ranks" in first
    assert "Final test accuracy" in first
    assert second == ""  # rank 0 alone prints
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not find_spec("torch"), reason="needs PyTorch: pip install .[torch]")
def test_a_run_under_torchrun(tmp_path):
    """Its variables are those that are read; above, they are set without it."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    options = ["--dataset", "digits", "--device", "cpu", "--n_hidden", "16", "--max_steps", "3"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, sys.executable, "-m", "cupybnn", "train", *options],
        env=environment(tmp_path), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "device: cpu, 2 ranks" in done.stdout
    assert done.stdout.count("Final test accuracy") == 1  # rank 0 alone prints
    assert list(tmp_path.glob("cupybnn*")) == []


@pytest.mark.gpu
def test_exchanges_between_arrays_on_a_gpu_by_files(tmp_path):
    import cupy

    from cupybnn.backends.devices import resolve
    from cupybnn.parallel.staged import StagedRanks

    def run(ranks):
        check_exchanges(StagedRanks(ranks, resolve("cuda")), cupy)

    assert together(tmp_path, 2, run) == [None] * 2


@pytest.mark.gpu
class TestNccl:
    def test_exchanges_in_a_graph(self):
        import cupy

        from cupybnn.backends.cuda.graph import capture
        from cupybnn.backends.devices import resolve
        from cupybnn.parallel.nccl import NcclRanks, new_id

        numbers = np.random.default_rng(0).integers(-9, 10, 1 << 20).astype(np.float32)
        with NcclRanks(resolve("cuda"), 0, 1, new_id(), None) as ranks:
            assert ranks.capturable
            source, patterns = cupy.asarray(numbers), cupy.asarray(as_bfloat16(numbers))
            total, scattered = cupy.empty_like(source), cupy.empty_like(patterns)
            gathered = cupy.empty((1, source.size), np.float32)

            def launch():
                begun = [
                    ranks.reduce_scatter(patterns, out=scattered, bfloat16=True),
                    ranks.all_reduce(source, out=total),
                ]
                for pending in begun:
                    pending.wait()
                cupy.add(total, 1, out=total)
                ranks.all_gather(total, out=gathered).wait()

            launch()  # as a fused step does before it is captured
            stream = cupy.cuda.Stream(non_blocking=True)
            graph = capture(stream, launch)
            for factor in (1, 3):
                source[...] = cupy.asarray(numbers) * factor
                patterns[...] = cupy.asarray(as_bfloat16(numbers * factor))
                scattered.fill(0)
                gathered.fill(0)
                graph.launch()
                ranks.replayed(3)
                assert (gathered[0].get() == numbers * factor + 1).all()
                assert (scattered.get() == as_bfloat16(numbers * factor)).all()
            graph.launch()
            ranks.replayed(3)
            del graph  # NCCL waits for graphs that contain its exchanges
            ranks.abort()

    def test_one_rank_with_itself(self):
        """All but what another GPU could add: the binding, streams, dtypes, abort."""
        import cupy

        from cupybnn.backends.devices import resolve
        from cupybnn.parallel.nccl import NcclRanks, new_id

        with NcclRanks(resolve("cuda"), 0, 1, new_id(), None) as ranks:
            check_exchanges(ranks, cupy)
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                x = cupy.arange(1 << 22, dtype=cupy.float32)
                pending = ranks.all_reduce(x * 2)
                assert float((pending.wait() - 2 * x).sum()) == 0
        ranks = NcclRanks(resolve("cuda"), 0, 1, new_id(), None)
        ranks.abort()
        ranks.close()

    def test_a_rank_on_each_gpu(self, tmp_path):
        from cupybnn.backends.devices import cuda_status

        need_gpus(2)
        count = min(cuda_status().device_count, 4)
        fused = {"binary": True, "xnor": True, "debug": False, "max_steps": 12}
        fused |= {"sync_batch_norm": True, "device": "cuda"}
        program = tmp_path / "program.py"
        program.write_text(
            "import sys\n"
            "sys.path.insert(0, sys.argv[1])\n"
            "import cupy\n"
            "from cupybnn import parallel\n"
            "from test_parallel_ranks import check_exchanges\n"
            "from test_parallel_training import train\n"
            "with parallel.connect('cuda') as ranks:\n"
            "    with cupy.cuda.Device(ranks.rank):\n"
            "        check_exchanges(ranks, cupy)\n"
            "    losses, _, _ = train(ranks, device='cuda', binary=True, dtype='float64',\n"
            "                         sync_batch_norm=True)\n"
            f"    fused, _, _ = train(ranks, **{fused})\n"
            "    if ranks.rank == 0:\n"
            "        print(losses)\n"
            "        print(fused)\n"
        )
        processes = [
            subprocess.Popen(
                [sys.executable, program, Path(__file__).parent],
                env=environment(tmp_path, RANK=str(r), WORLD_SIZE=str(count), LOCAL_RANK=str(r)),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for r in range(count)
        ]  # fmt: skip
        (out, err), *_ = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0] * count, err
        from test_parallel_training import train

        alone = train(device="cuda", binary=True, dtype="float64", sync_batch_norm=True)
        plain, replayed = map(json.loads, out.splitlines())
        np.testing.assert_allclose(plain, alone[0], rtol=1e-9)
        np.testing.assert_allclose(replayed, train(**fused)[0], rtol=1e-3)
