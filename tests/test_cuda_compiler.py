"""Loading kernels, with a stand-in for the driver: a launch gets the shared memory it asks for."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from cupybnn.backends.cuda import compiler, fused, fused_batch

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

    cuda = SimpleNamespace(
        Device=lambda number: SimpleNamespace(
            attributes={"MaxSharedMemoryPerBlockOptin": LIMIT, "MultiProcessorCount": 132},
            compute_capability="90",
        ),
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
