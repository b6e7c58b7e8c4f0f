"""`BinaryMLPClassifier`: scikit-learn's own checks, and what it promises beyond them."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from arrays import host
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits, make_classification
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from cupybnn import BinaryMLPClassifier, PackedNetwork
from cupybnn.data import Dataset
from cupybnn.estimator.examples import distinct
from cupybnn.estimator.scaling import Scaling
from cupybnn.training import Trainer

SMALL = {"hidden_layer_sizes": (16, 12), "max_iter": 4, "random_state": 0, "device": "cpu"}
X, Y = make_classification(
    120, 9, n_informative=6, n_classes=3, random_state=0, shift=3.0, scale=[1, 50] + [2] * 7
)


def small(**changes) -> BinaryMLPClassifier:
    return BinaryMLPClassifier(**{**SMALL, **changes})


def same(a: BinaryMLPClassifier, b: BinaryMLPClassifier, x=X) -> bool:
    return np.array_equal(a.decision_function(x), b.decision_function(x))


@parametrize_with_checks([BinaryMLPClassifier((16,), max_iter=12, device="cpu")])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def fitted() -> BinaryMLPClassifier:
    return small().fit(X, Y)


@pytest.fixture(scope="module")
def digits():
    return train_test_split(*load_digits(return_X_y=True), random_state=0)


class TestLearning:
    def test_digits(self, digits):
        train, test, labels, right = digits
        clf = BinaryMLPClassifier((96, 64), max_iter=12, random_state=0).fit(train, labels)
        assert clf.score(test, right) > 0.93
        assert clf.score(test, right) == (clf.predict(test) == right).mean()

    def test_default_number_of_iterations_and_batch_size(self):
        from cupybnn.estimator.parameters import Parameters

        auto = Parameters.of(BinaryMLPClassifier())
        sizes = (10, 100, 1437, 60_000)
        configs = [auto.training(0, n, auto.iterations(n), "cpu", True) for n in sizes]
        assert [c.batch_size for c in configs] == [10, 32, 35, 200]
        assert [auto.iterations(n) for n in sizes] == [200, 200, 37, 20]

    @pytest.mark.parametrize("kind", [str, float, bool, "object", lambda y: y - 7])
    def test_labels(self, kind, fitted):
        y = Y % 2 if kind is bool else Y
        y = np.array(["abc"[i] for i in y], object) if kind == "object" else kind_of(kind, y)
        clf = small().fit(X, y)
        np.testing.assert_array_equal(clf.classes_, np.unique(y))
        found = clf.predict(X)
        assert found.dtype == y.dtype
        assert set(found) <= set(y)
        if kind is not bool:
            np.testing.assert_array_equal(np.searchsorted(clf.classes_, found), fitted.predict(X))

    def test_two_classes_have_one_decision(self):
        clf = small().fit(X, Y % 2)
        decision, probability = clf.decision_function(X), clf.predict_proba(X)
        assert decision.shape == (120,)
        np.testing.assert_allclose(probability[:, 1], 1 / (1 + np.exp(-decision)), rtol=1e-5)
        np.testing.assert_array_equal(clf.predict(X), decision > 0)

    def test_one_class_and_many_classes(self):
        assert (small().fit(X, np.full(120, 5)).predict(X) == 5).all()
        clf = small(hidden_layer_sizes=9).fit(X, np.arange(120) // 2)
        assert clf.predict_proba(X).shape == (120, 60)

    def test_attributes(self, fitted):
        assert fitted.n_iter_ == len(fitted.loss_curve_) == 4
        assert fitted.loss_ == fitted.loss_curve_[-1] < fitted.loss_curve_[0]
        assert fitted.best_loss_ == min(fitted.loss_curve_)
        assert fitted.validation_scores_ is None is fitted.best_validation_score_
        assert (fitted.n_layers_, fitted.n_outputs_, fitted.n_features_in_) == (4, 3, 9)
        theirs = {n for n in vars(MLPClassifier(max_iter=2).fit(X, Y)) if n.endswith("_")}
        assert {n for n in theirs if not n.startswith("_")} <= set(dir(fitted))
        np.testing.assert_allclose(
            np.exp(fitted.predict_log_proba(X)), fitted.predict_proba(X), 1e-5
        )

    def test_parameters_of_mlp_classifier_keep_their_names(self):
        ours, theirs = BinaryMLPClassifier().get_params(), MLPClassifier().get_params()
        assert set(ours) - set(theirs) == {"binarize", "ste", "xnor", "scaling", "device", "dtype"}

    @pytest.mark.parametrize(
        "changes",
        [
            {"solver": "sgd", "learning_rate_init": 0.1},
            {"ste": "stochastic_sign"},
            {"dtype": "float64"},
            {"learning_rate": "constant"},
            {"binarize": "all"},
            {"scaling": "max"},
        ],
    )
    def test_settings_matter_and_work(self, changes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            clf, again = (small(max_iter=8, **changes).fit(X, Y) for _ in range(2))
            assert same(clf, again)
            assert not same(clf, small(max_iter=8).fit(X, Y))
        assert clf.loss_ < clf.loss_curve_[0]

    def test_settings_that_change_no_number(self, fitted):
        assert same(fitted, small(xnor=False).fit(X, Y))
        assert same(fitted, small(random_state=np.random.RandomState(0)).fit(X, Y))
        # Batch norm takes the scale away.
        assert same(fitted, small(ste="magnitude_aware_sign").fit(X, Y))

    def test_penalty_shrinks_real_weights(self):
        def norm(alpha):
            clf = small(alpha=alpha, learning_rate_init=0.05).fit(X, Y)
            return np.linalg.norm(clf._training["model"]["fcout.weight"])

        assert norm(1000.0) < 0.7 * norm(0.0)

    def test_the_loop_is_the_trainers(self, monkeypatch):
        ran = []
        run = Trainer.run
        monkeypatch.setattr(Trainer, "run", lambda self: ran.append(self) or run(self))
        clf = small().fit(X, Y)
        assert len(ran) == 1
        assert ran[0].step == 15
        assert clf.t_ == 15 * 32 == 480

    def test_interrupted(self, monkeypatch):
        step = Trainer.make_step

        def interrupted(self, number):
            if number == 9:
                raise KeyboardInterrupt
            return step(self, number)

        monkeypatch.setattr(Trainer, "make_step", interrupted)
        with pytest.warns(UserWarning, match="Training interrupted by user"):
            clf = small().fit(X, Y)
        assert clf.n_iter_ == 2
        assert clf.predict(X).shape == (120,)

    def test_verbose(self, capsys):
        small(verbose=True, max_iter=2).fit(X, Y)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(",")[0] for line in lines] == ["Iteration 1", "Iteration 2"]


def kind_of(kind, y):
    return y.astype(kind) if isinstance(kind, type) else kind(y)


class TestStopping:
    def test_early_stopping_keeps_the_best_weights(self):
        clf = small(early_stopping=True, max_iter=200, n_iter_no_change=3, validation_fraction=0.25)
        clf.fit(X, Y)
        assert clf.n_iter_ == len(clf.validation_scores_) < 200
        assert clf.best_validation_score_ == max(clf.validation_scores_)
        assert clf.best_loss_ is None
        _, held_out = clf._split(parameters_of(clf), Y, None, clf._seed)
        assert len(held_out) == 30
        assert clf.score(X[held_out], Y[held_out]) == pytest.approx(clf.best_validation_score_)

    def test_constant_rate_stops_or_warns(self):
        stopped = small(learning_rate="constant", max_iter=100, tol=1e9, n_iter_no_change=2)
        assert stopped.fit(X, Y).n_iter_ == 4
        with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(4\) reached"):
            small(learning_rate="constant").fit(X, Y)

    def test_adaptive_rate_falls_before_the_end(self):
        clf = small(learning_rate="adaptive", max_iter=100, tol=1e9, n_iter_no_change=1)
        # 3e-3 is divided by 5 five times: the fifth makes it less than 1e-6.
        assert clf.fit(X, Y).n_iter_ == 1 + 2 * 6

    def test_too_few_samples(self):
        with pytest.raises(ValueError, match="validation set is too small"):
            small(early_stopping=True, validation_fraction=0.005).fit(X, np.zeros(120, int))


def parameters_of(clf):
    from cupybnn.estimator.parameters import Parameters

    return Parameters.of(clf)


class TestWeights:
    def test_whole_weights_are_repeated_samples_in_any_order(self, fitted):
        rng = np.random.default_rng(0)
        weights = rng.integers(0, 4, 120)
        weighted = small().fit(X, Y, weights)
        order = rng.permutation(weights.sum())
        repeated = small().fit(X.repeat(weights, 0)[order], Y.repeat(weights)[order])
        assert same(weighted, repeated)
        assert weighted.loss_curve_ == repeated.loss_curve_
        assert not same(weighted, fitted)
        assert same(fitted, small().fit(X[::-1], Y[::-1], np.ones(120)))

    def test_order_without_shuffling(self):
        kept = small(shuffle=False)
        weights = np.arange(120) % 3
        plain = clone(kept).fit(X, Y)
        assert same(clone(kept).fit(X, Y, np.ones(120)), plain)
        assert not same(clone(kept).fit(X[::-1], Y[::-1]), plain)
        assert clone(kept).fit(X, Y, weights).t_ >= weights.sum()

    def test_a_heavy_class_is_preferred(self):
        noise = np.random.default_rng(0).standard_normal((200, 3))
        y = np.arange(200) % 2
        clf = small(max_iter=20).fit(noise, y, np.where(y == 1, 5.0, 0.5))
        assert (clf.predict(noise) == 1).mean() > 0.8

    def test_equal_rows_are_merged(self):
        x = np.array([[0.0, 1], [2, 3], [-0.0, 1], [2, 3], [0, 1], [5, 5]])
        y = np.array([0, 1, 0, 1, 1, 1])
        rows, weights = distinct(x, y, np.array([1.0, 2, 3, 4, 5, 0]))
        found = {(*x[r], y[r]): w for r, w in zip(rows, weights, strict=True)}
        assert found == {(0, 1, 0): 4, (2, 3, 1): 6, (0, 1, 1): 5}
        as_bytes, _ = distinct(abs(x).astype(np.uint8), y, None)
        np.testing.assert_array_equal(abs(x)[as_bytes], abs(x)[distinct(abs(x), y, None)[0]])
        assert distinct(X, Y, None)[1] is None

    def test_early_stopping_with_weights(self):
        weights = np.where(np.arange(120) % 2, 3.0, 0.0)
        clf = small(early_stopping=True)
        train, held_out = clf._split(parameters_of(clf), Y, weights, 0)
        assert (train[held_out] == 0).all()
        assert (weights[held_out] == 3).all()
        np.testing.assert_array_equal(np.unique(held_out, return_counts=True)[1], 3)
        assert train.sum() + len(held_out) == weights.sum()

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (np.zeros(120), "at least one non-zero number"),
            (-np.ones(120), "must be at least 0; got -1"),
            (np.ones(3), r"must have shape \(120,\)"),
            (np.full(120, np.inf), "must be finite"),
            (["a"] * 120, "must be numbers; got list"),
        ],
    )
    def test_wrong_weights(self, weights, message):
        with pytest.raises(ValueError, match=message):
            small().fit(X, Y, weights)


class TestScaling:
    def test_statistics_are_those_of_numpy(self):
        weights = np.random.default_rng(0).random(120)
        scaling = Scaling({"kind": "standard"})
        for part in (slice(0, 1), slice(1, 50), slice(50, 120)):
            rows = np.arange(120)[part]
            scaling.update(X, rows, weights[part])
        mean = np.average(X, axis=0, weights=weights)
        np.testing.assert_allclose(scaling.mean, mean)
        deviation = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=weights))
        np.testing.assert_allclose(scaling.scale, deviation)
        again = Scaling(scaling.state())
        np.testing.assert_array_equal(
            again.apply(X, None, "f8"), (X - scaling.mean) / scaling.scale
        )

    def test_constant_features_and_one_factor(self):
        x = np.full((100, 2), [0.1, 1e9])
        scaling = Scaling({"kind": "standard"})
        scaling.update(x, np.arange(100), None)
        np.testing.assert_array_equal(scaling.scale, [1, 1])
        largest = Scaling({"kind": "max"})
        largest.update(-X, np.arange(120), None)
        np.testing.assert_array_equal(largest.scale, np.full(9, abs(X).max()))

    def test_overflow(self):
        with pytest.raises(ValueError, match="overflow in feature 3"):
            small().fit(np.where(np.arange(9) == 3, 1e200 * X, X), Y)

    def test_units_of_features_do_not_matter(self):
        factors = 2.0 ** np.arange(-4, 5)
        kept = small(shuffle=False)  # the order by content would be another
        scaled = clone(kept).fit(X * factors, Y).decision_function(X * factors)
        np.testing.assert_array_equal(scaled, clone(kept).fit(X, Y).decision_function(X))

    def test_bytes_are_trained_on_as_pixels(self, digits, monkeypatch):
        train, test, labels, _ = digits
        made = []
        check = Dataset.__post_init__
        monkeypatch.setattr(Dataset, "__post_init__", lambda d: made.append(d) or check(d))
        options = {"scaling": "max", "binarize": "all"}
        as_bytes = small(**options).fit(train.astype(np.uint8), labels)
        as_floats = small(**options).fit(train, labels)
        assert [(d.train_images.dtype, d.pixel_max) for d in made] == [
            (np.uint8, 16.0),
            (np.float32, None),
        ]
        assert same(as_bytes, as_floats, test)
        assert same(as_bytes, as_bytes, test.astype(np.uint8))


class TestContinuing:
    def test_partial_fit_continues_the_optimizer(self):
        clf = small()
        for number in range(1, 6):
            clf.partial_fit(X, Y, classes=[0, 1, 2] if number == 1 else None)
            assert clf.n_iter_ == 1
            assert len(clf.loss_curve_) == number
        steps = int(clf._training["optimizer"]["steps"])
        assert steps == 5 * 4
        assert clf.loss_curve_[-1] < 0.8 * clf.loss_curve_[0]
        copied = pickle.loads(pickle.dumps(clf)).partial_fit(X, Y)
        assert same(clf.partial_fit(X, Y), copied)

    def test_partial_fit_of_parts(self):
        clf = small(hidden_layer_sizes=(32, 16))
        for _ in range(8):
            for part in np.split(np.arange(120), 3):
                clf.partial_fit(X[part], Y[part], np.arange(4), np.ones(40))
        assert clf.predict_proba(X).shape == (120, 4)
        assert clf.score(X, Y) > 0.6
        mean, deviation = X.mean(axis=0), X.std(axis=0)
        np.testing.assert_allclose(clf._predictor.scaling.mean, mean)
        np.testing.assert_allclose(clf._predictor.scaling.scale, deviation)

    def test_after_fit(self, fitted):
        clf = small().fit(X, Y)
        before = clf.loss_
        assert clf.partial_fit(X, Y).loss_ < before
        with pytest.raises(RuntimeError, match=r"only with warm_start=True; got .*=False\. Set it"):
            pickle.loads(pickle.dumps(fitted)).partial_fit(X, Y)

    def test_wrong_classes(self):
        with pytest.raises(ValueError, match="classes must be passed on the first call"):
            small().partial_fit(X, Y)
        clf = small().partial_fit(X, Y, classes=[0, 1, 2])
        with pytest.raises(ValueError, match="is not the same as on last call"):
            clf.partial_fit(X, Y, classes=[0, 1, 2, 3])
        with pytest.raises(ValueError, match=r"classes of the first call, \[0 1 2\]; got 3"):
            clf.partial_fit(X, Y + 1)
        with pytest.raises(ValueError, match="does not support early_stopping"):
            small(early_stopping=True).partial_fit(X, Y, classes=[0, 1, 2])

    def test_warm_start(self):
        clf = small(warm_start=True).fit(X, Y)
        first = clf.loss_
        clf = pickle.loads(pickle.dumps(clf)).fit(X, Y)
        assert len(clf.loss_curve_) == 8
        assert clf.n_iter_ == 4
        assert clf.loss_ < first
        with pytest.raises(ValueError, match="must have the classes of the first fit"):
            clf.fit(X, Y + 1)
        with pytest.raises(ValueError, match=r"those of the first fit .*\n.*fc1\.weight"):
            clf.set_params(hidden_layer_sizes=(8, 12)).fit(X, Y)

    def test_a_fit_forgets_the_one_before(self, fitted):
        clf = small().partial_fit(X, Y, classes=[0, 1, 2]).fit(X[:, :4], Y)
        clf.fit(X, Y)
        assert same(clf, fitted)
        with pytest.raises(ValueError, match="early_stopping"):
            clf.set_params(early_stopping="no").fit(X, Y)


class TestResults:
    @pytest.mark.parametrize("scaling", ["standard", "max", None])
    @pytest.mark.parametrize("binarize", ["hidden", "all"])
    def test_coefficients_and_packed_network(self, binarize, scaling, tmp_path):
        clf = small(binarize=binarize, scaling=scaling, hidden_layer_sizes=(16, 12, 8))
        x = X.astype(np.float32)
        clf.fit(x, np.array(["a", "b", "c"])[Y])
        signs = x.astype(np.float64)
        *hidden, last = zip(clf.coefs_, clf.intercepts_, strict=True)
        for weight, intercept in hidden:
            signs = np.where(signs @ weight + intercept >= 0, 1.0, -1.0)
        np.testing.assert_array_equal(clf.transform(x), signs > 0)
        logits = signs @ last[0] + last[1]
        np.testing.assert_allclose(clf.decision_function(x), logits, rtol=1e-4, atol=1e-4)
        assert all((abs(weight) == 1).all() for weight in clf.coefs_[1:-1])
        net = clf.to_packed()
        net.save(tmp_path / "net.npz")
        loaded = PackedNetwork.load(tmp_path / "net.npz")
        one_factor = binarize == "all" and scaling != "standard"
        assert [layer.binary for layer in loaded.layers] == [
            one_factor, True, True, binarize == "all",
        ]  # fmt: skip
        for packed in (net, loaded):
            agree = packed.predict(x) == clf.predict(x)
            assert agree.mean() > 0.99
            np.testing.assert_allclose(
                packed(x)[agree], clf.decision_function(x)[agree], rtol=1e-3, atol=1e-3
            )

    def test_exports_take_features_as_they_are(self, tmp_path):
        onnx = pytest.importorskip("onnx")
        net = small().fit(X, Y).to_packed()
        net.to_onnx(tmp_path / "net.onnx")
        model = onnx.load(tmp_path / "net.onnx")
        assert [value.name for value in model.graph.input] == ["numbers"]
        evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(model)
        (found,) = evaluator.run(["class_index"], {"numbers": X.astype(np.float32)})
        np.testing.assert_array_equal(found, net.predict(X))
        net.to_c(tmp_path / "net.h")
        words = "pixels: 9 bytes, whole numbers that are not scaled."
        assert words in (tmp_path / "net.h").read_text()

    def test_batches_of_one_sample_are_warned_of(self):
        with pytest.warns(UserWarning, match="'batch_size' of 1 leaves batch norm a single"):
            small(batch_size=1, max_iter=1).fit(X, Y)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("ignore", ConvergenceWarning)
            small(max_iter=1).partial_fit(X[:1], Y[:1], classes=np.unique(Y))

    def test_packed_network_takes_whole_numbers(self, digits):
        train, test, labels, _ = digits
        clf = small().fit(train, labels)
        net = clf.to_packed()
        np.testing.assert_array_equal(net.predict(test.astype(np.uint8)), clf.predict(test))
        pixels = clf.to_packed(pixel_max=16, image_shape=(8, 8))
        images = test.reshape(-1, 8, 8).astype(np.uint8)
        np.testing.assert_array_equal(pixels.predict(images), clf.predict(test))
        np.testing.assert_array_equal(pixels.predict(test / 16), clf.predict(test))
        with pytest.raises(ValueError, match=r"must have 64 pixels, .*; got \(8, 9\)"):
            clf.to_packed(image_shape=(8, 9))
        assert small().fit(X, Y > 0).to_packed().classes.tolist() == ["False", "True"]

    def test_a_prediction_does_not_depend_on_the_others(self, fitted):
        x = np.random.default_rng(0).normal(3, 3, (500, 9))
        alone = np.concatenate([fitted.transform(row[None]) for row in x])
        np.testing.assert_array_equal(fitted.transform(x), alone)

    def test_transform(self, fitted):
        bits = fitted.transform(X)
        assert bits.dtype == np.uint8
        assert bits.shape == (120, 12)
        names = fitted.get_feature_names_out()
        assert (names[0], len(names)) == ("binarymlpclassifier0", 12)

    def test_pandas(self):
        pandas = pytest.importorskip("pandas")
        table = pandas.DataFrame(X, columns=[f"x{i}" for i in range(9)], index=range(1, 121))
        clf = small().fit(table, pandas.Series(Y).map({0: "a", 1: "b", 2: "c"}))
        assert list(clf.feature_names_in_) == list(table.columns)
        out = clf.set_output(transform="pandas").transform(table)
        assert list(out.columns) == list(clf.get_feature_names_out())
        assert list(out.index) == list(table.index)
        with pytest.raises(ValueError, match="feature names should match"):
            clf.predict(table.rename(columns={"x0": "y0"}))

    def test_unfitted(self):
        for name in ("predict", "predict_proba", "decision_function", "transform"):
            with pytest.raises(NotFittedError):
                getattr(small(), name)(X)
        with pytest.raises(NotFittedError):
            small().to_packed()
        assert not hasattr(small(), "coefs_")


def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)
    else:
        yield value


class TestCopies:
    def test_a_pickle_holds_bits_and_arrays(self, fitted):
        plain = (int, float, str, bool, type(None), np.ndarray)
        for clf in (fitted, small(warm_start=True).fit(X, Y)):
            found = list(leaves(clf.__getstate__()))
            assert {type(leaf) for leaf in found} <= set(plain)
            assert not any(leaf.dtype == object for leaf in found if type(leaf) is np.ndarray)
        wide = small(hidden_layer_sizes=(256, 1024), max_iter=1).fit(X, Y)
        one_bit, real = 256 * 1024 / 8, 4 * (9 * 256 + 1024 * 3)
        assert len(pickle.dumps(wide)) < one_bit + real + 12_000
        wide.warm_start = True
        assert len(pickle.dumps(wide)) > 12 * 256 * 1024

    def test_skops(self):
        sio = pytest.importorskip("skops.io")
        labels = np.array(["a", "b", "c"])[Y]
        clf = small(warm_start=True).fit(X, labels)
        data = sio.dumps(clf)
        unknown = sio.get_untrusted_types(data=data)
        assert unknown == ["cupybnn.estimator.classifier.BinaryMLPClassifier"]  # nothing else
        loaded = sio.loads(data, trusted=unknown)
        assert same(clf, loaded)
        assert same(clf.fit(X, labels), loaded.fit(X, labels))

    def test_searches_and_other_processes(self, fitted):
        pipe = make_pipeline(StandardScaler(), small(max_iter=2))
        grid = {"binarymlpclassifier__hidden_layer_sizes": [(8,), (8, 16)]}
        search = GridSearchCV(pipe, grid, cv=2, n_jobs=2).fit(X, Y)
        assert search.best_score_ > 1 / 3
        with Parallel(n_jobs=2) as processes:  # those of the search
            found = processes(delayed(fitted.decision_function)(x) for x in (X, X[:7]))
        np.testing.assert_array_equal(found[0], fitted.decision_function(X))

    def test_calibration(self):
        calibrated = CalibratedClassifierCV(small(), cv=2).fit(X, Y, sample_weight=np.ones(120))
        np.testing.assert_allclose(calibrated.predict_proba(X).sum(axis=1), 1)


class TestArrays:
    def test_on_the_device_of_the_input(self, xp, fitted):
        there = xp.asarray(X)
        assert type(fitted.predict(there)) is xp.ndarray
        np.testing.assert_array_equal(host(fitted.predict(there)), fitted.predict(X))
        np.testing.assert_array_equal(host(fitted.transform(there)), fitted.transform(X))
        np.testing.assert_allclose(
            host(fitted.predict_proba(there)), fitted.predict_proba(X), rtol=1e-4, atol=1e-6
        )
        assert fitted.score(there, xp.asarray(Y)) == fitted.score(X, Y)
        named = small().fit(there, np.array(["a", "b", "c"])[Y])
        assert type(named.predict(there)) is np.ndarray

    @pytest.mark.parametrize("options", [{}, {"binarize": "all", "scaling": "max"}])
    def test_fit_there(self, xp, options, monkeypatch):
        clf = small(device="auto" if xp is not np else "cpu", max_iter=10, **options)
        dtype = np.uint8 if options else np.float32
        pixels = 255 * (X - X.min(axis=0)) / np.ptp(X, axis=0)
        there = xp.asarray(pixels.astype(dtype))
        made = []
        check = Dataset.__post_init__
        monkeypatch.setattr(Dataset, "__post_init__", lambda d: made.append(d) or check(d))
        clf.fit(there, xp.asarray(Y), xp.asarray(np.arange(120) % 3))
        assert type(made[0].train_images) is xp.ndarray
        assert clf.loss_ < clf.loss_curve_[0]
        found = clf.decision_function(there)
        assert type(found) is xp.ndarray
        copied = pickle.loads(pickle.dumps(clf))
        np.testing.assert_allclose(
            copied.decision_function(host(there)), host(found), rtol=1e-4, atol=1e-4
        )
        assert type(copied.predict(there)) is xp.ndarray
        clf.partial_fit(there, xp.asarray(Y))

    @pytest.mark.gpu
    @pytest.mark.parametrize("library", ["cupy", "torch"])
    def test_wrong_arrays_on_a_gpu(self, library, fitted):
        module = pytest.importorskip(library)
        make = module.asarray if library == "cupy" else lambda x: module.tensor(x).cuda()
        assert type(fitted.predict(make(X))) is type(make(X))
        assert fitted.predict(make(X)).device == make(X).device
        bad = X.copy()
        bad[3, 3] = np.nan
        for wrong, message in [
            (X[:, :4], "X has 4 features"),
            (X[0], "Expected 2D array, got 1D array"),
            (X[:0], r"Found array with 0 sample\(s\)"),
            (bad, "contains NaN"),
        ]:
            with pytest.raises(ValueError, match=message):
                fitted.predict(make(wrong))

    def test_torch_on_the_cpu_needs_dispatch(self, fitted, monkeypatch):
        torch = pytest.importorskip("torch")
        x = torch.from_numpy(X)
        assert type(fitted.predict(x)) is np.ndarray
        assert same(small().fit(x, torch.from_numpy(Y)), fitted)
        monkeypatch.setattr("sklearn.get_config", lambda: {"array_api_dispatch": True})
        for name in ("predict", "predict_proba", "decision_function", "transform"):
            found = getattr(fitted, name)(x)
            assert type(found) is torch.Tensor
            np.testing.assert_array_equal(found.numpy(), getattr(fitted, name)(X))
        assert type(fitted.predict(X)) is np.ndarray
        with pytest.raises(TypeError, match=r"records no gradients.*x\.detach"):
            fitted.predict(x.clone().requires_grad_())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_layer_sizes": ()}, r"'hidden_layer_sizes' must be a whole number.*got \(\)"),
        ({"hidden_layer_sizes": (8, 0)}, r"at least 1, or one for each layer; got \(8, 0\)"),
        ({"binarize": "none"}, "'binarize' must be one of hidden, all; got 'none'"),
        ({"ste": "linear"}, "'ste' must be one of approx_sign, .*; got 'linear'"),
        ({"scaling": "robust"}, "'scaling' must be None or one of standard, max; got 'robust'"),
        ({"solver": "lbfgs"}, "'solver' must be one of adam, sgd; got 'lbfgs'"),
        ({"alpha": -1}, "'alpha' must be a finite number, at least 0; got -1"),
        ({"batch_size": 0}, "'batch_size' must be 'auto' or a whole number, at least 1; got 0"),
        ({"learning_rate": "invscaling"}, "'learning_rate' must be one of cosine, constant, ada"),
        ({"learning_rate_init": 0}, "'learning_rate_init' must be a finite number, greater than"),
        ({"max_iter": 1.5}, "'max_iter' must be 'auto' or a whole number"),
        ({"validation_fraction": 1}, r"'validation_fraction' must be .* in \(0, 1\); got 1"),
        ({"n_iter_no_change": 0}, "'n_iter_no_change' must be a whole number, at least 1"),
        ({"warm_start": "yes"}, "'warm_start' must be True or False"),
        ({"verbose": "yes"}, "'verbose' must be True or False"),
        ({"device": "tpu"}, "The 'device' must be 'auto', 'cpu'"),
        ({"dtype": "float16"}, "'dtype' must be one of float32, float64"),
    ],
)
def test_wrong_parameters(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes).fit(X, Y)


def test_numpy_numbers_are_parameters(fitted):
    clf = small(hidden_layer_sizes=np.array([16, 12]), max_iter=np.int64(4), xnor=np.True_)
    assert same(clf.fit(X, Y), fitted)
    with pytest.warns(UserWarning, match="greater than the number of samples, 120; got 500"):
        small(batch_size=500).fit(X, Y)
