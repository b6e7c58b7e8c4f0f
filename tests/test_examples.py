"""The examples in docstrings do what they show."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest

import cupybnn

FOLDER = Path(cupybnn.__file__).parent


def name_of(path: Path) -> str:
    parts = ("cupybnn", *path.relative_to(FOLDER).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = [name_of(p) for p in sorted(FOLDER.rglob("*.py")) if ">>> " in p.read_text("utf-8")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    with np.errstate(all="ignore"):
        results = doctest.testmod(importlib.import_module(name))
    assert results.attempted
    assert results.failed == 0


def test_what_is_used_most_has_an_example():
    """All that `cupybnn` itself offers, but data that are only read, and the usual layers."""
    usual = ("Linear", "BinaryLinear", "BatchNorm", "Dropout", "Sign", "ReLU", "Sequential")
    losses = ("softmax_cross_entropy", "squared_hinge", "mse", "sign", "binary_matmul")
    public = {name: getattr(cupybnn, name) for name in cupybnn.__all__}
    public |= {f"nn.{name}": getattr(cupybnn.nn, name) for name in usual}
    public |= {f"ops.{name}": getattr(cupybnn.ops, name) for name in losses}
    without = {
        name
        for name, value in public.items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and not (inspect.isclass(value) and issubclass(value, BaseException))
        and ">>> " not in (value.__doc__ or "")
    }
    assert without == {"TrainResult"}
