"""Run-time compilation of kernels through CuPy, and device properties."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

from cupybnn.backends.cuda import architectures
from cupybnn.backends.cuda.sources import translation_unit

__all__ = [
    "architecture",
    "compile_together",
    "is_dry_run",
    "load_kernel",
    "multiprocessors",
    "shared_memory_limit",
]

Defines = Sequence[tuple[str, int | str]]

# Every GPU with clusters allows this many blocks per cluster; a kernel must opt in to more
# (CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED).
_PORTABLE_CLUSTER, _LARGE_CLUSTERS = 8, 14
_DEFAULT_SHARED = 48 * 1024  # bytes of shared memory that every launch may use
# At most so many kernels are compiled at a time: each takes some 100 MB of the host's memory.
_MOST_THREADS = 16
_PATIENCE = 2.0  # seconds of compilation that need no words

_lock = threading.Lock()
# By source, function, defines and device: the kernel, and the dynamic shared memory allowed for its
# launches so far. Entries are replaced as a whole, so reading needs no lock.
_kernels: dict[tuple[Any, ...], tuple[Any, int]] = {}


class _DryRun(threading.local):
    """Of a thread: what gets the kernels that a dry run asks for; None outside of one."""

    ask: Callable[[tuple[Any, ...]], object] | None = None


class _Absent:
    """Stands in for a kernel in a dry run: a launch does nothing."""

    kernel = SimpleNamespace(ptr=0)

    def __call__(self, *arguments: Any, **options: Any) -> None:
        """Do nothing."""


_dry_run, _absent = _DryRun(), _Absent()


@cache
def architecture(device: int) -> int:
    """Return the compute capability of a CUDA device as major * 10 + minor: 90 for 9.0."""
    import cupy

    return int(cupy.cuda.Device(device).compute_capability)


@cache
def multiprocessors(device: int) -> int:
    """Return the number of multiprocessors of a CUDA device."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


@cache
def shared_memory_limit(device: int) -> int:
    """Return the maximum bytes of shared memory per block on a CUDA device."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


def load_kernel(source: str, function: str, defines: Defines, device: int, shared: int = 0) -> Any:
    """Return a compiled kernel, ready to launch on `device`.

    Compiled once per process and device, and once per machine: CuPy caches the binary on disk,
    keyed by the full text of the translation unit. Thread-safe.

    Parameters
    ----------
    source, function : str
        Name of the file in ``kernels/`` and of the kernel in it.
    defines : tuple of (name, value)
        Macros of the translation unit.
    device : int
        Index of the CUDA device, which must be the current one.
    shared : int
        Bytes of dynamic shared memory of the next launch. They may differ between launches.

    Raises
    ------
    ValueError
        If the device has less shared memory per block.
    """
    key = (source, function, tuple(defines), device)
    if _dry_run.ask is not None:
        _dry_run.ask(key)
        return _absent
    kernel, allowed = _kernels.get(key, (None, -1))
    if shared > allowed:
        with _lock:
            kernel, allowed = _kernels.get(key, (None, -1))
            if kernel is None:
                kernel = _compile(source, function, dict(defines))
            if shared > allowed:
                _allow_shared_memory(kernel, function, shared, device)
                _kernels[key] = kernel, shared
    return kernel


def is_dry_run() -> bool:
    """Whether this thread is in a dry run: kernels are asked for, and none is launched."""
    return _dry_run.ask is not None


@contextmanager
def _dry(ask: Callable[[tuple[Any, ...]], object]) -> Iterator[None]:
    before, _dry_run.ask = _dry_run.ask, ask
    try:
        yield
    finally:
        _dry_run.ask = before


def compile_together(launch: Callable[[], None], notify: Callable[[str], None]) -> None:
    """Compile all kernels that `launch` launches at the same time, and launch none.

    One after the other, as `load_kernel` compiles them, they would take half a second each.

    Parameters
    ----------
    launch : callable
        Called once, in a dry run: kernels by `load_kernel` do nothing. All else runs, such as
        products by cuBLAS, and what CuPy compiles meanwhile.
    notify : callable
        Called with a sentence if this takes long.

    Raises
    ------
    Exception
        What `launch` raises, and what the compiler does.
    """
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    compiling: dict[tuple[Any, ...], Future[None]] = {}
    with ThreadPoolExecutor(threads, "cupybnn-compiler") as pool:

        def ask(key: tuple[Any, ...]) -> None:
            if key not in _kernels and key not in compiling:
                compiling[key] = pool.submit(_compile_for_later, key)

        try:
            with _dry(ask):
                launch()
            if wait(compiling.values(), timeout=_PATIENCE).not_done:
                notify(
                    f"Compiling {len(compiling)} kernels for this GPU, which takes up to a minute. "
                    f"Later runs find them in CuPy's cache."
                )
            for each in compiling.values():
                each.result()
        except BaseException:  # such as Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise


def _compile_for_later(key: tuple[Any, ...]) -> None:
    """Compile a kernel outside of the lock, in a thread of its own."""
    import cupy

    source, function, defines, device = key
    cupy.cuda.Device(device).use()  # a new thread starts on device 0
    kernel = _compile(source, function, dict(defines))
    with _lock:
        _kernels.setdefault(key, (kernel, 0))


def _compile(source: str, function: str, defines: dict[str, int | str]) -> Any:
    import cupy

    options = ["--std=c++17"]
    flag = architectures.compiler_target(source)
    if flag is not None:
        options.append(f"-arch={flag}")
    # A cooperative launch is refused unless all its blocks can run at a time.
    cooperative = {"enable_cooperative_groups": True} if defines.get("COOPERATIVE") else {}
    module = cupy.RawModule(
        code=translation_unit(source, defines), options=tuple(options), backend="nvrtc",
        **cooperative,
    )  # fmt: skip
    kernel = module.get_function(function)
    if int(defines.get("CLUSTER", 1)) > _PORTABLE_CLUSTER:
        from cupy_backends.cuda.api import driver  # type: ignore[import-untyped]

        driver.funcSetAttribute(kernel.kernel.ptr, _LARGE_CLUSTERS, 1)
    return kernel


def _allow_shared_memory(kernel: Any, function: str, shared: int, device: int) -> None:
    """Allow launches of a kernel to use `shared` bytes. The limit is a state of the kernel."""
    if shared == 0:
        return
    if shared > shared_memory_limit(device):
        raise ValueError(
            f"The kernel {function} needs {shared} bytes of shared memory per block, but this "
            f"device has {shared_memory_limit(device)}. Use smaller images or layers."
        )
    # For small amounts too: with the kernel's static memory they may exceed the default.
    kernel.max_dynamic_shared_size_bytes = shared
    if shared > _DEFAULT_SHARED:  # as many blocks per multiprocessor as possible
        kernel.preferred_shared_memory_carveout = 100
