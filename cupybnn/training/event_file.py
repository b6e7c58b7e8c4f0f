"""Writing TensorBoard event files."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from cupybnn.training.histogram import Histogram

__all__ = ["EventFile"]


class EventFile:
    """Scalars and histograms, in a new event file in a folder.

    The records are TensorBoard's own (package ``tensorboard``), written immediately and by the
    calling thread: a record costs less than handing it to another thread. The ready-made summary
    writers import TensorFlow or PyTorch if installed, which takes seconds.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    ImportError
        If ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = event_pb2.Event
        file = _new_file(folder)
        self._path = file.name
        self._records = RecordWriter(file)
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(
        self,
        step: int,
        scalars: Iterable[tuple[str, float]],
        histograms: Iterable[tuple[str, Histogram]],
    ) -> None:
        """Write the values measured at a step, and flush, so that a running TensorBoard shows them.

        Raises
        ------
        OSError
            If the file cannot be written; the message names it. The file is then closed.
        """
        event = self._event(wall_time=time.time(), step=step)
        for tag, value in scalars:
            event.summary.value.add(tag=tag, simple_value=value)
        for tag, histogram in histograms:
            event.summary.value.add(tag=tag, histo=histogram.fields())
        self._write(event)

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _write(self, event: object) -> None:
        try:
            self._records.write(event.SerializeToString())  # type: ignore[attr-defined]
            self._records.flush()
        except OSError as error:
            # Close now: closing writes what is buffered, and a later failure would hide this error.
            with contextlib.suppress(OSError):
                self._records.close()
            raise OSError(
                f"TensorBoard records cannot be written to {self._path}: {error.strerror}."
            ) from error


def _new_file(folder: Path) -> IO[bytes]:
    """Create a file with a name that TensorBoard recognizes."""
    # TensorBoard reads a folder's files in the order of their names.
    name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    for number in itertools.count():
        with contextlib.suppress(FileExistsError):  # a run in this process, or in a container
            return open(folder / f"{name}.{number}", "xb")
    raise AssertionError("unreachable")
