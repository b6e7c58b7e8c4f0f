"""Writing and reading files: whatever the path is, nothing is lost and nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import tempfile
import threading
import time
import zipfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from cupybnn import data, files, settings
from cupybnn.cli import main
from cupybnn.data import openml
from cupybnn.errors import DataError
from cupybnn.files import atomic_write, is_stream, new_folder, remove_leftovers
from cupybnn.npz import open_npz, read_npz
from cupybnn.paths import checked_path, home, user_path

unprivileged = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)


def put(path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestWriting:
    def test_appears_when_the_block_ends(self, tmp_path):
        path = tmp_path / "x"
        with atomic_write(path) as file:
            file.write(b"one")
            assert not path.exists()
        assert path.read_bytes() == b"one"
        assert names(tmp_path) == ["x"]

    def test_an_interrupt_leaves_the_old_content(self, tmp_path):
        path = tmp_path / "x"
        put(path, b"one")

        def interrupted():
            with atomic_write(path) as file:
                file.write(b"two")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert path.read_bytes() == b"one"
        assert names(tmp_path) == ["x"]

    def test_a_new_file_has_the_mode_that_open_gives(self, tmp_path):
        before = os.umask(0o027)
        try:
            put(tmp_path / "x", b"one")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640

    @pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
    def test_an_existing_file_keeps_its_mode_and_is_never_more_readable(self, tmp_path, mode):
        path = tmp_path / "x"
        put(path, b"one")
        path.chmod(mode)
        with atomic_write(path) as file:
            file.write(b"two")
            (temporary,) = tmp_path.glob(".cupybnn-*")
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"two", mode)

    def test_an_existing_file_keeps_its_owner(self, tmp_path):
        if os.geteuid() != 0:
            pytest.skip("only root may give files away")
        path = tmp_path / "x"
        put(path, b"one")
        os.chown(path, 1234, 4321)
        put(path, b"two")
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)

    def test_a_file_that_may_not_be_written_stays(self, tmp_path, monkeypatch):
        path = tmp_path / "x"
        put(path, b"one")
        path.chmod(0o400)
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # to root it is always true
        with pytest.raises(PermissionError, match=r"x'$"):
            put(path, b"two")
        assert path.read_bytes() == b"one"
        assert names(tmp_path) == ["x"]

    def test_links_are_followed(self, tmp_path):
        (tmp_path / "there").mkdir()
        (tmp_path / "folder").symlink_to("there")
        target = tmp_path / "there" / "target"
        target.write_bytes(b"old")
        (tmp_path / "second").symlink_to("folder/target")
        (tmp_path / "first").symlink_to(tmp_path / "second")
        put(tmp_path / "first", b"new")
        assert target.read_bytes() == b"new"
        assert (tmp_path / "first").is_symlink()
        assert (tmp_path / "second").is_symlink()
        (tmp_path / "dangling").symlink_to("there/made")
        put(tmp_path / "dangling", b"new")
        assert names(tmp_path / "there") == ["made", "target"]
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(OSError, match="loop"):
            put(tmp_path / "loop", b"new")

    def test_a_name_of_any_length_that_the_system_takes(self, tmp_path):
        name = "n" * 255
        put(tmp_path / name, b"one")
        assert names(tmp_path) == [name]

    def test_a_pipe_gets_the_whole_content_and_stays(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
        reader.start()
        with atomic_write(pipe) as file:
            np.savez(file, a=np.arange(30000))
        reader.join()
        assert stat.S_ISFIFO(pipe.stat().st_mode)
        (tmp_path / "x.npz").write_bytes(got[0])
        np.testing.assert_array_equal(read_npz(tmp_path / "x.npz")["a"], np.arange(30000))

    def test_a_device_stays_a_device(self):
        put("/dev/null", b"nothing")
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
        assert is_stream("/dev/null")
        if os.path.exists("/dev/full"):
            with pytest.raises(OSError, match="No space left"):
                put("/dev/full", b"nothing")

    def test_an_open_file_is_written_at_its_position(self, tmp_path):
        with open(tmp_path / "out", "wb", buffering=0) as out:
            out.write(b"before, ")
            put(f"/dev/fd/{out.fileno()}", b"content, ")
            out.write(b"after")
        assert (tmp_path / "out").read_bytes() == b"before, content, after"

    def test_a_name_of_a_folder_that_does_not_exist(self, tmp_path):
        with pytest.raises(IsADirectoryError, match="new/"):
            put(f"{tmp_path}/new/", b"content")
        assert names(tmp_path) == []

    def test_only_regular_files_are_replaced(self, tmp_path):
        with pytest.raises(IsADirectoryError):
            put(tmp_path, b"")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "s"))
            with pytest.raises(OSError, match="Is a socket, not a file"):
                put(tmp_path / "s", b"")
            assert stat.S_ISSOCK((tmp_path / "s").stat().st_mode)
        with pytest.raises(FileNotFoundError, match=r"nowhere/x'$"):
            put(tmp_path / "nowhere" / "x", b"")
        for bad in ("a\0b", "", "a\ud800"):
            with pytest.raises(ValueError, match="A path must be a name without NUL"):
                put(bad, b"")

    @unprivileged
    def test_a_writable_file_in_a_read_only_folder(self, tmp_path):
        self.check_in_place(tmp_path, lambda: tmp_path.chmod(0o500))
        tmp_path.chmod(0o700)

    @pytest.mark.parametrize("name", ["open", "replace"])
    def test_a_file_that_can_be_written_but_not_replaced(self, tmp_path, monkeypatch, name):
        real = getattr(os, name)

        def refuse(path, *args, **kwargs):
            if ".cupybnn-" in str(path):
                raise OSError(30 if name == "open" else 16, "not here", str(path))
            return real(path, *args, **kwargs)

        self.check_in_place(tmp_path, lambda: monkeypatch.setattr(os, name, refuse))
        with pytest.raises(OSError, match=r"not here: '.*/new'"):
            put(tmp_path / "new", b"")
        assert names(tmp_path) == ["x"]

    def check_in_place(self, folder, forbid):
        path = folder / "x"
        path.write_bytes(b"a long content")
        inode = path.stat().st_ino
        forbid()
        for content in (b"short", b"much longer than anything before"):
            put(path, content)
            assert path.read_bytes() == content

        def fail():
            with atomic_write(path) as file:
                file.write(b"half of it")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert path.read_bytes() == b"much longer than anything before"
        assert path.stat().st_ino == inode

    def test_no_room_leaves_a_file_that_cannot_be_replaced(self, tmp_path, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        def busy(*args):
            raise OSError(16, "busy")

        path = tmp_path / "x"
        path.write_bytes(b"old")
        monkeypatch.setattr(os, "replace", busy)
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left") as caught:
            put(path, b"longer than before")
        assert caught.value.filename == str(path)
        assert path.read_bytes() == b"old"
        assert names(tmp_path) == ["x"]

    def test_a_full_disk_is_reported_with_the_name_of_the_file(self, tmp_path):
        path = tmp_path / "x"
        path.write_bytes(b"old")
        with pytest.raises(OSError, match=r"No space left.*/x'") as caught, atomic_write(path):
            raise OSError(28, "No space left on device")  # as `write` does: it names no file
        assert caught.value.errno == 28
        assert path.read_bytes() == b"old"
        assert names(tmp_path) == ["x"]


def _die(folder, kind) -> None:
    if kind == "file":
        with atomic_write(f"{folder}/x") as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    with new_folder(folder) as hidden:
        (hidden / "half").write_text("of it")
        os.kill(os.getpid(), signal.SIGKILL)


class TestLeftovers:
    @pytest.fixture
    def killed(self, tmp_path):
        """Give a folder with what a killed writer and a killed maker of a folder left."""
        for kind in ("file", "folder"):
            process = get_context("fork").Process(target=_die, args=(tmp_path, kind))
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            if kind == "file":  # what comes next would remove it
                (left,) = tmp_path.iterdir()
                left.rename(tmp_path / "kept")
        (tmp_path / "kept").rename(left)
        assert len(names(tmp_path)) == 2
        return tmp_path

    def test_the_next_write_removes_them(self, killed):
        put(killed / "y", b"")
        assert names(killed) == ["y"]

    def test_the_next_folder_removes_them(self, killed):
        with new_folder(killed) as hidden:
            hidden.rename(killed / "y")
        assert names(killed) == ["y"]

    def test_those_of_the_living_and_of_others_stay(self, tmp_path):
        others = [".cupybnn-0.tmp", ".x.0123456789ab.tmp", "cupybnn-0123456789ab.tmp"]
        for name in others:
            (tmp_path / name).write_text("somebody else's")
        os.mkfifo(tmp_path / ".cupybnn-0123456789ab.tmp")  # nobody waits for its other end
        with atomic_write(tmp_path / "x") as file, new_folder(tmp_path) as folder:
            file.write(b"x")
            (folder / "part").write_text("y")
            remove_leftovers(tmp_path)
            put(tmp_path / "z", b"z")
            folder.rename(tmp_path / "y")
        assert names(tmp_path) == sorted([*others, ".cupybnn-0123456789ab.tmp", "x", "y", "z"])

    def test_without_locks_a_day_must_have_passed(self, killed, monkeypatch):
        def refuse(*args):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(files.fcntl, "flock", refuse)
        remove_leftovers(killed)
        young, old = killed.iterdir()
        then = time.time() - 25 * 3600
        os.utime(old, (then, then))
        put(killed / "x", b"")
        assert names(killed) == sorted([young.name, "x"])

    def test_many_writers_and_cleaners_at_once(self, tmp_path):
        def work(number):
            for step in range(40):
                put(tmp_path / str(number), b"%d" % step)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [(tmp_path / str(n)).read_bytes() for n in range(4)] == [b"39"] * 4
        assert names(tmp_path) == ["0", "1", "2", "3"]

    def test_a_folder_that_cannot_be_read_or_cleared(self, killed, monkeypatch):
        remove_leftovers(killed / "nowhere")

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(files.fcntl, "flock", refuse)
        monkeypatch.setattr(os, "open", refuse)
        remove_leftovers(killed)
        assert len(names(killed)) == 2


class TestReading:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "x.npz"
        np.savez(path, a=np.arange(12.0).reshape(3, 4), b=np.asfortranarray(np.eye(3, 2)), c="text")
        return path

    def test_round_trip(self, path):
        found = read_npz(path)
        assert list(found) == ["a", "b", "c"]
        np.testing.assert_array_equal(found["a"], np.arange(12.0).reshape(3, 4))
        np.testing.assert_array_equal(found["b"], np.eye(3, 2))
        assert str(found["c"]) == "text"
        assert list(read_npz(path, ("c", "d"))) == ["c"]
        with open_npz(path) as file:
            assert file.header("a") == ((3, 4), np.dtype(float))
            with pytest.raises(ValueError, match="'a': it has 96 bytes, at most 95 are expected"):
                file.read("a", 95)
            with pytest.raises(ValueError, match="entry 'd': it is missing"):
                file.read("d")

    def test_a_compressed_file(self, tmp_path):
        np.savez_compressed(tmp_path / "x", a=np.zeros(100_000))
        assert not read_npz(tmp_path / "x.npz")["a"].any()

    def replace(self, path, name, content, claimed=None):
        """Write an archive whose entry `name` is `content`, said to have `claimed` bytes."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name + ".npy", content)
        if claimed is not None:
            data = path.read_bytes()
            right = len(content).to_bytes(4, "little")
            path.write_bytes(data.replace(right, claimed.to_bytes(4, "little")))

    def npy(self, descr="'<f8'", shape="(2,)", data=bytes(16)):
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"shape": "(1 << 50,)"}, "'a':"),
            ({"shape": "(1125899906842624,)"}, "contradicts its size"),
            ({"shape": f"({10**30},)"}, "contradicts its size"),
            ({"shape": f"(0, {10**30})", "data": b""}, "'a':"),
            ({"shape": "(-2,)"}, "is not read"),
            ({"shape": "(2.0,)"}, "'a':"),
            ({"shape": "(1000000000000,)", "descr": "'<U0'", "data": b""}, "is not read"),
            ({"descr": "'|O'"}, "allow_pickle=False"),
            ({"descr": "[('x', '<f8')]"}, "is not read"),
            ({"descr": "'" + "<f8" * 9000 + "'"}, "'a':"),
            ({"descr": "(" * 900 + ")" * 900}, "'a':"),
            ({"data": bytes(15)}, "contradicts its size"),
            ({"data": bytes(17)}, "contradicts its size"),
        ],
    )
    def test_arrays_that_are_not_what_they_say(self, path, change, why):
        self.replace(path, "a", self.npy(**change))
        with pytest.raises(ValueError, match=why):
            read_npz(path)

    def test_a_size_that_cannot_be_is_not_allocated(self, path):
        content = self.npy()
        self.replace(path, "a", content, claimed=3 << 30)
        with pytest.raises(ValueError, match="its size of 3,221,225,472 bytes contradicts"):
            read_npz(path)

    def test_what_is_not_asked_for_is_not_read(self, tmp_path):
        path = tmp_path / "x.npz"
        np.savez(path, a=np.arange(3))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("extra.npy", b"no array at all")
            archive.writestr("../../extra", b"nor a path")
        np.testing.assert_array_equal(read_npz(path, ("a",))["a"], np.arange(3))

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_an_entry_twice(self, path):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a.npy", self.npy())
        with pytest.raises(ValueError, match="two entries 'a'"):
            read_npz(path)

    def test_random_damage_is_one_kind_of_error(self, path):
        whole, expected = path.read_bytes(), read_npz(path)
        rng = np.random.default_rng(0)
        for _ in range(600):
            changed = bytearray(whole)
            for at in rng.integers(0, len(whole), rng.integers(1, 4)):
                changed[at] = rng.integers(256)
            if rng.random() < 0.2:
                del changed[rng.integers(len(changed)) :]
            path.write_bytes(changed)
            try:
                found = read_npz(path, ("a", "b", "c"))
            except ValueError:
                continue
            for name, array in found.items():
                np.testing.assert_array_equal(array, expected[name])


