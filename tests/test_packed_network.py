"""A packed network computes what the trained model computes, from fewer bits."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from edits import edit

import cupybnn
from cupybnn import PackedNetwork, nn
from cupybnn.autograd import Tensor, no_grad
from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.layers import PackedLayer, Step
from cupybnn.packed import PackedMatrix, pack

pytestmark = pytest.mark.cpu_kernels


def settle(model: nn.Module, seed: int = 0, features: int = 20) -> nn.Module:
    """Give a model statistics, scales of both signs, and shifts, as after a training."""
    rng = np.random.default_rng(seed)
    for _, module in model.named_modules():
        if isinstance(module, nn.BatchNorm):
            units = module.gamma.size
            module.gamma.write()[...] = rng.normal(size=units)
            module.gamma.write()[rng.integers(units)] = 0
            module.beta.write()[...] = rng.normal(size=units)
            module.mean[...] = 3 * rng.normal(size=units)
            module.variance[...] = rng.random(units) * 9 + 0.1
            module.variance[rng.integers(units)] = 0
    return model.eval()


def hidden(inputs: int, units: int, seed: int, **options) -> list[nn.Module]:
    layer = nn.BinaryLinear(inputs, units, rng=seed, **options)
    return [layer, nn.Dropout(0.7, rng=1), nn.BatchNorm(units), nn.Sign()]


MODELS = {
    "real ends": lambda: nn.Sequential(
        nn.Linear(20, 33, rng=0), nn.BatchNorm(33), nn.Sign(),
        *hidden(33, 70, 1), nn.BinaryLinear(70, 41, rng=2), nn.BatchNorm(41), nn.Linear(41, 7),
    ),
    "all binary": lambda: nn.Sequential(
        *hidden(20, 65, 0, binary_input=False), *hidden(65, 64, 1),
        nn.BinaryLinear(64, 7, rng=2), nn.BatchNorm(7),
    ),
    "scales": lambda: nn.Sequential(
        nn.BinaryLinear(20, 40, binary_input=False, rng=0), nn.Scale(0.05), nn.Sign(),
        nn.SignDropout(0.8, rng=5), nn.BinaryLinear(40, 40, rng=1, ste="magnitude_aware_sign"),
        nn.Scale(-0.05), nn.Sign(), nn.BinaryLinear(40, 7, rng=2), nn.Scale(0.3),
    ),
    "biases": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(20, 30, bias=True, rng=0), nn.ReLU(),
        nn.BinaryLinear(30, 30, bias=True, binary_input=False, rng=1), nn.Sign(),
        nn.Identity(), nn.BinaryLinear(30, 30, bias=True, rng=2), nn.BatchNorm(30), nn.Sign(),
        nn.Linear(30, 7, bias=True, rng=3),
    ),
    "full precision": lambda: nn.Sequential(
        nn.Linear(20, 30, rng=0), nn.BatchNorm(30), nn.ReLU(), nn.Dropout(0.5),
        nn.Sequential(nn.Linear(30, 7, rng=1)),
    ),
}  # fmt: skip


def made(name: str, xp=np) -> nn.Module:
    model = MODELS[name]()
    rng = np.random.default_rng(4)
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.size > 1:
            parameter.write()[...] = rng.normal(size=parameter.shape)
    return settle(model).to("cpu" if xp is np else "cuda")


def inputs(xp=np, count: int = 200) -> object:
    x = np.random.default_rng(1).normal(size=(count, 20)).astype(np.float32)
    return xp.asarray(x)


def host(x) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()


def evaluated(model: nn.Module, x) -> np.ndarray:
    with no_grad():
        return model(Tensor(x)).data


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


def test_logits_are_those_of_the_model_bit_for_bit(xp, name):
    model, x = made(name, xp), inputs(xp)
    net = PackedNetwork.from_model(model)
    got, expected = net(x), evaluated(model, x)
    assert type(got) is type(expected)
    assert got.dtype == np.float32
    if xp is not np and name == "biases":  # real weights meet signs: summed otherwise on a GPU
        np.testing.assert_allclose(host(got), host(expected), 1e-5, 2e-6)
    else:
        np.testing.assert_array_equal(host(got), host(expected))


def test_every_activation_is_that_of_the_model(name):
    model, x = made(name), inputs()
    net = PackedNetwork.from_model(model)
    with no_grad():
        stages = dict(nn.stages(model, Tensor(x)))
    for layer in net.layers[:-1]:
        x = layer(x)
        values = x.unpack(np.float32) if isinstance(x, PackedMatrix) else x
        np.testing.assert_array_equal(values, stages[f"{layer.name}/activation"].data)


def test_a_file_brings_back_the_same_network(tmp_path, name):
    net = PackedNetwork.from_model(made(name), classes="abcdefg", image_shape=(4, 5), pixel_max=255)
    path = tmp_path / "net.npz"
    net.save(path)
    again = PackedNetwork.load(path)
    np.testing.assert_array_equal(again(inputs()), net(inputs()))
    assert again.inputs == net.inputs
    assert list(again.classes) == list("abcdefg")
    assert repr(again) == repr(net)
    assert str(again.summary()) == str(net.summary())


def test_the_summary_counts_bits():
    model = nn.Sequential(*hidden(20, 65, 0, binary_input=False), nn.BinaryLinear(65, 7, rng=2))
    summary = PackedNetwork.from_model(model.eval()).summary()
    assert summary.total("one_bit") == 20 * 65 + 65 * 7
    assert summary.total("binary_products") == 65 * 7
    assert "binary" in str(summary)


def layer_of(inputs: int, units: int, product: str, last: bool = False) -> PackedLayer:
    """Return a layer with random weights and thresholds as batch norm makes them."""
    rng = np.random.default_rng(units)
    kept = rng.random((inputs, units), np.float32)
    threshold = rng.normal(0, inputs**0.5, units)
    rest = {
        "threshold": threshold.astype(np.int32 if product == "bits" else np.float32),
        "flip": rng.random(units) < 0.5,
    }
    if last:
        rest = {"steps": (Step("multiply", kept[0]), Step("add", kept[1]))}
    if product != "real":
        kept = pack(kept - 0.5, axis=-2)
    return PackedLayer(f"layer{units}", product, kept, **rest)


@pytest.mark.parametrize("units", [512, 4096])
def test_a_file_takes_at_most_5_percent_more_than_its_weights(tmp_path, units):
    """A bit for each binary weight, 32 for each real one."""
    ends = {p: (layer_of(784, units, p), layer_of(units, 10, q, last=True))
            for p, q in (("signs", "bits"), ("real", "real"))}  # fmt: skip
    middle = [layer_of(units, units, "bits")] * 2
    for product, (first, last) in ends.items():
        layers = [first, *middle, last]
        net = PackedNetwork(layers, InputSpec(784, (28, 28), 255))
        net.save(tmp_path / "net.npz")
        binary = sum(layer.inputs * layer.units for layer in layers if layer.binary)
        real = sum(layer.inputs * layer.units for layer in layers if not layer.binary)
        assert real == (0 if product == "signs" else 794 * units)
        assert (tmp_path / "net.npz").stat().st_size * 8 <= 1.05 * (binary + 32 * real)
        again = PackedNetwork.load(tmp_path / "net.npz")
        for layer, found in zip(layers, again.layers, strict=True):
            assert found.product == layer.product
            np.testing.assert_array_equal(found.threshold, layer.threshold)
            np.testing.assert_array_equal(found.flip, layer.flip)


@pytest.mark.parametrize(
    ("inputs", "threshold", "kind"),
    [
        (100, (-100, 0, 101, 1), "int8"),
        (100, (-(2**31), 2**24, 100, -100), "int8"),  # always and never, of any product
        (127, (128, 0, 0, 0), "int16"),
        (300, (5, 100, 7, 8), "int8"),
        (300, (-129, 0, 0, 0), "int16"),
        (40_000, (-(2**31), 32_767, -5, 9), "int32"),
        (40_000, (-32_768, 32_767, -5, 9), "int16"),
    ],
)
def test_thresholds_take_the_smallest_type_that_holds_them(tmp_path, inputs, threshold, kind):
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((inputs, 4)) < 0.5, -1, 1).astype(np.int8)
    weight[:, 0] = 1
    flip = np.array([False, True, False, True])
    first = PackedLayer("first", "real", np.eye(2, inputs, dtype=np.float32), (),
                        np.zeros(inputs, np.float32), np.zeros(inputs, bool))  # fmt: skip
    layer = PackedLayer("a", "bits", pack(weight, axis=-2), (), np.array(threshold, np.int32), flip)
    last = PackedLayer("last", "bits", pack(np.ones((4, 1)), axis=-2))
    net = PackedNetwork([first, layer, last], InputSpec(2))
    net.save(tmp_path / "net.npz")
    with np.load(tmp_path / "net.npz") as file:
        header = json.loads(file["header"].tobytes())
    assert header["layers"][1]["threshold"] == kind
    again = PackedNetwork.load(tmp_path / "net.npz")
    x = np.where(rng.random((20, inputs)) < 0.5, -1, 1).astype(np.int8)
    x[0], x[1] = 1, -1  # the greatest and the least product
    expected = ((x.astype(int) @ weight.astype(int)) >= threshold) != flip
    assert again.layers[1].threshold.dtype == np.int32
    for each in (net, again):
        np.testing.assert_array_equal(each.layers[1](pack(x)).unpack(bool), expected)


def as_version_1(net: PackedNetwork) -> dict[str, np.ndarray]:
    """Return the entries of a file of the first version, which had one for each array."""
    layers, entries = [], {}
    for i, layer in enumerate(net.layers):
        layers.append({
            "name": layer.name, "product": layer.product, "inputs": layer.inputs,
            "units": layer.units, "steps": [step.kind for step in layer.steps],
            "threshold": layer.threshold is not None,
        })  # fmt: skip
        if layer.binary:
            entries[f"{i}.bits"] = np.packbits(layer.weight.unpack(bool))
        for name, array in layer.arrays():
            entries[f"{i}.{name}"] = np.packbits(array) if name == "flip" else array
    header = {
        "format": "cupybnn.PackedNetwork", "version": 1, "features": net.inputs.features,
        "image_shape": net.inputs.image_shape, "pixel_max": net.inputs.pixel_max,
        "classes": net.classes.tolist(), "layers": layers,
    }  # fmt: skip
    return {"header": np.frombuffer(json.dumps(header).encode(), np.uint8), **entries}


def test_files_of_the_first_version_are_still_read(tmp_path, name):
    net = PackedNetwork.from_model(made(name), classes="abcdefg", image_shape=(4, 5), pixel_max=255)
    np.savez(tmp_path / "net.npz", **as_version_1(net))
    again = PackedNetwork.load(tmp_path / "net.npz")
    np.testing.assert_array_equal(again(inputs()), net(inputs()))
    assert again.inputs == net.inputs
    assert list(again.classes) == list("abcdefg")
    assert repr(again) == repr(net)


class TestPredicting:
    net = PackedNetwork.from_model(made("all binary"), image_shape=(4, 5), pixel_max=16)

    def test_probabilities_and_classes(self, xp):
        net, x = self.net.to("cpu" if xp is np else "cuda"), inputs(xp)
        logits, proba = host(net(x)).astype(np.float64), host(net.predict_proba(x))
        expected = np.exp(logits - logits.max(1, keepdims=True))
        np.testing.assert_allclose(proba, expected / expected.sum(1, keepdims=True), 1e-5, 1e-30)
        np.testing.assert_array_equal(host(net.predict(x)), logits.argmax(1))
        assert type(net.predict(x)) is type(x)

    def test_names_of_classes(self):
        named = PackedNetwork.from_model(made("all binary"), classes=[f"no. {i}" for i in range(7)])
        best = named(inputs()).argmax(axis=1)
        assert named.predict(inputs()).tolist() == [f"no. {i}" for i in best]
        assert named.predict(inputs()[0]) == f"no. {best[0]}"

    def test_pixels_images_and_single_inputs(self):
        pixels = np.random.default_rng(3).integers(0, 17, (9, 4, 5)).astype(np.uint8)
        scaled = np.multiply(pixels.reshape(9, 20), np.float32(1 / 16), dtype=np.float32)
        expected = self.net(scaled)
        for x in (pixels, pixels.reshape(9, 20), pixels.astype(np.int64), scaled.reshape(9, 4, 5)):
            np.testing.assert_array_equal(self.net(x), expected)
        for x in (pixels[2], pixels[2].reshape(-1), scaled[2].tolist()):
            np.testing.assert_array_equal(self.net(x), expected[2])
        assert self.net(pixels[:0]).shape == (0, 7)

    def test_tensors_of_other_libraries_come_back_as_such(self):
        torch = pytest.importorskip("torch")
        x = torch.from_numpy(inputs())
        got = self.net(x)
        assert isinstance(got, torch.Tensor)
        np.testing.assert_array_equal(got.numpy(), self.net(inputs()))
        assert isinstance(self.net.predict(x), torch.Tensor)

    def test_many_inputs_go_through_in_parts(self):
        x = np.random.default_rng(3).integers(0, 17, (3000, 20)).astype(np.uint8)
        np.testing.assert_array_equal(self.net(x)[2500:], self.net(x[2500:]))

    @pytest.mark.parametrize(
        ("x", "error", "words"),
        [
            (np.zeros((3, 21)), ValueError, r"\(batch, 20\) or \(batch, 4, 5\).*got \(3, 21\)"),
            (np.zeros((2, 3, 20)), ValueError, "must have shape"),
            (np.full((3, 20), np.nan), ValueError, "must be finite; got nan in row 0, feature 0"),
            (np.zeros((3, 20), complex), TypeError, "got dtype complex128"),
            (np.zeros((3, 20), bool), TypeError, "got dtype bool"),
            ("abc", TypeError, "got dtype <U3"),
        ],
    )  # fmt: skip
    def test_bad_inputs(self, x, error, words):
        with pytest.raises(error, match=words):
            self.net(x)

    def test_whole_numbers_need_a_scale(self):
        with pytest.raises(TypeError, match="trained on numbers, not on pixels; got int64"):
            PackedNetwork.from_model(made("all binary"))(np.zeros((1, 20), int))

    @pytest.mark.gpu
    def test_device(self):
        import cupy

        x = inputs(cupy)
        with pytest.raises(TypeError, match=r"on cpu; got a cupy\.ndarray on cuda:0"):
            self.net(x)
        on_gpu = self.net.to("cuda")
        with pytest.raises(TypeError, match=r"on cuda:0; got a numpy\.ndarray on cpu"):
            on_gpu(inputs())
        assert on_gpu.to("cuda") is on_gpu
        np.testing.assert_array_equal(on_gpu.to("cpu")(inputs()), self.net(inputs()))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(4, 3), "must be an nn.Sequential"),
        (nn.Sequential(nn.ReLU()), "at least one linear layer"),
        (nn.Sequential(nn.Tanh(), nn.Linear(4, 3)), "got Tanh after the input"),
        (nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()), "got Sigmoid after 0"),
        (nn.Sequential(nn.Linear(4, 3), nn.Sign()), "must end with numbers"),
        (nn.Sequential(nn.BinaryLinear(4, 3)), "input of 0 must be signs"),
        (nn.Sequential(nn.Linear(4, 3, dtype="float64")), "got 0.weight in float64"),
        (nn.Sequential(nn.Linear(4, 3), nn.Sign(), nn.BatchNorm(3), nn.Linear(3, 2)), "sign of 0"),
    ],
)
def test_what_cannot_be_packed_is_named(model, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        PackedNetwork.from_model(model)


@pytest.mark.parametrize("model", [None, 3, "runs/1", nn.Linear])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match=r"must be a cupybnn\.nn\.Module; got .* from_run, for"):
        PackedNetwork.from_model(model)


@pytest.fixture(scope="module", params=[1, 2])
def entries(request, tmp_path_factory) -> dict[str, np.ndarray]:
    """Give the entries of a file of either version."""
    path = tmp_path_factory.mktemp("net") / "net.npz"
    net = PackedNetwork.from_model(made("real ends"), pixel_max=255)
    if request.param == 1:
        return as_version_1(net)
    net.save(path)
    with np.load(path) as loaded:
        return {name: loaded[name] for name in loaded.files}


class TestHostileFiles:
    def refuse(self, path) -> str:
        with pytest.raises(ValueError, match="cannot be read as a PackedNetwork") as caught:
            PackedNetwork.load(path)
        return str(caught.value)

    def test_truncated_and_flipped(self, tmp_path, entries):
        path = tmp_path / "net.npz"
        np.savez(path, **entries)
        whole = path.read_bytes()
        expected = PackedNetwork.load(path)(inputs())
        rng = np.random.default_rng(0)
        for _ in range(300):
            damaged = bytearray(whole)
            if rng.random() < 0.3:
                damaged = damaged[: rng.integers(len(whole))]
            else:
                damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            try:
                net = PackedNetwork.load(path)
            except ValueError as error:
                assert "cannot be read as a PackedNetwork" in str(error)  # noqa: PT017
            else:  # a bit that says nothing, such as a date
                np.testing.assert_array_equal(net(inputs()), expected)

    def test_edited_headers(self, tmp_path, entries):
        path = tmp_path / "net.npz"
        rng = np.random.default_rng(0)
        for _ in range(300):
            header = json.loads(entries["header"].tobytes())
            edit(header, rng)
            text = json.dumps(header).encode("utf-8", "surrogatepass")
            np.savez(path, **{**entries, "header": np.frombuffer(text, np.uint8)})
            try:
                net = PackedNetwork.load(path)
            except ValueError as error:
                assert "cannot be read as a PackedNetwork" in str(error)  # noqa: PT017
            else:
                assert net(inputs()).shape == (200, 7)

    @pytest.mark.parametrize(
        ("name", "array", "words"),
        [
            ("header", np.frombuffer(b"{}", np.uint8), "lacks format"),
            ("1.bits", np.zeros(3, np.uint8), "must be uint8 of shape"),
            ("0.weight", np.zeros((20, 33)), "must be float32 of shape"),
            ("1.threshold", np.zeros(70, np.int64), "must be int32 of shape"),
            ("0.threshold", np.array([None] * 33), "'0.threshold'"),
            ("data", np.zeros(3, np.uint8), "must be uint8 of shape"),
            ("data", np.zeros(3, np.float32), "must be uint8 of shape"),
        ],
    )
    def test_arrays_of_another_kind(self, tmp_path, entries, name, array, words):
        if name not in entries:
            pytest.skip("an entry of the other version")
        path = tmp_path / "net.npz"
        np.savez(path, **{**entries, name: array})
        assert words in self.refuse(path)

    def test_missing_and_foreign(self, tmp_path, entries):
        path = tmp_path / "net.npz"
        gone = "1.bits" if "1.bits" in entries else "data"
        np.savez(path, **{k: v for k, v in entries.items() if k != gone})
        assert f"{gone!r}: it is missing" in self.refuse(path)
        cupybnn.pack(np.ones((3, 4))).save(path)
        assert "'header'" in self.refuse(path)
        path.write_text("no such thing")
        assert "begins with" in self.refuse(path)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("header.npy", b"\x93NUMPY")
        self.refuse(path)

    def test_bits_beyond_the_end(self, tmp_path, entries):
        path = tmp_path / "net.npz"
        # The flips of layer 0 follow its weights and thresholds: 33 of them end in a byte of one.
        name, at = ("0.flip", -1) if "0.flip" in entries else ("data", 4 * 20 * 33 + 4 * 33 + 4)
        flip = entries[name].copy()
        flip[at] |= 1
        np.savez(path, **{**entries, name: flip})
        assert "must end with zeros" in self.refuse(path)

    @pytest.mark.parametrize(
        ("layer", "threshold", "words"),
        [
            (0, "int16", "layers[0].threshold must be of float"),
            (1, "float32", "layers[1].threshold must be of int"),
            (1, "int64", "layers[1].threshold must be"),
            (1, True, "layers[1].threshold must be"),
        ],
    )
    def test_thresholds_of_another_kind(self, tmp_path, layer, threshold, words):
        path = tmp_path / "net.npz"
        PackedNetwork.from_model(made("real ends")).save(path)
        with np.load(path) as loaded:
            entries = dict(loaded)
        header = json.loads(entries["header"].tobytes())
        header["layers"][layer]["threshold"] = threshold
        entries["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        np.savez(path, **entries)
        assert words in self.refuse(path)


def test_a_run_becomes_a_network(tmp_path):
    result = cupybnn.train(
        dataset="digits", binary=True, xnor=True, max_steps=30, n_hidden=64, device="cpu",
        log_dir=str(tmp_path), average="ema", eval_every_n=10,
    )  # fmt: skip
    net = PackedNetwork.from_run(result.run_folder, device="cpu")
    data = cupybnn.data.load("digits")
    same = net.predict(data.test_images) == data.test_labels
    assert abs(same.mean() - result.final_accuracy) < 1e-9
    assert net.inputs.image_shape == (8, 8)
    assert net.inputs.pixel_max == 16
    PackedNetwork.from_run(result.run_folder, which="best", device="cpu")


def test_every_test_image_of_mnist(mnist_dir):
    data = cupybnn.data.load("mnist", mnist_dir)
    trainer = cupybnn.Trainer(
        cupybnn.TrainConfig(
            binary=True, xnor=True, n_hidden=128, max_steps=60, device="cpu", first=True, last=True
        ),
        data=data,
    )
    trainer.run()
    net = PackedNetwork.from_model(trainer.model, pixel_max=255, image_shape=(28, 28))
    images, model = data.test_images, trainer.model.eval()
    for start in range(0, 10_000, 1000):
        part = images[start : start + 1000]
        x = trainer.data.scale(part)
        with no_grad():
            stages = dict(nn.stages(model, Tensor(x)))
        np.testing.assert_array_equal(net(part), stages["logits"].data)
        for layer in net.layers[:-1]:
            x = layer(x)
            activation = stages[f"{layer.name}/activation"].data
            np.testing.assert_array_equal(x.unpack(np.float32), activation)


def test_the_model_of_a_run_is_packed_with_the_scaling_of_its_pixels():
    result = cupybnn.train(dataset="digits", binary=True, n_hidden=32, max_steps=5)
    digits = cupybnn.data.load("digits")
    net = PackedNetwork.from_model(result.model)
    scaled = result.model.trained_on.scale(digits.test_images)
    logits = result.model(cupybnn.Tensor(scaled)).numpy()
    assert (net.to("cpu").predict(digits.test_images) == logits.argmax(axis=1)).all()
    assert repr(result).startswith("TrainResult(dataset='digits', steps=5, final_accuracy=0.")
