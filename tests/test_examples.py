"""The examples in docstrings do what they show."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import cupybnn

PACKAGES = (
    "cupybnn.autograd",
    "cupybnn.deploy",
    "cupybnn.gemm",
    "cupybnn.nn",
    "cupybnn.ops",
    "cupybnn.optim",
    "cupybnn.packed",
)
# By their files: to walk packages is to import them, and one needs PyTorch.
FOLDER = Path(cupybnn.__file__).parent
FILES = sorted(path.relative_to(FOLDER.parent).with_suffix("") for path in FOLDER.rglob("*.py"))
MODULES = [
    name
    for name in (".".join(path.parts).removesuffix(".__init__") for path in FILES)
    if name.startswith(PACKAGES)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner()
    with np.errstate(all="ignore"):
        for test in finder.find(module):
            if importlib.util.find_spec("torch") or not any(
                "import torch" in example.source for example in test.examples
            ):
                runner.run(test)
    assert runner.failures == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [t for n in MODULES for t in finder.find(importlib.import_module(n)) if t.examples]
    assert len(found) >= 7
