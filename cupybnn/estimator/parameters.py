"""The parameters of an estimator, checked, and what follows from them and from the data."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

from cupybnn.training.checks import Choice, Number, Rule, Switch, Whole, Widths
from cupybnn.training.config import TrainConfig
from cupybnn.training.declaration import declared

__all__ = ["Parameters"]

#: Updates that ``max_iter="auto"`` aims at, and the limits on its number of iterations.
_UPDATES, _FEWEST, _MOST = 1500, 20, 200

_positive = partial(Number, "greater than 0", lambda x: x > 0)
_from_0 = partial(Number, "at least 0", lambda x: x >= 0)
_between = partial(Number, "in (0, 1)", lambda x: 0 < x < 1)


@dataclass(frozen=True)
class Or(Rule):
    """One more value than another rule allows: "auto" or None."""

    value: str | None
    rule: Rule

    @property
    def must(self) -> str:  # type: ignore[override]
        return f"{self.value!r} or {self.rule.must}"

    def convert(self, value: Any) -> Any:
        # By type first: an array compared with a string is an array.
        same = type(value) is type(self.value) and value == self.value
        return value if same else self.rule.convert(value)


class Flag(Switch):
    """True or False, or a number in place of them, as scikit-learn allows for `verbose`."""

    def convert(self, value: Any) -> bool:
        return super().convert(bool(value) if isinstance(value, int) else value)


_declared = declared(TrainConfig)

RULES: dict[str, Rule] = {
    "hidden_layer_sizes": Widths(),
    "binarize": Choice.of("hidden", "all"),
    "ste": _declared["ste"].rule,
    "xnor": _declared["xnor"].rule,
    "scaling": Or(None, Choice.of("standard", "max")),
    "solver": Choice.of("adam", "sgd"),
    "alpha": _from_0("ALPHA"),
    "batch_size": Or("auto", Whole(1)),
    "learning_rate": Choice.of("cosine", "constant", "adaptive"),
    "learning_rate_init": _positive("LR"),
    "momentum": Number("in [0, 1)", lambda x: 0 <= x < 1, "M"),
    "max_iter": Or("auto", Whole(1)),
    "shuffle": _declared["shuffle"].rule,
    "tol": _from_0("TOL"),
    "verbose": Flag(),
    "warm_start": Switch(),
    "early_stopping": Switch(),
    "validation_fraction": _between("F"),
    "n_iter_no_change": Whole(1),
    "device": _declared["device"].rule,
    "dtype": _declared["dtype"].rule,
}


@dataclass(frozen=True)
class Parameters:
    """Checked parameters; see `BinaryMLPClassifier` for each."""

    hidden_layer_sizes: tuple[int, ...]
    binarize: str
    ste: str
    xnor: bool
    scaling: str | None
    solver: str
    alpha: float
    batch_size: int | str
    learning_rate: str
    learning_rate_init: float
    momentum: float
    max_iter: int | str
    shuffle: bool
    tol: float
    verbose: bool
    warm_start: bool
    early_stopping: bool
    validation_fraction: float
    n_iter_no_change: int
    device: str
    dtype: str

    @classmethod
    def of(cls, estimator: Any) -> Parameters:
        """Check an estimator's parameters; SettingError (a ValueError) names a wrong one."""
        values = {name: rule.check(name, getattr(estimator, name)) for name, rule in RULES.items()}
        sizes = values["hidden_layer_sizes"]
        values["hidden_layer_sizes"] = sizes if isinstance(sizes, tuple) else (sizes,)
        return cls(**values)

    def network(self, seed: int, dtype: str | None = None) -> TrainConfig:
        """Return the settings of the network, for `build_model`."""
        everything = self.binarize == "all"
        return TrainConfig(
            binary=True,
            first=everything,
            last=everything,
            xnor=self.xnor,
            ste=self.ste,
            seed=seed,
            dtype=self.dtype if dtype is None else dtype,
        )

    def _batch(self, examples: int) -> int:
        """Return the size of a batch, for an epoch of `examples`."""
        if isinstance(self.batch_size, str):
            return min(examples, 200, max(32, examples // 40))
        return min(self.batch_size, examples)

    def iterations(self, examples: int) -> int:
        """Return the greatest number of passes over an epoch of `examples`."""
        if isinstance(self.max_iter, str):
            wanted = math.ceil(_UPDATES * self._batch(examples) / examples)
            return min(max(_FEWEST, wanted), _MOST)
        return self.max_iter

    def training(
        self, seed: int, examples: int, iterations: int, device: str, cosine: bool
    ) -> TrainConfig:
        """Return the settings of the training, for `Trainer`."""
        batch = self._batch(examples)
        if isinstance(self.batch_size, int) and self.batch_size > examples:
            warnings.warn(
                f"The 'batch_size' is greater than the number of samples, {examples}; got "
                f"{self.batch_size}. It is clipped to that.",
                stacklevel=5,
            )
        if batch == 1 < examples:
            warnings.warn(
                "A 'batch_size' of 1 leaves batch norm a single sample, which it turns into "
                "zeros, so the network hardly learns. Choose a larger one.",
                stacklevel=5,
            )
        sgd: dict[str, Any] = {"momentum": self.momentum} if self.solver == "sgd" else {}
        return TrainConfig(
            batch_size=batch,
            seed=seed,
            shuffle=self.shuffle,
            max_steps=math.ceil(iterations * examples / batch),
            reg=self.alpha / batch,
            penalty="l2",
            optimizer=self.solver,
            lr=self.learning_rate_init,
            schedule="cosine" if cosine else "constant",
            eval_every_n=0,
            device=device,
            dtype=self.dtype,
            **sgd,
        )
