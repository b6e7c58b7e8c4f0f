"""Machine facts: versions, processor, CUDA devices. For ``info`` and benchmark records."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import cupybnn
from cupybnn.backends.devices import Device, cuda_status

__all__ = ["cuda_facts", "describe", "device_facts", "memory_bytes", "version_of"]

#: Assumed memory of a machine that does not report it.
_UNKNOWN_MEMORY = 1 << 46
#: Linux files with a container's memory limit, for both versions of control groups.
_CONTAINER_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution without importing it, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """Return the processor name from /proc/cpuinfo, otherwise from Python."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cpus() -> int:
    """Return the number of processors available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(device: Device) -> int:
    """Return the memory of a device; for the CPU, the memory available to this process."""
    if device.kind == "cuda":
        with device.scope():
            return int(device.xp.cuda.runtime.memGetInfo()[1])
    try:
        amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, OSError, ValueError):  # not supported by this system
        return _UNKNOWN_MEMORY
    for file in _CONTAINER_LIMITS:
        try:
            amounts.append(int(Path(file).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no control groups, or no limit: "max"
            continue
    return min(amount for amount in amounts if amount > 0)


def _driver_version() -> str | None:
    """Return the version of NVIDIA's kernel driver (Linux), or None."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    # "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build ..."
    for word in text.split():
        if word[0].isdigit() and word.count(".") >= 1 and word.replace(".", "").isdigit():
            return word
    return None


def _cuda_version(number: int) -> str | None:
    """Format CUDA's version number 13000 as 13.0; 0, meaning no driver, gives None."""
    return None if number == 0 else f"{number // 1000}.{number % 1000 // 10}"


def cuda_facts() -> dict[str, Any]:
    """Return the versions of CuPy, driver, CUDA runtime and NVRTC; None if unavailable."""
    status = cuda_status()
    facts: dict[str, Any] = {
        "available": status.available,
        "reason": status.reason,
        "cupy": status.cupy_version,
        "driver": _driver_version(),
    }
    if status.cupy_version is None:
        return facts
    import cupy

    def nvrtc() -> str:
        major, minor = cupy.cuda.nvrtc.getVersion()
        return f"{major}.{minor}"

    readings = {
        "driver_cuda": lambda: _cuda_version(cupy.cuda.runtime.driverGetVersion()),
        "runtime_cuda": lambda: _cuda_version(cupy.cuda.runtime.runtimeGetVersion()),
        "nvrtc": nvrtc,
    }
    for name, read in readings.items():
        try:
            facts[name] = read()
        except Exception:  # a missing library must not hide the other facts
            facts[name] = None
    return facts


def device_facts(index: int) -> dict[str, Any]:
    """Return name, architecture, multiprocessors, memory and L2 of CUDA device `index`."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    name = properties["name"]
    return {
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "arch": f"sm_{properties['major']}{properties['minor']}",
        "multiprocessors": int(properties["multiProcessorCount"]),
        "memory_bytes": int(properties["totalGlobalMem"]),
        "l2_bytes": int(properties["l2CacheSize"]),
    }


def describe() -> dict[str, Any]:
    """Return the machine facts for a benchmark record, as plain JSON values."""
    cuda = cuda_facts()
    return {
        "cupybnn": cupybnn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": _usable_cpus(),
        "numpy": version_of("numpy"),
        "numba": version_of("numba"),
        "scikit-learn": version_of("scikit-learn"),
        "torch": version_of("torch"),
        "cuda": cuda,
        "devices": [device_facts(i) for i in range(cuda_status().device_count)],
    }
