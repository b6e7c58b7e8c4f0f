"""How to install what an extra of this package needs, for messages about what is missing."""

from __future__ import annotations

__all__ = ["to_install"]

# As pyproject.toml has them, without lower bounds: pip takes the newest.
_PACKAGES = {
    "bench": "matplotlib",
    "cpu": "numba",
    "cuda12": '"cupy-cuda12x[ctk]" nvmath-python "cuda-bindings<13"',
    "cuda13": '"cupy-cuda13x[ctk]" nvmath-python "cuda-bindings<14"',
    "distributed-cuda12": '"nvidia-nccl-cu12<3"',
    "distributed-cuda13": '"nvidia-nccl-cu13<3"',
    "images": "pillow",
    "mpi": "mpi4py",
    "onnx": "onnx",
    "tensorboard": "tensorboard",
    "torch": "torch",
}


def to_install(extra: str) -> str:
    """Return the command that installs an extra's packages, and the extra's name.

    The command names the packages because that works wherever cupybnn came from: a checkout is no
    package of an index.

    Examples
    --------
    >>> from cupybnn.extras import to_install
    >>> to_install("onnx")
    'pip install onnx (the extra onnx)'
    """
    return f"pip install {_PACKAGES[extra]} (the extra {extra})"
