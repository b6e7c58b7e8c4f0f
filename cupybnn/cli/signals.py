"""Ctrl-C and SIGTERM end a training run well."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupybnn.training import Trainer

__all__ = ["Signals"]


class Signals:
    """A context in which Ctrl-C and SIGTERM end the command well.

    Before training, a signal raises KeyboardInterrupt, so that what is half made is cleared away.
    Afterwards the first one ends the run after its step, and the second at once.

    A signal that the process was started to ignore (SIGINT under ``nohup`` or in the background of
    a script) stays ignored. Outside the main thread, where Python lets nobody handle signals, the
    context does nothing.

    Parameters
    ----------
    wanted : bool
        False makes a context that handles nothing.

    Attributes
    ----------
    received : list of int
        Numbers of the signals that came, in order.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._wanted = wanted
        self.received: list[int] = []
        self._trainer: Trainer | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if self._wanted and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                # None: a handler that is not Python's, which could not be put back.
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._arrived)
        return self

    def __exit__(self, *exception: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def training_begins(self, trainer: Trainer) -> None:
        """From now on, stop `trainer`; raise if a library swallowed an earlier interruption."""
        self._trainer = trainer
        if self.received:
            self._trainer = None
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        """The exit code of a command that a signal ended; 0 if none came."""
        return 128 + self.received[0] if self.received else 0

    def ended_the_start(self) -> str:
        """Return in a word which signal came before training began; "" if none did."""
        if self._trainer is not None or not self.received:
            return ""
        return "terminated" if self.received[0] == signal.SIGTERM else "interrupted"

    def _arrived(self, number: int, frame: Any) -> None:
        self.received.append(number)
        if self._trainer is None:
            raise KeyboardInterrupt
        self._trainer.request_stop()
        self._put_back()
        # Not print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, b"\nStopping after this step; once more to stop at once.\n")
