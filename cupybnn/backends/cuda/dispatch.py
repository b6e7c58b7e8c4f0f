"""Choice of the configuration for a product: forced, tuned, or built in."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from cupybnn import settings
from cupybnn.backends.cuda.architectures import KERNELS, default_kernel, kernels_for
from cupybnn.backends.cuda.compiler import architecture, multiprocessors
from cupybnn.backends.cuda.configs import Config, Problem
from cupybnn.errors import SettingError

__all__ = ["builtin_config", "candidates", "choose", "force_kernel", "forced", "problem_on"]


def problem_on(device: int, m: int, n: int, k: int, **kind: Any) -> Problem:
    """Return the problem of a product on a CUDA device; see `Problem`."""
    capability, count = architecture(device), multiprocessors(device)
    return Problem(m=m, n=n, k=k, **kind, capability=capability, multiprocessors=count)


def builtin_config(kernel: str, problem: Problem) -> Config:
    """Return a kernel's built-in configuration for a problem."""
    config: Config = KERNELS[kernel].choose(problem)
    return config


def candidates(kernel: str, problem: Problem) -> list[Config]:
    """Return a kernel's configurations worth measuring for a problem."""
    found: list[Config] = KERNELS[kernel].candidates(problem)
    return found


_local = threading.local()


@contextlib.contextmanager
def force_kernel(name: str | Config | None) -> Iterator[None]:
    """Use one kernel or configuration for all products of this thread inside the context.

    For tests, measurements and `cupybnn verify`; ``CUPYBNN_KERNEL`` applies to a whole process.

    Raises
    ------
    ValueError
        If there is no kernel of that name.
    """
    if isinstance(name, str):
        _check(name)
    before = forced()
    _local.forced = name
    try:
        yield
    finally:
        _local.forced = before


def _check(name: str) -> str:
    if name not in KERNELS:
        raise SettingError(f"The kernel must be one of {', '.join(KERNELS)}; got {name!r}.")
    return name


_from_environment = settings.kernel_override()


def forced() -> str | Config | None:
    """Return the kernel or configuration forced by `force_kernel` or the environment, or None."""
    return getattr(_local, "forced", _from_environment)


def choose(problem: Problem, tuned: dict[str, Config]) -> Config:
    """Return the configuration for a problem.

    A forced configuration comes first, then one measured by `cupybnn bench --tune` on this GPU,
    then the built-in one. An unknown compute capability gets the portable kernel.

    Parameters
    ----------
    problem : Problem
    tuned : dict
        Measured winners by `Problem.key`.

    Raises
    ------
    ValueError
        If the forced kernel does not run on the device.
    """
    requested = forced()
    if isinstance(requested, Config):
        config = requested
    else:
        capability = problem.capability
        applicable = kernels_for(capability)
        kernel = _check(requested) if requested else default_kernel(capability)
        if kernel not in applicable:
            raise SettingError(
                f"The kernel {kernel!r} does not run on compute capability "
                f"{capability // 10}.{capability % 10}; use one of {', '.join(applicable)}."
            )
        config = builtin_config(kernel, problem)
        measured = tuned.get(problem.key)
        # The file is untrusted: launch only a configuration that could have been measured.
        if (
            measured is not None
            and not (requested or problem.scaled)
            and measured in candidates(kernel, problem)
        ):
            config = measured
    if settings.debug():
        print(f"cupybnn: {problem}: {config}", file=sys.stderr)
    return config
