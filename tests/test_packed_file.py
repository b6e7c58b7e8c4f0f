"""PackedMatrix.save and load: what is written is read, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
from gemm_cases import array, host

from cupybnn import PackedMatrix, pack


@pytest.fixture
def good(tmp_path):
    """Give a file of a 5 x 70 matrix, and its entries."""
    path = tmp_path / "p.npz"
    pack(array(np.random.default_rng(0), np, (5, 70))).save(path)
    with np.load(path) as file:
        return path, dict(file)


@pytest.mark.parametrize("shape", [(70,), (5, 70), (0, 3), (3, 0), (2, 3, 130)])
def test_save_and_load(xp, tmp_path, shape):
    x = array(np.random.default_rng(0), xp, shape)
    for axis in (-1, -2)[: len(shape)]:
        p = pack(x, axis=axis)
        path = tmp_path / f"packed{axis}"  # no ending is added
        p.save(path)
        for device in ("cpu", "cpu" if xp is np else "cuda"):
            q = PackedMatrix.load(path, device=device)
            assert (q.shape, q.axis, q.device.kind) == (p.shape, p.axis, device)
            np.testing.assert_array_equal(host(q.unpack()), host(p.unpack()))
            np.testing.assert_array_equal(host(q.popcounts), host(p.popcounts))
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(
        f"packed{axis}" for axis in (-1, -2)[: len(shape)]
    )


def test_a_failed_save_leaves_the_old_file(good, monkeypatch):
    path, _ = good
    before = path.read_bytes()

    def fails(file, **entries):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match="No space left"):
        pack(np.ones((2, 2))).save(path)
    assert path.read_bytes() == before
    assert [f.name for f in path.parent.iterdir()] == ["p.npz"]


@pytest.mark.parametrize("keep", [0, 1, 50, 0.3, 0.6, 0.9, 0.999])
def test_truncated(good, keep):
    path, _ = good
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ValueError, match=r"p\.npz'? cannot be read as a PackedMatrix: it is trunc"):
        PackedMatrix.load(path)


def test_a_flipped_bit_is_noticed(good):
    path, _ = good
    data = bytearray(path.read_bytes())
    at = data.find(b"NUMPY", data.find(b"words.npy")) + 128  # within the words themselves
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="truncated, damaged"):
        PackedMatrix.load(path)


def test_every_byte_matters_or_nothing_changes(good):
    """A wrong byte anywhere, in what zip and NumPy write around the words too, is one error."""
    path, _ = good
    whole, expected = path.read_bytes(), PackedMatrix.load(path).unpack()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            found = PackedMatrix.load(path)
        except ValueError:
            continue
        np.testing.assert_array_equal(found.unpack(), expected)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/p\.npz'$"):
        pack(np.ones((2, 2))).save(tmp_path / "nowhere" / "p.npz")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "it is of version 2; this cupybnn reads version 1"),
        ({"format": "other"}, "its format is 'other', not 'cupybnn.PackedMatrix'"),
        ({"words": None}, "it has no entry 'words'"),
        ({"axis": -3}, r"shape \(5, 70\) cannot be packed along axis -3"),
        ({"axis": 0.5}, "its entry 'axis'"),
        ({"axis": -2}, r"needs uint64 words of shape \(70, 1\)"),
        ({"shape": [5, 140]}, r"needs uint64 words of shape \(5, 3\), but it holds uint64"),
        ({"shape": [5.0, 70.0]}, "its entry 'shape'"),
        ({"shape": [-5, 70]}, "cannot be packed"),
        ({"shape": np.zeros(0, int)}, "cannot be packed"),
        ({"words": np.zeros((5, 2), np.int64)}, "but it holds int64"),
        ({"words": np.full((5, 2), 2**64 - 1, np.uint64)}, "bits beyond the end of a line"),
    ],
)
def test_files_that_contradict_themselves(good, changes, why):
    path, entries = good
    entries |= changes
    np.savez(path, **{k: v for k, v in entries.items() if v is not None})
    with pytest.raises(ValueError, match=f"cannot be read as a PackedMatrix: .*{why}"):
        PackedMatrix.load(path)


def test_objects_are_not_unpickled(good):
    path, entries = good
    entries["words"] = np.array([[print]], dtype=object)
    np.savez(path, allow_pickle=True, **entries)
    with pytest.raises(ValueError, match=r"cannot be read as a PackedMatrix.*allow_pickle=False"):
        PackedMatrix.load(path)


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        PackedMatrix.load(tmp_path / "none")
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        PackedMatrix.load(tmp_path / "x.npy")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="of another kind"):
        PackedMatrix.load(tmp_path / "text")
