"""1-bit matrix multiplication and binarized neural networks for NumPy and CuPy."""

__version__ = "0.1.0"

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupybnn.autograd import Tensor
    from cupybnn.deploy import PackedNetwork
    from cupybnn.estimator import BinaryMLPClassifier
    from cupybnn.fold import fold_batch_norm
    from cupybnn.gemm import xnor_gemm, xnor_gemm_packed
    from cupybnn.packed import PackedMatrix, concatenate, pack, sign, unpack
    from cupybnn.process import tune_process
    from cupybnn.training import TrainConfig, Trainer, TrainResult, load_model, train

__all__ = [
    "BinaryMLPClassifier",
    "PackedMatrix",
    "PackedNetwork",
    "Tensor",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "__version__",
    "concatenate",
    "fold_batch_norm",
    "load_model",
    "pack",
    "sign",
    "train",
    "tune_process",
    "unpack",
    "xnor_gemm",
    "xnor_gemm_packed",
]

#: The module of each public name, imported on first use: a product needs no training code, and the
#: command line tunes the process before importing NumPy.
_MODULES = {
    "autograd": ("Tensor",),
    "deploy": ("PackedNetwork",),
    "estimator": ("BinaryMLPClassifier",),
    "fold": ("fold_batch_norm",),
    "gemm": ("xnor_gemm", "xnor_gemm_packed"),
    "packed": ("PackedMatrix", "concatenate", "pack", "sign", "unpack"),
    "process": ("tune_process",),
    "training": ("TrainConfig", "TrainResult", "Trainer", "load_model", "train"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name or a submodule on first use."""
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # bypasses this function from now on
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
