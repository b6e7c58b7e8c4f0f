"""Measuring briefly, where a test is about what is made of the times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cupybnn.benchmark import clock, products, sizes, torch_layers


@contextmanager
def briefly() -> Iterator[None]:
    """Time as few runs as can be, each once, whatever else this machine does meanwhile.

    With a small cache, so that few sets of operands fill it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "_runs", lambda *_: 7)  # the fewest
        patch.setattr(sizes, "TRIALS", 1)
        for module in (products, torch_layers):
            patch.setattr(module, "memory", lambda device: (1 << 18, 2 << 30))
        yield
