"""The products that are timed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GROUPS", "ORIGINAL", "Shape", "original_sizes", "shapes"]


@dataclass(frozen=True)
class Shape:
    """A product of (m, k) by (k, n)."""

    group: str
    m: int
    n: int
    k: int
    note: str = ""

    @property
    def operations(self) -> int:
        """Multiplications and additions: 2·m·n·k."""
        return 2 * self.m * self.n * self.k

    def __str__(self) -> str:
        return f"{self.m} x {self.n} x {self.k}"


def _square(*sizes: int) -> tuple[Shape, ...]:
    return tuple(Shape("square", n, n, n) for n in sizes)


_MLP = (
    Shape("mlp", 100, 4096, 4096, "hidden layer, batch 100"),
    Shape("mlp", 1024, 1024, 784, "first layer, batch 1024"),
    Shape("mlp", 4096, 4096, 784, "first layer, batch 4096"),
    Shape("mlp", 4096, 4096, 4096, "hidden layer, batch 4096"),
    Shape("mlp", 4096, 10, 4096, "last layer, batch 4096"),
)

#: On a GPU. M x N x K.
GPU = (
    *_square(512, 1024, 2048, 4096, 8192, 16384, 32768),
    Shape("ragged", 1000, 1000, 1000),
    Shape("ragged", 4097, 4095, 4099),
    Shape("ragged", 8191, 8190, 8001),
    Shape("skinny", 1, 16384, 16384, "one vector"),
    Shape("skinny", 16, 16384, 16384),
    Shape("skinny", 64, 8192, 8192),
    Shape("skinny", 128, 128, 1 << 20, "long K"),
    *_MLP,
)
GPU_QUICK = (
    *_square(1024, 4096, 8192),
    Shape("ragged", 4097, 4095, 4099),
    Shape("skinny", 16, 16384, 16384),
    Shape("mlp", 4096, 4096, 784, "first layer, batch 4096"),
)
#: On a CPU: a thousandth of the work.
CPU = (
    *_square(256, 512, 1024, 2048),
    Shape("ragged", 1000, 1001, 999),
    Shape("skinny", 1, 4096, 4096, "one vector"),
    Shape("skinny", 16, 4096, 4096),
    Shape("mlp", 128, 512, 784, "first layer, batch 128"),
    Shape("mlp", 128, 512, 512, "hidden layer, batch 128"),
    Shape("mlp", 1024, 1024, 1024, "hidden layer, batch 1024"),
)
CPU_QUICK = (
    *_square(128, 256),
    Shape("ragged", 100, 101, 99),
    Shape("skinny", 1, 1024, 1024, "one vector"),
    Shape("mlp", 128, 512, 512, "hidden layer, batch 128"),
)

GROUPS = ("square", "ragged", "skinny", "mlp")

#: Sizes of the table that the original program printed.
ORIGINAL = (1024, 2048, 4096, 8192, 16384)


def shapes(gpu: bool, quick: bool) -> tuple[Shape, ...]:
    """Return the products for a kind of machine."""
    if gpu:
        return GPU_QUICK if quick else GPU
    return CPU_QUICK if quick else CPU


def original_sizes(gpu: bool, quick: bool) -> tuple[int, ...]:
    """Return the sizes N of the original program's table, limited to a few seconds on a CPU."""
    if gpu:
        return ORIGINAL[:3] if quick else ORIGINAL
    return (256, 512) if quick else (512, 1024, 2048)
