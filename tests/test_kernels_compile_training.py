"""The kernels of the fused training step compile for every architecture and keep to registers."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import test_kernels_compile
from covering import covering
from kernel_compiler import compile_cubin, compile_ptx
from test_kernels_compile import ARCHITECTURES, capability, require, share

pytestmark = pytest.mark.slow

REALS = ("float", "bfloat16_bits")
#: For choices that leave a kernel without an element of that type: compiled once.
NO_REAL = {"REAL": "bfloat16_bits"}
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
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def variants(arch: str, layer: dict, *choices: dict) -> list[dict]:
    """Combine a layer and choices with both types of elements on Hopper, and with one elsewhere."""
    reals = REALS if arch == "sm_90a" else REALS[1:]
    combined = [
        {"REAL": real, **layer, **choice} for real, choice in itertools.product(reals, choices)
    ]
    return [v for i, v in enumerate(combined) if v not in combined[:i]]


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
    # Columns of a strip, blocks of a cluster, rows of a thread that are held, and whether every
    # thread has that many.
    ways = [(32, 1, 0, 0), (128, 1, 0, 0), (128, 1, 0, 1)]
    if capability(arch) >= 90:
        ways += [(32, 8, 0, 0), (32, 16, 32, 0), (32, 16, 16, 1)]
    return [
        {"VECTOR": vector, "COLS": cols, "CLUSTER": cluster, "HELD": held, "WHOLE": whole}
        for vector in vectors
        for cols, cluster, held, whole in ways
        if vector > 1 or not held  # single elements of 16 bits cannot be held
        if vector == 4 or cols == 32
    ]


def few_rows(arch: str) -> list[dict]:
    """Walk a layer of few rows: fewer than are usually loaded together."""
    few = {"VECTOR": 4, "COLS": 32, "CLUSTER": 8, "HELD": 2}
    return [few] if capability(arch) >= 90 else []


def many_rows(arch: str) -> list[dict]:
    """Walk a layer of many rows: with more threads."""
    many = {"VECTOR": 4, "COLS": 32, "CLUSTER": 16, "HELD": 8, "BLOCK_WARPS": 16}
    return [many] if capability(arch) >= 90 else []


def of_layer(arch: str, layer: dict, choices: list[dict]) -> list[dict]:
    """Combine a layer with the choices that a launch may make for it."""
    if layer in MORE_LAYERS:
        choices = [choices[0], choices[-1]]
    # Without batch norm there are no sums over rows: nothing is held, and no blocks form clusters.
    return [v for v in variants(arch, layer, *choices) if v["NORM"] or v.get("CLUSTER", 1) == 1]


def to_compile(arch: str, every: list[dict]) -> list[dict]:
    """Choose variants that stand for all.

    Every pair of two parameters' values on Hopper, which has code of its own for clusters. Each
    value on the oldest architecture, which converts and clamps numbers in its own way. Others
    compile no other code, and share each value. See `test_code_that_depends_on_the_architecture`.
    """
    together = ("PRODUCT", "NORM", "DROP", "HEAD", "LOSS")
    return share(arch, covering(every, together=together, pairs=arch == "sm_90a"))


@every_architecture
def test_batch(arch):
    require(arch)
    choices = [{"VECTOR": v, "DROP": d} for v in (1, 4, 8) for d in (0, 1)]
    compile_all("smxx_batch", arch, to_compile(arch, variants(arch, {}, *choices)))


def activations(arch: str, layer: dict) -> list[dict]:
    """Return every variant of smxx_activation for a layer."""
    kinds = [{"OUTPUT": o, "GATE": g} for o, g in ((0, 1), (0, 0), (1, 1), (2, 1), (3, 0), (4, 1))]
    choices = [
        {**k, **s} for k, s in itertools.product(kinds, [*strips(arch, 4), *many_rows(arch)])
    ]
    choices += [{"OUTPUT": 0, "GATE": 1, **s} for s in [*strips(arch, 1), *few_rows(arch)]]
    # Of a batch that several ranks have together; they form no clusters.
    choices += [{**k, **strips(arch, 4)[0], "SHARED_BATCH": 1} for k in kinds[:2]]
    # Nothing dense is written of signs that are only packed, or of batch norm's statistics.
    choices = [{**c, **NO_REAL} if c["OUTPUT"] in (0, 3) else c for c in choices]
    # Of a layer without batch norm whose activations are not wanted there is nothing to compile.
    wanted = [v for v in of_layer(arch, layer, choices) if v["NORM"] or v["OUTPUT"] != 3]
    # Dropout follows a ReLU, and comes before a sign.
    never = {1: (2,), 2: (0, 1, 4)}.get(layer["DROP"], ())
    return [v for v in wanted if v["OUTPUT"] not in never]


def gradients(arch: str, layer: dict) -> list[dict]:
    """Return every variant of smxx_activation_gradient for a layer."""
    gates = (1,) if layer["DROP"] == 2 else (0, 1, 2)  # dropout after a ReLU, which has a mask
    kinds = [{"GATE": gate} for gate in gates]
    choices = [
        {**k, **s} for k, s in itertools.product(kinds, [*strips(arch, 4), *many_rows(arch)])
    ]
    choices += [{"GATE": 1, **s} for s in [*strips(arch, 1), *few_rows(arch)]]
    # Of a gradient that will be rounded.
    choices += [{"GATE": 1, "GREATEST": 1, **s} for s in strips(arch, 4, 1) if s["CLUSTER"] == 1]
    return of_layer(arch, layer, choices)


def heads(arch: str, layer: dict) -> list[dict]:
    """Return every variant of smxx_head behind a layer."""
    kinds = [{"HEAD": h, "LOSS": loss, "CLASSES": 10} for h, loss in ((0, 0), (1, 0), (2, 1))]
    logits = [{"VECTOR": v, "ROWS": rows, **NO_REAL} for v, rows in ((4, 4), (4, 1), (1, 1))]
    back = [{"GATE": 1, **s} for s in strips(arch, 2, 1)]
    choices = [{**k, **c} for k, c in itertools.product(kinds, logits + back)]
    choices += [{"HEAD": 2, "LOSS": 0, "CLASSES": 32, "GATE": 2, **s} for s in strips(arch, 1)]
    choices += [{"HEAD": 0, "LOSS": 0, "CLASSES": 20, "GATE": 0, **s} for s in strips(arch, 1)]
    # Without clusters, strips that are whole have fewer sums: see LINEAR.
    choices += [
        {"HEAD": 0, "LOSS": 0, "CLASSES": 10, "GATE": 0, "CLUSTER": 1, "HELD": 0, "WHOLE": 1, **s}
        for s in (
            {"VECTOR": 4, "COLS": 64},
            {"VECTOR": 4, "COLS": 64, "GREATEST": 1},
            {"VECTOR": 2, "COLS": 32},
        )
    ]
    # In clusters, wider.
    choices += [
        {"HEAD": 0, "LOSS": 0, "CLASSES": classes, "GATE": 0, **s}
        for classes, vector in ((10, 4), (20, 2), (32, 2))
        for s in strips(arch, vector)
        if s["CLUSTER"] > 1
    ]
    # Dropout follows a ReLU, and comes before anything else.
    after = {0: (0, 1, 2), 1: (0, 2), 2: (1,)}[layer["DROP"]]
    choices = [{"OUTPUT_NORM": 0, **c} for c in choices if c["HEAD"] in after]
    choices += [{**c, "OUTPUT_NORM": 1} for c in choices if c["HEAD"] == 2]
    choices += [
        {**c, "LOSS": loss, "SOFT": 1}
        for c in choices
        if c.get("ROWS") == 4 and not c["OUTPUT_NORM"]
        for loss in (0, 2)
    ]
    return of_layer(arch, layer, choices)


#: What each kernel of a layer may be compiled as, and the layers.
OF_LAYERS = {
    "smxx_activation": (activations, LAYERS + MORE_LAYERS),
    "smxx_activation_gradient": (gradients, LAYERS + MORE_LAYERS),
    "smxx_head": (heads, [LAYERS[0], LAYERS[3], LAYERS[5]]),
}
#: All of the layers on Hopper, one at a time to share the work, and the first elsewhere.
LAYER_CASES = [
    (kernel, arch, layer)
    for kernel, (_, layers) in OF_LAYERS.items()
    for arch in ARCHITECTURES
    for layer in (layers if arch == "sm_90a" else layers[:1])
]


@cache
def of_all_layers(kernel: str, arch: str) -> list[dict]:
    """Return variants that stand for those of all layers."""
    of_one, _ = OF_LAYERS[kernel]
    layers = [layer for k, a, layer in LAYER_CASES if (k, a) == (kernel, arch)]
    return to_compile(arch, [v for layer in layers for v in of_one(arch, layer)])


@pytest.mark.parametrize(
    ("kernel", "arch", "layer"),
    LAYER_CASES,
    ids=["-".join([k, a, *map(str, layer.values())]) for k, a, layer in LAYER_CASES],
)
def test_kernels_of_a_layer(kernel, arch, layer):
    """Compile what stands for all variants; see `to_compile`."""
    require(arch)
    compile_all(
        kernel, arch, [v for v in of_all_layers(kernel, arch) if layer.items() <= v.items()]
    )


def test_logits_of_16_bit_products():
    """They are to fit half of the registers."""
    require("sm_90a")
    layers = [{"PRODUCT": p, "NORM": 1, "DROP": 0} for p in ("float16_bits", "short")]
    kinds = [{"HEAD": h, "LOSS": h // 2, "CLASSES": 10, "OUTPUT_NORM": 0} for h in (0, 2)]
    compile_all(
        "smxx_head",
        "sm_90a",
        [{**NO_REAL, **a, **b, "VECTOR": 4, "ROWS": 4} for a in layers for b in kinds],
    )


@every_architecture
def test_output_norm(arch):
    require(arch)
    # 32 classes spill, in a kernel that takes microseconds.
    kinds = itertools.product((2, 10, 20), (0, 1))
    choices = [{"CLASSES": c, "LOSS": loss, **NO_REAL} for c, loss in kinds]
    choices += [{"CLASSES": 10, "LOSS": loss, "SOFT": 1, **NO_REAL} for loss in (0, 1, 2)]
    choices += [{"CLASSES": 10, "LOSS": 0, "PART": part, **NO_REAL} for part in (1, 2, 3)]
    compile_all("smxx_output_norm", arch, to_compile(arch, variants(arch, {}, *choices)))


@every_architecture
def test_virtual(arch):
    require(arch)
    choices = [{"DIRECTION": d, "DROP": drop} for d in (0, 1, 2) for drop in (0, 1)]
    compile_all("smxx_virtual", arch, to_compile(arch, variants(arch, {}, *choices)))


@every_architecture
def test_neighbors(arch):
    require(arch)
    choices = [{"VECTOR": v, "DIGITS": 20, **NO_REAL} for v in (1, 4)]
    compile_all("smxx_neighbors", arch, to_compile(arch, variants(arch, {}, *choices)))


@every_architecture
def test_teacher(arch):
    require(arch)
    choices = [{"KIND": kind, "CLASSES": classes} for kind, classes in ((0, 2), (1, 10), (2, 20))]
    compile_all("smxx_teacher", arch, to_compile(arch, variants(arch, {}, *choices)))


@every_architecture
def test_adam(arch):
    require(arch)
    choices = [{"PENALTY": p, "WRITE_GRADIENT": w} for p, w in ((0, 0), (1, 1), (2, 0))]
    choices += [
        {"PENALTY": p, "WRITE_GRADIENT": w, "RANKS": n}
        for p, w, n in ((0, 0, 1), (0, 0, 2), (2, 1, 3), (0, 0, 4), (1, 0, 8))
    ]
    compile_all("smxx_adam", arch, to_compile(arch, variants(arch, {}, *choices)))


@every_architecture
def test_unpack_signs(arch):
    require(arch)
    choices = [{"VECTOR": v} for v in (8, 4, 2, 1)]
    compile_all("smxx_unpack_signs", arch, to_compile(arch, variants(arch, {}, *choices)))


@every_architecture
def test_gathered_signs(arch):
    require(arch)
    compile_all("smxx_gathered_signs", arch, variants(arch, {}, {}))


@every_architecture
def test_part_sum(arch):
    require(arch)
    compile_all("smxx_part_sum", arch, to_compile(arch, variants(arch, {}, {})))


@every_architecture
def test_peers(arch):
    require(arch)
    choices = [(kind, size) for kind in range(3) for size in (1, 2, 3, 8)]
    every = [{"KIND": kind, "RANKS": size, **NO_REAL} for kind, size in choices]
    compile_all("smxx_peers", arch, to_compile(arch, every))


def test_sign_gemm():
    arch = "sm_90a"  # it is for Hopper alone
    require(arch)
    updates = [
        {"RESULT": 1, "PENALTY": p, "WRITE_GRADIENT": w, "GATED": int(p != 2)}
        for p, w in ((0, 0), (1, 1), (2, 0), (2, 1))
    ]
    stored = [{"RESULT": r, "PENALTY": 0, "WRITE_GRADIENT": 0} for r in (0, 2)]
    kinds = (("short", 1), ("float16_bits", 0), ("float", 2))
    summed = [
        {**stored[0], "SUMS": 1, "PRODUCT": p, "GATE": gate, "NORM": 1, "DROP": 0}
        for p, gate in kinds
    ]
    choices = [*stored, *updates, *summed]
    # Strictly: what does not fit the registers waits for each instruction of the tensor cores.
    test_kernels_compile.compile_all("sm90_sign_gemm", arch, choices)


@pytest.mark.parametrize(
    ("source", "choices", "unread"),
    [
        ("smxx_activation", {"OUTPUT": 0, "GATE": 1, "CLUSTER": 8, "HELD": 0}, "REAL"),
        ("smxx_activation", {"OUTPUT": 3, "GATE": 0, "CLUSTER": 8, "HELD": 0}, "REAL"),
        ("smxx_activation", {"OUTPUT": 2, "GATE": 1, "CLUSTER": 1, "HELD": 0}, "CLUSTER"),
        ("smxx_activation_gradient", {"GATE": 1, "CLUSTER": 1, "HELD": 0}, "CLUSTER"),
        ("smxx_head", {"HEAD": 1, "LOSS": 0, "CLASSES": 10, "OUTPUT_NORM": 0, "ROWS": 1}, "REAL"),
        ("smxx_head", {"HEAD": 2, "LOSS": 1, "CLASSES": 10, "OUTPUT_NORM": 1, "ROWS": 1}, "REAL"),
        ("smxx_output_norm", {"CLASSES": 2, "LOSS": 1}, "REAL"),
    ],
)
def test_what_is_compiled_once_is_the_same_code(source, choices, unread):
    require("sm_90a")
    norm = int(unread == "REAL")
    usual = {"REAL": "float", "PRODUCT": "float", "NORM": norm, "DROP": 0, "VECTOR": 1, "COLS": 32}
    one = {**usual, **choices}
    other = {**one, unread: {"REAL": "bfloat16_bits", "CLUSTER": 8}[unread]}
    assert compile_ptx(source, "sm_90a", one) == compile_ptx(source, "sm_90a", other)
