"""Packed matrices of several bits, and their products with signs, exactly."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from arrays import host

import cupybnn
from cupybnn import PackedMatrix, concatenate, pack, xnor_gemm, xnor_gemm_packed

SOME = [(2, True), (3, False), (4, True), (8, True), (8, False), (1, False)]
FEW = [(4, True), (8, False)]  # for tests that compile a kernel for each kind of result


def values_of(bits: int, signed: bool) -> np.ndarray:
    """All levels, from the least on, by their definition."""
    return np.arange(1 - 2**bits, 2**bits, 2) if signed else np.arange(2**bits)


def nearest(x: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """The nearest level: the one after all midpoints that x has reached. NaN reaches none."""
    levels = values_of(bits, signed)
    middles = (levels[:-1] + levels[1:]) / 2
    return levels[(x.astype(np.float64)[..., None] >= middles).sum(axis=-1)]


def numbers(shape: tuple[int, ...], bits: int, signed: bool, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.choice(values_of(bits, signed), shape).astype(np.int16)


def signs(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.where(np.random.default_rng(seed).random(shape) < 0.5, -1, 1).astype(np.int8)


@pytest.mark.parametrize(("bits", "signed"), SOME)
class TestLevels:
    def test_numbers_become_the_nearest_level(self, xp, bits, signed):
        halves = np.arange(-600, 601) / 2
        beside = [np.nextafter(np.float32(h), s) for h in halves for s in (-np.inf, np.inf)]
        odd = [np.nan, np.inf, -np.inf, -0.0, 1e-45, -1e-45, 3e38, -3e38]
        x = np.concatenate([halves, beside, odd]).astype(np.float32)
        got = host(pack(xp.asarray(x), bits=bits, signed=signed).unpack())
        np.testing.assert_array_equal(got, nearest(x, bits, signed))

    @pytest.mark.parametrize("dtype", ["f2", "f8", "i1", "i2", "i4", "i8", "u1", "u8", "?"])
    def test_of_every_dtype(self, xp, bits, signed, dtype):
        if (bits, signed) not in FEW and xp is not np:
            pytest.skip("a kernel for each: a few are enough")
        kind = np.dtype(dtype).kind
        if kind == "u" and signed:
            pytest.skip("unsigned integers have no sign")
        numbers = range(-260 if kind in "if" else 0, 260)
        if kind in "iu":
            least, most = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
            numbers = [*(n for n in numbers if least <= n <= most), least, most]
        x = np.array([*numbers], dtype)
        got = host(pack(xp.asarray(x), bits=bits, signed=signed).unpack())
        wanted = np.where(x, 1, -1 if signed else 0) if kind == "b" else x
        np.testing.assert_array_equal(got, nearest(wanted, bits, signed))

    def test_dtypes_of_elements(self, xp, bits, signed):
        p = pack(xp.asarray(values_of(bits, signed)), bits=bits, signed=signed)
        assert p.unpack().dtype == p.dtype
        most = {True: {8: "int16"}.get(bits, "int8"), False: "uint8"}[signed]
        assert p.dtype == most
        for dtype in ("float16", "float32", "int32"):
            got = p.unpack(dtype)
            assert got.dtype == dtype
            np.testing.assert_array_equal(host(got), values_of(bits, signed))


@pytest.mark.parametrize(("bits", "signed"), SOME)
class TestPackedMatrix:
    def matrix(self, xp, bits, signed, shape=(5, 70), axis=-1) -> tuple[np.ndarray, PackedMatrix]:
        x = numbers(shape, bits, signed)
        return x, pack(xp.asarray(x), axis, bits, signed)

    @pytest.mark.parametrize("axis", [-1, -2])
    @pytest.mark.parametrize("shape", [(70,), (5, 70), (33, 1030), (2, 3, 129), (3, 0), (0, 3)])
    def test_unpacks_to_what_was_packed(self, xp, bits, signed, shape, axis):
        if len(shape) == 1 and axis == -2:
            pytest.skip("a vector has one axis")
        x, p = self.matrix(xp, bits, signed, shape, axis)
        np.testing.assert_array_equal(host(p.unpack(np.int64)), x)
        assert (p.bits, p.signed, p.shape) == (bits, signed, shape)
        low = values_of(bits, signed)[0]
        sums = ((x.astype(int) - low) // (2 if signed else 1)).sum(axis)
        np.testing.assert_array_equal(host(p.popcounts), sums.reshape(p.popcounts.shape))

    def test_travels(self, xp, bits, signed, tmp_path):
        _, p = self.matrix(xp, bits, signed)
        p.save(tmp_path / "p.npz")
        assert PackedMatrix.load(tmp_path / "p.npz") == p
        assert pickle.loads(pickle.dumps(p)) == p
        assert copy.deepcopy(p) == p == p.to_numpy()
        q = pickle.loads(pickle.dumps(p.to_numpy()))
        np.testing.assert_array_equal(q.popcounts, host(p.popcounts))
        assert repr(p).startswith("PackedMatrix(shape=(5, 70), axis=-1, ")
        assert f"{bits}{'' if signed else ' unsigned'} bit" in repr(p)

    def test_lines(self, xp, bits, signed):
        x, p = self.matrix(xp, bits, signed)
        np.testing.assert_array_equal(host(p[1:4].unpack(int)), x[1:4])
        np.testing.assert_array_equal(host(p[2].unpack(int)), x[2])
        np.testing.assert_array_equal(host(p.T[:, [0, 3]].unpack(int)), x.T[:, [0, 3]])
        assert [len(row.shape) for row in p] == [1] * 5
        for axis in (0, 1):
            both = concatenate([p, p[:, :] if axis else p[:2]], axis=axis)
            expected = np.concatenate([x, x if axis else x[:2]], axis=axis)
            np.testing.assert_array_equal(host(both.unpack(int)), expected)
            assert both.levels is p.levels

    def test_equality(self, xp, bits, signed):
        x, p = self.matrix(xp, bits, signed)
        assert p == pack(xp.asarray(x), -2, bits, signed)
        assert p != pack(xp.asarray(x), -1, 5, True)
        x[3, 4] = values_of(bits, signed)[0 if x[3, 4] > 0 else -1]
        assert p != pack(xp.asarray(x), -1, bits, signed)

    def test_what_has_no_meaning_is_refused(self, xp, bits, signed):
        _, p = self.matrix(xp, bits, signed)
        with pytest.raises(ValueError, match="Only a PackedMatrix of signs"):
            p.to_packbits()
        with pytest.raises(ValueError, match="elements of the same bits"):
            concatenate([p, pack(xp.ones((5, 70)))])
        if bits > 1:
            with pytest.raises(TypeError, match="got bool"):
                p.unpack(bool)
        if bits == 8:
            with pytest.raises(TypeError, match="hold levels up to 255"):
                p.unpack("int8")


@pytest.mark.cpu_kernels
class TestProducts:
    @pytest.mark.parametrize(("bits", "signed"), SOME)
    @pytest.mark.parametrize(
        ("m", "k", "n"), [(1, 1, 1), (5, 100, 7), (33, 1025, 130), (130, 64, 2), (3, 0, 4)]
    )
    def test_on_either_side(self, xp, bits, signed, m, k, n):
        x, w = numbers((m, k), bits, signed), signs((k, n))
        a, b = pack(xp.asarray(x), -1, bits, signed), pack(xp.asarray(w), -2)
        expected = x.astype(np.int64) @ w
        got = xnor_gemm(a, b)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(host(got), expected)
        np.testing.assert_array_equal(host(xnor_gemm(b.T, a.T)), expected.T)
        np.testing.assert_array_equal(host(xnor_gemm(xp.asarray(w).T, a.T, dtype="i8")), expected.T)

    def test_of_the_greatest_levels(self, xp):
        x, w = np.full((20, 9000), 255), np.ones((9000, 17), np.int8)
        for low, signed in ((-255, True), (0, False)):
            for value in (255, low):
                p = pack(xp.asarray(np.full_like(x, value)), bits=8, signed=signed)
                for sign in (1, -1):
                    got = host(p @ pack(xp.asarray(sign * w), axis=-2))
                    assert (got == value * sign * 9000).all()

    @pytest.mark.parametrize(("bits", "signed"), FEW)
    def test_vectors_batches_and_broadcasting(self, xp, bits, signed):
        x, w = numbers((2, 3, 5, 70), bits, signed), signs((3, 70, 4))
        a, b = pack(xp.asarray(x), -1, bits, signed), pack(xp.asarray(w), -2)
        np.testing.assert_array_equal(host(xnor_gemm(a, b)), x.astype(int) @ w)
        row, column = pack(xp.asarray(x[0, 0, 0]), -1, bits, signed), xp.asarray(w[0, :, 0])
        assert int(xnor_gemm(row, pack(column))) == x[0, 0, 0].astype(int) @ w[0, :, 0]
        one = pack(xp.asarray(x[0, 0]), -1, bits, signed)
        np.testing.assert_array_equal(host(xnor_gemm(one, b)), x[0, 0].astype(int) @ w)

    @pytest.mark.parametrize(("bits", "signed"), FEW)
    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64"])
    def test_results(self, xp, bits, signed, dtype):
        x, w = numbers((35, 300), bits, signed), signs((300, 66))
        a, b = pack(xp.asarray(x), -1, bits, signed), pack(xp.asarray(w), -2)
        exact = x.astype(np.int64) @ w
        got = xnor_gemm(a, b, dtype=dtype)
        assert got.dtype == dtype
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(host(got), exact.astype(dtype))
        out = xp.zeros((35, 132), dtype)[:, ::2]
        assert xnor_gemm(a, b, out=out) is out
        np.testing.assert_array_equal(host(out), host(got))
        if dtype == "int64":
            return
        row, col, bias = (
            np.random.default_rng(i).normal(size=s).astype("f4")
            for i, s in enumerate([(35, 1), (66,), (66,)])
        )
        wide = np.float64 if dtype == "float64" else np.float32
        expected = (exact.astype(wide) * row.astype(wide)) * col.astype(wide) + bias.astype(wide)
        scaled = xnor_gemm(
            a, b, scale=(xp.asarray(row), xp.asarray(col)), bias=xp.asarray(bias), dtype=dtype
        )
        np.testing.assert_array_equal(host(scaled), expected.astype(dtype))

    @pytest.mark.parametrize(("bits", "signed"), FEW)
    def test_packed_results(self, xp, bits, signed):
        x, w = numbers((35, 1100), bits, signed), signs((1100, 70))
        a, b = pack(xp.asarray(x), -1, bits, signed), pack(xp.asarray(w), -2)
        exact = x.astype(np.int64) @ w
        rng = np.random.default_rng(0)
        threshold = rng.integers(-500, 500, 70)
        threshold[:4] = [*exact[0, :3].tolist(), 2**31 - 1]
        flip = rng.random(70) < 0.5
        got = xnor_gemm_packed(a, b, threshold=xp.asarray(threshold), flip=xp.asarray(flip))
        np.testing.assert_array_equal(host(got.unpack(bool)), (exact >= threshold) != flip)
        np.testing.assert_array_equal(host(xnor_gemm_packed(a, b).unpack(bool)), exact >= 0)

    def test_a_floating_operand_gives_a_floating_result(self, xp):
        p = pack(xp.asarray(numbers((3, 70), 4, True)), bits=4)
        assert xnor_gemm(p, xp.ones((70, 2), "f4")).dtype == np.float32
        assert xnor_gemm(p, xp.ones((70, 2), "f8")).dtype == np.float64

    def test_one_bit_is_what_it_was(self, xp):
        x = xp.asarray(np.random.default_rng(0).normal(size=(5, 70)))
        assert pack(x, bits=1).levels is cupybnn.pack(x).levels
        np.testing.assert_array_equal(host(pack(x, bits=1).unpack()), host(cupybnn.sign(x)))


class TestErrors:
    def test_two_operands_of_levels(self, xp):
        p = pack(xp.asarray(numbers((3, 70), 4, True)), bits=4)
        with pytest.raises(ValueError, match="One operand of xnor_gemm must be one of signs"):
            xnor_gemm(p, pack(xp.asarray(numbers((70, 3), 2, False)), -2, 2, False))

    def test_an_integer_dtype_that_is_too_small(self, xp):
        p = pack(xp.asarray(numbers((3, 3000), 4, True)), bits=4)
        with pytest.raises(ValueError, match="from -15·K to 15·K; got int16"):
            xnor_gemm(p, xp.ones((3000, 2), "i1"), dtype="int16")

    def test_sums_beyond_int32(self, xp):
        wide = xp.lib.stride_tricks.as_strided(xp.ones(1, "i1"), (2, 2**31 // 255 + 1), (0, 0))
        with pytest.raises(ValueError, match="at most 8421504 elements along its packed"):
            pack(wide, bits=8)

    @pytest.mark.parametrize("bits", [0, 9, -1])
    def test_bits_out_of_range(self, xp, bits):
        with pytest.raises(ValueError, match=f"'bits' of pack must be from 1 to 8; got {bits}"):
            pack(xp.ones((2, 2)), bits=bits)

    def test_arguments_of_another_type(self, xp):
        for bits in (1.5, True, "2"):
            with pytest.raises(TypeError, match="'bits' of pack must be an integer"):
                pack(xp.ones((2, 2)), bits=bits)
        with pytest.raises(TypeError, match="'signed' of pack must be a bool; got 1"):
            pack(xp.ones((2, 2)), bits=2, signed=1)
        with pytest.raises(TypeError, match="Pass signed=False for the levels 0 to 15"):
            pack(xp.ones((2, 2), np.uint8), bits=4)
        with pytest.raises(TypeError, match="complex"):
            pack(xp.ones((2, 2), complex), bits=4, signed=False)


class TestFiles:
    def save(self, tmp_path, **changes) -> str:
        path = tmp_path / "p.npz"
        pack(numbers((5, 70), 4, True), bits=4).save(path)
        with np.load(path) as file:
            entries = {**file, **changes}
        np.savez(path, **{name: value for name, value in entries.items() if value is not None})
        return str(path)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"levels": np.array([9, 1])}, "9 bits, not 1 to 8"),
            ({"levels": np.array([4, 2])}, "entry 'levels'"),
            ({"levels": np.array([1, 1])}, "entry 'levels'"),
            ({"levels": None}, "entry 'levels'"),
            ({"levels": np.array([3, 1])}, "needs uint64 words of shape"),
            ({"levels": np.array([4, 0])}, "do not match its checksum"),
            ({"words": np.full((5, 8), 2**63, np.uint64)}, "past the end of a line"),
            ({"version": np.array(3)}, "reads versions 1 and 2"),
        ],
    )
    def test_damaged(self, tmp_path, changes, words):
        with pytest.raises(ValueError, match=words):
            PackedMatrix.load(self.save(tmp_path, **changes))

    def test_signs_are_written_as_before(self, tmp_path):
        pack(np.ones((2, 3))).save(tmp_path / "p.npz")
        with np.load(tmp_path / "p.npz") as file:
            assert file["version"] == 1
            assert "levels" not in file
