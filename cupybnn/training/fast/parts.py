"""What the parts of a fused step's launches share: plan, memory, and tools for each stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cupybnn.backends.cuda import blas, fused
from cupybnn.data import DeviceData
from cupybnn.training.fast.buffers import Buffers
from cupybnn.training.fast.feed import Feed
from cupybnn.training.fast.plan import NetworkPlan

__all__ = ["Part", "Shared", "Tools", "no_span"]


class Tools(NamedTuple):
    """What has memory of its own for each stream, because both streams may run at a time."""

    launcher: fused.Launcher
    products: blas.Blas


class Shared:
    """What all parts of a step's launches use.

    Parameters
    ----------
    plan : NetworkPlan
    buffers : Buffers
    feed : Feed
    data : DeviceData

    Attributes
    ----------
    main, side : Tools
        Those of the first stream, and those of the second.
    input_scale : float
        Factor that turns the whole numbers in `Buffers.inputs` into pixels.
    span : callable
        Gets the name of a launch or group of launches, and returns a context for it. May be set.
    """

    def __init__(self, plan: NetworkPlan, buffers: Buffers, feed: Feed, data: DeviceData) -> None:
        self.plan, self.buffers, self.feed = plan, buffers, feed
        self.device = data.device.index
        launcher = self._new_launcher()
        self.main = self.side = Tools(launcher, blas.Blas(plan.precision))
        if plan.keep_dense_copies and any(h.backward == "dense" for h in plan.hidden[1:]):
            launcher = self._new_launcher() if plan.vat else launcher
            self.side = Tools(launcher, blas.Blas(plan.precision))
        keep = 1.0 if plan.input_dropout is None else plan.input_dropout.keep_prob
        self.input_scale = float(data.pixel_scale) / keep
        self.span: Callable[[str], Any] = no_span

    def _new_launcher(self) -> fused.Launcher:
        plan = self.plan
        return fused.Launcher(
            self.device,
            blas.operand_dtype(plan.precision),
            shapes=[(plan.batch, layer.units) for layer in plan.hidden],
            classes=plan.classes,
            clusters=self.buffers.clusters,
        )


class Part:
    """A part of a step's launches.

    Attributes
    ----------
    shared : Shared
    launcher : fused.Launcher
        Of the first stream.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self._plan, self._buffers, self._feed = shared.plan, shared.buffers, shared.feed
        self._main, self._side = shared.main, shared.side
        self.launcher = shared.main.launcher

    def span(self, name: str) -> Any:
        """Return the context of a launch or group of launches."""
        return self.shared.span(name)


@contextlib.contextmanager
def no_span(name: str) -> Iterator[None]:
    """Do nothing; the default of `Shared.span`."""
    yield
