"""Python mirrors of C structs and kernel parameter lists, with field names and types.

Declarations are written as in C, with ``ptr`` for every pointer and the types of ``layout.cuh``::

    LAYER = Struct("Layer", "ptr z, kept; i64 rows, cols; double share")

The tests compare each one with the kernel sources.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Field", "Kernel", "Section", "Struct", "address"]

# C types, in the module `struct` and in NumPy.
_SCALARS: dict[str, tuple[str, Any]] = {
    "ptr": ("Q", np.uint64),
    "i64": ("q", np.int64),
    "u64": ("Q", np.uint64),
    "double": ("d", np.float64),
    "int": ("i", np.int32),
    "u32": ("I", np.uint32),
    "float": ("f", np.float32),
}


@dataclass(frozen=True)
class Field:
    """A field: its C type ("ptr" for pointers), its name, and its length (0 unless an array)."""

    type: str
    name: str
    count: int = 0


def address(x: Any) -> int:
    """Return the device address of an array; 0 for None; an address unchanged."""
    if x is None or isinstance(x, int):
        return x or 0
    return int(x.data.ptr)


def _parse(declaration: str) -> tuple[Field, ...]:
    fields = []
    for part in declaration.split(";"):
        c_type, names = part.split(maxsplit=1)
        for name in names.split(","):
            found = re.fullmatch(r"\s*(\w+)(?:\[(\d+)\])?\s*", name)
            assert found is not None, f"{name!r} is not a field"
            fields.append(Field(c_type, found[1], int(found[2] or 0)))
    return tuple(fields)


def _in_order(what: str, fields: tuple[Field, ...], values: dict[str, Any]) -> list[Any]:
    """Return values in field order; TypeError unless they match the fields exactly."""
    names = [field.name for field in fields]
    if values.keys() != set(names):
        missing, unknown = set(names) - values.keys(), values.keys() - set(names)
        raise TypeError(f"{what} lacks {sorted(missing)} and does not know {sorted(unknown)}.")
    return [values[name] for name in names]


def _scalar(c_type: str, value: Any) -> int | float:
    if c_type in ("float", "double"):
        return float(value)
    whole = address(value) if c_type == "ptr" else int(value)
    return whole % 2**64 if c_type == "u64" else whole


@dataclass(frozen=True)
class Section:
    """Adjacent 8-byte fields of a struct, for launches that must be fast.

    Attributes
    ----------
    fields : struct.Struct
        Packs and unpacks them.
    offset : int
        Where they begin.
    """

    fields: struct.Struct
    offset: int

    def within(self, offset: int) -> Section:
        """Return the same fields of a struct that begins at an offset of another one."""
        return Section(self.fields, offset + self.offset)


class Struct:
    """A struct of a kernel.

    Parameters
    ----------
    name : str
        As in the kernels.
    declaration : str
        The fields in order; see the module.
    *nested : Struct
        Structs used as field types.
    """

    def __init__(self, name: str, declaration: str, *nested: Struct) -> None:
        self.name, self.fields = name, _parse(declaration)
        inner = {n.name: n for n in nested}
        self._codes: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        self.size, self.align = 0, 1
        format_, end = "<", 0
        for field in self.fields:
            if field.type in inner:
                size, align = inner[field.type].size, inner[field.type].align
            else:
                code = _SCALARS[field.type][0]
                size = align = struct.calcsize(code)
            opaque = field.type in inner or field.count
            self._codes[field.name] = f"{size * (field.count or 1)}s" if opaque else code
            padding = -end % align
            self._offsets[field.name] = end + padding
            format_ += f"{padding}x{self._codes[field.name]}"
            end += padding + size * (field.count or 1)
            self.align = max(self.align, align)
        self._struct = struct.Struct(f"{format_}{-end % self.align}x")
        self.size = self._struct.size
        self.dtype = np.dtype((np.void, self.size))

    def pack(self, **values: Any) -> bytes:
        """Return the struct's bytes.

        A value is an array, an address or None for a pointer, bytes for a struct or an array of
        structs (padded with zeros), and a number otherwise.

        Raises
        ------
        TypeError
            If a field has no value or does not exist.
        """
        ordered = _in_order(f"struct {self.name}", self.fields, values)
        return self._struct.pack(
            *(
                value if self._codes[f.name][-1] == "s" else _scalar(f.type, value)
                for f, value in zip(self.fields, ordered, strict=True)
            )
        )

    def argument(self, data: bytes) -> np.ndarray:
        """Return packed bytes as a launch argument."""
        # Much faster than setting an array's elements.
        return np.frombuffer(data, self.dtype)

    def section(self, first: str, last: str) -> Section:
        """Return adjacent 8-byte fields."""
        names = list(self._codes)
        codes = [self._codes[n] for n in names[names.index(first) : names.index(last) + 1]]
        assert codes
        assert all(code in ("Q", "q", "d") for code in codes), "there is no padding between them"
        return Section(struct.Struct("<" + "".join(codes)), self._offsets[first])


class Kernel:
    """A kernel in ``kernels/`` and its parameters.

    Parameters
    ----------
    source, function : str
    declaration : str
        The parameters in order; see the module.
    *structs : Struct
        Structs used as parameter types.
    """

    def __init__(self, source: str, function: str, declaration: str, *structs: Struct) -> None:
        self.source, self.function = source, function
        self.fields = _parse(declaration)
        self._structs = {s.name: s for s in structs}

    def arguments(self, **values: Any) -> tuple[Any, ...]:
        """Return launch arguments from a value for each parameter, as for `Struct.pack`, or bytes.

        Raises
        ------
        TypeError
            If a parameter has no value or does not exist.
        """
        arguments = []
        for field, value in zip(
            self.fields, _in_order(self.function, self.fields, values), strict=True
        ):
            if field.type not in self._structs:
                value = _SCALARS[field.type][1](_scalar(field.type, value))
            elif isinstance(value, bytes):
                value = self._structs[field.type].argument(value)
            arguments.append(value)
        return tuple(arguments)
