"""Where arrays live: the host ("cpu") or a CUDA device ("cuda", "cuda:1")."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn.errors import DeviceError, SettingError
from cupybnn.extras import to_install

__all__ = [
    "CPU",
    "CudaStatus",
    "Device",
    "array_module",
    "cuda_device",
    "cuda_status",
    "current_cuda_device",
    "device_of",
    "is_cupy",
    "resolve",
    "synchronize",
    "to_device",
]

_TO_INSTALL = f"For an NVIDIA GPU: {to_install('cuda13')}, or the extra cuda12."


@dataclass(frozen=True)
class Device:
    """A device that holds arrays: ``Device("cpu")`` or ``Device("cuda", 0)``."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"

    @property
    def xp(self) -> Any:
        """The array module of this device: numpy or cupy."""
        if self.kind == "cpu":
            return np
        import cupy

        return cupy

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which this is the current device."""
        if self.kind == "cpu":
            return contextlib.nullcontext()
        return self.xp.cuda.Device(self.index)

    def use(self) -> None:
        """Make this the current device of the thread, until another is made so.

        Unlike the end of `scope`, which makes the earlier device current again, this never starts
        to use a device that the process has no use for: CUDA takes hundreds of megabytes on it.
        """
        if self.kind == "cuda":
            self.xp.cuda.Device(self.index).use()


CPU = Device("cpu")


@dataclass(frozen=True)
class CudaStatus:
    """Whether CUDA is usable and, if not, the reason in one sentence; whether CuPy is there."""

    available: bool
    reason: str
    device_count: int = 0
    cupy_version: str | None = None
    installed: bool = True


def _cupy_wheels() -> list[str]:
    """Return the names of the installed distributions that provide the module ``cupy``."""
    # From folder names: importlib.metadata would read the metadata of every package.
    names = set()
    for entry in sys.path:
        with contextlib.suppress(OSError, ValueError, TypeError):  # sys.path may hold anything
            for info in Path(entry).glob("cupy*.*-info"):
                names.add(re.split(r"[-.]", info.name)[0].replace("_", "-").lower())
    return sorted(n for n in names if re.fullmatch(r"cupy(-cuda\d+x?|-rocm-.+)?", n))


@lru_cache(maxsize=1)
def cuda_status() -> CudaStatus:
    """Check, once and without raising, whether CuPy is installed and sees a device."""
    wheels = _cupy_wheels()
    if len(wheels) > 1:
        return CudaStatus(
            False,
            f"Several CuPy packages are installed at once ({', '.join(wheels)}) and overwrite each "
            f"other's files: uninstall all of them, then install one.",
        )
    imported_before = "cupy" in sys.modules
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            return CudaStatus(False, f"CuPy is installed but cannot be imported: {error}.")
        return CudaStatus(False, f"CuPy is not installed. {_TO_INSTALL}", installed=False)
    except (Exception, SystemExit) as error:  # CuPy raises whatever its libraries raise
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        return CudaStatus(False, f"CuPy is installed but cannot be imported: {first_line}")
    if not (hasattr(cupy, "__version__") and hasattr(cupy, "cuda")):
        if not imported_before:
            # Libraries that support several array types would take this module for CuPy.
            sys.modules.pop("cupy", None)
        return CudaStatus(
            False,
            f"CuPy is not installed ({_whereabouts(cupy)} is imported in its place). {_TO_INSTALL}",
            installed=False,
        )
    version = str(cupy.__version__)
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return CudaStatus(
            False,
            f"CuPy {version} is installed but sees no CUDA device ({error}).",
            cupy_version=version,
        )
    if count == 0:
        return CudaStatus(
            False, f"CuPy {version} is installed but sees no CUDA device.", cupy_version=version
        )
    return CudaStatus(True, f"CuPy {version} sees {count} CUDA device(s).", count, version)


def _whereabouts(module: Any) -> str:
    """Describe the origin of a module that is not CuPy."""
    file = getattr(module, "__file__", None)
    if file is not None:
        return f"the file {file}"
    folders = list(getattr(module, "__path__", ()))
    return f"the folder {folders[0]}" if folders else "something else"


@lru_cache(maxsize=64)
def cuda_device(index: int) -> Device:
    """Return the `Device` of a CUDA device; made once."""
    return Device("cuda", index)


def current_cuda_device() -> int:
    """Return the index of the current CUDA device; call only when cupy is already imported."""
    return int(sys.modules["cupy"].cuda.runtime.getDevice())


def resolve(device: str | Device | None = "auto") -> Device:
    """Turn a device's name into a `Device`.

    Parameters
    ----------
    device : str or Device or None
        "cpu"; "cuda" (the current CUDA device); "cuda:1"; "auto" or None: CUDA if usable, otherwise
        the CPU.

    Raises
    ------
    DeviceError
        If CUDA is requested by name but not usable, or has no device of that index.
    SettingError
        If the name is none of the above.
    """
    if device is None:
        device = "auto"
    name = str(device)
    if name == "cpu":
        return CPU
    status = cuda_status() if name == "auto" or name.startswith("cuda") else None
    if name == "auto":
        assert status is not None
        return _current_cuda_device() if status.available else CPU
    kind, _, number = name.partition(":")
    if kind != "cuda" or (":" in name and not re.fullmatch("[0-9]{1,9}", number)):
        raise SettingError(
            f"The 'device' must be 'auto', 'cpu', 'cuda' or 'cuda:N' with a device number N; "
            f"got {device!r}."
        )
    assert status is not None
    if not status.available:
        raise DeviceError(f"The device {name!r} cannot be used. {status.reason}")
    if not number:
        return _current_cuda_device()
    if int(number) >= status.device_count:
        raise DeviceError(
            f"The device {name!r} does not exist: there are {status.device_count} CUDA device(s), "
            f"numbered from 0."
        )
    return Device("cuda", int(number))


def _current_cuda_device() -> Device:
    import cupy

    return Device("cuda", cupy.cuda.runtime.getDevice())


def is_cupy(x: object) -> bool:
    """Whether `x` is a CuPy array; does not import cupy."""
    cupy = sys.modules.get("cupy")
    ndarray = getattr(cupy, "ndarray", None)
    return isinstance(ndarray, type) and isinstance(x, ndarray)


def array_module(*arrays: Any) -> Any:
    """Return the module, numpy or cupy, of all `arrays`.

    Raises
    ------
    TypeError
        If NumPy and CuPy arrays are mixed.
    """
    on_cuda = [is_cupy(x) for x in arrays]
    if not any(on_cuda):
        return np
    if not all(on_cuda):
        raise TypeError(
            "NumPy and CuPy arrays cannot be mixed in one operation; got "
            + ", ".join("cupy.ndarray" if c else "numpy.ndarray" for c in on_cuda)
            + ". Move one of them with cupy.asarray or cupy.asnumpy."
        )
    return sys.modules["cupy"]


def device_of(array: Any) -> Device:
    """Return the device that holds `array` (a NumPy or CuPy array)."""
    return Device("cuda", array.device.id) if is_cupy(array) else CPU


def to_device(array: Any, device: Device) -> Any:
    """Return `array` on `device`, without a copy if already there."""
    if device.kind == "cpu":
        return array.get() if is_cupy(array) else np.asarray(array)
    if is_cupy(array) and array.device.id == device.index:
        return array
    with device.scope():
        return device.xp.asarray(array)


def synchronize(device: Device) -> None:
    """Wait for the current stream of `device`; does nothing on the CPU."""
    if device.kind == "cuda":
        with device.scope():
            device.xp.cuda.get_current_stream().synchronize()
