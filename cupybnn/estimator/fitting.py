"""How `BinaryMLPClassifier` trains: from checked examples to what predicts."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_consistent_length

from cupybnn import nn
from cupybnn.backends.devices import CPU, array_module, device_of, is_cupy
from cupybnn.data import BatchOrder, Dataset
from cupybnn.data.batches import epoch_length
from cupybnn.estimator import inputs
from cupybnn.estimator.examples import distinct
from cupybnn.estimator.network import Predictor, build_model, packed_arrays
from cupybnn.estimator.parameters import Parameters
from cupybnn.estimator.scaling import Scaling
from cupybnn.training.records import Callback
from cupybnn.training.stopping import EarlyStopping
from cupybnn.training.trainer import Trainer

if TYPE_CHECKING:
    from cupybnn.training.protocol import TrainingRun
    from cupybnn.training.step import StepOutput

__all__ = ["FITTED", "Fitting"]

#: Private attributes that a fit sets.
FITTED = ("_continued", "_fits", "_network", "_predictor", "_scaling", "_seed", "_training")


class Fitting:
    """The methods `fit` and `partial_fit`."""

    # Parameters of the estimator, and what scikit-learn's `validate_data` sets.
    random_state: Any
    n_features_in_: int

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train the network.

        Parameters
        ----------
        X : array_like or dataframe of numbers, shape (n_samples, n_features)
            Also a CuPy array, or a tensor of PyTorch or another library. On a GPU it stays there.
        y : array_like, shape (n_samples,)
            Class labels: integers, strings or other objects.
        sample_weight : array_like, shape (n_samples,), optional
            Weights, at least 0. A sample of weight 2 counts as two equal samples.

        Returns
        -------
        BinaryMLPClassifier
            The estimator itself.
        """
        parameters = Parameters.of(self)
        warm = parameters.warm_start and hasattr(self, "_training")
        X, y, weights = self._examples(X, y, sample_weight, reset=not warm)
        classes, labels = np.unique(y, return_inverse=True)
        if not warm:
            self._begin(parameters, classes)
        elif not np.array_equal(classes, self.classes_):
            raise ValueError(
                f"With warm_start=True, 'y' must have the classes of the first fit, "
                f"{self.classes_}; got {classes}."
            )
        with device_of(X).scope():
            self._train(parameters, X, labels.reshape(-1), weights, incremental=False)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Any:
        """Train for one pass over these samples, with the optimizer as the last call left it.

        The statistics of the scaling grow with each call. The learning rate is constant.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`.
        classes : array_like, shape (n_classes,)
            All classes that can occur. Needed in the first call only.

        Returns
        -------
        BinaryMLPClassifier
            The estimator itself.

        Raises
        ------
        RuntimeError
            If `fit` trained the estimator, with ``warm_start=False``, and it was pickled or copied
            after that: what training needs to continue is then gone.
        """
        parameters = Parameters.of(self)
        if parameters.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True.")
        first = not hasattr(self, "loss_")
        if not first and not hasattr(self, "_training"):
            raise RuntimeError(
                f"A {type(self).__name__} that 'fit' trained can be pickled or copied with what "
                f"training needs to continue only with warm_start=True; got warm_start="
                f"{parameters.warm_start}. Set it before 'fit', or train with partial_fit alone."
            )
        if first and classes is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        X, y, weights = self._examples(X, y, sample_weight, reset=first)
        if classes is not None:
            classes = np.unique(inputs.on_host(classes, "'classes'"))
            if not first and not np.array_equal(classes, self.classes_):
                raise ValueError(
                    f"`classes={classes}` is not the same as on last call to partial_fit, was: "
                    f"{self.classes_}"
                )
        if first:
            self._begin(parameters, classes)
        labels = np.searchsorted(self.classes_, y).clip(max=len(self.classes_) - 1)
        unknown = self.classes_[labels] != y
        if unknown.any():
            raise ValueError(
                f"The 'y' of partial_fit must hold classes of the first call, {self.classes_}; got "
                f"{y[unknown].tolist()[0]!r}."
            )
        with device_of(X).scope():
            self._train(parameters, X, labels, weights, incremental=True)
        return self

    def _examples(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Any, Any, Any]:
        """Return checked inputs, labels on the host, and weights."""
        X = inputs.native(X, "'X'")
        if y is not None:
            y = inputs.on_host(y, "'y'")
        if is_cupy(X):
            X = inputs.check_device_array(self, X, reset)
            y = column_or_1d(y, warn=True)
            assert_all_finite(y, input_name="y")
            check_consistent_length(X, y)
        else:
            X, y = inputs.checked(self, X, y, dtype=inputs.DTYPES, reset=reset)
        check_classification_targets(y)
        return X, y, inputs.weights_of(sample_weight, len(y))

    def _begin(self, parameters: Parameters, classes: np.ndarray) -> None:
        """Forget an earlier fit, and set what a new one starts from."""
        kept = ("n_features_in_", "feature_names_in_")
        for name in [n for n in vars(self) if n.endswith("_") or n in FITTED]:
            if name not in kept:
                delattr(self, name)
        random = check_random_state(self.random_state)
        self._seed = int(random.randint(np.iinfo(np.int32).max))
        self._fits = 0
        self._scaling: dict[str, Any] = {"kind": parameters.scaling}
        self.classes_ = classes
        self.t_ = 0
        self.loss_curve_: list[float] = []

    def _train(
        self,
        parameters: Parameters,
        X: Any,
        labels: np.ndarray,
        weights: np.ndarray | None,
        incremental: bool,
    ) -> None:
        """Train on checked examples, from the state that there is or a new one."""
        seed = self._seed + self._fits
        monitored = parameters.early_stopping
        train, test = weights, np.zeros(0, np.int64)
        if monitored:
            train, test = self._split(parameters, labels, weights, seed)
        if parameters.shuffle:
            rows, train = distinct(X, labels, train)
        else:
            rows = np.arange(len(labels)) if train is None else np.flatnonzero(train)
            train = None if train is None else train[rows]
        scaling = Scaling(self._scaling)
        if incremental or not self._fits:  # otherwise, the weights are for this scaling
            scaling.update(X, rows, train)
        dtype = "float64" if parameters.dtype == "float64" else "float32"
        data = _dataset(X, labels, rows, test, train, scaling, dtype, len(self.classes_))
        examples = len(rows) if train is None else epoch_length(train)
        iterations = 1 if incremental else parameters.iterations(examples)
        cosine = parameters.learning_rate == "cosine" and not incremental
        device = parameters.device
        if device == "auto" and is_cupy(X):
            device = str(device_of(X))
        stopping = EarlyStopping(
            "accuracy" if monitored else "loss",
            tol=-math.inf if cosine and not monitored else parameters.tol,
            patience=parameters.n_iter_no_change,
            keep_best=monitored,
            decay=5 if parameters.learning_rate == "adaptive" else None,
        )
        trainer = Trainer(
            parameters.training(seed, examples, iterations, device, cosine),
            [stopping, *([_Printer(stopping)] if parameters.verbose else [])],
            model=self._model(parameters, parameters.dtype),
            data=data,
        )
        if incremental and self._fits:
            trainer.optimizer.load_state_dict(self._training["optimizer"])
        try:
            trainer.run()
        except KeyboardInterrupt:
            warnings.warn("Training interrupted by user.", stacklevel=3)
        if stopping.best_state is not None:
            trainer.model.load_state_dict(stopping.best_state)
        if not np.isfinite(stopping.losses).all():
            raise ValueError(
                f"The training loss must stay finite; got {stopping.losses[-1]} with "
                f"learning_rate_init={parameters.learning_rate_init}. Lower it."
            )
        self._keep(parameters, trainer, stopping, scaling, incremental)
        complete = self.n_iter_ < iterations or stopping.triggered
        if not (incremental or cosine or complete):
            warnings.warn(
                f"Stochastic Optimizer: Maximum iterations ({iterations}) reached and the "
                f"optimization hasn't converged yet.",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _split(
        self, parameters: Parameters, labels: np.ndarray, weights: np.ndarray | None, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return weights of all examples, 0 for those held out, and the rows of the latter.

        A row occurs there as often as its weight says.
        """
        weights = np.ones(len(labels)) if weights is None else weights
        rows = np.flatnonzero(weights)
        _, test = train_test_split(
            rows,
            test_size=parameters.validation_fraction,
            random_state=seed,
            stratify=labels[rows],
        )
        if len(test) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of "
                "your dataset."
            )
        train = weights.copy()
        train[test] = 0
        order = BatchOrder(len(test), 1, seed, CPU, weights[test], shuffle=False)
        return train, test[order.permutation(0)]

    def _model(self, parameters: Parameters, dtype: str) -> nn.Sequential:
        """Return the network, with the state of earlier training if there is any."""
        config = parameters.network(self._seed, dtype)
        sizes = parameters.hidden_layer_sizes
        model = build_model(config, self.n_features_in_, len(self.classes_), sizes)
        if hasattr(self, "_training"):
            try:
                model.load_state_dict(self._training["model"])
            except ValueError as error:
                raise ValueError(
                    f"The parameters of the network must be those of the first fit where training "
                    f"continues (warm_start or partial_fit): {error}"
                ) from error
        return model

    def _keep(
        self,
        parameters: Parameters,
        trainer: Trainer,
        stopping: EarlyStopping,
        scaling: Scaling,
        incremental: bool,
    ) -> None:
        """Keep the result of training: NumPy arrays and numbers, and what predicts."""
        self._training = {
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
        }
        self._continued = incremental
        self._fits += 1
        self._scaling = scaling.state()
        self._network = packed_arrays(self._model(parameters, "float32"))
        self._predictor = Predictor(self._network, scaling)
        self.loss_curve_ += stopping.losses
        self.n_iter_ = len(stopping.losses)
        self.t_ += trainer.step * trainer.config.batch_size
        monitored = parameters.early_stopping
        self.validation_scores_ = list(stopping.accuracies) if monitored else None
        self.best_validation_score_ = stopping.best if monitored else None
        self.best_loss_ = None if monitored else min(self.loss_curve_, default=math.nan)
        self.n_layers_ = len(parameters.hidden_layer_sizes) + 2
        self.n_outputs_ = len(self.classes_)
        self.out_activation_ = "softmax"
        self.loss_ = self.loss_curve_[-1] if self.loss_curve_ else math.nan


def _dataset(
    X: Any,
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    weights: np.ndarray | None,
    scaling: Scaling,
    dtype: str,
    classes: int,
) -> Dataset:
    """Return rows of the examples as a data set; bytes stay bytes where one factor scales them."""
    pixels = X.dtype == np.uint8 and scaling.kind != "standard"

    def images(rows: np.ndarray) -> Any:
        if pixels:
            return X[array_module(X).asarray(rows)]
        return scaling.apply(X, rows, dtype)

    return Dataset(
        name="X",
        train_images=images(train),
        train_labels=labels[train],
        test_images=images(test),
        test_labels=labels[test],
        image_shape=None,
        pixel_max=float(scaling.scale[0]) if pixels else None,
        classes=classes,
        train_weights=weights,
    )


class _Printer(Callback):
    """Prints each iteration, and what the run reports."""

    def __init__(self, stopping: EarlyStopping) -> None:
        self._stopping = stopping
        self._printed = 0

    def on_notice(self, trainer: TrainingRun, sentence: str) -> None:
        print(sentence)

    def on_step(self, trainer: TrainingRun, step: int, output: StepOutput) -> None:
        count = len(self._stopping.losses)
        if count > self._printed:
            self._printed = count
            print(f"Iteration {count}, loss = {self._stopping.losses[-1]:.8f}")
            if self._stopping.accuracies:
                print(f"Validation score: {self._stopping.accuracies[-1]:f}")
