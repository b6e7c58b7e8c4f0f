"""Bad arguments: each error names the argument, what it must be and what came."""

from __future__ import annotations

import re

import numpy as np
import pytest
from gemm_cases import BFLOAT16

from cupybnn import pack, xnor_gemm, xnor_gemm_packed
from cupybnn.operands import check_result_dtype

BOTH = pytest.mark.parametrize("function", [xnor_gemm, xnor_gemm_packed])


def raises(kind, *parts):
    return pytest.raises(kind, match=".*".join(map(re.escape, parts)))


@BOTH
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        ("u1", "pass x.astype(bool)"),
        ("u4", "Unsigned integers have no sign"),
        ("c8", "A complex number has no sign: pass x.real"),
    ],
)
def test_dtypes_without_sign(xp, function, name, dtype, hint):
    operands = {"a": xp.ones((3, 3)), "b": xp.ones((3, 3))}
    operands[name] = xp.ones((3, 3), dtype)
    what = f"The '{name}' of {function.__name__} must be an array of real floating, signed integer"
    with raises(TypeError, what, f"got dtype {np.dtype(dtype)}", hint):
        function(**operands)


@BOTH
@pytest.mark.parametrize("name", ["a", "b"])
def test_not_an_array(function, name):
    for x, parts in (
        (np.full((3, 3), None), ("got dtype object", "x.astype('float32')")),
        (np.ma.masked_less(np.ones((3, 3)), 0), ("without a mask", "x.filled(value)")),
        ([[1, 2, 3], [1, 2]], ("that numpy.asarray accepts; got list",)),
        ("text", ("got dtype <U4",)),
        (object(), ("got dtype object from object",)),
        (None, ("got dtype object from NoneType",)),
    ):
        operands = {"a": np.ones((3, 3)), "b": np.ones((3, 3))}
        operands[name] = x
        with raises(TypeError, f"The '{name}' of {function.__name__} must be an array", *parts):
            function(**operands)


@BOTH
def test_different_k(xp, function):
    for shape_a, shape_b, k_b in (((3, 4), (5, 6), 5), ((4,), (5, 6), 5), ((2, 3, 4), (1, 6), 1)):
        a, b = xp.ones(shape_a), xp.ones(shape_b)
        for x, y in ((a, b), (pack(a), pack(b, axis=-2)), (a, pack(b, axis=-2))):
            with raises(
                ValueError,
                f"The 'b' of {function.__name__} must have as many rows as 'a' has columns (K)",
                f"'a' has shape {shape_a} and 'b' has shape {shape_b}",
                f"K is 4 in 'a' and {k_b} in 'b'",
            ):
                function(x, y)
    with raises(ValueError, "K is 4 in 'a' and 5 in 'b'"):
        xnor_gemm(xp.ones((3, 4)), xp.ones(5))


@BOTH
def test_scalars(xp, function):
    a = xp.ones((3, 3))
    with raises(ValueError, "The 'b' of", "at least one axis; got a scalar", "use scale="):
        function(a, xp.ones(()))
    with raises(ValueError, "The 'a' of", "at least one axis; got a scalar"):
        function(xp.ones(()), a)
    if xp is np:
        with raises(ValueError, "The 'b' of", "got a scalar (float)"):
            function(a, 3.0)


@BOTH
def test_leading_axes_that_do_not_broadcast(xp, function):
    with raises(
        ValueError,
        f"The leading axes of 'a' and 'b' of {function.__name__} must broadcast together",
        "(2, 3, 4)",
        "(3, 4, 5)",
    ):
        function(xp.ones((2, 3, 4)), xp.ones((3, 4, 5)))


@BOTH
def test_packed_along_the_wrong_axis(xp, function):
    right = xp.ones((4, 4))
    with raises(
        ValueError, "'b' of", "packed along its K axis, axis -2", "axis -1", "axis=-2", ".T"
    ):
        function(right, pack(right))
    with raises(ValueError, "'a' of", "packed along its K axis, axis -1", "along axis -2"):
        function(pack(right, axis=-2), right)


