"""What the tests share: the ``gpu`` marker, the array module, the folder with MNIST."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

NO_MNIST = (
    "MNIST for tests was found neither in the folder that CUPYBNN_TEST_DATA names "
    "nor in ../shared/data beside the checkout"
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run in a single process where there is a GPU: its memory and its time cannot be shared."""
    from cupybnn.backends.devices import cuda_status

    return 0 if cuda_status().available else None  # None: pytest-xdist counts the cores


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with slow tests; skip the tests marked ``gpu``, with the reason, without CUDA.

    A slow test that begins last would leave all other processes idle.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # else in their order
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from cupybnn.backends.devices import cuda_status

    status = cuda_status()
    if not status.available:
        skip = pytest.mark.skip(reason=f"needs a GPU: {status.reason}")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest):
    """Give NumPy and then CuPy, so that one test body runs on both backends."""
    if request.param == "cupy":
        import cupy

        return cupy
    import numpy

    return numpy


def _test_data() -> Path:
    named = os.environ.get("CUPYBNN_TEST_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not (folder / "mnist").is_dir():
        pytest.skip(NO_MNIST)
    return folder


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """Folder with MNIST's four gzipped IDX files (read-only)."""
    return _test_data() / "mnist"


@pytest.fixture(scope="session")
def openml_home() -> Path:
    """Data home of scikit-learn with MNIST in it (read-only: copy it before use)."""
    return _test_data() / "openml_home"
