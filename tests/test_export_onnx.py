"""A network written as ONNX computes what the packed network computes."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from edits import edit
from exported import EXACT, NAMES, exact_logits, images, mnist_networks, network

from cupybnn import PackedNetwork, nn
from cupybnn.deploy import c_header, onnx_file
from cupybnn.errors import SettingError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
reference = pytest.importorskip("onnx.reference")

NEWEST = min(onnx.defs.onnx_opset_version(), 21)  # that every onnxruntime of late knows


def session(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def runners(model):
    """Give the two programs that run a model."""
    yield session(model)
    yield reference.ReferenceEvaluator(model)


def compare(model, given: dict[str, np.ndarray], expected: np.ndarray, exact: bool) -> None:
    onnx.checker.check_model(model, full_check=True)
    for runner in runners(model):
        for count in (len(expected), 1):
            part = {name: x[:count] for name, x in given.items()}
            logits, probabilities, best = runner.run(None, part)
            assert logits.dtype == np.float32
            if exact:
                np.testing.assert_array_equal(logits, expected[:count])
            else:
                np.testing.assert_allclose(logits, expected[:count], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(best, expected[:count].argmax(axis=1))
            shifted = np.exp(expected[:count] - expected[:count].max(axis=1, keepdims=True))
            np.testing.assert_allclose(
                probabilities, shifted / shifted.sum(axis=1, keepdims=True), rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("target", onnx_file.TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_pixels_give_the_logits_of_the_network(name, target):
    net = network(name)
    model = onnx_file.model(net, target=target)
    compare(model, {"pixels": images()}, net(images()), exact=name in EXACT)


@pytest.mark.parametrize("target", onnx_file.TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_give_the_logits_of_the_network(name, target):
    net = network(name, pixel_max=None)
    x = images().reshape(-1, 20) * np.float32(1 / 16)
    model = onnx_file.model(net, target=target, opset=NEWEST)
    assert [value.name for value in model.graph.input] == ["numbers"]
    compare(model, {"numbers": x}, net(x), exact=name in EXACT)


@pytest.mark.parametrize("target", onnx_file.TARGETS)
@pytest.mark.parametrize("name", EXACT)
def test_scaled_pixels_are_summed_exactly(name, target):
    net, pixels = network(name, pixel_max=255), images(255)
    model = onnx_file.model(net, target=target)
    compare(model, {"pixels": pixels}, exact_logits(net, pixels), exact=True)


def test_every_test_image_of_mnist(mnist_dir):
    networks, pixels = mnist_networks(mnist_dir)
    for name, net in networks.items():
        expected = net(pixels)
        logits, _, best = session(onnx_file.model(net)).run(None, {"pixels": pixels})
        np.testing.assert_array_equal(best, net.predict(pixels))
        if name == "all binary":
            np.testing.assert_array_equal(logits, exact_logits(net, pixels))
        # A sum within a rounding error of its threshold may become another sign.
        assert np.isclose(logits, expected, rtol=1e-4, atol=1e-4).all(axis=1).mean() > 0.999
        part = reference.ReferenceEvaluator(onnx_file.model(net))
        np.testing.assert_allclose(
            part.run(None, {"pixels": pixels[:500]})[0], logits[:500], rtol=1e-4, atol=1e-4
        )


def test_wide_layers_on_cuda_are_products_that_float16_or_float32_hold():
    for inputs, kind in ((2048, onnx.TensorProto.FLOAT16), (2049, onnx.TensorProto.FLOAT)):
        binary = nn.BinaryLinear(inputs, 7, rng=0)
        net = PackedNetwork.from_model(
            nn.Sequential(nn.Linear(20, inputs, rng=1), nn.Sign(), binary, nn.Sign(),
                          nn.BinaryLinear(7, 7, rng=2)),
        )  # fmt: skip
        # Thresholds on either side of what can be reached, and at all that can; among the products
        # is the greatest, of unit 5.
        net.layers[1].threshold[...] = [
            -(2**31), -inputs, 1 - inputs, 0, inputs - 1, inputs, 2**30
        ]  # fmt: skip
        net.layers[0].weight[...] = 0
        net.layers[0].weight[0] = np.where(binary.weight.data[:, 5] >= 0, 1, -1)
        model = onnx_file.model(net, target="cuda")
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        assert types["2/product"] == kind
        x = np.zeros((2, 20), np.float32)
        x[:, 0] = 1, -1
        compare(model, {"numbers": x}, net(x), exact=True)


@pytest.fixture(scope="module")
def net():
    net = network("real ends")
    return PackedNetwork(net.layers, net.inputs, [f"n° {i}" for i in range(7)])


@pytest.fixture(scope="module")
def model(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    net.to_onnx(path)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path)


class TestFile:
    def test_names_and_shapes(self, model):
        def shapes(values):
            found = {}
            for value in values:
                shape = value.type.tensor_type.shape.dim
                found[value.name] = [d.dim_param or d.dim_value for d in shape]
            return found

        assert shapes(model.graph.input) == {"pixels": ["batch", 4, 5]}
        assert shapes(model.graph.output) == {
            "logits": ["batch", 7],
            "probabilities": ["batch", 7],
            "class_index": ["batch"],
        }
        assert shapes(model.graph.value_info)["3/at_least"] == ["batch", 70]
        assert all(node.name == node.output[0] for node in model.graph.node)

    def test_opset_and_metadata(self, model):
        assert [(x.domain, x.version) for x in model.opset_import] == [("", 13)]
        assert model.ir_version == 7
        assert model.producer_name == "cupybnn"
        props = {p.key: p.value for p in model.metadata_props}
        assert json.loads(props["classes"]) == [f"n° {i}" for i in range(7)]
        assert json.loads(props["pixel_max"]) == 16
        assert json.loads(props["image_shape"]) == [4, 5]
        assert props["input"] == "pixels"

    @pytest.mark.parametrize("target", onnx_file.TARGETS)
    def test_onnxruntime_unpacks_the_weights_when_it_loads(self, net, tmp_path, target):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        model = onnx_file.model(net, target=target).SerializeToString()
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
        kinds = [node.op_type for node in nodes]
        assert kinds.count("MatMulInteger") == (2 if target == "cpu" else 0)
        assert not {"BitShift", "Slice", "Reshape"} & set(kinds)
        # A CPU multiplies no float16: a cast is inserted, and of the weights nothing is left.
        made = {output for node in nodes for output in node.output if not output.startswith("Ins")}
        assert not [name for name in made if "/weight" in name or "/bits" in name]

    def test_layers_of_one_name(self, net):
        from dataclasses import replace

        same = [replace(layer, name="fc") for layer in net.layers]
        model = onnx_file.model(PackedNetwork(same, net.inputs))
        compare(model, {"pixels": images()}, net(images()), exact=False)

    def test_it_is_the_same_file_each_time(self, net, tmp_path):
        for name in "ab":
            net.to_onnx(tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_binary_weight_takes_a_bit(tmp_path):
    sizes = (784, 1024, 1024, 10)
    layers: list[nn.Module] = []
    for i in range(3):
        layers.append(nn.BinaryLinear(sizes[i], sizes[i + 1], binary_input=i > 0, rng=i))
        layers.append(nn.BatchNorm(sizes[i + 1]))
        layers += [nn.Sign()] * (i < 2)
    net = PackedNetwork.from_model(nn.Sequential(*layers).eval(), pixel_max=255)
    net.to_onnx(tmp_path / "net.onnx")
    weights = sum(layer.inputs * layer.units for layer in net.layers)
    # Thresholds and the graph weigh four times as much as with 4096 units.
    assert (tmp_path / "net.onnx").stat().st_size * 8 <= 1.07 * weights


class TestErrors:
    net = network("all binary")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"target": "tpu"}, "'target' must be one of cpu, cuda; got 'tpu'"),
            ({"inputs": "images"}, "'inputs' must be one of pixels, numbers; got 'images'"),
            ({"opset": 12}, "'opset' must be a whole number from 13 to .*; got 12"),
            ({"opset": 10_000}, "got 10000"),
            ({"opset": True}, "got True"),
            ({"opset": 13.5}, "got 13.5"),
        ],
    )
    def test_arguments(self, tmp_path, arguments, words):
        with pytest.raises(SettingError, match=words):
            self.net.to_onnx(tmp_path / "net.onnx", **arguments)
        assert list(tmp_path.iterdir()) == []

    def test_pixels_that_there_are_none_of(self):
        with pytest.raises(SettingError, match="got one that takes numbers"):
            onnx_file.model(network("all binary", None), inputs="pixels")
        with pytest.raises(SettingError, match=r"fit in a byte.* got 65535"):
            onnx_file.model(network("all binary", 65535), inputs="pixels")
        model = onnx_file.model(network("all binary", 65535))
        assert model.graph.input[0].name == "numbers"

    def test_without_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnx", None)
        with pytest.raises(SettingError, match=r"pip install onnx \(the extra onnx\)"):
            self.net.to_onnx(tmp_path / "net.onnx")


@pytest.mark.parametrize("name", ["real ends", "all binary"])
def test_damaged_networks_that_can_be_read_are_written_or_refused(tmp_path, name):
    network(name).save(tmp_path / "net.npz")
    with np.load(tmp_path / "net.npz") as loaded:
        entries = {name: loaded[name] for name in loaded.files}
    rng = np.random.default_rng(0)
    written = 0
    for number in range(100):
        damaged = dict(entries)
        if number % 2:
            header = json.loads(entries["header"].tobytes())
            edit(header, rng)
            text = json.dumps(header).encode("utf-8", "surrogatepass")
            damaged["header"] = np.frombuffer(text, np.uint8)
        else:
            key = list(entries)[1 + rng.integers(len(entries) - 1)]
            damaged[key] = entries[key].copy()
            octets = damaged[key].view(np.uint8).reshape(-1)
            octets[rng.integers(octets.size, size=5)] = rng.choice([0, 127, 128, 255], 5)
        np.savez(tmp_path / "net.npz", **damaged)
        try:
            net = PackedNetwork.load(tmp_path / "net.npz")
            header = c_header.header(net)[0]
            assert not re.search("nan|inf", header.partition("#endif")[2])
            for target in onnx_file.TARGETS:
                onnx.checker.check_model(onnx_file.model(net, target=target))
        except SettingError:
            continue
        except ValueError as error:
            assert "cannot be read as a PackedNetwork" in str(error)  # noqa: PT017
            continue
        written += 1
    assert written > 25
