"""Every product kernel and configuration on a GPU, by name, exactly."""

from __future__ import annotations

import dataclasses
import itertools
import threading

import numpy as np
import pytest
from gemm_cases import BFLOAT16, check_random_cases, host

import cupybnn
from cupybnn.backends.cuda import architectures, dispatch, launching
from cupybnn.backends.cuda.architectures import sm75, sm80, sm90, smxx
from cupybnn.backends.cuda.configs import Config, Problem
from cupybnn.backends.cuda.dispatch import force_kernel

pytestmark = pytest.mark.gpu

POISON = -(2**31)
POISON_BYTE = 0xA5

# Configurations by name, for shapes chosen by hand. `reachable` has all.
GENERAL = {
    "smxx": smxx.config(),
    "sm75": sm75.config(),
    "sm80 small": sm80.config(2, 2, 2, 4, 4),
    "sm80 middle": sm80.config(2, 4, 4, 4, 3),
    "sm80 middle, two stages": sm80.config(2, 4, 4, 4, 2),
    "sm80 large": sm80.config(4, 2, 4, 8, 3),
    "sm80 large, two stages": sm80.config(4, 2, 4, 8, 2),
    "sm90 64x32": sm90.FINE,
    "sm90 64x64": sm90.SMALL,
    "sm90 64x64, two blocks": sm90.SMALL_TWICE,
    "sm90 128x64": sm90.MIDDLE,
    "sm90 128x128": sm90.LARGE,
    "sm90 128x256": sm90.config(1, 256, 4),
    "sm90 256x128": sm90.LARGER,
    "sm90 256x192": sm90.config(2, 192, 4),
    "sm90 256x192, cluster 1x2": sm90.config(2, 192, 4, cluster=(1, 2)),
    "sm90 256x128, cluster 2x1": sm90.config(2, 128, 4, cluster=(2, 1)),
}
DEFERRED = {
    "sm90 128x256": sm90.config(1, 256, 4, deferred=4),
    "sm90 256x128": sm90.config(2, 128, 4, deferred=4),
    "sm90 128x256, cluster 2x1": sm90.config(1, 256, 4, deferred=4, cluster=(2, 1)),
    "sm90 256x128, cluster 1x2": sm90.config(2, 128, 4, deferred=4, cluster=(1, 2)),
}
SPLIT = {
    "sm90 64x64 / 4": sm90.SPLIT,
    "sm90 64x64 / 4 by 3": dataclasses.replace(sm90.SPLIT, parts=3),
    "sm90 128x128 / 8": sm90.LONG,
    "sm90 128x128 / 8 by 2": dataclasses.replace(sm90.LONG, parts=2),
    "sm90 128x128 / 2": sm90.config(1, 128, 6, split_k=2),
}
SWAPPED = {
    "sm90 128x16": sm90.FLAT,
    "sm90 128x64": sm90.config(1, 64, 8, swap=True),
    "sm90 64x16 / 2": sm90.config(1, 16, 10, consumers=1, split_k=2, swap=True),
}

EDGES = [
    (1, 1, 1), (2, 3, 70), (15, 17, 31), (16, 16, 1024), (63, 65, 1023), (64, 64, 1025),
    (65, 63, 33), (127, 129, 127), (128, 128, 2048), (129, 127, 2049), (191, 193, 784),
    (192, 255, 256), (255, 257, 3000), (256, 192, 4096), (257, 191, 4097), (300, 1000, 513),
    (1, 1000, 70_000),
]  # fmt: skip
LONG_EDGES = [
    (1, 1, 3073), (127, 129, 4096), (128, 255, 4097), (256, 257, 8191), (300, 1000, 5000),
    (1025, 2000, 8192), (2049, 3000, 4000), (129, 128, 64_000),
]  # fmt: skip


