"""Operations on whole lines of packed matrices: indexing, joining, comparing.

The lines of a matrix form an array with the shape of the matrix without its packed axis. Indexing
the matrix means indexing that array; the packed axis stays whole, because its bits share words.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cupybnn import backends
from cupybnn.backends.devices import CPU, is_cupy
from cupybnn.backends.levels import SIGNS
from cupybnn.packed.matrix import PackedMatrix, stored_shape
from cupybnn.packed.signs import pack

__all__ = ["concatenate", "equal", "index", "iterate", "lines_of"]

EVERY = slice(None)


def lines_of(p: PackedMatrix, key: tuple[Any, ...] | None = None) -> Any:
    """Return lines of `p`, all or those selected by `key`, in the canonical layout on its device.

    Returns
    -------
    ndarray of uint64, shape (..., ceil(k / 64))
        A vector is the one line of a matrix, shape (1, ...). Of several bits, a line has those of
        all planes, as the device stores them.
    """
    with p.device.scope():
        shape = stored_shape(p.shape, p.axis, p.levels, p.device)
        return backends.get(p.device).select(
            p.words, shape, p.axis, (EVERY,) * (len(shape) - 1) if key is None else key
        )


def index(p: PackedMatrix, key: Any) -> PackedMatrix:
    """Return ``p[key]``."""
    items = _items(p, key)
    packed = p.ndim + p.axis
    selection: list[Any] = [0] if p.ndim == 1 else []
    before = after = 0  # axes of the result before and after the packed one
    axis = 0
    for item in items:
        if item is not None and axis == packed:
            _check_whole(p, item, axis)
            before, after = after, 0  # those counted so far come before it
            axis += 1
            continue
        if item is None:
            after += 1
        elif isinstance(item, slice):
            after += 1
            axis += 1
        elif isinstance(item, int):
            n = p.shape[axis]
            if not -n <= item < n:
                raise IndexError(
                    f"The index {item} is out of bounds for axis {axis} of a PackedMatrix of shape "
                    f"{p.shape}."
                )
            axis += 1
        else:
            item = _here(p, item)
            after += item.ndim
            axis += 1
        selection.append(item)
    if after > 1:
        raise IndexError(
            f"The packed axis of a PackedMatrix must stay one of the last two; this index of shape "
            f"{p.shape} would put {after} axes after it. Index p.T, or the array p.unpack()."
        )
    lines = lines_of(p, tuple(selection))
    with p.device.scope():
        popcounts = p.device.xp.array(p.popcounts[tuple(selection)], np.int32)
        outer = popcounts.shape
        shape = (*outer[:before], p.k, *outer[before:])
        if not outer:
            lines, popcounts = lines.reshape(1, -1), popcounts.reshape(1)
        stored = stored_shape(shape, -1 - after, p.levels, p.device)
        words = backends.get(p.device).from_lines(lines, stored, -1 - after)
    return PackedMatrix._of(words, popcounts, shape, -1 - after, p.device, p.levels)


def _items(p: PackedMatrix, key: Any) -> list[Any]:
    """Return `key` as ints, slices and arrays of ints, one for each axis, and None."""
    given = [_item(item) for item in (key if isinstance(key, tuple) else (key,))]
    ellipses = [i for i, item in enumerate(given) if item is ...]
    if len(ellipses) > 1:
        raise IndexError("An index of a PackedMatrix can have only one ellipsis ('...').")
    used = sum(item is not None and item is not ... for item in given)
    if used > p.ndim:
        raise IndexError(
            f"Too many indices for a PackedMatrix of shape {p.shape}: it has {p.ndim} axes, but "
            f"{used} were indexed."
        )
    at = ellipses[0] if ellipses else len(given)
    given[at : at + 1] = [EVERY] * (p.ndim - used)
    arrays = sum(not isinstance(item, (int, slice, type(None))) for item in given)
    if arrays and (arrays > 1 or any(isinstance(item, int) for item in given)):
        raise IndexError(
            "An index of a PackedMatrix can combine one array with slices, but not with further "
            "arrays or integers. Index one axis at a time: p[i][j]."
        )
    return given


def _item(item: Any) -> Any:
    if item is None or item is ... or isinstance(item, slice):
        return item
    if isinstance(item, list):
        item = np.asarray(item) if item else np.zeros(0, np.int64)
    is_array = isinstance(item, np.ndarray) or is_cupy(item)
    if is_array and item.ndim and item.dtype.kind in "iu":
        return item
    is_mask = isinstance(item, (bool, np.bool_)) or (is_array and item.dtype.kind == "b")
    if not is_mask and not (is_array and item.ndim):
        try:
            return operator.index(item)
        except TypeError:
            pass
    shown = f"an array of {item.dtype}" if is_array else f"{item!r:.60}"
    hint = " Convert a mask to indices: numpy.flatnonzero(mask)." if is_mask else ""
    raise IndexError(
        f"An index of a PackedMatrix must be an integer, a slice, '...', None or an array of "
        f"integers; got {shown}.{hint}"
    )


def _here(p: PackedMatrix, numbers: Any) -> Any:
    """Return an index array on the device of `p`, copied there if it is on the host."""
    if is_cupy(numbers) and p.device == CPU:
        raise IndexError("A PackedMatrix on cpu cannot be indexed by a cupy.ndarray. Pass x.get().")
    with p.device.scope():
        return p.device.xp.asarray(numbers)


def _check_whole(p: PackedMatrix, item: Any, axis: int) -> None:
    if isinstance(item, slice) and item.indices(p.k) == (0, p.k, 1):
        return
    raise IndexError(
        f"The packed axis of a PackedMatrix, axis {axis} of shape {p.shape}, cannot be indexed: "
        f"its elements are bits of shared words. Index the other axes, or the array p.unpack()."
    )


def iterate(p: PackedMatrix) -> Iterator[PackedMatrix]:
    """Return the iterator of ``for part in p``; TypeError if the first axis is packed."""
    if p.ndim + p.axis == 0:
        raise TypeError(
            f"A PackedMatrix of shape {p.shape} that is packed along its first axis cannot be "
            f"iterated over. Iterate over the array p.unpack(), or over p.T."
            if p.ndim > 1
            else "A packed vector cannot be iterated over. Iterate over the array p.unpack()."
        )
    return (index(p, i) for i in range(p.shape[0]))


def equal(p: PackedMatrix, q: PackedMatrix) -> bool:
    """Whether two packed matrices have the same shape and the same elements."""
    if p.shape != q.shape or p.levels is not q.levels:
        return False
    if p.axis != q.axis:
        q = _packed_again(_elements(q), p.axis, q)
    if p.device != q.device:
        p, q = p.to_numpy(), q.to_numpy()
    with p.device.scope():
        return bool((lines_of(p) == lines_of(q)).all())


def concatenate(matrices: Iterable[PackedMatrix], axis: int = 0) -> PackedMatrix:
    """Join packed matrices along an axis, as `numpy.concatenate` joins arrays.

    Parameters
    ----------
    matrices : iterable of PackedMatrix
        Of the same shape except along `axis`, with the same bits, packed along the same axis, on
        one device.
    axis : int
        Any axis. Along the packed one, lines of signs are joined word by word if the lengths of all
        but the last are multiples of 64; otherwise they are unpacked first, to one byte per
        element, or two.

    Returns
    -------
    PackedMatrix
        Packed along the same axis.

    Raises
    ------
    TypeError
        If `matrices` are not all packed, or some are on the host and some on a GPU.
    ValueError
        If there are none, or their shapes, packed axes or devices do not match.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import concatenate, pack
    >>> p = pack(np.array([[1.0, -1.0, 1.0]]))
    >>> concatenate([p, p]).unpack().tolist()
    [[1, -1, 1], [1, -1, 1]]
    >>> concatenate([p, p], axis=1).shape
    (1, 6)
    """
    if isinstance(matrices, PackedMatrix):
        raise TypeError(
            "The 'matrices' of concatenate must be a list of PackedMatrix; got one PackedMatrix."
        )
    parts = list(matrices)
    if not parts:
        raise ValueError("The 'matrices' of concatenate must hold at least one PackedMatrix.")
    for part in parts:
        if not isinstance(part, PackedMatrix):
            raise TypeError(
                f"The 'matrices' of concatenate must all be PackedMatrix; got "
                f"{type(part).__name__}. Pack it first: cupybnn.pack(x, axis={parts[0].axis})."
                if isinstance(parts[0], PackedMatrix)
                else f"The 'matrices' of concatenate must all be PackedMatrix; got "
                f"{type(part).__name__}. For arrays, use numpy.concatenate."
            )
    first = parts[0]
    axis = _axis_to_join(first, axis)
    for part in parts:
        if part.device != first.device:
            kind = TypeError if part.device.kind != first.device.kind else ValueError
            raise kind(
                f"The 'matrices' of concatenate must be on one device; got {first.device} and "
                f"{part.device}. Move them: to_cupy() or to_numpy()."
            )
        if part.levels is not first.levels:
            raise ValueError(
                f"The 'matrices' of concatenate must have elements of the same bits; got "
                f"{first.levels} and {part.levels}."
            )
        if part.axis != first.axis:
            raise ValueError(
                f"The 'matrices' of concatenate must be packed along the same axis; got axis "
                f"{first.axis} and axis {part.axis}."
            )
        if len(part.shape) != first.ndim or any(
            n != m
            for i, (n, m) in enumerate(zip(part.shape, first.shape, strict=True))
            if i != axis
        ):
            raise ValueError(
                f"The 'matrices' of concatenate must have the same shape except along axis {axis}; "
                f"got {first.shape} and {part.shape}."
            )
    with first.device.scope():
        return _join(parts, axis)


def _axis_to_join(p: PackedMatrix, axis: Any) -> int:
    try:
        number = operator.index(axis)
    except TypeError:
        number = p.ndim
    if not -p.ndim <= number < p.ndim:
        raise ValueError(
            f"The 'axis' of concatenate must be an axis of the matrices, which have {p.ndim}; got "
            f"{axis!r}."
        )
    return number % p.ndim


def _join(parts: list[PackedMatrix], axis: int) -> PackedMatrix:
    first = parts[0]
    xp, packed = first.device.xp, first.ndim + first.axis
    shape = list(first.shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    if axis != packed:
        at = axis if axis < packed else axis - 1
        popcounts = xp.concatenate([part.popcounts for part in parts], axis=at)
    elif first.levels is SIGNS and all(part.k % 64 == 0 for part in parts[:-1]):
        at = -1
        popcounts = sum((part.popcounts for part in parts[1:]), first.popcounts.copy())
    else:
        elements = xp.concatenate([_elements(part) for part in parts], axis=axis)
        return _packed_again(elements, first.axis, first)
    lines = xp.concatenate([lines_of(part) for part in parts], axis=at)
    stored = stored_shape(tuple(shape), first.axis, first.levels, first.device)
    words = backends.get(first.device).from_lines(lines, stored, first.axis)
    return PackedMatrix._of(words, popcounts, tuple(shape), first.axis, first.device, first.levels)


def _elements(p: PackedMatrix) -> Any:
    return p.unpack(bool if p.levels is SIGNS else None)


def _packed_again(elements: Any, axis: int, like: PackedMatrix) -> PackedMatrix:
    """Pack elements that were unpacked, with the bits of `like`."""
    return pack(elements, axis=axis, bits=like.bits, signed=like.signed)
