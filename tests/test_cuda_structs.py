"""Structs and parameter lists of the kernels, as Python mirrors them; without a GPU.

Both sides are read: the text of the kernels here, with `ctypes` for the layout that C gives it.
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import re
from types import SimpleNamespace

import numpy as np
import pytest

from cupybnn.backends import cuda
from cupybnn.backends.cuda.sources import kernels_dir
from cupybnn.backends.cuda.structs import Field, Kernel, Struct

C_TYPES = {
    "ptr": ctypes.c_uint64,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "double": ctypes.c_double,
    "int": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "float": ctypes.c_float,
}


def declared(kind: type) -> dict[str, object]:
    """Structs or kernels of all modules of the backend, by their place."""
    found: dict[str, object] = {}
    for module in pkgutil.iter_modules(cuda.__path__):
        names = vars(importlib.import_module(f"{cuda.__name__}.{module.name}"))
        for name, value in names.items():
            if isinstance(value, kind) and value not in found.values():
                found[f"{module.name}.{name}"] = value
    return found


STRUCTS, KERNELS = declared(Struct), declared(Kernel)


def text_of(path) -> str:
    return re.sub(r"//.*", "", path.read_text(encoding="utf-8"))


TEXTS = {path.name: text_of(path) for path in sorted(kernels_dir().rglob("*.cu*"))}


def field(declaration: str, text: str) -> Field:
    """Read the declaration of one field or parameter."""
    words = re.sub(r"\b(const|__grid_constant__|__restrict__)\b", " ", declaration)
    found = re.fullmatch(r"\s*([\w ]+?)\s*(\*)?\s*(\w+)\s*(?:\[(\w+)\])?\s*", words)
    assert found is not None, declaration
    c_type, pointer, name, count = found.groups()
    if count is not None and not count.isdigit():
        constant = rf"constexpr int {count} = (\d+);"  # of this file, or of a header
        (count,) = re.findall(constant, text) or re.findall(constant, "".join(TEXTS.values()))
    return Field("ptr" if pointer else c_type, name, int(count or 0))


def fields_of_struct(name: str) -> list[Field]:
    """Read a struct from the kernels' text."""
    bodies = {
        found[1]: text
        for text in TEXTS.values()
        for found in re.finditer(
            rf"struct (?:alignas\(\d+\) )?{name} \{{(.*?)\}};", text, re.DOTALL
        )
    }
    assert len(bodies) == 1, f"{len(bodies)} definitions of {name}"
    ((body, text),) = bodies.items()
    fields = []
    for statement in filter(str.strip, body.split(";")):
        first, *rest = statement.split(",")
        fields.append(field(first, text))
        assert not rest or "*" not in statement, statement
        fields += [Field(fields[-1].type, more.strip()) for more in rest]
    return fields


def c_struct(mirror: Struct, known: dict[str, Struct]) -> type[ctypes.Structure]:
    """Build what C makes of the text of a struct."""
    members = []
    for f in fields_of_struct(mirror.name):
        c_type = C_TYPES.get(f.type) or c_struct(known[f.type], known)
        members.append((f.name, c_type * f.count if f.count else c_type))
    return type(mirror.name, (ctypes.Structure,), {"_fields_": members})


@pytest.mark.parametrize("place", STRUCTS)
def test_a_struct_has_the_fields_of_the_kernels(place):
    mirror = STRUCTS[place]
    assert list(mirror.fields) == fields_of_struct(mirror.name)


@pytest.mark.parametrize("place", STRUCTS)
def test_a_packed_struct_is_what_c_reads(place):
    mirror, known = STRUCTS[place], {s.name: s for s in STRUCTS.values()}
    layout = c_struct(mirror, known)
    assert mirror.size == ctypes.sizeof(layout)
    assert mirror.align == ctypes.alignment(layout)
    values = {}
    for number, f in enumerate(mirror.fields, 1):
        values[f.name] = number * 1001
        if f.type in known or f.count:
            size = getattr(layout, f.name).size
            values[f.name] = bytes((number + i) % 256 for i in range(size))
    read = layout.from_buffer_copy(mirror.pack(**values))
    for name, value in values.items():
        got = getattr(read, name)
        assert (bytes(got) if isinstance(value, bytes) else got) == value, name
    argument = mirror.argument(mirror.pack(**values))
    assert (argument.size, argument.dtype.itemsize) == (1, ctypes.sizeof(layout))


