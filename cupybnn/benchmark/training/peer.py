"""The same network in PyTorch, written to be fast. Imports torch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from cupybnn.backends.devices import Device
from cupybnn.benchmark.training.variants import Memory, Running, Size, Variant
from cupybnn.data import Dataset

__all__ = ["Network", "Stepper", "variants"]

_BATCH_NORM_EPS, _BATCH_NORM_MOMENTUM = 1e-4, 0.1


def variants(device: Device, quick: bool) -> list[Variant]:
    """Return PyTorch's variants for a kind of device."""
    if device.kind == "cpu":
        return [Variant("PyTorch", "eager", "matmul", "float32", _make)]
    return [
        Variant("PyTorch", how, "matmul", precision, _make, _scope)
        for how in ("eager", "graph", "compiled + graph")
        for precision in (("bfloat16",) if quick else ("tf32", "bfloat16"))
    ]


class HardTanhSign(torch.autograd.Function):
    """+1 where x >= 0, else -1; the gradient passes where ``|x| <= 1``."""

    @staticmethod
    def forward(ctx: Any, x: Any, plus: Any, minus: Any) -> Any:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, plus, minus)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1, grad.to(x.dtype), 0), None, None


class ClippedWeightSign(torch.autograd.Function):
    """The signs of weights that are clipped to [-1, 1]: the gradient passes everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Any, plus: Any, minus: Any) -> Any:
        ctx.dtype = x.dtype
        return torch.where(x >= 0, plus, minus)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.to(ctx.dtype), None, None


class Network(torch.nn.Module):
    """784-H-H-H-10, as `cupybnn.training.network.build_network` with `binary` and `batch_norm`.

    Parameters
    ----------
    images : Tensor of uint8, shape (images, features)
    labels : Tensor of int64, shape (images,)
    hidden : int
        Units in each hidden layer.
    classes : int
    dtype : torch.dtype
        Dtype of the operands of products; weights and everything else are in `real`.
    real : torch.dtype
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        hidden: int,
        classes: int,
        dtype: Any = torch.float32,
        real: Any = torch.float32,
    ) -> None:
        super().__init__()
        device = images.device
        self.register_buffer("images", images)
        self.register_buffer("labels", labels)
        self.dtype, self.real = dtype, real
        sizes = [images.shape[1], hidden, hidden, hidden, classes]
        self.weights = torch.nn.ParameterList()
        for inputs, outputs in itertools.pairwise(sizes):
            weight = torch.empty(inputs, outputs, device=device, dtype=real)
            self.weights.append(torch.nn.Parameter(torch.nn.init.xavier_uniform_(weight)))
        self.norms = torch.nn.ModuleList(
            torch.nn.BatchNorm1d(
                hidden, _BATCH_NORM_EPS, _BATCH_NORM_MOMENTUM, device=device, dtype=real
            )
            for _ in range(3)
        )
        self.register_buffer("plus", torch.ones((), device=device, dtype=dtype))
        self.register_buffer("minus", -torch.ones((), device=device, dtype=dtype))

    @property
    def latent(self) -> list[Any]:
        """The latent weights behind the binary ones."""
        return [self.weights[1], self.weights[2]]

    def forward(self, index: Any) -> Any:
        """Return the loss of a batch of images, given by index."""
        x = self.images[index].to(self.dtype) * (1 / 255)
        x = self._normalised(x @ self.weights[0].to(self.dtype), 0)
        for i, latent in enumerate(self.latent, 1):
            x = HardTanhSign.apply(x, self.plus, self.minus)
            signs = ClippedWeightSign.apply(latent, self.plus, self.minus)
            x = self._normalised(x @ signs, i)
        logits = x.to(self.dtype) @ self.weights[3].to(self.dtype)
        return functional.cross_entropy(logits.to(self.real), self.labels[index])

    def _normalised(self, x: Any, i: int) -> Any:
        norm = self.norms[i]
        return functional.batch_norm(
            x,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            True,
            _BATCH_NORM_MOMENTUM,
            _BATCH_NORM_EPS,
        )


class Stepper:
    """Training steps of a network: random batches, Adam, latent weights clipped to [-1, 1].

    Parameters
    ----------
    network : Network
    batch : int
    compiled : bool
        Whether forward and backward pass go through ``torch.compile``.
    """

    def __init__(self, network: Network, batch: int, compiled: bool = False) -> None:
        self.network, self.batch = network, batch
        # A captured optimizer must count its steps on the device.
        options = {"capturable": True} if network.images.is_cuda else {}
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True, **options)
        self.loss: Any = None
        self._forward: Callable[[Any], Any] = network
        if compiled:
            # Compiled for this size only: static shapes give faster code.
            torch._dynamo.reset()
            self._forward = torch.compile(network, dynamic=False, fullgraph=True)
        self._graph: Any = None

    def __call__(self) -> None:
        """Run a step."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _step(self) -> None:
        images = self.network.images
        index = torch.randint(len(images), (self.batch,), device=images.device)
        loss = self._forward(index)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for latent in self.network.latent:
                latent.clamp_(-1, 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()

    def capture(self, memory: Memory) -> None:
        """Capture a step as a CUDA graph; later steps replay it."""
        # PyTorch requires a warm-up on a side stream.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        memory.update()  # now, because torch.cuda.graph empties PyTorch's cache
        self.loss = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph


@contextlib.contextmanager
def _scope(variant: Variant) -> Iterator[None]:
    """Let float32 products use TF32, and clean up afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    # Otherwise workspaces left by earlier variants would not count as this one's memory.
    with contextlib.suppress(AttributeError):  # there is no public function
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        if variant.how.startswith("compiled"):
            torch._dynamo.reset()


def _make(variant: Variant, size: Size, device: Device, data: Dataset, memory: Memory) -> Running:
    where = torch.device("cpu" if device.kind == "cpu" else f"cuda:{device.index}")
    images = torch.from_numpy(data.train_images).to(where)
    labels = torch.from_numpy(data.train_labels.astype("int64")).to(where)
    dtype = torch.bfloat16 if variant.precision == "bfloat16" else torch.float32
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    network = Network(images, labels, size.hidden, data.classes, dtype)
    stepper = Stepper(network, size.batch, variant.how.startswith("compiled"))
    running = Running(stepper, lambda: float(stepper.loss))
    if where.type == "cuda":
        running.pool = torch.cuda.max_memory_allocated
    if variant.how.endswith("graph"):
        stepper.capture(memory)
    return running
