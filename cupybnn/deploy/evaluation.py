"""How good a packed network is: accuracy, loss, precision, recall, and what it confuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn.backends.devices import CPU, to_device
from cupybnn.text_table import table

if TYPE_CHECKING:
    from cupybnn.deploy.network import PackedNetwork

__all__ = ["ClassificationReport", "evaluate"]

_BATCH = 8192  # images that are evaluated at a time
_WIDEST = 20  # classes whose confusion matrix a terminal can show


@dataclass(frozen=True, eq=False, repr=False)
class ClassificationReport:
    """Predictions for labeled examples, and what they say of the network.

    Attributes
    ----------
    classes : ndarray, shape (classes,)
        Names or numbers of the classes.
    labels, predicted : ndarray of int64, shape (examples,)
        The true and the most probable class of each example, as positions in `classes`.
    confidence : ndarray of float64, shape (examples,)
        Probability of the predicted class.
    loss : float
        Mean cross-entropy, -log of the true class's probability.

    Examples
    --------
    >>> import cupybnn
    >>> from cupybnn import data
    >>> result = cupybnn.train(dataset="digits", binary=True, n_hidden=32, max_steps=5)
    >>> net = cupybnn.PackedNetwork.from_model(result.model)
    >>> digits = data.load("digits")
    >>> report = net.evaluate(digits.test_images, digits.test_labels)
    >>> report.confusion.shape
    (10, 10)
    """

    classes: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    loss: float

    @property
    def confusion(self) -> np.ndarray:
        """Number of examples by true class (row) and predicted class (column), int64."""
        count = len(self.classes)
        pairs = np.bincount(self.labels * count + self.predicted, minlength=count * count)
        return pairs.reshape(count, count)

    @property
    def accuracy(self) -> float:
        """Share of the examples whose predicted class is the true one."""
        return float((self.labels == self.predicted).mean())

    @property
    def counts(self) -> np.ndarray:
        """Number of examples of each class, int64."""
        return self.confusion.sum(axis=1)

    @property
    def precision(self) -> np.ndarray:
        """For each class, the share of its predictions that are right; NaN without predictions."""
        confusion = self.confusion
        with np.errstate(invalid="ignore"):
            return np.diag(confusion) / confusion.sum(axis=0)

    @property
    def recall(self) -> np.ndarray:
        """For each class, the share of its examples that are found; NaN without examples."""
        confusion = self.confusion
        with np.errstate(invalid="ignore"):
            return np.diag(confusion) / confusion.sum(axis=1)

    def mistakes(self, most: int | None = None) -> np.ndarray:
        """Return the positions of wrong predictions, the most confident first.

        Parameters
        ----------
        most : int, optional
            Return at most this many.
        """
        wrong = np.flatnonzero(self.labels != self.predicted)
        order = np.argsort(-self.confidence[wrong], kind="stable")
        return wrong[order][:most]

    def confusions(self) -> list[tuple[int, int, int]]:
        """Return (true, predicted, examples) of each pair that was confused, frequent ones first.

        Classes are positions in `classes`.
        """
        wrong = self.confusion
        np.fill_diagonal(wrong, 0)
        pairs = [(int(t), int(p), int(wrong[t, p])) for t, p in np.argwhere(wrong)]
        return sorted(pairs, key=lambda pair: -pair[2])

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as a dictionary that JSON can hold; what is undefined is None."""
        wrong = self.mistakes()
        return {
            "examples": len(self.labels),
            "wrong": len(wrong),
            "accuracy": self.accuracy,
            "loss": _defined(self.loss),
            "classes": [
                {
                    "class": name,
                    "precision": _defined(precision),
                    "recall": _defined(recall),
                    "examples": count,
                }
                for name, precision, recall, count in zip(
                    self.classes.tolist(),
                    self.precision.tolist(),
                    self.recall.tolist(),
                    self.counts.tolist(),
                    strict=True,
                )
            ],
            "confusion": self.confusion.tolist(),
            "mistakes": [
                {
                    "example": int(i),
                    "true": self.classes[self.labels[i]].item(),
                    "predicted": self.classes[self.predicted[i]].item(),
                    "probability": _defined(self.confidence[i]),
                }
                for i in wrong
            ],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        wrong, count = len(self.mistakes()), len(self.labels)
        yield f"accuracy {self.accuracy:.4f} ({wrong:,} of {count:,} wrong), loss {self.loss:.4f}"
        yield ""
        names = [str(name) for name in self.classes]
        rows = [
            [name, _share(precision), _share(recall), f"{examples:,}"]
            for name, precision, recall, examples in zip(
                names, self.precision, self.recall, self.counts, strict=True
            )
        ]
        yield from table(["class", "precision", "recall", "examples"], rows)
        yield ""
        if len(names) <= _WIDEST:
            yield "Confusion matrix: rows are true classes, columns predicted ones"
            cells = [[str(n) if n else "." for n in row] for row in self.confusion]
            rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
            yield from table(["", *names], rows)
            return
        yield "Most frequent confusions"
        rows = [[names[t], names[p], f"{n:,}"] for t, p, n in self.confusions()[:10]]
        yield from table(["true", "predicted", "examples"], rows, left=2)


def _defined(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def evaluate(network: PackedNetwork, images: Any, labels: Any) -> ClassificationReport:
    """Compare a network's predictions with the true classes; see `PackedNetwork.evaluate`."""
    expected = _positions(network.classes, np.asarray(to_device(labels, CPU)))
    images = np.asarray(images) if isinstance(images, (list, tuple)) else images
    if len(images) != len(expected) or len(expected) == 0:
        raise ValueError(
            f"The 'images' and 'labels' of evaluate must be equally many, at least one; got "
            f"{len(images)} and {len(expected)}."
        )
    predicted, confidence, losses = [], [], []
    for start in range(0, len(expected), _BATCH):
        batch = to_device(images[start : start + _BATCH], network.device)
        logits = np.asarray(to_device(network(batch), CPU), np.float64)
        rows = np.arange(len(logits))
        best = logits.argmax(axis=1)
        with np.errstate(all="ignore"):  # a network may have learned NaN
            shifted = logits - logits[rows, best][:, None]
            totals = np.exp(shifted).sum(axis=1)
            losses.append(np.log(totals) - shifted[rows, expected[start : start + _BATCH]])
        predicted.append(best)
        confidence.append(1 / totals)
    return ClassificationReport(
        network.classes,
        expected,
        np.concatenate(predicted),
        np.concatenate(confidence),
        float(np.concatenate(losses).mean()),
    )


def _positions(classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return where in `classes` each label is."""
    order = np.argsort(classes, kind="stable")
    kind, dtypes = ("numbers", "iu") if classes.dtype.kind in "iu" else ("names", "U")
    if labels.ndim != 1 or labels.dtype.kind not in dtypes:
        raise ValueError(
            f"The 'labels' of evaluate must be the classes' {kind}, of shape (examples,); got "
            f"{labels.dtype} of shape {labels.shape}."
        )
    places = np.searchsorted(classes, labels, sorter=order).clip(max=len(classes) - 1)
    found = order[places]
    unknown = np.flatnonzero(classes[found] != labels)
    if len(unknown):
        raise ValueError(
            f"The 'labels' of evaluate must be among the network's classes, {classes[0]} to "
            f"{classes[-1]}; got {labels[unknown[0]]} for example {unknown[0]}."
        )
    return found