def reachable() -> list[Config]:
    """Every configuration that is built in or that tuning measures, once.

    Those that differ only in the order of tiles are compiled alike: of them, the last stands here,
    with the larger group.
    """
    lengths = (1, 9, 17, 33, 64, 65, 129, 256, 768, 1024, 1500, 4096, 16384)
    ks = (1, 1024, 2048, 4096, 6144, 8192, 12288, 70_000)
    found: dict[object, Config] = {}
    for m, n, k, packed in itertools.product(lengths, lengths, ks, (False, True)):
        for kernel, capability in (("sm90", 90), ("sm80", 80), ("sm80", 86), ("sm75", 75)):
            kinds = [
                Problem(
                    m=m, n=n, k=k, packed=packed, scaled=scaled, batch=batch,
                    capability=capability, multiprocessors=132,
                )
                for scaled, batch in dict.fromkeys(((False, 1), (not packed, 1), (False, 8)))
            ]  # fmt: skip
            for config in (
                *(dispatch.builtin_config(kernel, kind) for kind in kinds),
                *dispatch.candidates(kernel, kinds[0]),
            ):
                found[config.kernel, config.defines, config.swap] = config
    return [smxx.config(), *found.values()]


def edges(config: Config) -> list[tuple[int, int, int]]:
    """Products (m, n, k) around the edges of a configuration's tiles and of its least K."""
    height, width = config.tile_m * config.cluster_m, config.tile_n * config.cluster_n
    least = max(config.split_k, 4 if config.deferred else 1)  # chunks of K that it needs
    ks = itertools.cycle((1024 * least, 1024 * (least - 1) + 1, 1024 * least + 1, 1024 * least - 1))
    sizes = [(height + i, width + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    sizes += [(config.tile_m + 1, config.tile_n + 1), (1, 1)]
    # More tiles than multiprocessors: blocks go on to a second tile.
    sizes += [(12 * height + 1, 12 * width - 1)]
    return [(n, m, k) if config.swap else (m, n, k) for (m, n), k in zip(sizes, ks, strict=False)]


@pytest.fixture(scope="module")
def cupy():
    import cupy

    return cupy


@pytest.fixture(scope="module")
def capability(cupy):
    return int(cupy.cuda.Device().compute_capability)


@pytest.fixture(autouse=True)
def poisoned(cupy, monkeypatch):
    """Fill the memory that a product asks for, so that what is not written is not right by luck."""
    alloc = launching.alloc

    def poisoned_empty(shape, dtype, memory=None):
        array = cupy.ndarray(shape, dtype, memory)
        if memory is None and array.nbytes:
            array.data.memset_async(POISON_BYTE, array.nbytes)
        return array

    def poisoned_alloc(size):
        memory = alloc(size)
        memory.memset_async(POISON_BYTE, size)
        return memory

    monkeypatch.setattr(launching, "empty", poisoned_empty)
    monkeypatch.setattr(launching, "alloc", poisoned_alloc)


def operands(cupy, m, n, k, seed=0):
    random = cupy.random.default_rng(m * 31 + n * 17 + k + seed)
    a = random.standard_normal((m, k), dtype=np.float32)
    return a, random.standard_normal((k, n), dtype=np.float32)


def expected(cupy, a, b):
    """The product of the signs in float64, which holds every sum here exactly."""
    signs = [cupy.where(x >= 0, 1.0, -1.0) for x in (a, b)]
    return cupy.rint(signs[0] @ signs[1]).astype(np.int32)


def require(config: Config | str, capability: int) -> None:
    kernel = config if isinstance(config, str) else config.kernel
    if capability not in architectures.KERNELS[kernel].CAPABILITIES:
        pytest.skip(f"{kernel} does not run on compute capability {capability}")


def check(cupy, config, shape, *, packed=True):
    m, n, k = shape
    a, b = operands(cupy, m, n, k)
    want = expected(cupy, a, b)
    out = cupy.full((m, n), POISON, np.int32)
    with force_kernel(config):
        cupybnn.xnor_gemm(a, b, out=out)
        result = cupybnn.xnor_gemm_packed(a, b) if packed else None
    wrong = cupy.argwhere(out != want)
    assert not len(wrong), f"{config} {shape}: first wrong at {wrong[0]}, {len(wrong)} of {m * n}"
    if result is not None:
        bits = want >= 0
        assert bool((result.unpack(np.int8) == cupy.where(bits, 1, -1)).all()), (config, shape)
        assert bool((result.popcounts == bits.sum(1)).all()), (config, shape)


@pytest.mark.parametrize("name", GENERAL)
def test_a_configuration_is_exact_around_its_tile_edges(cupy, capability, name):
    require(GENERAL[name], capability)
    for shape in EDGES:
        check(cupy, GENERAL[name], shape)


@pytest.mark.parametrize("name", DEFERRED)
def test_a_deferred_configuration_is_exact(cupy, capability, name):
    require(DEFERRED[name], capability)
    for shape in LONG_EDGES:
        check(cupy, DEFERRED[name], shape)


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_configuration_is_exact(cupy, capability, name):
    require(SPLIT[name], capability)
    shapes = ((1, 1, 24_576), (129, 127, 24_577), (300, 200, 70_000), (64, 64, 600_000))
    for shape in shapes:
        check(cupy, SPLIT[name], shape)


@pytest.mark.parametrize("name", SWAPPED)
def test_a_swapped_configuration_is_exact(cupy, capability, name):
    require(SWAPPED[name], capability)
    narrow = SWAPPED[name].tile_n
    for m, n, k in ((1, 1, 4096), (narrow, 129, 4097), (narrow - 1, 3000, 5000), (3, 128, 70_000)):
        check(cupy, SWAPPED[name], (m, n, k), packed=False)


@pytest.mark.parametrize("config", reachable(), ids=str)
def test_every_configuration_of_the_table_and_of_tuning_is_exact(cupy, capability, config):
    require(config, capability)
    room = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    if config.shared_bytes(False) > room:
        pytest.skip(f"{config} asks for more than the {room} bytes of shared memory that are here")
    for shape in edges(config):
        check(cupy, config, shape, packed=not config.swap and config.tile_n % 32 == 0)


def test_all_words_of_a_packed_result_are_written(cupy, capability):
    """Padding, too, which nothing clears beforehand: lines up to 16, columns up to 1024."""
    shapes = [(16, 1024, 33), (272, 3072, 4097), (528, 1024, 100), (1, 1, 70), (17, 33, 5000)]
    shapes += [(m, n, 1030) for m in (15, 65, 300) for n in (31, 64, 97, 129, 1000, 1025, 1500)]
    for kernel in architectures.kernels_for(capability):
        for m, n, k in shapes:
            a, b = operands(cupy, m, n, k)
            bits = expected(cupy, a, b) >= 0
            with force_kernel(kernel):
                result = cupybnn.xnor_gemm_packed(a, b)
            whole = cupybnn.pack(cupy.where(bits, np.int8(1), np.int8(-1)))
            assert bool((result.words == whole.words).all()), (kernel, m, n)
            assert bool((result.popcounts == bits.sum(1)).all()), (kernel, m, n)


def test_counts_of_many_results_in_a_row(cupy):
    """They lie side by side in memory that is cleared once for many calls."""
    a, b = operands(cupy, 70, 300, 500)
    a, b = cupybnn.pack(a), cupybnn.pack(b, axis=-2)
    want = (cupybnn.xnor_gemm(a, b) >= 0).sum(1)
    results = [cupybnn.xnor_gemm_packed(a, b) for _ in range(200)]
    assert all(bool((result.popcounts == want).all()) for result in results)


def test_products_that_follow_each_other_at_once(cupy):
    """A launch may begin before the one ahead has ended; it must not read before that."""
    x = cupybnn.pack(operands(cupy, 64, 1, 4096)[0])
    weights = [cupybnn.pack(operands(cupy, 1, 4096, 4096, seed)[1], axis=-2) for seed in range(12)]
    got = want = x
    for weight in weights:
        got = cupybnn.xnor_gemm_packed(got, weight)
    for weight in weights:
        cupy.cuda.Device().synchronize()
        dense = cupybnn.xnor_gemm(want, weight)
        cupy.cuda.Device().synchronize()
        want = cupybnn.pack(dense)
    assert bool((got.words == want.words).all())
    assert bool((got.popcounts == want.popcounts).all())


def test_memory_is_poisoned(cupy):
    word = np.frombuffer(bytes([POISON_BYTE] * 4), np.int32)[0]
    assert bool((launching.empty((5, 3), np.int32) == word).all())
    assert bool((cupy.ndarray(7, np.int32, memptr=launching.alloc(28)) == word).all())


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kernel", architectures.KERNELS)
def test_a_kernel_equals_an_int64_product_on_random_cases(cupy, capability, kernel, seed):
    """25 seeds of 20 cases, for each kernel that runs here."""
    if kernel not in architectures.kernels_for(capability):
        pytest.skip(f"{kernel} does not run on compute capability {capability}")
    with force_kernel(kernel):
        check_random_cases(cupy, 1000 + seed)


def test_every_k_up_to_a_chunk_and_beyond(cupy, capability):
    for kernel in architectures.kernels_for(capability):
        long = (2047, 2048, 2049, 4095, 4097, 9999, 32_767, 32_769, 65_535, 65_537, 70_000)
        for k in [*range(1, 70), *range(1020, 1030), *long]:
            a, b = operands(cupy, 33, 17, k)
            with force_kernel(kernel):
                got = cupybnn.xnor_gemm(a, b, dtype=np.int32)
            assert bool((got == expected(cupy, a, b)).all()), (kernel, k)


def test_the_named_kernel_is_the_one_that_runs(cupy, capability, capfd, monkeypatch):
    monkeypatch.setenv("CUPYBNN_DEBUG", "1")
    for number, kernel in enumerate(architectures.kernels_for(capability)):
        a, b = operands(cupy, 40 + number, 50, 60)
        with force_kernel(kernel):
            cupybnn.xnor_gemm(a, b)
        assert f": {kernel} " in capfd.readouterr().err


@pytest.mark.parametrize("dtype", ["int32", "float32", "float16", "float64", "int16"])
def test_results_of_any_strides(cupy, dtype):
    for m, n, k in ((130, 260, 4100), (7, 300, 100), (33, 33, 33)):
        a, b = operands(cupy, m, n, k)
        want = expected(cupy, a, b)
        for out in (
            cupy.full((n, m), 77, dtype).T,
            cupy.full((m, 2 * n + 1), 77, dtype)[:, 1 : 2 * n + 1 : 2],
            cupy.full((m, n + 3), 77, dtype)[:, 3:],
            cupy.full((m, n), 77, dtype)[::-1],
        ):
            cupybnn.xnor_gemm(a, b, out=out)
            assert bool((out == want.astype(dtype)).all())


RAGGED = {
    "sm80 large": sm80.config(4, 2, 4, 8, 3),
    "sm90 128x128": sm90.config(1, 128, 6),
    "sm90 256x192": sm90.config(2, 192, 4),
    "sm90 128x256 deferred": sm90.config(1, 256, 4, deferred=4),
    "sm90 256x128 deferred": sm90.config(2, 128, 4, deferred=4),
}


@pytest.mark.parametrize("dtype", ["int32", "float32", "float16"])
@pytest.mark.parametrize("name", RAGGED)
def test_rows_may_begin_at_any_address(cupy, capability, name, dtype):
    """Lanes exchange results to store whole sectors, in a way of its own for each remainder."""
    require(RAGGED[name], capability)
    for m, n in ((300, 515), (129, 255), (17, 1), (40, 23)):
        a, b = operands(cupy, m, n, 4100)
        a, b = cupybnn.pack(a), cupybnn.pack(b, axis=-2)
        with force_kernel("smxx"):
            want = cupybnn.xnor_gemm(a, b, dtype=np.int32).astype(dtype)
        for left, right in [(i, 0) for i in range(17)] + [(0, i) for i in range(1, 17)]:
            around = cupy.full((m + 2, left + n + right), 77, dtype)
            with force_kernel(RAGGED[name]):
                cupybnn.xnor_gemm(a, b, out=around[1:-1, left : left + n])
            assert bool((around[1:-1, left : left + n] == want).all()), (m, n, left, right)
            around[1:-1, left : left + n] = 77
            assert bool((around == 77).all()), (m, n, left, right)


@pytest.mark.parametrize("name", [name for name in RAGGED if "deferred" in name])
def test_scaled_rows_of_deferred_tiles_may_begin_at_any_address(cupy, capability, name):
    """Sums are exchanged before they are scaled, so each lane has the scales of other columns."""
    require(RAGGED[name], capability)
    m, n, k = 300, 515, 4100
    a, b = operands(cupy, m, n, k)
    random = cupy.random.default_rng(4)
    row, column, bias = (random.standard_normal(shape, np.float32) for shape in ((m, 1), n, n))
    want = (expected(cupy, a, b).astype(np.float32) * row * column + bias).astype(np.float32)
    for left in range(9):
        around = cupy.full((m, left + n), 77, np.float32)
        with force_kernel(RAGGED[name]):
            cupybnn.xnor_gemm(a, b, scale=(row, column), bias=bias, out=around[:, left:])
        assert bool((around[:, left:] == want).all()), left
        assert bool((around[:, :left] == 77).all()), left


def test_a_view_is_written_and_nothing_around_it(cupy):
    a, b = operands(cupy, 200, 300, 5000)
    around = cupy.full((204, 308), POISON, np.int32)
    cupybnn.xnor_gemm(a, b, out=around[2:202, 4:304])
    assert bool((around[2:202, 4:304] == expected(cupy, a, b)).all())
    around[2:202, 4:304] = POISON
    assert bool((around == POISON).all())


@pytest.mark.parametrize("kernel", architectures.KERNELS)
def test_on_a_stream_of_its_own(cupy, capability, kernel):
    require(kernel, capability)
    a, b = operands(cupy, 500, 600, 4500)
    want = expected(cupy, a, b)
    cupy.cuda.Device().synchronize()
    with force_kernel(kernel), cupy.cuda.Stream(non_blocking=True) as stream:
        got = cupybnn.xnor_gemm(a, b)
        packed = cupybnn.xnor_gemm_packed(a, b)
        bits = packed.unpack(np.int8)
        stream.synchronize()
    assert bool((got == want).all())
    assert bool((bits == cupy.where(want >= 0, 1, -1)).all())


@pytest.mark.parametrize("kernel", architectures.KERNELS)
def test_from_several_threads(cupy, capability, kernel):
    require(kernel, capability)
    shapes = [(100 + 7 * i, 200 + 3 * i, 1000 + 500 * i) for i in range(8)]
    wrong: list[object] = []

    def work(shape):
        try:
            a, b = operands(cupy, *shape)
            want = expected(cupy, a, b)
            # What is forced holds for the thread that forces it.
            with force_kernel(kernel), cupy.cuda.Stream(non_blocking=True) as stream:
                stream.wait_event(cupy.cuda.Stream.null.record())
                for _ in range(20):
                    got = cupybnn.xnor_gemm(a, b)
                stream.synchronize()
            if not bool((got == want).all()):
                wrong.append(shape)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(shape,)) for shape in shapes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kernel", architectures.KERNELS)
def test_in_a_cuda_graph(cupy, capability, kernel):
    require(kernel, capability)
    a, b = operands(cupy, 300, 400, 5000)
    weights = cupybnn.pack(b, axis=-2)
    out = cupy.full((300, 400), POISON, np.int32)
    pool = cupy.cuda.MemoryPool()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with force_kernel(kernel), stream, cupy.cuda.using_allocator(pool.malloc):
        cupybnn.xnor_gemm(a, weights, out=out)
        packed = cupybnn.xnor_gemm_packed(a, weights)
        stream.synchronize()
        stream.begin_capture()
        cupybnn.xnor_gemm(a, weights, out=out)
        packed = cupybnn.xnor_gemm_packed(a, weights)
        graph = stream.end_capture()
    for seed in range(3):
        a[...] = operands(cupy, 300, 400, 5000, seed)[0]
        out.fill(POISON)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        want = expected(cupy, a, b)
        assert bool((out == want).all())
        assert bool((packed.unpack(bool) == (want >= 0)).all())
        assert bool((packed.popcounts == (want >= 0).sum(1)).all())


@pytest.mark.parametrize("kernel", architectures.KERNELS)
def test_more_than_2_to_the_31_results(cupy, capability, kernel):
    require(kernel, capability)
    m, n, k = 40_000, 60_000, 64
    if cupy.cuda.runtime.memGetInfo()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    a, b = operands(cupy, m, n, k)
    out = cupy.full((m, n), 127, np.float16)
    with force_kernel(kernel):
        cupybnn.xnor_gemm(a, b, out=out)
    for first in (0, 17_777, m - 64):
        rows = slice(first, first + 64)
        assert bool((out[rows] == expected(cupy, a[rows], b)).all())
    cupy.get_default_memory_pool().free_all_blocks()


def test_threshold_and_flip_in_every_kernel(cupy, capability):
    for kernel in architectures.kernels_for(capability):
        for m, n, k in ((70, 300, 500), (300, 1100, 4500)):
            a, b = operands(cupy, m, n, k)
            want = expected(cupy, a, b)
            random = cupy.random.default_rng(3)
            threshold = random.integers(-40, 40, n, dtype=np.int32)
            threshold[:2] = cupy.asarray([2**31 - 1, -(2**31)], np.int32)
            flip = random.random(n) < 0.5
            with force_kernel(kernel):
                got = cupybnn.xnor_gemm_packed(a, b, threshold=threshold, flip=flip)
            bits = (want >= threshold) ^ flip
            assert bool((got.unpack(np.int8) == cupy.where(bits, 1, -1)).all()), kernel
            assert bool((got.popcounts == bits.sum(1)).all()), kernel


@pytest.mark.parametrize("kernel", architectures.KERNELS)
@pytest.mark.parametrize("dtype", ["f4", "f2", *(d.name for d in BFLOAT16)])
def test_scale_and_bias_in_every_kernel(cupy, capability, kernel, dtype):
    """Each step rounded to float32, rows first, whichever way round the kernel has them."""
    require(kernel, capability)
    dtype = BFLOAT16[0] if dtype == "bfloat16" else np.dtype(dtype)
    for m, n, k in ((70, 300, 500), (3, 300, 5000), (300, 1100, 4500)):
        a, b = operands(cupy, m, n, k)
        random = np.random.default_rng(5)
        row, column, bias = (
            random.standard_normal(shape).astype(np.float32) for shape in ((m, 1), n, n)
        )
        want = (host(expected(cupy, a, b)).astype(np.float32) * row * column + bias).astype(dtype)
        scale = cupy.asarray(row), cupy.asarray(column)
        with force_kernel(kernel):
            got = cupybnn.xnor_gemm(a, b, scale=scale, bias=cupy.asarray(bias), dtype=dtype)
        np.testing.assert_array_equal(host(got).astype(np.float64), want.astype(np.float64))


def test_a_packed_result_is_the_next_products_operand(cupy):
    a, b = operands(cupy, 300, 777, 5000)
    c = cupy.random.default_rng(1).standard_normal((777, 60), dtype=np.float32)
    hidden = cupybnn.xnor_gemm_packed(a, b)
    want = expected(cupy, expected(cupy, a, b).astype(np.float32), c)
    assert bool((cupybnn.xnor_gemm(hidden, c) == want).all())


def test_a_kernel_of_another_architecture_is_refused(cupy, capability):
    if capability in sm90.CAPABILITIES:
        pytest.skip("all kernels run here")
    a, b = operands(cupy, 10, 10, 10)
    with (
        force_kernel("sm90"),
        pytest.raises(ValueError, match="does not run on compute capability"),
    ):
        cupybnn.xnor_gemm(a, b)
