"""Launching the update of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.cuda import sign_gemm
from cupybnn.backends.cuda.fused import Launcher
from cupybnn.backends.cuda.fused_arguments import address

__all__ = ["PENALTIES", "Rates", "Update", "Updated"]

# As adam.cuh names them.
PENALTIES = {"none": 0, "l1": 1, "bipolar": 2}
_BINARY, _CLIPPED, _WINDOW, _ALIGNED, _ROUNDED = 1, 2, 4, 8, 16
_TILE_ROWS, _TILE_COLS = 32, 128

_PARAMETER = np.dtype(
    [(n, np.int64) for n in ("weight", "grad", "mean", "square", "copy", "words", "pops", "left")]
    + [(n, np.int64) for n in ("rows", "cols", "count", "first_block", "flags")]
    + [(n, np.float64) for n in ("limit", "lr_scale", "penalty", "weight_decay")]
)
_MOST = 8  # parameters of a launch
_PARAMETERS = np.dtype((np.void, _MOST * _PARAMETER.itemsize + 8))
_ONE = np.dtype((np.void, _PARAMETER.itemsize))
#: struct Rates of adam.cuh: learning rate, its factor, Adam's eps, and padding.
Rates = np.dtype((np.float32, 4))


@dataclass
class Updated:
    """A parameter that `Update` moves.

    Attributes
    ----------
    weight, grad, mean, square : cupy.ndarray of float32, of one shape
        The parameter, its gradient, the optimiser's two means. The gradient may be in the operands'
        dtype; None: the product that computes it updates the parameter at once.
    left : cupy.ndarray of float32 or None
        Gets the gradient, with the penalty's part, where gradients are to be left.
    copy : cupy.ndarray or None
        What products read instead: the weight in their dtype, or its sign.
    packed : PackedMatrix or None
        The packed signs, along the first axis.
    binary : bool
        Whether signs are meant.
    gate : {"none", "window", "clip"}
        Pseudo-gradient of a latent weight.
    limit : float or None
        Magnitude that the weight is held to.
    lr_scale, penalty, weight_decay : float
    """

    weight: Any
    grad: Any
    mean: Any
    square: Any
    left: Any = None
    copy: Any = None
    packed: Any = None
    binary: bool = False
    gate: str = "none"
    limit: float | None = None
    lr_scale: float = 1.0
    penalty: float = 0.0
    weight_decay: float = 0.0

    def geometry(self) -> tuple[int, int]:
        """Return rows and columns as the kernel walks them."""
        if self.binary:  # packed or not, so that the penalty is added up in the same order
            rows, cols = self.weight.shape
            return rows, cols
        return -(-self.weight.size // _TILE_COLS), _TILE_COLS

    def blocks(self) -> int:
        """Blocks that take this parameter."""
        rows, cols = self.geometry()
        return -(-rows // _TILE_ROWS) * -(-cols // _TILE_COLS)


class _Group:
    """What is updated by one launch, and before it by a product that has the gradient, if any."""

    def __init__(self, parameters: Sequence[Updated], earlier: int) -> None:
        at_once = [p for p in parameters if p.grad is None]
        others = [p for p in parameters if p.grad is not None]
        self.at_once: Any = None
        self.earlier = self.earlier_others = earlier  # parts of the penalty from launches before
        if at_once:
            (only,) = at_once
            entry = np.zeros(1, _PARAMETER)
            _fill(entry[0], only, 0)
            self.at_once = entry.view(_ONE)
            self.earlier_others += sign_gemm.tiles(*only.weight.shape) * sign_gemm.WRITERS
        self.table: Any = None
        self.blocks = 0
        if others:
            self.table, self.blocks = _table(others)
        self.end = self.earlier_others + self.blocks


class Update:
    """The update of all parameters, in one or more launches of groups of them.

    Parameters
    ----------
    launcher : Launcher
    groups : sequence of sequences of Updated
        What is updated by one launch, in the order in which they are made. One of each, whose
        gradient is None, may be left to `launch_at_once`; in the last group, not all.
    betas : (float, float)
        Decay of the optimiser's means.
    penalty : str
        A key of `PENALTIES`.
    write_gradient : bool
        Whether gradients are left, with the penalty's part in them.
    """

    def __init__(
        self,
        launcher: Launcher,
        groups: Sequence[Sequence[Updated]],
        betas: tuple[float, float],
        penalty: str,
        write_gradient: bool,
    ) -> None:
        import cupy

        self._launcher = launcher
        self._gains = np.float32(1 - betas[0]), np.float32(1 - betas[1])
        self._defines = (
            ("PENALTY", PENALTIES[penalty]),
            ("WRITE_GRADIENT", int(write_gradient)),
        )
        self._groups: list[_Group] = []
        end = 0
        for parameters in groups:
            self._groups.append(_Group(parameters, end))
            end = self._groups[-1].end
        self._partials = cupy.empty(end, np.float32)
        self._ticket = cupy.zeros(1, np.uint32)

    def launch_at_once(self, group: int, signs: Any, matrix: Any, rates: Any, step: Any) -> None:
        """Compute the gradient of a group's weights and update them with it.

        Parameters
        ----------
        signs, matrix
            The factors; see `sign_gemm.weight_update`.
        group, rates, step
            As for `launch`, which must follow.
        """
        parts = self._groups[group]
        arguments = (
            parts.at_once, rates, np.int64(rates.shape[0]), step, *self._gains, self._partials,
            np.int64(parts.earlier),
        )  # fmt: skip
        sign_gemm.weight_update(signs, matrix, arguments, self._defines, self._launcher.device)

    def launch(self, group: int, rates: Any, step: Any, mean_loss: Any, loss: Any) -> None:
        """Update a group; the last one also computes the loss with penalty and counts the step.

        Parameters
        ----------
        group : int
            From 0; the launches of a step must end in the order of the groups.
        rates : cupy.ndarray of float32, shape (ring, 4)
            `Rates` of step s in row ``s % ring``.
        step : cupy.ndarray of int64, shape (1,)
            Raised by one, by the last group.
        mean_loss, loss : cupy.ndarray of float32, shape (1,)
            Without and with the penalty.
        """
        parts = self._groups[group]
        if parts.table is None:
            return
        self._launcher.launch(
            "smxx_adam",
            "adam",
            self._defines,
            (parts.blocks,),
            (
                parts.table, rates, np.int64(rates.shape[0]), step, *self._gains, mean_loss, loss,
                self._partials, np.int64(parts.earlier_others),
                np.int32(group == len(self._groups) - 1), self._ticket,
            ),
        )  # fmt: skip


def _table(parameters: Sequence[Updated]) -> tuple[Any, int]:
    """Return parameters as the kernel is given them, and the number of blocks of one launch."""
    assert 0 < len(parameters) <= _MOST
    table = np.zeros(_MOST, _PARAMETER)
    first = 0
    for entry, p in zip(table, parameters, strict=False):
        _fill(entry, p, first)
        first += p.blocks()
    whole = table.tobytes() + np.int64(len(parameters)).tobytes()
    return np.frombuffer(whole, _PARAMETERS), first


def _fill(entry: Any, p: Updated, first_block: int) -> None:
    """Fill a record of `_PARAMETER`."""
    arrays = (p.weight, p.grad, p.mean, p.square, p.copy, p.left)
    names = ("weight", "grad", "mean", "square", "copy", "left")
    for name, array in zip(names, arrays, strict=True):
        entry[name] = address(array)
    if p.packed is not None:
        entry["words"] = address(p.packed.words)
        entry["pops"] = address(p.packed.popcounts)
    rows, cols = p.geometry()
    entry["rows"], entry["cols"], entry["count"] = rows, cols, p.weight.size
    entry["first_block"] = first_block
    aligned = cols % 4 == 0 and not any(address(x) % 16 for x in arrays)
    rounded = p.grad is not None and p.grad.dtype != np.float32
    entry["flags"] = (
        _BINARY * p.binary
        + _CLIPPED * (p.gate == "clip")
        + _WINDOW * (p.gate == "window")
        + _ALIGNED * aligned
        + _ROUNDED * rounded
    )
    entry["limit"] = p.limit or 0.0
    entry["lr_scale"], entry["penalty"] = p.lr_scale, p.penalty
    entry["weight_decay"] = p.weight_decay
