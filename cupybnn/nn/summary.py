"""The table that ``model.summary()`` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cupybnn.text_table import table

if TYPE_CHECKING:
    from cupybnn.nn.module import Module

__all__ = ["Row", "Summary", "summarize"]


@dataclass(frozen=True)
class Row:
    """A layer that has parameters.

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
        Numbers of parameters of one bit, and of full precision.
    nbytes : int
        Bytes for inference, one-bit weights packed along the input (whole 64-bit words).
    training_nbytes : int
        Bytes of the arrays as they are in training.
    binary_products, full_products : int
        Products an example takes, of two signs and of other numbers.
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


@dataclass(frozen=True)
class Summary:
    """Layers of a model and their totals; as a string, a table."""

    rows: tuple[Row, ...]

    def total(self, column: str) -> int:
        """Return the sum of a column of numbers, named as in `Row`."""
        return sum(getattr(row, column) for row in self.rows)

    @property
    def binary_share(self) -> float:
        """Share of the products that are of two signs, from 0 to 1."""
        products = self.total("binary_products") + self.total("full_products")
        return self.total("binary_products") / products if products else 0.0

    def __str__(self) -> str:
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


def summarize(model: Module) -> Summary:
    """Return the table of `model`; see `Module.summary`."""
    rows = (_row(name, module) for name, module in model.named_modules())
    return Summary(tuple(row for row in rows if row is not None))


def _row(name: str, module: Module) -> Row | None:
    parameters = [p for _, p in module.named_parameters(recurse=False)]
    if not parameters:
        return None
    state = parameters + [getattr(module, buffer) for buffer in module.buffers]
    weight = parameters[0]
    binary_products, full_products = module.multiply_adds()
    return Row(
        name=name,
        kind=type(module).__name__,
        shape=weight.shape,
        bits=weight.bits,
        one_bit=sum(p.size for p in parameters if p.bits == 1),
        full=sum(p.size for p in parameters if p.bits != 1),
        nbytes=sum(_packed_nbytes(array) for array in state),
        training_nbytes=sum(array.size * array.dtype.itemsize for array in state),
        binary_products=binary_products,
        full_products=full_products,
    )


def _packed_nbytes(array: Any) -> int:
    """Bytes of an array in inference: one-bit columns are packed into 64-bit words."""
    if getattr(array, "bits", 32) != 1:
        return array.size * array.dtype.itemsize
    return array.shape[-1] * 8 * math.ceil(array.shape[0] / 64)