class TestPaths:
    def test_home_folders(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        assert str(user_path("~/x")) == "/home/me/x"
        assert str(user_path("x/~")) == "x/~"
        with pytest.raises(ValueError, match=r"the user 'nosuchuser' has none on this machine"):
            user_path("~nosuchuser/x")
        with pytest.raises(ValueError, match="without NUL characters"):
            user_path("a\0b")
        with pytest.raises(ValueError, match="without NUL characters"):
            checked_path("")

    def test_a_process_without_a_user(self, monkeypatch):
        """A number that no user has, and no HOME: everything works that names no home folder."""
        pwd = pytest.importorskip("pwd")

        def nobody(number):
            raise KeyError(number)

        monkeypatch.setattr(pwd, "getpwuid", nobody)
        for name in ("HOME", "CUPYBNN_CACHE_DIR", "CUPYBNN_DATA_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("SCIKIT_LEARN_DATA", raising=False)
        assert home() == Path(tempfile.gettempdir()) / f"cupybnn-{os.getuid()}"
        folders = settings.cache_dir(), settings.data_dir(), settings.scikit_learn_data()
        assert all(folder.is_relative_to(home()) for folder in folders)
        with pytest.raises(ValueError, match="but this user has none on this machine"):
            user_path("~/x")

    @pytest.mark.parametrize(
        ("name", "function"),
        [
            ("CUPYBNN_CACHE_DIR", settings.cache_dir),
            ("CUPYBNN_DATA_DIR", settings.data_dir),
            ("SCIKIT_LEARN_DATA", settings.scikit_learn_data),
        ],
    )
    def test_variables_that_name_no_folder(self, name, function, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.setenv(name, "~/x")
        assert function() == Path("/home/me/x")
        monkeypatch.setenv(name, "~nosuchuser/x")
        with pytest.raises(ValueError, match=f"{name} cannot be used: .*'nosuchuser'"):
            function()

    def test_a_data_folder_of_nobody_leaves_the_digits(self, monkeypatch):
        monkeypatch.setenv("CUPYBNN_DATA_DIR", "~nosuchuser/x")
        dataset = data.load("auto")
        assert dataset.name == "digits"
        assert "CUPYBNN_DATA_DIR cannot be used" in dataset.fallback_reason
        with pytest.raises(DataError, match="'nosuchuser' has none"):
            data.load("mnist", "~nosuchuser/x")

    @pytest.mark.parametrize("path", ["~nosuchuser/x", "a\0b"])
    @pytest.mark.parametrize(
        "arguments",
        [
            ["train", "--max_steps", "1", "--dataset", "digits", "--log_dir"],
            ["train", "--max_steps", "1", "--dataset", "digits", "--restore"],
            ["train", "--max_steps", "1", "--dataset", "mnist"],
        ],
    )
    def test_a_command_ends_in_one_sentence(self, arguments, path, capsys):
        assert main.main([*arguments, path]) in (1, 2)
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert re.search("nosuchuser|NUL|a path", said)

    def test_info_says_that_there_is_no_folder(self, monkeypatch, capsys):
        monkeypatch.setenv("CUPYBNN_CACHE_DIR", "~nosuchuser/x")
        monkeypatch.delenv("CUPYBNN_DATA_DIR", raising=False)
        assert main.main(["info"]) == 0
        assert "cache folder    none. The environment variable" in capsys.readouterr().out

    def test_what_a_killed_fetch_leaves_is_removed(self, tmp_path):
        with openml.scratch_folder(tmp_path / "data") as scratch:
            assert scratch.parent == tmp_path / "data"
            kept = scratch.name
        left = tmp_path / "data" / kept
        left.mkdir()
        (left / "half").write_text("of it")
        with openml.scratch_folder(tmp_path / "data"):
            assert not left.exists()

    def test_home(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        assert str(home()) == "/home/me"
