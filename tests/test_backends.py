"""Both backends have the same functions."""

import inspect

from cupybnn.backends import cuda, numpy_backend


def arguments(function) -> list[tuple]:
    return [(a.name, a.kind, a.default) for a in inspect.signature(function).parameters.values()]


def test_names_and_arguments_are_the_same():
    # Which kernel computes a product is a backend's own matter, also for `force_kernel`; and so is
    # what saves the host's time for two matrices.
    own = {"force_kernel", "kernels", "kernels_for", "matmul", "prepare", "prepared"}
    assert set(cuda.__all__) ^ set(numpy_backend.__all__) == own - {"force_kernel"}
    for name in set(numpy_backend.__all__) - own:
        assert arguments(getattr(cuda, name)) == arguments(getattr(numpy_backend, name)), name