@pytest.mark.parametrize("dtype", ["u1", "u8", "?", "c8", "O", "U3", "M8[s]"])
def test_invalid_result_dtypes(dtype):
    a = np.ones((3, 3))
    with raises(
        TypeError, "'dtype' of xnor_gemm", "real floating or signed", f"got {np.dtype(dtype)}"
    ):
        xnor_gemm(a, a, dtype=dtype)
    with raises(TypeError, "The dtype of 'out' of xnor_gemm must be a real floating or signed"):
        xnor_gemm(a, a, out=np.empty((3, 3), dtype))


@pytest.mark.parametrize(("dtype", "limit"), [("i1", 127), ("i2", 32767)])
def test_integers_too_small_for_k(xp, dtype, limit):
    a = xp.ones((1, limit), xp.int8)
    assert int(xnor_gemm(a, a.T, dtype=dtype)[0, 0]) == limit
    assert int(xnor_gemm(a, -a.T, dtype=dtype)[0, 0]) == -limit
    a = xp.ones((1, limit + 1), xp.int8)
    name = np.dtype(dtype).name
    parts = (
        "must hold every integer from -K to K",
        f"{name} (at most {limit})",
        f"K = {limit + 1}",
    )
    with raises(ValueError, "'dtype' of xnor_gemm", *parts):
        xnor_gemm(a, a.T, dtype=dtype)
    with raises(ValueError, *parts):
        xnor_gemm(pack(a), pack(a).T, out=xp.empty((1, 1), dtype))


@pytest.mark.parametrize(
    ("dtype", "why"),
    [
        (">f4", "must have native byte order on a GPU; got >f4. Use float32."),
        (">i8", "must have native byte order on a GPU; got >i8. Use int64."),
        ("g", f"must have at most 64 bits on a GPU; got {np.dtype('g')}. Use float64."),
    ],
)
def test_result_dtypes_that_a_gpu_has_not(dtype, why):
    with raises(TypeError, "The 'dtype' of xnor_gemm", why):
        check_result_dtype(dtype, 100, False, "xnor_gemm", on_cuda=True)
    assert check_result_dtype(dtype, 100, False, "xnor_gemm") == np.dtype(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [">f4", ">i4", "g"])
def test_result_dtypes_that_a_gpu_has_not_in_every_call(dtype):
    import cupy

    a = cupy.ones((3, 3))
    for call in (
        lambda: xnor_gemm(a, a, dtype=dtype),
        lambda: xnor_gemm(a, a, scale=2, dtype=dtype if dtype != ">i4" else ">f4"),
        lambda: pack(a).unpack(dtype),
    ):
        with raises(TypeError, "on a GPU; got"):
            call()


def test_the_default_integer_is_checked_too():
    """K beyond int32: of repeated elements, for no such matrix fits into memory."""
    a = np.broadcast_to(np.int8(-1), (1, 2**31))
    with raises(ValueError, "int32 (at most 2147483647) for K = 2147483648", "wider integer"):
        xnor_gemm(a, a.T)


def test_wrong_out(xp):
    a, b = xp.ones((3, 4)), xp.ones((4, 5))
    with raises(TypeError, "'out' of xnor_gemm must be a NumPy or CuPy array; got list"):
        xnor_gemm(a, b, out=[[0]])
    with raises(TypeError, f"'out' of xnor_gemm must be a {xp.__name__}.ndarray", "got list"):
        xnor_gemm(a, b, out=[[0]], dtype="f4")
    for shape in ((3, 6), (5, 3), (15,), (1, 3, 5), ()):
        with raises(ValueError, "result's shape, (3, 5); got", str(shape)):
            xnor_gemm(a, b, out=xp.empty(shape))
    with raises(TypeError, "'out'", "the dtype given as 'dtype', int32; got float32", "only one"):
        xnor_gemm(a, b, out=xp.empty((3, 5), "f4"), dtype="i4")


def test_masked_or_read_only_out():
    a = np.ones((3, 3))
    with raises(TypeError, "'out' of xnor_gemm must be a numpy.ndarray", "got numpy.MaskedArray"):
        xnor_gemm(a, a, out=np.ma.zeros((3, 3)))
    out = np.zeros((3, 3))
    out.flags.writeable = False
    with raises(ValueError, "'out' of xnor_gemm must be writable; got a read-only"):
        xnor_gemm(a, a, out=out)
    assert (out == 0).all()


