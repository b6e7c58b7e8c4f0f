"""Kernels that Numba compiles: each way to count, threads, processes, the cache on disk."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from gemm_cases import BFLOAT16, array, assert_product, reference

from cupybnn import pack, settings, sign, unpack, xnor_gemm, xnor_gemm_packed
from cupybnn.backends import cpu, numpy_backend


@pytest.fixture(params=["LOOKUP", "COUNT", "FEW"])
def way(request, cpu_kernels, monkeypatch):
    """Each way to count, whatever the processor and the shape would choose."""
    kernels = cpu_kernels.kernels
    if request.param == "LOOKUP" and "avx2" not in cpu_kernels.describe()["features"]:
        pytest.skip("needs a processor with AVX2")
    taken = []
    original = cpu_kernels.plans.plan

    def planned(*arguments):
        plan = original(*arguments)
        plan.memory[kernels.PLAN.index("method")] = getattr(kernels, request.param)
        taken.append(plan)
        return plan

    monkeypatch.setattr(cpu_kernels.plans, "plan", planned)
    original.cache_clear()
    yield request.param
    original.cache_clear()
    assert taken


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        *((1, 1, 1), (3, 63, 5), (4, 64, 4), (5, 65, 33), (33, 449, 16), (16, 448, 17)),
        *((65, 897, 31), (70, 2000, 70), (515, 130, 40), (40, 130, 517)),
    ],
)
def test_each_way_counts_exactly(way, m, k, n):
    rng = np.random.default_rng(m + k + n)
    a, b = array(rng, np, (m, k)), array(rng, np, (k, n))
    expected = reference(a, b)
    threshold, flip = rng.integers(-9, 9, n), rng.random(n) < 0.5
    assert_product(xnor_gemm(a, b), expected, "arrays")
    assert_product(xnor_gemm(pack(a), pack(b, axis=-2)), expected, "packed")
    out = np.empty((n, m), np.float32).T
    assert_product(xnor_gemm(a, b, out=out), expected, "columns")
    p = xnor_gemm_packed(a, b, threshold=threshold, flip=flip)
    plus = (expected >= threshold) != flip
    assert np.array_equal(unpack(p, bool), plus)
    assert np.array_equal(p.popcounts, plus.sum(axis=1))


def test_bits_that_all_differ_and_all_agree(way):
    for k in (448, 449, 896, 5000):  # up to the last count that a byte holds
        a, b = np.ones((9, k), np.int8), np.ones((k, 40), np.int8)
        b[:, ::3] = -1
        assert_product(xnor_gemm(a, b), reference(a, b), k)


DTYPES = [*(np.dtype(c) for c in ("f4", "f8", "f2", "i1", "i2", "i4", "i8", "?")), *BFLOAT16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_follows_the_sign_at_its_edges(cpu_kernels, dtype, monkeypatch):
    if dtype.kind == "b":
        values = [True, False]
    elif dtype.kind == "i":
        values = [np.iinfo(dtype).min, -1, 0, 1, np.iinfo(dtype).max]
    else:
        values = [-np.inf, -1.0, -0.0, 0.0, 1e-30, -1e-30, np.inf, np.nan, -np.nan]
    x = np.resize(np.array(values, dtype), (3, 70, 141))
    from cupybnn.backends.cpu import packing

    taken = []
    original = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *a: taken.append(1) or original(*a))
    views = (x, x[:, ::2, ::3], x[..., ::-1], x.swapaxes(1, 2), x[:, :5], x[:, :, :9], x[:, :1])
    for view, axis in itertools.product(views, (-1, -2)):
        assert np.array_equal(unpack(pack(view, axis=axis), bool), sign(view) > 0)
    assert taken


@pytest.mark.parametrize("dtype", [np.dtype(">f4"), np.dtype(np.longdouble)], ids=str)
def test_other_dtypes_are_left_to_numpy(cpu_kernels, dtype):
    x = np.linspace(-1, 1, 700).reshape(10, 70).astype(dtype)
    assert not cpu_kernels.can_pack(dtype)
    assert_product(xnor_gemm(x, x.T), reference(x, x.T), dtype)


def several_threads(monkeypatch, count):
    from cupybnn.backends.cpu import operands, plans

    monkeypatch.setattr(settings, "kernel_threads", lambda: count)
    monkeypatch.setattr(plans, "PRODUCTS_A_THREAD", 1)
    monkeypatch.setattr(operands, "ELEMENTS_A_THREAD", 1)


def test_parts_of_several_threads_make_one_result(cpu_kernels, monkeypatch):
    several_threads(monkeypatch, 3)
    rng = np.random.default_rng(0)
    for m, k, n in ((300, 200, 500), (20, 200, 500), (300, 200, 9)):
        a, b = array(rng, np, (m, k)), array(rng, np, (k, n))
        expected = reference(a, b)
        assert_product(xnor_gemm(a, b), expected, (m, k, n))
        signs = unpack(xnor_gemm_packed(a, b), bool)
        assert np.array_equal(signs, expected >= 0)


# Products that are known -------------------------------------------------------------------------


def test_a_product_is_prepared_once_and_follows_its_operands(cpu_kernels):
    rng = np.random.default_rng(0)
    shapes = [((16, 70), (70, 16)), ((5, 3), (3, 40)), ((64, 64), (64, 64)), ((40, 9), (9, 5))]
    known = set()
    for _ in range(3):
        for left, right in shapes:
            for dtype in ("f4", "f8", "i1", "?"):
                a, b = array(rng, np, left, dtype), array(rng, np, right, dtype)
                expected = reference(a, b)
                columns = np.asfortranarray(b)
                assert_product(xnor_gemm(a, b), expected, (left, dtype))
                assert_product(xnor_gemm(a, columns), expected, (left, dtype))
                assert_product(xnor_gemm(a, pack(b, axis=-2)), expected, (left, dtype))
                assert_product(xnor_gemm(pack(a), pack(b, axis=-2)), expected, (left, dtype))
                halves = xnor_gemm(a, b, dtype=np.float32)
                assert halves.dtype == np.float32
                assert_product(halves, expected, (left, dtype))
        known.add(len(numpy_backend.prepared))
    assert len(known) == 1
    assert known.pop() > 40


def test_a_known_product_still_warns_of_zeros_and_ones(cpu_kernels):
    a = np.linspace(-1, 1, 400, dtype=np.float32).reshape(20, 20)
    xnor_gemm(a, a)
    assert numpy_backend.prepared
    for operands in ((np.eye(20, dtype=np.float32), a), (a, np.eye(20, dtype=np.float32))):
        with pytest.warns(UserWarning, match="holds only 0 and 1"):
            xnor_gemm(*operands)


def test_a_known_product_may_be_forced_to_numpy(cpu_kernels, monkeypatch):
    a = np.linspace(-1, 1, 400, dtype=np.float32).reshape(20, 20)
    expected = xnor_gemm(a, a)

    def used(*operands):
        raise AssertionError

    monkeypatch.setattr(numpy_backend, "prepared", dict.fromkeys(numpy_backend.prepared, used))
    with pytest.raises(AssertionError):
        xnor_gemm(a, a)
    with numpy_backend.force_kernel("numpy"):
        assert np.array_equal(xnor_gemm(a, a), expected)
    monkeypatch.setattr(settings, "cpu_kernels", lambda: False)
    assert np.array_equal(xnor_gemm(a, a), expected)


def test_many_threads_may_call_at_once(cpu_kernels):
    rng = np.random.default_rng(0)
    a, b = array(rng, np, (200, 300)), array(rng, np, (300, 150))
    expected, wrong = reference(a, b), []

    def work():
        for _ in range(20):
            if not np.array_equal(xnor_gemm(a, b), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes(cpu_kernels, monkeypatch):
    several_threads(monkeypatch, 2)
    a = np.ones((100, 100), np.float32)
    expected = xnor_gemm(a, a)  # starts the parent's threads
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(xnor_gemm(a, a), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


# The cache ---------------------------------------------------------------------------------------


def plus_one(x):
    return x + 1


@pytest.fixture
def cache(cpu_kernels, tmp_path, monkeypatch):
    """The module of the cache, with files in a folder of the test."""
    from numba import config

    from cupybnn.backends.cpu import cache

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    return cache


def test_a_kernel_is_compiled_once(cache, tmp_path):
    first, second = cache.cached()(plus_one), cache.cached()(plus_one)
    assert first(1) == second(1) == 2
    assert sum(first.dispatcher.stats.cache_hits.values()) == 0
    assert sum(second.dispatcher.stats.cache_hits.values()) == 1
    assert str(tmp_path) in cache.folder(first)


def test_compilation_is_announced_once(cache):
    from cupybnn.backends.cpu import announce_compilation

    told = []
    try:
        announce_compilation(lambda: told.append(1))
        assert [cache.cached()(plus_one)(1) for _ in range(2)] == [2, 2]
        assert told == [1]
        announce_compilation(lambda: told.append(2))
        assert cache.cached()(plus_one)(1) == 2  # loaded
        assert told == [1]
    finally:
        announce_compilation(None)


def test_machine_code_is_loaded_without_what_numba_compiles_with(cpu_kernels, tmp_path):
    a = np.linspace(-1, 1, 90000, dtype=np.float32).reshape(300, 300)
    xnor_gemm(a, a)  # there is a cache from now on
    code = (
        "import sys, numpy, cupybnn\n"
        "a = numpy.ones((300, 300), numpy.float32)\n"
        "assert (cupybnn.xnor_gemm(a, a) == 300).all()\n"
        "from cupybnn.backends.cpu import kernels\n"
        "assert sum(kernels.product.dispatcher.stats.cache_hits.values()) == 1\n"
        "print(*{'scipy.linalg', 'numba.np.arrayobj', 'numba.np.linalg'} & {*sys.modules})\n"
    )
    environment = dict(os.environ)
    environment.pop("CUPYBNN_CPU_KERNELS", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100,
        cwd=tmp_path,  # not a checkout: the same files as here are to be imported
    )  # fmt: skip
    assert done.stdout.split() == [], done.stdout
    assert done.returncode == 0, done.stderr


def test_damaged_files_are_compiled_anew(cache, tmp_path):
    assert cache.cached()(plus_one)(1) == 2
    files = [*tmp_path.rglob("*.nb?")]
    assert len(files) == 2
    for contents in (b"", b"not a pickle"):
        for file in files:
            file.write_bytes(contents)
        assert cache.cached()(plus_one)(1) == 2
        again = cache.cached()(plus_one)
        assert again(1) == 2
        assert sum(again.dispatcher.stats.cache_hits.values()) == 1


def test_a_folder_that_cannot_be_written_to_is_no_error(cache, tmp_path, monkeypatch):
    kernel = cache.cached()(plus_one)
    folder = tmp_path / "file"
    folder.write_bytes(b"")
    monkeypatch.setattr(kernel.dispatcher._cache, "_cache_path", str(folder))
    assert kernel(1) == 2

    def no_locator(*args):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(cache._Cache, "__init__", no_locator)
    kernel = cache.cached()(plus_one)
    assert kernel(1) == 2
    assert cache.folder(kernel) is None


# Whether they are used ---------------------------------------------------------------------------


@pytest.fixture
def unknown(monkeypatch):
    """As in a new process: it is not known yet whether Numba can be imported."""
    monkeypatch.setattr(cpu, "_found", None)
    monkeypatch.setattr(settings, "cpu_kernels", lambda: True)


def test_without_numba_numpy_computes(unknown, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    a = np.ones((200, 200), np.float32)
    assert (xnor_gemm(a, a) == 200).all()
    assert cpu.status().reason == "Numba is not installed: pip install numba (the extra cpu)."
    assert numpy_backend.kernels() == ["numpy"]


def test_a_small_product_does_not_import_them(unknown):
    a = pack(np.ones((40, 40), np.float32))
    assert (xnor_gemm(a, a.T) == 40).all()
    assert cpu._found is None


@pytest.mark.parametrize(("value", "used"), [("0", False), ("off", False), ("1", True), ("", True)])
def test_a_variable_switches_them_off(monkeypatch, value, used):
    monkeypatch.setenv("CUPYBNN_CPU_KERNELS", value)
    assert settings.cpu_kernels.__wrapped__() is used
    monkeypatch.setattr(settings, "cpu_kernels", settings.cpu_kernels.__wrapped__)
    if not used:
        assert cpu.compiled() is None
        assert "CUPYBNN_CPU_KERNELS" in cpu.status().reason


@pytest.mark.parametrize(("omp", "numba", "threads"), [("3", "", 3), ("3", "2", 2), ("2", "5", 2)])
def test_threads_follow_the_environment(monkeypatch, omp, numba, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setenv("NUMBA_NUM_THREADS", numba)
    assert settings.kernel_threads.__wrapped__() == threads


def test_verify_and_info_know_them(cpu_kernels):
    from cupybnn.backends.devices import CPU
    from cupybnn.cli import info, verify

    assert verify._kernels(CPU) == ["numpy", "numba"]
    outcomes = [*verify.check(CPU, "numba", cases=verify.CASES[8:11])]
    assert len(outcomes) == 15
    assert not [outcome.problem for outcome in outcomes if outcome.problem]
    assert any("Numba" in line and "threads" in line for line in info.lines())


def test_small_products_of_a_batch_are_left_to_numpy(monkeypatch):
    monkeypatch.setattr(settings, "cpu_kernels", lambda: True)
    if cpu.compiled() is None:
        pytest.skip(f"needs Numba: {cpu.status().reason}")
    taken = []
    monkeypatch.setattr(cpu.compiled(), "gemm", lambda a, b, out, e: taken.append(a.shape))
    many = np.ones((5, 9, 20), np.float32)
    assert (xnor_gemm(many, many.swapaxes(1, 2)) == 20).all()
    xnor_gemm(many, np.ones((20, 3)))  # one tall product
    xnor_gemm(np.ones((2, 64, 64)), np.ones((2, 64, 64)))
    xnor_gemm(many[0], np.ones((20, 3)))
    assert taken == [(5, 9, 20), (2, 64, 64), (9, 20)]


def test_an_error_in_one_thread_leaves_nothing_running(cpu_kernels):
    from cupybnn.backends.cpu import parts, threads

    done = []

    def kernel(counter):
        part = parts.first_part(counter)
        while part < 40:
            done.append(part)
            part = parts.next_part(counter, part)

    def failing(counter):
        if threading.current_thread() is threading.main_thread():
            raise MemoryError
        kernel(counter)

    threads.run(kernel, 40, 3)
    assert sorted(done) == list(range(40))
    done.clear()
    with pytest.raises(MemoryError):
        threads.run(failing, 40, 3)
    assert len(done) == len(set(done)) <= 40
