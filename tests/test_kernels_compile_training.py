"""The kernels of the fused training step compile for every architecture, without spills."""

from __future__ import annotations

import itertools

import pytest
from test_kernels_compile import ARCHITECTURES, compile_all, require

REALS = ("float", "bfloat16_bits")
#: What a layer may be: type of its product, batch norm, dropout.
LAYERS = [
    {"PRODUCT": product, "NORM": norm, "DROP": drop}
    for product, norm, drop in (
        ("float", 1, 0),
        ("float16_bits", 1, 0),
        ("float", 0, 0),
        ("float", 1, 1),
        ("float16_bits", 0, 1),
        ("float", 1, 2),
    )
]
pytestmark = pytest.mark.parametrize("arch", ARCHITECTURES)


def variants(arch: str, layers: list[dict], *choices: dict) -> list[dict]:
    """Combine them all on Hopper, and a part, with the first layer, elsewhere."""
    layers = layers if arch == "sm_90a" else layers[:1]
    reals = REALS if arch == "sm_90a" else REALS[1:]
    return [
        {"REAL": real, **layer, **choice}
        for real, layer, choice in itertools.product(reals, layers, choices)
    ]


def test_batch(arch):
    require(arch)
    choices = [{"VECTOR": v, "DROP": d} for v in (1, 4) for d in (0, 1)]
    compile_all("smxx_batch", arch, variants(arch, [{}], *choices))


def test_activation(arch):
    require(arch)
    choices = [
        {"VECTOR": vector, "OUTPUT": output, "GATE": gate, "ROWS": rows, "PARTS": parts}
        for vector, output, gate, rows, parts in (
            (4, 0, 1, 4, 1),
            (4, 0, 1, 1, 4),
            (1, 0, 0, 1, 8),
            (4, 1, 1, 4, 2),
            (4, 2, 1, 1, 2),
        )
    ]
    compile_all("smxx_activation", arch, variants(arch, LAYERS, *choices))


def test_activation_gradient(arch):
    require(arch)
    choices = [{"VECTOR": v, "GATE": g} for v, g in ((4, 1), (1, 1), (1, 0), (4, 2))]
    compile_all("smxx_activation_gradient", arch, variants(arch, LAYERS, *choices))


def test_head(arch):
    require(arch)
    choices = [
        {"VECTOR": vector, "ROWS": rows, "RELU": relu, "LOSS": loss, "CLASSES": classes}
        for vector, rows, relu, loss, classes in (
            (4, 4, 0, 0, 10),
            (1, 1, 1, 0, 10),
            (2, 2, 0, 1, 10),
        )
    ]
    compile_all("smxx_head", arch, variants(arch, LAYERS[:4:3], *choices))


def test_adam(arch):
    require(arch)
    choices = [{"PENALTY": p, "WRITE_GRADIENT": w} for p, w in ((0, 0), (1, 1), (2, 0))]
    compile_all("smxx_adam", arch, variants(arch, [{}], *choices))


def test_unpack_rows(arch):
    require(arch)
    compile_all("smxx_unpack_rows", arch, variants(arch, [{}], {"VECTOR": 8}, {"VECTOR": 1}))
