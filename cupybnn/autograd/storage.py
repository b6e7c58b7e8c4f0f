"""The memory behind tensors: how the engine notices that an array was edited.

It must notice edits of arrays saved for a backward pass, and of arrays whose values are known to be
signs. A raw array keeps no record of writes, and comparing every array each time would cost as much
as the pass. So the engine keeps a version number for each piece of memory and distinguishes two
kinds of writers:

- Writers that it knows (optimizers, ``tensor.data = ...``, ``tensor[...] = ...``) raise the
  version; this costs nothing.
- All others must first get the array from ``tensor.data``. That array is *on loan* as long as it,
  or any view of it, is alive, on NumPy and CuPy alike. Only while memory is both watched (saved, or
  known to be signs) and on loan does the engine keep a copy of it, and compares the two on demand.

Writes through a bare address (``array.data.ptr``, ``array.ctypes``) after its array is gone are not
noticed; nor are later writes by a `Function` or quantizer to an array that it returned and kept.

Training code that does not hold on to ``tensor.data`` across forward and backward pays nothing.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import numpy as np

from cupybnn.backends.devices import device_of, is_cupy
from cupybnn.backends.totals import all_true

__all__ = ["Storage", "module_of", "same_memory"]


def module_of(array: Any) -> Any:
    """Return the module that `array` belongs to: numpy, cupy, or torch for a tensor of PyTorch."""
    if isinstance(array, np.ndarray):
        return np
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return torch
    import cupy

    return cupy


def same_memory(a: Any, b: Any) -> bool:
    """Whether two arrays of one module may share memory."""
    return bool(module_of(a).may_share_memory(a, b))


def _bits(array: Any) -> Any:
    """View `array` as unsigned integers, so that NaNs compare equal and -0.0 differs from 0.0.

    A longdouble is returned unchanged: there is no integer of its size, and some of its bytes are
    padding.
    """
    size = array.dtype.itemsize
    return array.view(f"u{size}") if size <= 8 else array


def _all_same(a: Any, b: Any) -> bool:
    """Whether two arrays hold the same numbers, bit for bit."""
    a, b = _bits(a), _bits(b)
    same = a == b
    if a.dtype.kind == "f":
        same = (same & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))
    return all_true(same)


class _Owner:
    """Keeps a CuPy array alive for its loans; lives as long as any of them."""

    __slots__ = ("__weakref__", "array")

    def __init__(self, array: Any) -> None:
        self.array = array


def _lend(array: Any) -> tuple[Any, Any]:
    """Return an alias of `array`, and the object that lives as long as any view of the alias."""
    if is_cupy(array):
        import cupy

        owner = _Owner(array)
        memory = cupy.cuda.UnownedMemory(array.data.ptr, array.nbytes, owner, array.device.id)
        pointer = cupy.cuda.MemoryPointer(memory, 0)
        return cupy.ndarray(array.shape, array.dtype, pointer, array.strides), owner
    # A view's base is the array that owns the memory, however many views are in between; a
    # memoryview ends that chain, so that `bits` is the base of every view taken from it.
    bits = np.asarray(memoryview(_bits(array)))
    return bits.view(array.dtype), bits


class Storage:
    """Memory of a tensor and of its views.

    Parameters
    ----------
    array : numpy.ndarray or cupy.ndarray
        The array of the tensor that owns the memory.

    Attributes
    ----------
    saves : int
        How many live graph nodes have saved this memory for their backward passes.
    watched : bool
        Whether its version was recorded for another reason: its values were known to be signs.
    """

    __slots__ = ("_copy", "_loans", "_version", "array", "saves", "watched")

    def __init__(self, array: Any) -> None:
        self.array = array
        self.saves = 0
        self.watched = False
        self._version = 0
        self._copy: Any = None
        self._loans: list[weakref.ref] = []

    def __reduce__(self) -> Any:
        return _owned, (self.array,)  # without the loans

    def touch(self) -> None:
        """Record that the contents are being changed."""
        self._version += 1

    def lend(self, array: Any) -> Any:
        """Return an alias of `array` (this memory or a view of it) to hand to user code."""
        if (self.saves or self.watched) and self._copy is None:
            self._copy = self.array.copy()
        alias, owner = _lend(array)
        self._loans = [loan for loan in self._loans if loan() is not None]
        self._loans.append(weakref.ref(owner))
        return alias

    def watch(self) -> int:
        """Return `version`, and notice edits from now on."""
        self.watched = True
        return self.version()

    def version(self) -> int:
        """Return a number that differs from an earlier one if the contents have changed since."""
        if not self._loans:
            return self._version
        lent = any(loan() is not None for loan in self._loans)
        changed = self._copy is not None and self._differs()
        if changed:
            self._version += 1
        if not lent:
            self._loans.clear()
            self._copy = None
        elif changed or self._copy is None:
            self._copy = self.array.copy()
        return self._version

    def _differs(self) -> bool:
        with device_of(self.array).scope():
            return not _all_same(self.array, self._copy)


def _owned(array: Any) -> Storage:
    """Return the storage of an unpickled array, which may be a view of a buffer."""
    if isinstance(array, np.ndarray) and not (array.flags.owndata and array.flags.writeable):
        array = array.copy()
    return Storage(array)
