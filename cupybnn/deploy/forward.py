"""The forward pass of a packed network: the fastest way that takes its layers and inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn import settings
from cupybnn.backends.devices import Device
from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.layers import PackedLayer

if TYPE_CHECKING:
    from cupybnn.deploy.cpu_forward import CpuForward
    from cupybnn.deploy.cuda_forward import CudaForward

__all__ = ["Forward"]

#: Inputs that go through the layers at a time on the CPU, so that activations stay in the cache.
_ROWS = 1024
#: Weights of a first layer for which compiled kernels, imported for them, are worth it.
_LEAST_WEIGHTS = 1 << 16


class Forward:
    """Compute the logits of inputs, by what is made for it at the first call.

    Attributes
    ----------
    cuda : CudaForward or None
        Takes all inputs on a GPU.
    cpu : CpuForward, False or None
        Takes pixels of a byte on a CPU. False: no compiled kernels take this network.
    usual : callable or None
        Takes inputs of the usual kind on a GPU, and returns None for others.
    """

    def __init__(self, layers: Sequence[PackedLayer], inputs: InputSpec, device: Device) -> None:
        self.layers, self.inputs, self.device = layers, inputs, device
        self.cuda: CudaForward | None = None
        self.cpu: CpuForward | bool | None = None
        self.usual: Callable[[Any], Any] | None = None
        self._usual_types = "f" if inputs.pixel_max is None else "fB"

    def __getstate__(self) -> dict[str, Any]:
        # Graphs and locks are of this process.
        return {**vars(self), "cuda": None, "cpu": None, "usual": None}

    def __call__(self, x: Any) -> Any:
        """Return the logits of inputs, (batch, features), or of one; see `InputSpec.rows`."""
        return self._on_gpu(x) if self.device.kind == "cuda" else self._on_cpu(x)

    def _on_cpu(self, x: Any) -> Any:
        if type(x) is np.ndarray and x.dtype == np.uint8 and x.shape[1:] == (self.inputs.features,):
            rows, single = x, False
        else:
            rows, single = self.inputs.rows(x, self.device)
        compiled = self._for_pixels() if rows.dtype == np.uint8 and len(rows) else None
        if compiled is not None:
            logits = compiled(np.ascontiguousarray(rows))
        elif len(rows) <= _ROWS:
            logits = self._by_layers(self.inputs.numbers(rows))
        else:
            parts = (rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS))
            logits = np.concatenate([self._by_layers(self.inputs.numbers(part)) for part in parts])
        return logits[0] if single else logits

    def _on_gpu(self, x: Any) -> Any:
        cupy, index = self.device.xp, self.device.index
        # The usual case without the questions of others: their time would be half of a call's.
        usual = type(x) is cupy.ndarray and x.shape[1:] == (self.inputs.features,)
        usual = usual and x.dtype.char in self._usual_types and x.data.device_id == index
        rows, single = (x, False) if usual else self.inputs.rows(x, self.device)
        if cupy.cuda.runtime.getDevice() == index:
            logits = self._for_gpu()(rows)
        else:
            with self.device.scope():
                logits = self._for_gpu()(rows)
        return logits[0] if single else logits

    def _for_gpu(self) -> CudaForward:
        """Return the way on a GPU, which must be the current device."""
        if self.cuda is None:
            from cupybnn.deploy.cuda_forward import CudaForward

            # Two threads may both make one: either is as good.
            self.cuda = CudaForward(self.layers, self.inputs, self.device)
            self.usual = self.cuda.usual
        return self.cuda

    def _for_pixels(self) -> CpuForward | None:
        """Return the way for pixels by compiled kernels, if there is one for this network."""
        first = self.layers[0]
        if not settings.cpu_kernels() or first.inputs * first.units < _LEAST_WEIGHTS:
            return None
        if self.cpu is None:
            from cupybnn.deploy.cpu_forward import CpuForward

            try:
                self.cpu = CpuForward(self.layers, self.inputs)
            except ValueError:  # the other way takes it
                self.cpu = False
        return None if isinstance(self.cpu, bool) else self.cpu

    def _by_layers(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x
