"""Process-wide settings that speed up training on the CPU."""

from __future__ import annotations

from cupybnn import settings

__all__ = ["tune_process"]


def tune_process() -> None:
    """Tune this process for training on the CPU, as the command ``cupybnn`` does at startup.

    Nothing else in cupybnn changes process-wide settings. Your own training program may call this,
    ideally before it imports NumPy:

    * If NumPy is not imported yet, it is imported so that OpenBLAS's threads sleep soon after a
      product (``OPENBLAS_THREAD_TIMEOUT=16``, unless the variable is set). By default they spin for
      milliseconds, on the cores that the rest of a training step needs.
    * With glibc, up to 512 MiB of freed memory stay in the process for the arrays of the next step,
      instead of being returned to the system and cleared again.

    Examples
    --------
    >>> import cupybnn
    >>> cupybnn.tune_process()
    """
    with settings.resting_blas_threads():
        import numpy  # noqa: F401

    from cupybnn.backends import numpy_memory

    numpy_memory.keep_freed()
