"""Linear layers of PyTorch: `cupybnn.torch.XnorLinear` against `torch.nn.Linear`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from cupybnn.backends.devices import Device
from cupybnn.benchmark.clock import Clock
from cupybnn.benchmark.methods import Unsupported, record_error
from cupybnn.benchmark.products import memory, release, rotation

__all__ = ["torch_layers"]

GPU, GPU_QUICK = (1024, 2048, 4096, 8192), (1024, 8192)
CPU, CPU_QUICK = (256, 512, 1024), (256,)
_LAYERS = ("nn.Linear", "XnorLinear", "packed XnorLinear")
_CHECKED = 8  # rows of the first result


def torch_layers(device: Device, clock: Clock, *, quick: bool) -> list[dict[str, Any]]:
    """Time N inputs through a layer of N x N weights, without gradients.

    `XnorLinear` packs inputs and weights in each call; packed by `cupybnn.torch.pack_linear`, it
    packs the inputs alone. Sets of inputs and weights are rotated so that they do not stay in the
    cache.

    Parameters
    ----------
    device : Device
        The current device.
    clock : Clock
    quick : bool
        Fewer sizes, shorter timing.

    Returns
    -------
    list of dict
        JSON values: a row for each size, layer and way, "eager" calls from Python or replays of a
        CUDA "graph". "call" is the time in a Python loop, where the host's time counts; "device"
        that with a full queue; "over_linear" the ratio to `nn.Linear` called in the same way.

    Raises
    ------
    ImportError, Unsupported
        If PyTorch is not installed, or sees no GPU.
    """
    import torch

    gpu = device.kind == "cuda"
    if gpu and not torch.cuda.is_available():
        raise Unsupported(f"PyTorch {torch.__version__} sees no GPU")
    sizes = (GPU_QUICK if quick else GPU) if gpu else (CPU_QUICK if quick else CPU)
    rows = []
    for size in sizes:
        for how in ("eager", "graph") if gpu else ("eager",):
            dense = None
            for layer in _LAYERS:
                row: dict[str, Any] = {
                    "size": size,
                    "layer": layer,
                    "how": how,
                    "dtype": "bfloat16" if gpu else "float32",
                }
                release(device)
                with record_error(row):
                    row |= _measure(layer, how, size, device, clock, 0.03 if quick else 0.1)
                    if layer == "nn.Linear":
                        dense = row["call"]["median"]
                    if dense is not None:
                        row["over_linear"] = dense / row["call"]["median"]
                rows.append(row)
    release(device)
    return rows


def _measure(
    name: str, how: str, size: int, device: Device, clock: Clock, budget: float
) -> dict[str, Any]:
    import torch

    where = torch.device("cpu" if device.kind == "cpu" else f"cuda:{device.index}")
    like = {"device": where, "dtype": torch.float32 if where.type == "cpu" else torch.bfloat16}
    cache, free = memory(device)
    sets = rotation(3 * size * size * like["dtype"].itemsize, cache, free)
    results: list[Any] = [None] * sets
    calls = []
    with torch.inference_mode():
        for i in range(sets):
            x, layer = torch.randn(size, size, **like), _layer(torch, name, size, like)
            if i == 0:
                first = x, layer
            calls.append((_eager if how == "eager" else _graph)(torch, layer, x, results, i))
        steps = itertools.cycle(calls)
        row: dict[str, Any] = {"sets": sets}
        row["device"] = clock.throughput(calls, budget).as_dict()
        row["call"] = clock.steady(lambda: next(steps)(), budget).as_dict()
        if name != "nn.Linear":
            row["checked"] = _is_exact(torch, *first, results[0])
            if not row["checked"]:
                row["error"] = "wrong result: it differs from the product of signs in float32"
    return row


def _layer(torch: Any, name: str, size: int, like: dict[str, Any]) -> Any:
    if name == "nn.Linear":
        return torch.nn.Linear(size, size, bias=False, **like)
    from cupybnn.torch import XnorLinear, pack_linear

    layer = XnorLinear(size, size, **like)
    if name == "XnorLinear":
        return layer
    packed = pack_linear(layer)
    packed.latent = layer.weight  # to check the result
    return packed


def _eager(torch: Any, layer: Any, x: Any, results: list[Any], i: int) -> Callable[[], None]:
    def call() -> None:
        results[i] = layer(x)

    return call


def _graph(torch: Any, layer: Any, x: Any, results: list[Any], i: int) -> Callable[[], None]:
    # The warm-up that PyTorch asks for: on a stream of its own.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        layer(x)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results[i] = layer(x)
    replay: Callable[[], None] = graph.replay
    return replay


def _is_exact(torch: Any, x: Any, layer: Any, y: Any) -> bool:
    weight = layer.latent if hasattr(layer, "latent") else layer.weight
    some = torch.arange(_CHECKED, device=x.device) * len(x) // _CHECKED
    a, b = (torch.where(z >= 0, 1.0, -1.0) for z in (x[some], weight))
    return bool(torch.equal((a @ b.T).to(y.dtype), y[some]))
