"""The table that ``model.summary()`` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cupybnn.text_table import table

__all__ = ["Row", "Summary", "inference_nbytes"]


@dataclass(frozen=True)
class Row:
    """A layer with parameters.

    Attributes
    ----------
    name : str
        As in ``named_modules``.
    kind : str
        The layer's class.
    shape : tuple of int
        Shape of its first parameter, the weight.
    bits : int
        Bits that inference needs for each element of the weight.
    one_bit, full : int
        Numbers of one-bit and full-precision parameters.
    nbytes : int
        Bytes for inference, with one-bit weights packed along the input into 64-bit words.
    training_nbytes : int
        Bytes of the arrays in training.
    binary_products, full_products : int
        Products per example: of two signs, and of other numbers.

    Examples
    --------
    >>> from cupybnn import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Sign(), nn.Linear(3, 2))
    >>> row = model.summary().rows[0]
    >>> row.kind, row.shape, row.bits
    ('Linear', (4, 3), 32)
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: int
    one_bit: int
    full: int
    nbytes: int
    training_nbytes: int
    binary_products: int
    full_products: int


@dataclass(frozen=True, repr=False)
class Summary:
    """The layers of a model and their totals, shown as a table.

    Examples
    --------
    >>> from cupybnn import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Sign(), nn.Linear(3, 2))
    >>> len(model.summary().rows)
    3
    """

    rows: tuple[Row, ...]

    def total(self, column: str) -> int:
        """Return the sum of a numeric column, named as in `Row`."""
        return sum(getattr(row, column) for row in self.rows)

    @property
    def binary_share(self) -> float:
        """Share of products that are of two signs, from 0 to 1."""
        products = self.total("binary_products") + self.total("full_products")
        return self.total("binary_products") / products if products else 0.0

    def __repr__(self) -> str:
        head = ("layer", "kind", "shape", "parameters", "bits a weight", "bytes")
        cells = []
        for row in self.rows:
            shape = " × ".join(str(n) for n in row.shape)
            count = row.one_bit + row.full
            cells.append(
                (row.name, row.kind, shape, f"{count:,}", str(row.bits), f"{row.nbytes:,}")
            )
        lines = list(table(head, cells, left=3))
        lines.insert(1, "-" * max(len(line) for line in lines))
        nbytes, training = self.total("nbytes"), self.total("training_nbytes")
        lines += [
            lines[1],
            f"1-bit parameters     {self.total('one_bit'):,}",
            f"32-bit parameters    {self.total('full'):,}",
            f"memory               {nbytes:,} bytes ({training:,} in training, "
            f"{training / max(nbytes, 1):.1f} times as much)",
            f"binary operations    {self.binary_share:.1%} of the products of an example",
        ]
        return "\n".join(lines)


def inference_nbytes(array: Any) -> int:
    """Return the bytes of an array in inference, with one-bit columns packed into 64-bit words."""
    if getattr(array, "bits", 32) != 1:
        return array.size * array.dtype.itemsize
    return array.shape[-1] * 8 * math.ceil(array.shape[0] / 64)
