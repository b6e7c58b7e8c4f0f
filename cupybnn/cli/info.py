"""``cupybnn info``: what is installed, which devices and kernels are usable, where files are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cupybnn import machine, settings
from cupybnn.backends import cpu as cpu_kernels
from cupybnn.backends import numpy_backend
from cupybnn.backends.devices import Device, cuda_status, resolve
from cupybnn.extras import to_install

__all__ = ["add_parser", "lines", "run"]

_NO_NVRTC = (
    f"cannot be loaded, but is needed to compile kernels: {to_install('cuda13')}, or the extra "
    f"cuda12, which include it"
)
#: Optional packages for use with CuPy, and what they enable.
_CUPY_EXTRAS = {
    "nvmath-python": "training steps replayed as a CUDA graph",
    "cuda-bindings": "the 1-bit backward pass on Hopper",
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of ``cupybnn info``."""
    subparsers.add_parser(
        "info",
        help="print versions, devices, kernels and folders",
        description=(
            "Print versions, devices, the kernels for each, and the folders in use. Problems with "
            "CuPy are reported in one sentence and do not change the exit code."
        ),
    )


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    for line in lines():
        print(line)
    return 0


def _row(label: str, value: object) -> str:
    return f"{label:<15} {value}"


def _folder(where: Callable[[], Path]) -> str:
    try:
        path = where()
    except ValueError as error:
        return f"none. {error}"
    return str(path) if path.is_dir() else f"{path} (not created yet)"


def _driver(version: str | None, newest_cuda: str | None) -> str:
    """Describe the driver: its version, and the newest CUDA version that it supports."""
    if newest_cuda is None:
        return "no NVIDIA driver found" if version is None else f"{version}, not usable by CUDA"
    return f"{version or 'unknown version'}, up to CUDA {newest_cuda}"


def _kernels(device: Device) -> str:
    if device.kind == "cpu":
        return ", ".join(numpy_backend.kernels())
    try:
        from cupybnn.backends import cuda

        return ", ".join(cuda.kernels_for(device))
    except Exception as error:  # a diagnostic report must not fail itself
        return f"unknown ({error})"


def _compiled_kernels() -> str:
    """Describe the kernels that Numba compiles, or say why there are none."""
    status, compiled = cpu_kernels.status(), cpu_kernels.compiled()
    if compiled is None:
        return status.reason
    facts = compiled.describe()
    features = ", ".join(facts["features"]) or "no vector instructions that it knows"
    return (
        f"{status.reason.rstrip('.')}, {facts['threads']} threads, {facts['method']} on "
        f"{facts['cpu']} ({features}), "
        f"{'kept in ' + facts['cache'] if facts['cache'] else 'compiled by each process'}"
    )


def _device_lines(index: int) -> Iterator[str]:
    device = Device("cuda", index)
    try:
        facts = machine.device_facts(index)
    except Exception as error:
        yield _row(str(device), f"unknown ({error})")
        return
    yield _row(
        str(device),
        f"{facts['name']}, {facts['arch']}, {facts['multiprocessors']} multiprocessors, "
        f"{facts['memory_bytes'] / 2**30:.0f} GiB",
    )
    yield _row("  kernels", _kernels(device))


def lines() -> Iterator[str]:
    """Yield the lines of the report."""
    facts = machine.describe()
    cuda = facts["cuda"]
    package = Path(settings.__file__).resolve().parent
    yield _row("cupybnn", f"{facts['cupybnn']} in {package}")
    yield _row("Python", f"{facts['python']} ({sys.executable})")
    yield _row("platform", facts["platform"])
    for name in ("numpy", "scikit-learn", "tqdm", "tensorboard", "torch"):
        yield _row(name, machine.version_of(name) or "not installed")
    yield _row("CuPy", cuda["cupy"] or "not usable")
    if cuda["cupy"]:
        for name, use in _CUPY_EXTRAS.items():
            yield _row(f"  {name}", machine.version_of(name) or f"not installed; enables {use}")
        yield _row("  NVRTC", cuda["nvrtc"] or _NO_NVRTC)
        runtime = cuda["runtime_cuda"]
        yield _row("  runtime", "cannot be loaded" if runtime is None else f"CUDA {runtime}")
        yield _row("  driver", _driver(cuda["driver"], cuda["driver_cuda"]))
    yield ""
    yield _row("CUDA", cuda["reason"])
    yield _row("cpu", f"{facts['cpu']}, {facts['cpus']} processors")
    yield _row("  kernels", _kernels(Device("cpu")))
    yield _row("  numba", _compiled_kernels())
    for index in range(cuda_status().device_count):
        yield from _device_lines(index)
    yield _row("device='auto'", resolve("auto"))
    yield ""
    yield _row("cache folder", _folder(settings.cache_dir))
    yield _row("data folder", _folder(settings.data_dir))
    given = [f"{name}={value}" for name, value in settings.variables_set().items()]
    yield _row("environment", " ".join(given) or "no CUPYBNN_ variable is set")
