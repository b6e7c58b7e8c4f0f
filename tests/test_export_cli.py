"""``cupybnn export`` and ``cupybnn train --export`` as a user runs them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

import cupybnn
from cupybnn import PackedNetwork
from cupybnn.cli.main import main

TRAIN = ["train", "--dataset", "digits", "--device", "cpu", "--n_hidden", "40", "--binary"]
TRAIN += ["--first", "--last", "--max_steps", "30", "--eval_every_n", "10"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train briefly; return the run's folder."""
    result = cupybnn.train(
        dataset="digits", binary=True, first=True, last=True, max_steps=30, n_hidden=40,
        device="cpu", eval_every_n=10, log_dir=str(tmp_path_factory.mktemp("logs")),
    )  # fmt: skip
    return result.run_folder


def export(capsys, *words, code=0) -> str:
    """Return what is printed; on a failure, the one line of the error."""
    assert main(["export", *map(str, words)]) == code
    said = capsys.readouterr()
    if code == 0:
        assert said.err == ""
        assert said.out.count("\n") == 1
        return said.out
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.fixture(scope="module")
def net(run):
    return PackedNetwork.from_run(run, device="cpu")


@pytest.fixture(scope="module")
def pixels():
    return cupybnn.data.load("digits").test_images


def test_a_packed_network(run, net, pixels, tmp_path, capsys):
    path = tmp_path / "net.npz"
    line = export(capsys, run, "-o", path)
    size = path.stat().st_size
    assert line.startswith(f"Wrote {path}: packed network, {size:,} bytes, {size / 770:.3f} bits")
    assert line.endswith("(6,160 of 6,160 weights are binary)\n")
    np.testing.assert_array_equal(PackedNetwork.load(path)(pixels), net(pixels))


def test_onnx(run, net, pixels, tmp_path, capsys):
    ort = pytest.importorskip("onnxruntime")
    path = tmp_path / "net.ONNX"
    options = ["--onnx-target", "cuda", "--opset", 15, "--onnx_input", "numbers", "--which=best"]
    options += ["--classes", "zero,one, two,3,4,5,6,7,8,9"]
    line = export(capsys, run, "-o", path, *options)
    assert "ONNX for cuda" in line
    session = ort.InferenceSession(path)
    assert [x.name for x in session.get_inputs()] == ["numbers"]
    names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    assert names[:4] == ["zero", "one", "two", "3"]
    export(capsys, run, "-o", path)
    session = ort.InferenceSession(path)
    logits = session.run(["logits"], {"pixels": pixels.reshape(-1, 8, 8)})[0]
    np.testing.assert_array_equal(logits, net(pixels))


