"""Kernels for the CPU, compiled at run time by Numba (the extra ``cpu``).

Nothing is imported before a product is large enough to gain from it. The NumPy backend asks for the
kernels, and computes in NumPy where there are none: the results are the same.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from cupybnn import settings
from cupybnn.extras import to_install

__all__ = [
    "NAME",
    "CpuStatus",
    "announce_compilation",
    "compiled",
    "compiled_passes",
    "compiling",
    "status",
]


@dataclass(frozen=True)
class CpuStatus:
    """Whether compiled kernels are used and, if not, the reason in one sentence."""

    available: bool
    reason: str


#: What the kernels are called where the NumPy backend is "numpy".
NAME = "numba"

#: Called before the first kernel is compiled, which happens once on a machine.
_announce: Callable[[], None] | None = None
_lock = threading.RLock()
_found: tuple[CpuStatus, ModuleType | None] | None = None


def compiled_passes() -> ModuleType:
    """Return `cupybnn.backends.cpu.passes`; only where `compiled` returns a module."""
    from cupybnn.backends.cpu import passes

    return passes


def compiled(load: bool = True) -> ModuleType | None:
    """Return `cupybnn.backends.cpu.product`, or None without it.

    Parameters
    ----------
    load : bool
        Whether to import it, and with it Numba, if that has not been done yet.
    """
    if not settings.cpu_kernels() or (_found is None and not load):
        return None
    return (_found or _find())[1]


def announce_compilation(call: Callable[[], None] | None) -> None:
    """Have `call` called once, before a kernel is compiled rather than loaded; None: nothing."""
    global _announce
    _announce = call


def compiling() -> None:
    """Make the announcement, unless it was made."""
    global _announce
    with _lock:
        call, _announce = _announce, None
    if call is not None:
        call()


def status() -> CpuStatus:
    """Check, without raising, whether Numba can be imported and compile."""
    if not settings.cpu_kernels():
        return CpuStatus(False, "Switched off by CUPYBNN_CPU_KERNELS.")
    return (_found or _find())[0]


def _find() -> tuple[CpuStatus, ModuleType | None]:
    global _found
    with _lock:
        if _found is None:
            _found = _import()
        return _found


def _import() -> tuple[CpuStatus, ModuleType | None]:
    if sys.maxsize < 1 << 32 or sys.byteorder != "little":
        return CpuStatus(False, "Needs a 64-bit, little-endian processor."), None
    try:
        import numba
    except ModuleNotFoundError as error:
        if error.name == "numba":
            return CpuStatus(False, f"Numba is not installed: {to_install('cpu')}."), None
        return CpuStatus(False, f"Numba is installed but cannot be imported: {error}."), None
    except Exception as error:  # such as a NumPy that it does not know yet
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        return CpuStatus(False, f"Numba is installed but cannot be imported: {first}"), None
    with contextlib.suppress(AttributeError):
        if numba.config.DISABLE_JIT:
            return CpuStatus(False, "Numba is switched off by NUMBA_DISABLE_JIT."), None
    try:
        from cupybnn.backends.cpu import product
    except Exception as error:  # a version of Numba with other insides
        return CpuStatus(False, f"Numba {numba.__version__} cannot be used: {error}"), None
    return CpuStatus(True, f"Numba {numba.__version__}."), product


def _forget_lock() -> None:
    """Give a forked child a lock that no thread of its parent holds."""
    global _lock
    _lock = threading.RLock()


with contextlib.suppress(AttributeError):  # not on Windows
    import os

    os.register_at_fork(after_in_child=_forget_lock)
