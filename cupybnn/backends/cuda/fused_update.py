"""Launches of the parameter update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupybnn.backends.cuda import sign_gemm
from cupybnn.backends.cuda.compiler import Defines
from cupybnn.backends.cuda.fused import Launcher
from cupybnn.backends.cuda.fused_parameter import PARAMETER, ParameterUpdate
from cupybnn.backends.cuda.peers import MOST_RANKS, words_of
from cupybnn.backends.cuda.structs import Kernel, Struct

__all__ = ["PENALTIES", "ParameterUpdate", "Update"]

PENALTIES = {"none": 0, "l1": 1, "bipolar": 2}  # as in adam.cuh

_MOST = 8  # parameters per launch
PARAMETERS = Struct("Parameters", f"Parameter at[{_MOST}]; i64 count", PARAMETER)
DISTANCES = Struct("Distances", f"i64 of[{MOST_RANKS}]")
_ARGUMENTS = (
    "Parameters parameters; ptr rates; i64 ring; ptr step; float gain_mean, gain_square;"
    "ptr mean_loss, loss, partials; i64 earlier, counted; int final; ptr ticket"
)
ADAM = Kernel("smxx_adam", "adam", _ARGUMENTS, PARAMETERS)
ADAM_OF_RANKS = Kernel(
    "smxx_adam", "adam_of_ranks", f"{_ARGUMENTS}; Distances away", PARAMETERS, DISTANCES
)


class _Group:
    """Parameters updated together: first by the product that has the gradient, then by launches.

    Each block writes its part of the penalty, from index `earlier` on.
    """

    def __init__(self, parameters: Sequence[ParameterUpdate], earlier: int) -> None:
        self.fused: bytes | None = None
        self.gated = False  # whether the gradient that the product computes passes a gate
        self.earlier = self.end = earlier
        by_product = [p for p in parameters if p.grad is None]
        if by_product:
            assert len(by_product) == 1, "a group has at most one product that updates"
            self.fused = by_product[0].pack(0)
            self.gated = by_product[0].gate != "none"
            self.end += sign_gemm.tiles(*by_product[0].weight.shape) * sign_gemm.WRITERS
        #: Table, blocks, earlier parts, and how far other ranks' gradients are away.
        self.launches: list[tuple[bytes, int, int, tuple[int, ...]]] = []
        others = [p for p in parameters if p.grad is not None]
        for first in range(0, len(others), _MOST):
            self._add(others[first : first + _MOST])

    def _add(self, parameters: Sequence[ParameterUpdate]) -> None:
        table, blocks = b"", 0
        for p in parameters:
            table += p.pack(blocks)
            blocks += p.blocks()
        packed = PARAMETERS.pack(at=table, count=len(parameters))
        (distances,) = {p.distances for p in parameters}  # one for all
        self.launches.append((packed, blocks, self.end, distances))
        self.end += blocks


class Update:
    """The update of all parameters, one group at a time.

    Parameters
    ----------
    launcher : Launcher
    groups : sequence of sequences of ParameterUpdate
        In update order. One parameter per group may have no gradient: `launch_fused_update` then
        updates it. The last group must also have others. Parameters with `distances` have groups of
        their own; their gradients must be complete on all ranks before the launch.
    betas : (float, float)
        Decay of the optimizer's means.
    penalty : str
        A key of `PENALTIES`.
    keep_gradients : bool
        Whether each parameter's `kept_grad` receives its gradient, including the penalty.
    rates : cupy.ndarray of float32, shape (ring, 4)
        `RATES` of step s in row ``s % ring``.
    step : cupy.ndarray of int64, shape (1,)
        Incremented by the last group.
    mean_loss, loss : cupy.ndarray of float32, shape (1,)
        Loss without and with the penalty, which the last group adds.
    counted : int, optional
        Number of groups, from the first on, whose penalty is added; by default all.

    Notes
    -----
    Groups may be launched on different streams: each writes its own part of the scratch memory. The
    last one reads all of it, so it must run after all other groups of the step have finished.
    """

    def __init__(
        self, launcher: Launcher, groups: Sequence[Sequence[ParameterUpdate]], *,
        betas: tuple[float, float], penalty: str, keep_gradients: bool,
        rates: Any, step: Any, mean_loss: Any, loss: Any, counted: int | None = None,
    ) -> None:  # fmt: skip
        import cupy

        self._launcher = launcher
        self._defines: Defines = (
            ("PENALTY", PENALTIES[penalty]),
            ("WRITE_GRADIENT", int(keep_gradients)),
        )
        self._groups: list[_Group] = []
        end = 0
        for parameters in groups:
            self._groups.append(_Group(parameters, end))
            end = self._groups[-1].end
        assert self._groups[-1].launches, "the last group increments the step"
        ends = [0, *(group.end for group in self._groups)]
        self._counted = ends[len(groups) if counted is None else counted]
        self._losses = {"mean_loss": mean_loss, "loss": loss}
        self._common = {
            "rates": rates, "ring": rates.shape[0], "step": step, "gain_mean": 1 - betas[0],
            "gain_square": 1 - betas[1], "partials": cupy.empty(end, np.float32),
        }  # fmt: skip
        self._ticket = cupy.zeros(1, np.uint32)

    def launch_fused_update(self, group: int, *, signs: Any, matrix: Any) -> None:
        """Compute the gradient of a group's weights and apply it.

        Parameters
        ----------
        group : int
            Index of the group. `launch` must follow.
        signs, matrix
            The factors; see `sign_gemm.weight_update`.
        """
        update, defines = self.arguments_of(group)
        device = self._launcher.device
        sign_gemm.weight_update(signs, matrix, update, defines=defines, device=device)

    def arguments_of(self, group: int) -> tuple[dict[str, Any], Defines]:
        """Return what a product's kernel needs to update a group's weights, and its macros."""
        parts = self._groups[group]
        update = {"parameter": parts.fused, **self._common, "earlier": parts.earlier}
        return update, (*self._defines, ("GATED", int(parts.gated)))

    def launch(self, group: int) -> None:
        """Update a group; the last one also computes the loss and increments the step."""
        last = group == len(self._groups) - 1
        launches = self._groups[group].launches
        for number, (table, blocks, earlier, distances) in enumerate(launches, 1):
            arguments = {
                "parameters": table, **self._common, **self._losses, "earlier": earlier,
                "counted": self._counted, "final": last and number == len(launches),
                "ticket": self._ticket,
            }  # fmt: skip
            kernel, defines = ADAM, self._defines
            if distances:
                kernel, defines = ADAM_OF_RANKS, (*self._defines, ("RANKS", len(distances)))
                arguments["away"] = DISTANCES.pack(of=words_of(distances))
            self._launcher.launch(kernel, arguments, grid=(blocks,), defines=defines)
