"""What Python hands to the CUDA kernels, byte by byte, with no GPU and no CuPy.

Kernels and arrays are recorded instead of launched and read: an array here has an address, a shape
and strides. The structs are read from the kernels' sources, so that a field that moves on one side
alone is found.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cupybnn
from cupybnn.backends.cuda import dispatch, launching, packing, product, product_launch, sign_gemm
from cupybnn.backends.cuda.architectures import sm90
from cupybnn.backends.cuda.dispatch import force_kernel
from cupybnn.backends.cuda.fused_layers import (
    DROP_ACTIVATION,
    ActivationGradient,
    BatchNorm,
    Layer,
)
from cupybnn.backends.cuda.sources import translation_unit
from cupybnn.backends.cuda.structs import Struct
from cupybnn.backends.epilogue import Epilogue
from cupybnn.backends.levels import SIGNS

WORDS, POPCOUNTS, MIB = 0x2000_0000, 0x3000_0000, 1 << 20
# The order in which layout.cuh says that sixteen lines stand.
LINE_AT = np.array([0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15])


class Array:
    """What the launch code asks of a CuPy array; strides in elements."""

    def __init__(self, shape, dtype=np.float32, strides=None, address=0x1000_0000):
        self.shape, self.dtype, self.ndim = tuple(shape), np.dtype(dtype), len(shape)
        self.itemsize, self.size = self.dtype.itemsize, int(np.prod(shape))
        contiguous = np.empty(shape, dtype).strides
        self.strides = contiguous
        if strides is not None:
            self.strides = tuple(s * self.itemsize for s in strides)
        self.flags = SimpleNamespace(c_contiguous=self.strides == contiguous)
        self.data = SimpleNamespace(ptr=address, device_id=0)
        self.device = SimpleNamespace(id=0)

    def transpose(self, *axes):
        return Array([self.shape[i] for i in axes], self.dtype)

    def reshape(self, *shape):
        shape = np.empty(self.shape, bool).reshape(*shape).shape
        return Array(shape, self.dtype, address=self.data.ptr)


class Packed:
    """What the launch code asks of a packed matrix."""

    levels = SIGNS

    def __init__(self, shape, address):
        self.shape = shape
        self.words = SimpleNamespace(data=SimpleNamespace(ptr=address))
        self.popcounts = SimpleNamespace(data=SimpleNamespace(ptr=address + 0x1000))


class Memory:
    """What the launch code asks of a pointer to memory."""

    def __init__(self, ptr, size):
        self.ptr, self.mem = ptr, SimpleNamespace(size=size)

    def __add__(self, offset):
        return Memory(self.ptr + offset, self.mem.size)


class Launched:
    """What the driver is asked to launch."""

    def __init__(self, config, pointers, size):
        config = config._obj
        (self.grid, *grid), (self.block, *block) = config.grid, config.block
        assert grid == block == [1, 1]
        self.shared, self.stream = config.shared, config.stream or 0
        self.attributes = [config.attributes[i].id for i in range(config.count)]
        assert all(config.attributes[i].value == 1 for i in range(config.count))
        self.argument = ctypes.string_at(pointers[0], size)


class Launches(list):
    """Launches in order, and what was cleared before each."""

    cleared: list[tuple[int, int]]


@pytest.fixture
def launches(monkeypatch):
    """Record launches, on a machine that has an H100 as far as the launch code can tell."""
    recorded = Launches()
    recorded.cleared = []
    allocated, loaded = itertools.count(1), {}

    def load_kernel(source, function, defines, device, shared=0):
        def launch(grid, block, arguments, shared_mem=0):
            assert shared_mem == shared
            (blocks,), (threads,) = grid, block
            recorded.append(
                SimpleNamespace(
                    source=source, function=function, defines=dict(defines), blocks=blocks,
                    threads=threads, arguments=arguments,
                )
            )  # fmt: skip

        launch.name = function
        launch.kernel = SimpleNamespace(
            ptr=id(launch)
        )  # what a prepared launch hands to the driver
        loaded[id(launch)] = launch
        return launch

    def launch_kernel(config, function, pointers, extra):
        kernel = loaded[function.value]
        layouts = {"pack_operands": packing.OPERANDS, "xnor_gemm": product_launch.PRODUCT}
        layout = layouts[kernel.name]
        launched = Launched(config, pointers, layout.size)
        argument = layout.argument(launched.argument)
        kernel((launched.grid,), (launched.block,), (argument,), shared_mem=launched.shared)
        return 0

    def clear(address, value, size, stream):
        assert value == 0
        recorded.cleared.append((address, size))

    cupy: Any = ModuleType("cupy")
    cupy.ndarray = Array
    cupy.empty = cupy.zeros = lambda shape, dtype: Array(shape, dtype, address=WORDS)
    monkeypatch.setattr(
        launching, "empty", lambda shape, dtype, memory=None: Array(
            shape, dtype, address=WORDS if memory is None else memory.ptr
        ),
    )  # fmt: skip
    monkeypatch.setattr(launching, "_blocks", launching._Blocks())
    monkeypatch.setattr(launching, "_launch_function", lambda: launch_kernel)
    monkeypatch.setattr(launching, "_get_current_stream", lambda: cupy.cuda.get_current_stream)
    cupy.asarray = np.asarray
    cupy.ascontiguousarray = lambda x, dtype=None: x
    cupy.broadcast_to = lambda x, shape: Array(shape, x.dtype, address=x.data.ptr)
    cupy.cuda = SimpleNamespace(
        alloc=lambda size: Memory(WORDS + MIB * next(allocated), size),
        get_current_stream=lambda: SimpleNamespace(ptr=0),
        runtime=SimpleNamespace(memsetAsync=clear),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for module in (packing, product_launch):
        monkeypatch.setattr(module, "load_kernel", load_kernel)
    for module in (dispatch, packing):
        monkeypatch.setattr(module, "architecture", lambda device: 90)
    for module in (dispatch, packing):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(product_launch.tuning, "winners", lambda device: {})
    monkeypatch.setattr(product, "_launches", launching.Plans())
    monkeypatch.setattr(packing, "_plans", launching.Plans())
    return recorded


@pytest.fixture
def driver(monkeypatch):
    """Stand for the driver: what it is asked to launch, and what it answers."""
    numbers = Struct("Numbers", "ptr x; i64 n; ptr out; i64 rows")
    asked = SimpleNamespace(launched=[], answers=[], used=0, numbers=numbers)

    def launch_kernel(config, function, pointers, extra):
        assert (function.value, extra) == (77, None)
        asked.launched.append(Launched(config, pointers, numbers.size))
        return asked.answers.pop(0) if asked.answers else 0

    class Device:
        def use(self):
            asked.used += 1

    class CUDADriverError(RuntimeError):
        def __init__(self, status):
            self.status = status
            super().__init__("CUDA_ERROR_NAMED: an explanation")

    cupy: Any = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(
        Device=Device, driver=SimpleNamespace(CUDADriverError=CUDADriverError)
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(launching, "_launch_function", lambda: launch_kernel)

    def prepare(*changing, **attributes):
        kernel = SimpleNamespace(name="walk", kernel=SimpleNamespace(ptr=77))
        argument = numbers.pack(x=1, n=2, out=3, rows=4)
        sections = (numbers.section(*names) for names in changing)
        return launching.Launch(kernel, 5, 128, 1 << 16, argument, *sections, **attributes)

    asked.prepare = prepare
    return asked


@pytest.mark.parametrize(
    ("changing", "values", "expected"),
    [
        ([], [], (1, 2, 3, 4)),
        ([("x", "x")], [2**64 - 1], (2**64 - 1, 2, 3, 4)),
        ([("n", "out")], [-7, 9], (1, -7, 9, 4)),
        ([("x", "x"), ("out", "rows")], [8, 9, -1], (8, 2, 9, -1)),
    ],
)
def test_a_launch_sets_its_fields_and_keeps_the_rest(driver, changing, values, expected):
    launch = driver.prepare(*changing)
    launch(0x1234, *values)
    launch.go(0, *values)
    for launched, stream in zip(driver.launched, (0x1234, 0), strict=True):
        assert driver.numbers.section("x", "rows").fields.unpack(launched.argument) == expected
        assert (launched.grid, launched.block, launched.shared) == (5, 128, 1 << 16)
        assert (launched.stream, launched.attributes) == (stream, [])
    with pytest.raises(struct.error):
        launch.go(0, *values, 1)
    if values:
        with pytest.raises(struct.error):
            launch.go(0, *values[1:])
    assert len(driver.launched) == 2


def test_a_launch_overlaps_except_in_a_graph(driver, monkeypatch):
    monkeypatch.setattr(launching, "_is_capturing", lambda stream: stream == 99)
    cooperative, overlap = 2, 6  # CUlaunchAttributeID of cuda.h
    for attributes, alone, captured in (
        ({}, [], []),
        ({"overlap": True}, [overlap], []),
        ({"cooperative": True}, [cooperative], [cooperative]),
        ({"cooperative": True, "overlap": True}, [cooperative, overlap], [cooperative]),
    ):
        launch = driver.prepare(**attributes)
        for stream, expected in ((98, alone), (99, captured), (98, alone), (0, alone), (1, alone)):
            launch.go(stream)
            assert driver.launched[-1].attributes == expected


def test_an_error_of_the_driver_has_its_name_and_number(driver):
    driver.answers = [719]
    with pytest.raises(RuntimeError, match=r"launch walk: CUDA_ERROR_NAMED.*\(error 719\)") as got:
        driver.prepare().go(0)
    assert got.value.status == 719
    driver.prepare().go(0)


def test_a_tensor_map_that_the_driver_refuses_is_reported_alike(driver, monkeypatch):
    class Anything:
        CUDA_SUCCESS = 0

        def __getattr__(self, name):
            return Anything()

        def __call__(self, *arguments):
            return 1, None

    bindings = SimpleNamespace(driver=Anything())
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=bindings))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    with pytest.raises(
        RuntimeError, match=r"tensor map of a 3 x 64 .*_NAMED.*\(error 1\)\.$"
    ) as got:
        sign_gemm._tensor_map(0x1234, (3, 64), 8)
    assert got.value.status == 1


def test_a_thread_that_has_no_context_gets_one(driver):
    no_context = 201
    driver.answers = [no_context, 0]
    driver.prepare().go(0)
    assert (driver.used, len(driver.launched)) == (1, 2)
    driver.answers = [no_context, no_context]
    with pytest.raises(RuntimeError, match=r"\(error 201\)"):
        driver.prepare().go(0)


def test_threads_that_share_a_launch_do_not_mix_their_fields(driver, monkeypatch):
    def launch_kernel(config, function, pointers, extra):
        before = Launched(config, pointers, driver.numbers.size)
        time.sleep(0.001)  # others run, as they do while the driver works
        after = Launched(config, pointers, driver.numbers.size)
        assert (before.stream, before.argument) == (after.stream, after.argument)
        driver.launched.append(before)
        return 0

    monkeypatch.setattr(launching, "_launch_function", lambda: launch_kernel)
    launch = driver.prepare(("x", "x"), ("out", "out"))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: launch.go(i, i, 2 * i), range(40)))
    fields = driver.numbers.section("x", "rows").fields
    got = sorted((each.stream, *fields.unpack(each.argument)) for each in driver.launched)
    assert got == [(i, i, 2, 2 * i, 4) for i in range(40)]


def fields_of(source: str, name: str) -> list[str]:
    """Names of a struct's fields in a kernel's source; every one must take eight bytes."""
    text = re.sub(r"//.*", "", translation_unit(source))
    body = re.search(rf"struct {name} \{{(.*?)\}};", text, re.DOTALL)
    assert body is not None
    names = []
    for declaration in body[1].replace("\n", " ").split(";"):
        if not declaration.strip():
            continue
        pointer = re.fullmatch(r"\s*(?:const )?[\w ]+\* ?(\w+)", declaration)
        numbers = re.fullmatch(r"\s*(?:i64|double) ([\w, ]+)", declaration)
        assert pointer or numbers, f"{declaration!r} is neither a pointer nor a number"
        names += [pointer[1]] if pointer else re.split(r",\s*", numbers[1])
    return names


def decode(argument: np.ndarray, names: list[str]) -> dict[str, int]:
    assert argument.size == 1
    assert argument.dtype.itemsize == 8 * len(names)
    return dict(zip(names, argument.view(np.int64).tolist(), strict=True))


def operands_of(launch) -> tuple[dict[str, int], dict[str, int]]:
    names = fields_of("smxx_pack", "Operand")
    (argument,) = launch.arguments
    both = decode(argument, [f"{side}.{name}" for side in "ab" for name in names])
    a, b = ({n: both[f"{side}.{n}"] for n in names} for side in "ab")
    return a, b


def product_of(launch) -> dict[str, int]:
    (argument,) = launch.arguments
    return decode(argument, fields_of(launch.source, "Product"))


def test_packing_one_array(launches):
    x = Array((3, 70, 1100), strides=(90_000, 1200, 1))
    launch_one = packing.PackLaunch([(x, -1)], 0)
    launch_one(0, x.data.ptr, WORDS, POPCOUNTS)
    (launch,) = launches
    a, b = operands_of(launch)
    # Two chunks: two warps to a line, so four lines of 80 x 3 to a block.
    assert a == {
        "x": x.data.ptr, "words": WORDS, "pops": POPCOUNTS, "lines": 70, "k": 1100, "chunks": 2,
        "batch": 3, "line_stride": 4800, "k_stride": 4, "batch_stride": 360_000, "across": 0,
        "wide": 1, "parts": 2, "blocks": 60,
    }  # fmt: skip
    assert b["blocks"] == 0
    assert (launch.blocks, launch.threads) == (60, 256)
    assert launch.defines == {"SAME_TYPE": 1, "TYPE_A": "float", "TYPE_B": "float"}
    assert launch_one.adds_up == (False,)


def test_packing_both_operands_in_one_launch(launches):
    a, b = Array((33, 2000), np.int8), Array((2000, 50), np.float16, address=0x5000_0000)
    launch_both = packing.PackLaunch([(a, -1), (b, -2)], 0)
    launch_both(0, a.data.ptr, WORDS, POPCOUNTS, b.data.ptr, WORDS + 64, POPCOUNTS + 64)
    (launch,) = launches
    first, second = operands_of(launch)
    assert (first["x"], first["words"], first["pops"]) == (a.data.ptr, WORDS, POPCOUNTS)
    assert (first["lines"], first["k"], first["line_stride"], first["k_stride"]) == (
        33,
        2000,
        2000,
        1,
    )
    assert (first["across"], first["batch"], first["batch_stride"]) == (0, 1, 0)
    assert (second["x"], second["words"], second["pops"]) == (
        b.data.ptr, WORDS + 64, POPCOUNTS + 64,
    )  # fmt: skip
    assert (second["lines"], second["k"]) == (50, 2000)
    assert (second["line_stride"], second["k_stride"]) == (2, 100)
    # Few lines, so that blocks share a line's eight quarters of chunks and add up.
    assert (second["across"], second["wide"], second["parts"], second["blocks"]) == (1, 0, 8, 16)
    assert launch_both.adds_up == (False, True)
    assert launch.blocks == first["blocks"] + second["blocks"]
    assert launch.defines == {"SAME_TYPE": 0, "TYPE_A": "signed char", "TYPE_B": "float16_bits"}


@pytest.mark.parametrize(
    ("address", "strides", "wide"),
    [
        (0, (1000, 1), 1),
        (16, (1000, 1), 1),
        (4, (1000, 1), 0),  # misaligned
        (0, (1001, 1), 0),  # lines that are
        (0, (-1000, 1), 1),  # lines upside down
        (0, (0, 1), 1),  # one line for all
        (0, (1000, 2), 0),
        (0, (1000, -1), 0),
        (0, (1000, 0), 0),
    ],
)
def test_wide_loads_along_lines_are_aligned(launches, address, strides, wide):
    x = Array((40, 1000), strides=strides, address=0x1000_0000 + address)
    got = packing._operand(x, -1, 132)
    assert (got["across"], got["wide"]) == (0, wide)


@pytest.mark.parametrize(
    ("lines", "address", "pitch", "wide"),
    [
        (4096, 0, 4096, 1),
        (4096, 8, 4096, 1),
        (4096, 4, 4096, 0),  # misaligned
        (4096, 0, 4097, 0),  # every second row is
        (4095, 0, 4096, 0),  # one line is left over
    ],
)
def test_wide_loads_across_lines_are_aligned_and_leave_no_line(
    launches, lines, address, pitch, wide
):
    x = Array((5000, lines), strides=(pitch, 1), address=0x1000_0000 + address)
    got = packing._operand(x, -2, 132)
    assert (got["across"], got["wide"]) == (1, wide)
    assert got["blocks"] == -(-lines // (64 if wide else 32)) * got["parts"]


def test_every_line_has_warps_or_blocks_of_its_own():
    """As smxx_pack.cu deals them out: 8 / parts lines to a block, or 32 to 128 to some blocks."""
    for batch, lines, k, axis, dtype in itertools.product(
        (1, 3), (1, 2, 16, 17, 33, 64, 130, 4000), (1, 1024, 1025, 3000, 9000, 70_000), (-1, -2),
        (np.int8, np.float16, np.float32),
    ):  # fmt: skip
        shape = (batch, lines, k) if axis == -1 else (batch, k, lines)
        got = packing._operand(Array(shape, dtype), axis, 132)
        assert list(got) == fields_of("smxx_pack", "Operand")[3:]
        assert (got["lines"], got["k"], got["batch"]) == (lines, k, batch)
        assert got["chunks"] * 1024 >= k > (got["chunks"] - 1) * 1024
        assert 1 <= got["parts"] <= 4 * got["chunks"] or not got["across"]
        if got["across"]:
            neighbors = {np.int8: 8, np.float16: 4, np.float32: 2}[dtype]
            groups = -(-lines // (32 * neighbors if got["wide"] else 32))
            assert got["blocks"] == batch * groups * got["parts"]
        else:
            padded = -(-lines // 16) * 16
            assert 8 % got["parts"] == 0
            assert got["blocks"] * (8 // got["parts"]) >= batch * padded
            assert (got["blocks"] - 1) * (8 // got["parts"]) < batch * padded


def test_as_many_lines_as_32_bits_do_not_count_are_refused(launches):
    x = SimpleNamespace(
        shape=(2**15, 2**16, 4), strides=(2**18, 4, 1), itemsize=1, dtype=np.dtype(np.int8),
        data=SimpleNamespace(ptr=0),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 lines; got 32768 times 65536"):
        packing.PackLaunch([(x, -1)], 0)


def test_a_product_of_packed_matrices(launches):
    a, b = Packed((100, 3000), 0x4000_0000), Packed((3000, 200), 0x5000_0000)
    out = Array((100, 200), np.float32, strides=(1, 100), address=0x6000_0000)
    with force_kernel("smxx"):
        product.gemm(a, b, out, None)
    (launch,) = launches
    assert product_of(launch) == {
        "a": 0x4000_0000, "b": 0x5000_0000, "pop_a": 0x4000_1000, "pop_b": 0x5000_1000,
        "out": 0x6000_0000, "out_pop": 0, "row_scale": 0, "col_scale": 0, "bias": 0,
        "threshold": 0, "flip": 0, "m": 100, "n": 200, "k": 3000, "chunks": 3, "batch": 1,
        "a_step": 1, "b_step": 1, "out_row": 1, "out_col": 100, "out_batch": 0,
        "row_scale_batch": 0, "col_scale_batch": 0, "bias_batch": 0, "swapped": 0, "group": 8,
        "parts": 1, "sums": 0,
    }  # fmt: skip
    assert launch.defines == {"OUTPUT": 1, "SCALED": 0}
    assert (launch.blocks, launch.threads) == (2 * 4, 256)


def test_a_swapped_product_of_a_batch_with_scales(launches):
    config = sm90.config(1, 16, 8, split_k=2, swap=True, group=3)
    a, b = Packed((5, 9, 4096), 0x4000_0000), Packed((4096, 300), 0x5000_0000)
    out = Array((5, 9, 300), np.float16, address=0x6000_0000)
    rows = Array((5, 9, 1), np.float32, address=0x7000_0000)
    columns = Array((1, 300), np.float32, address=0x7100_0000)
    bias = Array((5, 1, 300), np.float32, address=0x7200_0000)
    with force_kernel(config):
        product.gemm(a, b, out, Epilogue(rows, columns, bias))
    (launch,) = launches
    got = product_of(launch)
    assert (got["a"], got["b"]) == (0x5000_0000, 0x4000_0000)
    assert (got["pop_a"], got["pop_b"]) == (0x5000_1000, 0x4000_1000)
    assert (got["m"], got["n"], got["a_step"], got["b_step"], got["batch"]) == (300, 9, 0, 1, 5)
    assert (got["out_row"], got["out_col"], got["out_batch"]) == (1, 300, 2700)
    assert got["swapped"] == 1
    assert got["group"] == 3
    assert launch.defines == {**dict(config.defines), "OUTPUT": 2, "SCALED": 1}
    assert launch.blocks == 3 * 1 * 5 * 2
    assert (got["k"], got["chunks"]) == (4096, 4)


def test_scales_follow_the_rows_and_columns_of_the_launch(launches, monkeypatch):
    """The row scale is of the kernel's rows, which are the caller's columns once swapped."""
    found = {"rows": (None, 11, 1), "columns": (None, 22, 2), "bias": (None, 33, 3)}
    monkeypatch.setattr(product, "_scale", lambda x, batch_shape, length: found[x])
    names = ("row_scale", "col_scale", "bias", "row_scale_batch", "col_scale_batch", "bias_batch")
    for swap, want in ((False, (11, 22, 33, 1, 2, 3)), (True, (22, 11, 33, 2, 1, 3))):
        with force_kernel(sm90.config(1, 16, 8, swap=swap)):
            product.gemm(
                Packed((9, 64), WORDS), Packed((64, 9), WORDS), Array((9, 9)),
                Epilogue("rows", "columns", "bias"),
            )  # fmt: skip
        got = product_of(launches[-1])
        assert tuple(got[name] for name in names) == want, swap


def test_operands_that_are_arrays_are_packed_into_one_workspace(launches):
    a, b = Array((7, 2000)), Array((2000, 20), address=0x5000_0000)
    with force_kernel("smxx"):
        product.gemm(a, b, Array((7, 20), np.int32), None)
    pack, multiply = launches
    first, second = operands_of(pack)
    got = product_of(multiply)
    assert (first["words"], first["pops"]) == (got["a"], got["pop_a"])
    assert got["pop_a"] == got["a"] + 4096
    assert (second["words"], second["pops"]) == (got["b"], got["pop_b"])
    # 2 chunks x 16 and 32 lines x 128 bytes; popcounts follow, and nothing overlaps.
    assert got["b"] % 256 == 0
    assert got["b"] >= got["pop_a"] + 4 * 7
    # Blocks add to the popcounts of b: they lie in memory that was cleared for many calls.
    assert launches.cleared == [(got["pop_b"], 32 * 256)]
    assert not got["a"] <= got["pop_b"] < got["b"] + 2 * 32 * 128


def test_a_packed_result(launches):
    a, b = Packed((70, 500), 0x4000_0000), Packed((500, 90), 0x5000_0000)
    threshold = Array((90,), np.int32, address=0x7000_0000)
    flip = Array((90,), bool, address=0x7100_0000)
    with force_kernel("smxx"):
        product.gemm_packed(a, b, threshold, flip)
    got = product_of(launches[-1])
    assert (got["threshold"], got["flip"]) == (0x7000_0000, 0x7100_0000)
    assert got["out"] == WORDS  # what the recorded allocator gives
    assert launches.cleared == [(got["out_pop"], 32 * 512)]
    assert (got["row_scale"], got["col_scale"], got["bias"]) == (0, 0, 0)
    assert launches[-1].defines == {"OUTPUT": 4, "SCALED": 0}


def test_zeros_are_cleared_for_many_calls_at_once(launches, monkeypatch):
    taken = [launching.zeros(300, 0, stream=0).ptr for _ in range(32)]
    assert launches.cleared == [(taken[0], 32 * 512)]
    assert [address - taken[0] for address in taken] == [512 * i for i in range(32)]
    more = launching.zeros(300, 0, stream=0).ptr
    assert launches.cleared[1:] == [(more, 32 * 512)]  # the first block was used up
    # Each stream and device has its own block, and a large one serves one call.
    for size, device, stream in ((300, 0, 7), (300, 1, 0), (1 << 20, 0, 0)):
        monkeypatch.setattr(launching, "_is_capturing", lambda stream: False)
        address = launching.zeros(size, device, stream).ptr
        assert launches.cleared[-1] == (address, size if size > 300 else 32 * 512)
    # A graph clears its memory at each replay.
    monkeypatch.setattr(launching, "_is_capturing", lambda stream: True)
    for _ in range(2):
        assert launches.cleared[-1] != (address := launching.zeros(300, 0, stream=7).ptr, 512)
        assert launches.cleared[-1] == (address, 512)


def test_a_long_product_of_one_tile_is_split_over_the_gpu(launches):
    a, b = Packed((64, 1 << 20), 0x4000_0000), Packed((1 << 20, 128), 0x5000_0000)
    for _ in range(2):
        product.gemm(a, b, Array((64, 128), np.int32), None)
    first, second = (product_of(launch) for launch in launches)
    config = dispatch.choose(dispatch.problem_on(0, 64, 128, 1 << 20), {})
    assert first["parts"] == config.parts_of(1024) > 1
    assert launches[0].blocks == 8 * first["parts"]
    # Sums of one tile for each call, and tickets.
    assert second["sums"] - first["sums"] >= 4 * (128 * 128 + 8)
    assert launches.cleared == [(first["sums"], 2 * MIB)]


def test_output_numbers_are_those_of_the_kernels():
    text = translation_unit("smxx_xnor_gemm")
    numbers = {k: int(v) for k, v in re.findall(r"#define OUTPUT_(\w+) (\d+)", text)}
    assert numbers.pop("PACKED") == product_launch.PACKED
    assert numbers.pop("BFLOAT16") == product_launch.OUTPUTS["E"]
    assert {np.dtype(name.lower()).char: v for name, v in numbers.items()} == {
        char: v for char, v in product_launch.OUTPUTS.items() if char != "E"
    }


@pytest.mark.parametrize(
    ("dtype", "c_type", "one", "minus_one"),
    [
        ("bool", "bool", 1, 0),
        ("int8", "signed char", 1, -1),
        ("int64", "long long", 1, -1),
        ("float64", "double", 1, -1),
        ("float16", "unsigned short", 0x3C00, 0xBC00),
    ],
)
def test_unpacking_writes_plus_and_minus_one_of_the_dtype(launches, dtype, c_type, one, minus_one):
    words = object()
    packing.unpack(words, (2, 30, 1500), -2, dtype)
    (launch,) = launches
    assert launch.defines == {"TYPE": c_type, "ONE": one, "MINUS_ONE": minus_one}
    assert launch.arguments[0] is words
    assert launch.arguments[2:] == (2, 1500, 30, 1)
    assert launch.blocks * launch.threads >= 2 * 30 * 1500


@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (33, 1025), (2, 3, 17, 3000)])
@pytest.mark.parametrize("axis", [-1, -2])
def test_words_lie_where_the_layout_says(launches, shape, axis):
    *lead, rows, columns = shape
    lines, k = (rows, columns) if axis == -1 else (columns, rows)
    batch, words, padded = int(np.prod(lead)), -(-k // 64), -(-lines // 16) * 16
    bits = np.random.default_rng(0).integers(0, 2, (batch, lines, 64 * words), np.uint8)
    bits[..., k:] = 0
    canonical = np.packbits(bits, axis=-1, bitorder="little").view("<u8")
    placed = packing.from_canonical(canonical.reshape(*lead, lines, words), shape, axis)
    chunks = -(-k // 1024)
    assert placed.shape == (batch, chunks, padded, 32)
    assert placed.dtype == np.uint32
    whole = np.zeros((batch, padded, chunks * 1024), np.uint8)
    whole[:, :lines, : 64 * words] = bits
    pieces = np.packbits(whole, axis=-1, bitorder="little").view(np.uint32)
    pieces = pieces.reshape(batch, padded, chunks, 8, 4)
    for position in range(padded):
        line = position // 16 * 16 + LINE_AT[position % 16]
        for i in range(8):
            stands = placed.reshape(batch, chunks, padded, 8, 4)[:, :, position, i ^ position % 8]
            np.testing.assert_array_equal(stands, pieces[:, line, :, i])
    on_device = SimpleNamespace(get=lambda: placed)
    back = packing.to_canonical(on_device, shape, axis)
    np.testing.assert_array_equal(back, canonical.reshape(*lead, lines, words))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 3, 70), (2, 0, 70), (2, 3, 0)])
@pytest.mark.parametrize("axis", [-1, -2])
def test_an_empty_matrix_goes_there_and_back(launches, shape, axis):
    batch, lines, k = packing.geometry(shape, axis)
    canonical = np.zeros((*shape[:-2], lines, -(-k // 64)), np.uint64)
    placed = packing.from_canonical(canonical, shape, axis)
    assert placed.shape == packing.words_shape(batch, lines, k)
    back = packing.to_canonical(SimpleNamespace(get=lambda: placed), shape, axis)
    assert back.shape == canonical.shape
    assert not placed.any()


@pytest.fixture
def sign_launches(launches, monkeypatch):
    """Record launches of products by signs, too, with tensor maps as their arguments."""
    monkeypatch.setattr(sign_gemm, "load_kernel", product_launch.load_kernel)
    monkeypatch.setattr(sign_gemm, "multiprocessors", dispatch.multiprocessors)
    monkeypatch.setattr(sign_gemm, "_tensor_map", lambda *described: described)
    return launches


def test_product_by_signs_transposed(sign_launches):
    weight = Packed((1032, 264), WORDS)
    gradient, out = Array((300, 264), np.uint16), Array((300, 1032), np.uint16, address=0x5000_0000)
    sign_gemm.transposed_product(weight, gradient, out, 0)
    (launch,) = sign_launches
    argument, described = launch.arguments
    assert decode(argument, fields_of(launch.source, "SignProduct")) == {
        "words": WORDS, "out": out.data.ptr, "m": 1032, "n": 300, "k": 264, "parts": 1,
    }  # fmt: skip
    assert described == (gradient.data.ptr, (300, 264), 256)
    assert (launch.blocks, launch.threads) == (9 * 2, 384)
    assert launch.defines == {"RESULT": 0, "PENALTY": 0, "WRITE_GRADIENT": 0}


def test_product_by_signs_that_adds_up_for_the_batch_norm_below(sign_launches):
    weight, gradient = Packed((1032, 264), WORDS), Array((300, 264), np.uint16)
    out, mask = Array((300, 1032), np.uint16), Array((300, 33), np.uint32, address=0x5100_0000)
    names = ("gamma", "beta", "grad_gamma", "grad_beta", "running_mean", "running_variance")
    norm = {n: Array((1032,), address=0x6000_0000 + 0x1000 * i) for i, n in enumerate(names)}
    layer = Layer(product=Array((300, 1032), np.int16), norm=BatchNorm(**norm, decay=0.9, eps=1e-4))
    below = ActivationGradient(layer=layer, gate="mask", mask=mask, grad=out, out=out)
    scratch = SimpleNamespace(
        partials=Array((2 * 2 * 1032,), address=0x5200_0000),
        tickets=Array((9,), np.uint32, address=0x5300_0000),
    )
    sign_gemm.transposed_product(weight, gradient, out, 0, below, scratch)
    (launch,) = sign_launches
    *_, to = launch.arguments
    assert decode(to, fields_of(launch.source, "NormSums")) == {
        "gate": 0x5100_0000, "partials": 0x5200_0000, "tickets": 0x5300_0000,
        "grad_gamma": 0x6000_2000, "grad_beta": 0x6000_3000,
    }  # fmt: skip
    assert launch.defines == {
        "RESULT": 0, "PENALTY": 0, "WRITE_GRADIENT": 0, "SUMS": 1, "GATE": 1, "DROP": 0, "NORM": 1,
        "PRODUCT": "short",
    }  # fmt: skip
    assert replace(below, layer=replace(layer, drop=DROP_ACTIVATION)).can_be_summed() is False
    assert replace(below, layer=replace(layer, norm=None)).can_be_summed() is False


def test_gradient_by_signs_in_parts(sign_launches):
    entered, gradient = Packed((8192, 384), WORDS), Array((8192, 512), np.uint16)
    out = Array((384, 512), np.uint16, address=0x5000_0000)
    scratch = Array((16, 384, 512), address=0x5200_0000)
    sign_gemm.weight_gradient(entered, gradient, out, 0, scratch)
    product, total = sign_launches
    assert decode(product.arguments[0], fields_of(product.source, "SignProduct")) == {
        "words": WORDS, "out": 0x5200_0000, "m": 384, "n": 512, "k": 8192, "parts": 16,
    }  # fmt: skip
    assert product.arguments[1] == (gradient.data.ptr, (8192, 512), 64)
    assert (product.blocks, product.threads) == (16 * 3 * 2, 384)
    assert product.defines == {"RESULT": 3, "PENALTY": 0, "WRITE_GRADIENT": 0}
    assert [int(x) for x in total.arguments] == [0x5200_0000, 384 * 512, 16, 0x5000_0000]
    assert (total.blocks, total.threads) == (192, 256)
    assert total.defines == {"REAL": "bfloat16_bits"}


def test_update_by_signs(sign_launches):
    entered, gradient = Packed((300, 4096), WORDS), Array((300, 8192), np.uint16)
    defines = (("PENALTY", 1), ("WRITE_GRADIENT", 0))
    update = {
        "parameter": b"p" * 136, "rates": Array((1024, 4), address=0x7000_0000), "ring": 1024,
        "step": Array((1,), np.int64, address=0x7100_0000), "gain_mean": 0.25, "gain_square": 0.5,
        "partials": Array((9,), address=0x7200_0000), "earlier": 7,
    }  # fmt: skip
    sign_gemm.weight_update(entered, gradient, update, defines=defines, device=0)
    (launch,) = sign_launches
    argument, described, parameter, *rest = launch.arguments
    assert decode(argument, fields_of(launch.source, "SignProduct")) == {
        "words": WORDS, "out": 0, "m": 4096, "n": 8192, "k": 300, "parts": 1,
    }  # fmt: skip
    assert described == (gradient.data.ptr, (300, 8192), 64)
    assert parameter.tobytes() == b"p" * 136
    types = (np.uint64, np.int64, np.uint64, np.float32, np.float32, np.uint64, np.int64)
    values = (0x7000_0000, 1024, 0x7100_0000, 0.25, 0.5, 0x7200_0000, 7)
    assert [(type(x), x) for x in rest] == list(zip(types, values, strict=True))
    assert launch.blocks == 132  # which take 32 x 32 tiles in turn
    assert launch.defines == {"RESULT": 1, "PENALTY": 1, "WRITE_GRADIENT": 0}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["product", "network"])
def test_a_new_thread_launches_before_it_does_anything_else(kind):
    import cupy

    signs = np.random.default_rng(0).integers(0, 2, (64, 64)) * 2 - 1
    if kind == "product":
        packed = cupybnn.pack(cupy.asarray(signs.astype(np.int8)), axis=-1)
        call = lambda: cupybnn.xnor_gemm(packed, packed.T)  # noqa: E731
        expected = signs @ signs.T
    else:
        layer = cupybnn.nn.BinaryLinear(64, 64, binary_input=False, rng=0)
        layer.weight.write()[...] = signs
        network = cupybnn.PackedNetwork.from_model(cupybnn.nn.Sequential(layer)).to("cuda")
        x = cupy.asarray(signs.astype(np.float32))
        call = lambda: network(x)  # noqa: E731
        expected = signs @ signs
    call()  # memory of the pool, for the next
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(call).result()
    np.testing.assert_array_equal(got.get(), expected)
