"""PackedMatrix.save and load: what is written is read, and nothing else is."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import warnings
import zipfile

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
        ({"version": 3}, "it is of version 3; this cupybnn reads versions 1 and 2"),
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
        ({"words": np.full((5, 2), 2**64 - 1, np.uint64)}, "bits past the end of a line"),
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
    with pytest.raises(ValueError, match=r"cannot be read as a PackedMatrix.*Python objects"):
        PackedMatrix.load(path)


def test_a_changed_bit_that_zip_does_not_notice(good):
    """Written anew by numpy.savez, with the CRC of zip that fits."""
    path, entries = good
    words, axis = entries["words"].copy(), entries["axis"]
    entries["words"][3, 1] ^= np.uint64(4)
    np.savez(path, **entries)
    with pytest.raises(ValueError, match="words do not match its checksum"):
        PackedMatrix.load(path.with_suffix(".npz"))
    np.savez(path, **entries | {"words": words})
    assert PackedMatrix.load(path).shape == (5, 70)
    square = path.with_name("square.npz")
    pack(np.random.default_rng(0).standard_normal((64, 64))).save(square)
    with np.load(square) as file:
        changed = dict(file) | {"axis": np.array(-2)}
    np.savez(square, **changed)
    with pytest.raises(ValueError, match="words do not match its checksum"):
        PackedMatrix.load(square)
    assert axis == -1


def test_files_without_a_checksum_are_still_read(good):
    path, entries = good
    expected = PackedMatrix.load(path)
    del entries["checksum"]
    np.savez(path, **entries, more=np.ones(3))
    assert PackedMatrix.load(path) == expected


@pytest.fixture
def little_memory():
    """Fail where more than 64 MiB are in use at once."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def npy(header, data=b""):
    """Bytes of a .npy member with any header."""
    text = (repr(header) if isinstance(header, dict) else header).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def write_with(path, good_path, name, data, compression=zipfile.ZIP_STORED):
    """Write the members of a good file with one replaced or added."""
    with zipfile.ZipFile(good_path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for member, content in (members | {name: data}).items():
            how = compression if member == name else zipfile.ZIP_STORED
            file.writestr(member, content, how)


def test_other_members_are_not_read(good, tmp_path, little_memory):
    path, _ = good
    bomb = tmp_path / "bomb.npz"
    zeros = npy({"descr": "|u1", "fortran_order": False, "shape": (1 << 26,)}, bytes(1 << 26))
    tracemalloc.stop()
    write_with(bomb, path, "more.npy", zeros, zipfile.ZIP_DEFLATED)
    del zeros
    tracemalloc.start()
    assert PackedMatrix.load(bomb) == PackedMatrix.load(path)


HUGE = {"descr": "<u8", "fortran_order": False, "shape": (1 << 40, 2)}


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("words.npy", npy(HUGE), r"'words': uint64 of shape \(1099511627776.*contradicts"),
        ("words.npy", npy(HUGE | {"shape": (-5, 2)}), "uint64 and shape .* is not read"),
        ("words.npy", npy(HUGE | {"descr": "|O"}), "Python objects are not read"),
        ("words.npy", npy("(" * 5000), "truncated, damaged"),
        ("words.npy", b"", "truncated, damaged"),
        ("words.npy", b"\x93NUMPY\x09\x00", "array of format .* is not read"),
        ("shape.npy", npy(HUGE), "'shape': uint64 .* contradicts its size"),
        ("shape.npy", bytes(5000), "its entry 'shape': the magic string is not correct"),
        ("shape.npy", npy(HUGE | {"shape": (600,)}, bytes(4800)), "4,800 bytes, at most 4,096"),
        ("version.npy", npy({"descr": "|O", "fortran_order": False, "shape": ()}), "objects"),
        ("format.npy", npy({"descr": "<U0", "fortran_order": False, "shape": ()}), "of another"),
        ("axis.npy", npy({"descr": "<i8", "fortran_order": False, "shape": ()}), "contradicts"),
        ("checksum.npy", npy({"descr": "<f8", "fortran_order": False, "shape": ()}, bytes(8)),
         "its entry 'checksum' is"),
    ],
)  # fmt: skip
def test_members_made_by_hand(good, tmp_path, little_memory, name, data, why):
    path, _ = good
    made = tmp_path / "made.npz"
    write_with(made, path, name, data)
    with pytest.raises(ValueError, match=f"made.npz' cannot be read as a PackedMatrix: .*{why}"):
        PackedMatrix.load(made)


