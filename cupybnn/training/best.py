"""A run's best checkpoint, also after the run was killed and restored.

The best checkpoint has the highest test accuracy among the evaluations in the history and the one
after the last step of a complete run; ties go to the earliest. The evaluation of a run that is
stopped early does not count, so a run that is stopped and restored ends with the same ``best.npz``
as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cupybnn.errors import CheckpointError
from cupybnn.training import checkpoint as checkpoints
from cupybnn.training.checkpoint import BEST, NEWEST, Checkpoint
from cupybnn.training.records import Evaluation

__all__ = ["Best", "best_before", "with_final"]

#: Entry of a checkpoint's `info`: the evaluation after the last step, which no history includes.
_FINAL = "final"


class Best(NamedTuple):
    """The best checkpoint of the earlier runs that a run continues.

    Attributes
    ----------
    accuracy : float
        Its test accuracy; -1 if nothing has been evaluated yet.
    checkpoint : Checkpoint or None
        None if nothing has been evaluated yet, or if it cannot be found.
    """

    accuracy: float
    checkpoint: Checkpoint | None

    def save(self, folder: Path, start: Checkpoint) -> None:
        """Write the first checkpoints of a run that continues from `start` into its folder."""
        checkpoints.save(folder / NEWEST, start)
        if self.checkpoint is not None:
            checkpoints.save(folder / BEST, self.checkpoint)


def with_final(checkpoint: Checkpoint, final: Evaluation) -> Checkpoint:
    """Return the last checkpoint of a complete run with its test accuracy added."""
    entry = {"step": final.step, "test_accuracy": final.test_accuracy}
    return Checkpoint(checkpoint.step, checkpoint.arrays, {**checkpoint.info, _FINAL: entry})


def best_before(start: Checkpoint, restored: str | None) -> Best:
    """Find the best checkpoint of the earlier runs that a run continues.

    Normally this is ``best.npz`` in the folder of the restored checkpoint. If the process was
    killed after it wrote its newest checkpoint and before it copied that to ``best.npz``, it is the
    restored checkpoint itself.

    Parameters
    ----------
    start : Checkpoint
        The state from which the run continues.
    restored : str or None
        The run folder or checkpoint file that `start` was read from.
    """
    evaluations = _accuracies(start.info)
    best = max(evaluations.values(), default=-1.0)
    if restored is None:
        return Best(best, None)
    own = evaluations.pop(start.step - 1, None)
    try:
        path = checkpoints.find(restored)
        if own is None and _continues(start.info, info := checkpoints.load_info(path)):
            own = _final_accuracy(info)  # only the file has it
        if own is not None and own > max(evaluations.values(), default=-1.0):
            return Best(own, start)
        found = checkpoints.load_run(path.with_name(BEST))
    except CheckpointError:
        return Best(best, None)
    accuracy = _accuracies(found.info).get(found.step - 1, _final_accuracy(found.info))
    if accuracy is None or accuracy < best or not _continues(start.info, found.info):
        return Best(best, None)
    return Best(accuracy, found)


def _accuracies(info: Mapping[str, Any]) -> dict[int, float]:
    """Return the test accuracies in the history of a checkpoint, by step."""
    return {e.get("step"): e.get("test_accuracy") for e in info.get("history", ())}


def _final_accuracy(info: Mapping[str, Any]) -> float | None:
    final = info.get(_FINAL)
    accuracy = final.get("test_accuracy") if isinstance(final, dict) else None
    return float(accuracy) if isinstance(accuracy, (int, float)) else None


def _continues(info: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    """Whether the history in `info` begins with the one in `earlier`."""
    before = list(_accuracies(earlier).items())
    return list(_accuracies(info).items())[: len(before)] == before
