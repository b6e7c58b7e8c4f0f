"""The output of ``cupybnn train``: lines on standard output, and a progress bar on a terminal."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from cupybnn.training.advice import advice
from cupybnn.training.evaluation import right_by_class
from cupybnn.training.images import augmentation
from cupybnn.training.records import Callback, Evaluation, TrainResult

if TYPE_CHECKING:
    from cupybnn.training.protocol import TrainingRun
    from cupybnn.training.step import StepOutput

__all__ = ["Console", "Progress"]

_WIDTH = 100  # of long lines
_CLASSES = 20  # that are listed at most
_JOINT = "\0"


class Progress:
    """A progress bar on standard error, if that is a terminal, and lines printed above it.

    Parameters
    ----------
    steps : int
    done : int
        Steps that are done already.
    what : str, optional
        In front of the bar.
    """

    def __init__(self, steps: int, done: int = 0, what: str | None = None) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, desc=what, unit="step", file=sys.stderr)

    def write(self, line: str, file: TextIO) -> None:
        """Print a line."""
        if self._bar is None:
            print(line, file=file, flush=True)
        else:
            self._bar.write(line, file=file)
            file.flush()

    def update(self) -> None:
        """Count a step."""
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Console(Callback):
    """Prints the progress of a run.

    Parameters
    ----------
    chosen : str
        A line about automatically chosen settings, printed below the network's line.
    """

    def __init__(self, chosen: str = "") -> None:
        self._chosen = chosen
        self._progress: Progress | None = None
        self._finite = True

    def _say(self, line: str, file: TextIO | None = None) -> None:
        file = sys.stdout if file is None else file
        if self._progress is None:
            print(line, file=file, flush=True)
        else:
            self._progress.write(line, file)

    def on_notice(self, trainer: TrainingRun, sentence: str) -> None:
        """Print the notice on standard error, apart from the figures."""
        self._say(sentence, sys.stderr)

    def on_start(self, trainer: TrainingRun) -> None:
        """Print the data, the network and where the run is logged."""
        config, data = trainer.config, trainer.dataset
        if data.fallback_reason is not None:
            self._say(
                f"WARNING: training on THE BUNDLED 8x8 DIGITS, NOT MNIST, because MNIST is not "
                f"available. {data.fallback_reason}"
            )
        kind = "validation" if data.test_is_validation else "test"
        self._say(
            f"Data: {data.name}, {len(data.train_labels):,} training and "
            f"{len(data.test_labels):,} {kind} images; device: {trainer.device}"
            + (f", {trainer.ranks.size} ranks" if trainer.ranks.size > 1 else "")
        )
        hidden = "-".join(map(str, config.hidden_sizes))
        details = ["full precision"]
        if config.binary:
            which = {(0, 0): "hidden layers", (1, 0): "first and hidden layers"}
            which |= {(0, 1): "hidden and last layers", (1, 1): "all layers"}
            details = [
                f"1-bit weights and activations ({which[config.first, config.last]})",
                "xnor_gemm" if config.xnor else "dense products of the signs",
            ]
        details += ["batch norm"] * config.batch_norm
        details += [f"dropout (keep {config.keep_prob})"] * (config.keep_prob < 1)
        if config.binary and config.sign_keep_prob < 1:
            details.append(f"sign dropout (keep {config.sign_keep_prob})")
        if config.adversarial:
            details.append(f"adversarial images ({config.adversarial:g})")
        if config.vat:
            details.append(f"virtual adversarial images ({config.vat:g})")
        if config.neighbor_noise:
            noise, count = config.neighbor_noise, config.neighbors
            details.append(f"images moved among {count} neighbors ({noise:g})")
        amounts = augmentation(config)
        deformed = [name for name, amount in asdict(amounts).items() if amount]
        details += [f"deformed images ({', '.join(deformed)})"] * bool(deformed)
        details += ["images mixed in pairs"] * (config.mix != "none")
        self._say(f"Network: {data.features}-{hidden}-{data.classes}, {', '.join(details)}")
        if config.teacher:
            self._say(f"Learning from {', '.join(config.teacher)}")
        if self._chosen:
            self._say(self._chosen)
        for sentence in advice(trainer):
            self.on_notice(trainer, sentence)
        if config.average != "none":
            how = {"ema": f"exponential, decay {config.average_decay}", "swa": "equal weighting"}
            since = f"from step {config.average_from} on"
            self._say(f"Evaluating averaged weights ({how[config.average]}), {since}")
        if trainer.run_folder is not None:
            self._say(f"Logging to {trainer.run_folder}")
            note = "" if data.test_is_validation else " (by held-out images: --validation N)"
            self._say(f"best.npz is chosen by {kind} accuracy{note}")
        if config.restore is not None:
            self._say(f"Continuing from step {trainer.step} of {config.restore}")
        self._progress = Progress(config.max_steps, trainer.step)

    def on_step(self, trainer: TrainingRun, step: int, output: StepOutput) -> None:
        """Advance the progress bar."""
        if self._progress is not None:
            self._progress.update()

    def on_evaluate(self, trainer: TrainingRun, evaluation: Evaluation) -> None:
        """Print loss, accuracy and speed."""
        kind = "validation" if trainer.dataset.test_is_validation else "test"
        self._say(
            f"step {evaluation.step}, loss = {evaluation.train_loss:.4f}, {kind} accuracy "
            f"{evaluation.test_accuracy:.4f} ({evaluation.examples_per_second:.1f} ex/s)"
        )
        self._check_finite(trainer, evaluation.train_loss)

    def _check_finite(self, trainer: TrainingRun, loss: float) -> None:
        """Print a notice once, at the first loss that is not finite."""
        if self._finite and not math.isfinite(loss):
            self._finite = False
            self.on_notice(
                trainer,
                "The loss is no longer finite. A smaller --lr often helps; --debug stops at the "
                "first NaN or infinity.",
            )

    def on_end(self, trainer: TrainingRun, result: TrainResult) -> None:
        """Print the final figures, or those of a stopped run."""
        self.close()
        # The test loss, because a run without any steps has no training loss.
        self._check_finite(trainer, result.final.test_loss)
        data = trainer.dataset
        kind = "validation" if data.test_is_validation else "test"
        note = ""
        if result.fallback_reason is not None:
            note = " (on the bundled 8x8 digits, NOT ON MNIST)"
        if result.stopped:
            self._say(f"Stopped before step {result.steps} of {result.config.max_steps}")
            self._say(f"{kind.capitalize()} accuracy so far {result.final_accuracy:.4f}{note}")
        else:
            self._say(f"Final {kind} accuracy {result.final_accuracy:.4f}{note}")
        if data.class_names is not None:
            self._say(_by_class(data.class_names, *right_by_class(result.model, trainer.data)))
        for word, rate in (
            ("Avg", result.average_examples_per_second),
            ("Med", result.median_examples_per_second),
        ):
            if math.isfinite(rate):  # NaN without any steps
                self._say(f"{word} ex/s = {rate:.1f}")
        if result.stopped and result.run_folder is not None:
            self._say(f"Continue with: cupybnn train --restore {result.run_folder}")

    def close(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.close()


def _by_class(names: Sequence[str], right: np.ndarray, count: np.ndarray) -> str:
    """Return the accuracy of each class that has images, the lowest first."""
    shares = sorted((right[i] / count[i], name) for i, name in enumerate(names) if count[i])
    listed = [f"{name} {share:.3f}" for share, name in shares[:_CLASSES]]
    if len(shares) > _CLASSES:
        listed.append(f"{len(shares) - _CLASSES} more")
    # A name and its figure stay on one line.
    text = f"By class: {', '.join(each.replace(' ', _JOINT) for each in listed)}"
    lines = textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return lines.replace(_JOINT, " ")
