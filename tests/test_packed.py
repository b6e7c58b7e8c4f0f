"""Signs, packing and what a PackedMatrix says of itself."""

from __future__ import annotations

import numpy as np
import pytest
from gemm_cases import BFLOAT16, DTYPES, HOST_DTYPES, LAYOUTS, array, host, signs

import cupybnn
from cupybnn import PackedMatrix, pack, sign, unpack

pytestmark = pytest.mark.cpu_kernels

KS = (0, 1, 7, 8, 9, 31, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1025)


def test_sign_of_special_values(xp):
    x = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-45, -1e-45, 2, -2])
    expected = [1, 1, -1, -1, 1, -1, 1, -1, 1, -1]
    for dtype in ("f4", "f8"):
        # Made on the host: CuPy's casts take 1e-45, a subnormal float32, for 0.
        result = sign(xp.asarray(x.astype(dtype)))
        assert result.dtype == np.dtype(dtype)
        assert host(result).tolist() == expected
    tiny = np.finfo(np.float16).smallest_subnormal
    half = xp.asarray([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, tiny, -tiny], np.float16)
    assert host(sign(half)).tolist() == expected[:8]


@pytest.mark.parametrize("bits", ["f2", *(d.name for d in BFLOAT16)])
def test_sign_of_every_16_bit_float(bits):
    dtype = np.dtype("f2") if bits == "f2" else BFLOAT16[0]
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    expected = np.where(x.astype(np.float32) >= 0, 1, -1)
    np.testing.assert_array_equal(sign(x).astype(np.float32), expected)
    np.testing.assert_array_equal(pack(x).unpack(), expected)


def test_sign_keeps_shape_and_dtype(xp):
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        for shape in ((), (3,), (0, 2), (2, 3, 4, 5)):
            x = array(rng, xp, shape, dtype) if shape else xp.asarray(np.ones((), dtype))
            result = sign(x)
            assert result.shape == shape
            assert result.dtype == (np.int8 if dtype.kind == "b" else dtype)
            np.testing.assert_array_equal(host(result).astype(int), signs(host(x)))


def test_sign_of_the_least_integer_and_of_lists():
    assert sign(np.array([-128, 127, 0], np.int8)).tolist() == [-1, 1, 1]
    assert sign([0.5, -0.5]).tolist() == [1.0, -1.0]
    assert sign(-3) == -1


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("k", KS)
def test_pack_and_unpack(xp, k, axis):
    rng = np.random.default_rng(k)
    dtypes = DTYPES + (HOST_DTYPES if xp is np else [])
    for i, layout in enumerate(LAYOUTS * 2):
        shape = ((5, k), (k, 130), (2, 3, k), (3, k, 9))[i % 4]
        x = array(rng, xp, shape, dtypes[(k + i) % len(dtypes)], layout)
        p = pack(x, axis=axis)
        case = f"{x.dtype} {x.shape} {layout}"
        np.testing.assert_array_equal(host(unpack(p)), signs(host(x)), err_msg=case)
        counts = (signs(host(x)) > 0).sum(axis=axis)
        np.testing.assert_array_equal(host(p.popcounts), counts, err_msg=case)
        assert p.popcounts.dtype == np.int32


def test_unpack_to_every_dtype(xp):
    x = array(np.random.default_rng(0), xp, (70, 33), layout="F")
    for axis in (-1, -2):
        p = pack(x, axis=axis)
        for dtype in DTYPES:
            result = p.unpack(dtype)
            assert isinstance(result, xp.ndarray)
            assert result.dtype == dtype
            expected = signs(host(x)) > 0 if dtype.kind == "b" else signs(host(x))
            np.testing.assert_array_equal(host(result).astype(int), expected.astype(int))
    assert p.unpack().dtype == np.int8


def test_words_of_the_canonical_layout():
    """Element 64 j + i is bit i of word j, and beyond the end there are zeros."""
    x = -np.ones((2, 130), np.float32)
    x[0, [0, 63, 64, 129]] = 1
    p = pack(x)
    assert p.words.dtype == np.dtype("<u8")
    assert p.words.tolist() == [[1 | 1 << 63, 1, 2], [0, 0, 0]]
    assert pack(np.ascontiguousarray(x.T), axis=0).words.tolist() == p.words.tolist()
    assert pack(np.asfortranarray(x)).words.tolist() == p.words.tolist()


