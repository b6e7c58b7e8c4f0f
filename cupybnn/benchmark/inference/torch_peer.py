"""The same network in PyTorch, written as one would who wants it fast. Imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from cupybnn.backends.devices import Device
from cupybnn.benchmark.inference.network import PIXEL_MAX, Network
from cupybnn.benchmark.inference.variants import Calls, Variant

__all__ = ["variants"]


def variants(device: Device, quick: bool) -> list[Variant]:
    """Return what is measured of PyTorch on a kind of device."""
    if device.kind == "cpu":
        return [Variant("PyTorch", "eager", "float32", _make)]
    ways = [("compiled + graph", "bfloat16"), ("eager", "float32")]
    if not quick:
        ways.insert(1, ("graph", "bfloat16"))
    return [Variant("PyTorch", how, precision, _make, _scope) for how, precision in ways]


class _Module(torch.nn.Module):
    """Logits of a `Network`: signs of weights are taken once, products are dense."""

    def __init__(self, network: Network, dtype: Any, device: Any) -> None:
        super().__init__()
        self.dtype, self.eps = dtype, network.eps

        def tensors(arrays: list[np.ndarray], to: Any) -> list[Any]:
            return [torch.from_numpy(a).to(device, to) for a in arrays]

        self.weights = tensors(network.weights, dtype)
        names = ("mean", "variance", "gamma", "beta")
        self.norms = list(
            zip(*(tensors(getattr(network, name), torch.float32) for name in names), strict=True)
        )

    def forward(self, x: Any) -> Any:
        x = x.to(self.dtype) * (1 / PIXEL_MAX)
        for weight, norm in zip(self.weights[:-1], self.norms, strict=True):
            mean, variance, gamma, beta = norm
            y = functional.batch_norm(
                (x @ weight).float(), mean, variance, gamma, beta, eps=self.eps
            )
            x = torch.where(y >= 0, 1.0, -1.0).to(self.dtype)
        return (x @ self.weights[-1]).float()


@contextlib.contextmanager
def _scope(variant: Variant) -> Iterator[None]:
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        if variant.how.startswith("compiled"):
            torch._dynamo.reset()


def _make(variant: Variant, network: Network, x: np.ndarray, device: Device) -> Calls:
    where = torch.device("cpu" if device.kind == "cpu" else f"cuda:{device.index}")
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dtype = torch.bfloat16 if variant.precision == "bfloat16" else torch.float32
    there = torch.from_numpy(x).to(where)
    forward: Callable[[Any], Any] = _Module(network, dtype, where).eval()
    if variant.how.startswith("compiled"):
        torch._dynamo.reset()
        forward = torch.compile(forward, dynamic=False, fullgraph=True)

    def call() -> Any:
        with torch.inference_mode():
            return forward(there)

    host: Callable[[Any], np.ndarray] = lambda y: y.cpu().numpy()  # noqa: E731
    if not variant.how.endswith("graph"):
        return Calls(call, host)
    # The warm-up that PyTorch asks for: on a stream of its own.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        # Neither are inputs copied to where the graph reads, nor is its result kept.
        graph.replay()
        return result

    return Calls(replay, host)
