"""Graceful shutdown of a training run on Ctrl-C, on SIGTERM, and when its terminal is closed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupybnn.training import Trainer

__all__ = ["ENDING", "Signals"]

#: Signals that end a run. Windows has no SIGHUP, which comes when a terminal is closed.
ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Signals:
    """A context in which Ctrl-C, SIGTERM and SIGHUP end the command gracefully.

    Before training, a signal raises KeyboardInterrupt, so that unfinished files are cleaned up.
    During training, the first signal stops the run after the current step, the second immediately.

    A signal that the process was started to ignore (SIGHUP under ``nohup``, SIGINT in a script's
    background) stays ignored. Outside the main thread, where Python does not allow signal handlers,
    the context does nothing.

    Parameters
    ----------
    wanted : bool
        False makes a context that handles nothing.

    Attributes
    ----------
    received : list of int
        Signal numbers received, in order.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._wanted = wanted
        self.received: list[int] = []
        self._trainer: Trainer | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if self._wanted and threading.current_thread() is threading.main_thread():
            for number in ENDING:
                before = signal.getsignal(number)
                # None: a handler not set from Python, which could not be restored.
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def training_begins(self, trainer: Trainer) -> None:
        """From now on, stop `trainer`; raise if a library swallowed an earlier interrupt."""
        self._trainer = trainer
        if self.received:
            self._trainer = None
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        """The exit code of a command that a signal ended; 0 if none came."""
        return 128 + self.received[0] if self.received else 0

    def ended_the_start(self) -> str:
        """Return "interrupted" or "terminated" if a signal came before training began, else ""."""
        if self._trainer is not None or not self.received:
            return ""
        return "interrupted" if self.received[0] == signal.SIGINT else "terminated"

    def _handle(self, number: int, frame: Any) -> None:
        self.received.append(number)
        if self._trainer is None:
            raise KeyboardInterrupt
        self._trainer.request_stop()
        self._restore_handlers()
        # Not print, because the signal may have interrupted one.
        with contextlib.suppress(OSError):
            os.write(2, b"\nStopping after this step; repeat to stop immediately.\n")