def test_out_that_repeats_elements(xp):
    a = xp.ones((3, 3), xp.float32)
    for shape, strides in (((3, 3), (0, 4)), ((3, 3), (4, 0))):
        base = xp.zeros(9, xp.float32)
        out = xp.lib.stride_tricks.as_strided(base, shape, strides)
        with raises(ValueError, "'out' of xnor_gemm must have separate memory", "x.copy()"):
            xnor_gemm(a, a, out=out)
        assert not base.any()
    one_row = xp.lib.stride_tricks.as_strided(xp.zeros(3, xp.float32), (1, 3), (0, 4))
    assert (xnor_gemm(a[:1], a, out=one_row) == 3).all()


def test_wrong_scale_and_bias(xp):
    a, b = xp.ones((3, 4)), xp.ones((4, 5))
    for scale in (xp.ones(3), xp.ones((3, 5)), xp.ones((5, 1)), xp.ones((2, 1, 5))):
        with raises(ValueError, "'scale' must broadcast to shape", f"got shape {scale.shape}"):
            xnor_gemm(a, b, scale=scale)
    with raises(ValueError, "the 'bias' must broadcast to shape (1, 5)", "got shape (3, 1)"):
        xnor_gemm(a, b, bias=xp.ones((3, 1)))
    with raises(ValueError, "a pair (row, column); got a tuple of length 3"):
        xnor_gemm(a, b, scale=(1, 2, 3))
    with raises(TypeError, "'scale' of xnor_gemm must be real numbers; got dtype complex128"):
        xnor_gemm(a, b, scale=xp.ones(5, "c16"))
    for dtype in ("i4", "i8"):
        with raises(
            TypeError, "'dtype' of xnor_gemm must be a floating type with a scale or a bias"
        ):
            xnor_gemm(a, b, bias=xp.ones(5), dtype=dtype)


def test_invalid_lists_are_reported_with_the_argument(xp):
    a, b = xp.ones((3, 4)), xp.ones((4, 5))
    ragged = [[1, 2], [3]]
    for name in ("scale", "bias"):
        with raises(TypeError, f"The '{name}' of xnor_gemm must be a number", "got list ("):
            xnor_gemm(a, b, **{name: ragged})
    for name in ("threshold", "flip"):
        with raises(TypeError, f"The '{name}' of xnor_gemm_packed must be a number", "got list ("):
            xnor_gemm_packed(a, b, **{name: ragged})


def test_wrong_threshold_and_flip(xp):
    a, b = xp.ones((3, 4)), xp.ones((4, 5))
    with raises(TypeError, "'threshold' of xnor_gemm_packed must be integers; got dtype float"):
        xnor_gemm_packed(a, b, threshold=xp.ones(5))
    with raises(TypeError, "'flip' of xnor_gemm_packed must be bools; got dtype int"):
        xnor_gemm_packed(a, b, flip=xp.ones(5, int))
    for shape in ((4,), (1, 5), (3, 1)):
        with raises(ValueError, "'threshold'", "shape (5,); got shape", str(shape)):
            xnor_gemm_packed(a, b, threshold=xp.ones(shape, int))
    with raises(ValueError, "'b' of xnor_gemm_packed must have at least two axes", "(4,)"):
        xnor_gemm_packed(a, xp.ones(4))
    with raises(ValueError, "'a' of xnor_gemm_packed must be a matrix", "a[None, :]"):
        xnor_gemm_packed(xp.ones(4), xp.ones((2, 4, 5)))


@pytest.mark.skipif(not BFLOAT16, reason="needs ml_dtypes")
def test_numbers_that_only_look_like_bfloat16():
    import ml_dtypes

    a = np.ones((3, 3), ml_dtypes.float8_e4m3fn)
    with raises(TypeError, "got dtype float8_e4m3fn", "x.astype('float32')"):
        xnor_gemm(a, a)


@pytest.mark.gpu
@BOTH
def test_numpy_and_cupy_do_not_mix(function):
    import cupy

    a, b = np.ones((3, 3)), cupy.ones((3, 3))
    parts = ("must both be NumPy or both be CuPy",)
    with raises(TypeError, *parts, "'a' is numpy.ndarray and 'b' is cupy.ndarray"):
        function(a, b)
    with raises(TypeError, *parts, "'a' is a PackedMatrix on cuda:0 and 'b' is numpy.ndarray"):
        function(pack(b), a)
    with raises(TypeError, *parts, "'a' is cupy.ndarray and 'b' is a PackedMatrix on cpu"):
        function(b, pack(a, axis=-2))


