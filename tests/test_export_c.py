"""A network written as a C header computes what the packed network computes."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from c_programs import PROGRAM_I386, compiled, compiler, network_of, run
from exported import EXACT, NAMES, exact_logits, images, mnist_networks, network

from cupybnn import PackedNetwork, nn
from cupybnn.deploy import c_header
from cupybnn.errors import SettingError

BIT_LOGITS = ("-ffp-contract=off",)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_network(tmp_path, name):
    net = network(name)
    whole = name == "integers"
    program = network_of(net, tmp_path, *BIT_LOGITS)
    logits, best = run(program, images(), np.int32 if whole else np.float32, 7)
    expected = net(images())
    if name in EXACT:
        np.testing.assert_array_equal(logits, expected)
    else:
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(best, expected.argmax(axis=1))


@pytest.mark.parametrize("name", EXACT)
def test_scaled_pixels_are_summed_exactly(tmp_path, name):
    net, pixels = network(name, pixel_max=255), images(255)
    kind = np.int32 if name == "integers" else np.float32
    logits, best = run(network_of(net, tmp_path, *BIT_LOGITS), pixels, kind, 7)
    np.testing.assert_array_equal(logits, exact_logits(net, pixels))
    np.testing.assert_array_equal(best, exact_logits(net, pixels).argmax(axis=1))


def test_every_test_image_of_mnist(tmp_path, mnist_dir):
    networks, pixels = mnist_networks(mnist_dir)
    for name, net in networks.items():
        logits, best = run(network_of(net, tmp_path, *BIT_LOGITS), pixels, np.float32, 10)
        np.testing.assert_array_equal(best, net.predict(pixels))
        if name == "all binary":
            np.testing.assert_array_equal(logits, exact_logits(net, pixels))


@pytest.mark.parametrize("popcount", ["net_popcount(x)", "__builtin_popcountl((unsigned long)(x))"])
def test_both_ways_to_count_bits(tmp_path, popcount):
    net = network("all binary")
    program = network_of(net, tmp_path, f"-DNET_POPCOUNT(x)=(int32_t){popcount}")
    _, best = run(program, images(), np.float32, 7)
    np.testing.assert_array_equal(best, net.predict(images()))


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="a program for 32-bit x86 runs on 64-bit x86 under Linux alone",
)
@pytest.mark.parametrize("name", ["all binary", "integers", "real ends"])
def test_a_32_bit_program_without_a_c_library(tmp_path, name):
    net = network(name)
    net.to_c(tmp_path / "net.h")
    freestanding = (
        "-ffreestanding",
        "-nostdlib",
        "-static",
        "-fno-builtin",
        "-fno-stack-protector",
    )
    target = ("-m32",)
    if "ziglang" in compiler():
        target = ("-target", "x86-linux-none", "-fno-sanitize=all")
    program = compiled(tmp_path, PROGRAM_I386, *target, *freestanding)
    try:
        done = subprocess.run([program], input=images().tobytes(), capture_output=True, check=True)
    except OSError as error:
        pytest.skip(f"this system runs no 32-bit programs: {error}")
    best = np.frombuffer(done.stdout, np.int32)
    np.testing.assert_array_equal(best, net.predict(images()))


@pytest.mark.parametrize("language", ["c", "c++"])
def test_other_dialects_take_it(tmp_path, language):
    if "ziglang" not in compiler() and language == "c++" and not shutil.which("g++"):
        pytest.skip("there is no C++ compiler")
    for name in ("real ends", "integers"):
        text, _ = c_header.header(network(name))
        (tmp_path / "net.h").write_text(text)
        source = tmp_path / f"main.{'c' if language == 'c' else 'cpp'}"
        source.write_text('#include "net.h"\nint f(const uint8_t *x);\n'
                          "int f(const uint8_t *x) { return net_predict(x); }\n")  # fmt: skip
        standard = "-std=c17" if language == "c" else "-std=c++11"
        subprocess.run(
            [*compiler(), standard, "-Wall", "-Wextra", "-Werror", "-x", language, "-c", source,
             "-o", tmp_path / "main.o"],
            check=True, timeout=300,
        )  # fmt: skip


def test_names_of_users_stay_what_they_are(tmp_path):
    names = ["net_a", "NET_B", 'quo"te', "back\\slash", "??/", "*/ end", "Zwölf\n1"]
    layer = nn.BinaryLinear(20, 7, binary_input=False, rng=0)
    model = nn.Sequential(**{"net_x*/é": layer})
    net = PackedNetwork.from_model(model, pixel_max=16, classes=names)
    net.to_c(tmp_path / "net.h", name="digits")
    text = (tmp_path / "net.h").read_text()
    assert "net_x___: 20 pixels" in text
    assert not re.search(r"\bnet_(?!x|a)", text)
    library = compiled(
        tmp_path,
        '#include "net.h"\nconst char *name(int i);\n'
        "const char *name(int i) { return digits_class_name(i); }\n"
        "int predict(const uint8_t *x);\n"
        "int predict(const uint8_t *x) { return digits_predict(x); }\n",
        "-shared",
        "-fPIC",
    )
    found = ctypes.CDLL(str(library))
    found.name.restype = ctypes.c_char_p
    assert [found.name(i).decode() for i in range(7)] == names
    assert found.predict(images()[3].tobytes()) == names.index(net.predict(images()[3].reshape(20)))


class TestText:
    def test_three_layers_of_256_are_42_kilobytes_of_tables(self):
        sizes = (784, 256, 256, 256, 10)
        layers: list[nn.Module] = []
        for i in range(4):
            layers.append(nn.BinaryLinear(sizes[i], sizes[i + 1], binary_input=i > 0, rng=i))
            layers += [nn.BatchNorm(sizes[i + 1]), nn.Sign()] if i < 3 else []
        net = PackedNetwork.from_model(nn.Sequential(*layers).eval(), pixel_max=255)
        text, size = c_header.header(net)
        weights = sum(layer.inputs * layer.units for layer in net.layers)
        assert weights // 8 < size < 45_000
        assert "784-256-256-256-10, written by cupybnn" in text
        assert f"{size:,} bytes of tables" in text.replace("\n *", "")

    @pytest.mark.parametrize(("name", "floating"), [("integers", False), ("all binary", True)])
    def test_floating_point_is_where_the_network_needs_it(self, name, floating):
        code = re.sub(r"/\*.*?\*/", "", c_header.header(network(name))[0], flags=re.DOTALL)
        assert bool(re.search(r"\b(float|double)\b|\d\.\d|<math", code)) == floating

    def test_a_common_scale_of_the_logits_needs_none_to_predict(self):
        code = c_header.header(network("scales"))[0]
        assert "void net_logits(const uint8_t *pixels, float *logits)" in code
        predict = code.partition("int net_predict(const uint8_t *pixels)\n{")[2].partition("\n}")[0]
        assert "int32_t y[NET_CLASSES]" in predict
        assert "float" not in predict


class TestErrors:
    @pytest.mark.parametrize("name", ["", "1st", "_net", "a-b", "né", "x" * 61, "a\n"])
    def test_names(self, tmp_path, name):
        with pytest.raises(SettingError, match="'name' must be a letter and then"):
            network("integers").to_c(tmp_path / "net.h", name=name)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("pixel_max", "words"),
        [(None, "got one that takes numbers"), (65535, "from 1 to 255; got 65535")],
    )
    def test_networks_without_pixels_of_a_byte(self, tmp_path, pixel_max, words):
        with pytest.raises(SettingError, match=words):
            network("integers", pixel_max).to_c(tmp_path / "net.h")
