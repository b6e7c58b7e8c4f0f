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
