"""What the engine is doing at present in this thread: recording a graph, checking values."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

__all__ = ["is_grad_enabled", "no_grad", "state"]


class _State(threading.local):
    """Settings of one thread."""

    def __init__(self) -> None:
        self.recording = True
        # Called with (op, array, phase, place) for every forward value and gradient when set.
        self.check: Callable[[str, Any, str, str], None] | None = None
        # The modules that are being computed, outermost first; kept only while values are checked.
        self.scopes: list[Any] = []


state = _State()


class no_grad(ContextDecorator):
    """Context manager and decorator within which operations record no graph.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.autograd import Tensor, no_grad
    >>> x = Tensor(np.ones(3), requires_grad=True)
    >>> with no_grad():
    ...     y = x * 2
    >>> y.requires_grad
    False
    """

    def __init__(self) -> None:
        self._outer: list[bool] = []

    def __enter__(self) -> no_grad:
        self._outer.append(state.recording)
        state.recording = False
        return self

    def __exit__(self, *exc_info: object) -> None:
        state.recording = self._outer.pop()


def is_grad_enabled() -> bool:
    """Whether operations on tensors that require gradients are recorded."""
    return state.recording
