"""The kernels of the fused training step compile for every architecture and keep to registers."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_kernels_compile import ARCHITECTURES, require

from cupybnn.backends.cuda.compiler import compile_cubin

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


def compile_all(source: str, arch: str, variants: list[dict]) -> None:
    """Compile each variant; check that what it spills is no more than some addresses.

    These kernels wait for memory. An address that ptxas sets aside over a loop costs nothing; an
    array of numbers would.
    """

    def one(defines: dict) -> str:
        try:
            _, used = compile_cubin(source, arch, defines)
        except RuntimeError as error:
            return f"{defines}: " + "\n".join(str(error).splitlines()[:3])
        assert used.registers
        return f"{defines}: {used}" if used.spill_bytes > 32 or used.stack_bytes > 32 else ""

    with ThreadPoolExecutor(2) as pool:
        problems = [problem for problem in pool.map(one, variants) if problem]
    assert not problems, "\n".join(problems)


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
    kinds = [{"RELU": r, "LOSS": loss, "CLASSES": 10} for r, loss in ((0, 0), (1, 0), (0, 1))]
    logits = [{"VECTOR": v, "ROWS": rows} for v, rows in ((4, 4), (4, 1), (1, 2))]
    back = [{"VECTOR": v} for v in (1, 2)]
    choices = [{**k, **c} for k, c in itertools.product(kinds, logits + back)]
    compile_all("smxx_head", arch, variants(arch, LAYERS[:4:3], *choices))


def test_adam(arch):
    require(arch)
    choices = [{"PENALTY": p, "WRITE_GRADIENT": w} for p, w in ((0, 0), (1, 1), (2, 0))]
    compile_all("smxx_adam", arch, variants(arch, [{}], *choices))


def test_unpack_rows(arch):
    require(arch)
    compile_all("smxx_unpack_rows", arch, variants(arch, [{}], {"VECTOR": 8}, {"VECTOR": 1}))
