"""The engine's current state: whether it records a graph and checks values."""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any, ClassVar

__all__ = ["Setting", "checking", "is_grad_enabled", "no_grad", "recording", "state"]

# A context variable is local to a thread and, in asyncio, to a task.
recording: ContextVar[bool] = ContextVar("cupybnn_recording", default=True)
checking: ContextVar[Callable[[str, Any, str, str], None] | None] = ContextVar(
    "cupybnn_check", default=None
)


class _State(threading.local):
    """What one thread is computing."""

    def __init__(self) -> None:
        # The modules being computed, outermost first; kept only while values are checked.
        self.scopes: list[Any] = []

    @property
    def check(self) -> Callable[[str, Any, str, str], None] | None:
        """If set, called with (op, array, phase, place) for every forward value and gradient."""
        return checking.get()


state = _State()


class Setting:
    """Base class of context managers and decorators that change the engine's state.

    As a decorator it applies while the function's own code runs: in a generator, coroutine or
    asynchronous generator it is suspended at every ``yield`` and ``await``, where other code runs,
    and applies again when the function resumes.
    """

    variable: ClassVar[ContextVar[Any]]
    value: ClassVar[Any]

    def __new__(cls, function: Any = None) -> Any:
        new = super().__new__(cls)
        return new if function is None else new(function)  # `@no_grad`, without parentheses

    def __init__(self) -> None:
        # An instance is reentrant, and may be shared by threads.
        self._outer = threading.local()

    def __enter__(self) -> Any:
        outer = self._outer.__dict__.setdefault("values", [])
        outer.append(self.variable.get())
        self.variable.set(self.value)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.variable.set(self._outer.values.pop())

    def __call__(self, function: Any) -> Any:
        name = type(self).__name__
        if not callable(function) or isinstance(function, type):
            raise TypeError(
                f"{name}() decorates functions; got {function!r}. Decorate the methods of a "
                f"class, and write @{name}() below @classmethod, @staticmethod or @property."
            )
        return _decorated(type(self), function)


def _decorated(setting: type[Setting], function: Any) -> Any:
    """Wrap `function`, keeping its kind, so that `setting` applies while its code runs."""
    await_held = types.coroutine(_held)

    def plain(*args: Any, **kwargs: Any) -> Any:
        with setting():
            return function(*args, **kwargs)

    def generator(*args: Any, **kwargs: Any) -> Any:
        return (yield from _held(setting, function(*args, **kwargs)))

    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        return await await_held(setting, function(*args, **kwargs))

    async def asynchronous_generator(*args: Any, **kwargs: Any) -> Any:
        inner = function(*args, **kwargs)
        step = inner.asend(None)
        while True:
            try:
                result = await await_held(setting, step)
            except StopAsyncIteration:
                return
            try:
                step = inner.asend((yield result))
            except GeneratorExit:
                await await_held(setting, inner.aclose())
                raise
            except BaseException as error:
                step = inner.athrow(error)

    kinds: list[tuple[Callable[[Any], bool], Any]] = [
        (inspect.isasyncgenfunction, asynchronous_generator),
        (inspect.iscoroutinefunction, coroutine),
        (inspect.isgeneratorfunction, generator),
    ]
    wrapper = next((wrapper for kind, wrapper in kinds if _is(kind, function)), plain)
    return functools.update_wrapper(wrapper, function)


def _is(kind: Callable[[Any], bool], function: Any) -> bool:
    """Whether a function, or a callable object, is of this kind."""
    return kind(function) or kind(type(function).__call__)


def _held(setting: type[Setting], inner: Any) -> Generator[Any, Any, Any]:
    """Run `inner`, anything with send, throw and close, under `setting` while its code runs."""
    resume, argument = inner.send, None
    while True:
        try:
            with setting():
                result = resume(argument)
        except StopIteration as stop:
            return stop.value
        try:
            resume, argument = inner.send, (yield result)
        except GeneratorExit:
            with setting():
                inner.close()
            raise
        except BaseException as error:
            resume, argument = inner.throw, error


class no_grad(Setting):
    """Context manager and decorator within which operations record no graph.

    It applies to the thread or asynchronous task that enters it, and to tasks started within it. A
    decorated generator or coroutine computes without recording; the code between its steps is not
    affected.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.autograd import Tensor, no_grad
    >>> x = Tensor(np.ones(3), requires_grad=True)
    >>> with no_grad():
    ...     y = x * 2
    >>> y.requires_grad
    False
    >>> @no_grad()
    ... def doubled(tensors):
    ...     for tensor in tensors:
    ...         yield tensor * 2
    >>> [y.requires_grad for y in doubled([x])]
    [False]
    """

    variable = recording
    value = False


def is_grad_enabled() -> bool:
    """Whether operations on tensors that require gradients are recorded.

    Examples
    --------
    >>> from cupybnn.autograd import is_grad_enabled, no_grad
    >>> with no_grad():
    ...     print(is_grad_enabled())
    False
    """
    return recording.get()
