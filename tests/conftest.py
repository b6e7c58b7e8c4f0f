"""What the tests share: the ``gpu`` marker, the array module, the folder with MNIST."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A shell starts what runs in the background with Ctrl-C ignored, and processes inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Products by compiled kernels are tested where a test asks for them: see `cpu_kernels`.
os.environ["CUPYBNN_CPU_KERNELS"] = "0"

NO_MNIST = (
    "MNIST for tests was found neither in the folder that CUPYBNN_TEST_DATA names "
    "nor in ../shared/data beside the checkout"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--kills``."""
    parser.addoption(
        "--kills", type=int, default=1, metavar="N",
        help="kill so many runs of several ranks at random moments, of each kind (1)",
    )  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run in a single process where there is a GPU: its memory and its time cannot be shared."""
    from cupybnn.backends.devices import cuda_status

    return 0 if cuda_status().available else None  # None: pytest-xdist counts the cores


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with slow tests; skip the tests marked ``gpu``, with the reason, without CUDA.

    A slow test that begins last would leave all other processes idle. Of a parametrized test that
    is skipped, once is enough: there are thousands, and each costs milliseconds.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # else in their order
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from cupybnn.backends.devices import cuda_status

    status = cuda_status()
    if not status.available:
        skip = pytest.mark.skip(reason=f"needs a GPU: {status.reason}")
        first = {item.nodeid.partition("[")[0]: item for item in reversed(marked)}
        for item in first.values():
            item.add_marker(skip)
        others = set(marked).difference(first.values())
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=list(others))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave modules and tests out of garbage collections: they stay, and there are many."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that takes `xp` on NumPy, on CuPy, and if marked on compiled CPU kernels."""
    if "xp" in metafunc.fixturenames:
        compiled = metafunc.definition.get_closest_marker("cpu_kernels")
        cupy = pytest.param("cupy", marks=pytest.mark.gpu)
        metafunc.parametrize("xp", ["numpy", *(["numba"] if compiled else []), cupy], indirect=True)


@pytest.fixture
def xp(request: pytest.FixtureRequest):
    """Give an array module, so that one test body runs on each backend.

    "numpy" computes in NumPy alone; "numba" gives NumPy, too, and all products and packing are
    computed by compiled kernels, however small.
    """
    if request.param == "cupy":
        import cupy

        return cupy
    import numpy

    if request.param == "numba":
        request.getfixturevalue("cpu_kernels")
    return numpy


@pytest.fixture
def cpu_kernels(monkeypatch: pytest.MonkeyPatch):
    """Compute all products and packing on the CPU by compiled kernels; skip where there are none.

    Everywhere else the tests switch them off, so that what NumPy computes is tested.
    """
    from cupybnn import settings
    from cupybnn.backends import cpu, numpy_backend

    monkeypatch.setattr(settings, "cpu_kernels", lambda: True)
    status = cpu.status()
    if not status.available:
        pytest.skip(f"needs Numba: {status.reason}")
    for name in dir(numpy_backend):
        if name.startswith(("KERNEL_", "IMPORT_")):
            monkeypatch.setattr(numpy_backend, name, 0)
    monkeypatch.setattr(numpy_backend, "prepared", {})
    return cpu.compiled()


@pytest.fixture
def own_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register quantizers of its own: those after it do not see them."""
    from cupybnn.ops import quantizer

    monkeypatch.setattr(quantizer, "_REGISTRY", dict(quantizer._REGISTRY))


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
