"""A training run's settings, checked, in one frozen object that goes to and from JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cupybnn.errors import SettingError
from cupybnn.paths import user_path
from cupybnn.spelling import nearest
from cupybnn.training.checks import PathName, PathNames
from cupybnn.training.declaration import declared, with_attributes
from cupybnn.training.options import DTYPES, Options

__all__ = ["DTYPES", "TrainConfig"]


@with_attributes
@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """Settings of a run; the defaults are those of ``cupybnn train``.

    None stands for a default that depends on `binary`; the configuration holds the resulting
    value.

    Raises
    ------
    SettingError
        If a setting breaks its rule, or two contradict each other.

    Examples
    --------
    >>> import cupybnn
    >>> config = cupybnn.TrainConfig(dataset="digits", binary=True, n_hidden=64, max_steps=20)
    >>> config.n_hidden
    64
    """

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Units of each hidden layer."""
        widths = self.n_hidden
        return widths if isinstance(widths, tuple) else (widths,) * self.hidden_layers

    @property
    def storage_dtype(self) -> str:
        """The dtype of weights: float32 or float64."""
        return "float64" if self.dtype == "float64" else "float32"

    def __post_init__(self) -> None:
        for name, each in declared(type(self)).items():
            value = getattr(self, name)
            if value is None and each.by_binary is not None:
                value = each.by_binary[self.binary is True]
            object.__setattr__(self, name, each.rule.check(name, value))
        self._count_hidden_layers()
        if self.dataset == "digits" and self.data_dir is not None:
            raise SettingError(
                f"The 'data_dir' must be None with the dataset 'digits', which is bundled; got "
                f"{self.data_dir!r}. Omit one of the two."
            )
        if self.schedule == "exponential" and self.final_lr == 0:
            raise SettingError(
                "The 'final_lr' must be greater than 0 for the schedule 'exponential'; got 0.0."
            )
        if self.schedule == "step" and not self.milestones:
            raise SettingError(
                "The 'milestones', the steps at which the learning rate drops, must be given for "
                "the schedule 'step'; got none."
            )
        layers = self.first + self.last + self.hidden_layers - 1 if self.binary else 0
        if self.optimizer == "bop" and layers == 0:
            raise SettingError(
                f"The 'optimizer' 'bop' needs binary weights to flip; got a network without any "
                f"(binary={self.binary}, hidden_layers={self.hidden_layers})."
            )

    def _count_hidden_layers(self) -> None:
        """Set `hidden_layers` where `n_hidden` names the width of each of them."""
        if not isinstance(self.n_hidden, tuple):
            return
        layers = len(self.n_hidden)
        if self.hidden_layers not in (layers, declared(type(self))["hidden_layers"].default):
            raise SettingError(
                f"The 'hidden_layers' must be left out or agree where 'n_hidden' has one width for "
                f"each layer; got {self.hidden_layers} layers and {layers} widths."
            )
        object.__setattr__(self, "hidden_layers", layers)

    def with_absolute_paths(self) -> TrainConfig:
        """Return the same settings with paths that mean the same from any folder."""
        paths: dict[str, Any] = {}
        for name, each in declared(type(self)).items():
            value = getattr(self, name)
            if isinstance(each.rule, PathName) and value is not None:
                paths[name] = os.path.abspath(user_path(value))
            elif isinstance(each.rule, PathNames):
                paths[name] = tuple(os.path.abspath(user_path(path)) for path in value)
        return replace(self, **paths)

    def to_json(self) -> str:
        """Return the settings as a JSON object, one setting a line."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, source: str = "settings") -> TrainConfig:
        """Build a configuration from a mapping of names to values.

        Raises
        ------
        SettingError
            If a name is unknown (the message states it and `source`) or a value is invalid.
        """
        known = declared(cls)
        unknown = sorted(set(settings) - set(known))
        if unknown:
            synonyms = {name: each.synonyms for name, each in known.items()}
            near = nearest(unknown[0], synonyms)
            hint = f" Nearest to {unknown[0]}: {', '.join(near)}." if near else ""
            raise SettingError(
                f"The {source} must name settings of TrainConfig; got {', '.join(unknown)}. "
                f"Known: {', '.join(sorted(known))}.{hint}"
            )
        return cls(**settings)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read what `to_json` wrote.

        Raises
        ------
        SettingError
            If `text` is not a JSON object of known settings with valid values.
        """
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise SettingError(f"The configuration is not JSON: {error}.") from error
        if not isinstance(settings, dict):
            raise SettingError(
                f"The configuration must be a JSON object; got {type(settings).__name__}."
            )
        return cls.from_mapping(settings, source="configuration")
