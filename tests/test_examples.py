"""The examples in docstrings do what they show."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
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


@pytest.mark.usefixtures("own_quantizers")
@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    if name.startswith("cupybnn.torch"):
        pytest.importorskip("torch")
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    with np.errstate(all="ignore"):
        for test in finder.find(importlib.import_module(name)):
            needs_torch = any("import torch" in example.source for example in test.examples)
            if not needs_torch or importlib.util.find_spec("torch"):
                runner.run(test)
    assert runner.failures == 0


PUBLIC = (
    "cupybnn",
    "cupybnn.autograd",
    "cupybnn.data",
    "cupybnn.deploy",
    "cupybnn.errors",
    "cupybnn.estimator",
    "cupybnn.nn",
    "cupybnn.ops",
    "cupybnn.optim",
    "cupybnn.optim.schedules",
    "cupybnn.packed",
    "cupybnn.parallel",
    "cupybnn.training",
    "cupybnn.training.measures",
    "cupybnn.training.stopping",
)


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_has_an_example(name):
    module = importlib.import_module(name)
    public = {each: getattr(module, each) for each in module.__all__}
    without = {
        each
        for each, value in public.items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and ">>> " not in (value.__doc__ or "")
    }
    assert without == set()
