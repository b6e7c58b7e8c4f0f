"""Capturing a CUDA graph: what may go wrong on the way, without a GPU, and on one."""

from __future__ import annotations

import contextlib
import gc
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest

from cupybnn.backends.cuda import blas
from cupybnn.backends.cuda.graph import Fork, capture


class CuBlasError(Exception):
    pass


class Stream:
    """Stands for a stream that captures."""

    ended = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def begin_capture(self):
        return None

    def end_capture(self):
        self.ended += 1
        return "graph"


@pytest.fixture
def stream(monkeypatch) -> Stream:
    """Give such a stream, with as much of CuPy as `capture` asks for."""
    cuda = SimpleNamespace(
        using_allocator=lambda allocator: contextlib.nullcontext(),
        runtime=SimpleNamespace(CUDARuntimeError=type("CUDARuntimeError", (Exception,), {})),
        driver=SimpleNamespace(CUDADriverError=type("CUDADriverError", (Exception,), {})),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(blas, "_nvmath", lambda: SimpleNamespace(cuBLASError=CuBlasError))
    return Stream()


def test_nothing_is_collected_meanwhile(stream):
    during = []
    assert capture(stream, lambda: during.append(gc.isenabled())) == "graph"
    assert during == [False]
    assert gc.isenabled()


def test_collection_stays_off_where_it_was(stream):
    gc.disable()
    try:
        capture(stream, lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_library_error_is_reported_and_ends_the_capture(stream):
    def refuse():
        raise CuBlasError("the function failed to launch on the GPU")

    with pytest.raises(RuntimeError, match=r"cannot be captured: the function failed to launch"):
        capture(stream, refuse)
    assert stream.ended == 1
    assert gc.isenabled()


def test_our_own_errors_are_not_converted(stream):
    with pytest.raises(ZeroDivisionError):
        capture(stream, lambda: 1 // 0)
    assert stream.ended == 1
    assert gc.isenabled()


class Recorded:
    """Stands for a stream that records what its work waits for."""

    current: ClassVar[list[Recorded]] = []

    def __init__(self, name):
        self.name, self.done = name, []

    def __enter__(self):
        self.current.append(self)

    def __exit__(self, *error):
        self.current.pop()

    def wait_event(self, event):
        self.done += event

    def launch(self):
        """Launch something; return what has been done by then, as far as the stream knows."""
        self.done += [f"{self.name}{len(self.done)}"]
        return self.done[:-1]


def test_further_streams_wait_for_what_they_are_told_and_are_joined(monkeypatch):
    main, first, second = (Recorded(name) for name in "abc")
    monkeypatch.setattr(Recorded, "current", [main])
    monkeypatch.setattr(Fork, "_mark", staticmethod(lambda: list(Recorded.current[-1].done)))
    current = SimpleNamespace(get_current_stream=lambda: Recorded.current[-1])
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=current))
    fork = Fork(first, second)
    assert fork.mark() is None
    main.launch()
    ready = fork.ready()
    main.launch()
    with fork.aside(ready):
        assert first.launch() == ["a0"]
    with fork.aside(fork.mark(), 1):
        assert second.launch() == ["a0", "b1"]
    with fork.aside():
        assert first.launch() == ["a0", "b1", "a0", "a1"]
    assert fork.mark(1) == ["a0", "b1", "c2"]
    fork.join()
    assert set(main.launch()) == {"a0", "a1", "b1", "b4", "c2"}


@pytest.mark.parametrize("streams", [(), (None,)])
def test_without_further_streams_everything_is_in_order(streams):
    fork = Fork(*streams)
    with fork.aside(fork.ready(), 1):
        assert fork.mark(1) is None
    fork.join()


@pytest.mark.gpu
def test_an_earlier_networks_handle_does_not_break_a_capture_off():
    import cupy

    if not blas.capturable():
        pytest.skip("needs nvmath-python")
    products = blas.Blas("float32")
    a, out = cupy.ones((64, 64), "f4"), cupy.empty((64, 64), "f4")
    products.multiply(a, a, out)

    class Network:
        """In a cycle, so that only the collector finds it."""

        def __init__(self):
            self.itself, self.products = self, blas.Blas("float32")

    def launch():
        gc.set_threshold(10, 1, 1)
        for _ in range(3):
            products.multiply(a, a, out)
            [[] for _ in range(1000)]  # enough for the collector to set out
        gc.set_threshold(10**6)

    before = gc.get_threshold()
    gc.set_threshold(10**6)  # not before the capture
    try:
        for _ in range(3):
            Network()
            graph = capture(cupy.cuda.Stream(non_blocking=True), launch)
            out.fill(0)
            graph.launch()
            assert bool((out == 64).all())
    finally:
        gc.set_threshold(*before)
