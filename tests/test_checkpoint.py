"""Checkpoint files: what goes in comes out, and nothing that happens to a process spoils one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from cupybnn.errors import CheckpointError
from cupybnn.files import atomic_write, remove_leftovers
from cupybnn.training import TrainConfig, Trainer, restored_config
from cupybnn.training.checkpoint import (
    BEST,
    NEWEST,
    Checkpoint,
    CheckpointFolder,
    load,
    load_info,
    save,
)
from cupybnn.training.runs import CONFIG_NAME, new_run_folder, remove_abandoned, settings_folder


def example(step: int = 7) -> Checkpoint:
    rng = np.random.default_rng(step)
    arrays = {
        "model/fc1.weight": rng.standard_normal((30, 20)).astype(np.float32),
        "model/fc2.weight": rng.standard_normal((20, 10)),
        "optimizer/step": np.array(step),
        "model/empty": np.zeros((0, 3), np.float32),
    }
    return Checkpoint(step, arrays, {"config": {"reg": 1e-4}, "history": [{"loss": 0.1 + 0.2}]})


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert (a.step, a.info, a.arrays.keys()) == (b.step, b.info, b.arrays.keys())
    for name, array in a.arrays.items():
        assert b.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(b.arrays[name], array)


class TestFile:
    def test_round_trip(self, tmp_path):
        save(tmp_path / "x.npz", example())
        assert_same(load(tmp_path / "x.npz"), example())
        assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]

    def test_no_pickle_is_written(self, tmp_path):
        save(tmp_path / "x.npz", example())
        with np.load(tmp_path / "x.npz", allow_pickle=False) as stored:
            assert all(stored[name].dtype != object for name in stored.files)

    def test_objects_are_refused_and_leave_the_old_file(self, tmp_path):
        path = tmp_path / "x.npz"
        save(path, example(1))
        bad = Checkpoint(2, {"model/x": np.array([object()])}, {})
        with pytest.raises(ValueError, match="allow_pickle"):
            save(path, bad)
        assert load(path).step == 1
        assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]

    def test_full_disk_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "x.npz"
        save(path, example(1))

        def full(file, **members):
            file.write(b"half of it")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
        with pytest.raises(CheckpointError, match=r"x\.npz cannot be written: No space left"):
            save(path, example(2))
        monkeypatch.undo()
        assert load(path).step == 1
        assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]

    def test_every_truncation_is_noticed(self, tmp_path):
        path = tmp_path / "x.npz"
        save(path, example())
        whole = path.read_bytes()
        for length in [0, 1, 4, 100, *range(200, len(whole), 97), len(whole) - 1]:
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=r"x\.npz (is damaged|is not)"):
                load(path)

    def test_flipped_bits_in_the_arrays_are_noticed(self, tmp_path):
        path = tmp_path / "x.npz"
        save(path, example())
        whole = path.read_bytes()
        weights = example().arrays["model/fc1.weight"].tobytes()
        start = whole.index(weights)
        for position in (start, start + len(weights) // 2, start + len(weights) - 1):
            changed = bytearray(whole)
            changed[position] ^= 16
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match="is damaged"):
                load(path)

    def test_flipped_bits_anywhere_else_are_noticed_or_harmless(self, tmp_path):
        path = tmp_path / "x.npz"
        save(path, example())
        whole, expected = path.read_bytes(), load(path)
        for position in range(len(whole)):
            changed = bytearray(whole)
            changed[position] ^= 1 << position % 8
            path.write_bytes(changed)
            try:
                found = load(path)
            except CheckpointError:
                continue
            assert (found.step, found.info) == (expected.step, expected.info)
            for name, array in expected.arrays.items():
                np.testing.assert_array_equal(found.arrays[name], array)

    def test_other_files(self, tmp_path):
        path = tmp_path / "x.npz"
        np.savez(path, a=np.zeros(3))
        with pytest.raises(CheckpointError, match="is not a checkpoint of cupybnn"):
            load(path)
        np.savez(path, header=np.array(json.dumps({"format": "other"})))
        with pytest.raises(CheckpointError, match="is not a checkpoint of cupybnn"):
            load(path)
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
        with pytest.raises(CheckpointError, match=r"x\.npz is"):
            load(path)
        path.write_text("hello")
        with pytest.raises(CheckpointError, match=r"x\.npz is damaged"):
            load(path)

    def test_newer_version(self, tmp_path):
        path = tmp_path / "x.npz"
        header = {"format": "cupybnn-checkpoint", "version": 99, "step": 0, "info": {}}
        np.savez(path, header=np.array(json.dumps(header)))
        with pytest.raises(CheckpointError, match=r"version 99.*Update cupybnn"):
            load(path)

    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"nowhere, does not exist"):
            load(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"holds no checkpoint: expected newest\.npz"):
            load(tmp_path)
        (tmp_path / "bs_1" / "1").mkdir(parents=True)
        save(tmp_path / "bs_1" / "1" / NEWEST, example())
        with pytest.raises(CheckpointError, match=r"There are some below it; one is .*bs_1/1"):
            load(tmp_path)


class TestFolder:
    def test_newest_and_best(self, tmp_path):
        folder = CheckpointFolder(tmp_path)
        for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.9), (4, 0.7), (5, None)):
            folder.save(example(step), accuracy)
        assert load(tmp_path).step == load(tmp_path / NEWEST).step == 5
        assert load(tmp_path / BEST).step == 2
        assert sorted(p.name for p in tmp_path.iterdir()) == [BEST, NEWEST]

    def test_best_of_the_run_that_is_continued(self, tmp_path):
        folder = CheckpointFolder(tmp_path, best=0.8)
        folder.save(example(1), 0.7)
        assert not (tmp_path / BEST).exists()
        folder.save(example(2), 0.85)
        assert load(tmp_path / BEST).step == 2

    def test_where_links_are_impossible(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        CheckpointFolder(tmp_path).save(example(3), 0.5)
        assert load(tmp_path / BEST).step == 3
        assert sorted(p.name for p in tmp_path.iterdir()) == [BEST, NEWEST]

    def test_kill_at_any_moment_leaves_loadable_checkpoints(self, tmp_path):
        program = """
            import sys
            import numpy as np
            from cupybnn.training.checkpoint import Checkpoint, CheckpointFolder
            folder = CheckpointFolder(sys.argv[1])
            arrays = {f"model/{i}": np.full((300, 300), 0, np.float32) for i in range(5)}
            step = int(sys.argv[2])
            print("ready", flush=True)
            while True:
                step += 1
                for array in arrays.values():
                    array[:] = step
                folder.save(Checkpoint(step, arrays, {}), float(step))
        """
        rng = np.random.default_rng(0)
        last = 0
        for _ in range(12):
            process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(program), tmp_path, str(last)],
                stdout=subprocess.PIPE,
            )
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0.01, 0.25))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            if not (tmp_path / NEWEST).exists():
                continue
            newest = load(tmp_path / NEWEST)
            assert newest.step >= last
            last = newest.step
            for checkpoint in (newest, *([load(tmp_path / BEST)] if last > 1 else [])):
                for array in checkpoint.arrays.values():
                    assert (array == checkpoint.step).all()
        assert last > 12
        CheckpointFolder(tmp_path)  # the next run clears away what the killed ones left
        assert sorted(p.name for p in tmp_path.iterdir()) == [BEST, NEWEST]


class TestLeftovers:
    """Temporary files of killed writers; one that is young may be a living process's."""

    def leave(self, folder, hours):
        for name in (NEWEST, BEST, CONFIG_NAME, "mine"):
            path = folder / f".{name}.{hours:012}.tmp"
            path.write_text("half")
            then = time.time() - hours * 3600
            os.utime(path, (then, then))

    def left(self, folder):
        return sorted(p.name for p in folder.glob(".*.tmp"))

    def test_young_ones_and_those_of_others_stay(self, tmp_path):
        self.leave(tmp_path, 25)
        self.leave(tmp_path, 1)
        remove_abandoned(tmp_path)
        young = [f".{name}.{1:012}.tmp" for name in (NEWEST, BEST, CONFIG_NAME, "mine")]
        assert self.left(tmp_path) == sorted([*young, f".mine.{25:012}.tmp"])

    def test_new_run_clears_the_folders_beside_its_own(self, tmp_path):
        config = TrainConfig(log_dir=str(tmp_path))
        folder = new_run_folder(config)
        self.leave(folder, 25)
        new_run_folder(config)
        assert self.left(folder) == [f".mine.{25:012}.tmp"]

    def test_restoring_clears_the_folder(self, tmp_path):
        settings = {"dataset": "digits", "device": "cpu", "n_hidden": 8, "max_steps": 1}
        folder = Trainer(TrainConfig(**settings, log_dir=str(tmp_path / "log"))).run().run_folder
        for restore in (folder, folder / NEWEST):
            self.leave(folder, 25)
            Trainer(TrainConfig(**settings, restore=str(restore)))
            assert self.left(folder) == [f".mine.{25:012}.tmp"]

    def test_folder_that_cannot_be_written_still_restores(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        self.leave(tmp_path, 25)
        monkeypatch.setattr(Path, "unlink", refuse)
        remove_abandoned(tmp_path)
        assert len(self.left(tmp_path)) == 4


def test_atomic_write(tmp_path):
    path = tmp_path / "x"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"one"
    (tmp_path / ".x.abc.tmp").write_bytes(b"left over")
    (tmp_path / ".y.abc.tmp").write_bytes(b"somebody else's")
    remove_leftovers(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".y.abc.tmp", "x"]


class TestRunFolder:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, "fp/hid_512/bs_128/reg_0.0001"),
            ({"n_hidden": 1024, "batch_size": 1024, "reg": 0}, "fp/hid_1024/bs_1024/reg_0.0"),
            ({"binary": True, "reg": 1e-5}, "bin/matmul/hid_512/batch_norm/bs_128/reg_1e-05"),
            (
                {"binary": True, "n_hidden": 1024, "batch_size": 1024},
                "bin/matmul/hid_1024/batch_norm/bs_1024/reg_0.0",
            ),
            (
                {"binary": True, "xnor": True, "batch_norm": False, "reg": 1e-4},
                "bin/xnor/hid_512/bs_128/reg_0.0001",
            ),
            ({"xnor": True, "first": True}, "fp/hid_512/bs_128/reg_0.0001"),
            ({"binary": True, "first": True}, "bin_first/matmul/hid_512/batch_norm/bs_128/reg_0.0"),
            ({"binary": True, "last": True}, "bin_last/matmul/hid_512/batch_norm/bs_128/reg_0.0"),
            (
                {"binary": True, "first": True, "last": True, "xnor": True},
                "bin_all/xnor/hid_512/batch_norm/bs_128/reg_0.0",
            ),
        ],
    )
    def test_names(self, tmp_path, settings, expected):
        config = TrainConfig(log_dir=str(tmp_path), **settings)
        assert settings_folder(config) == tmp_path / expected
        assert new_run_folder(config) == tmp_path / expected / "1"
        stored = (tmp_path / expected / "1" / CONFIG_NAME).read_text()
        assert TrainConfig.from_json(stored) == config

    def test_goes_on_beside_the_run_that_is_restored(self, tmp_path):
        """Wherever that lies by now, unless a log directory is named or the settings are others."""
        log = tmp_path / "log"
        first = new_run_folder(TrainConfig(log_dir=str(log), seed=1), keep)
        old_name = first.parent.with_name("0.0001")
        whole_tree = tmp_path / "elsewhere"
        alone = tmp_path / "kept" / "good"
        for place in (old_name / "4", whole_tree / first.relative_to(log), alone):
            shutil.copytree(first, place)
        for restored, expected in (
            (first, first.with_name("2")),
            (old_name / "4", old_name / "5"),
            (whole_tree / first.relative_to(log), whole_tree / first.relative_to(log).parent / "2"),
            (alone, alone.with_name("1")),
            (alone.with_name("1"), alone.with_name("2")),
            (alone / NEWEST, alone.with_name("3")),
        ):
            config = restored_config(str(restored))
            assert config.seed == 1
            assert new_run_folder(config, keep) == expected
        other = restored_config(str(whole_tree / first.relative_to(log)), reg=0.5)
        assert new_run_folder(other) == whole_tree / "fp/hid_512/bs_128/reg_0.5/1"
        named = restored_config(str(alone), log_dir=str(tmp_path / "named"))
        assert new_run_folder(named) == tmp_path / "named/fp/hid_512/bs_128/reg_0.0001/1"
        shutil.copy(first / NEWEST, tmp_path / "alone.npz")  # no run folder: where it was made
        config = restored_config(str(tmp_path / "alone.npz"))
        assert new_run_folder(config) == first.with_name("3")

    def test_relative_paths_hold_from_any_folder(self, tmp_path, monkeypatch):
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "here")
        settings = {"dataset": "digits", "device": "cpu", "n_hidden": 8, "max_steps": 1}
        first = Trainer(TrainConfig(**settings, log_dir="runs")).run().run_folder
        assert first == Path("runs/fp/hid_8/bs_128/reg_0.0001/1")
        first = first.resolve()
        monkeypatch.chdir(tmp_path / "there")
        stored = TrainConfig.from_json((first / CONFIG_NAME).read_text())
        assert (
            stored.log_dir == load_info(first)["config"]["log_dir"] == str(tmp_path / "here/runs")
        )
        again = Trainer(restored_config(str(first), max_steps=2)).run()
        assert again.run_folder == first.with_name("2")
        assert list(Path().iterdir()) == []

    def test_counts_up_from_the_highest(self, tmp_path):
        config = TrainConfig(log_dir=str(tmp_path))
        assert [new_run_folder(config).name for _ in range(3)] == ["1", "2", "3"]
        (settings_folder(config) / "12").mkdir()
        (settings_folder(config) / "notes").mkdir()
        assert new_run_folder(config).name == "13"

    def test_runs_started_at_once_never_share(self, tmp_path):
        context = get_context("spawn")
        start = context.Event()
        results = context.Queue()
        processes = [
            context.Process(target=_make_folders, args=(str(tmp_path), start, results))
            for _ in range(4)
        ]
        for process in processes:
            process.start()
        for _ in processes:
            assert results.get(timeout=60) == "ready"
        start.set()
        folders = [results.get(timeout=60) for _ in range(4 * 25)]
        for process in processes:
            process.join()
        assert len(set(folders)) == 100
        assert sorted(int(Path(f).name) for f in folders) == list(range(1, 101))

    def test_appears_with_all_that_belongs_in_it(self, tmp_path):
        config = TrainConfig(log_dir=str(tmp_path))
        parent = settings_folder(config)
        seen = []

        def fill(folder):
            seen.append(folder)
            assert [p.name for p in parent.iterdir()] == [folder.name]
            assert not folder.name.isdecimal()
            assert (folder / CONFIG_NAME).exists()
            save(folder / NEWEST, example())
            with pytest.raises(CheckpointError) as caught:
                load(tmp_path)  # what is in the making is not offered as a run
            assert "There are some below it" not in str(caught.value)

        folder = new_run_folder(config, fill)
        assert folder == parent / "1"
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG_NAME, NEWEST]
        assert seen != [folder]
        assert [p.name for p in parent.iterdir()] == ["1"]

    @pytest.mark.parametrize("error", [CheckpointError("full"), KeyboardInterrupt()])
    def test_nothing_is_left_where_it_cannot_be_filled(self, tmp_path, error):
        def fail(folder):
            (folder / "half").write_text("of it")
            raise error

        config = TrainConfig(log_dir=str(tmp_path))
        with pytest.raises(type(error)):
            new_run_folder(config, fail)
        assert list(settings_folder(config).iterdir()) == []

    def test_kill_while_it_is_made_leaves_no_run(self, tmp_path):
        config = TrainConfig(log_dir=str(tmp_path))
        process = get_context("spawn").Process(target=_die_while_making, args=(str(tmp_path),))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (left,) = settings_folder(config).iterdir()
        assert (left / NEWEST).exists()
        assert new_run_folder(config).name == "1"
        assert left.exists()  # its maker might be alive: it is young
        day_ago = time.time() - 25 * 3600
        os.utime(left, (day_ago, day_ago))
        assert new_run_folder(config).name == "2"
        assert sorted(p.name for p in settings_folder(config).iterdir()) == ["1", "2"]

    def test_a_run_made_meanwhile_is_not_overwritten(self, tmp_path):
        config = TrainConfig(log_dir=str(tmp_path))
        others = []

        def fill(folder):
            if not others:
                others.append(None)
                others.append(new_run_folder(config, lambda _: None))
                (others[1] / "mine").write_text("theirs")

        assert new_run_folder(config, fill).name == "2"
        assert others[1].name == "1"
        assert (others[1] / "mine").read_text() == "theirs"

    def test_file_in_the_way(self, tmp_path):
        (tmp_path / "fp").write_text("a file")
        with pytest.raises(OSError, match="fp"):
            new_run_folder(TrainConfig(log_dir=str(tmp_path)))


def keep(folder) -> None:
    """Put a checkpoint with the folder's own settings into it."""
    stored = json.loads((folder / CONFIG_NAME).read_text())
    save(folder / NEWEST, Checkpoint(7, {}, {"config": stored}))


def _die_while_making(log_dir) -> None:
    def die(folder):
        save(folder / NEWEST, example())
        os.kill(os.getpid(), signal.SIGKILL)

    new_run_folder(TrainConfig(log_dir=log_dir), die)


def _make_folders(log_dir, start, results) -> None:
    config = TrainConfig(log_dir=log_dir)
    results.put("ready")
    start.wait()
    for _ in range(25):
        results.put(str(new_run_folder(config)))
