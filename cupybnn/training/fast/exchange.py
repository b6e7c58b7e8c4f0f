"""What the ranks of a run send each other within a fused step.

In the backward pass, each rank computes the gradients of all hidden weights over its own images, in
the type of dense operands. An exchange begins as soon as a gradient is complete; in large networks,
when all are:

- A reduce-scatter sums the gradients of a weight that is shared out: each rank gets the sum for its
  share. It updates the share, and one all-gather sends the signs of all layers, one bit a weight.
- An all-reduce sums the gradients of any other weight.
- An all-reduce in float32 sums the small gradients, together with the loss.
- Where a layer's gradient is rounded, a unit has one scale for the whole batch. So the greatest
  magnitudes are compared first.

In large networks on GPUs that can read each other's memory, gradients of weights that are shared
out are not sent. The update reads them in the memory of all ranks. Two exchanges of the step keep
reading and writing apart:

- An update waits for the sum of the small gradients. Each rank begins this exchange when all its
  gradients are complete, and it ends on no rank before all have begun it.
- A rank sends its signs after its updates. It writes the next step's gradients after the signs of
  all ranks have come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupybnn import nn
from cupybnn.backends.cuda.blas import operand_dtype
from cupybnn.backends.cuda.compiler import is_dry_run
from cupybnn.backends.cuda.fused import Launcher
from cupybnn.backends.cuda.fused_shares import Placing, place_signs
from cupybnn.parallel import Pending
from cupybnn.training.fast.hidden import HiddenBuffers
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.shares import ROWS
from cupybnn.training.team import Team

__all__ = ["Exchange"]

#: If GPUs can read each other's memory: with a gradient of this many bytes or more, nothing is
#: exchanged alongside products.
_READ_FROM = 16 << 20
_WORDS = 4  # packed words are padded to a multiple: 16 bytes, which a thread copies at a time


class Exchange:
    """The exchanges of a step, with their memory.

    An exchange begins after the work that the current stream has been given. A ``receive`` method
    makes the current stream wait for its end.

    Parameters
    ----------
    team : Team
    plan : NetworkPlan

    Attributes
    ----------
    shared : dict of Parameter to SharedWeight
        Weights that are shared out, from the last layer to the first.
    updated : list of Parameter
        Weights of `shared` of which this rank has a share that is not only padding.
    overlaps : bool
        Whether exchanges run alongside the products of the backward pass. Large products fill the
        device. An exchange would occupy some multiprocessors, and delay them by more time than it
        takes.
    distances : tuple of int
        See `Ranks.distances`; empty if updates do not read other ranks' gradients.
    count : int
        Number of exchanges begun since it was last set to 0.
    """

    def __init__(self, team: Team, plan: NetworkPlan) -> None:
        import cupy

        self.ranks = team.ranks
        self.count, self.overlaps = 0, plan.keep_dense_copies
        weights = [plan.head.linear.weight, *(h.linear.weight for h in reversed(plan.hidden))]
        self.shared = {w: team.shared[w] for w in weights if w in team.shared}
        self.updated = [w for w, shared in self.shared.items() if shared.used]
        self._early = weights[0] not in self.shared and weights[-1] not in self.shared
        real = operand_dtype(plan.precision)
        self._lengths: dict[nn.Parameter, int] = {}  # of what is sent of hidden weights
        self._real = real
        for weight in weights[1:]:
            shared = self.shared.get(weight)
            self._lengths[weight] = (
                weight.size if shared is None else self.ranks.size * shared.length
            )
        self.distances: tuple[int, ...] = ()
        self._starts: dict[nn.Parameter, int] = {}
        words = 0
        for weight, shared in self.shared.items():
            self._starts[weight] = words
            words += shared.groups * weight.shape[1]
        words = -(-words // _WORDS) * _WORDS
        self._all_words = cupy.zeros((self.ranks.size, words), np.uint32)
        self._begun: dict[nn.Parameter, Pending] = {}
        self._small = self._signs = self._greatest = Pending(lambda: None)

    @property
    def early(self) -> bool:
        """Whether shares are updated while the first layer's weight gradient is computed."""
        return self.overlaps and self._early

    # Memory --------------------------------------------------------------------------------------

    def allocate(self, passes: int, count: int) -> tuple[Any, Any]:
        """Allocate what is sent.

        Parameters
        ----------
        passes, count : int
            Passes through the network, and float32 numbers that each computes.

        Returns
        -------
        cupy.ndarray, shape (passes, count)
            Memory for these numbers; those of the first pass are sent.
        cupy.ndarray, shape (count,)
            Memory for their sum over all ranks.
        """
        import cupy

        # Zeros, because padding stays 0.
        parts: list[tuple[int, Any]] = [(n, self._real) for n in self._lengths.values()]
        parts += [(self._all_words.shape[1], np.uint32), (passes * count, np.float32)]
        *gradients, self._words, small = self.ranks.shared_zeros(cupy, parts)
        self._gradients = dict(zip(self._lengths, gradients, strict=True))
        distances = self.ranks.distances(small)
        if distances is not None:
            read = [gradient.nbytes for w, gradient in self._gradients.items() if w in self.shared]
            self.overlaps &= max(read, default=0) < _READ_FROM
            self.distances = () if self.overlaps else distances
        self._sums = {
            weight: cupy.empty(
                self.shared[weight].length if weight in self.shared else length, self._real
            )
            for weight, length in self._lengths.items()
            if not self.reads(weight)
        }
        small = small.reshape(passes, count)
        self._mine, self._total = small[0], cupy.zeros(count, np.float32)
        return small, self._total

    def reads(self, weight: nn.Parameter) -> bool:
        """Whether the update of a weight's share reads the gradients of all ranks."""
        return bool(self.distances) and weight in self.shared and weight in self._lengths

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        """The weights of `updated` that are updated together."""
        together = [weight for weight in self.updated if self.reads(weight)]
        others = [[weight] for weight in self.updated if not self.reads(weight)]
        return [together, *others] if together else others

    def gradient(self, weight: nn.Parameter) -> Any:
        """Return memory for the gradient of a hidden weight on this rank."""
        return self._gradients[weight][: weight.size].reshape(weight.shape)

    def sum_of(self, weight: nn.Parameter) -> Any:
        """Return the sum of a hidden weight's gradients over the ranks: of all of it, or the share.

        If the update reads the gradients of all ranks: this rank's own gradient of the share.
        """
        if self.reads(weight):
            return self.rows_of(weight, self.gradient(weight))
        if weight in self.shared:
            return self.share_of(weight, self._sums[weight])
        return self._sums[weight].reshape(weight.shape)

    def share_of(self, weight: nn.Parameter, elements: Any) -> Any:
        """Return a share's elements, without padding, as rows of the weight."""
        return elements[: self.shared[weight].used].reshape(-1, weight.shape[1])

    def rows_of(self, weight: nn.Parameter, whole: Any) -> Any:
        """Return the rows of a whole array that are this rank's share."""
        shared = self.shared[weight]
        first = self.ranks.rank * shared.groups * ROWS
        return whole[first : first + shared.used // weight.shape[1]]

    def words_of(self, weight: nn.Parameter) -> Any:
        """Return memory for the signs of this rank's share, to be sent."""
        start, columns = self._starts[weight], weight.shape[1]
        groups = self.shared[weight].groups
        return self._words[start : start + groups * columns].reshape(groups, columns)

    # Exchanges -----------------------------------------------------------------------------------

    def _begin(
        self, exchange: Callable[..., Pending], array: Any, out: Any, **more: Any
    ) -> Pending:
        """Begin an exchange; in a dry run, only pretend to."""
        if is_dry_run():
            return Pending(lambda: out)
        self.count += 1
        return exchange(array, out=out, **more)

    def send_gradient(self, weight: nn.Parameter) -> None:
        """Begin to sum the gradients of a hidden weight, unless the update reads them."""
        if self.reads(weight):
            return
        mine, out = self._gradients[weight], self._sums[weight]
        shared = weight in self.shared
        exchange = self.ranks.reduce_scatter if shared else self.ranks.all_reduce
        rounded = mine.dtype == np.uint16
        self._begun[weight] = self._begin(exchange, mine, out, bfloat16=rounded)

    def send_greatest(self, bits: Any) -> None:
        """Begin to replace the greatest gradients of a layer's units by those over all ranks."""
        self._greatest = self._begin(self.ranks.all_max, bits, bits)

    def receive_greatest(self) -> None:
        """Wait for the greatest gradients."""
        self._greatest.wait()

    def send_small(self) -> None:
        """Begin to sum small gradients, loss and votes."""
        self._small = self._begin(self.ranks.all_reduce, self._mine, self._total)

    def receive(self, weight: nn.Parameter) -> None:
        """Wait for the sum of a weight's gradients, or until the update can read them."""
        self._begun.pop(weight, self._small).wait()

    def receive_rest(self) -> None:
        """Wait for all sums."""
        for weight in list(self._begun):
            self.receive(weight)
        self._small.wait()

    def send_signs(self) -> None:
        """Begin to send the signs of this rank's shares."""
        if self._words.size:
            self._signs = self._begin(self.ranks.all_gather, self._words, self._all_words)

    def receive_signs(self, hidden: Sequence[HiddenBuffers], launcher: Launcher) -> None:
        """Wait for the signs of all shares, and put them where the next products read them."""
        self._signs.wait()
        layers = {h.plan.linear.weight: h for h in hidden}
        places = []
        for weight in self.shared:
            layer = layers.get(weight)
            # The head reads a float32 array.
            packed, dense = None, weight._data
            if layer is not None:
                packed, dense = layer.packed_weight, layer.weight if layer.copied else None
            places.append(self._placing(weight, packed, dense))
        place_signs(launcher, self._all_words, places)

    def unpack(self, weight: nn.Parameter, launcher: Launcher) -> None:
        """Write the signs that all ranks sent last into the elements of a weight."""
        place_signs(launcher, self._all_words, [self._placing(weight, None, weight._data)])

    def _placing(self, weight: nn.Parameter, packed: Any, dense: Any) -> Placing:
        rows, columns = weight.shape
        return Placing(
            start=self._starts[weight],
            groups=self.shared[weight].groups,
            shape=(rows, columns),
            packed=packed,
            dense=dense,
        )

    def add_up(self, array: Any, out: Any) -> None:
        """Sum an array over all ranks; the current stream waits for the sum."""
        self._begin(self.ranks.all_reduce, array, out).wait()
