"""One training step of fused kernels, captured as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from cupybnn import nn, optim
from cupybnn.backends.cuda import blas
from cupybnn.backends.cuda.compiler import compile_together
from cupybnn.backends.cuda.fused_batch import Draw
from cupybnn.backends.cuda.graph import Fork, capture
from cupybnn.data import BatchOrder, DeviceData
from cupybnn.errors import NonFiniteError, RankError
from cupybnn.training.agreement import true_on_all
from cupybnn.training.config import TrainConfig
from cupybnn.training.fast.buffers import Buffers
from cupybnn.training.fast.exchange import Exchange
from cupybnn.training.fast.feed import Feed
from cupybnn.training.fast.following import Edits, Wiring
from cupybnn.training.fast.layers import grad_quantizer
from cupybnn.training.fast.parts import no_span
from cupybnn.training.fast.passes import Passes
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.fast.teaching import Teaching
from cupybnn.training.fast.update import UpdateOptions, plan_update
from cupybnn.training.step import Objective, StepOutput
from cupybnn.training.teachers import Teachers
from cupybnn.training.team import Team

__all__ = ["FusedStep"]


class FusedStep:
    """Performs the steps that `PlainStep` defines; in float32, the same up to rounding.

    Parameters, batch norm's running statistics and the optimizer's arrays are updated in place, so
    that evaluation, records and checkpoints see each step. Edits that a callback makes to them, and
    changed options of the optimizer, take effect in the next step. If layers, arrays or groups of
    parameters are replaced, `stale` returns True, and a new step must be built.

    Parameters
    ----------
    model : Module
        On the current CUDA device; `unsupported_reason` returns None for it.
    objective : Objective
    optimizer : Adam or AdamW
    data : DeviceData
    order : BatchOrder
    config : TrainConfig
    notify : callable, optional
        Called with a sentence when steps cannot be captured.
    teachers : Teachers, optional
        Whose predictions are learned instead of the labels.
    team : Team, optional
        The ranks that perform the step together; weights must be shared out.

    Notes
    -----
    With a `team`, the elements of a weight that is shared out follow its signs when its `data` is
    read, and not before: the next products read packed signs.

    The next step overwrites what a step returned, and parameters' gradients. `grad` is None if the
    gradient is rounded or never stored, unless the run has a log directory.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: optim.Adam,
        data: DeviceData,
        order: BatchOrder,
        config: TrainConfig,
        notify: Callable[[str], None] | None = None,
        teachers: Teachers | None = None,
        team: Team | None = None,
    ) -> None:
        import cupy

        self.plan = NetworkPlan.of(
            model,
            config,
            data.device.index,
            None if team is None else team.rows,
            None if team is None else team.most_rows,
        )
        self._team = team
        self.exchange = None if team is None else Exchange(team, self.plan)
        self._objective, self._optimizer = objective, optimizer
        self._notify = notify or (lambda sentence: None)
        self._recorded = config.log_dir is not None
        self.buffers = Buffers(
            self.plan, model, data.device, self._recorded, self.exchange, config.sync_batch_norm
        )
        self.feed = Feed(order, optimizer, self.plan.first, self.plan.batch + self.plan.further)
        teaching = None
        if teachers is not None:
            teaching = Teaching(teachers, self.plan, float(data.pixel_scale))
        self.passes = Passes(self.plan, self.buffers, self.feed, data, config, teaching)
        self._parameters = list(model.parameters())
        self._wiring = Wiring(model, optimizer)
        shared = {} if self.exchange is None else self.exchange.shared
        self._edits = Edits([h for h in self.buffers.hidden if h.plan.linear.weight not in shared])
        self.passes.weights.sums_loss = team is not None and objective.penalty_kind != "none"
        self._shared_out = -1
        self._captured = 0  # exchanges in the graph
        self._lagging: set[nn.Parameter] = set()
        self._options: UpdateOptions | None = None
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # One for the gradients of weights, one for updates.
        self._side_streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
        self._graph: Any = None
        self._bypass_graph = False
        self._warm = self._votes_to_stop = False
        self._capture = config.graph and (team is None or team.ranks.capturable)
        self._compared = team if config.debug else None
        if team is not None:
            team.ranks.release_before(self)
        if self._capture and not self._all(blas.capturable()):
            self._capture = False
            where = "" if team is None or not blas.capturable() else " on another rank"
            self._notify(
                f"Training steps run without a CUDA graph, because CuPy's dense products cannot be "
                f"captured{where}. To use one: pip install nvmath-python."
            )
        layers = [self.plan.input_dropout, *(hidden.dropout for hidden in self.plan.hidden)]
        self._dropouts = [layer for layer in layers if layer is not None]
        quantizers = (grad_quantizer(self.plan.hidden[i].linear) for i in self.buffers.rounded)
        self._quantizers = [quantizer for quantizer in quantizers if quantizer is not None]
        self._offsets: tuple[int, ...] = ()

    def _all(self, here: bool) -> bool:
        """Whether something is true on every rank: a graph that one has not, none may have."""
        return here if self._team is None else true_on_all(self._team.ranks, here)

    def release(self) -> None:
        """Give the graph up; a later step captures another."""
        self._graph = None

    def stale(self) -> bool:
        """Whether something that the step was built on has been replaced."""
        return self._wiring.changed()

    def prepare(self, evaluate: Callable[[], object], mention: Callable[[str], None]) -> None:
        """Compile the kernels of a step and of `evaluate` at the same time."""
        self._update_options()
        draws = self._draws([0] * len([*self._dropouts, *self._quantizers]))

        def everything() -> None:
            evaluate()  # first: a large product takes longest to compile
            self.feed.write_images(0)
            self.passes.launch(Fork(), draws)

        compile_together(everything, mention)

    def __call__(self, step: int) -> StepOutput:
        """Perform step number `step`."""
        self._edits.refresh_copies()
        if self._team is not None:
            self._prepare_shares(self._team)
        self._update_options()
        self.feed.prepare(step)
        self._advance_streams(step)
        by_graph = self._capture and not self._bypass_graph
        if by_graph and self._graph is None and self._warm:
            self._graph = self._capture_graph()
        if by_graph and self._graph is not None:
            self._graph.launch()
            if self._team is not None:
                self._team.ranks.replayed(self._captured)
        else:
            self.passes.launch(Fork(), self._draws())
            self._warm = True
        self._optimizer.steps += 1
        kept_grads = self.buffers.kept_grads
        for parameter in self._parameters:
            if parameter.share is not None:
                parameter.share.grad = kept_grads[parameter]
                self._lagging.add(parameter)
                continue
            parameter.write()  # records that it changed
            parameter.grad = kept_grads[parameter]
        self._edits.mark_current()
        if self._team is not None:
            self._team.count(self.buffers.votes)
        if self._compared is not None:
            self._compare(self._compared)
        return StepOutput(self.buffers.loss.reshape(()), self.buffers.logits, self.buffers.labels)

    def _prepare_shares(self, team: Team) -> None:
        """Follow what happened to weights that were whole in between; vote to stop, if asked to."""
        assert self.exchange is not None
        if team.times_shared_out != self._shared_out:
            self._shared_out = team.times_shared_out
            self._lagging.clear()
            for hidden in self.buffers.hidden:
                if hidden.plan.linear.weight in self.exchange.shared:
                    hidden.refresh()
            for parameter in self.exchange.shared:
                assert parameter.share is not None
                parameter.share.bring_up_to_date = partial(self._unpack, parameter)
        if team.wants_stop() and not self._votes_to_stop:
            self._votes_to_stop = True
            self.buffers.vote.fill(1)

    def _unpack(self, parameter: nn.Parameter) -> None:
        """Write the current signs of a weight that is shared out into its elements."""
        if parameter in self._lagging:
            assert self.exchange is not None
            self._lagging.remove(parameter)
            self.exchange.unpack(parameter, self.passes.launcher)
            parameter.write()

    def _capture_graph(self) -> Any:
        """Return the graph of a step, or None, with a notice, if a rank cannot capture it."""
        graph, why = None, "another rank cannot capture one"
        try:
            if self.exchange is not None:
                self.exchange.count = 0
            sides = self._side_streams if self.plan.keep_dense_copies else ()
            draws = self._draws()
            graph = capture(self._stream, lambda: self.passes.launch(Fork(*sides), draws))
            self._captured = 0 if self.exchange is None else self.exchange.count
        except RankError:
            raise
        except RuntimeError as error:
            why = str(error)
        if self._all(graph is not None):
            return graph
        self._capture = False
        self._notify(f"Training steps run without a CUDA graph: {why}.")
        return None

    def _compare(self, team: Team) -> None:
        """Compare what the ranks have after a step: loss, weights, and the copies of these.

        Raises
        ------
        NonFiniteError
            If the loss is NaN or infinite.
        RankError
            If something differs.
        """
        if not np.isfinite(float(self.buffers.loss.get()[0])):
            error = NonFiniteError("a fused step", "loss", "", (1,), 1)
            error.report = team.ranks.rank == 0
            raise error
        copies: dict[str, Any] = {}
        for hidden in self.buffers.hidden:
            copies |= hidden.copies()
        team.compare(copies)

    def spans(self, step: int) -> dict[str, float]:
        """Perform step number `step` without the graph, and time its parts.

        Returns
        -------
        dict of str to float
            Seconds on the device, by name of the launches. Short ones are mostly launch gaps.
        """
        import cupy

        events: list[tuple[str, Any, Any]] = []

        @contextlib.contextmanager
        def span(name: str) -> Iterator[None]:
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            yield
            end.record()
            events.append((name, begin, end))

        self._bypass_graph, self.passes.shared.span = True, span
        try:
            self(step)
        finally:
            self._bypass_graph, self.passes.shared.span = False, no_span
        seconds: dict[str, float] = {}
        for name, begin, end in events:
            end.synchronize()
            elapsed = cupy.cuda.get_elapsed_time(begin, end) / 1e3
            seconds[name] = seconds.get(name, 0.0) + elapsed
        return seconds

    def _update_options(self) -> None:
        """Plan the update again if options that are built into its launches have changed."""
        options = UpdateOptions.of(self._optimizer, self._parameters)
        if options != self._options:
            self._options, self._graph = options, None
            self.passes.weights.update = plan_update(
                self.plan,
                self.buffers,
                self.feed,
                self._objective,
                self._optimizer,
                self._parameters,
                options,
                self.passes.launcher,
                self._recorded,
            )

    def _advance_streams(self, step: int) -> None:
        """Advance the layers' counters; this step's draws use ``step + offset``."""
        layers: list[Any] = [*self._dropouts, *self._quantizers]
        offsets = tuple(layer.random.next()[1] - step for layer in layers)
        if offsets != self._offsets:
            self._offsets, self._graph = offsets, None

    def _draws(self, offsets: Sequence[int] | None = None) -> list[Draw]:
        """Return the draws of dropout, then those of rounding, which drops nothing."""
        layers: list[tuple[Any, float]] = [(layer, layer.keep_prob) for layer in self._dropouts]
        layers += [(quantizer, 1.0) for quantizer in self._quantizers]
        return [
            Draw(seed=int(layer.random.state[0]), offset=offset, keep_prob=keep_prob)
            for (layer, keep_prob), offset in zip(layers, offsets or self._offsets, strict=True)
        ]
