"""Every CUDA kernel compiles for every architecture it is meant for, and keeps to its registers.

NVRTC, which comes with CuPy's wheels, needs no GPU for this.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
from covering import covering
from kernel_compiler import compile_cubin

from cupybnn.backends.cuda import architectures, dispatch, packing
from cupybnn.backends.cuda.architectures import sm80
from cupybnn.backends.cuda.configs import Problem
from cupybnn.backends.cuda.sources import kernel_names, kernels_dir
from cupybnn.benchmark import tuning

pytestmark = pytest.mark.slow

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")

#: Architectures for which a kernel of any architecture is the same code: only what the assembler
#: makes of it differs. See `test_code_that_depends_on_the_architecture`.
ALIKE = ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120")

#: Products of every kind the dispatch tells apart, (m, n, k): few rows, few columns, few tiles with
#: a short and a long K, up to large ones.
SHAPES = [
    *((m, n, k) for m, n, k, _ in tuning.SHAPES),
    *((size, size, k) for size in (65, 256, 768, 1024, 1500, 3000) for k in (100, 2048, 20000)),
    *((few, 4096, k) for few in (1, 8, 9, 17, 33, 64) for k in (1000, 2048, 4096, 9000)),
    *((4096, few, k) for few in (1, 8, 9, 17, 33, 64) for k in (1000, 2048, 4096, 9000)),
    *((few, few, 100_000) for few in (1, 16, 64)),
]
INT32, FLOAT32, FLOAT16, BFLOAT16, PACKED, INT16 = range(6)  # OUTPUT_* of product.cuh
NAMES = ("int32", "float32", "float16", "bfloat16", "packed", "int16")
#: Results that are written alike, but for the conversion of a number.
KINDS = ("4 bytes", "4 bytes", "2 bytes", "2 bytes", "packed", "2 bytes")
#: (OUTPUT, SCALED)
EVERY_RESULT = [(o, s) for o in (INT32, FLOAT32, FLOAT16, BFLOAT16) for s in (0, 1)]
EVERY_RESULT += [(PACKED, 0), (INT16, 0)]
SOME_RESULTS = [(FLOAT32, 1), (PACKED, 0)]  # what needs most registers, and another way to write


def capability(arch: str) -> int:
    return int(arch.removeprefix("sm_").removesuffix("a"))


def known_architectures() -> set[int]:
    """Compute capabilities that the installed NVRTC compiles for."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from cupy.cuda import nvrtc

    try:
        return set(nvrtc.getSupportedArchs())
    except Exception as error:  # CuPy is here without the library, which its extra [ctk] brings
        pytest.skip(f"NVRTC is not installed: {error}")


def require(arch: str) -> None:
    known = known_architectures()
    if capability(arch) not in known:
        pytest.skip(f"this NVRTC compiles for {sorted(known)} only")


def most_shared_bytes(arch: str) -> int:
    """Bytes of shared memory that a block may have (CUDA C++ Programming Guide, technical
    specifications)."""
    kib = {"sm_75": 64, "sm_80": 163, "sm_90a": 227, "sm_100": 227}
    return 1024 * kib.get(arch, 99)


def share(arch: str, variants: list[dict]) -> list[dict]:
    """Return what is to be compiled for an architecture: those of one code divide it up."""
    if arch not in ALIKE:
        return variants
    return variants[ALIKE.index(arch) :: len(ALIKE)] or variants[:1]


def compile_all(
    source: str,
    arch: str,
    variants: list[dict],
    *,
    spills: bool = False,
    asked: list[int] | None = None,
) -> None:
    """Compile each variant; unless `spills`, check that it uses registers alone.

    `asked` are the bytes of shared memory that a launch of each variant asks for: with those that
    the kernel declares they must fit the architecture.
    """

    def one(defines: dict, shared: int) -> str:
        try:
            cubin, used = compile_cubin(source, arch, defines)
        except RuntimeError as error:
            return f"{defines}: " + "\n".join(str(error).splitlines()[:3])
        problems = []
        if not cubin.startswith(b"\x7fELF"):
            problems.append("no cubin")
        if used.registers == 0:
            problems.append("ptxas did not say how many registers it uses")
        if not spills and (used.spill_bytes or used.stack_bytes):
            problems.append(f"{used.spill_bytes} bytes spilled, {used.stack_bytes} bytes of stack")
        if used.shared_bytes + shared > most_shared_bytes(arch):
            problems.append(f"{used.shared_bytes} + {shared} bytes of shared memory")
        if used.serialized_wgmma:
            problems.append("wgmma serialised")
        return f"{defines}: {'; '.join(problems)}" if problems else ""

    assert variants
    asked = asked or [0] * len(variants)
    with ThreadPoolExecutor(2) as pool:
        problems = [problem for problem in pool.map(one, variants, asked) if problem]
    assert not problems, "\n".join(problems)


