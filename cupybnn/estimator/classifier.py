"""`BinaryMLPClassifier`: a binarized network as a scikit-learn classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.metrics import accuracy_score
from sklearn.utils.validation import check_is_fitted

from cupybnn.backends.devices import array_module, device_of, is_cupy
from cupybnn.deploy import PackedNetwork
from cupybnn.estimator import inputs
from cupybnn.estimator.fitting import Fitting
from cupybnn.estimator.network import Predictor
from cupybnn.estimator.scaling import Scaling

__all__ = ["BinaryMLPClassifier"]


class BinaryMLPClassifier(
    Fitting, ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClassifierMixin, BaseEstimator
):
    """A binarized multilayer perceptron as a scikit-learn classifier."""

    def __init__(
        self,
        hidden_layer_sizes: Any = (512,),
        *,
        binarize: str = "hidden",
        ste: str = "hard_tanh",
        xnor: bool = True,
        scaling: str = "standard",
        solver: str = "adam",
        alpha: float = 0.0,
        batch_size: int | str = "auto",
        learning_rate: str = "cosine",
        learning_rate_init: float = 0.003,
        momentum: float = 0.9,
        max_iter: int | str = "auto",
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.binarize = binarize
        self.ste = ste
        self.xnor = xnor
        self.scaling = scaling
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.momentum = momentum
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.device = device
        self.dtype = dtype

    # Predicting --------------------------------------------------------------------------------

    def _checked(self, X: Any) -> Any:
        check_is_fitted(self, "loss_")
        X = inputs.native(X, "'X'")
        if is_cupy(X):
            return inputs.check_device_array(self, X, reset=False)
        return inputs.checked(self, X, dtype=inputs.DTYPES, reset=False)

    def _logits(self, X: Any) -> Any:
        return self._predictor.logits(self._checked(X))

    def decision_function(self, X: Any) -> Any:
        """Return the logits.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)

        Returns
        -------
        array of float32, shape (n_samples, n_classes), or (n_samples,) for two classes
            For two classes, the logit of ``classes_[1]`` minus that of the other.
        """
        logits = self._logits(X)
        if len(self.classes_) == 2:
            logits = logits[:, 1] - logits[:, 0]
        return inputs.returned(logits, X)

    def predict(self, X: Any) -> Any:
        """Return the most probable class of each sample, an element of `classes_`.

        For inputs on a GPU that is an array of their kind, if the classes are numbers.
        """
        best = self._logits(X).argmax(axis=1)
        if self.classes_.dtype.kind not in "iufb":
            return self.classes_[best.get() if is_cupy(best) else best]
        with device_of(best).scope():
            classes = array_module(best).asarray(self.classes_)
            return inputs.returned(classes[best], X)

    def _softmax(self, X: Any, log: bool) -> Any:
        logits = self._logits(X)
        xp = array_module(logits)
        with device_of(logits).scope():
            logits = logits - logits.max(axis=1, keepdims=True)
            total = xp.exp(logits).sum(axis=1, keepdims=True)
            result = logits - xp.log(total) if log else xp.exp(logits) / total
        return inputs.returned(result, X)

    def predict_proba(self, X: Any) -> Any:
        """Return the probabilities of `classes_`, float32 of shape (n_samples, n_classes)."""
        return self._softmax(X, log=False)

    def predict_log_proba(self, X: Any) -> Any:
        """Return the logarithms of the probabilities, float32 of shape (n_samples, n_classes)."""
        return self._softmax(X, log=True)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy on given samples and labels."""
        found = inputs.on_host(self.predict(X), "'X'")
        right = inputs.on_host(y, "'y'")
        weights = inputs.on_host(sample_weight, "'sample_weight'")
        return float(accuracy_score(right, found, sample_weight=weights))

    def transform(self, X: Any) -> Any:
        """Return the units of the last hidden layer.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)

        Returns
        -------
        array of uint8, shape (n_samples, n_units)
            1 for +1 and 0 for -1.
        """
        return inputs.returned(self._predictor.hidden(self._checked(X)), X)

    @property
    def _n_features_out(self) -> int:
        """Number of outputs of `transform`, for ``get_feature_names_out``."""
        return self._predictor.layers[-1].inputs

    # What was learned --------------------------------------------------------------------------

    @property
    def coefs_(self) -> list[np.ndarray]:
        return self._coefficients("coefs_")[0]

    @property
    def intercepts_(self) -> list[np.ndarray]:
        return self._coefficients("intercepts_")[1]

    def _coefficients(self, name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        if not hasattr(self, "_predictor"):
            raise AttributeError(f"{type(self).__name__} has no {name!r} before it is fitted.")
        return self._predictor.coefficients()

    def to_packed(self) -> PackedNetwork:
        """Return the network without scikit-learn: bits, thresholds, and the scaling within them.

        It takes unscaled inputs, whole numbers or floats, in float32. Where one of its hidden units
        is within rounding of its threshold, it can differ from the estimator, which scales in
        float64. The first layer keeps binary weights (``binarize="all"``) as bits if one factor
        scales all features (``scaling="max"`` or None), and has real ones otherwise.

        Returns
        -------
        PackedNetwork
            On the CPU. Its classes are integers or strings, to which other labels are converted.
        """
        check_is_fitted(self, "loss_")
        classes = self.classes_
        if classes.dtype.kind not in "iuU":
            classes = np.array([str(each) for each in classes])
        return self._predictor.network(classes)

    # Copies and tags ---------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_predictor", None)  # made anew of `_network`
        if not (self.warm_start or getattr(self, "_continued", False)):
            state.pop("_training", None)  # latent weights and moments: several times the rest
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if hasattr(self, "_network"):
            self._predictor = Predictor(self._network, Scaling(self._scaling))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags

    def _more_tags(self) -> dict[str, Any]:  # before scikit-learn 1.6
        return {"preserves_dtype": []}
