"""Bytes of numpy.packbits, and data that only looks as if it had signs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from gemm_cases import host

from cupybnn import PackedMatrix, pack, sign, xnor_gemm, xnor_gemm_packed

pytestmark = pytest.mark.cpu_kernels


@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("k", [0, 1, 7, 8, 9, 63, 64, 65, 130, 1025])
def test_bytes_are_those_of_packbits(xp, k, bitorder):
    rng = np.random.default_rng(k)
    for shape, axis in (
        ((k,), -1), ((5, k), -1), ((5, k), 1), ((k, 5), -2), ((k, 5), 0), ((2, 3, k), -1),
        ((2, k, 3), -2), ((0, k), -1),
    ):  # fmt: skip
        bits = rng.integers(0, 2, shape).astype(bool)
        octets = np.packbits(bits, axis=axis, bitorder=bitorder)
        p = PackedMatrix.from_packbits(xp.asarray(octets), k, axis=axis, bitorder=bitorder)
        assert p.axis == axis - (len(shape) if axis >= 0 else 0)
        assert p.shape == shape
        np.testing.assert_array_equal(host(p.unpack(bool)), bits)
        direct = pack(xp.asarray(bits), axis=axis)
        assert p == direct
        np.testing.assert_array_equal(host(p.popcounts), host(direct.popcounts))
        for q in (p, direct):
            back = q.to_packbits(bitorder=bitorder)
            assert isinstance(back, xp.ndarray)
            assert (back.dtype, back.shape) == (np.uint8, octets.shape)
            np.testing.assert_array_equal(host(back), octets)


def test_bits_beyond_the_end_do_not_count(xp):
    octets = xp.full((3, 2), 255, xp.uint8)
    for bitorder in ("big", "little"):
        p = PackedMatrix.from_packbits(octets, 11, bitorder=bitorder)
        assert p == pack(xp.ones((3, 11)))
        assert host(p.popcounts).tolist() == [11, 11, 11]
    assert (octets == 255).all()


def test_bytes_of_a_packed_matrix_are_a_copy(xp):
    p = pack(xp.ones((3, 64)))
    octets = p.to_packbits("little")
    octets[...] = 0
    assert p == pack(xp.ones((3, 64)))
    strided = xp.full((3, 32), 255, xp.uint8)[:, ::4]
    assert PackedMatrix.from_packbits(strided, 64) == p
    strided[...] = 0
    assert p == pack(xp.ones((3, 64)))


def test_hamming_distance_of_packed_bytes():
    """What people come with: codes of np.packbits, and distances between them."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (20, 96), np.uint8)
    p = PackedMatrix.from_packbits(np.packbits(bits, axis=1), 96)
    distances = (96 - p @ p.T) // 2
    np.testing.assert_array_equal(distances, (bits[:, None] != bits).sum(-1))


@pytest.mark.parametrize(
    ("octets", "arguments", "kind", "why"),
    [
        (
            np.zeros((3, 2), "i1"),
            {"k": 16},
            TypeError,
            "dtype uint8, as from numpy.packbits.*got int8",
        ),
        (np.zeros((3, 2), bool), {"k": 16}, TypeError, "got bool"),
        (np.zeros((3, 2), "u1"), {"k": 17}, ValueError, "3 for k = 17; got shape"),
        (np.zeros((3, 2), "u1"), {"k": 8}, ValueError, "1 for k = 8"),
        (np.zeros((3, 2), "u1"), {"k": -1}, TypeError, "got -1"),
        (np.zeros((3, 2), "u1"), {"k": 16.0}, TypeError, "got 16.0"),
        (np.zeros((3, 2), "u1"), {"k": True}, TypeError, "got True"),
        (
            np.uint8(3),
            {"k": 8},
            ValueError,
            "'octets' of from_packbits must have at least one axis",
        ),
        (np.zeros((3, 2), "u1"), {"k": 16, "axis": 2}, ValueError, "must be an axis of 'octets'"),
        (np.zeros((2, 3, 2), "u1"), {"k": 16, "axis": 0}, ValueError, "one of the last two axes"),
        (np.zeros((3, 2), "u1"), {"k": 16, "bitorder": "up"}, ValueError, "'big'.*got 'up'"),
        (np.zeros((3, 2), "u1"), {"k": 16, "bitorder": None}, ValueError, "got None"),
    ],
)
def test_what_is_not_taken_for_bytes(octets, arguments, kind, why):
    with pytest.raises(kind, match=why):
        PackedMatrix.from_packbits(octets, **arguments)


def test_wrong_bit_order_of_to_packbits():
    with pytest.raises(ValueError, match="'bitorder' of to_packbits must be"):
        pack(np.ones(3)).to_packbits("middle")


def test_unsigned_data_is_distinguished():
    for function in (pack, sign, lambda x: xnor_gemm(x, x)):
        with pytest.raises(
            TypeError, match=r"0 and 1, pass x\.astype\(bool\).*from_packbits\(x, k"
        ):
            function(np.zeros((3, 3), np.uint8))
        with pytest.raises(TypeError, match=r"0 and 1, pass x\.astype\(bool\)") as error:
            function(np.zeros((3, 3), np.uint16))
        assert "packbits" not in str(error.value)


CALLS = {
    "'a' of xnor_gemm": lambda x: xnor_gemm(x, np.full((x.shape[-1], 2), -3.0)),
    "'b' of xnor_gemm": lambda x: xnor_gemm(np.full((2, x.shape[0]), -3.0), x, bias=1),
    "'a' of xnor_gemm_packed": lambda x: xnor_gemm_packed(x, np.full((x.shape[-1], 2), -3.0)),
    "'b' of xnor_gemm_packed": lambda x: xnor_gemm_packed(
        np.full((2, x.shape[0]), -3.0), x, threshold=1
    ),
    "'x' of pack": pack,
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("dtype", ["i1", "i8", "f4", "f8", "f2"])
def test_zeros_and_ones_are_warned_of(what, dtype):
    x = np.random.default_rng(0).integers(0, 2, (300, 200)).astype(dtype)
    for given in (x, x.T, np.asfortranarray(x), x[::2, ::-1], x[:3, :4]):
        with pytest.warns(UserWarning, match=f"The {what} holds only 0 and 1") as caught:
            CALLS[what](given)
        assert len(caught) == 1
        assert caught[0].filename == __file__  # the caller's own line


@pytest.mark.parametrize("what", CALLS)
def test_other_data_is_not_warned_of(what):
    bits = np.random.default_rng(0).integers(0, 2, (300, 200))
    late = bits.astype("f4")
    late[-1, -1] = 0.5
    negative = bits.astype("i1")
    negative[150, 3] = -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (
            2 * bits - 1, bits.astype(bool), np.ones((9, 9)), np.zeros((9, 9), "i1"), late,
            negative, np.full((3, 3), np.nan), np.zeros((0, 3)), np.ones((1, 1)),
        ):  # fmt: skip
            CALLS[what](x)


@pytest.mark.gpu
def test_a_gpu_array_is_not_looked_at():
    import cupy

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack(cupy.eye(4, dtype=cupy.int8))
        xnor_gemm(cupy.eye(4), cupy.eye(4))
