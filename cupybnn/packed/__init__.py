"""Signs, and matrices of signs stored with one bit per element.

A stored bit is 1 for +1 and 0 for -1. Bits are packed along one of the last two axes of the matrix,
the packed axis; the vectors along it are its lines. In the canonical layout, used by the NumPy
backend and in saved files, element 64·j + i of a line is bit i of the line's 64-bit word j, and the
bits past the end of a line are 0.
"""

from cupybnn.packed.lines import concatenate
from cupybnn.packed.matrix import PackedMatrix
from cupybnn.packed.signs import pack, sign, unpack

__all__ = ["PackedMatrix", "concatenate", "pack", "sign", "unpack"]
