"""The ranks of a run, as its steps see them: parts of a batch, gradients, shares of the weights.

Each rank has a part of the images of a batch. Real weights, and whatever else a model learns, are
the same on every rank: their gradients are summed, and each rank makes the same update.

A binary weight is shared out. A rank has the latent weights and the optimizer's arrays of its share
alone; the weight itself holds signs. The forward pass needs no more, and the backward pass gives
the gradient with respect to the signs. The sum of that over the ranks is scattered, each part to
the rank whose share it is, which applies the pseudo-gradient, updates its latent weights and sends
their signs to the others, one bit a weight. Applied to the sum, the pseudo-gradient is that of a
run of one rank even where it is not linear ("clipped_grad").

Between steps, `gather` makes the weights and the optimizer's arrays whole again, for an evaluation
or a checkpoint, and `share_out` reverses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from cupybnn import nn, optim
from cupybnn.autograd import Tensor
from cupybnn.backends.devices import CPU, synchronize, to_device
from cupybnn.backends.random import from_row
from cupybnn.ops.gradient_levels import greatest_of_batch
from cupybnn.ops.norm import whole_batch
from cupybnn.parallel import Pending, Ranks
from cupybnn.training.agreement import check_equal
from cupybnn.training.config import TrainConfig
from cupybnn.training.shares import SharedWeight, can_be_shared
from cupybnn.training.step import Objective

__all__ = ["Team"]

#: The host reads the votes once in so many steps, those of as many steps ago. So it is at least as
#: many steps ahead of a GPU, which would otherwise wait for it now and then.
_AHEAD = 4
#: Gradients of at most this many elements are sent together, when the backward pass is done.
_SMALL = 1 << 15


class Team:
    """What one of several ranks does in each step.

    Parameters
    ----------
    ranks : Ranks
        More than one.
    model : Module
    optimizer : Optimizer
    objective : Objective
    config : TrainConfig
        Its fields `batch_size`, `sync_batch_norm` and `debug`.
    wants_stop : callable
        Returns whether this rank has been asked to stop.

    Attributes
    ----------
    rows : slice
        This rank's images in a batch.
    most_rows : int
        The greatest number of images that a rank has.
    share_of_batch : float
        Their number as a part of the batch's.
    stop : bool
        Whether a rank was asked to stop: the same on all ranks after the same step.
    shared : dict of Parameter to SharedWeight
        The weights that are shared out.
    is_whole : bool
        Whether weights, optimizer's arrays and statistics are whole on every rank.
    times_shared_out : int
        How often; each time, weights may have been edited before.
    """

    def __init__(
        self,
        ranks: Ranks,
        model: nn.Module,
        optimizer: optim.Optimizer,
        objective: Objective,
        config: TrainConfig,
        wants_stop: Callable[[], bool],
    ) -> None:
        self.ranks = ranks
        self.stop = False
        self._model, self._optimizer, self._objective = model, optimizer, objective
        self._debug, self.wants_stop = config.debug, wants_stop
        self._batch, self._sync = config.batch_size, config.sync_batch_norm
        first, last = (r * config.batch_size // ranks.size for r in (ranks.rank, ranks.rank + 1))
        self.rows = slice(first, last)
        self.most_rows = -(-config.batch_size // ranks.size)
        self.share_of_batch = (last - first) / config.batch_size
        self._learned = {p for group in optimizer.groups for p in group["params"]}
        self._device = next((p.device for p in self._learned), CPU)
        layers = [m for _, m in model.named_modules() if isinstance(m, nn.Linear)]
        uses = [layer.weight for layer in layers]
        self.shared = {
            layer.weight: SharedWeight(layer, ranks)
            for layer in layers
            if isinstance(layer, nn.BinaryLinear) and can_be_shared(layer)
            if layer.weight.size and sum(w is layer.weight for w in uses) == 1
            if layer.weight in self._learned
        }
        self.times_shared_out = 0
        self.is_whole = True
        self._counted = 0  # steps
        self._earlier: Any = None  # votes that have not been read, and an event behind them
        self._side: Any = None  # the stream that brings votes to the host

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """Context for a forward pass: random numbers by an image's place in the whole batch."""
        self.share_out()
        with contextlib.ExitStack() as stack:
            stack.enter_context(from_row(self.rows.start))
            greatest = lambda array: self.ranks.all_max(array).wait()  # noqa: E731
            stack.enter_context(greatest_of_batch(greatest))
            if self._sync:
                total = lambda array: self.ranks.all_reduce(array).wait()  # noqa: E731
                stack.enter_context(whole_batch(total, self._batch))
            yield

    def weight_of(self, loss: Tensor) -> Any:
        """Return the factor that makes the mean over this rank's images a part of all images'."""
        return self._device.xp.full((), self.share_of_batch, loss.dtype)

    def learn(self, loss: Tensor) -> Any:
        """Compute gradients, update and return the loss, all of the whole batch."""
        begun: dict[nn.Parameter, Pending] = {}

        def completed(leaf: Any) -> None:
            """Send a gradient on its way while the backward pass goes on."""
            if leaf in self.shared:
                begun[leaf] = self.shared[leaf].scatter(leaf.grad)
                leaf.grad = leaf.share.grad = None
            elif leaf.size > _SMALL and leaf in self._learned:
                begun[leaf] = self.ranks.all_reduce(leaf.grad)

        factor = self.weight_of(loss)
        loss.backward(factor, completed=completed)
        value = loss._data * factor
        for parameter, shared in self.shared.items():
            if parameter in begun:
                value = value + self._receive(shared, begun.pop(parameter))
        for parameter, pending in begun.items():
            parameter.grad = pending.wait()
        small = [p for p in self._model.parameters() if p in self._learned and p.size <= _SMALL]
        small = [p for p in small if p.grad is not None]
        value = self._exchange_small(small, value)
        self._optimizer.step()
        sent = [(shared, shared.send_signs()) for shared in self.shared.values()]
        for shared, pending in sent:
            shared.set_signs(pending.wait())
        if self._debug:
            self.compare()
        return value

    def _receive(self, shared: SharedWeight, pending: Pending) -> Any:
        """Turn the sum of the gradients of signs into that of the share; return its penalty."""
        share = shared.parameter.share
        assert share is not None
        with np.errstate(all="ignore"):  # as in the backward pass
            share.grad = shared.quantizer.pseudo_gradient(share.weight, pending.wait())
        elements = Tensor(share.weight[: shared.used], requires_grad=True)
        penalty = self._objective.penalty_of_share(shared.parameter, elements)
        if penalty is None:
            return 0.0
        penalty.backward()
        share.grad[: shared.used] += elements.grad
        return penalty._data

    def _exchange_small(self, parameters: list[nn.Parameter], value: Any) -> Any:
        """Sum small gradients, the loss and the votes to stop in one exchange; return the loss."""
        xp = self._device.xp
        vote = xp.full((1,), float(self.wants_stop()), value.dtype)
        dtypes = {value.dtype, *(p.dtype for p in parameters)}
        totals: dict[nn.Parameter, Any] = {}
        for dtype in sorted(dtypes, key=str):
            some = [p for p in parameters if p.dtype == dtype]
            parts = [p.grad.reshape(-1) for p in some]
            if dtype == value.dtype:
                parts += [value.reshape(1), vote]
            total = self.ranks.all_reduce(xp.concatenate(parts)).wait()
            if dtype == value.dtype:
                value, vote = total[-2], total[-1]
            start = 0
            for parameter in some:
                stop = start + parameter.size
                totals[parameter] = total[start:stop].reshape(parameter.shape)
                start = stop
        for parameter, total in totals.items():
            parameter.grad = total
        self.count(vote)
        return xp.asarray(value)

    def count(self, vote: Any) -> None:
        """Look whether a rank wants to stop; on a GPU, in some steps, whether one did earlier.

        The host waits for that earlier step, so it is never twice `_AHEAD` steps ahead of the
        device. All ranks look after the same steps. A rank that wants to stop wants it in every
        later step, too.

        Parameters
        ----------
        vote : array of one element
            Greater than 0 if a rank wants to stop. It may be overwritten later.
        """
        if self._device.kind == "cpu":
            self.stop = bool(vote > 0)
            return
        self._counted += 1
        if self._counted % _AHEAD:
            return
        cuda = self._device.xp.cuda
        earlier, self._earlier = self._earlier, (vote.copy(), cuda.get_current_stream().record())
        if earlier is not None:
            vote, counted = earlier
            side = self._side = self._side or cuda.Stream(non_blocking=True)
            side.wait_event(counted)
            self.stop = bool(vote.get(stream=side) > 0)
            self.ranks.check()

    # Shares --------------------------------------------------------------------------------------

    def _slots(self) -> Iterator[tuple[SharedWeight, dict[nn.Parameter, tuple[Any, ...]]]]:
        """Yield each shared weight with the arrays that its optimizer keeps, by parameter."""
        for each in getattr(self._optimizer, "optimizers", (self._optimizer,)):
            mine = {id(p) for group in each.groups for p in group["params"]}
            for parameter, shared in self.shared.items():
                if id(parameter) in mine:
                    yield shared, each._slots

    def share_out(self) -> None:
        """Keep this rank's shares alone; the weights become signs."""
        if not self.is_whole:
            return
        self.is_whole = False
        self.times_shared_out += 1
        with self._device.scope():
            for shared in self.shared.values():
                shared.share_out()
            for shared, slots in self._slots():
                if (arrays := slots.get(shared.parameter)) is not None:
                    slots[shared.parameter] = shared.share_out_slots(arrays)
            for shared in self.shared.values():
                shared.set_signs(shared.send_signs().wait())

    def gather(self) -> None:
        """Make weights, the optimizer's arrays and batch norm's statistics whole on every rank."""
        if self.is_whole:
            return
        self.is_whole = True
        with self._device.scope():
            for shared, slots in self._slots():
                if (arrays := slots.get(shared.parameter)) is not None:
                    slots[shared.parameter] = shared.gather_slots(arrays)
            for shared in self.shared.values():
                shared.gather()
            if not self._sync:
                self._average_statistics()

    def _average_statistics(self) -> None:
        """Give all ranks the mean of their running statistics, weighted by their images.

        These are linear in the statistics of the batches, so it does not matter how often.
        """
        for _, array in self._model.named_buffers():
            if array.dtype.kind == "f":
                array[...] = self.ranks.all_reduce(
                    array * array.dtype.type(self.share_of_batch)
                ).wait()

    def begin(self) -> None:
        """Give all ranks the weights, statistics and random states of rank 0."""
        state = self._model._state()
        for name, parameter in self._model.named_parameters():
            state[name] = parameter.write()
        for array in state.values():
            if isinstance(array, np.ndarray):
                array[...] = self.ranks._host(self.ranks.broadcast(self.ranks._own(array)).wait())
            else:
                array[...] = self.ranks.broadcast(array).wait()

    def compare(self, more: Mapping[str, Any] | None = None) -> None:
        """Raise RankError unless all ranks have the same weights, and `more` arrays by name."""
        arrays: dict[str, Any] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.share is not None and parameter.share.bring_up_to_date is not None:
                parameter.share.bring_up_to_date()
            arrays[name] = parameter._data
            if parameter in self.shared and not self.is_whole:
                signs = to_device(parameter._data, CPU).reshape(-1) >= 0
                arrays[name] = np.packbits(signs)
        check_equal(self.ranks, {**arrays, **(more or {})})

    def finish(self) -> None:
        """Wait for the device, and raise RankError if what it computed was aborted."""
        synchronize(self._device)
        self.ranks.check()