def test_qonnx(run, net, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "net.onnx"
    assert ": QONNX, " in export(capsys, run, "-o", path, "--format", "qonnx")
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("BipolarQuant") == 4 + 3


def test_a_c_header_from_each_kind_of_file(run, tmp_path, capsys):
    header = tmp_path / "digits.h"
    line = export(capsys, run, "-o", header, "--name", "digits")
    assert "C header" in line
    assert "bytes of tables" in line
    text = header.read_text()
    assert "int digits_predict(const uint8_t *pixels)" in text
    export(capsys, run, "-o", tmp_path / "net.npz")
    for source in (run / "newest.npz", tmp_path / "net.npz"):
        export(capsys, source, "-o", tmp_path / "again", "--format", "c", "--name", "digits")
        assert (tmp_path / "again").read_text() == text
    export(capsys, tmp_path / "net.npz", "-o", header, "--classes", "a,b,c,d,e,f,g,h,i,j")
    assert '"a", "b", "c"' in header.read_text()


def test_into_a_pipe_goes_the_file_alone(run, capfd):
    assert main(["export", str(run), "-o", "/dev/stdout", "--format", "c"]) == 0
    said = capfd.readouterr()
    assert said.out.startswith("/*\n")
    assert said.out.endswith("#endif\n")
    assert said.err.startswith("Wrote /dev/stdout: C header")


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["-o", "net.bin"], 2, "must end with .npz, .onnx or .h, which decides its format"),
        (["-o", "net.h", "--opset", "13"], 2, "--opset is for the format onnx; got the format c"),
        (["-o", "net.npz", "--name", "x"], 2, "--name is for the format c; got the format npz"),
        (["-o", "net.h", "--name", "1x"], 2, "'name' must be a letter"),
        (["-o", "net.onnx", "--opset", "9"], 2, "'opset' must be a whole number from 13"),
        (["-o", "no/net.h"], 1, "The folder of the file to export, no/net.h, does not exist"),
        (["-o", ".", "--format", "c"], 1, "Is a directory"),
        (["-o", "net.h", "--classes", "a,b"], 2, "must name each of its 10 outputs; got (2,)"),
        (
            ["-o", "net.h", "--classes", "a,b,c,d,e,f,g,b,i,j"],
            2,
            "must be different names; got 'b' more than once",
        ),
    ],
)
def test_what_cannot_be_written(run, tmp_path, monkeypatch, capsys, words, code, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in export(capsys, run, *words, code=code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--classes", "a,,b"], ["--format", "pt"], ["--opset", "x"]])
def test_a_wrong_command_line(run, capsys, words):
    with pytest.raises(SystemExit) as exit:
        main(["export", str(run), "-o", "net.onnx", *words])
    assert exit.value.code == 2
    assert f"argument {words[0]}" in capsys.readouterr().err


class TestSources:
    def refuse(self, capsys, tmp_path, source) -> str:
        error = export(capsys, source, "-o", tmp_path / "out.h", code=1)
        assert not (tmp_path / "out.h").exists()
        return error

    def test_missing_and_foreign(self, tmp_path, capsys):
        assert "does not exist" in self.refuse(capsys, tmp_path, tmp_path / "none")
        assert "contains no checkpoint" in self.refuse(capsys, tmp_path, tmp_path)
        (tmp_path / "text").write_text("no model")
        assert "text" in self.refuse(capsys, tmp_path, tmp_path / "text")

    def test_damaged(self, run, tmp_path, capsys):
        export(capsys, run, "-o", tmp_path / "net.npz")
        whole = (tmp_path / "net.npz").read_bytes()
        for name, content in (("cut", whole[: len(whole) // 2]), ("bit", bytearray(whole))):
            if name == "bit":
                content[whole.index(b"NUMPY", whole.index(b"data.npy")) + 140] ^= 4
            (tmp_path / "damaged.npz").write_bytes(content)
            self.refuse(capsys, tmp_path, tmp_path / "damaged.npz")

    def test_what_cannot_be_packed(self, tmp_path, capsys):
        result = cupybnn.train(
            dataset="digits", max_steps=1, device="cpu", dtype="float64", log_dir=str(tmp_path)
        )
        assert "parameters in float32" in self.refuse(capsys, tmp_path, result.run_folder)


def test_without_the_package_onnx(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    error = export(capsys, run, "-o", tmp_path / "net.onnx", code=2)
    assert "pip install onnx (the extra onnx)" in error
    # A training that could not end with its file does not begin.
    assert main([*TRAIN, "--export", str(tmp_path / "net.onnx")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "pip install onnx" in said.err


class TestTrain:
    def test_the_trained_network_is_written_at_the_end(self, tmp_path, net, pixels, capsys):
        path = tmp_path / "net.npz"
        assert main([*TRAIN, "--export", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith(f"Wrote {path}: packed network, ")
        assert lines[-2].startswith("Med ex/s")
        np.testing.assert_array_equal(PackedNetwork.load(path)(pixels), net(pixels))

    def test_a_run_that_is_at_its_end_already(self, run, net, pixels, tmp_path, capsys):
        path = tmp_path / "net.npz"
        assert main(["train", "--restore", str(run), "--device", "cpu", "--export", str(path)]) == 0
        said = capsys.readouterr()
        assert "Nothing left to train" in said.err
        assert said.out.startswith(f"Wrote {path}")
        np.testing.assert_array_equal(PackedNetwork.load(path)(pixels), net(pixels))

    @pytest.mark.parametrize(
        ("words", "code", "expected"),
        [
            (["--export", "net.bin"], 2, "must end with .npz, .onnx or .h"),
            (["--export", "no/net.npz"], 1, "does not exist"),
            (["--export", "net.npz", "--dtype", "float64"], 1, "parameters in float32"),
        ],
    )
    def test_what_cannot_be_written_is_known_before(
        self, tmp_path, monkeypatch, capsys, words, code, expected
    ):
        monkeypatch.chdir(tmp_path)
        assert main([*TRAIN, *words]) == code
        said = capsys.readouterr()
        assert expected in said.err
        assert "step" not in said.out
        assert list(tmp_path.iterdir()) == []


def test_odd_values_of_any_option_end_in_a_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    odd = ["", "--", "-1", "nan", "9" * 400, "9" * 5000, "٣", "a\0b", "\udcff", "x" * 5000, "."]
    options = ["--output", "--format", "--which", "--classes", "--onnx_target", "--onnx_input"]
    options += ["--opset", "--name", "model"]
    for number, option in enumerate(options):
        for value in odd[number % 2 :: 2]:
            words = [str(run), "-o", "net.onnx", f"{option}={value}"]
            if option == "model":
                words = ["-o", "net.onnx", "--", value]
            try:
                code = main(["export", *words])
            except SystemExit as error:
                code = error.code
            said = capsys.readouterr()
            assert code in (1, 2), words
            assert "cupybnn export: " in said.err.splitlines()[-1], words
            assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []
