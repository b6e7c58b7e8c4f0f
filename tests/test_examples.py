"""The examples in docstrings do what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import numpy as np
import pytest

import cupybnn

PACKAGES = (
    "cupybnn.autograd",
    "cupybnn.deploy",
    "cupybnn.estimator",
    "cupybnn.gemm",
    "cupybnn.nn",
    "cupybnn.ops",
    "cupybnn.optim",
    "cupybnn.packed",
    "cupybnn.training.stopping",
)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(cupybnn.__path__, "cupybnn.")
    if module.name.startswith(PACKAGES)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    with np.errstate(all="ignore"):
        results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [t for n in MODULES for t in finder.find(importlib.import_module(n)) if t.examples]
    assert len(found) >= 7
