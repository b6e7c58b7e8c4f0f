"""Random numbers on a CUDA device, one launch per draw; see `cupybnn.backends.random`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybnn.backends.cuda.compiler import load_kernel
from cupybnn.backends.cuda.structs import Kernel

__all__ = ["random_words", "uniform"]

DRAW = Kernel(
    "smxx_random", "draw", "ptr out; i64 blocks; u64 first; u64 seed; u64 number; ptr numbers"
)

_MOST_BLOCKS = 1 << 16  # per launch; beyond that, each thread takes several blocks of four numbers


def random_words(shape: tuple[int, ...], seed: int, counter: Any, first: int = 0) -> Any:
    """Return random 32-bit words on the current device, as a CuPy array of uint32.

    Parameters
    ----------
    shape, seed, counter
        As in `cupybnn.backends.random.random_words`.
    first : int
        Index of the first block of four words, from 0 to 2**64 - 1.
    """
    return _draw(shape, seed, counter, first, np.dtype(np.uint32))


def uniform(shape: tuple[int, ...], seed: int, counter: Any) -> Any:
    """Return numbers uniform in [0, 1) on the current device, as a CuPy array of float32."""
    return _draw(shape, seed, counter, 0, np.dtype(np.float32))


def _draw(shape: tuple[int, ...], seed: int, counter: Any, first: int, dtype: np.dtype) -> Any:
    import cupy

    size = math.prod(shape)
    blocks = -(-size // 4)
    out = cupy.empty(4 * blocks, dtype)
    if blocks:
        defines = (("UNIFORM", int(dtype.kind == "f")),)
        kernel = load_kernel(DRAW.source, DRAW.function, defines, out.device.id)
        on_device = isinstance(counter, cupy.ndarray)
        arguments = DRAW.arguments(
            out=out,
            blocks=blocks,
            first=first,
            seed=seed,
            number=0 if on_device else int(counter),
            numbers=counter if on_device else None,
        )
        kernel((min(-(-blocks // 256), _MOST_BLOCKS),), (256,), arguments)
    return out[:size].reshape(shape)
