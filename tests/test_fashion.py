"""Fashion-MNIST: from an IDX folder, from scikit-learn's files, and its class names in reports."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from cupybnn import load_model
from cupybnn.cli.main import main
from cupybnn.data import fashion, load, openml
from cupybnn.deploy import PackedNetwork
from cupybnn.errors import DataError
from cupybnn.training import TrainConfig, Trainer, recipes
from cupybnn.training.evaluation import right_by_class

TRAIN, TEST = 60, 20


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images whose class can be learned, as many of each of the ten."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % 10).astype(np.uint8)
    images = random.integers(0, 60, (count, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 8] += 150
    return images, labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four gzipped IDX files, with the names of Fashion-MNIST's."""
    where = tmp_path_factory.mktemp("fashion")
    for part, count, seed in (("train", TRAIN, 0), ("t10k", TEST, 1)):
        for kind, array in zip(("images-idx3", "labels-idx1"), pictures(count, seed), strict=True):
            header = struct.pack(">4B", 0, 0, 8, array.ndim) + struct.pack(
                f">{array.ndim}I", *array.shape
            )
            with gzip.open(where / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    return where


def test_an_idx_folder(folder):
    data = load("fashion", folder)
    assert data.name == "fashion"
    assert data.class_names == fashion.CLASS_NAMES
    assert len(set(data.class_names)) == 10
    np.testing.assert_array_equal(data.test_images, pictures(TEST, 1)[0].reshape(TEST, 784))
    assert load("mnist", folder).class_names is None
    with pytest.raises(ValueError, match="one for each of its 10 classes; got 9"):
        replace(data, class_names=data.class_names[:-1])
    with pytest.raises(ValueError, match=r"must be different names; got 'Bag' more than once"):
        replace(data, class_names=("Bag", *data.class_names[1:]))


def test_messages_about_a_folder_name_the_data_set(folder, tmp_path):
    said: list[str] = []
    load("fashion", folder, notify=said.append)
    assert said == [
        f"The data in {folder} are not of Fashion-MNIST's size: found 60 training and 20 test "
        f"images of 28×28 pixels; Fashion-MNIST has 60,000 and 10,000 of 28×28."
    ]
    with pytest.raises(DataError, match="must hold Fashion-MNIST's four IDX files"):
        load("fashion", tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="Name the folder of Fashion-MNIST's four IDX files"):
        load("fashion", tmp_path / "file")


def test_an_emnist_folder_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        name = path.name.replace("t10k", "test")
        (tmp_path / f"emnist-digits-{name}").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="must hold Fashion-MNIST's four IDX files"):
        load("fashion", tmp_path)