def problem_of(arch: str, shape: tuple[int, int, int], **kind: bool) -> Problem:
    m, n, k = shape
    return Problem(m=m, n=n, k=k, **kind, capability=capability(arch), multiprocessors=132)


def runs_on(kernel: str, arch: str) -> bool:
    return kernel in architectures.kernels_for(capability(arch))


PRODUCTS = [(k, a) for k in architectures.KERNELS for a in ARCHITECTURES if runs_on(k, a)]


def home_of(kernel: str) -> str:
    """Return the oldest architecture that a kernel runs on: there, more is compiled."""
    return next(a for a in ARCHITECTURES if runs_on(kernel, a))


def results_of(kernel: str, arch: str) -> list[tuple[int, int]]:
    return EVERY_RESULT if arch == home_of(kernel) else SOME_RESULTS


def chosen_by_table(kernel: str, arch: str, output: int, scaled: int) -> dict[tuple, int]:
    """Return what products of every shape define, for one kind of result, and how many bytes of
    shared memory their launches ask for."""
    kind = {"packed": output == PACKED, "scaled": bool(scaled)}
    configs = [dispatch.builtin_config(kernel, problem_of(arch, shape, **kind)) for shape in SHAPES]
    return {config.defines: config.shared_bytes(bool(scaled)) for config in configs}


@cache
def products_to_compile(kernel: str, arch: str) -> list[dict]:
    """Return variants for all that the table chooses for a kernel on an architecture.

    Where more is compiled: each configuration, and each pair of a parameter's value with another's
    or with a kind of result: numbers of one size are one kind, which differ in nothing but their
    conversion. Elsewhere: each configuration, and each kind of result. The code
    differs there in nothing but the compiler's target; see
    `test_code_that_depends_on_the_architecture`.
    """
    every = [
        {**dict(defines), "OUTPUT": output, "SCALED": scaled, "KIND": KINDS[output]}
        for output, scaled in results_of(kernel, arch)
        for defines in sorted(chosen_by_table(kernel, arch, output, scaled))
    ]
    # What needs most registers first, where it makes no difference for the covering.
    every.sort(key=lambda v: (v["OUTPUT"] == FLOAT32, v["SCALED"]), reverse=True)
    parameters = [name for name in every[0] if name not in ("OUTPUT", "SCALED", "KIND")]
    chosen = covering(
        every, together=parameters, unpaired=["OUTPUT"], pairs=arch == home_of(kernel)
    )
    chosen += covering(every, together=("OUTPUT", "SCALED"), pairs=False, covered=chosen)
    return [{k: v for k, v in variant.items() if k != "KIND"} for variant in chosen]


# Each kind of result by itself, to share the work among processes.
RESULTS = [(k, a, *result) for k, a in PRODUCTS for result in results_of(k, a)]


@pytest.mark.parametrize(
    ("kernel", "arch", "output", "scaled"),
    RESULTS,
    ids=[f"{k}-{a}-{NAMES[o]}{'-scaled' * s}" for k, a, o, s in RESULTS],
)
def test_products_that_the_built_in_table_chooses(kernel, arch, output, scaled):
    """Compile what stands for all of them; see `products_to_compile`."""
    require(arch)
    kind = {"OUTPUT": output, "SCALED": scaled}
    variants = [v for v in products_to_compile(kernel, arch) if kind.items() <= v.items()]
    chosen = chosen_by_table(kernel, arch, output, scaled)
    asked = [chosen[tuple(i for i in v.items() if i[0] not in kind)] for v in variants]
    compile_all(f"{kernel}_xnor_gemm", arch, variants, asked=asked)


