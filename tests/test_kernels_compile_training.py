"""The kernels of the fused training step compile for every architecture and keep to registers."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_kernels_compile
from kernel_compiler import compile_cubin
from test_kernels_compile import ARCHITECTURES, capability, require

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
#: Types of products that are read alike: for these one choice is enough.
MORE_LAYERS = [{"PRODUCT": p, "NORM": 1, "DROP": 0} for p in ("short", "bfloat16_bits")]
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


def strips(arch: str, *vectors: int) -> list[dict]:
    """Ways to walk a layer: with clusters where the architecture has them, and without."""
    # Blocks of a cluster, and rows of a thread that are held.
    ways = ((1, 0), (8, 0), (16, 32)) if capability(arch) >= 90 else ((1, 0),)
    return [
        {"VECTOR": vector, "COLS": 32, "CLUSTER": cluster, "HELD": held}
        for vector in vectors
        for cluster, held in ways
        if vector > 1 or not held  # single elements of 16 bits cannot be held
    ]


def few_rows(arch: str) -> list[dict]:
    """Walk a layer of few rows: fewer than are usually loaded together."""
    few = {"VECTOR": 4, "COLS": 32, "CLUSTER": 8, "HELD": 2}
    return [few] if capability(arch) >= 90 else []


def many_rows(arch: str) -> list[dict]:
    """Walk a layer of many rows: with more threads."""
    many = {"VECTOR": 4, "COLS": 32, "CLUSTER": 16, "HELD": 8, "BLOCK_WARPS": 16}
    return [many] if capability(arch) >= 90 else []


def with_passes(arch: str, choices: list[dict]) -> list[dict]:
    """Combine layers with choices; without batch norm there are no sums, and nothing is held."""
    more = variants(arch, MORE_LAYERS, choices[0], choices[-1])
    return [v for v in variants(arch, LAYERS, *choices) + more if v["NORM"] or not v["HELD"]]


def test_batch(arch):
    require(arch)
    choices = [{"VECTOR": v, "DROP": d} for v in (1, 4, 16) for d in (0, 1)]
    compile_all("smxx_batch", arch, variants(arch, [{}], *choices))


def test_activation(arch):
    require(arch)
    kinds = [{"OUTPUT": o, "GATE": g} for o, g in ((0, 1), (0, 0), (1, 1), (2, 1), (3, 0), (4, 1))]
    choices = [
        {**k, **s} for k, s in itertools.product(kinds, [*strips(arch, 4), *many_rows(arch)])
    ]
    choices += [{"OUTPUT": 0, "GATE": 1, **s} for s in [*strips(arch, 1), *few_rows(arch)]]
    # Of a layer without batch norm whose activations are not wanted there is nothing to compile.
    wanted = [v for v in with_passes(arch, choices) if v["NORM"] or v["OUTPUT"] != 3]
    compile_all("smxx_activation", arch, wanted)


def test_activation_gradient(arch):
    require(arch)
    kinds = [{"GATE": 0}, {"GATE": 1}, {"GATE": 2}]
    choices = [
        {**k, **s} for k, s in itertools.product(kinds, [*strips(arch, 4), *many_rows(arch)])
    ]
    choices += [{"GATE": 1, **s} for s in [*strips(arch, 1), *few_rows(arch)]]
    compile_all("smxx_activation_gradient", arch, with_passes(arch, choices))


def test_head(arch):
    require(arch)
    kinds = [{"HEAD": h, "LOSS": loss, "CLASSES": 10} for h, loss in ((0, 0), (1, 0), (2, 1))]
    logits = [{"VECTOR": v, "ROWS": rows} for v, rows in ((4, 4), (4, 1), (1, 1))]
    back = [{"GATE": 1, **s} for s in strips(arch, 2, 1)]
    choices = [{**k, **c} for k, c in itertools.product(kinds, logits + back)]
    choices += [{"HEAD": 2, "LOSS": 0, "CLASSES": 32, "GATE": 2, **s} for s in strips(arch, 1)]
    choices += [{"HEAD": 0, "LOSS": 0, "CLASSES": 20, "GATE": 0, **s} for s in strips(arch, 1)]
    choices = [{"OUTPUT_NORM": 0, **c} for c in choices]
    choices += [{**c, "OUTPUT_NORM": 1} for c in choices if c["HEAD"] == 2]
    compile_all("smxx_head", arch, variants(arch, LAYERS[:4:3], *choices))


def test_output_norm(arch):
    require(arch)
    # 32 classes spill, in a kernel that takes microseconds.
    choices = [{"CLASSES": c, "LOSS": loss} for c in (2, 10, 20) for loss in (0, 1)]
    compile_all("smxx_output_norm", arch, variants(arch, [{}], *choices))


def test_adam(arch):
    require(arch)
    choices = [{"PENALTY": p, "WRITE_GRADIENT": w} for p, w in ((0, 0), (1, 1), (2, 0))]
    compile_all("smxx_adam", arch, variants(arch, [{}], *choices))


def test_unpack_signs(arch):
    require(arch)
    compile_all(
        "smxx_unpack_signs", arch, variants(arch, [{}], *({"VECTOR": v} for v in (8, 4, 2, 1)))
    )


def test_sign_gemm(arch):
    require(arch)
    if arch != "sm_90a":
        pytest.skip("of Hopper alone")
    kinds = itertools.product((0, 1, 2), (0, 1))
    updates = [{"RESULT": 1, "PENALTY": p, "WRITE_GRADIENT": w} for p, w in kinds]
    choices = [{"RESULT": 0, "PENALTY": 0, "WRITE_GRADIENT": 0}, *updates]
    # Strictly: what does not fit the registers waits for each instruction of the tensor cores.
    test_kernels_compile.compile_all("sm90_sign_gemm", arch, choices)