@pytest.mark.gpu
def test_other_arguments_do_not_mix_either():
    import cupy

    a, b = np.ones((3, 3)), cupy.ones((3, 3))
    with raises(TypeError, "'out' of xnor_gemm must be a cupy.ndarray", "got numpy.ndarray"):
        xnor_gemm(b, b, out=a)
    with raises(TypeError, "'out' of xnor_gemm must be a numpy.ndarray", "got cupy.ndarray"):
        xnor_gemm(a, a, out=b)
    with raises(TypeError, "'scale' of xnor_gemm must be on the operands' device, cuda:0"):
        xnor_gemm(b, b, scale=np.ones(3))
    with raises(TypeError, "'bias' of xnor_gemm must be on the operands' device, cpu"):
        xnor_gemm(a, a, bias=cupy.ones(3))
    with raises(TypeError, "'threshold' of xnor_gemm_packed must be on the operands' device"):
        xnor_gemm_packed(b, b, threshold=np.ones(3, int))


@pytest.mark.gpu
@BOTH
def test_a_foreign_device(function):
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two CUDA devices")
    here = cupy.ones((3, 3))
    with cupy.cuda.Device(1):
        there = cupy.ones((3, 3))
    with raises(ValueError, "must be on one device; 'a' is on cuda:0 and 'b' is on cuda:1"):
        function(here, there)
    with raises(ValueError, "must be on the current device, cuda:0; got cuda:1"):
        function(there, there)
    with raises(ValueError, "'out' of xnor_gemm must be on the operands' device, cuda:0"):
        xnor_gemm(here, here, out=there)


@pytest.mark.parametrize(
    "dtype", ["junk", 3, "f4,,", [1], {"a": 1}, {1}, np.array(1), 4.5, object(), "float8"]
)
def test_not_a_dtype(dtype):
    a = np.ones((2, 2))
    for call, what in (
        (lambda: xnor_gemm(a, a, dtype=dtype), "'dtype' of xnor_gemm"),
        (lambda: xnor_gemm(a, a, bias=np.ones(2), dtype=dtype), "'dtype' of xnor_gemm"),
        (lambda: pack(a).unpack(dtype), "'dtype' of unpack"),
    ):
        with raises(TypeError, f"The {what} must be a NumPy dtype; got {dtype!r}."):
            call()


@pytest.mark.parametrize("dtype", [[("a", "f4")], {"names": ["a"], "formats": ["f4"]}])
def test_dtype_with_fields(dtype):
    a = np.ones((2, 2))
    with raises(TypeError, "'dtype' of xnor_gemm must be a real floating", "got [('a', '<f4')]."):
        xnor_gemm(a, a, dtype=dtype)


def test_reason_of_a_dtype_is_given_only_where_it_is_one():
    a = np.ones((2, 2))
    what = "The 'dtype' of xnor_gemm must be a real floating or signed integer type"
    for dtype in (bool, "u1"):
        with raises(TypeError, f"{what}, because the product has negative values; got"):
            xnor_gemm(a, a, dtype=dtype)
    for dtype in (complex, "S3", "M8[s]", object):
        with raises(TypeError, f"{what}; got {np.dtype(dtype)}."):
            xnor_gemm(a, a, dtype=dtype)


class Sparse:
    def toarray(self):
        return np.ones((2, 2))


@BOTH
@pytest.mark.parametrize(
    ("x", "hint"),
    [
        (None, "got dtype object from NoneType. Pass a numeric array."),
        ({1: 2.0}, "got dtype object from dict. Pass a numeric array."),
        ({1.0}, "got dtype object from set. Pass a numeric array."),
        ([1.0, None], "got dtype object from list. Its elements must all be numbers."),
        (Sparse(), "Sparse. Convert it to an array: x.toarray()."),
    ],
)
def test_hint_fits_what_came(function, x, hint):
    with raises(TypeError, "The 'a' of", hint):
        function(x, np.ones((2, 2)))
