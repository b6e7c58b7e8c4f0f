"""1-bit matrix multiplication and binarized neural networks for NumPy and CuPy."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from cupybnn import settings

with settings.resting_blas_threads():
    import numpy  # noqa: F401

from cupybnn.fold import fold_batch_norm
from cupybnn.gemm import xnor_gemm, xnor_gemm_packed
from cupybnn.packed import PackedMatrix, pack, sign, unpack

if TYPE_CHECKING:
    from cupybnn.training import TrainConfig, Trainer, TrainResult, load_model, train

__all__ = [
    "PackedMatrix",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "__version__",
    "fold_batch_norm",
    "load_model",
    "pack",
    "sign",
    "train",
    "unpack",
    "xnor_gemm",
    "xnor_gemm_packed",
]

_FROM_TRAINING = {"TrainConfig", "TrainResult", "Trainer", "load_model", "train"}


def __getattr__(name: str) -> Any:
    """Import training when it is first asked for: a product needs none of it."""
    if name in _FROM_TRAINING:
        from cupybnn import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
