"""The NumPy product's paths: each is named, and each is exact at its edges."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
import warnings

import numpy as np
import pytest
from gemm_cases import array, assert_product, reference

from cupybnn import pack, xnor_gemm
from cupybnn.backends import numpy_lines, numpy_product, numpy_threads


@pytest.fixture
def paths(monkeypatch):
    """Names of the paths that products took."""
    taken = []
    for name in ("_small_product", "_count_product", "_panel_product"):
        original = getattr(numpy_product, name)

        def spy(*args, name=name, original=original):
            taken.append(name)
            return original(*args)

        monkeypatch.setattr(numpy_product, name, spy)
    return taken


@pytest.fixture
def small_blocks(monkeypatch):
    """Panels so small that a small product has many, with edges in odd places."""
    monkeypatch.setattr(numpy_product, "BLOCK_A", 24)
    monkeypatch.setattr(numpy_product, "BLOCK_B", 40)
    monkeypatch.setattr(numpy_product, "BLOCK_K", 256)
    monkeypatch.setattr(numpy_product, "BLOCK", 500)
    monkeypatch.setattr(numpy_lines, "BLOCK", 500)
    monkeypatch.setattr(numpy_product, "SMALL_PRODUCT", 0)


@pytest.mark.parametrize(
    ("shape", "packed", "path"),
    [
        ((16, 16, 16), False, "_small_product"),
        ((16, 16, 16), True, "_small_product"),
        ((1, 4096, 1024), False, "_count_product"),
        ((1024, 4096, 1), False, "_count_product"),
        ((16, 4096, 300), True, "_count_product"),
        ((300, 1024, 512), False, "_panel_product"),
        ((300, 1024, 512), True, "_panel_product"),
    ],
)
def test_path_of_a_shape(paths, shape, packed, path):
    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = array(rng, np, (m, k)), array(rng, np, (k, n))
    x, y = (pack(a), pack(b, axis=-2)) if packed else (a, b)
    assert_product(xnor_gemm(x, y), reference(a, b), shape)
    assert paths == [path]


@pytest.mark.parametrize("m", [1, 2, 23, 24, 25, 49, 81])
@pytest.mark.parametrize("n", [1, 2, 39, 40, 41, 80, 83])
def test_edges_of_panels(small_blocks, paths, m, n):
    rng = np.random.default_rng(m * n)
    for k in (1, 191, 192, 255, 256, 257, 513):
        for layout in "CF":
            a = array(rng, np, (m, k), layout=layout)
            b = array(rng, np, (k, n), layout=layout)
            expected = reference(a, b)
            case = (m, k, n, layout)
            assert_product(xnor_gemm(a, b), expected, case)
            assert_product(xnor_gemm(a, b, dtype=np.int16), expected, case)
            assert_product(xnor_gemm(pack(a), pack(b, axis=-2)), expected, (case, "packed"))
            scaled = xnor_gemm(a, b, scale=np.arange(n), bias=np.arange(n))
            assert_product(scaled, expected * np.arange(n) + np.arange(n), (case, "scaled"))
    assert "_small_product" not in paths


def test_sums_beyond_float32(monkeypatch):
    """K of 2**24 + 1: the integer is not a float32, and rounds only where the result is one."""
    k = (1 << 24) + 1
    a = np.broadcast_to(np.int8(1), (2, k))
    for rows in (1, 2):
        assert_product(xnor_gemm(a[:rows], a.T), np.full((rows, 2), k), rows)
        assert_product(xnor_gemm(a[:rows], a.T, dtype="i8"), np.full((rows, 2), k), rows)
        exact = xnor_gemm(a[:rows], a.T, dtype="f8")
        assert (exact == k).all()
        assert (xnor_gemm(a[:rows], a.T, dtype="f4") == np.float32(k)).all()


@pytest.mark.parametrize("k", [2047, 2048, 2049, 4096])
def test_pairs_hold_both_products_at_their_limits(paths, k):
    """lo and hi each at K, -K, and beside them, in every combination."""
    few = np.array([0, 1, 2, k // 2, k - 1, k])
    # Column n has few[n % 6] elements that are -1, paired with every other count.
    counts = np.concatenate([np.repeat(few, 6), np.tile(few, 6)])
    order = np.arange(72).reshape(2, 36)
    for columns in (counts, counts[order.T.ravel()]):  # distant and adjacent pairs
        b = np.where(np.arange(k)[:, None] < columns, -1, 1).astype(np.float32)
        a = np.ones((40, k), np.float32)
        a[1::2] = -1
        expected = reference(a, b)
        for x in (b, np.asfortranarray(b)):
            assert_product(xnor_gemm(a, x), expected, k)
    assert set(paths) == {"_panel_product"}


def test_packed_operands_are_not_unpacked_whole():
    """Beside its scratch memory a product takes little more than its result."""
    m, k, n = 3000, 4096, 3000
    rng = np.random.default_rng(0)
    a = pack(rng.standard_normal((m, k), dtype=np.float32))
    b = pack(rng.standard_normal((k, n), dtype=np.float32), axis=-2)
    numpy_product._scratch.memory = None
    tracemalloc.start()
    try:
        result = xnor_gemm(a, b)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    sums = 4 * numpy_product.BLOCK_A * numpy_product.BLOCK_B
    blocks = 4 << 20  # bits and 16-bit weights on their way into the panels
    assert peak < result.nbytes + numpy_product.SCRATCH_BYTES + sums + blocks
    assert m * k + k * n > peak - result.nbytes - numpy_product.SCRATCH_BYTES


def test_products_in_several_threads_at_once():
    rng = np.random.default_rng(0)
    operands = [(array(rng, np, (300, 700)), array(rng, np, (700, 400))) for _ in range(4)]
    expected = [reference(a, b) for a, b in operands]
    wrong = []

    def work(i):
        a, b = operands[i]
        for _ in range(10):
            if not np.array_equal(xnor_gemm(a, b), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.fixture
def many_threads(monkeypatch):
    """As on a machine with five cores, whatever the work."""
    monkeypatch.setattr(numpy_threads.settings, "cpu_threads", lambda: 5)
    monkeypatch.setattr(numpy_threads, "ELEMENTS_A_THREAD", 1)
    monkeypatch.setattr(numpy_threads, "_pool", None)
    yield
    if numpy_threads._pool is not None:
        numpy_threads._pool.shutdown()


def test_work_is_shared_out_whole(many_threads):
    for size in (1, 2, 4, 5, 6, 7, 100):
        parts = []
        numpy_threads.parallel_for(size, 1000, lambda i, j, parts=parts: parts.append((i, j)))
        assert [x for i, j in sorted(parts) for x in range(i, j)] == list(range(size))
        assert len(parts) == min(5, size)


def test_shared_out_products(many_threads):
    rng = np.random.default_rng(0)
    for m, k, n in ((300, 1000, 200), (1, 3000, 1001), (1001, 3000, 1), (200, 300, 300)):
        for layout in "CF":
            a = array(rng, np, (m, k), layout=layout)
            b = array(rng, np, (k, n), layout=layout)
            assert_product(xnor_gemm(a, b), reference(a, b), (m, k, n, layout))
            assert_product(xnor_gemm(pack(a), b), reference(a, b), (m, k, n, layout))


@pytest.mark.parametrize("failing", [0, 4])
def test_an_error_in_any_thread_is_raised_when_none_is_at_work(many_threads, failing):
    begun, ended = [], []

    def work(start, stop):
        begun.append(start)
        try:
            if start == failing:
                raise MemoryError(start)
            time.sleep(0.01)
        finally:
            ended.append(start)

    with pytest.raises(MemoryError):
        numpy_threads.parallel_for(5, 100, work)
    seen = list(begun)
    assert sorted(ended) == sorted(seen)
    assert len(set(seen)) == len(seen)
    time.sleep(0.02)
    assert begun == seen  # nor does one begin later


@pytest.mark.parametrize("started", [0, 2])
def test_work_is_whole_when_no_further_thread_can_be_started(many_threads, monkeypatch, started):
    start, left = threading.Thread.start, [started]

    def limited(thread):
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    for _ in range(20):
        rows = []
        numpy_threads.parallel_for(5, 100, lambda i, j, rows=rows: rows.extend(range(i, j)))
        assert sorted(rows) == [0, 1, 2, 3, 4]


def test_threads_treat_overflow_as_the_caller_does(many_threads):
    large = np.full(5, 1e38, np.float32)

    def work(start, stop):
        time.sleep(0.01)  # so that others than the caller get a part
        large[start:stop] * np.float32(1e38)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with np.errstate(all="ignore"):
            numpy_threads.parallel_for(5, 100, work)
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        numpy_threads.parallel_for(5, 100, lambda i, j: work(i, j) if i else time.sleep(0.1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_too(many_threads):
    rng = np.random.default_rng(0)
    a, b = array(rng, np, (1, 3000)), array(rng, np, (3000, 1001))
    expected = reference(a, b)
    assert_product(xnor_gemm(a, b), expected, "parent")
    child = os.fork()
    if child == 0:
        # No pytest in the child: its exit status is all it says. alarm ends it, should it hang.
        import signal

        signal.alarm(30)
        os._exit(0 if np.array_equal(xnor_gemm(a, b), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