@pytest.mark.parametrize("name", ["words.npy", "axis.npy"])
@pytest.mark.parametrize("field", [20, 24])  # compressed and whole size, in zip's directory
def test_sizes_that_the_archive_claims(good, little_memory, name, field):
    path, _ = good
    data = bytearray(path.read_bytes())
    entry = data.rindex(name.encode()) - 46
    assert data[entry : entry + 4] == b"PK\x01\x02"
    data[entry + field : entry + field + 4] = struct.pack("<I", 1 << 30)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"its size of .* bytes contradicts the file"):
        PackedMatrix.load(path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shape": [1 << 62, 0]}, "no elements, but too many lines"),
        ({"shape": [1 << 40, 1 << 40, 70]}, "needs uint64 words of shape"),
        ({"shape": [1] * 70}, "cannot be packed"),
        ({"version": [1]}, "its entry 'version'"),
        ({"version": 1.0}, "its entry 'version'"),
        ({"version": "1"}, "its entry 'version'"),
        ({"format": ["cupybnn.PackedMatrix"]}, "its entry 'format'"),
        ({"format": 3}, "its entry 'format'"),
        ({"axis": [-1]}, "its entry 'axis'"),
        ({"shape": 5}, "its entry 'shape'"),
        ({"checksum": 3}, "do not match its checksum"),
    ],
)
def test_more_files_that_contradict_themselves(good, little_memory, changes, why):
    path, entries = good
    np.savez(path, **entries | changes)
    with pytest.raises(ValueError, match=f"cannot be read as a PackedMatrix: .*{why}"):
        PackedMatrix.load(path)


def test_compressed_and_repeated_members(good, tmp_path):
    path, entries = good
    np.savez_compressed(tmp_path / "small.npz", **entries)
    with pytest.raises(ValueError, match="it is compressed, which such a file never is"):
        PackedMatrix.load(tmp_path / "small.npz")
    with zipfile.ZipFile(path, "a") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the name is there already
        file.writestr("axis.npy", b"")
    with pytest.raises(ValueError, match="two entries 'axis'"):
        PackedMatrix.load(path)


def test_words_in_the_other_order_of_memory(good):
    path, entries = good
    expected = PackedMatrix.load(path)
    np.savez(path, **entries | {"words": np.asfortranarray(entries["words"])})
    found = PackedMatrix.load(path)
    assert found == expected
    assert found.words.flags.c_contiguous


def test_an_empty_matrix_of_many_dimensions(tmp_path):
    """Nothing goes through its leading axes one by one."""
    path = tmp_path / "p.npz"
    pack(np.zeros((1 << 40, 0, 70))).save(path)
    p = PackedMatrix.load(path)
    assert p.unpack().shape == (1 << 40, 0, 70)
    assert (p @ np.ones((70, 3))).shape == (1 << 40, 0, 3)


def test_paths_that_cannot_be(tmp_path):
    p = pack(np.ones((2, 2)))
    for path in ("a\0b", b"a\0b", tmp_path / "a\0b"):
        with pytest.raises(ValueError, match=r"'path' of PackedMatrix\.load must have no NUL"):
            PackedMatrix.load(path)
        with pytest.raises(ValueError, match=r"'path' of PackedMatrix\.save must have no NUL"):
            p.save(path)
    for path in (3, None, io.BytesIO()):
        with pytest.raises(
            TypeError, match=r"'path' of PackedMatrix\.load must be the path of a f"
        ):
            PackedMatrix.load(path)
    with pytest.raises(IsADirectoryError):
        PackedMatrix.load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="it is not a regular file"):
        PackedMatrix.load(tmp_path / "fifo")


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        PackedMatrix.load(tmp_path / "none")
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        PackedMatrix.load(tmp_path / "x.npy")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="of another kind"):
        PackedMatrix.load(tmp_path / "text")