def test_vector(xp):
    x = array(np.random.default_rng(0), xp, (100,))
    for axis in (0, -1):
        p = pack(x, axis=axis)
        assert (p.shape, p.ndim, p.axis, p.k, p.lines, p.size) == ((100,), 1, -1, 100, 1, 100)
        assert p.T is p
        np.testing.assert_array_equal(host(p.unpack()), signs(host(x)))


def test_attributes(xp):
    x = array(np.random.default_rng(0), xp, (3, 70, 200))
    p = pack(x, axis=1)
    assert (p.shape, p.ndim, p.axis, p.k, p.lines, p.size) == ((3, 70, 200), 3, -2, 70, 200, 42000)
    assert len(p) == 3
    assert p.nbytes == p.words.nbytes
    assert str(p.device) == ("cpu" if xp is np else f"cuda:{x.device.id}")
    t = p.T
    assert (t.shape, t.axis, t.k, t.lines) == ((3, 200, 70), -1, 70, 200)
    assert t.words is p.words
    np.testing.assert_array_equal(host(t.unpack()), signs(host(x)).swapaxes(-1, -2))
    assert (t.T.shape, t.T.axis) == (p.shape, p.axis)


def test_repr():
    p = pack(np.ones((4096, 784), np.int8))
    assert repr(p) == (
        "PackedMatrix(shape=(4096, 784), axis=-1, 1 bit per element, 425,984 bytes on cpu)"
    )


def test_is_not_an_array():
    p = pack(np.ones((2, 3)))
    with pytest.raises(TypeError, match=r"not an array.*p\.unpack\(dtype\)"):
        np.asarray(p)
    with pytest.raises(AttributeError):
        p.extra = 1


def test_to_numpy_of_numpy_is_itself():
    p = pack(np.ones((2, 3)))
    assert p.to_numpy() is p


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [-1, -2])
def test_there_and_back(axis):
    import cupy

    rng = np.random.default_rng(0)
    for shape in ((1, 1), (65, 257), (300, 1000), (2, 3, 5, 70), (90,), (0, 4), (4, 0)):
        x = array(rng, np, shape)
        p = pack(x, axis=axis if x.ndim > 1 else -1)
        q = p.to_cupy()
        assert q.device.kind == "cuda"
        assert q.to_cupy() is q
        np.testing.assert_array_equal(host(q.popcounts), p.popcounts)
        np.testing.assert_array_equal(q.unpack().get(), p.unpack())
        np.testing.assert_array_equal(q.to_numpy().words, p.words)
        direct = pack(cupy.asarray(x), axis=p.axis).to_numpy()
        np.testing.assert_array_equal(direct.words, p.words)


@pytest.mark.parametrize("function", [sign, pack])
@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        ("u1", "Unsigned integers have no sign.*astype\\(bool\\)"),
        ("u8", "Unsigned integers have no sign"),
        ("c8", "A complex number has no sign"),
        ("O", "Convert it to numbers first"),
        ("U3", "Convert it first"),
        ("M8[s]", "Convert it first"),
        ("i4,f4", "Convert it first"),
    ],
)
def test_dtypes_without_sign(function, dtype, hint):
    x = np.zeros((2, 3), dtype)
    what = f"'x' of {function.__name__} must be an array of real floating, signed integer or bool"
    with pytest.raises(TypeError, match=f"{what}.*got dtype.*{hint}"):
        function(x)


def test_masked_arrays_are_refused():
    x = np.ma.masked_less(np.ones((2, 2)), 0)
    for function in (sign, pack):
        with pytest.raises(TypeError, match=r"without a mask.*x\.filled\(value\)"):
            function(x)


def test_wrong_axes():
    x = np.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"at least one axis; got a scalar"):
        pack(1.0)
    for axis in (3, -4, None, 1.0):
        with pytest.raises(ValueError, match=rf"'axis' of pack must be an axis.*got {axis}"):
            pack(x, axis=axis)
    with pytest.raises(ValueError, match=r"one of the last two axes.*got -3 for shape \(2, 3, 4\)"):
        pack(x, axis=0)


def test_unpack_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match="'p' of unpack must be a PackedMatrix; got ndarray"):
        unpack(np.ones(3))
    p = pack(np.ones(3))
    for dtype in ("u1", "c8", "O"):
        with pytest.raises(TypeError, match="'dtype' of unpack must be real floating"):
            p.unpack(dtype)


def test_public_names():
    assert cupybnn.PackedMatrix is PackedMatrix
    for name in cupybnn.__all__:
        assert getattr(cupybnn, name) is not None
