"""Standard streams that a command can use however its process was started."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["complain", "flush", "usable_streams"]


def _bytes_or_escapes(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode as "surrogateescape" does, and what it cannot encode as "backslashreplace" does."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error("cupybnn.bytes_or_escapes", _bytes_or_escapes)

#: Ways of handling errors that raise, and those that replace them. Python gives a stream the second
#: one in the C locale, where its encoding may be ASCII.
_ESCAPING = {"strict": "backslashreplace", "surrogateescape": "cupybnn.bytes_or_escapes"}


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Context in which standard input, output and error exist, and printing never fails to encode.

    A stream that is closed (``>&-``) or missing (``pythonw``) is replaced by the null device.
    What cannot be encoded, in a file name or in a sentence, is printed with escapes, as standard
    error does by default. In the C locale, file names keep their bytes. What is printed on a
    terminal that has been closed is discarded, so that a run can still write its checkpoint.
    """
    with contextlib.ExitStack() as stack:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):
                _occupy_descriptors()
                stack.callback(setattr, sys, name, stream)
                null = stack.enter_context(open(os.devnull, mode, encoding="utf-8"))
                setattr(sys, name, null)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors in _ESCAPING:
                stack.callback(_set_errors, stream, stream.errors)
                _set_errors(stream, _ESCAPING[stream.errors])
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if isinstance(stream, io.TextIOWrapper) and stream.isatty():
                with contextlib.suppress(io.UnsupportedOperation):  # no terminal after all
                    terminal = _on_terminal(stream)
                    stack.callback(setattr, sys, name, stream)
                    stack.callback(terminal.flush)
                    setattr(sys, name, terminal)
        yield


class _Terminal(io.FileIO):
    """The terminal of a descriptor, which it does not close."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno != errno.EIO or self.isatty():
                raise
            _discard(self.fileno())
            return len(content)


def _on_terminal(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return a stream to the same terminal, which may be closed."""
    stream.flush()
    buffer = io.BufferedWriter(_Terminal(stream.fileno()))
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)


def _occupy_descriptors() -> None:
    """Open the null device for closed descriptors 0 to 2.

    Otherwise the next files to be opened, perhaps a checkpoint, would get these numbers, and
    whatever a library writes to "standard error" would end up in them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _set_errors(stream: io.TextIOWrapper, errors: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.reconfigure(errors=errors)


def complain(sentence: str) -> None:
    """Print on standard error; ignore errors, because they could not be reported anywhere."""
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def _discard(descriptor: int) -> None:
    """Discard from now on what is written to a descriptor."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def flush() -> None:
    """Flush standard output.

    Raises
    ------
    OSError
        If it cannot be written; the output is then discarded, so that the interpreter does not
        try again.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            _discard(sys.stdout.fileno())
        raise
