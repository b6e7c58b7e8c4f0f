"""Measures of a packed network, against scikit-learn's; the command ``cupybnn evaluate``."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

import cupybnn
from cupybnn import PackedNetwork, nn
from cupybnn.cli.main import main
from cupybnn.deploy import ClassificationReport, open_network


@pytest.fixture(scope="module")
def digits():
    return cupybnn.data.load("digits")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a short run; a few digits in ten are wrong."""
    result = cupybnn.train(
        dataset="digits", binary=True, xnor=True, n_hidden=32, max_steps=40, eval_every_n=20,
        device="cpu", log_dir=str(tmp_path_factory.mktemp("runs")),
    )  # fmt: skip
    return str(result.run_folder)


@pytest.fixture(scope="module")
def packed(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "net.npz"
    PackedNetwork.from_run(run, device="cpu").save(path)
    return path


class TestMeasures:
    def test_are_those_of_scikit_learn(self, run, digits):
        from sklearn import metrics

        net = PackedNetwork.from_run(run, device="cpu")
        x, y = digits.test_images, digits.test_labels
        report = net.evaluate(x, y)
        predicted, proba = net.predict(x), net.predict_proba(x)
        assert 0 < len(report.mistakes()) < len(y)
        assert report.accuracy == metrics.accuracy_score(y, predicted)
        np.testing.assert_array_equal(report.confusion, metrics.confusion_matrix(y, predicted))
        precision, recall, _, counts = metrics.precision_recall_fscore_support(y, predicted)
        np.testing.assert_allclose(report.precision, precision)
        np.testing.assert_allclose(report.recall, recall)
        np.testing.assert_array_equal(report.counts, counts)
        assert report.loss == pytest.approx(metrics.log_loss(y, proba), rel=1e-5)
        np.testing.assert_allclose(report.confidence, proba.max(axis=1), rtol=1e-5)

    def test_classes_that_do_not_occur(self):
        report = ClassificationReport(
            np.array(list("abcd")), np.array([0, 0, 1]), np.array([0, 2, 1]), np.ones(3), 0.5
        )
        np.testing.assert_array_equal(report.precision, [1, 1, 0, np.nan])
        np.testing.assert_array_equal(report.recall, [0.5, 1, np.nan, np.nan])
        assert "–" in str(report)
        found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert found["classes"][3] == {
            "class": "d", "precision": None, "recall": None, "examples": 0,
        }  # fmt: skip

    def test_mistakes_are_sorted_by_confidence(self, run, digits):
        report = PackedNetwork.from_run(run, device="cpu").evaluate(
            digits.test_images, digits.test_labels
        )
        wrong = report.mistakes()
        assert set(wrong) == set(np.flatnonzero(report.labels != report.predicted))
        assert (np.diff(report.confidence[wrong]) <= 0).all()
        np.testing.assert_array_equal(report.mistakes(3), wrong[:3])
        pairs = report.confusions()
        assert sum(n for *_, n in pairs) == len(wrong)
        assert all(report.confusion[t, p] == n and t != p for t, p, n in pairs)

    def test_labels_are_names_of_classes(self, run, digits):
        names = np.array(["nil", "one", "two", "three", "four", "five", "six", "seven", "ate", "9"])
        net = PackedNetwork.from_run(run, device="cpu", classes=names)
        numbered = PackedNetwork.from_run(run, device="cpu")
        x, y = digits.test_images, digits.test_labels
        report, expected = net.evaluate(x, names[y]), numbered.evaluate(x, y)
        assert report.accuracy == expected.accuracy
        np.testing.assert_array_equal(report.confusion, expected.confusion)
        assert str(report).count("seven") == 3

    def test_images_may_be_on_a_device_or_in_parts(self, xp, monkeypatch, run, digits):
        net = PackedNetwork.from_run(run, device="cpu").to("cpu" if xp is np else "cuda")
        monkeypatch.setattr("cupybnn.deploy.evaluation._BATCH", 100)
        images = digits.test_images.reshape(-1, 8, 8)
        expected = net.to("cpu").evaluate(digits.test_images, digits.test_labels)
        for x in (images, xp.asarray(images)):
            report = net.evaluate(x, xp.asarray(digits.test_labels))
            np.testing.assert_array_equal(report.confusion, expected.confusion)
            assert report.loss == pytest.approx(expected.loss, rel=1e-6)

    def test_a_network_that_learned_nan(self):
        layer = nn.Linear(4, 3, rng=0)
        layer.weight.write()[...] = np.nan
        report = PackedNetwork.from_model(nn.Sequential(layer)).evaluate(np.ones((2, 4)), [0, 1])
        assert report.to_dict()["loss"] is None
        assert "loss nan" in str(report)

    def test_many_classes_list_the_most_frequent_confusions(self):
        rng = np.random.default_rng(0)
        labels, predicted = rng.integers(0, 47, (2, 5000))
        report = ClassificationReport(np.arange(47), labels, predicted, np.ones(5000), 1.0)
        lines = str(report).splitlines()
        assert "Most frequent confusions" in lines
        assert max(map(len, lines)) < 80

    @pytest.mark.parametrize(
        ("images", "labels", "words"),
        [
            (np.ones((2, 64)), [1], "must be equally many, at least one; got 2 and 1"),
            (np.ones((0, 64)), np.zeros(0, int), "at least one; got 0 and 0"),
            (np.ones((2, 64)), [1, 10], "network's classes, 0 to 9; got 10 for example 1"),
            (np.ones((2, 64)), [-1, 1], "got -1 for example 0"),
            (np.ones((2, 64)), [0.0, 1.0], "must be the classes' numbers"),
            (np.ones((2, 64)), ["0", "1"], "must be the classes' numbers"),
            (np.ones((2, 64)), [[0, 1]], r"of shape \(examples,\); got int64 of shape \(1, 2\)"),
        ],
    )
    def test_bad_labels(self, run, images, labels, words):
        net = PackedNetwork.from_run(run, device="cpu")
        with pytest.raises(ValueError, match=words):
            net.evaluate(images, labels)


class TestOpening:
    def test_a_run_a_checkpoint_and_a_packed_network(self, run, packed, digits):
        expected = PackedNetwork.from_run(run, device="cpu")(digits.test_images)
        for path in (run, f"{run}/newest.npz", packed, str(packed)):
            net = open_network(path, device="cpu")
            np.testing.assert_array_equal(net(digits.test_images), expected)
        open_network(run, which="best", device="cpu")

    def test_what_cannot_be_opened(self, run, packed, tmp_path, monkeypatch):
        text = tmp_path / "notes.txt"
        text.write_text("hello")
        other = tmp_path / "other.npz"
        np.savez(other, a=np.ones(3))
        broken = tmp_path / "broken.npz"
        broken.write_bytes(packed.read_bytes()[:-200])
        for path, words in (
            (tmp_path / "no", "does not exist"),
            (text, "neither a packed network nor a checkpoint: not an .npz file"),
            (other, "is not a cupybnn checkpoint"),
            (broken, "neither a packed network nor a checkpoint"),
            (tmp_path, "contains no checkpoint"),
        ):
            with pytest.raises(cupybnn.errors.CheckpointError, match=words):
                open_network(path)
        with pytest.raises(cupybnn.errors.SettingError, match="Leave it out"):
            open_network(packed, which="best")
        monkeypatch.chdir(tmp_path)
        with np.load(packed) as loaded:
            np.savez(broken, **{**loaded, "data": np.ones(2, np.uint8)})
        with pytest.raises(cupybnn.errors.CheckpointError, match="cannot be read as a Packed"):
            open_network(broken)

    def test_a_run_that_cannot_be_packed(self, tmp_path, capsys):
        result = cupybnn.train(
            dataset="digits", n_hidden=8, max_steps=2, device="cpu", dtype="float64",
            log_dir=str(tmp_path),
        )  # fmt: skip
        assert main(["evaluate", str(result.run_folder)]) == 1
        error = capsys.readouterr().err
        assert "cannot be packed. A packed network must be made of parameters in float32" in error
        assert len(error.splitlines()) == 1


class TestCommand:
    def test_text(self, run, digits, capsys):
        report = PackedNetwork.from_run(run, device="cpu").evaluate(
            digits.test_images, digits.test_labels
        )
        assert main(["evaluate", run, "--device", "cpu"]) == 0
        first, *rest = capsys.readouterr().out.splitlines()
        assert first.startswith("Data: digits, 355 test images; PackedNetwork(64-32-32-32-10, ")
        assert rest == str(report).splitlines()
        assert rest[0].startswith(f"accuracy {report.accuracy:.4f} (")
        row = next(line.split() for line in rest if line.startswith("3 "))
        assert row == [
            "3", f"{report.precision[3]:.4f}", f"{report.recall[3]:.4f}", str(report.counts[3]),
        ]  # fmt: skip
        matrix = [line.replace(".", "0").split()[1:] for line in rest[-10:]]
        np.testing.assert_array_equal(np.array(matrix, int), report.confusion)

    @pytest.mark.parametrize("data", [[], ["digits"]])
    def test_json_of_a_packed_network(self, packed, digits, data, capsys):
        assert main(["evaluate", str(packed), *data, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        report = PackedNetwork.load(packed).evaluate(digits.test_images, digits.test_labels)
        assert found["data"] == "digits"
        assert found["accuracy"] == report.accuracy
        assert found["loss"] == pytest.approx(report.loss)
        assert found["confusion"] == report.confusion.tolist()
        assert [m["example"] for m in found["mistakes"]] == report.mistakes().tolist()
        assert len(found["classes"]) == 10

    def test_the_best_checkpoint(self, run, tmp_path, capsys):
        other = cupybnn.train(
            dataset="digits", n_hidden=8, max_steps=1, device="cpu", log_dir=str(tmp_path / "runs")
        ).run_folder
        (tmp_path / "best.npz").write_bytes((other / "newest.npz").read_bytes())
        (tmp_path / "newest.npz").write_bytes(Path(run, "newest.npz").read_bytes())
        for which, expected in (("newest", run), ("best", other)):
            accuracies = []
            for arguments in ([str(tmp_path), "--which", which], [str(expected)]):
                assert main(["evaluate", *arguments, "--json"]) == 0
                accuracies.append(json.loads(capsys.readouterr().out)["accuracy"])
            assert accuracies[0] == accuracies[1]

    def test_the_best_checkpoint_when_the_newest_is_damaged(self, run, tmp_path, capsys):
        (tmp_path / "best.npz").write_bytes(Path(run, "best.npz").read_bytes())
        (tmp_path / "newest.npz").write_bytes(b"damaged")
        assert main(["evaluate", str(tmp_path), "--which", "best"]) == 0
        assert capsys.readouterr().out.startswith("Data: digits")

    def test_files_of_images(self, tmp_path, mnist_dir, capsys):
        model = nn.Sequential(nn.Linear(784, 10, rng=0)).eval()
        PackedNetwork.from_model(model, pixel_max=255, image_shape=(28, 28)).save(
            tmp_path / "net.npz"
        )
        assert main(["evaluate", str(tmp_path / "net.npz"), str(mnist_dir)]) == 0
        assert capsys.readouterr().out.startswith("Data: mnist, 10,000 test images")

    def test_data_that_do_not_fit(self, run, mnist_dir, tmp_path, capsys):
        for folder, words in (
            (str(mnist_dir), "takes images of 8×8 pixels in 10 classes; those of mnist have 28×28"),
            (str(tmp_path / "no"), "does not exist"),
        ):
            assert main(["evaluate", run, folder]) == 1
            error = capsys.readouterr().err
            assert words in error
            assert len(error.splitlines()) == 1

    def test_data_of_a_packed_network_follow_from_its_inputs(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(
            cupybnn.data, "load", lambda name, *_, **__: pytest.fail(f"loads {name}")
        )
        for features, classes in ((6, 10), (784, 26)):
            model = nn.Sequential(nn.Linear(features, classes, rng=0)).eval()
            PackedNetwork.from_model(model).save(tmp_path / "net.npz")
            assert main(["evaluate", str(tmp_path / "net.npz")]) == 2
            assert f"{features} inputs and {classes} classes must be named" in (
                capsys.readouterr().err
            )
        monkeypatch.undo()
        PackedNetwork.from_model(nn.Sequential(nn.Linear(64, 10, rng=0)).eval()).save(
            tmp_path / "net.npz"
        )
        assert main(["evaluate", str(tmp_path / "net.npz")]) == 0
        assert capsys.readouterr().out.startswith("Data: digits")

    def test_a_run_on_arrays_of_your_own(self, tmp_path, capsys):
        x = np.random.default_rng(0).random((60, 6))
        data = cupybnn.data.Dataset.from_arrays(x, np.arange(60) % 3, x, np.arange(60) % 3)
        config = cupybnn.TrainConfig(
            n_hidden=8, max_steps=2, batch_size=20, device="cpu", log_dir=str(tmp_path)
        )
        folder = cupybnn.Trainer(config, data=data).run().run_folder
        assert main(["evaluate", str(folder)]) == 2
        assert "got 'arrays'. Name the data" in capsys.readouterr().err

    def test_chart(self, run, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert main(["evaluate", run, "--chart", str(tmp_path / "chart.png")]) == 0
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
        drawn = (tmp_path / "chart.svg").read_text(encoding="utf-8")
        net, data = PackedNetwork.from_run(run, device="cpu"), cupybnn.data.load("digits")
        report = net.evaluate(data.test_images, data.test_labels)
        assert drawn.count("% sure -->") == min(20, len(report.mistakes()))
        worst = report.mistakes(1)[0]
        assert f"<!-- {report.labels[worst]}, not {report.predicted[worst]} -->" in drawn
        assert f"{report.accuracy:.2%} of 355" in drawn

    def test_a_chart_of_many_classes_without_mistakes(self, tmp_path):
        pytest.importorskip("matplotlib")
        from cupybnn.cli import evaluation_chart

        data = cupybnn.data.load("digits")
        names = np.array([f"class {i}" for i in range(47)])
        labels = data.test_labels
        report = ClassificationReport(names, labels, labels, np.ones(len(labels)), 0.0)
        svg, _ = evaluation_chart.draw(report, data, tmp_path / "chart")
        drawn = svg.read_text(encoding="utf-8")
        assert drawn.count("<!-- class 46 -->") == 2  # in a row and in a column
        assert "mistakes" not in drawn

    def test_bad_options(self, run, tmp_path, capsys):
        for arguments, words in (
            (["--which", "last"], "invalid choice: 'last'"),
            (["--chart", "/dev/null"], "got the device or pipe"),
            (["--chart", "no/chart"], "must be in an existing folder; got 'no/chart'"),
            (["--chart", str(tmp_path)], "must be a file; got the folder"),
            (["--device", "gpu"], "The 'device' must be"),
        ):
            try:
                code = main(["evaluate", run, *arguments])
            except SystemExit as exit:
                code = exit.code
            assert code == 2
            printed = capsys.readouterr()
            assert words in printed.err
            assert not printed.out  # nothing was evaluated first