@pytest.mark.parametrize("place", KERNELS)
def test_a_kernel_has_these_parameters(place):
    """A file may have a kernel twice, for two cases of a macro."""
    kernel = KERNELS[place]
    text = TEXTS[f"{kernel.source}.cu"]
    pattern = rf'extern "C" __global__[^;{{]*?\b{kernel.function}\(([^{{]*?)\)\s*\{{'
    lists = [[field(p, text) for p in found.split(",")] for found in re.findall(pattern, text)]
    assert list(kernel.fields) in lists


def test_every_struct_that_a_kernel_takes_is_mirrored():
    taken = {name for t in TEXTS.values() for name in re.findall(r"__grid_constant__ (\w+)", t)}
    assert taken
    assert taken <= {struct.name for struct in STRUCTS.values()}


def test_every_kernel_with_several_parameters_is_mirrored():
    """All but those of packing, which takes one struct or plain numbers, and of products."""
    mirrored = {(kernel.source, kernel.function) for kernel in KERNELS.values()}
    others = {"smxx_pack", "smxx_unpack", "smxx_sign"}
    for name, text in TEXTS.items():
        source = name.removesuffix(".cu")
        for function in re.findall(r'extern "C" __global__[^;{]*?\b(\w+)\([^{(]*?\)\s*\{', text):
            if source not in others and function != "xnor_gemm":
                assert (source, function) in mirrored


MIXED = Struct("Mixed", "ptr x; int a; double b; u32 c")


def test_values_are_packed_by_name_with_the_padding_of_c():
    array = SimpleNamespace(data=SimpleNamespace(ptr=0x1122))
    want = np.zeros(1, np.dtype([("x", "u8"), ("a", "i4"), ("b", "f8"), ("c", "u4")], align=True))
    want[0] = (0x1122, -5, 0.1, 2**32 - 1)
    assert MIXED.pack(b=0.1, c=2**32 - 1, a=-5, x=array) == want.tobytes()
    assert MIXED.pack(b=1, c=True, a=np.int64(3), x=None)[:12] == b"\0" * 8 + b"\3\0\0\0"


def test_seeds_are_taken_modulo_2_to_the_64():
    seed = Struct("Seed", "u64 seed; i64 offset")
    assert seed.pack(seed=-1, offset=-2) == b"\xff" * 8 + b"\xfe" + b"\xff" * 7


def test_a_field_that_is_missing_or_unknown_is_named():
    with pytest.raises(TypeError, match=r"struct Mixed lacks \['c'\] and does not know \['d'\]"):
        MIXED.pack(x=0, a=1, b=2, d=3)
    kernel = Kernel("smxx_sign", "sign", "ptr x, out; i64 count")
    with pytest.raises(TypeError, match=r"sign lacks \['count'\] and does not know \[\]"):
        kernel.arguments(x=1, out=2)


def test_arguments_have_the_types_of_the_parameters():
    outer = Kernel("file", "f", "Mixed m; ptr p; i64 i; u32 u; float f; int n; Mixed again", MIXED)
    packed = MIXED.pack(x=1, a=2, b=3, c=4)
    m, *rest, again = outer.arguments(m=packed, p=None, i=-1, u=7, f=0.5, n=True, again="kept")
    assert m.tobytes() == packed
    assert again == "kept"  # what is no bytes is an argument already
    types = [np.uint64, np.int64, np.uint32, np.float32, np.int32]
    assert [type(x) for x in rest] == types
    assert rest == [0, -1, 7, 0.5, 1]


def test_a_section_packs_neighbours_and_refuses_what_has_padding():
    numbers = Struct("Numbers", "ptr a, b; i64 c, d")
    section = numbers.section("b", "c")
    assert section.fields.pack(1, -1) == b"\1" + b"\0" * 7 + b"\xff" * 8
    assert (section.offset, section.within(32).offset) == (8, 40)
    assert (
        Struct("Outer", "int n; double d; Numbers m; ptr p", numbers).section("p", "p").offset == 48
    )
    with pytest.raises(AssertionError, match="padding"):
        MIXED.section("x", "b")
