"""The loss that the fused kernels share (`loss.cuh`) against the operations on NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cupybnn import ops
from cupybnn.autograd import Tensor

KERNELS = Path(__file__).resolve().parent.parent / "kernels"

SOURCE = """
typedef long long i64;
#include "include/loss.cuh"
extern "C" __global__ void losses(const float* logits, const void* labels, float smoothing, int n,
                                  float* out, float* grads) {
  for (int row = threadIdx.x; row < n; row += blockDim.x) {
    float logit[CLASSES], grad[CLASSES];
    for (int c = 0; c < CLASSES; c++) logit[c] = logits[row * CLASSES + c];
    out[row] = loss_of_row(logit, labels, row, smoothing, 1.0f / n, grad);
    for (int c = 0; c < CLASSES; c++) grads[row * CLASSES + c] = grad[c];
  }
}
"""

MOST = float(np.finfo("float32").max)
LOGITS = np.array(
    [
        [1.0, 2.0, 3.0],
        [1.0, -np.inf, 0.0],
        [MOST, -MOST, 0.0],
        [0.0, 0.0, -np.inf],
        [5.0, 5.0, 5.0],
        [0.0, np.nan, 0.0],
        [0.0, np.inf, 0.0],
        [-np.inf, -np.inf, -np.inf],
    ],
    "float32",
)
LABELS = np.array([2, 0, 0, 2, 7, 0, 7, 7])


def losses(kind, logits, labels, smoothing=0.0):
    """Return the losses and their gradients as the kernels have them.

    The labels are class numbers or, with two axes, probabilities.
    """
    import cupy

    module = cupy.RawModule(
        code=SOURCE,
        options=(
            f"-I{KERNELS}",
            "-std=c++17",
            "-DCLASSES=3",
            f"-DLOSS={kind}",
            f"-DSOFT={labels.ndim - 1}",
        ),
    )
    n = len(labels)
    out, grads = cupy.empty(n, "float32"), cupy.empty((n, 3), "float32")
    arguments = (
        cupy.asarray(logits),
        cupy.asarray(labels),
        np.float32(smoothing),
        np.int32(n),
        out,
        grads,
    )
    module.get_function("losses")((1,), (32,), arguments)
    return out.get(), grads.get()


@pytest.mark.gpu
@pytest.mark.parametrize("smoothing", [0.0, 0.125])
def test_cross_entropy(smoothing):
    n = len(LABELS)
    out, grads = losses(0, LOGITS, LABELS, smoothing)
    one_hot = (LABELS[:, None] == np.arange(3)).astype("float32")  # none for the label 7
    for row in range(n):
        logits = Tensor(LOGITS[row : row + 1], requires_grad=True)
        with np.errstate(invalid="ignore"):
            loss = ops.softmax_cross_entropy(logits, one_hot[row : row + 1], smoothing)
        loss.backward()
        np.testing.assert_allclose(out[row], loss.item(), rtol=1e-5)
        np.testing.assert_allclose(grads[row], logits.grad[0] / n, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_squared_hinge():
    """Infinite outputs of either sign among them."""
    values = np.array([[0.5, -2, 3], [np.inf, 0, 0], [-np.inf, 0, 0], [0, np.nan, 0]], "float32")
    rows = np.concatenate([values, values])
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    out, grads = losses(1, rows, labels)
    for row in range(len(rows)):
        outputs = Tensor(rows[row : row + 1], requires_grad=True)
        loss = ops.squared_hinge(outputs, labels[row : row + 1])
        loss.backward()
        np.testing.assert_allclose(out[row], loss.item(), rtol=1e-5)
        np.testing.assert_allclose(grads[row], outputs.grad[0] / len(rows), rtol=1e-5)


SOFT = np.array(
    [
        [0.2, 0.3, 0.5],
        [0.9, 0.0, 0.1],
        [1.0, 0.0, 0.0],
        [0.5, 0.5, 0.0],
        [0.0, 0.0, 0.0],
        [0.1] * 3,
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
    ],
    "float32",
)
FUNCTIONS = [
    ops.softmax_cross_entropy,
    ops.squared_hinge,
    ops.softmax_divergence,
]


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [0, 1, 2], ids=["cross_entropy", "squared_hinge", "divergence"])
@pytest.mark.parametrize("smoothing", [0.0, 0.125])
def test_probabilities_as_targets(loss, smoothing):
    """Examples without a class among them, with outputs that are infinite or NaN."""
    n = len(SOFT)
    out, grads = losses(loss, LOGITS, SOFT, smoothing)
    more = (smoothing,) if loss == 0 else ()
    for row in range(n):
        logits = Tensor(LOGITS[row : row + 1], requires_grad=True)
        with np.errstate(all="ignore"):
            expected = FUNCTIONS[loss](logits, SOFT[row : row + 1], *more)
        expected.backward()
        np.testing.assert_allclose(out[row], expected.item(), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(grads[row], logits.grad[0] / n, rtol=2e-5, atol=1e-6)


@pytest.mark.gpu
def test_squared_hinge_of_even_probabilities():
    """A probability of 0.5 has a target of 0: an infinite output adds a constant, too."""
    values = np.array([[np.inf, 0, 1], [-np.inf, 2, 0], [0, np.nan, 0]], "float32")
    halves = np.full((3, 3), 0.5, "float32")
    out, grads = losses(1, values, halves)
    np.testing.assert_allclose(out, [1, 1, np.nan])
    np.testing.assert_allclose(grads, [[0, 0, 0], [0, 0, 0], [0, np.nan, 0]])
