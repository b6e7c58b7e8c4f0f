"""Products of packed signs with a bfloat16 matrix: the backward pass of a binary layer on Hopper.

See ``kernels/sm90_sign_gemm.cu``.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np

from cupybnn.backends.cuda import launching
from cupybnn.backends.cuda.compiler import Defines, architecture, load_kernel, multiprocessors
from cupybnn.backends.cuda.fused_layers import GATES, LAYER, ActivationGradient
from cupybnn.backends.cuda.fused_parameter import PARAMETER
from cupybnn.backends.cuda.structs import Kernel, Struct

__all__ = [
    "UPDATE_ARGUMENTS",
    "WRITERS",
    "NormScratch",
    "part_scratch",
    "parts",
    "pays",
    "tiles",
    "transposed_product",
    "unsupported_layer",
    "unsupported_reason",
    "weight_gradient",
    "weight_update",
]

# As in sm90_sign_gemm.cu.
_TILE_M, _TILE_N, _DEPTH, _STAGES = 128, 256, 64, 4
_THREADS = 384
_SUM_THREADS = 256  # of smxx_part_sum.cu
_TRANSPOSED, _UPDATE, _GRADIENT, _PARTS = 0, 1, 2, 3
_PLAIN = (("PENALTY", 0), ("WRITE_GRADIENT", 0))  # neither is there
#: Warps that write a tile; each writes its part of the penalty.
WRITERS = 3
# The least parts of a batch, and the least images of a part: with fewer, nothing was gained.
_LEAST_PARTS, _LEAST_OF_PART = 8, 512

SIGN_PRODUCT = Struct("SignProduct", "ptr words, out; i64 m, n, k, parts")
TENSOR_MAP = Struct("TensorMap", "u64 opaque[16]")
_OPERANDS = "SignProduct p; TensorMap map"
PRODUCT = Kernel("sm90_sign_gemm", "sign_gemm", _OPERANDS, SIGN_PRODUCT, TENSOR_MAP)
#: What a product that updates weights takes besides its operands.
UPDATE_ARGUMENTS = (
    "Parameter parameter; ptr rates; i64 ring; ptr step; float gain_mean, gain_square;"
    "ptr partials; i64 earlier"
)
NORM_SUMS = Struct("NormSums", "ptr gate, partials, tickets, grad_gamma, grad_beta")
SUMMED = Kernel(
    "sm90_sign_gemm",
    "sign_gemm",
    f"{_OPERANDS}; Layer layer; NormSums to",
    SIGN_PRODUCT,
    TENSOR_MAP,
    LAYER,
    NORM_SUMS,
)
UPDATE = Kernel(
    "sm90_sign_gemm",
    "sign_gemm",
    f"{_OPERANDS}; {UPDATE_ARGUMENTS}",
    SIGN_PRODUCT,
    TENSOR_MAP,
    PARAMETER,
)
SUM_PARTS = Kernel("smxx_part_sum", "sum_parts", "ptr parts; i64 count, number; ptr out")


def unsupported_reason(device: int, precision: str, inputs: int, units: int) -> str | None:
    """Return why the kernel cannot run a layer's backward pass, or None if it can.

    The reason is the end of a sentence.
    """
    reason = unsupported_layer(device, precision, inputs, units)
    return reason if reason or _can_map() else "the package cuda-bindings is missing"


def unsupported_layer(device: int, precision: str, inputs: int, units: int) -> str | None:
    """Return why no product for Hopper can update a layer's weights, or None."""
    if architecture(device) != 90:
        return "the device does not have compute capability 9.0"
    if precision != "bfloat16":
        return f"dense products are in {precision}"
    if inputs % 8 or units % 8:  # rows must be multiples of 16 bytes
        return "the number of units is not a multiple of 8"
    return None


def pays(device: int, batch: int, inputs: int, units: int) -> bool:
    """Whether both products have a tile per multiprocessor; with fewer, cuBLAS is faster."""
    return min(tiles(inputs, batch), tiles(inputs, units)) >= multiprocessors(device)


