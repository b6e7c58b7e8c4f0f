"""Kernels of the fused step by themselves, against plain computations; on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_dense_products(precision, transpose_a, transpose_b):
    import cupy

    from cupybnn.backends.cuda import blas

    random = np.random.default_rng(0)
    # Small integers are exact in each type, and so are the sums.
    a = random.integers(-8, 9, (70, 130)).astype(np.float32)
    b = random.integers(-8, 9, (130, 50)).astype(np.float32)

    def operand(x):
        x = cupy.asarray(np.ascontiguousarray(x))
        if precision == "bfloat16":
            x = (x.view(np.uint32) >> 16).astype(np.uint16)
        return x

    out = cupy.empty((70, 50), np.float32)
    blas.Blas(precision).multiply(
        operand(a.T if transpose_a else a),
        operand(b.T if transpose_b else b),
        out,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        scale=0.5,
    )
    np.testing.assert_array_equal(out.get(), 0.5 * (a @ b))


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (40, 1030), (130, 2048)])
def test_dropout_masks_are_the_plain_engines(shape):
    import cupy

    from cupybnn.backends.cuda import fused, fused_batch, fused_layers
    from cupybnn.backends.random import bernoulli, random_words

    launcher = fused.Launcher(0, np.dtype(np.float32))
    draw = fused_batch.Draw(seed=2**63 - 5, offset=4, keep_prob=0.3)
    out = cupy.empty(fused_layers.mask_shape(*shape), np.uint32)
    step = cupy.asarray([3], np.int64)
    fused_batch.DropoutMask(step=step, draw=draw, shape=shape, out=out).launch(launcher)
    bits = np.unpackbits(out.get().view(np.uint8), axis=1, bitorder="little")
    expected = bernoulli(random_words(shape, draw.seed, 7, np), 0.3)
    np.testing.assert_array_equal(bits[:, : shape[1]].astype(bool), expected)
    assert not bits[:, shape[1] :].any()


@pytest.mark.parametrize("shape", [(3, 5), (64, 1024), (257, 1100)])
@pytest.mark.parametrize("real", [np.float32, np.uint16])
def test_unpacked_rows(shape, real):
    import cupy

    import cupybnn
    from cupybnn.backends.cuda import fused, fused_layers

    x = cupy.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    out = cupy.empty(shape, real)
    unpack = fused_layers.UnpackRows(packed=cupybnn.pack(x), out=out)
    unpack.launch(fused.Launcher(0, np.dtype(real)))
    one, minus_one = (0x3F80, 0xBF80) if real is np.uint16 else (1, -1)
    np.testing.assert_array_equal(out.get(), np.where(x.get() >= 0, one, minus_one).astype(real))


@pytest.mark.parametrize("shape", [(3, 5), (64, 1024), (257, 1100), (1100, 257), (2080, 36)])
@pytest.mark.parametrize("real", [np.float32, np.uint16])
def test_unpacked_columns(shape, real):
    import cupy

    import cupybnn
    from cupybnn.backends.cuda import fused, fused_layers

    x = cupy.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    out = cupy.empty(shape, real)
    unpack = fused_layers.UnpackColumns(packed=cupybnn.pack(x, axis=-2), out=out)
    unpack.launch(fused.Launcher(0, np.dtype(real)))
    one, minus_one = (0x3F80, 0xBF80) if real is np.uint16 else (1, -1)
    np.testing.assert_array_equal(out.get(), np.where(x.get() >= 0, one, minus_one).astype(real))


@pytest.mark.parametrize("sides", [(8, 28), (28, 8), (8, 28, 300)])
def test_images_of_several_sizes_are_deformed_in_one_process(sides):
    """Each size takes as many bytes of shared memory as an image has pixels."""
    import cupy

    from cupybnn.backends.cuda import fused, fused_batch

    launcher = fused.Launcher(0, np.dtype(np.float32))
    still = {"seed": 1, "shift": 0.0, "rotation": 0.0, "scale": 0.0, "shear": 0.0}
    for side in sides:
        images = np.random.default_rng(side).integers(0, 256, (5, side**2), np.uint8)
        order = np.array([[3, 1], [4, 0]], np.int32)
        x, labels = cupy.empty((2, side**2), np.float32), cupy.empty(2, np.int64)
        fused_batch.Gather(
            images=cupy.asarray(images),
            all_labels=cupy.arange(5),
            order=cupy.asarray(order),
            step=cupy.ones(1, np.int64),
            x=x,
            labels=labels,
            deformation=fused_batch.Deformation(shape=(side, side), **still),
        ).launch(launcher)
        np.testing.assert_array_equal(x.get(), images[order[1]])
        np.testing.assert_array_equal(labels.get(), order[1])


class TestMovedImages:
    """`smxx_virtual.cu` against the plain step's arrays."""

    SHAPE = (5, 61)

    def launch(self, real=np.float32, **more) -> tuple[np.ndarray, np.ndarray]:
        import cupy

        from cupybnn.backends.cuda import fused, fused_virtual

        self.x = np.random.default_rng(0).integers(0, 256, self.SHAPE).astype(np.float32)
        out = cupy.full(self.SHAPE, np.nan, np.float32)
        pops = cupy.ones((2, 700), np.int32)
        fused_virtual.MoveImages(
            x=cupy.asarray(self.x), out=out, step=cupy.asarray([3], np.int64), pops=pops, **more
        ).launch(fused.Launcher(0, np.dtype(real)))
        assert not pops.any()
        return out.get() - self.x, out.get()

    def test_along_the_gradient(self):
        import cupy

        from cupybnn import ops

        gradient = np.random.default_rng(1).normal(size=self.SHAPE).astype(np.float32)
        gradient *= np.float32([[1], [1e-25], [0], [1e15], [1]])
        moved, _ = self.launch(
            direction="gradient", distance=500.0, gradient=cupy.asarray(gradient)
        )
        np.testing.assert_allclose(moved, ops.of_length(gradient, 500.0), rtol=1e-4, atol=1e-4)
        assert not moved[2].any()

    def test_along_a_random_direction(self):
        from cupybnn import ops
        from cupybnn.backends.random import bell

        moved, _ = self.launch(direction="random", distance=300.0, seed=2**63 - 9)
        start = bell(self.SHAPE, 2**63 - 9, 3, np)
        np.testing.assert_allclose(moved, ops.of_length(start, 300.0), rtol=1e-4, atol=1e-4)

    def test_dropped_pixels(self):
        """They have no gradient, and are 0 afterwards; a random direction counts them."""
        import cupy

        from cupybnn import ops
        from cupybnn.backends.cuda.fused_batch import Draw
        from cupybnn.backends.random import bell, bernoulli, random_words

        draw = Draw(seed=77, offset=-1, keep_prob=0.6)
        kept = bernoulli(random_words(self.SHAPE, 77, 2, np), 0.6)
        _, out = self.launch(direction="none", drop=draw)
        np.testing.assert_array_equal(out, np.where(kept, self.x, 0))
        gradient = np.random.default_rng(1).normal(size=self.SHAPE).astype(np.float32)
        _, out = self.launch(
            direction="gradient", distance=300.0, gradient=cupy.asarray(gradient), drop=draw
        )
        move = ops.of_length(np.where(kept, gradient, 0), 300.0)
        np.testing.assert_allclose(out, np.where(kept, self.x + move, 0), rtol=1e-4, atol=1e-4)
        _, out = self.launch(direction="random", distance=300.0, seed=5, drop=draw)
        move = ops.of_length(bell(self.SHAPE, 5, 3, np), 300.0)
        np.testing.assert_allclose(out, np.where(kept, self.x + move, 0), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", ["some", "uniform"])
    def test_mixed_in_pairs(self, kind):
        import cupy

        from cupybnn.backends.cuda import fused, fused_virtual
        from cupybnn.data import Mixing

        x = np.random.default_rng(0).integers(0, 256, (40, 33)).astype(np.float32)
        labels = np.random.default_rng(1).integers(0, 7, 40)
        out, targets = cupy.empty_like(cupy.asarray(x)), cupy.empty((40, 7), np.float32)
        fused_virtual.MixImages(
            x=cupy.asarray(x), out=out, step=cupy.asarray([9], np.int64),
            labels=cupy.asarray(labels), targets=targets, seed=123, kind=kind,
        ).launch(fused.Launcher(0, np.dtype(np.float32)))  # fmt: skip
        shares = Mixing(kind).shares(40, 123, 9, np)
        np.testing.assert_allclose(out.get(), Mixing.mix(x, shares), rtol=1e-6, atol=1e-4)
        expected = Mixing.mix(np.eye(7, dtype=np.float32)[labels], shares)
        np.testing.assert_allclose(targets.get(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("add", [False, True])
def test_softened_logits(add):
    import cupy

    from cupybnn.backends.cuda import fused, fused_virtual

    logits = np.random.default_rng(0).normal(size=(300, 11)).astype(np.float32) * 9
    out = cupy.ones((300, 11), np.float32)
    fused_virtual.Soften(
        logits=cupy.asarray(logits), out=out, temperature=3.0, share=0.25, add=add
    ).launch(fused.Launcher(0, np.dtype(np.float32)))
    powers = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / 3)
    expected = 0.25 * powers / powers.sum(axis=1, keepdims=True) + add
    np.testing.assert_allclose(out.get(), expected, rtol=1e-5)