def test_class_names_in_reports(folder, tmp_path, capsys):
    quick = ["--n_hidden", "64", "--max_steps", "120", "--device", "cpu", "--batch_size", "60"]
    run = ["train", str(folder), "--dataset", "fashion", "--binary", "--log_dir", str(tmp_path)]
    assert main([*run, *quick, "--export", str(tmp_path / "net.npz")]) == 0
    out = capsys.readouterr().out
    assert "Data: fashion, 60 training and 20 test images" in out
    (line,) = re.findall(r"^By class: ((?:.*\n  )*.*)$", out, re.MULTILINE)
    shares = dict(part.rsplit(" ", 1) for part in re.split(r",\s+", line))
    assert set(shares) == set(fashion.CLASS_NAMES)
    listed = [float(share) for share in shares.values()]
    assert listed == sorted(listed)
    final = float(re.search(r"^Final test accuracy (\S+)$", out, re.MULTILINE)[1])
    assert np.mean(listed) == pytest.approx(final, abs=1e-3)  # as many images of each class
    (made,) = tmp_path.rglob("best.npz")
    for model in (made.parent, tmp_path / "net.npz"):
        data = [] if model == made.parent else [str(folder)]
        assert main(["evaluate", str(model), *data, "--device", "cpu"]) == 0
        report = capsys.readouterr().out
        assert all(name in report for name in fashion.CLASS_NAMES)
        assert "Data: fashion, 20 test images" in report
    network = PackedNetwork.from_run(made.parent, device="cpu")
    assert tuple(network.classes) == fashion.CLASS_NAMES
    trained = load_model(made.parent, device="cpu")
    assert tuple(PackedNetwork.from_model(trained).classes) == fashion.CLASS_NAMES
    assert list(PackedNetwork.from_model(trained, classes=range(10)).classes) == list(range(10))
    images, labels = pictures(TEST, 1)
    predicted = network.predict(images)
    assert (predicted == np.array(fashion.CLASS_NAMES)[labels]).mean() > 0.7


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_right_answers_by_class(folder, device):
    config = TrainConfig(
        data_dir=str(folder), dataset="fashion", max_steps=9, n_hidden=32, device=device
    )
    trainer = Trainer(config)
    accuracy = trainer.run().final_accuracy
    right, count = right_by_class(trainer.model, trainer.data)
    np.testing.assert_array_equal(count, np.full(10, TEST // 10))
    assert (right <= count).all()
    assert right.sum() / TEST == pytest.approx(accuracy)


def test_recipes():
    recipe = recipes.load("fashion")
    assert recipe.settings["dataset"] == "fashion"
    assert recipes.load(recipe.teachers.recipe).settings["dataset"] == "fashion"


class TestPackage:
    """The folder of Debian's package, whose files need no argument."""

    @pytest.fixture
    def package(self, folder, monkeypatch, tmp_path) -> Path:
        small = {"train_images": (TRAIN, 784), "train_labels": (TRAIN,)}
        small |= {"test_images": (TEST, 784), "test_labels": (TEST,)}
        monkeypatch.setattr(openml, "MEMBERS", small)
        monkeypatch.setenv("CUPYBNN_DATA_DIR", str(tmp_path / "data"))
        where = tmp_path / "fashion-mnist"
        where.mkdir()
        for path in folder.iterdir():
            (where / path.name).write_bytes(path.read_bytes())
        monkeypatch.setattr(fashion, "PACKAGE_FOLDER", str(where))
        return where

    def test_it_is_found(self, package, tmp_path, capsys):
        net = str(tmp_path / "net.npz")
        quick = ["--n_hidden", "8", "--max_steps", "1", "--device", "cpu", "--export", net]
        assert main(["train", "--dataset", "fashion", *quick]) == 0
        captured = capsys.readouterr()
        assert "Data: fashion, 60 training and 20 test images" in captured.out
        assert "Fetching" not in captured.err
        assert not (tmp_path / "data").exists()  # there is no need of a copy
        # A packed network says by its classes what to evaluate it on.
        assert main(["evaluate", net, "--device", "cpu"]) == 0
        assert "Data: fashion, 20 test images" in capsys.readouterr().out

    def test_a_copy_in_the_data_folder_comes_first(self, package, tmp_path, monkeypatch):
        images, labels = pictures(TRAIN, 5)
        tests, wanted = pictures(TEST, 6)
        (tmp_path / "data").mkdir()
        np.savez(
            tmp_path / "data" / fashion.SOURCE.cache_name,
            train_images=images.reshape(TRAIN, 784), train_labels=labels,
            test_images=tests.reshape(TEST, 784), test_labels=wanted,
        )  # fmt: skip
        np.testing.assert_array_equal(load("fashion").test_labels, wanted)

    def test_wrong_files_are_reported_and_passed_over(self, package, monkeypatch):
        monkeypatch.setattr(openml, "fetch", refuse)
        labels = package / "t10k-labels-idx1-ubyte.gz"
        labels.write_bytes(labels.read_bytes()[:-9])
        said: list[str] = []
        with pytest.raises(DataError, match=r"apt install dataset-fashion-mnist"):
            load("fashion", notify=said.append)
        assert "is truncated" in said[0]


def refuse(*arguments):
    raise OSError("no network")


class TestFetching:
    """From files in the form of scikit-learn's cache, with a few small images."""

    SMALL: ClassVar = {
        "train_images": (TRAIN, 784),
        "train_labels": (TRAIN,),
        "test_images": (TEST, 784),
        "test_labels": (TEST,),
    }

    @pytest.fixture
    def home(self, tmp_path, monkeypatch) -> Path:
        """A data folder, and scikit-learn's data home with an ARFF file and its descriptions."""
        import socket

        def refuse(*args, **kwargs):
            raise socket.gaierror(-3, "Temporary failure in name resolution")

        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setenv("CUPYBNN_DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sklearn"))
        monkeypatch.setattr(openml, "MEMBERS", self.SMALL)
        return tmp_path

    @staticmethod
    def cached(home: Path, labels_first: int = 0) -> None:
        parts = [pictures(TRAIN, 0), pictures(TEST, 1)]
        images = np.concatenate([x.reshape(-1, 784) for x, _ in parts])
        labels = np.concatenate([y for _, y in parts])
        labels[:labels_first] = 9
        names = [*(f"pixel{i}" for i in range(1, 785)), "class"]
        kinds = ["real"] * 784 + ["{0,1,2,3,4,5,6,7,8,9}"]
        lines = ["@relation Fashion-MNIST"]
        lines += [f"@attribute {n} {kind}" for n, kind in zip(names, kinds, strict=True)]
        lines += ["@data"]
        lines += [",".join(map(str, [*x, y])) for x, y in zip(images, labels, strict=True)]
        arff = ("\n".join(lines) + "\n").encode()
        root = home / "sklearn/openml/openml.org"
        listed = {"did": 40996, "name": "Fashion-MNIST", "version": 1, "status": "active"}
        described = {
            "id": "40996",
            "name": "Fashion-MNIST",
            "version": "1",
            "description": "",
            "format": "ARFF",
            "status": "active",
            "url": "https://www.openml.org/data/v1/download/18238735/Fashion-MNIST.arff",
            "file_id": "18238735",
            "default_target_attribute": "class",
            "md5_checksum": hashlib.md5(arff).hexdigest(),
        }
        features = [
            {
                "index": str(i),
                "name": n,
                "data_type": "nominal" if n == "class" else "numeric",
                "is_target": str(n == "class").lower(),
                "is_ignore": "false",
                "is_row_identifier": "false",
                "number_of_missing_values": "0",
            }
            for i, n in enumerate(names)
        ]
        api = "api/v1/json/data"
        files = {
            f"{api}/list/data_name/fashion-mnist/limit/2/data_version/1.gz": {
                "data": {"dataset": [listed]}
            },
            f"{api}/40996.gz": {"data_set_description": described},
            f"{api}/features/40996.gz": {"data_features": {"feature": features}},
            f"{api}/qualities/40996.gz": {"data_qualities": {"quality": []}},
        }
        contents = {name: json.dumps(value).encode() for name, value in files.items()}
        contents["data/v1/download/18238735/Fashion-MNIST.arff.gz"] = arff
        for name, content in contents.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(root / name, "wb") as file:
                file.write(content)

    def test_from_scikit_learns_files(self, home):
        self.cached(home)
        said: list[str] = []
        data = load("fashion", notify=said.append)
        assert len(said) == 1
        assert "Fetching Fashion-MNIST" in said[0]
        for part, count, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
            images, labels = pictures(count, seed)
            got = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
            np.testing.assert_array_equal(got[0], images.reshape(count, 784))
            np.testing.assert_array_equal(got[1], labels)
        assert [p.name for p in (home / "data").iterdir()] == ["fashion_mnist.npz"]
        again = load("fashion", notify=said.append)
        assert len(said) == 1
        assert again.class_names == fashion.CLASS_NAMES
        np.testing.assert_array_equal(again.train_images, data.train_images)

    def test_rows_in_another_order_are_noticed(self, home):
        self.cached(home, labels_first=12)
        with pytest.raises(DataError, match="expected 6 train images of each of 10 classes"):
            load("fashion")

    def test_no_network_is_one_message(self, home):
        with pytest.raises(DataError) as caught:
            load("fashion")
        message = str(caught.value)
        assert "Fashion-MNIST cannot be fetched from OpenML: " in message
        assert "name resolution" in message
        assert "a folder with Fashion-MNIST's four IDX files" in message
        assert "\n" not in message
