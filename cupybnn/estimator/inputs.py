"""What users pass to an estimator, and results in the kind of array that they passed."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.backends.devices import CPU, array_module, is_cupy, to_device
from cupybnn.backends.interop import as_native, type_name
from cupybnn.deploy.inputs import like

__all__ = [
    "DTYPES",
    "check_device_array",
    "checked",
    "native",
    "on_host",
    "returned",
    "weights_of",
]

#: Dtypes of X that are kept; others become the first one.
DTYPES = [np.float64, np.float32, np.uint8]


def native(x: Any, what: str) -> Any:
    """Return an array of another library, CuPy's aside, as NumPy or CuPy array; `x` if it is none.

    Lists, tables and NumPy arrays are left to scikit-learn.
    """
    if isinstance(x, np.ndarray) or is_cupy(x):
        return x
    tensor = hasattr(type(x), "__dlpack__") or hasattr(x, "__cuda_array_interface__")
    return as_native(x, what) if tensor else x


def on_host(x: Any, what: str) -> Any:
    """Return an array of a GPU or of another library as a NumPy array; anything else as it is."""
    x = native(x, what)
    return to_device(x, CPU) if is_cupy(x) else x


def returned(result: Any, x: Any) -> Any:
    """Return `result`, a NumPy or CuPy array, as the kind of array that the caller passed.

    That is NumPy for anything that scikit-learn converts: what is on a GPU comes back as it was
    given, other arrays on the CPU only with scikit-learn's ``array_api_dispatch``.
    """
    if is_cupy(result) or (not isinstance(x, np.ndarray) and _dispatched()):
        return like(result, x)
    return result


def _dispatched() -> bool:
    from sklearn import get_config

    return bool(get_config().get("array_api_dispatch"))


def checked(estimator: Any, *arrays: Any, **options: Any) -> Any:
    """Call scikit-learn's ``validate_data``, which was a method before 1.6."""
    try:
        from sklearn.utils.validation import validate_data
    except ImportError:
        return estimator._validate_data(*arrays, **options)
    return validate_data(estimator, *arrays, **options)


def check_device_array(estimator: Any, x: Any, reset: bool) -> Any:
    """Check a CuPy array as ``validate_data`` does a NumPy one; return it as floats or uint8.

    The check for NaN waits for the device.
    """
    name = type(estimator).__name__
    if x.dtype.kind not in "fiub":
        raise TypeError(f"The 'X' of {name} must hold real numbers; got {x.dtype}.")
    if x.ndim != 2:
        hint = "X.reshape(-1, 1) if it is one feature, X.reshape(1, -1) if it is one sample"
        raise ValueError(
            f"Expected 2D array, got {x.ndim}D array instead: the 'X' of {name} must have shape "
            f"(examples, features); got {x.shape}. Reshape it: {hint}."
        )
    if x.size == 0:
        raise ValueError(
            f"Found array with {x.shape[0]} sample(s) and {x.shape[1]} feature(s) (shape="
            f"{x.shape}) while a minimum of 1 is required by {name}."
        )
    if reset:
        estimator.n_features_in_ = int(x.shape[1])
        vars(estimator).pop("feature_names_in_", None)
    elif x.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {x.shape[1]} features, but {name} is expecting {estimator.n_features_in_} "
            f"features as input."
        )
    xp = array_module(x)
    if x.dtype.kind == "f" and not bool(xp.isfinite(x).all()):
        raise ValueError(f"Input X contains NaN or infinity; {name} takes finite numbers only.")
    usual = x.dtype in (np.float32, np.float64, np.uint8)
    return x if usual else x.astype(np.float64)


def weights_of(sample_weight: Any, examples: int) -> np.ndarray | None:
    """Return sample weights as float64, or None for none."""
    if sample_weight is None:
        return None
    given = on_host(sample_weight, "'sample_weight'")
    try:
        weights = np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The 'sample_weight' must be numbers; got {type_name(sample_weight)} ({error})."
        ) from error
    if weights.ndim == 0:
        weights = np.full(examples, weights)
    if weights.shape != (examples,):
        raise ValueError(
            f"The 'sample_weight' must have shape ({examples},), one weight for each sample; got "
            f"{weights.shape}."
        )
    if not np.isfinite(weights).all():
        raise ValueError("The 'sample_weight' must be finite; got NaN or infinity.")
    if (weights < 0).any():
        raise ValueError(
            f"Negative values in data passed to `sample_weight`: weights must be at least 0; got "
            f"{weights.min()}."
        )
    if not weights.any():
        raise ValueError("Sample weights must contain at least one non-zero number; got zeros.")
    return weights
