"""Loading kernels, with a stand-in for the driver: a launch gets the shared memory it asks for."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from cupybnn.backends.cuda import compiler, fused, fused_batch, launching

STATIC_LIMIT, LIMIT = 48 * 1024, 227 * 1024


class Function:
    """A kernel of the driver: a launch must not ask for more than was allowed."""

    def __init__(self, device: int) -> None:
        self.device, self.kernel = device, SimpleNamespace(ptr=0)
        self.allowed, self.carveout, self.history = STATIC_LIMIT, None, []

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self.allowed

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        assert size <= LIMIT, "CUDA_ERROR_INVALID_VALUE"
        self.history.append(size)
        self.allowed = size

    @property
    def preferred_shared_memory_carveout(self) -> int | None:
        return self.carveout

    @preferred_shared_memory_carveout.setter
    def preferred_shared_memory_carveout(self, percent: int) -> None:
        self.carveout = percent

    def __call__(self, grid, block, arguments, shared_mem=0):
        assert shared_mem <= self.allowed, "CUDA_ERROR_INVALID_VALUE"


@pytest.fixture
def driver(monkeypatch):
    """Kernels that were compiled, each with the number of the device that was current."""
    made: list[Function] = []
    current = SimpleNamespace(number=0)

    class Module:
        def __init__(self, code, options, backend):
            self.options = options

        def get_function(self, name):
            made.append(Function(current.number))
            return made[-1]

    class Device:
        attributes: ClassVar = {"MaxSharedMemoryPerBlockOptin": LIMIT, "MultiProcessorCount": 132}
        compute_capability = "90"

        def __init__(self, number):
            self.number = number

        def use(self):
            current.number = self.number

    cuda = SimpleNamespace(
        Device=Device,
        get_current_stream=lambda: SimpleNamespace(ptr=7),
    )
    cupy = SimpleNamespace(RawModule=Module, cuda=cuda, empty=np.empty, zeros=np.zeros)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(compiler, "_kernels", {})
    for cached in (compiler.architecture, compiler.multiprocessors, compiler.shared_memory_limit):
        cached.cache_clear()
    yield SimpleNamespace(made=made, current=current)
    for cached in (compiler.architecture, compiler.multiprocessors, compiler.shared_memory_limit):
        cached.cache_clear()


def load(shared: int, device: int = 0, drop: int = 0):
    return compiler.load_kernel("smxx_batch", "gather_deformed", (("DROP", drop),), device, shared)


def test_the_limit_is_raised_for_larger_launches_and_never_lowered(driver):
    for shared in (64, 784, 64, 3072, 784, 100_000, 50_000):
        load(shared)((1,), (256,), (), shared_mem=shared)
    (function,) = driver.made
    assert function.history == [64, 784, 3072, 100_000]
    assert function.carveout == 100  # so that several large blocks fit a multiprocessor


def test_a_kernel_that_was_first_launched_without_shared_memory(driver):
    load(0)
    load(60_000)((1,), (256,), (), shared_mem=60_000)
    assert driver.made[0].history == [60_000]


def test_each_device_and_each_variant_has_a_limit_of_its_own(driver):
    load(100_000)
    driver.current.number = 1
    load(60_000, device=1)((1,), (256,), (), shared_mem=60_000)
    load(50_000, drop=1)((1,), (256,), (), shared_mem=50_000)
    load(60_000, device=0)((1,), (256,), (), shared_mem=60_000)
    assert [f.history for f in driver.made] == [[100_000], [60_000], [50_000]]
    assert [f.device for f in driver.made] == [0, 1, 1]


def test_threads_that_ask_for_different_sizes_all_get_theirs(driver):
    sizes = [int(s) for s in np.random.default_rng(0).permutation(np.arange(1, 1601) * 100)]
    wrong: list[BaseException] = []
    barrier = threading.Barrier(8)

    def work(mine):
        try:
            barrier.wait()
            for shared in mine:
                load(shared)((1,), (256,), (), shared_mem=shared)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(sizes[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    (function,) = driver.made
    assert function.history == sorted(function.history)
    assert function.allowed == 160_000


def test_more_than_the_device_has_is_refused(driver):
    load(784)
    with pytest.raises(ValueError, match=r"gather_deformed needs 250000 bytes .* has 232448"):
        load(250_000)
    assert driver.made[0].history == [784]


def test_images_of_another_size_are_deformed_in_the_same_process(driver):
    """Digits of 8 x 8 pixels, then MNIST, then images that need more than 48 KiB."""

    def gather(side: int) -> fused_batch.Gather:
        def array(shape, dtype):
            return SimpleNamespace(
                shape=shape, dtype=np.dtype(dtype), size=int(np.prod(shape)),
                data=SimpleNamespace(ptr=0x1000),
            )  # fmt: skip

        deformation = fused_batch.Deformation(
            shape=(side, side), seed=1, shift=1.0, rotation=0.0, scale=0.0, shear=0.0
        )
        return fused_batch.Gather(
            images=array((10, side**2), np.uint8), all_labels=array((10,), np.int64),
            order=array((4, 5), np.int32), labels=array((5,), np.int64),
            step=array((1,), np.int64), x=array((5, side**2), np.float32), deformation=deformation,
        )  # fmt: skip

    launcher = fused.Launcher(0, np.dtype(np.float32))
    for side in (8, 28, 8, 300):
        gather(side).launch(launcher)
    (function,) = driver.made
    assert function.history == [64, 784, 90_000]


class TestTogether:
    """Kernels of a dry run are compiled side by side, and nothing is launched."""

    def test_all_that_a_launch_asks_for_is_compiled_once(self, driver, monkeypatch):
        at_a_time, most, lock = [0], [0], threading.Lock()
        both = threading.Barrier(2, timeout=10)
        compile_one = compiler._compile

        def slow(*arguments):
            with lock:
                at_a_time[0] += 1
                most[0] = max(most[0], at_a_time[0])
            both.wait()  # for a second one at the same time
            with lock:
                at_a_time[0] -= 1
            return compile_one(*arguments)

        monkeypatch.setattr(compiler, "_compile", slow)
        monkeypatch.setattr(compiler.os, "cpu_count", lambda: 2)
        launched = []

        def launch():
            for drop in (0, 1, 2, 3, 0):
                launched.append(load(0, drop=drop)((1,), (256,), ()))

        compiler.compile_together(launch, pytest.fail)
        assert launched == [None] * 5
        assert (len(driver.made), most[0]) == (4, 2)
        both.abort()  # another compilation would fail
        for drop in range(4):
            assert isinstance(load(60_000, drop=drop), Function)
        compiler.compile_together(launch, pytest.fail)
        assert len(driver.made) == 4

    def test_kernels_that_are_there_already_are_not_launched_either(self, driver, monkeypatch):
        load(0)
        monkeypatch.setattr(Function, "__call__", lambda *a, **k: pytest.fail("launched"))
        compiler.compile_together(lambda: load(0)((1,), (256,), ()), pytest.fail)
        with pytest.raises(RuntimeError, match="no"), compiler._dry(print):
            raise RuntimeError("no")
        assert not compiler.is_dry_run()

    def test_a_product_is_planned_anew_after_a_dry_run(self, driver):
        plans = launching.Plans()
        plans.keep(("before",), 1)
        with compiler._dry(print):
            assert plans.keep(("within",), 2) == 2
            assert plans.get(("before",)) is None
            absent = compiler.load_kernel("smxx_batch", "gather", (), 0)
            launching.Launch(absent, 1, 32, 0, bytes(8))(stream=7)  # has no function to call
        assert plans.get(("before",)) == 1
        assert plans.get(("within",)) is None

    def test_a_long_compilation_is_announced_and_its_error_raised(self, driver, monkeypatch):
        def fails(*arguments):
            threading.Event().wait(0.05)
            raise RuntimeError("does not compile")

        monkeypatch.setattr(compiler, "_compile", fails)
        monkeypatch.setattr(compiler, "_PATIENCE", 0.0)
        said = []
        with pytest.raises(RuntimeError, match="does not compile"):
            compiler.compile_together(lambda: [load(0, drop=d) for d in range(3)], said.append)
        assert len(said) == 1
        assert said[0].startswith("Compiling 3 kernels for this GPU")
