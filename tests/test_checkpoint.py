"""Checkpoint files: what goes in comes out, and nothing that happens to a process spoils one."""

from __future__ import annotations

import copy
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
from edits import edit

from cupybnn.errors import CheckpointError
from cupybnn.training import TrainConfig, Trainer, restored_config
from cupybnn.training import checkpoint as checkpoints
from cupybnn.training.checkpoint import (
    BEST,
    NEWEST,
    Checkpoint,
    CheckpointFolder,
    load,
    load_info,
    load_run,
    save,
)
from cupybnn.training.runs import CONFIG_NAME, new_run_folder, settings_folder

LEFTOVER = ".cupybnn-0123456789ab.tmp"  # as a writer that was killed leaves one


def example(step: int = 7) -> Checkpoint:
    rng = np.random.default_rng(step)
    arrays = {
        "model/fc1.weight": rng.standard_normal((6, 5)).astype(np.float32),
        "model/fc2.weight": rng.standard_normal((5, 3)),
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
        with pytest.raises(CheckpointError, match="is not a cupybnn checkpoint"):
            load(path)
        np.savez(path, header=np.array(json.dumps({"format": "other"})))
        with pytest.raises(CheckpointError, match="is not a cupybnn checkpoint"):
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
        with pytest.raises(CheckpointError, match=r"contains no checkpoint; expected newest\.npz"):
            load(tmp_path)
        (tmp_path / "bs_1" / "1").mkdir(parents=True)
        save(tmp_path / "bs_1" / "1" / NEWEST, example())
        with pytest.raises(CheckpointError, match=r"Did you mean .*bs_1/1\?"):
            load(tmp_path)

    def test_the_hint_does_not_walk_through_everything(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoints, "_MOST_FOLDERS", 20)
        for i in range(60):
            (tmp_path / "a" / str(i)).mkdir(parents=True)
            save(tmp_path / "a" / str(i) / NEWEST, Checkpoint(0, {}, {}))
        seen = []
        real = os.scandir
        monkeypatch.setattr(os, "scandir", lambda path: (seen.append(path), real(path))[1])
        with pytest.raises(CheckpointError, match="Did you mean"):
            load(tmp_path)
        assert len(seen) == 20
        with pytest.raises(CheckpointError, match=r"does not exist|cannot be read"):
            load(tmp_path / ("n" * 300))


def run_header(step=3) -> dict:
    """Return the header of a run's checkpoint."""
    figures = {"train_loss": 1.0, "test_loss": 2.0, "examples_per_second": 3.0}
    accuracy = {"train_accuracy": 0.25, "test_accuracy": 0.5}
    history = [{"step": i, **figures, **accuracy} for i in range(step)]
    config = vars(TrainConfig(dataset="digits", device="cpu", n_hidden=8, max_steps=4))
    return {
        "format": "cupybnn-checkpoint",
        "version": 1,
        "step": step,
        "info": {"config": config, "dataset": "digits", "history": history},
        "arrays": ["model/x"],
    }


def put_header(path, header, **arrays) -> None:
    members = {f"array/{name}": array for name, array in arrays.items()}
    np.savez(path, header=np.array(json.dumps(header)), **members)


class TestEdited:
    """Files that no run has written."""

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (("step",), 2.7, "step must be an integer from 0 to"),
            (("step",), "str", "step must be an integer from 0 to"),
            (("step",), -1, "step must be an integer from 0 to"),
            (("step",), float("inf"), "step must be an integer from 0 to .*; got inf"),
            (("step",), None, "step must be an integer"),
            (("version",), 0, "version must be an integer from 1 to 1; got 0"),
            (("version",), "1", "version must be an integer"),
            (("info",), [], "info must be a mapping"),
            (("info", "history", 1, "test_accuracy"), "good", r"info\.history\[1\]\.test_accuracy"),
            (("info", "history", 1, "test_accuracy"), float("nan"), "a finite number from 0 to 1"),
            (("info", "history", 1, "train_accuracy"), 1.5, "from 0 to 1; got 1.5"),
            (("info", "history"), {}, r"info\.history must be a list"),
            (("info", "config"), [], r"info\.config must be a mapping"),
            (("info", "dataset"), 3, r"info\.dataset must be a printable text"),
            (("arrays",), ["model/x", "model/y"], "entry 'array/model/y': it is missing"),
            (("arrays",), "model/x", "arrays must be a list"),
            (("more",), 1, "no other names than format"),
        ],
    )
    def test_header(self, tmp_path, place, value, message):
        header = run_header()
        at = header
        for name in place[:-1]:
            at = at[name]
        at[place[-1]] = value
        put_header(tmp_path / "x.npz", header, **{"model/x": np.ones(3)})
        with pytest.raises(CheckpointError, match=f"x.npz is damaged: .*{message}"):
            load(tmp_path / "x.npz")

    @pytest.mark.parametrize("name", ["config", "dataset", "history"])
    def test_a_run_without_what_it_needs_to_continue(self, tmp_path, name):
        header = run_header()
        del header["info"][name]
        put_header(tmp_path / "x.npz", header, **{"model/x": np.ones(3)})
        with pytest.raises(CheckpointError, match=f"is damaged: info lacks {name}"):
            load_run(tmp_path / "x.npz")

    @pytest.mark.parametrize(
        ("name", "array", "message"),
        [
            ("model/x", np.ones(2, complex), "must contain real numbers; got complex128"),
            ("model/x", np.array(["a"]), "must contain real numbers"),
            ("optimizer/steps", np.array(2.7), "must be one integer from 0 to .*float64.*2.7"),
            ("optimizer/steps", np.array(-1), "must be one integer"),
            ("optimizer/steps", np.ones(3, int), r"must be one integer .* of shape \(3,\)"),
            ("optimizer/0.0.mean", np.array([1.0, np.nan]), "NaN or infinite values: the run had"),
            ("optimizer/0.0.square", np.array([1.0, -1.0]), "must be a mean of squares"),
            ("average/updates", np.array(np.inf), "must be one integer"),
        ],
    )
    def test_arrays(self, tmp_path, name, array, message):
        put_header(tmp_path / "x.npz", run_header() | {"arrays": [name]}, **{name: array})
        with pytest.raises(CheckpointError, match=f"is damaged: the array '{name}' .*{message}"):
            load(tmp_path / "x.npz")

    def test_deep_nesting(self, tmp_path):
        deep = json.dumps(run_header()).replace('"digits"', "[" * 5000 + "]" * 5000)
        np.savez(tmp_path / "x.npz", header=np.array(deep))
        with pytest.raises(CheckpointError, match="nested more than 32 levels deep"):
            load(tmp_path / "x.npz")

    def test_entries_that_are_not_listed_are_not_read(self, tmp_path):
        path = tmp_path / "x.npz"
        put_header(path, run_header(), **{"model/x": np.ones(3), "unknown": np.ones(3)})
        assert list(load(path).arrays) == ["model/x"]

    def test_any_edit_restores_or_raises_checkpoint_error(self, tmp_path):
        settings = {"dataset": "digits", "device": "cpu", "n_hidden": 4, "hidden_layers": 1}
        trainer = Trainer(TrainConfig(**settings, max_steps=2, eval_every_n=1))
        trainer.run()
        path = tmp_path / "x.npz"
        save(path, trainer.state())
        with np.load(path) as file:
            entries = dict(file)
        whole = json.loads(str(entries["header"]))
        rng = np.random.default_rng(0)
        refused = 0
        for _ in range(120):
            header = copy.deepcopy(whole)
            changed = dict(entries)
            if rng.random() < 0.3:
                name = str(rng.choice([n for n in changed if n != "header"]))
                array = changed[name].astype(rng.choice(["f8", "c16", "i8", "U8"]))
                changed[name] = (
                    array.reshape(-1)[: rng.integers(3)] if rng.random() < 0.5 else array
                )
            else:
                edit(header, rng)
            changed["header"] = np.array(json.dumps(header))
            np.savez(path, **changed)
            try:
                Trainer(TrainConfig(**settings, max_steps=3, restore=str(path)))
            except CheckpointError:
                refused += 1
        assert refused > 60


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

    def test_newest_and_best_share_no_storage(self, tmp_path):
        CheckpointFolder(tmp_path).save(example(3), 0.5)
        with open(tmp_path / NEWEST, "r+b") as file:
            file.truncate(10)
        assert_same(load(tmp_path / BEST), example(3))
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
    """Temporary files of killed writers; see test_files for what is one."""

    def leave(self, folder):
        (folder / LEFTOVER).write_text("half")
        (folder / ".mine.tmp").write_text("of somebody else")

    def left(self, folder):
        return sorted(p.name for p in folder.glob(".*.tmp"))

    def test_new_run_clears_the_folders_beside_its_own(self, tmp_path):
        config = TrainConfig(log_dir=str(tmp_path))
        folder = new_run_folder(config)
        self.leave(folder)
        new_run_folder(config)
        assert self.left(folder) == [".mine.tmp"]

    def test_opening_and_restoring_clear_the_folder(self, tmp_path):
        settings = {"dataset": "digits", "device": "cpu", "n_hidden": 8, "max_steps": 1}
        folder = Trainer(TrainConfig(**settings, log_dir=str(tmp_path / "log"))).run().run_folder
        for restore in (folder, folder / NEWEST):
            self.leave(folder)
            Trainer(TrainConfig(**settings, restore=str(restore)))
            assert self.left(folder) == [".mine.tmp"]
        self.leave(folder)
        CheckpointFolder(folder)
        assert self.left(folder) == [".mine.tmp"]


class TestRunFolder:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, "fp/hid_512/bs_128/reg_0.0001"),
            ({"n_hidden": 1024, "batch_size": 1024, "reg": 0}, "fp/hid_1024/bs_1024/reg_0.0"),
            ({"n_hidden": (1024, 512, 256)}, "fp/hid_1024-512-256/bs_128/reg_0.0001"),
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

    def test_continued_run_is_numbered_next_to_the_restored_one(self, tmp_path):
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

    def test_appears_complete(self, tmp_path):
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
            assert "Did you mean" not in str(caught.value)

        folder = new_run_folder(config, fill)
        assert folder == parent / "1"
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG_NAME, NEWEST]
        assert seen != [folder]
        assert [p.name for p in parent.iterdir()] == ["1"]

    @pytest.mark.parametrize("error", [CheckpointError("full"), KeyboardInterrupt()])
    def test_nothing_is_left_if_filling_fails(self, tmp_path, error):
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
        assert [p.name for p in settings_folder(config).iterdir()] == ["1"]

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
