"""Products of packed signs with bit planes of a rounded gradient: a backward pass on Hopper.

See ``kernels/sm90_plane_gemm.cu``.
"""

from __future__ import annotations

from typing import Any

from cupybnn.backends.cuda.compiler import Defines, load_kernel, multiprocessors
from cupybnn.backends.cuda.fused_parameter import PARAMETER
from cupybnn.backends.cuda.packing import chunk_count
from cupybnn.backends.cuda.sign_gemm import UPDATE_ARGUMENTS
from cupybnn.backends.cuda.structs import Kernel, Struct

__all__ = ["pays", "stored_product", "weight_update"]

# As in sm90_plane_gemm.cu.
_TILE_M, _TILE_N, _STAGES = 128, 256, 3
_THREADS = 384
_STORED, _UPDATE = 0, 1

PLANE_PRODUCT = Struct("PlaneProduct", "ptr a, b, pop_a, pop_b, scale, out; i64 m, n, k, chunks")
STORED = Kernel("sm90_plane_gemm", "plane_gemm", "PlaneProduct p", PLANE_PRODUCT)
UPDATE = Kernel(
    "sm90_plane_gemm",
    "plane_gemm",
    f"PlaneProduct p; {UPDATE_ARGUMENTS}",
    PLANE_PRODUCT,
    PARAMETER,
)


def pays(device: int, batch: int, inputs: int, units: int) -> bool:
    """Whether both products have a tile per multiprocessor."""
    return min(_tiles(batch, inputs), _tiles(inputs, units)) >= multiprocessors(device)


def _tiles(m: int, n: int) -> int:
    return -(-m // _TILE_M) * -(-n // _TILE_N)


def stored_product(a: Any, b: Any, scale: Any, out: Any, device: int) -> None:
    """Compute ``out = scale * (a @ b)``, the gradient of a layer's inputs.

    Parameters
    ----------
    a : PackedMatrix, shape (batch, units), packed along axis -1
        Signed levels.
    b : PackedMatrix, shape (units, inputs), packed along axis -2
        Signs.
    scale : cupy.ndarray of float32, shape (batch,)
    out : cupy.ndarray of uint16, shape (batch, inputs)
        Bit patterns of bfloat16, rounded to nearest even.
    device : int
        Index of the current CUDA device.
    """
    defines = (("RESULT", _STORED), ("PENALTY", 0), ("WRITE_GRADIENT", 0))
    _launch(STORED, {}, defines, (a, b, scale, out), device)


def weight_update(
    a: Any, b: Any, scale: Any, update: dict[str, Any], *, defines: Defines, device: int
) -> None:
    """Update weights with their gradient, ``(a @ b) * scale``, rounded to bfloat16.

    Parameters
    ----------
    a : PackedMatrix, shape (inputs, batch), packed along axis -1
        Signs.
    b : PackedMatrix, shape (batch, units), packed along axis -2
        Signed levels.
    scale : cupy.ndarray of float32, shape (units,), aligned to 16 bytes
    update : dict
        The kernel's other arguments by name, including `ParameterUpdate.pack`'s.
    defines : tuple of (name, value)
        PENALTY and WRITE_GRADIENT.
    device : int
        Index of the current CUDA device.
    """
    _launch(UPDATE, update, (("RESULT", _UPDATE), *defines), (a, b, scale, None), device)


def _launch(
    kernel: Kernel, arguments: dict[str, Any], defines: Defines, factors: Any, device: int
) -> None:
    a, b, scale, out = factors
    (m, k), n = a.shape, b.shape[1]
    product = PLANE_PRODUCT.pack(
        a=a.words, b=b.words, pop_a=a.popcounts, pop_b=b.popcounts, scale=scale, out=out, m=m,
        n=n, k=k, chunks=chunk_count(k),
    )  # fmt: skip
    shared = _shared_bytes(kernel is UPDATE)
    defines = (("PLANES", max(a.bits, b.bits)), *defines)
    loaded = load_kernel(kernel.source, kernel.function, defines, device, shared)
    blocks = min(_tiles(m, n), multiprocessors(device))
    loaded((blocks,), (_THREADS,), kernel.arguments(p=product, **arguments), shared_mem=shared)


def _shared_bytes(update: bool) -> int:
    """Return the size of struct Shared in bytes."""
    slot = 128 * (_TILE_M + _TILE_N)
    signs = _TILE_M // 2 * _TILE_N if update else 0
    return _STAGES * (slot + 16) + _TILE_M * (_TILE_N + 8) * 2 + signs + 16
