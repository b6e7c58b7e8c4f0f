"""What a PackedMatrix shares with arrays: indexing, joining, comparing, @, copies."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from gemm_cases import array, assert_product, host, reference, signs

import cupybnn
from cupybnn import PackedMatrix, concatenate, pack, xnor_gemm
from cupybnn.backends.cuda import lines, packing

pytestmark = pytest.mark.cpu_kernels


def packed(xp, shape, axis=-1, seed=0):
    """Return a packed matrix and its signs."""
    x = array(np.random.default_rng(seed), xp, shape)
    return pack(x, axis=axis), signs(host(x)).astype(np.int8)


def assert_is(p, expected, case=""):
    """All of what a packed matrix holds is that of the array of signs."""
    np.testing.assert_array_equal(host(p.unpack()), expected, err_msg=str(case))
    assert p.shape == expected.shape, case
    counts = (expected > 0).sum(axis=p.axis)
    np.testing.assert_array_equal(host(p.popcounts), counts.reshape(p.popcounts.shape))
    assert p == pack(p.unpack(), axis=p.axis), case
    if p.k and p.size:
        last = (slice(None),) * (len(expected.shape) - 2)
        other = np.where(np.arange(p.k * 3).reshape(p.k, 3) % 5 < 2, 1, -1).astype(np.int8)
        right = p.device.xp.asarray(other)
        left = p if p.axis == -1 else p.T
        lines = expected if p.axis == -1 else expected.swapaxes(-1, -2)
        assert_product(left[last] @ right, reference(lines, other), case)


KEYS = {  # by shape and packed axis
    ((20, 70), -1): [
        0, -1, 7, slice(0, 10), slice(3, None, 4), slice(None, None, -1), slice(5, 5), [3, 1, 3],
        np.array([], int), np.array([[0, 2], [-1, 4]]), ..., (..., slice(None)), (4, ...),
        (slice(2, 4), slice(None)), (np.int8(3), slice(0, 70)), None, (None, 3),
        (slice(2, 5), None),
    ],
    ((70, 20), -2): [
        (slice(None), 3), (slice(None), slice(1, 9, 3)), (..., -2), (..., [4, 0]), None,
        (slice(None), slice(None)), (), (None, ..., 1),
    ],
    ((3, 2, 5, 130), -1): [
        1, (1, 0), (1, 0, 4), (slice(None), 1), (..., 2, slice(None)), ([2, 0],),
        (slice(1, 3), -1, 2),
        (0, slice(None), slice(1, 4)), (slice(None), [1, 1, 0]),
    ],
    ((3, 130, 5), -2): [
        2, (2, slice(None), 1), (slice(None), slice(None), 1), (..., slice(3)), ([0, 2],),
        (slice(None), slice(None), [4, 1]), slice(1, 2),
    ],
    ((70,), -1): [
        ..., slice(None), (), None, (None, slice(None)), (slice(None), None), (None, None),
    ],
    ((0, 70), -1): [slice(0, 3), ..., None],
    ((4, 0), -1): [1, slice(2), [3, 3]],
}  # fmt: skip


@pytest.mark.parametrize(("shape", "axis"), list(KEYS))
def test_index(xp, shape, axis):
    p, expected = packed(xp, shape, axis)
    for key in KEYS[shape, axis]:
        assert_is(p[key], expected[key], (shape, axis, key))
    assert_is(p, expected)  # still


@pytest.mark.parametrize(
    ("shape", "axis", "key", "why"),
    [
        ((5, 70), -1, 5, "index 5 is out of bounds for axis 0 .*shape \\(5, 70\\)"),
        ((5, 70), -1, -6, "out of bounds"),
        ((5, 70), -1, (0, 0), "packed axis of a PackedMatrix, axis 1 .*cannot be indexed"),
        ((5, 70), -1, (slice(None), slice(0, 64)), r"cannot be indexed.*p\.unpack\(\)"),
        ((70, 5), -2, 0, "axis 0 of shape"),
        ((70, 5), -2, slice(None, None, -1), "cannot be indexed"),
        ((70,), -1, 0, "cannot be indexed"),
        ((70,), -1, [0], "cannot be indexed"),
        ((5, 70), -1, (0, slice(None), 0), r"Too many indices.*shape \(5, 70\).*2 axes, but 3"),
        ((5, 70), -1, (..., ...), "one ellipsis"),
        ((5, 70), -1, 1.0, "must be an integer, a slice.*got 1.0"),
        ((5, 70), -1, "x", "got 'x'"),
        ((5, 70), -1, True, r"got True. Convert a mask to indices: numpy\.flatnonzero\(mask\)"),
        ((5, 70), -1, np.ones(5, bool), "got an array of bool. Convert a mask to indices"),
        ((5, 70), -1, np.ones(5), "got an array of float64"),
        ((2, 5, 70), -1, ([0], [1]), "can combine one array"),
        ((2, 5, 70), -1, ([0], 1), r"can combine one array.*p\[i\]\[j\]"),
        ((70, 5), -2, (slice(None), slice(None), None), "must stay one of the last two"),
    ],
)
def test_what_is_no_index(shape, axis, key, why):
    p, _ = packed(np, shape, axis)
    with pytest.raises(IndexError, match=why):
        p[key]


def test_lines_are_found_in_the_layout_of_the_kernels():
    """The indexing that runs on a GPU, with NumPy in CuPy's place."""
    rng = np.random.default_rng(0)
    for batch, count, k in ((1, 1, 1), (2, 5, 64), (3, 33, 2100), (1, 17, 1025), (2, 4, 0)):
        words = rng.integers(0, 2**63, (batch, count, -(-k // 64)), np.uint64)
        shape = packing.words_shape(batch, count, k)
        placed = lines.place(np, words, batch, count, k, shape)
        assert (placed.shape, placed.dtype) == (shape, np.uint32)
        numbers = rng.integers(0, batch * count, (4, 3))
        found = lines.take(np, placed, numbers, count, k)
        np.testing.assert_array_equal(found, words.reshape(batch * count, -1)[numbers])
        assert found.flags.c_contiguous
    assert lines.take(np, np.zeros((1, 1, 0, 32), "u4"), np.arange(0), 0, 70).shape == (0, 2)


def test_iteration(xp):
    p, expected = packed(xp, (4, 3, 70))
    for part, signs_of_part in zip(p, expected, strict=True):
        assert_is(part, signs_of_part)
    assert len(list(p[:0])) == 0
    for vector in (p[0, 0], p[0].T):
        with pytest.raises(TypeError, match=r"cannot be iterated over.*p\.unpack\(\)"):
            iter(vector)
    with pytest.raises(TypeError, match="'in' is not defined"):
        assert 1 in p


def test_equality_is_that_of_the_content(xp):
    p, x = packed(xp, (5, 70))
    same = pack(xp.asarray(x))
    assert p == same
    assert (p != same) is False
    assert p == pack(xp.asarray(x), axis=-2)  # however it is packed
    for other in (pack(xp.asarray(-x)), p[:4], p.T, p[0], p[None]):
        assert p != other
        assert (p == other) is False
    for at in ((0, 0), (4, 69), (2, 64)):
        changed = x.copy()
        changed[at] *= -1
        assert p != pack(xp.asarray(changed))
    empty = pack(xp.zeros((0, 3)))
    assert empty == pack(xp.zeros((0, 3)))
    assert empty != pack(xp.zeros((0, 4)))
    assert p != 1
    assert p is not None
    assert p != "text"
    for array_like in (xp.asarray(x), np.float32(1), x):
        with pytest.raises(TypeError, match=r"only be compared with a PackedMatrix.*p\.unpack"):
            assert p == array_like
    with pytest.raises(TypeError, match=r"only be compared.*; got numpy\.ndarray"):
        assert x == p
    with pytest.raises(TypeError, match="unhashable"):
        hash(p)


def test_numpy_functions_that_take_a_packed_matrix():
    p, x = packed(np, (5, 70))
    for other, expected in (
        (pack(x), True), (x, True), (x.astype("f4"), True), (pack(-x), False), (-x, False),
        (p[:4], False), (x[0], False), (x.tolist(), True),
    ):  # fmt: skip
        assert np.array_equal(p, other) is expected
        assert np.array_equal(other, p) is expected
    assert (np.shape(p), np.ndim(p), np.size(p)) == ((5, 70), 2, 350)
    assert np.copy(p) == p
    assert np.concatenate([p, p]) == concatenate([p, p])
    for function in (np.sum, np.transpose, np.linalg.norm, np.allclose):
        with pytest.raises(TypeError, match=rf"{function.__name__} does not take a PackedMatrix"):
            function(*[p] * (2 if function is np.allclose else 1))


@pytest.mark.gpu
def test_equality_across_devices():
    p, _ = packed(np, (5, 70))
    q = p.to_cupy()
    assert p == q
    assert q == p
    assert q != pack(-p.unpack())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(("shape", "axis"), [((5, 70), -1), ((3, 70, 2), -2), ((70,), -1)])
def test_pickle(xp, protocol, shape, axis):
    p, expected = packed(xp, shape, axis)
    q = pickle.loads(pickle.dumps(p, protocol))
    assert (q.axis, q.device) == (p.axis, p.device)
    assert_is(q, expected)


def test_copies_share_no_memory(xp):
    p, expected = packed(xp, (5, 70), -2)
    for q in (p.copy(), copy.copy(p), copy.deepcopy(p), copy.deepcopy([p])[0]):
        assert (q.axis, q.device) == (p.axis, p.device)
        assert_is(q, expected)
        assert not xp.may_share_memory(p.words, q.words)
        assert not xp.may_share_memory(p.popcounts, q.popcounts)


def test_matmul_operator(xp):
    p, x = packed(xp, (5, 70))
    q, y = packed(xp, (70, 6), -2, seed=1)
    expected = reference(x, y)
    real = xp.asarray(x, xp.float32)
    for left, right, dtype in (
        (p, q, "i4"), (p, xp.asarray(y), "i4"), (real, q, "f4"), (p, xp.asarray(y, "f8"), "f8"),
    ):  # fmt: skip
        result = left @ right
        assert isinstance(result, xp.ndarray)
        assert result.dtype == dtype
        assert_product(result, expected, dtype)
    assert_product(real[0] @ q, expected[0], "vector")
    if xp is np:
        assert_product(x.tolist() @ q, expected, "list")
    with pytest.raises(ValueError, match="'b' of xnor_gemm must be packed along its K axis"):
        p @ pack(xp.ones((70, 70)))
    with pytest.raises(TypeError, match="PackedMatrix"):
        p + xp.ones((5, 70))
    with pytest.raises(TypeError, match="PackedMatrix"):
        xp.ones((5, 70)) * p


@pytest.mark.parametrize(
    ("shape", "axis", "along", "sizes"),
    [
        ((5, 70), -1, 0, (1, 4, 0, 5)),
        ((5, 128), -1, 1, (64, 64, 3)),
        ((5, 70), -1, -1, (3, 64, 3)),
        ((70, 5), -2, 1, (1, 4, 17)),
        ((70, 5), -2, 0, (6, 1, 63)),
        ((3, 4, 70), -1, 0, (1, 2)),
        ((3, 4, 70), -1, 1, (2, 2)),
        ((3, 70, 4), -2, -1, (20, 4)),
        ((3, 70, 4), -2, 1, (64, 6)),
        ((70,), -1, 0, (64, 6)),
        ((70,), -1, 0, (70,)),
        ((3, 0), -1, 1, (0, 0, 4)),
    ],
)
def test_concatenate(xp, shape, axis, along, sizes):
    shape = list(shape)
    parts, expected = [], []
    for i, size in enumerate(sizes):
        shape[along] = size
        p, x = packed(xp, tuple(shape), axis, seed=i)
        parts.append(p)
        expected.append(x)
    joined = concatenate(iter(parts), axis=along)
    assert joined.axis == axis
    assert_is(joined, np.concatenate(expected, axis=along))
    for part, x in zip(parts, expected, strict=True):
        assert_is(part, x)  # still


def test_what_cannot_be_joined():
    p, _ = packed(np, (5, 70))
    for given, kind, why in (
        ([], ValueError, "at least one"),
        (p, TypeError, "a list of PackedMatrix; got one"),
        ([p, np.ones((5, 70))], TypeError, r"got ndarray. Pack it first: cupybnn.pack\(x, axis=-1"),
        ([np.ones(3)], TypeError, r"numpy\.concatenate"),
        ([p, p.T], ValueError, "packed along the same axis; got axis -1 and axis -2"),
        ([p, p[:, None]], ValueError, "same shape except along axis 0"),
        ([p, pack(np.ones((5, 71)))], ValueError, r"got \(5, 70\) and \(5, 71\)"),
    ):
        with pytest.raises(kind, match=why):
            concatenate(given)
    for axis in (2, -3, 0.5, None, "x"):
        with pytest.raises(ValueError, match="'axis' of concatenate must be an axis"):
            concatenate([p, p], axis=axis)


@pytest.mark.gpu
def test_host_and_gpu_are_not_joined():
    p, _ = packed(np, (5, 70))
    with pytest.raises(TypeError, match=r"on one device; got cpu and cuda:0.*to_cupy\(\)"):
        concatenate([p, p.to_cupy()])


def test_a_part_of_a_large_matrix_is_ready_for_a_product(xp):
    p, x = packed(xp, (300, 2100))
    w, y = packed(xp, (2100, 130), -2, seed=1)
    expected = reference(x, y)
    assert_product(xnor_gemm(p[37:205], w[:, ::3]), expected[37:205, ::3], "slices")
    rows = np.random.default_rng(0).integers(0, 300, 64)
    for numbers in (rows, xp.asarray(rows), rows.tolist()):
        assert_product(p[numbers] @ w, expected[rows], "rows")


@pytest.mark.gpu
def test_host_is_not_indexed_by_a_gpu_array():
    import cupy

    p, _ = packed(np, (5, 70))
    with pytest.raises(IndexError, match=r"cpu cannot be indexed by a cupy\.ndarray"):
        p[cupy.arange(3)]


def test_the_class_is_not_called(xp):
    p, _ = packed(xp, (5, 70))
    for make in (
        lambda: PackedMatrix(),
        lambda: PackedMatrix(p.words, None, p.shape, -1, p.device),
        lambda: PackedMatrix(np.ones((5, 70))),
    ):
        with pytest.raises(TypeError, match=r"cupybnn\.pack\(x\).*from_packbits.*load\(path\)"):
            make()


def test_dtype_is_that_of_unpack(xp):
    p, _ = packed(xp, (5, 70))
    assert p.dtype == p.unpack().dtype == np.int8
    assert cupybnn.concatenate is concatenate
