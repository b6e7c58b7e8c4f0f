"""How a rank notices that another has died or hangs: by its signs of life in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cupybnn.errors import RankError
from cupybnn.parallel.locks import LAUNCHER, hold, is_held, read, write

__all__ = ["Watch"]

#: Seconds that a rank which has lost another has to leave a blocking call. A little later,
#: ``cupybnn train --gpus`` would end it.
_LAST_RESORT = 4.0
_ENDED = "ended with an error:"


class Watch:
    """The signs of life of one rank, and its watch over the others.

    Each rank holds a lock on a file while it lives, and a thread writes signs of life into another
    file. The thread also watches the other ranks. A rank is lost if its lock is free, if its signs
    of life stop, or if this rank has waited for it for too long.

    Parameters
    ----------
    folder : Path
        Holds the files of all ranks of this run, and no others. The process that started the ranks
        may hold a lock in the parent folder.
    rank, size : int
    seconds : float
        How long a rank may give no sign of life, or keep the others waiting.
    last_resort : callable, optional
        Called with the RankError if the main thread is still in a blocking call 4 seconds after a
        rank was lost. It should end the process, and print the message if the error's `report` is
        true.

    Attributes
    ----------
    on_lost : list of callable
        Functions to call when a rank is lost, in a thread of their own, since they may block.
    begun : int
        Number of exchanges that this rank has begun.
    needed : int
        Number of exchanges that all ranks must have begun before this one can go on.
    busy : bool
        Whether this rank does something that the others must wait for, such as writing a
        checkpoint. They then wait for as long as it gives signs of life.
    waiting_since : callable
        Returns the `time.monotonic` at which this rank began to wait for the others; None if it
        is not waiting.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        seconds: float,
        last_resort: Callable[[RankError], Any] | None = None,
    ) -> None:
        self.folder, self.rank, self.size, self.seconds = folder, rank, size, seconds
        self.on_lost: list[Callable[[], Any]] = []
        self._last_resort = last_resort
        self._lost: RankError | None = None
        self._ended: dict[str, Any] = {}
        self.begun = self.needed = 0
        self._since: float | None = None
        self.busy = False
        self.waiting_since: Callable[[], float | None] = lambda: self._since
        self._closed = threading.Event()
        self._beat = 0
        self._seen: dict[int, tuple[Any, float]] = {}
        # When the others were last seen busy, by rank, and when one last had exchanges to begin.
        self._busy_at: dict[int, float] = {}
        self._behind_at = 0.0
        # Since when this rank has waited, and when that was asked, if there is no answer yet.
        self._waits_since: float | None = None
        self._asked: float | None = None
        self._threads: list[threading.Thread] = []
        self._interval = min(1.0, seconds / 5)
        self._lock = hold(self._file(rank, ".lock"))
        self._write_state()

    def start(self) -> None:
        """Watch the others from now on; to be called when all have come."""
        self._begin_thread("cupybnn-ranks", self._watch)
        self._begin_thread("cupybnn-ranks-waiting", self._ask)

    def _begin_thread(self, name: str, target: Callable[[], Any]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _file(self, rank: int, suffix: str = "") -> Path:
        return self.folder / f"rank-{rank}{suffix}"

    def is_own_thread(self) -> bool:
        """Whether the caller runs in a thread that watches the others, or in `on_lost`."""
        return threading.current_thread() in self._threads

    @contextlib.contextmanager
    def waiting(self, number: int) -> Iterator[None]:
        """Context in which this rank waits until all ranks have begun `number` exchanges."""
        self.needed, self._since = number, time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def check(self) -> None:
        """Raise RankError if a rank is lost."""
        if self._lost is not None:
            raise self._lost

    def _write_state(self) -> None:
        self._beat += 1
        state = {
            "host": os.uname().nodename if hasattr(os, "uname") else "",
            "pid": os.getpid(),
            "beat": self._beat,
            "begun": self.begun,
            "busy": self.busy,
            **self._ended,
        }
        with contextlib.suppress(OSError):  # a full disk must not end the run here
            write(self._file(self.rank), json.dumps(state).encode())

    def _watch(self) -> None:
        lost_at = 0.0
        while not self._closed.wait(self._interval):
            self._write_state()
            if self._lost is None and (sentence := self._loss()) is not None:
                # A rank that ended with an error has printed it itself.
                report = _ENDED not in sentence and self._reports()
                self._lost = RankError(sentence, report)
                lost_at = time.monotonic()
                self._begin_thread("cupybnn-ranks-lost", self._call_on_lost)
            if self._lost is not None and time.monotonic() - lost_at > _LAST_RESORT:
                if self._last_resort is not None:
                    self._last_resort(self._lost)
                return

    def _ask(self) -> None:
        """Keep asking since when this rank has waited.

        This has a thread of its own. While the main thread waits for a copy from the device, CUDA
        gives no other thread an answer, but the signs of life must go on.
        """
        while not self._closed.wait(self._interval):
            self._asked = time.monotonic()
            with contextlib.suppress(Exception):  # the main thread meets what fails here, too
                self._waits_since = self.waiting_since()
            self._asked = None

    def _call_on_lost(self) -> None:
        for call in self.on_lost:
            with contextlib.suppress(Exception):  # whatever a library makes of it
                call()

    def _state(self, rank: int) -> dict[str, Any]:
        content = read(self._file(rank))
        try:
            state = json.loads(content or b"{}")
        except ValueError:
            return {}
        return state if isinstance(state, dict) else {}

    def _loss(self) -> str | None:
        """Return a sentence about the first rank that is lost; None if all are there."""
        if not is_held(self.folder.parent / LAUNCHER):
            return "The process that started the ranks has ended, so this rank ends, too."
        now = time.monotonic()
        for rank in range(self.size):
            if rank == self.rank:
                continue
            # A rank writes why it ends, and then lets go of its lock: so look at that first.
            held = is_held(self._file(rank, ".lock"))
            state = self._state(rank)
            who = f"Rank {rank} (process {state.get('pid')} on {state.get('host')})"
            if "relayed" in state:  # it has noticed before us
                return str(state["relayed"])
            if state.get("error"):
                return f"{who} {_ENDED} {state['error']}"
            if state.get("busy"):
                self._busy_at[rank] = now
            if "left" in state:
                continue
            if not held:
                return f"{who} has died."
            before, since = self._seen.get(rank, (None, now))
            if before is None or before != state.get("beat"):
                self._seen[rank] = (state.get("beat"), now)
            elif now - since > self.seconds:
                return f"{who} has given no sign of life for {self.seconds:g} seconds."
        started, asked = self._waits_since, self._asked
        if asked is not None and now - asked > self._interval:
            started = asked  # no answer: it waits
        return None if started is None else self._late(now, started)

    def _late(self, now: float, started: float) -> str | None:
        """Return a sentence about the rank that this one has waited for too long, if any.

        For a rank that was busy, the time counts from when it was last seen busy.
        """
        states = {r: self._state(r) for r in range(self.size) if r != self.rank}
        for rank, state in states.items():
            if state.get("begun", 0) >= self.needed:
                continue
            self._behind_at = now
            since = max(started, self._busy_at.get(rank, started))
            if now - since > self.seconds and not state.get("busy"):
                return (
                    f"Rank {rank} (process {state.get('pid')} on {state.get('host')}) has kept "
                    f"the others waiting for {self.seconds:g} seconds."
                )
        if now - max(started, self._behind_at) > 2 * self.seconds:
            return (
                f"All ranks began an exchange that has not ended for {now - started:.0f} seconds: "
                f"the connection between them is broken."
            )
        return None

    def _reports(self) -> bool:
        """Whether this rank, as the lowest that is still there, prints which one was lost."""
        states = [self._state(rank) for rank in range(self.size)]
        if any(state.get("printed") for state in states):
            return False
        for rank in range(self.rank):
            _, since = self._seen.get(rank, (None, time.monotonic()))
            silent = time.monotonic() - since > self.seconds / 2
            gone = "error" in states[rank] or "relayed" in states[rank]
            if is_held(self._file(rank, ".lock")) and not gone and not silent:
                return False
        return True

    def close(self, error: BaseException | None = None) -> None:
        """Leave; the last rank removes the folder.

        Parameters
        ----------
        error : exception, optional
            Why this rank ends early; the others report it.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        for thread in self._threads:  # the first may add another
            thread.join(5.0)
        if isinstance(error, RankError):
            self._ended = {"relayed": str(error), "printed": error.report}
        elif error is not None:
            text = " ".join(str(error).split()) or type(error).__name__
            self._ended = {"error": text[:2000]}
        else:
            self._ended = {"left": True}
        self._write_state()
        if all(self._is_gone(r) for r in range(self.size) if r != self.rank):
            self.remove()
        os.close(self._lock)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_gone(self, rank: int) -> bool:
        state = self._state(rank)
        lock = self._file(rank, ".lock")
        ended = any(k in state for k in ("left", "error", "relayed"))
        return ended or not lock.exists() or not is_held(lock)  # or it has never come
