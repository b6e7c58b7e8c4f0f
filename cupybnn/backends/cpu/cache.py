"""Compiled kernels on disk: compiled once for a processor, and never a reason to fail."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Collection
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite.binding import add_symbol
from numba import njit, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.registry import cpu_target
from numba.core.runtime import _nrt_python, rtsys

import cupybnn
from cupybnn.backends.cpu import compiling

__all__ = ["Kernel", "cached", "features", "folder"]


def features() -> tuple[str, frozenset[str]]:
    """Return the processor that Numba compiles for: its name, and what it has."""
    _, name, given = cpu_target.target_context.codegen().magic_tuple()
    return name, frozenset(f[1:] for f in given.split(",") if f.startswith("+"))


@lru_cache(maxsize=1)
def _key() -> str:
    """Return a hash of all that decides a kernel's machine code.

    Numba itself looks at the file of a kernel, not at what the kernel calls.
    """
    name, has = features()
    digest = hashlib.sha256(
        "\n".join(
            (cupybnn.__version__, numba.__version__, llvmlite.__version__, name, *sorted(has))
        ).encode()
    )
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _provide(code: bytes, target_context: Any) -> None:
    """Give machine code what it calls of Numba's runtime."""
    helpers = _nrt_python.c_helpers
    names = {name.decode() for name in re.findall(rb"NRT_(\w+)", code)}
    if names <= helpers.keys():
        for name in names:
            add_symbol(f"NRT_{name}", helpers[name])
    else:  # also compiles some functions, for 0.05 seconds
        rtsys.initialize(target_context)


class _Cache(FunctionCache):
    """Numba's cache of a function, in a folder of its own for each `_key`.

    Numba writes a file and renames it, and files of one folder are of equal content: so several
    processes, also on different machines, may compile at once. What cannot be read or written is
    compiled instead.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_path = os.path.join(self._impl.locator.get_cache_path(), f"cupybnn-{_key()}")
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=_key(),
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # Numba first loads all that it can compile, SciPy's BLAS included: 0.4 seconds that machine
        # code does not need.
        # A damaged file may raise anything that unpickling does.
        with contextlib.suppress(Exception):
            data = self._cache_file.load(self._index_key(sig, target_context.codegen()))
            if data is not None:
                _provide(data[0][-1][0], target_context)
                return self._impl.rebuild(target_context, data)
        compiling()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(Exception):
            os.makedirs(self._cache_path, exist_ok=True)
            try:
                super().save_overload(sig, data)
            except Exception:  # an index that cannot be read: start anew, once
                self.flush()
                super().save_overload(sig, data)


class Kernel:
    """A function compiled without the interpreter lock, for one signature.

    Parameters
    ----------
    function : callable
    float32 : collection of str
        Its parameters that are float32; all others are int64.
    """

    def __init__(self, function: Callable[..., Any], float32: Collection[str]) -> None:
        code = function.__code__
        self._signature = tuple(
            types.float32 if name in float32 else types.int64
            for name in code.co_varnames[: code.co_argcount]
        )
        # Divisions as in NumPy: by 0 they give an infinity or NaN.
        self.dispatcher = njit(nogil=True, error_model="numpy")(function)
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.dispatcher._cache = _Cache(function)
        self.__doc__ = function.__doc__

    @cached_property
    def call(self) -> Callable[..., Any]:
        """The compiled function, which takes numbers by position; loaded or compiled now.

        It saves the third of a microsecond in which Numba looks at the types of arguments, and on
        the first call the time in which it loads extensions.
        """
        return self.dispatcher.compile(self._signature)  # type: ignore[no-any-return]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def cached(*float32: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Compile a function when it is first called, and keep it where Numba keeps such files.

    Its parameters are int64, but for those named here.

    That is ``NUMBA_CACHE_DIR``, or ``__pycache__`` next to this package, or the user's cache folder
    if that cannot be written to. Where none can, each process compiles for itself.
    """
    return lambda function: Kernel(function, float32)


def folder(kernel: Kernel) -> str | None:
    """Return the folder of a kernel's files, or None if there is none."""
    return getattr(kernel.dispatcher._cache, "cache_path", None)
