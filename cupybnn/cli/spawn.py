"""Starting the ranks of a run on this machine: ``cupybnn train --gpus N`` and ``--ranks N``."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cupybnn import settings
from cupybnn.cli.signals import ENDING
from cupybnn.cli.streams import complain
from cupybnn.errors import SettingError
from cupybnn.parallel import detect
from cupybnn.parallel.locks import (
    LAUNCHER,
    hold,
    read,
    release,
    remove_abandoned,
    user_prefix,
    write,
)
from cupybnn.parallel.starting import check_gpus, rank_environment
from cupybnn.training.records import Callback

if TYPE_CHECKING:
    from cupybnn.training.protocol import TrainingRun

__all__ = ["RunFolderFile", "spawn"]

_RUN_FOLDER = "run-folder"
#: Seconds after the end of a rank until those that have not met it yet wait no longer, and until
#: the others must have said what they noticed and ended.
_NOT_MET, _GRACE = 4.0, 6.0
_POLL = 0.05
#: As many ranks may be tried on any machine, however few processors it has.
_FEW = 8
#: Exit codes after which a restart would be of no use, or unwanted.
_FINAL = (2, *(128 + number for number in ENDING))


class RunFolderFile(Callback):
    """Leaves the path of the run folder where `spawn` finds it for a restart."""

    def on_start(self, trainer: TrainingRun) -> None:
        """Write the file, if the process that started this one looks for it."""
        meeting = settings.rendezvous()
        if meeting is not None and trainer.run_folder is not None:
            write(meeting / _RUN_FOLDER, os.fsencode(os.path.abspath(trainer.run_folder)))


def spawn(words: Sequence[str], given: dict[str, Any]) -> int:
    """Start the ranks, wait for them and return the exit code of the run.

    Parameters
    ----------
    words : sequence of str
        The command line after ``cupybnn train``.
    given : dict
        The options in it: "gpus" or "ranks", perhaps "restarts" and "log_dir".
    """
    size, device = _checked(given)
    rest = _without(words, "gpus", "ranks", "restarts", "device")
    restarts = given.get("restarts", 0)
    for attempt in range(restarts + 1):
        code, folder = _run([*rest, "--device", device], size)
        if code == 0 or code in _FINAL or attempt == restarts:
            return code
        if folder is not None:
            rest = [*_without(rest, "restore"), "--restore", folder]
        where = "the beginning" if folder is None else folder
        complain(
            f"cupybnn train: starting again from {where} (restart {attempt + 1} of {restarts})"
        )
    raise AssertionError  # the loop returns


def _checked(given: dict[str, Any]) -> tuple[int, str]:
    """Return the number of ranks, and the kind of device for each."""
    option, kind = ("gpus", "cuda") if "gpus" in given else ("ranks", "cpu")
    size = given[option]
    if "gpus" in given and "ranks" in given:
        raise SettingError("The options --gpus and --ranks must not be given together.")
    if size < 1 or given.get("restarts", 0) < 0:
        name = option if size < 1 else "restarts"
        least = 1 if size < 1 else 0
        raise SettingError(f"The '--{name}' must be at least {least}; got {given[name]}.")
    most = max(_FEW, os.cpu_count() or 1)
    if option == "ranks" and size > most:
        raise SettingError(
            f"The '--ranks' must be at most {most}, about a rank for each processor; got {size}."
        )
    device = str(given.get("device", "auto"))
    if device not in ("auto", kind) or "gpu" in given:
        got = f"--device {device}" if "gpu" not in given else f"--gpu {given['gpu']}"
        raise SettingError(
            f"With --{option}, which gives each rank a device of its own, the '--device' must be "
            f"left out; got {got}."
        )
    if option == "gpus":
        check_gpus(size)
    launch = detect(settings.launch_variables())
    if launch is not None:
        raise SettingError(
            f"The '--{option}' starts ranks of its own, so it must be left out under {launch.by}, "
            f"which has started {launch.size}."
        )
    if given.get("restarts") and "log_dir" not in given and "restore" not in given:
        raise SettingError(
            "The '--restarts' continue from checkpoints, so they need a '--log_dir' to write them "
            "to; got none."
        )
    return size, kind


def _without(words: Sequence[str], *options: str) -> list[str]:
    """Return a command line without some options and their values."""
    kept = []
    skip = False
    for word in words:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name.startswith("--") and name[2:].replace("-", "_") in options:
            skip = not equals
        else:
            kept.append(word)
    return kept


def _run(words: list[str], size: int) -> tuple[int, str | None]:
    """Run the ranks once; return the exit code and rank 0's run folder, if it made one."""
    remove_abandoned(Path(tempfile.gettempdir()), user_prefix())
    folder = Path(tempfile.mkdtemp(prefix=user_prefix()))
    lock = hold(folder / LAUNCHER)
    ranks: list[subprocess.Popen[bytes]] = []
    found = None

    def let_go() -> None:
        nonlocal found
        found = read(folder / _RUN_FOLDER) or found  # without the lock, ranks remove the folder
        release(lock)

    try:
        with _forwarding(ranks):
            for rank in range(size):
                ranks.append(_start(words, rank, size, folder))
            codes = _wait(ranks, let_go)
        found = read(folder / _RUN_FOLDER) or found
        return _exit_code(codes), None if found is None else os.fsdecode(found)
    finally:
        for each in ranks:
            if each.poll() is None:
                each.kill()
                each.wait()
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _start(words: list[str], rank: int, size: int, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "cupybnn", "train", *words],
        env=rank_environment(rank, size, folder),
        stdin=subprocess.DEVNULL,
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
        start_new_session=True,
    )


@contextlib.contextmanager
def _forwarding(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Context in which a signal goes to rank 0, which agrees with the others on when to stop."""

    def forward(number: int, frame: Any) -> None:
        for each in ranks[:1]:
            with contextlib.suppress(OSError):
                each.send_signal(number)

    before = {}
    for number in ENDING:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            with contextlib.suppress(ValueError):  # not in the main thread
                before[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]], let_go: Callable[[], None]) -> list[int]:
    """Wait for all ranks; once one has failed, the others have a while to end by themselves.

    `let_go` makes those end that wait for a rank they have not met.
    """
    failed = float("inf")
    while True:
        codes = [each.poll() for each in ranks]
        if None not in codes:
            return [code for code in codes if code is not None]
        if failed == float("inf") and any(codes):
            failed = time.monotonic()
        if time.monotonic() > failed + _NOT_MET:
            let_go()
        if time.monotonic() > failed + _GRACE:
            for each in ranks:
                if each.poll() is None:
                    each.kill()
        time.sleep(_POLL)


def _exit_code(codes: list[int]) -> int:
    """Return the exit code of a run from those of its ranks."""
    killed = {rank: code for rank, code in enumerate(codes) if code < 0}
    if killed and all(code <= 0 for code in codes):  # nobody was left who could have said so
        names = ", ".join(f"rank {rank} by {_name(-code)}" for rank, code in killed.items())
        complain(f"cupybnn train: ranks were ended from outside: {names}")
    for code in codes:
        if code in _FINAL:
            return code
    return int(any(codes))


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
