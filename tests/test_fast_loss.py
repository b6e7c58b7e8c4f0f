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
    ],
    "float32",
)
LABELS = np.array([2, 0, 0, 2, 7, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("smoothing", [0.0, 0.125])
def test_cross_entropy(smoothing):
    import cupy

    module = cupy.RawModule(
        code=SOURCE,
        options=(f"-I{KERNELS}", "-std=c++17", "-DCLASSES=3", "-DLOSS=0"),
    )
    n = len(LABELS)
    out, grads = cupy.empty(n, "float32"), cupy.empty((n, 3), "float32")
    arguments = (
        cupy.asarray(LOGITS),
        cupy.asarray(LABELS),
        np.float32(smoothing),
        np.int32(n),
        out,
        grads,
    )
    module.get_function("losses")((1,), (32,), arguments)
    one_hot = (LABELS[:, None] == np.arange(3)).astype("float32")  # none for the label 7
    for row in range(n):
        logits = Tensor(LOGITS[row : row + 1], requires_grad=True)
        loss = ops.softmax_cross_entropy(logits, one_hot[row : row + 1], smoothing)
        loss.backward()
        np.testing.assert_allclose(out[row].get(), loss.item(), rtol=1e-5)
        np.testing.assert_allclose(grads[row].get(), logits.grad[0] / n, rtol=1e-5, atol=1e-7)


SOFT = np.array(
    [
        [0.2, 0.3, 0.5],
        [0.9, 0.0, 0.1],
        [1.0, 0.0, 0.0],
        [0.5, 0.5, 0.0],
        [0.0, 0.0, 0.0],
        [0.1] * 3,
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
    import cupy

    module = cupy.RawModule(
        code=SOURCE,
        options=(f"-I{KERNELS}", "-std=c++17", "-DCLASSES=3", f"-DLOSS={loss}", "-DSOFT=1"),
    )
    n = len(SOFT)
    out, grads = cupy.empty(n, "float32"), cupy.empty((n, 3), "float32")
    numbers = cupy.asarray(LOGITS), cupy.asarray(SOFT), np.float32(smoothing), np.int32(n)
    module.get_function("losses")((1,), (32,), (*numbers, out, grads))
    more = (smoothing,) if loss == 0 else ()
    for row in range(n):
        logits = Tensor(LOGITS[row : row + 1], requires_grad=True)
        expected = FUNCTIONS[loss](logits, SOFT[row : row + 1], *more)
        expected.backward()
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(out[row].get(), expected.item(), rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(grads[row].get(), logits.grad[0] / n, rtol=2e-5, atol=1e-6)
