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
    """A multilayer perceptron with binary weights and activations.

    Each hidden layer is a product, batch norm and a sign: its units are +1 or -1, and its weights,
    too, but for the first layer's. It is trained with the softmax cross-entropy by
    `cupybnn.Trainer`, on the CPU or a GPU. Names and meanings are those of
    `sklearn.neural_network.MLPClassifier`, wherever they fit.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int
        Units of each hidden layer, at least one.
    binarize : {"hidden", "all"}
        "hidden": the weights of all layers are binary, but for those of the first and the last one.
        "all": those as well. With few features, a unit of a first layer with binary weights can
        distinguish little.
    ste : str
        Pseudo-gradient of the sign: a name of `cupybnn.ops.quantizer_names`.
    xnor : bool
        Whether to compute products of signs on bits, by `cupybnn.xnor_gemm`. The results are the
        same.
    scaling : {"standard", "max"} or None
        Scaling of the input. "standard": each feature minus its mean, divided by its standard
        deviation, with weighted samples. "max": all features divided by one number, the largest
        magnitude in X; best for the pixels of images. None: no scaling.
    solver : {"adam", "sgd"}
        Optimizer.
    alpha : float
        Strength of the L2 penalty, ``alpha / 2`` times the sum of the squared weights, divided by
        the size of a batch. Binary weights have none, since the network does not depend on the
        magnitude of the latent weights behind them.
    batch_size : int or "auto"
        Samples in a batch. "auto": a fortieth of the samples, at least 32 and at most 200.
    learning_rate : {"cosine", "constant", "adaptive"}
        Schedule of the learning rate. "cosine": it falls to 0 over `max_iter` iterations.
        "adaptive": it is divided by 5 each time that the measure for stopping has not improved over
        `n_iter_no_change` iterations, until it is below 1e-6. In `partial_fit` it is constant.
    learning_rate_init : float
        Initial learning rate.
    momentum : float
        Momentum of "sgd", in [0, 1).
    max_iter : int or "auto"
        Greatest number of iterations, passes over the samples. "auto": as many as make 1500
        updates, at least 20 and at most 200.
    shuffle : bool
        Whether the samples are permuted in each iteration. The result then does not depend on their
        order in X.
    random_state : int, RandomState or None
        Determines initial weights, the order of samples, and the split for early stopping. The same
        integer gives the same network, bit for bit, on the same machine.
    tol : float
        Least improvement that counts, of the training loss or, with `early_stopping`, of the
        accuracy on the validation samples.
    verbose : bool
        Whether to print the loss of each iteration.
    warm_start : bool
        Whether `fit` continues from the weights of the last fit, with its scaling; and whether
        pickles hold what that needs.
    early_stopping : bool
        Whether to hold out some samples, evaluate on them after each iteration, stop when that has
        not improved over `n_iter_no_change` iterations, and use the best weights.
    validation_fraction : float
        Share of samples held out for `early_stopping`, in (0, 1).
    n_iter_no_change : int
        Number of iterations without improvement to accept. With the learning rate "cosine" it
        matters only with `early_stopping`: otherwise such a fit has `max_iter` iterations.
    device : str
        Where to train: "auto", "cpu", "cuda" or "cuda:1". "auto" is where X is, if that is on a
        GPU, otherwise a GPU if there is one. Predictions are made where their input is.
    dtype : {"float32", "float64", "tf32", "bfloat16"}
        Dtype of the training; see `cupybnn.TrainConfig`. Predictions do not depend on it.

    Attributes
    ----------
    classes_ : ndarray, shape (n_classes,)
    n_features_in_ : int
    feature_names_in_ : ndarray of str, shape (n_features,)
        Only if X had column names that are all strings.
    n_iter_ : int
        Iterations of the last fit.
    t_ : int
        Samples seen in training.
    loss_ : float
        Mean training loss of the last iteration.
    loss_curve_ : list of float
        The loss of each iteration.
    best_loss_ : float or None
        The least of them; None with `early_stopping`.
    validation_scores_ : list of float or None
        With `early_stopping`, the accuracy after each iteration.
    best_validation_score_ : float or None
        The best of them.
    coefs_ : list of ndarray, one for each layer, shape (n_inputs, n_units)
        Effective weights. ``X @ coefs_[0] + intercepts_[0]`` is at least 0 where a unit of the
        first hidden layer is +1, and so on through the layers; the last one gives the logits.
        Scaling and batch norm are part of them. Those of binary weights are +1 and -1; in the first
        layer, a multiple of that for each feature, and in the last one for each unit. They are
        computed anew at each access, in float64.
    intercepts_ : list of ndarray, one for each layer, shape (n_units,)
        The intercepts that belong to `coefs_`.
    n_layers_ : int
        Layers, with input and output.
    n_outputs_ : int
        Classes: also for two classes there is an output for each.
    out_activation_ : str
        "softmax".

    See Also
    --------
    cupybnn.Trainer : The training loop, with many more settings, for any model.
    cupybnn.PackedNetwork : What `to_packed` returns: a file, ONNX, a C header.

    Notes
    -----
    **Sample weights.** A sample of weight w occurs in each iteration as often as w copies would:
    floor(w) or ceil(w) times, w times on average. Fitting with integer weights is
    thus the same, bit for bit, as fitting with repeated samples (with ``shuffle=True``, and without
    `early_stopping`, which splits the samples). Weights that sum to less than the number of samples
    of positive weight, or to more than 16 times that number, are scaled to these limits.

    **Copies.** A pickle holds NumPy arrays: packed bits, thresholds, the first and last layer. What
    training needs to continue, latent weights and the optimizer's moments, is several times larger
    and part of it only with ``warm_start=True`` or after `partial_fit`. A pickle from a machine
    with a GPU loads on one without.

    **Arrays.** CuPy arrays and tensors on a GPU (PyTorch, JAX) are used where they are, and results
    are of the same kind. Other libraries' arrays on the CPU give NumPy arrays, or arrays of their
    kind with scikit-learn's ``array_api_dispatch``. On a GPU the fused kernels train networks with
    ``binarize="all"`` on X of uint8 with ``scaling="max"``; other fits run operation by operation.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.model_selection import train_test_split
    >>> from cupybnn import BinaryMLPClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
    >>> clf = BinaryMLPClassifier((64, 64), max_iter=15, random_state=0).fit(X_train, y_train)
    >>> clf.score(X_test, y_test) > 0.9
    True
    >>> clf.transform(X_test).shape
    (450, 64)
    >>> clf.to_packed()
    PackedNetwork(64-64-64-10, 19,984 bytes, on cpu)
    """

    def __init__(
        self,
        hidden_layer_sizes: Any = (512, 512),
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
        x = self._checked(X)  # an unfitted estimator has no predictor
        return self._predictor.logits(x)

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
        x = self._checked(X)
        return inputs.returned(self._predictor.hidden(x), X)

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

    def to_packed(
        self, *, pixel_max: float | None = None, image_shape: tuple[int, ...] | None = None
    ) -> PackedNetwork:
        """Return the network without scikit-learn: bits, thresholds, and the scaling within them.

        It takes unscaled inputs, whole numbers or floats, in float32. Where one of its hidden units
        is within rounding of its threshold, it can differ from the estimator, which scales in
        float64. The first layer keeps binary weights (``binarize="all"``) as bits if one factor
        scales all features (``scaling="max"`` or None), and has real ones otherwise.

        Parameters
        ----------
        pixel_max : float, optional
            The greatest pixel, 255 for most images, where X holds pixels and the network is to know
            that: for ``cupybnn predict`` on pictures, or ONNX that takes bytes. It then takes
            floats, but not whole numbers, divided by `pixel_max`. Otherwise ONNX takes the
            features as float32, and a C header as bytes, whole numbers from 0 to 255.
        image_shape : tuple of int, optional
            (height, width), where it is to take images.

        Returns
        -------
        PackedNetwork
            On the CPU. Its classes are integers or strings, to which other labels are converted.
        """
        check_is_fitted(self, "loss_")
        classes = self.classes_
        if classes.dtype.kind not in "iuU":
            classes = np.array([str(each) for each in classes])
        if image_shape is not None and np.prod(image_shape) != self.n_features_in_:
            raise ValueError(
                f"The 'image_shape' must have {self.n_features_in_} pixels, one for each feature; "
                f"got {image_shape}."
            )
        factor = 1.0 if pixel_max is None else float(pixel_max)
        return self._predictor.network(classes, factor, image_shape)

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