@pytest.mark.parametrize(("kernel", "arch"), PRODUCTS)
def test_what_is_compiled_stands_for_all_that_the_table_chooses(kernel, arch):
    """Every configuration and every kind of result is among it; at home, every pair of values."""
    compiled = products_to_compile(kernel, arch)
    names = ("OUTPUT", "SCALED")
    found = {tuple(i for i in v.items() if i[0] not in names) for v in compiled}
    results = {tuple(v[name] for name in names) for v in compiled}
    assert results == set(results_of(kernel, arch))
    for output, scaled in results:
        for defines in chosen_by_table(kernel, arch, output, scaled):
            assert defines in found
            if arch == home_of(kernel):
                for item in defines:
                    alike = {o for o in range(len(KINDS)) if KINDS[o] == KINDS[output]}
                    assert any(item in v.items() and v["OUTPUT"] in alike for v in compiled)


TUNED = [(kernel, output) for kernel in architectures.KERNELS for output in (INT32, PACKED)]


@cache
def tuned_to_compile(kernel: str, output: int) -> list[dict]:
    """Return variants that show each value that tuning may choose and the table does not.

    Not each pair of values: a candidate that does not compile is one that tuning leaves out. Nor
    each number of stages, which changes no line of code.
    """
    arch = home_of(kernel)
    problems = [problem_of(arch, shape, packed=output == PACKED) for shape in SHAPES]
    every = {config.defines for p in problems for config in dispatch.candidates(kernel, p)}
    assert every
    kind = {"OUTPUT": output, "SCALED": 0}
    by_stages = [{**dict(defines), **kind} for defines in sorted(every)]
    without = [{k: v for k, v in variant.items() if k != "STAGES"} for variant in by_stages]
    by_table = products_to_compile(kernel, arch)  # each kind of 4 bytes with every value
    if output == PACKED:
        by_table = [v for v in by_table if v["OUTPUT"] == PACKED]
    chosen = covering(without, pairs=False, covered=by_table)
    return [by_stages[without.index(variant)] for variant in chosen]


@pytest.mark.parametrize(
    ("kernel", "output"), TUNED, ids=[f"{kernel}-{NAMES[output]}" for kernel, output in TUNED]
)
def test_products_that_tuning_may_choose(kernel, output):
    require(home_of(kernel))
    source, arch = f"{kernel}_xnor_gemm", home_of(kernel)
    variants = tuned_to_compile(kernel, output)
    # One that spills is a bad choice, which measuring it will show; but it must compile.
    if variants:
        compile_all(source, arch, variants, spills=True)


def test_code_that_depends_on_the_architecture():
    """Only whether it is 8.0 or newer decides in the sources: so two architectures show both.

    And 9.0 in launch.cuh, for packing, which is compiled for all types there and for one elsewhere.
    Whoever adds another condition must have the kernels in question compiled in full there, too.
    """
    folder = kernels_dir()
    paths = (*folder.glob("*.cu"), *folder.glob("include/*.cuh"))
    conditions = {
        (path.name == "launch.cuh", line)
        for path in paths
        for line in path.read_text().splitlines()
        if "_ARCH" in line
    }
    assert conditions == {
        (False, "#if __CUDA_ARCH__ >= 800"),
        (True, "#if __CUDA_ARCH__ >= 900"),
    }
    included = {path.name for path in paths if '"launch.cuh"' in path.read_text()}
    assert included == {"smxx_pack.cu", "sm90_xnor_gemm.cu", "sm90_resident_gemm.cu"}


PACKS = [("float", "float")]
_TYPES = sorted(set(packing.C_TYPES.values()))
PACKS += zip_longest(_TYPES[::2], _TYPES[1::2], fillvalue=_TYPES[0])
PACK_CASES = [
    (arch, pair) for arch in ARCHITECTURES for pair in PACKS if arch == "sm_90a" or pair == PACKS[0]
]


