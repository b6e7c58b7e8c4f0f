"""Binary weights of which each rank of a run updates a share."""

from __future__ import annotations

from typing import Any

from cupybnn import backends, nn
from cupybnn.autograd.storage import module_of
from cupybnn.backends.devices import device_of
from cupybnn.nn.module import Share
from cupybnn.ops import Quantizer
from cupybnn.parallel import Pending, Ranks
from cupybnn.parallel.ranks import padded

__all__ = ["ROWS", "SharedWeight", "can_be_shared"]

#: A share is a number of groups of this many rows of the weight, whose signs are a word for each
#: column.
ROWS = 32
#: It is packed as a matrix of 16 lines, the fewest that a GPU stores without padding.
_LINES = 16


def can_be_shared(layer: nn.Module) -> bool:
    """Whether a layer uses nothing but the signs of its weight, whatever the latent weights are.

    A quantizer with a scale, or with random signs, needs the latent weights in the forward pass.
    """
    if type(layer) is not nn.BinaryLinear:
        return False
    kind = type(layer.quantizer)
    return kind.forward is Quantizer.forward and kind.scale is Quantizer.scale


class SharedWeight:
    """A binary weight that is shared out: its place, and the exchanges that concern it.

    A rank's share has the same memory whenever the weight is shared out.

    Parameters
    ----------
    layer : BinaryLinear
    ranks : Ranks

    Attributes
    ----------
    parameter : Parameter
    quantizer : Quantizer
    groups : int
        Groups of `ROWS` rows in a share.
    length : int
        Number of its elements.
    used : int
        Number of those that are weights; the others are padding. Always whole rows.
    """

    def __init__(self, layer: nn.BinaryLinear, ranks: Ranks) -> None:
        self.parameter, self.quantizer = layer.weight, layer.quantizer
        self._ranks = ranks
        rows, columns = layer.weight.shape
        self.groups = -(-rows // (ROWS * ranks.size))
        self.length = self.groups * ROWS * columns
        self._start = ranks.rank * self.length
        self.used = min(max(layer.weight.size - self._start, 0), self.length)
        self._share: Share | None = None
        self._slots: tuple[Any, ...] | None = None

    def share_out(self) -> None:
        """Keep this rank's share of the weight alone."""
        weight = self.parameter._data
        with device_of(weight).scope():
            if self._share is None or self._share.weight.dtype != weight.dtype:
                self._share = Share(module_of(weight).zeros(self.length, weight.dtype))
            self._cut(weight, self._share.weight)
            self._share.grad = self._share.bring_up_to_date = None
        self.parameter.share = self._share

    def share_out_slots(self, slots: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return this rank's shares of the arrays that an optimizer keeps for the weight."""
        if self._slots is None or [s.dtype for s in self._slots] != [s.dtype for s in slots]:
            self._slots = tuple(module_of(s).zeros(self.length, s.dtype) for s in slots)
        for share, array in zip(self._slots, slots, strict=True):
            self._cut(array, share)
        return self._slots

    def gather(self) -> None:
        """Make the weight whole."""
        assert self.parameter.share is not None
        latent = self._whole(self.parameter.share.weight)
        self.parameter.share = None
        self.parameter.write()[...] = latent

    def gather_slots(self, slots: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the whole arrays of which `slots` are this rank's shares."""
        self._slots = slots
        return tuple(self._whole(array) for array in slots)

    def _cut(self, array: Any, share: Any) -> None:
        """Copy this rank's share of a whole array."""
        flat = array.reshape(-1)
        share[: self.used] = flat[self._start : self._start + self.used]

    def _whole(self, share: Any) -> Any:
        """Return the whole array, made of all ranks' shares."""
        parts = self._ranks.all_gather(share).wait().reshape(-1)
        return parts[: self.parameter.size].reshape(self.parameter.shape)

    def scatter(self, gradient: Any) -> Pending:
        """Begin to sum a gradient over the ranks; the result is this rank's share of it."""
        flat = padded(gradient, self._ranks.size * self.length)
        return self._ranks.reduce_scatter(flat)

    def send_signs(self) -> Pending:
        """Begin to send the signs of this rank's share to the others, one bit a weight."""
        assert self.parameter.share is not None
        latent = self.parameter.share.weight
        with device_of(latent).scope():
            words, _ = backends.get(latent).pack(latent.reshape(_LINES, -1), -1)
        return self._ranks.all_gather(words)

    def set_signs(self, words: Any) -> None:
        """Set the weight to the signs that all ranks sent."""
        weight = self.parameter.write()
        if words.ndim == 5:  # on a GPU, a matrix's words have an axis for a batch of matrices
            words = words.reshape(-1, *words.shape[2:])
        shape = (self._ranks.size, _LINES, self.length // _LINES)
        with device_of(weight).scope():
            signs = backends.get(weight).unpack(words, shape, -1, weight.dtype)
            weight[...] = signs.reshape(-1)[: weight.size].reshape(weight.shape)
        self.parameter.two_valued = True
