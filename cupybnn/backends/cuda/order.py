"""The order of training images on a CUDA device; see `cupybnn.backends.order`."""

from __future__ import annotations

from typing import Any

from cupybnn.backends.cuda.compiler import load_kernel
from cupybnn.backends.cuda.structs import Kernel, Struct
from cupybnn.backends.order import Order

__all__ = ["fill_order"]

ORDER = Struct(
    "Order",
    "ptr ends; i64 images, sources, last; u64 seed; i64 bits, offset_bits, step, batch, first;"
    "i64 rows, count",
)
FILL = Kernel("smxx_order", "fill", "Order p; ptr out", ORDER)

_MOST_BLOCKS = 1 << 12  # per launch; beyond that, each thread computes several images


def fill_order(order: Order, step: int, batch: int, first: int, out: Any) -> None:
    """Write the images of steps, in one launch; see `cupybnn.backends.order.Order`."""
    if not out.size:
        return
    kernel = load_kernel(FILL.source, FILL.function, (), out.device.id)
    p = ORDER.pack(
        ends=order.ends, images=order.images, sources=0 if order.ends is None else order.ends.size,
        last=order.last, seed=order.seed, bits=order.bits, offset_bits=order.offset_bits,
        step=step, batch=batch, first=first, rows=out.shape[1], count=out.size,
    )  # fmt: skip
    grid = (min(-(-out.size // 256), _MOST_BLOCKS),)
    kernel(grid, (256,), FILL.arguments(p=p, out=out))