@pytest.mark.parametrize(("arch", "types"), PACK_CASES, ids=str)
def test_pack(arch, types):
    """Compile the code of every type on Hopper, two in one unit, and that of one elsewhere.

    Each operand has code of its own for its type, whatever the other's is; and no line of it
    depends on the architecture.
    """
    require(arch)
    a, b = types
    compile_all("smxx_pack", arch, [{"SAME_TYPE": int(a == b), "TYPE_A": a, "TYPE_B": b}])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_unpack(arch):
    require(arch)
    types = [("float", 1, -1), ("unsigned short", 0x3C00, 0xBC00), ("signed char", 1, -1)]
    types += [("double", 1, -1), ("long long", 1, -1)]
    names = ("TYPE", "ONE", "MINUS_ONE")
    compile_all("smxx_unpack", arch, share(arch, [dict(zip(names, t, strict=True)) for t in types]))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sign(arch):
    require(arch)
    names = ("TYPE", "RESULT", "ONE", "MINUS_ONE")
    types = [("float", "float", 1, -1), ("float16_bits", "unsigned short", 0x3C00, 0xBC00)]
    types += [("double", "double", 1, -1), ("bool", "signed char", 1, -1)]
    compile_all("smxx_sign", arch, share(arch, [dict(zip(names, t, strict=True)) for t in types]))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_random(arch):
    require(arch)
    compile_all("smxx_random", arch, share(arch, [{"UNIFORM": 0}, {"UNIFORM": 1}]))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_order(arch):
    require(arch)
    compile_all("smxx_order", arch, share(arch, [{}]))


def test_architectures_of_one_code_compile_every_variant_between_them():
    variants = [{"VECTOR": i} for i in range(7)]
    shares = [share(arch, variants) for arch in ALIKE]
    assert sorted(v["VECTOR"] for part in shares for v in part) == list(range(7))
    assert all(share(arch, variants[:1]) == variants[:1] for arch in ALIKE)
    for arch in set(ARCHITECTURES).difference(ALIKE):
        assert share(arch, variants) == variants


def test_every_source_is_compiled_by_a_test():
    covered = {f"{kernel}_xnor_gemm" for kernel, _ in PRODUCTS}
    # Kernels of other subjects have tests of their own beside this one.
    texts = [p.read_text() for p in Path(__file__).parent.glob("test_kernels_compile*.py")]
    covered |= {name for name in kernel_names() if any(f'"{name}"' in text for text in texts)}
    assert covered == set(kernel_names())


def test_every_architecture_has_a_kernel_and_hopper_its_own():
    assert {arch for _, arch in PRODUCTS} == set(ARCHITECTURES)
    assert [arch for kernel, arch in PRODUCTS if kernel == "sm90"] == ["sm_90a"]


def test_a_compile_error_includes_the_compiler_log():
    require("sm_80")
    with pytest.raises(
        RuntimeError, match=r"sm80_xnor_gemm.cu does not compile for sm_80: .*error"
    ):
        compile_cubin("sm80_xnor_gemm", "sm_80", {})


def test_a_launch_that_asks_for_too_much_shared_memory_is_found():
    require("sm_86")
    config = sm80.config(2, 4, 4, 4, 3)  # with the terms of scales it takes all that there is
    defines = {**dict(config.defines), "OUTPUT": FLOAT32, "SCALED": 1}
    asked = config.shared_bytes(True)
    compile_all("sm80_xnor_gemm", "sm_86", [defines], asked=[asked])
    with pytest.raises(AssertionError, match=r"3072 \+ \d+ bytes of shared memory"):
        compile_all("sm80_xnor_gemm", "sm_86", [defines], asked=[asked + 16])


def test_a_kernel_that_spills_is_found():
    require("sm_80")
    # Of 1,024 threads each has 64 registers: four times four fragments do not fit.
    defines = {"WARPS_M": 4, "WARPS_N": 8, "BLOCKS_M": 4, "BLOCKS_N": 4, "STAGES": 2}
    with pytest.raises(AssertionError, match="bytes spilled"):
        compile_all("sm80_xnor_gemm", "sm_80", [{**defines, "OUTPUT": PACKED, "SCALED": 0}])
