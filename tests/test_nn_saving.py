"""Models in files."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from cupybnn import nn
from cupybnn.errors import CheckpointError
from cupybnn.npz import NpzFile


def make(rng=0, dtype="float32", classes=3):
    return nn.Sequential(
        nn.Dropout(0.5, rng=rng),
        nn.Linear(4, 5, rng=rng, dtype=dtype),
        norm=nn.BatchNorm(5, dtype=dtype),
        sign=nn.Sign(),
        out=nn.BinaryLinear(5, classes, bias=True, rng=rng, dtype=dtype),
    )


def contents(model):
    return {name: (a.dtype, a.tobytes()) for name, a in model.state_dict().items()}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model"
    nn.save(make(), path)
    return path


def rewrite(path, **changes):
    """Write the file anew with other members; None leaves one out."""
    with np.load(path) as loaded:
        members = {name: loaded[name] for name in loaded.files} | changes
    with open(path, "wb") as file:
        np.savez(file, **{k: v for k, v in members.items() if v is not None})


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = make(1)
    nn.save(model, "~/model.npz")
    assert (tmp_path / "model.npz").exists()
    assert contents(nn.load(make(2), "~/model.npz")) == contents(model)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_round_trip(xp, tmp_path, dtype):
    model = make(0, dtype).to("cpu" if xp is np else "cuda")
    model[0].random.next()
    model[1].weight.data[0, 0] = np.nan
    path = tmp_path / "a folder" / "model.npz"
    path.parent.mkdir()
    nn.save(model, path)
    other = make(1, dtype).to("cpu" if xp is np else "cuda")
    assert nn.load(other, str(path)) is other
    assert contents(other) == contents(model)
    state = nn.read_state(path)
    assert {k: (a.dtype, a.tobytes()) for k, a in state.items()} == contents(model)


def test_a_buffer_that_npz_files_do_not_know(tmp_path):
    model = make()
    model.norm.mean = model.norm.mean.astype(ml_dtypes.bfloat16)
    with pytest.raises(TypeError, match=r"'norm.mean' is bfloat16. Keep it in float32"):
        nn.save(model, tmp_path / "model.npz")
    assert not list(tmp_path.iterdir())


def test_the_file_has_the_given_name_and_is_no_pickle(saved):
    assert [p.name for p in saved.parent.iterdir()] == ["model"]
    with np.load(saved, allow_pickle=False) as loaded:
        assert "array/1.weight" in loaded.files


def test_saving_again_replaces_and_a_failure_does_not(saved, monkeypatch):
    before = contents(nn.load(make(9), saved))
    monkeypatch.setattr(np, "savez", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(CheckpointError, match=r"model file .*model cannot be written: full"):
        nn.save(make(1), saved)
    monkeypatch.undo()
    assert contents(nn.load(make(9), saved)) == before
    nn.save(make(1), saved)
    assert contents(nn.load(make(9), saved)) == contents(make(1))
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_mismatches_are_listed_and_nothing_is_changed(saved):
    model = make(5, classes=2)
    model.append(nn.Scale(), "scale")
    before = contents(model)
    with pytest.raises(CheckpointError, match="The state does not match this Sequential") as caught:
        nn.load(model, saved)
    for line in (
        "missing: scale.factor",
        "out.weight: must be (5, 2) float32, is (5, 3) float32",
        "out.bias: must be (2,) float32, is (3,) float32",
    ):
        assert line in str(caught.value)
    assert contents(model) == before


def test_a_part(saved):
    head = nn.Sequential(out=nn.BinaryLinear(5, 3, bias=True, rng=9))
    nn.load(head, saved, strict=False)
    np.testing.assert_array_equal(head.out.weight.data, make().out.weight.data)


def test_arguments():
    with pytest.raises(TypeError, match=r"'model' of nn.load must be a Module; .*read_state\(path"):
        nn.load("model.npz", make())
    with pytest.raises(TypeError, match=r"'model' of nn.save must be a Module; got dict"):
        nn.save(make().state_dict(), "model.npz")


def test_files_that_are_not_there_or_not_ours(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"none.npz cannot be read: No such file"):
        nn.load(make(), tmp_path / "none.npz")
    with pytest.raises(CheckpointError, match=r"cannot be written: No such file"):
        nn.save(make(), tmp_path / "no folder" / "model.npz")
    other = tmp_path / "other.npz"
    np.savez(other, weight=np.ones(3))
    with pytest.raises(
        CheckpointError, match=r"other.npz is not a cupybnn model file.*nn.save\(model"
    ):
        nn.load(make(), other)
    other.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"other.npz is damaged: not an .npz file"):
        nn.load(make(), other)
    whole = saved.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        other.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError, match=r"other.npz is (damaged|not a cupybnn model file)"
        ):
            nn.load(make(), other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "of version 2; this cupybnn reads versions up to 1"),
        ({"version": 0}, "damaged: its version must be an integer of at least 1, is 0"),
        ({"version": True}, "is True"),
        ({"version": None}, "is None"),
        ({"format": "x"}, "is not a cupybnn model file"),
        ({"arrays": None}, "damaged: its header does not list"),
        ({"arrays": {"1.weight": ["float32", [-1]]}}, "does not list"),
        ({"arrays": {"1.weight": "float32"}}, "does not list"),
        ({"arrays": {"gone": ["float32", [1]]}}, "damaged: its entry 'array/gone': it is missing"),
        (
            {"arrays": {"1.weight": ["float64", [4, 5]]}},
            r"'1.weight' must be \(4, 5\) float64 according to the header, is \(4, 5\) float32",
        ),
    ],
)
def test_header_is_checked(saved, change, message):
    with np.load(saved) as loaded:
        header = json.loads(str(loaded["header"]))
    rewrite(saved, header=np.array(json.dumps(header | change)))
    with pytest.raises(CheckpointError, match=message):
        nn.load(make(), saved)


@pytest.mark.parametrize("text", ["", "[]", "7", "[" * 100_000])
def test_header_that_is_none(saved, text):
    rewrite(saved, header=np.array(text))
    with pytest.raises(CheckpointError, match="is not a cupybnn model file"):
        nn.load(make(), saved)


def test_arrays_of_a_wrong_kind(saved):
    rewrite(saved, **{"array/1.weight": np.zeros((4, 5), complex)})
    with pytest.raises(CheckpointError, match=r"'1.weight' must be .* is \(4, 5\) complex128"):
        nn.load(make(), saved)


def test_only_arrays_that_fit_are_read(saved, monkeypatch):
    """A file with large arrays of other names or shapes takes no memory."""
    read, whole = [], NpzFile.read

    def noted(file, name, *limit):
        read.append(name)
        return whole(file, name, *limit)

    monkeypatch.setattr(NpzFile, "read", noted)
    other = nn.Sequential(out=nn.BinaryLinear(5, 2, bias=True, rng=0), sign=nn.Sign())
    other.norm = nn.BatchNorm(5)
    with pytest.raises(CheckpointError, match=r"out.weight: must be \(5, 2\) float32, is \(5, 3\)"):
        nn.load(other, saved)
    arrays = {"array/norm.gamma", "array/norm.beta", "array/norm.mean", "array/norm.variance"}
    assert set(read) == {"header", *arrays}
