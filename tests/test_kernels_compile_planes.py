"""The kernels of bit planes compile for every architecture; the hot ones use registers alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from kernel_compiler import compile_cubin
from test_kernels_compile import ARCHITECTURES, require

from cupybnn.backends.cuda.architectures import sm75, sm80, sm90, smxx
from cupybnn.backends.cuda.configs import Config, Problem

pytestmark = pytest.mark.slow

HOPPER = "sm_90a"
INT32, BFLOAT16, PACKED = 0, 3, 4  # OUTPUT_* of product.cuh


def check(variants: list[tuple[str, str, dict]], *, spills: int = 0) -> None:
    """Compile (source, architecture, defines), and check that at most so many bytes are spilled."""
    for _, arch, _ in variants:
        require(arch)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda variant: compile_cubin(*variant)[1], variants))
    for variant, used in zip(variants, found, strict=True):
        assert used.registers, variant
        assert used.spill_bytes <= spills, (variant, used)
        assert not used.serialized_wgmma, variant


def chosen(kernel: object, capability: int) -> list[Config]:
    """The configurations that a kernel's table chooses for several planes, each once."""
    sizes = ((1, 4096, 4096), (64, 64, 512), (300, 300, 3000), (4096, 64, 1024), (1500, 1500, 1024),
             (2048, 2048, 2048), (8192, 8192, 8192), (4096, 16384, 16384))  # fmt: skip
    found = {}
    for m, n, k in sizes:
        problem = Problem(m=m, n=n, k=k, planes=4, capability=capability, multiprocessors=132)
        config = kernel.choose(problem)
        found[config.defines, config.swap] = config
    return list(found.values())


@pytest.mark.parametrize(
    ("kernel", "arch"),
    [("sm90", HOPPER), ("sm80", "sm_80"), ("sm75", "sm_75"), ("smxx", "sm_75"), ("smxx", "sm_120")],
)
def test_products(kernel, arch):
    module = {"sm90": sm90, "sm80": sm80, "sm75": sm75, "smxx": smxx}[kernel]
    configs = chosen(module, int(arch.removeprefix("sm_").removesuffix("a")))
    kinds = [(4, 0, 0, INT32, 0), (3, 1, 1, PACKED, 0), (8, 1, 0, BFLOAT16, 1), (1, 0, 1, INT32, 0)]
    variants = []
    for number, config in enumerate(configs):
        for planes, of_b, unsigned, output, scaled in kinds if number == 0 else kinds[:1]:
            if output == PACKED and config.swap:
                continue
            values = {"PLANES": planes, "PLANES_OF_B": of_b, "UNSIGNED": unsigned}
            kind = {"OUTPUT": output, "SCALED": scaled}
            variants.append(
                (f"{kernel}_xnor_gemm", arch, {**dict(config.defines), **values, **kind})
            )
    check(variants)


@pytest.mark.parametrize("result", [0, 1])
def test_the_backward_pass_on_hopper(result):
    kinds = [(1, 2, 0), (4, 0, 0), (8, 1, 1)] if result else [(1, 0, 0), (4, 0, 0)]
    variants = [
        ("sm90_plane_gemm", HOPPER,
         {"RESULT": result, "PLANES": p, "PENALTY": penalty, "WRITE_GRADIENT": keep})
        for p, penalty, keep in kinds
    ]  # fmt: skip
    check(variants)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packing(arch):
    variants = [("smxx_gradient_levels", arch, {"PLANES": 4, "REAL": "bfloat16_bits", "OFFSET": 0})]
    if arch not in ("sm_75", HOPPER):  # nothing else depends on the architecture
        check(variants)
        return
    variants += [
        ("smxx_turn", arch, {}),
        ("smxx_unpack_planes", arch, {"PLANES": 4, "UNSIGNED": 0}),
    ]
    for offset in (0, 3) if arch == HOPPER else (3,):  # of a part of a batch
        choice = {"PLANES": 8, "REAL": "float", "OFFSET": offset}
        variants.append(("smxx_gradient_levels", arch, choice))
    kinds = ("float", "bool", "double", "unsigned long long")
    for number, kind in enumerate(kinds):
        defines = {"PLANES": 2 + number, "TYPE": kind, "UNSIGNED": number % 2}
        variants.append(("smxx_pack_planes", arch, defines))
    check(variants, spills=8)
