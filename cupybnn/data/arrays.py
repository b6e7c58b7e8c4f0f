"""Validation of arrays that users pass as a data set."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from cupybnn.backends.devices import CPU, array_module, to_device
from cupybnn.backends.interop import as_native, bfloat16_dtype, type_name
from cupybnn.backends.totals import all_true

__all__ = ["check_finite", "check_weights", "count_classes", "features", "labels", "weights"]

#: With more distinct values, labels are more likely counts than classes.
_MOST_CLASSES = 1 << 16


def features(name: str, x: Any) -> np.ndarray:
    """Return features as uint8, float32 or float64, of shape (examples, ...).

    Raises
    ------
    TypeError
        If they are not real numbers.
    ValueError
        If there are no examples or no features.
    """
    array = _on_host(name, x)
    if array.dtype.kind not in "fiub" and array.dtype != bfloat16_dtype():
        raise TypeError(
            f"The {name!r} of from_arrays must be real numbers; got {array.dtype}. "
            f"{_hint(x, 'Turn categories into numbers, and sparse matrices into arrays, first.')}"
        )
    if array.ndim < 2 or array.size == 0:
        hint = " A single feature is a column: x.reshape(-1, 1)." if array.ndim == 1 else ""
        raise ValueError(
            f"The {name!r} of from_arrays must have shape (examples, ...), with at least one "
            f"example of one feature; got {array.shape}.{hint}"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    wide = array.dtype.kind == "f" and array.dtype.itemsize >= 8
    return np.ascontiguousarray(array, np.float64 if wide else np.float32)


def labels(name: str, y: Any, examples: int) -> np.ndarray:
    """Return labels as int64 of shape (examples,).

    Raises
    ------
    TypeError
        If they are not integers.
    ValueError
        If their number differs from that of the examples.
    """
    array = _on_host(name, y)
    if array.dtype.kind not in "iub":
        hint = "Number the classes: classes, y = np.unique(y, return_inverse=True)."
        if array.ndim == 2 and array.shape[0] == examples and array.shape[1] > 1:
            hint = "If there is a column for each class: y.argmax(axis=1)."
        elif array.dtype.kind == "f" and array.size and (array == np.floor(array)).all():
            hint = "The values are integers: use y.astype(int)."
        raise TypeError(f"The {name!r} of from_arrays must be integers; got {array.dtype}. {hint}")
    if array.shape != (examples,):
        hint = ""
        if array.shape == (examples, 1):
            hint = " Flatten the column: y.ravel()."
        elif array.ndim == 2 and len(array) == examples:
            hint = " If there is a column for each class: y.argmax(axis=1)."
        raise ValueError(
            f"The {name!r} of from_arrays must have shape ({examples},), one label for each "
            f"example; got {array.shape}.{hint}"
        )
    return array.astype(np.int64)


def weights(name: str, w: Any, examples: int) -> np.ndarray:
    """Return weights as float64 of shape (examples,); see `check_weights`."""
    array = _on_host(name, w)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"The {name!r} of from_arrays must be real numbers; got {array.dtype}.")
    array = array.astype(np.float64)
    check_weights(name, array, examples)
    return array


def check_weights(name: str, w: np.ndarray, examples: int) -> None:
    """Raise ValueError unless there is one weight for each example, at least 0, and not all 0."""
    if w.shape != (examples,):
        raise ValueError(
            f"The {name!r} of a Dataset must have shape ({examples},), one weight for each "
            f"training example; got {w.shape}."
        )
    wrong = np.flatnonzero(~((w >= 0) & (w < np.inf)))
    if len(wrong):
        raise ValueError(
            f"The {name!r} of a Dataset must be finite and at least 0; got {w[wrong[0]]} for "
            f"example {wrong[0]}."
        )
    if not w.any():
        raise ValueError(f"The {name!r} of a Dataset must not all be zero; got {examples} zeros.")


def count_classes(classes: int | None, parts: Mapping[str, np.ndarray]) -> int:
    """Return the number of classes, inferred if None; ValueError if a label is out of range."""
    largest = max(int(y.max(initial=0)) for y in parts.values())
    if classes is None:
        count = largest + 1
        if not 1 < count <= _MOST_CLASSES:
            raise ValueError(
                f"The 'classes' of from_arrays must be given if it cannot be inferred from the "
                f"labels; the largest label is {largest}. If the labels are not class numbers "
                f"from 0: classes, y = np.unique(y, return_inverse=True)."
            )
    else:
        count = operator.index(classes)
    for name, y in parts.items():
        wrong = np.flatnonzero((y < 0) | (y >= count))
        if len(wrong):
            raise ValueError(
                f"The {name!r} of from_arrays must hold classes from 0 to {count - 1}; got "
                f"{int(y[wrong[0]])} for example {int(wrong[0])}. To number them: classes, y = "
                f"np.unique(y, return_inverse=True)."
            )
    return count


def check_finite(what: str, x: Any) -> None:
    """Raise ValueError if features are NaN or infinite, with their number and the first one."""
    xp = array_module(x)
    if x.dtype.kind != "f" or all_true(xp.isfinite(x)):
        return
    bad = xp.argwhere(~xp.isfinite(x))
    row, column = (int(i) for i in bad[0])
    raise ValueError(
        f"The {what} must be finite; got {len(bad):,} value(s) that are not, the first "
        f"{x[row, column]} as feature {column} of example {row}. Fill in these values, or "
        f"leave these examples out."
    )


def _on_host(name: str, x: Any) -> np.ndarray:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"The {name!r} of from_arrays must not be a masked array. "
            f"Fill it first: x.filled(value)."
        )
    array: np.ndarray = to_device(as_native(x, f"{name!r} of from_arrays"), CPU)
    return array


def _hint(x: Any, otherwise: str) -> str:
    if hasattr(x, "toarray"):
        return f"Make an array of the {type_name(x)}: x.toarray()."
    return otherwise
