"""Quantized gradients: the formula by itself, CUDA bit for bit, and products with them."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import host

from cupybnn import nn, ops
from cupybnn.autograd import Tensor
from cupybnn.backends.random import from_row, random_words
from cupybnn.ops.gradient_levels import greatest_of_batch


def gradient(shape=(37, 50), seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    g = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 3, shape)
    return g.astype(np.float32)


def expected(g: np.ndarray, bits: int, seed: int, counter: int, axis: int, first: int = 0):
    """Levels and scales by the documented formula, element by element, in float32."""
    f, tiny = np.float32, np.finfo(np.float32).tiny
    g = np.where(abs(g) < tiny, f(0), g)  # denormal numbers count as 0
    n = f(2**bits - 1)
    rows, cols = g.shape
    words = random_words((-(-rows // 8), cols, 4), seed, counter, np)
    if first:
        whole = random_words((first + -(-rows // 8), cols, 4), seed, counter, np)
        words = whole[first:]
    scale = np.zeros(g.shape[1 - axis if axis else 1], f)
    levels = np.zeros(g.shape, int)
    for line in range(len(scale)):
        at = (slice(None), line) if axis == 0 else (line, slice(None))
        most = f(max(abs(v) for v in g[at]))
        with np.errstate(all="ignore"):
            scale[line] = most / n
            inverse = f(n / f(2)) / most
        scale[line] = scale[line] if scale[line] >= tiny else 0
        inverse = inverse if tiny <= inverse < np.inf else f(0)
        for i, v in enumerate(g[at]):
            r, c = (i, line) if axis == 0 else (line, i)
            word = int(words[r // 8, c, r % 8 // 2])
            half = word >> 16 if r % 2 else word & 0xFFFF
            u = np.floor(f(f(v * inverse) + f(n / f(2) + f(half / 65536))))
            levels[r, c] = 2 * int(min(max(u, 0), n)) - int(n)
    return levels, scale


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
class TestFormula:
    @pytest.mark.parametrize("shape", [(1, 1), (37, 50), (8, 130), (129, 3)])
    def test_of_rows_and_columns(self, xp, bits, shape):
        g = gradient(shape)
        got = ops.quantize_gradient(xp.asarray(g), bits, 12345678901, 7)
        levels, scale = expected(g, bits, 12345678901, 7, axis=1)
        np.testing.assert_array_equal(host(got.rows.unpack(int)), levels)
        np.testing.assert_array_equal(host(got.row_scale)[:, 0], scale)
        levels, scale = expected(g, bits, 12345678901, 7, axis=0)
        np.testing.assert_array_equal(host(got.columns.unpack(int)), levels)
        np.testing.assert_array_equal(host(got.column_scale), scale)
        assert got.rows.axis == -1
        assert got.columns.axis == -2

    def test_odd_values(self, xp, bits):
        g = gradient((20, 9))
        g[0] = 0
        g[1, 2] = 1e-45  # the only one of its row: the inverse is infinite
        g[1, :2], g[1, 3:] = 0, -0.0
        g[2, 3] = np.nan
        g[3, 4] = -np.inf
        g[4, 5], g[5, 6], g[6, 7] = 3e38, 3e-38, -1e-38
        got = ops.quantize_gradient(xp.asarray(g), bits, 1, 2)
        rows, columns = host(got.row_scale)[:, 0], host(got.column_scale)
        assert np.isnan(rows).nonzero()[0].tolist() == [2]
        assert np.isnan(columns).nonzero()[0].tolist() == [3]
        assert np.isinf(rows).nonzero()[0].tolist() == [3]
        assert np.isinf(columns).nonzero()[0].tolist() == [4]
        assert rows[0] == 0
        fine = [r for r in range(20) if r not in (2, 3)]
        levels, scale = expected(np.where(np.isfinite(g), g, 0), bits, 1, 2, axis=1)
        np.testing.assert_array_equal(host(got.rows.unpack(int))[fine], levels[fine])
        np.testing.assert_array_equal(rows[fine], scale[fine])

    def test_expectation_is_the_gradient(self, xp, bits):
        g = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
        quantizer, draws = ops.GradientQuantizer(bits, seed=3), 600
        sums = np.zeros((2, *g.shape))
        for _ in range(draws):
            got = quantizer(xp.asarray(g))
            sums[0] += host(got.rows.unpack(np.float32) * got.row_scale)
            sums[1] += host(got.columns.unpack(np.float32) * got.column_scale)
        # A level is less than a step, 2 scale, away: the mean of all deviates by far less.
        step = 2 * np.array([host(got.row_scale).max(), host(got.column_scale).max()])
        assert (np.abs(sums / draws - g).max(axis=(1, 2)) < 0.1 * step + 1e-6).all()

    def test_the_greatest_is_exact(self, xp, bits):
        g = gradient((40, 60))
        got = ops.quantize_gradient(xp.asarray(g), bits, 5, 0)
        most = np.abs(g).argmax(axis=1)
        at = np.arange(40), most
        levels = host(got.rows.unpack(int))[at]
        np.testing.assert_array_equal(levels, np.sign(g[at]) * (2**bits - 1))

    @pytest.mark.parametrize("first", [16, 1, 6, 13])
    def test_a_part_of_a_batch_is_rounded_as_in_the_whole(self, xp, bits, first):
        g = gradient((140, 11))
        whole = ops.quantize_gradient(xp.asarray(g), bits, 9, 4)
        seen = []

        def greatest(mine):  # a GPU compares the bits of magnitudes
            seen.append(host(mine).view(np.float32))
            return xp.asarray(np.abs(g).max(axis=0).view(host(mine).dtype))

        with from_row(first), greatest_of_batch(greatest):
            part = ops.quantize_gradient(xp.asarray(g[first:]), bits, 9, 4)
        np.testing.assert_array_equal(seen, [np.abs(g[first:]).max(axis=0)])
        for mine, all_ in ((part.rows, whole.rows), (part.columns, whole.columns)):
            np.testing.assert_array_equal(host(mine.unpack(int)), host(all_.unpack(int))[first:])
        np.testing.assert_array_equal(host(part.row_scale), host(whole.row_scale)[first:])
        np.testing.assert_array_equal(host(part.column_scale), host(whole.column_scale))

    @pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
    def test_of_nothing(self, xp, bits, shape):
        got = ops.quantize_gradient(xp.zeros(shape, "f4"), bits, 0, 0)
        assert got.rows.unpack().shape == got.columns.unpack().shape == shape
        assert not host(got.row_scale).any()

    def test_the_columns_stand_apart_from_the_order_of_memory(self, xp, bits):
        g = gradient((30, 20))
        a = ops.quantize_gradient(xp.asarray(g), bits, 1, 1)
        b = ops.quantize_gradient(xp.asarray(np.asfortranarray(g)), bits, 1, 1)
        assert a.rows == b.rows
        assert a.columns == b.columns


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(300, 1100), (1025, 257), (64, 4104)])
def test_cuda_has_the_same_bits(bits, shape):
    import cupy

    g = gradient(shape)
    a = ops.quantize_gradient(g, bits, 2**63 + 5, 2**40)
    b = ops.quantize_gradient(cupy.asarray(g), bits, 2**63 + 5, 2**40)
    assert a.rows == b.rows.to_numpy()
    assert a.columns == b.columns.to_numpy()
    for mine, theirs in ((a.rows, b.rows), (a.columns, b.columns)):
        np.testing.assert_array_equal(mine.popcounts, theirs.popcounts.get())
    np.testing.assert_array_equal(a.row_scale, b.row_scale.get())
    np.testing.assert_array_equal(a.column_scale, b.column_scale.get())


@pytest.mark.gpu
@pytest.mark.parametrize(("lines", "k"), [(1, 1), (45, 300), (1056, 700), (2048, 1025)])
def test_turned_signs(lines, k):
    import cupy

    from cupybnn import pack
    from cupybnn.backends.cuda.planes import TurnedSigns

    x = cupy.asarray(np.random.default_rng(0).normal(size=(lines, k)))
    turned = TurnedSigns.of(lines, k)
    for values in (x, -x):  # the second time over the first
        turned.launch(pack(values).words, lines)
        wanted = pack(values, axis=-2)
        assert bool((turned.words == wanted.words).all())
        assert bool((turned.popcounts == wanted.popcounts).all())


class TestProducts:
    def layer(self, xp, bits, bias=False) -> nn.BinaryLinear:
        layer = nn.BinaryLinear(70, 33, bias, grad_bits=bits, rng=0)
        return layer.to("cpu" if xp is np else "cuda")

    def signs(self, xp, shape) -> Tensor:
        x = np.where(np.random.default_rng(1).random(shape) < 0.5, -1, 1).astype(np.float32)
        x = Tensor(xp.asarray(x), requires_grad=True)
        x.two_valued = True
        return x

    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    @pytest.mark.parametrize("lead", [(24,), (2, 3, 4)])
    def test_gradients_are_products_of_levels(self, xp, bits, lead):
        layer = self.layer(xp, bits, bias=True)
        x, grad = self.signs(xp, (*lead, 70)), gradient((*lead, 33))
        state = layer.rounding.quantizer.random.state.copy()
        layer(x).backward(xp.asarray(grad))
        flat = grad.reshape(-1, 33)
        levels = ops.quantize_gradient(flat, bits, int(state[0]), int(state[1]))
        weight, inputs = np.sign(host(layer.weight.data)), host(x.data).reshape(-1, 70)
        f = np.float32
        by_row = (levels.rows.unpack(np.int64) @ weight.T.astype(np.int64)).astype(f)
        np.testing.assert_array_equal(host(x.grad).reshape(-1, 70), by_row * levels.row_scale)
        by_column = (inputs.T.astype(np.int64) @ levels.columns.unpack(np.int64)).astype(f)
        np.testing.assert_array_equal(host(layer.weight.grad), by_column * levels.column_scale)
        # The bias gets the gradient itself.
        np.testing.assert_allclose(host(layer.bias.grad), flat.sum(axis=0), rtol=1e-4)

    def test_each_backward_pass_draws_anew(self, xp):
        layer = self.layer(xp, 2)
        x, grad = self.signs(xp, (24, 70)), xp.asarray(gradient((24, 33)))
        found = []
        for _ in range(2):
            layer.zero_grad()
            layer(x).backward(grad)
            found.append(host(layer.weight.grad))
        assert (found[0] != found[1]).any()
        state = layer.state_dict()
        assert int(state["rounding.random_state"][1]) == 2
        again = self.layer(xp, 2)
        again.load_state_dict(state)
        for each in (layer, again):
            each.zero_grad()
            each(x).backward(grad)
        np.testing.assert_array_equal(host(again.weight.grad), host(layer.weight.grad))

    def test_images_of_several_rows_draw_by_their_place(self, xp):
        x, grad = self.signs(xp, (5, 3, 70)), gradient((5, 3, 33))
        whole, part = (self.layer(xp, 2) for _ in range(2))
        whole(x).backward(xp.asarray(grad))
        rest = Tensor(x.data[2:], requires_grad=True)
        rest.two_valued = True
        with from_row(2):
            part(rest).backward(xp.asarray(grad[2:]))
        np.testing.assert_array_equal(host(rest.grad), host(x.grad)[2:])

    def test_dense_products_give_the_same(self, xp):
        pair = [self.layer(xp, 4) for _ in range(2)]
        pair[1].xnor = False
        x, grad = self.signs(xp, (24, 70)), xp.asarray(gradient((24, 33)))
        for each in pair:
            each(x).backward(grad)
        np.testing.assert_array_equal(host(pair[0].weight.grad), host(pair[1].weight.grad))

    def test_weights_are_those_of_a_layer_without_rounding(self):
        rounded, plain = (nn.BinaryLinear(7, 5, grad_bits=bits, rng=3) for bits in (4, None))
        np.testing.assert_array_equal(rounded.weight.data, plain.weight.data)
        assert plain.rounding is None


class TestErrors:
    def test_of_quantize_gradient(self):
        with pytest.raises(TypeError, match="must be an array of real floating numbers; got int"):
            ops.quantize_gradient(np.ones((2, 2), int).tolist()[0][0], 4, 0, 0)
        with pytest.raises(TypeError, match="got dtype int64"):
            ops.quantize_gradient(np.ones((2, 2), np.int64), 4, 0, 0)
        with pytest.raises(ValueError, match=r"must be a matrix; got shape \(3,\)"):
            ops.quantize_gradient(np.ones(3), 4, 0, 0)
        with pytest.raises(ValueError, match="from 1 to 8; got 9"):
            ops.quantize_gradient(np.ones((2, 2)), 9, 0, 0)
        with pytest.raises(TypeError, match="'bits' of GradientQuantizer must be an integer"):
            ops.GradientQuantizer(2.5)

    def test_of_layers(self):
        with pytest.raises(ValueError, match="must be None without binary_input"):
            nn.BinaryLinear(3, 2, binary_input=False, grad_bits=4)
        a, b = (ops.sign(Tensor(np.ones(s, np.float32))) for s in ((2, 3), (4, 3, 2)))
        with pytest.raises(ValueError, match="'b' of binary_matmul must be a matrix"):
            ops.binary_matmul(a, b, grad_quantizer=ops.GradientQuantizer(4))