def parts(device: int, batch: int, inputs: int, units: int) -> int:
    """Return in how many parts of the batch to compute the gradient of a layer's weights, or 0.

    For so few weights that `pays` is false, and so many images that the tiles of all parts nearly
    fill the device. 0 where cuBLAS is as fast.
    """
    available, few = multiprocessors(device), tiles(inputs, units)
    number = min(available // few, batch // _LEAST_OF_PART)
    return number if number >= _LEAST_PARTS and 4 * number * few >= 3 * available else 0


def part_scratch(size: int) -> Any:
    """Return memory for parts of gradients of so many elements, for one launch after the other."""
    import cupy

    return cupy.empty(size, np.float32)


def tiles(m: int, n: int) -> int:
    """Return the number of tiles of an M x N product."""
    return -(-m // _TILE_M) * -(-n // _TILE_N)


class NormScratch:
    """Memory for the sums of `transposed_product`, for one launch after the other.

    Parameters
    ----------
    batch, units : int
        The most of a layer.
    """

    def __init__(self, batch: int, units: int) -> None:
        import cupy

        tiles = -(-batch // _TILE_N)
        self.partials = cupy.empty(tiles * 2 * units, np.float32)
        self.tickets = cupy.zeros(-(-units // _TILE_M), np.uint32)  # 0 between launches


def transposed_product(
    signs: Any,
    matrix: Any,
    out: Any,
    device: int,
    below: ActivationGradient | None = None,
    scratch: NormScratch | None = None,
) -> None:
    """Compute ``out = matrix @ signs.T``, the gradient of a layer's inputs.

    Parameters
    ----------
    signs : PackedMatrix, shape (inputs, units), packed along the inputs
        The layer's weights.
    matrix : cupy.ndarray of uint16, shape (batch, units)
        Bit patterns of bfloat16: the gradient of the layer's products.
    out : cupy.ndarray of uint16, shape (batch, inputs)
        Likewise, rounded to nearest even.
    device : int
        Index of the current CUDA device.
    below : ActivationGradient, optional
        Of the layer that made the inputs: if its `can_be_summed`, its first sums are computed, too.
    scratch : NormScratch, optional
        For `below`.
    """
    (batch, units), inputs = matrix.shape, out.shape[1]
    product = SIGN_PRODUCT.pack(words=signs.words, out=out, m=inputs, n=batch, k=units, parts=1)
    arguments = {"p": product, "map": _tensor_map(matrix.data.ptr, matrix.shape, _TILE_N)}
    if below is None:
        _launch(PRODUCT, _TRANSPOSED, arguments, _PLAIN, tiles(inputs, batch), device)
        return
    assert scratch is not None
    to = NORM_SUMS.pack(
        gate=below.mask, partials=scratch.partials, tickets=scratch.tickets,
        **below.layer.gradients(),
    )  # fmt: skip
    arguments |= {"layer": below.layer.pack(), "to": to}
    defines = (*_PLAIN, ("SUMS", 1), ("GATE", GATES[below.gate]), *below.layer.defines())
    _launch(SUMMED, _TRANSPOSED, arguments, defines, tiles(inputs, batch), device)


def weight_gradient(signs: Any, matrix: Any, out: Any, device: int, scratch: Any = None) -> None:
    """Compute ``out = signs.T @ matrix``, the gradient of a layer's weights.

    Parameters
    ----------
    signs : PackedMatrix, shape (batch, inputs), packed along the inputs
        The layer's inputs.
    matrix : cupy.ndarray of uint16, shape (batch, units)
        Bit patterns of bfloat16: the gradient of the layer's products.
    out : cupy.ndarray of uint16, shape (inputs, units)
        Likewise, rounded to nearest even.
    device : int
        Index of the current CUDA device.
    scratch : cupy.ndarray of float32, shape (parts, inputs, units), optional
        Memory from `part_scratch`: the batch is divided into so many parts, whose gradients are
        added up. See `parts`.
    """
    if scratch is None:
        arguments = _of_weights(signs, matrix, out)
        _launch(PRODUCT, _GRADIENT, arguments, _PLAIN, tiles(*out.shape), device)
        return
    number = scratch.shape[0]
    arguments = _of_weights(signs, matrix, scratch, number)
    _launch(PRODUCT, _PARTS, arguments, _PLAIN, number * tiles(*out.shape), device)
    loaded = load_kernel(SUM_PARTS.source, SUM_PARTS.function, (("REAL", "bfloat16_bits"),), device)
    values = SUM_PARTS.arguments(parts=scratch, count=out.size, number=number, out=out)
    loaded((-(-out.size // (4 * _SUM_THREADS)),), (_SUM_THREADS,), values)


def weight_update(
    signs: Any, matrix: Any, update: dict[str, Any], *, defines: Defines, device: int
) -> None:
    """Update weights with their gradient, ``signs.T @ matrix``, rounded to bfloat16.

    Parameters
    ----------
    signs : PackedMatrix, shape (batch, inputs), packed along the inputs
        The layer's inputs.
    matrix : cupy.ndarray of uint16, shape (batch, units)
        Bit patterns of bfloat16: the gradient of the layer's products.
    update : dict
        The kernel's other arguments by name, including `ParameterUpdate.pack`'s.
    defines : tuple of (name, value)
        PENALTY and WRITE_GRADIENT.
    device : int
        Index of the current CUDA device.
    """
    arguments = {**_of_weights(signs, matrix, None), **update}
    count = tiles(signs.shape[-1], matrix.shape[1])
    _launch(UPDATE, _UPDATE, arguments, defines, count, device)


def _of_weights(signs: Any, matrix: Any, out: Any, number: int = 1) -> dict[str, Any]:
    """Return the operands of a product that is the gradient of weights."""
    (batch, units), inputs = matrix.shape, signs.shape[-1]
    product = SIGN_PRODUCT.pack(
        words=signs.words, out=out, m=inputs, n=units, k=batch, parts=number
    )
    # Here the matrix's rows run along K; in `transposed_product`, they are columns of the product.
    return {"p": product, "map": _tensor_map(matrix.data.ptr, matrix.shape, _DEPTH)}


def _launch(
    kernel: Kernel,
    result: int,
    arguments: dict[str, Any],
    defines: Defines,
    tiles: int,
    device: int,
) -> None:
    shared, defines = _shared_bytes(result, kernel is SUMMED), (("RESULT", result), *defines)
    loaded = load_kernel(kernel.source, kernel.function, defines, device, shared)
    blocks = min(tiles, multiprocessors(device))
    loaded((blocks,), (_THREADS,), kernel.arguments(**arguments), shared_mem=shared)


def _shared_bytes(result: int, summed: bool = False) -> int:
    """Return the size of struct Shared in bytes."""
    slots = _STAGES * (_TILE_N * _DEPTH * 2 + _DEPTH * _TILE_M // 8 + 16) + 16
    if result == _PARTS:
        return slots
    rows, cols = (_TILE_N, _TILE_M) if result == _TRANSPOSED else (_TILE_M, _TILE_N)
    signs = _TILE_M // 2 * _TILE_N if result == _UPDATE else 0
    sums = WRITERS * 2 * _TILE_M * 4 + 8 if summed else 0
    return slots + rows * (cols + 8) * 2 + signs + sums


@cache
def _can_map() -> bool:
    """Whether tensor maps can be encoded, which CuPy has no function for."""
    try:
        from cuda.bindings import driver  # type: ignore[import-untyped]
    except ImportError:
        return False
    return hasattr(driver, "cuTensorMapEncodeTiled")


@lru_cache(maxsize=256)
def _tensor_map(address: int, shape: tuple[int, int], box_rows: int) -> Any:
    """Return the tensor map of a row-major matrix of 16-bit elements: swizzled boxes of 64 columns.

    Raises
    ------
    cupy.cuda.driver.CUDADriverError
        If the driver reports an error.
    """
    from cuda.bindings import driver

    rows, cols = shape
    swizzle, promotion = driver.CUtensorMapSwizzle, driver.CUtensorMapL2promotion
    error, described = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2,
        address,
        [driver.cuuint64_t(cols), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(cols * 2)],
        [driver.cuuint32_t(64), driver.cuuint32_t(box_rows)],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        what = f"did not make a tensor map of a {rows} x {cols} matrix"
        raise launching.driver_error(int(error), what)
    words = np.array([int(word) for word in described.opaque], np.uint64)
    return words.view(TENSOR_MAP.dtype)
