"""State arrays: their dtypes, and the checks of ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.devices import array_module, device_of, is_cupy, to_device
from cupybnn.backends.interop import type_name

__all__ = ["Expected", "check_state", "copy_into", "mismatches", "statistics_dtype"]


def statistics_dtype(dtype: Any) -> np.dtype:
    """Return the dtype for statistics of arrays of `dtype`: at least float32.

    Sums, squares and small differences of float16 numbers may not fit in float16.
    """
    return np.promote_types(dtype, np.float32)


@dataclass(frozen=True)
class Expected:
    """Requirements of a state array.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
        A float or integer array may have another width if its values fit.
    finite : bool
        Whether NaN and infinities are refused.
    least : float, optional
        The smallest value allowed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    finite: bool = False
    least: float | None = None

    @classmethod
    def like(cls, array: Any) -> Expected:
        """Return the requirements for replacing `array`."""
        return cls(tuple(array.shape), array.dtype)

    @classmethod
    def count(cls) -> Expected:
        """Return the requirements of a step count: an integer, 0 or more."""
        return cls((), np.dtype(np.int64), least=0)

    def mismatch(self, array: Any) -> str | None:
        """Describe what is wrong with `array`; None if nothing is."""
        shape, dtype = tuple(array.shape), array.dtype
        if shape != self.shape or not _same_kind(dtype, self.dtype):
            return f"must be {self.shape} {self.dtype}, is {shape} {dtype}"
        with device_of(array).scope(), np.errstate(all="ignore"):
            return self._bad_values(array)

    def _bad_values(self, array: Any) -> str | None:
        xp = array_module(array)
        if array.dtype.kind in "fcV":
            cast = array.astype(self.dtype)
            lost = int((xp.isfinite(array) & ~xp.isfinite(cast)).sum())
            if lost:
                return f"must fit in {self.dtype}; {lost} of its values overflow"
            bad = int((~xp.isfinite(cast)).sum()) if self.finite else 0
            if bad:
                return f"must be finite; {bad} of its values are NaN or infinite"
        elif array.dtype.kind in "iu" and array.dtype != self.dtype and array.size:
            limits = np.iinfo(self.dtype)
            low, high = int(array.min()), int(array.max())
            if low < limits.min or high > limits.max:
                return f"must fit in {self.dtype}; got values from {low} to {high}"
        if self.least is not None and array.size and float(array.min()) < self.least:
            return f"must be at least {self.least:g}; got {array.min()}"
        return None


def _same_kind(given: np.dtype, wanted: np.dtype) -> bool:
    # Extension dtypes such as bfloat16 all have the kind "V".
    if given == wanted:
        return True
    whole = given.kind in "iu" and wanted.kind in "iu"
    return whole or (given.kind == wanted.kind and wanted.kind != "V")


def check_state(state: Any, names: Iterable[str], owner: Any) -> None:
    """Raise TypeError unless `state` is a mapping whose values for `names` are arrays.

    Parameters
    ----------
    state
        The argument of ``owner.load_state_dict``.
    names : iterable of str
        Names to check; they may be missing.
    owner : object
        Names its class in the error.
    """
    what = f"The 'state' of {type(owner).__name__}.load_state_dict must"
    if not isinstance(state, Mapping):
        raise TypeError(f"{what} be a mapping of names to arrays; got {type_name(state)}.")
    given = {name: state[name] for name in names if name in state}
    wrong = [
        f"{type_name(value)} for {name!r}"
        for name, value in given.items()
        if not isinstance(value, (np.ndarray, np.generic)) and not is_cupy(value)
    ]
    if wrong:
        raise TypeError(f"{what} hold NumPy or CuPy arrays; got {', '.join(wrong)}.")


def mismatches(
    state: Mapping[str, Any], expected: Mapping[str, Expected], strict: bool = True
) -> list[str]:
    """Describe every array of `state` that is missing, unknown or not as expected, one per line.

    Parameters
    ----------
    state : mapping of str to array
    expected : mapping of str to Expected
    strict : bool
        Whether to report missing and unknown names.
    """
    faults = []
    if strict:
        faults += [f"missing: {name}" for name in expected if name not in state]
        faults += [f"unknown: {name}" for name in state if name not in expected]
    for name, rule in expected.items():
        if name in state and (fault := rule.mismatch(state[name])) is not None:
            faults.append(f"{name}: {fault}")
    return faults


def copy_into(target: Any, array: Any) -> None:
    """Copy `array` from any device into `target`, cast to the dtype of `target`."""
    device = device_of(target)
    with device.scope():
        target[...] = to_device(array, device)
