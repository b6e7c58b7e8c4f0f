"""Pictures of digits are read as a network wants them; the command ``cupybnn predict``."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupybnn
from cupybnn import PackedNetwork, nn
from cupybnn.cli.main import main
from cupybnn.deploy import read_image
from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.pictures import prepare
from cupybnn.deploy.reading import read_images
from cupybnn.errors import DataError, SettingError

COUNT = 100  # pictures of a rendering


@pytest.fixture(scope="module")
def mnist(mnist_dir):
    return cupybnn.data.load("mnist", mnist_dir)


@pytest.fixture(scope="module")
def net(mnist) -> PackedNetwork:
    config = cupybnn.TrainConfig(binary=True, n_hidden=128, max_steps=200, device="cpu")
    trainer = cupybnn.Trainer(config, data=mnist)
    trainer.run()
    return PackedNetwork.from_model(trainer.model, pixel_max=255, image_shape=(28, 28))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Return the file of a network for images of 28×28 pixels that was not trained."""
    path = tmp_path_factory.mktemp("packed") / "net.npz"
    model = nn.Sequential(nn.Linear(784, 10, rng=0)).eval()
    PackedNetwork.from_model(model, pixel_max=255, image_shape=(28, 28)).save(path)
    return path


@pytest.fixture(scope="module")
def image():
    return pytest.importorskip("PIL.Image", reason="needs Pillow: pip install .[images]")


def canvas(size: tuple[int, int], place: tuple[int, int], ink: np.ndarray) -> np.ndarray:
    """Return a dark picture of a size (height, width) with `ink` at a place.

    A negative place cuts off as much at each side.
    """
    if min(place) < 0:
        return ink[-place[0] :, -place[1] :][: size[0], : size[1]]
    x = np.zeros(size, np.uint8)
    x[place[0] : place[0] + ink.shape[0], place[1] : place[1] + ink.shape[1]] = ink
    return x


class Rendering:
    """Pictures of digits as people may have them: of other sizes, places, colors, formats."""

    def __init__(self, image, scale, size, place, make, kind="PNG") -> None:
        self.image, self.scale, self.size, self.place = image, scale, size, place
        self.make, self.kind = make, kind

    def file(self, digit: np.ndarray) -> io.BytesIO:
        to = (round(digit.shape[1] * self.scale), round(digit.shape[0] * self.scale))
        ink = self.image.fromarray(digit).resize(to, self.image.Resampling.BICUBIC)
        file = io.BytesIO()
        self.make(self.image, canvas(self.size, self.place, np.asarray(ink))).save(file, self.kind)
        return file


def black_on_white(image, ink):
    return image.fromarray(255 - ink)


def white_on_black(image, ink):
    return image.fromarray(ink)


def blue_on_cream(image, ink):
    paper, pen = np.array([250, 244, 225.0]), np.array([30, 40, 160.0])
    mixed = paper + (pen - paper) * (ink[..., None] / 255)
    return image.fromarray(mixed.astype(np.uint8))


def photographed(image, ink):
    """Noise, a shadow over the paper, and ink that is not black."""
    rng = np.random.default_rng(0)
    shadow = np.linspace(0, 50, ink.shape[1])
    x = 215 - 0.6 * ink.astype(float) - shadow + rng.normal(0, 6, ink.shape)
    return image.fromarray(np.clip(x, 0, 255).astype(np.uint8))


def in_shadow(image, ink):
    """Paper that is half as bright on one side as on the other, and ink that is gray."""
    across = np.linspace(1, 0.5, ink.shape[1])
    return image.fromarray(((255 - 0.7 * ink) * across).astype(np.uint8))


def with_specks(image, ink):
    x = ink.copy()
    x[::37, ::41] = 255
    return image.fromarray(255 - x)


def transparent(color):
    def make(image, ink):
        return image.merge("LA", [image.new("L", ink.shape[::-1], color), image.fromarray(ink)])

    return make


RENDERINGS = {
    "black on white": (5, (170, 200), (12, 40), black_on_white),
    "white on black": (5, (170, 200), (12, 40), white_on_black),
    "blue on cream": (3.3, (150, 110), (40, 5), blue_on_cream),
    "small": (0.75, (25, 30), (2, 6), black_on_white),
    "JPEG": (4, (130, 130), (9, 9), blue_on_cream, "JPEG"),
    "photographed": (5, (200, 170), (40, 20), photographed, "JPEG"),
    "in shadow": (3, (100, 120), (8, 20), in_shadow),
    "cropped": (4, (80, 80), (-16, -16), black_on_white),
    "specks": (5, (170, 200), (12, 40), with_specks),
    "transparent, dark ink": (5, (170, 200), (12, 40), transparent(0)),
    "transparent, light ink": (5, (170, 200), (12, 40), transparent(255)),
}
LIGHT_INK = ("white on black", "transparent, light ink")


class TestPictures:
    @pytest.mark.parametrize("name", RENDERINGS)
    def test_renderings_are_classified_as_well_as_the_images(self, image, mnist, net, name):
        rendering = Rendering(image, *RENDERINGS[name])
        digits, labels = mnist.test_images[:COUNT].reshape(-1, 28, 28), mnist.test_labels[:COUNT]
        raw = (net.predict(digits) == labels).mean()
        found = [read_images(rendering.file(digit), net.inputs).pictures[0] for digit in digits]
        assert all(p.inverted == (name not in LIGHT_INK) for p in found)
        assert all(p.framed for p in found)
        accuracy = (net.predict(np.stack([p.pixels for p in found])) == labels).mean()
        assert raw > 0.85
        assert accuracy >= raw - 0.04

    def test_scikit_learns_digits(self, image):
        data = cupybnn.data.load("digits")
        result = cupybnn.train(dataset="digits", binary=True, max_steps=150, device="cpu")
        net = PackedNetwork.from_model(result.model, pixel_max=16, image_shape=(8, 8))
        rendering = Rendering(image, 9, (100, 100), (10, 15), black_on_white)
        digits = (data.test_images.reshape(-1, 8, 8) * 15.9375).astype(np.uint8)
        pixels = [read_image(rendering.file(d), (8, 8), pixel_max=16) for d in digits[:COUNT]]
        assert np.max(pixels) == 16
        # Eight pixels of many greys do not survive being enlarged unharmed.
        assert (net.predict(np.stack(pixels)) == data.test_labels[:COUNT]).mean() > 0.8

    @pytest.mark.parametrize("make", [black_on_white, white_on_black])
    @pytest.mark.parametrize("pixel_max", [255, 16])
    def test_a_picture_of_the_networks_shape_is_taken_as_it_is(self, image, mnist, make, pixel_max):
        step = 1 if pixel_max == 255 else 15
        for digit in np.minimum(mnist.test_images[:20].reshape(-1, 28, 28) // step, pixel_max):
            rendering = Rendering(image, 1, (28, 28), (0, 0), make)
            stored = np.rint(digit * (255 / pixel_max)).astype(np.uint8)
            pixels = read_image(rendering.file(stored), pixel_max=pixel_max)
            assert pixels.dtype == np.uint8
            np.testing.assert_array_equal(pixels, digit)

    def test_ink_is_scaled_into_the_box_and_centred_by_mass(self):
        for size, place in (((300, 200), (17, 60)), ((60, 35), (3, 4))):
            x = np.zeros(size, np.float32)
            x[place[0] : place[0] + 50, place[1] : place[1] + 25] = 1
            pixels = prepare(x, (28, 28)).pixels
            rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
            assert (len(rows), len(columns)) == (20, 10)
            mass = pixels.sum(dtype=float)
            for axis in (0, 1):
                center = (pixels.sum(axis=1 - axis) @ np.arange(28)) / mass
                assert abs(center - 14) <= 0.5

    def test_mnists_images_come_back_nearly_as_they_were(self, mnist):
        alike = []
        for digit in mnist.test_images[:50].reshape(-1, 28, 28):
            found = prepare(np.pad(digit, 30) / 255, (28, 28)).pixels
            alike.append(np.corrcoef(found.ravel(), digit.ravel())[0, 1])
        assert np.median(alike) > 0.97

    def test_other_shapes(self):
        x = np.zeros((100, 100))
        x[20:80, 40:60] = 1
        pixels = prepare(x, (56, 84), pixel_max=1000).pixels
        assert pixels.shape == (56, 84)
        assert pixels.max() == 1000
        assert len(np.flatnonzero(pixels.any(1))) == 40

    def test_invert(self):
        x = np.full((40, 30), 0.9)
        x[10:30, 14:17] = 0.1  # a stroke of dark ink
        stroke = prepare(x, (28, 28))
        np.testing.assert_array_equal(prepare(x, (28, 28), invert="yes").pixels, stroke.pixels)
        assert stroke.inverted
        # The contrary: a light sheet with a slit.
        slit = prepare(x, (28, 28), invert="no").pixels
        assert (slit > 0).sum() > 2 * (stroke.pixels > 0).sum()
        with pytest.raises(
            SettingError, match="'invert' must be one of auto, yes, no; got 'maybe'"
        ):
            prepare(x, (28, 28), invert="maybe")

    @pytest.mark.parametrize("shape", [(1, 40), (40, 1), (2, 2), (1, 2)])
    def test_tiny_pictures(self, shape):
        x = np.zeros(shape)
        x.flat[-1] = 1
        assert prepare(x, (28, 28)).pixels.shape == (28, 28)

    def test_modes_of_pillow(self, image):
        ink = canvas((60, 50), (10, 20), np.full((40, 8), 255, np.uint8))
        gray = image.fromarray(255 - ink)
        expected = None
        for mode, kind in (
            ("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGB", "PNG"),
            ("RGBA", "PNG"), ("I;16", "PNG"), ("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG"),
        ):  # fmt: skip
            converted = gray.convert(mode) if mode != "I;16" else image.fromarray(
                (255 - ink).astype(np.uint16) * 257
            )  # fmt: skip
            file = io.BytesIO()
            converted.save(file, kind)
            pixels = read_image(file).astype(int)
            expected = pixels if expected is None else expected
            assert abs(pixels - expected).max() <= (60 if kind == "JPEG" else 0), (mode, kind)

    def test_a_palette_with_transparency(self, image):
        x = canvas((60, 50), (10, 20), np.ones((40, 8), np.uint8))
        picture = image.fromarray(x).convert("P")
        picture.putpalette([255, 255, 255, 0, 0, 0] + [0] * 762)
        file = io.BytesIO()
        picture.save(file, "PNG", transparency=0)
        assert (read_image(file) > 0).sum() == 20 * 4

    def test_a_photograph_is_turned_upright(self, image):
        upright = canvas((80, 60), (10, 10), np.tri(60, 30, dtype=np.uint8) * 255)
        exif = image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
        file = io.BytesIO()
        image.fromarray(np.rot90(255 - upright)).save(file, "JPEG", exif=exif, quality=95)
        expected = read_images_of(255 - upright)
        assert np.corrcoef(read_image(file).ravel(), expected.ravel())[0, 1] > 0.98

    def test_a_large_picture_takes_little_time_and_memory(self, image):
        file = io.BytesIO()
        x = canvas((3000, 4000), (500, 1500), np.full((2000, 300), 255, np.uint8))
        image.fromarray(255 - x).save(file, "PNG")
        tracemalloc.start()
        try:
            pixels = read_image(file)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert pixels.any(1).sum() == 20
        assert peak < 100e6


def read_images_of(array: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    np.save(file, array)
    return read_image(file)


SPEC = InputSpec(784, (28, 28), 255)


def npy(array) -> io.BytesIO:
    file = io.BytesIO()
    np.save(file, array)
    return file


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


class TestArrays:
    x = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)

    def test_arrays_of_the_networks_shape_are_taken_as_they_are(self):
        x = self.x
        for array, single in (
            (x, False), (x.reshape(5, 784), False), (x[0], True), (x[0].reshape(784), True),
            (np.asfortranarray(x), False), (x.astype(">i4"), False),
            ((x / 255).astype(np.float32), False), (x / 255, False),
        ):  # fmt: skip
            found = read_images(npy(array), SPEC)
            assert found.single == single
            assert found.pictures == []
            np.testing.assert_array_equal(
                found.inputs.reshape(-1, 784),
                array.reshape(-1, 784).astype(np.float32 if array.dtype.kind == "f" else int),
            )

    @pytest.mark.parametrize("zipped", [False, True])
    def test_idx(self, zipped):
        content = gzip.compress(idx(self.x)) if zipped else idx(self.x)
        found = read_images(io.BytesIO(content), SPEC)
        np.testing.assert_array_equal(found.inputs, self.x)
        assert not found.single

    def test_inverted_only_where_asked(self):
        for array in (self.x, self.x.reshape(5, 784), self.x.astype(np.int16)):
            found = read_images(npy(array), SPEC, "yes")
            np.testing.assert_array_equal(found.inputs, 255 - array.astype(int))
        found = read_images(npy(self.x / np.float32(255)), SPEC, "yes")
        np.testing.assert_allclose(found.inputs, 1 - self.x / 255, atol=1e-6)

    def test_arrays_of_another_shape_are_pictures(self):
        stroke = canvas((50, 40), (10, 12), np.full((30, 6), 255, np.uint8))
        expected = prepare(stroke / 255, (28, 28)).pixels
        color = np.repeat(stroke[..., None], 3, axis=2)
        for array, single in (
            (stroke, True), (255 - stroke, True), (stroke > 0, True), (stroke / 255, True),
            (stroke.astype(np.uint16) * 257, True), (stroke.astype(np.int64), True),
            (color, True), (np.dstack([color, np.full_like(stroke, 255)]), True),
            (stroke[..., None], True), (stroke[None], False), (np.stack([color] * 3), False),
        ):  # fmt: skip
            found = read_images(npy(array), SPEC)
            assert found.single == single
            for pixels in found.inputs:
                np.testing.assert_array_equal(pixels, expected)
        found = read_images(io.BytesIO(idx(stroke[None])), SPEC)
        np.testing.assert_array_equal(found.inputs[0], expected)

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (np.ones(783), r"got shape \(783,\)"),
            (np.array(1.0), r"got shape \(\)"),
            (np.ones((0, 784)), r"holds no image: its shape is \(0, 784\)"),
            (np.ones((2, 3, 4, 5, 6)), r"got shape \(2, 3, 4, 5, 6\)"),
            (np.full((784,), np.nan), "must hold finite numbers"),
            (np.full((784,), 1e300), "must hold finite numbers"),
            (np.ones((40, 40), complex), "must hold real numbers; got complex128"),
            (np.array([None] * 784), "not a usable .npy"),
            (np.linspace(0, 255, 1600).reshape(40, 40), "from 0, black, to 1, white, as float32"),
            (np.linspace(-9, 99, 1600).reshape(40, 40).astype(int), "got numbers from -9 to 99"),
            (np.full((3, 40, 40), 7, np.uint8), r"\[0\] cannot be used: it is empty"),
        ],
    )
    def test_bad_arrays(self, array, words):
        with pytest.raises(DataError, match=words):
            read_images(npy(array), SPEC)

    def test_networks_that_take_no_pictures(self):
        picture = np.tri(40, dtype=np.uint8) * 255
        for spec, words in (
            (InputSpec(784, None, 255), "'image_shape' when packing"),
            (InputSpec(784, (1, 28, 28), 255), r"of shape \(1, 28, 28\)"),
            (InputSpec(784, (28, 28), None), "trained on floating numbers"),
        ):
            with pytest.raises(SettingError, match=words):
                read_images(npy(picture), spec)
            assert read_images(npy(np.ones((2, 784))), spec).inputs.shape == (2, 784)
        with pytest.raises(DataError, match="must hold floating numbers, as the network"):
            read_images(npy(np.ones((2, 784), int)), InputSpec(784, (28, 28), None))


class TestBadFiles:
    def refuse(self, content: bytes) -> str:
        with pytest.raises(DataError) as caught:
            read_image(io.BytesIO(content))
        return str(caught.value)

    def test_what_is_no_image(self, tmp_path):
        assert "PNG, JPEG, .npy or IDX; it is none of these" in self.refuse(b"no image at all")
        assert "it is empty" in self.refuse(b"")
        for path, words in (
            (tmp_path, "is a folder, not an image"),
            (tmp_path / "no.png", "cannot be read: No such file"),
        ):
            with pytest.raises(DataError, match=words):
                read_image(path)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "npy", "idx.gz"])
    def test_truncated_and_flipped(self, image, kind):
        x = np.random.default_rng(1).integers(0, 256, (30, 40)).astype(np.uint8)
        file = io.BytesIO()
        if kind == "npy":
            np.save(file, x)
        elif kind == "idx.gz":
            file.write(gzip.compress(idx(x[None])))
        else:
            image.fromarray(x).save(file, kind)
        whole = file.getvalue()
        rng = np.random.default_rng(0)
        refused = 0
        for _ in range(60):
            damaged = bytearray(whole)
            if rng.random() < 0.4:
                damaged = damaged[: rng.integers(len(whole))]
            else:
                damaged[rng.integers(min(200, len(whole)))] ^= 1 << rng.integers(8)
            try:
                assert read_image(io.BytesIO(damaged)).shape == (28, 28)
            except DataError as error:
                refused += 1
                assert "\n" not in str(error)  # noqa: PT017
        assert refused >= 20

    def test_huge_promises_take_no_memory(self, image):
        head = npy(np.ones((40, 40))).getvalue()
        promises = head.replace(b"(40, 40), }    ", b"(1000000, 9999)")
        assert len(promises) == len(head)
        file = io.BytesIO()
        image.new("1", (10_000, 9_000)).save(file, "PNG")
        tracemalloc.start()
        try:
            self.refuse(promises)
            assert "has too many pixels" in self.refuse(file.getvalue())
            self.refuse(struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**20, 2**20))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 5e6

    def test_an_empty_picture(self, image):
        file = io.BytesIO()
        image.new("L", (50, 50), 200).save(file, "PNG")
        assert "it is empty: its brightness is between 78% and 78%" in self.refuse(file.getvalue())
        file = io.BytesIO()
        image.new("RGBA", (50, 50), (9, 9, 9, 0)).save(file, "PNG")
        assert "it is empty" in self.refuse(file.getvalue())
        shadow = np.linspace(0.3, 0.9, 50) * np.ones((50, 1))
        assert "it is empty" in self.refuse(npy(shadow).getvalue())

    def test_several_images_where_one_is_wanted(self):
        stack = np.stack([np.tri(40, dtype=np.uint8) * 255] * 3)
        assert "must hold one picture; got 3" in self.refuse(npy(stack).getvalue())

    def test_without_pillow(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(SettingError, match=r"pip install pillow \(the extra images\)"):
            read_image(io.BytesIO(b"\x89PNG\r\n\x1a\n"))


class TestCommand:
    @pytest.fixture
    def files(self, image, tmp_path):
        stroke = canvas((60, 50), (10, 20), np.tri(40, 20, dtype=np.uint8) * 255)
        image.fromarray(255 - stroke).save(tmp_path / "dark.png")
        image.fromarray(stroke).save(tmp_path / "light.png")
        arrays = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
        np.save(tmp_path / "three.npy", arrays)
        (tmp_path / "images.idx").write_bytes(idx(arrays))
        return SimpleNamespace(
            dark=str(tmp_path / "dark.png"), light=str(tmp_path / "light.png"),
            npy=str(tmp_path / "three.npy"), idx=str(tmp_path / "images.idx"), arrays=arrays,
        )  # fmt: skip

    def test_a_line_for_each_image(self, packed, files, capsys):
        net = PackedNetwork.load(packed)
        assert main(["predict", str(packed), files.dark, files.light, files.npy, files.idx]) == 0
        out, err = capsys.readouterr()
        names = [files.dark, files.light]
        names += [f"{name}[{i}]" for name in (files.npy, files.idx) for i in range(3)]
        stroke = np.stack([read_image(files.dark), read_image(files.light)])
        inputs = np.concatenate([stroke, files.arrays, files.arrays])
        expected = [
            f"{name}  {label} {p:.4f}"
            for name, label, p in zip(
                names, net.predict(inputs), net.predict_proba(inputs).max(axis=1), strict=True
            )
        ]
        assert out.splitlines() == expected
        assert err == (
            f"Assumed dark on light: {files.dark}; light on dark: {files.light}. Decide with "
            f"--invert yes or no.\n"
        )

    def test_json(self, packed, files, capsys):
        net = PackedNetwork.load(packed)
        arguments = ["--json", "--top", "3", "--invert", "yes"]
        assert main(["predict", str(packed), files.dark, files.idx, *arguments]) == 0
        out, err = capsys.readouterr()
        first, *rest = json.loads(out)
        assert err == ""
        assert (first["file"], first["inverted"]) == (files.dark, True)
        assert "image" not in first
        assert [r["image"] for r in rest] == [0, 1, 2]
        proba = net.predict_proba(255 - files.arrays)
        for record, row in zip(rest, proba, strict=True):
            best = np.argsort(-row)[:3]
            assert [c["class"] for c in record["classes"]] == best.tolist()
            np.testing.assert_allclose(
                [c["probability"] for c in record["classes"]], row[best], rtol=1e-5
            )

    @pytest.mark.gpu
    def test_on_a_gpu(self, packed, files, capsys):
        said = []
        for device in ("cpu", "cuda"):
            arguments = [files.dark, files.npy, "--device", device, "--json", "--top", "10"]
            assert main(["predict", str(packed), *arguments]) == 0
            said.append(json.loads(capsys.readouterr().out))
        for cpu, gpu in zip(*said, strict=True):
            probabilities = [
                {c["class"]: c["probability"] for c in record["classes"]} for record in (cpu, gpu)
            ]
            assert probabilities[1] == pytest.approx(probabilities[0], rel=1e-3)

    def test_names_of_classes(self, files, tmp_path, capsys):
        names = ["nil", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        model = nn.Sequential(nn.Linear(784, 10, rng=0)).eval()
        net = PackedNetwork.from_model(model, pixel_max=255, image_shape=(28, 28), classes=names)
        net.save(tmp_path / "named.npz")
        assert main(["predict", str(tmp_path / "named.npz"), files.dark, "--top", "99"]) == 0
        words = capsys.readouterr().out.split()
        assert words[1] == net.predict(read_image(files.dark))
        assert sorted(words[1::2]) == sorted(names)

    def test_standard_input_is_read(self, packed, files):
        done = subprocess.run(
            [sys.executable, "-m", "cupybnn", "predict", str(packed), "-"],
            stdin=subprocess.Popen(["cat", files.dark], stdout=subprocess.PIPE).stdout,
            capture_output=True,
            text=True,
            check=True,
        )
        label = PackedNetwork.load(packed).predict(read_image(files.dark))
        assert done.stdout.startswith(f"standard input  {label} ")
        assert done.stderr.startswith("Assumed dark on light: standard input.")

    def test_a_bad_file_does_not_stop_the_others(self, packed, files, tmp_path, capsys):
        text = tmp_path / "notes.txt"
        text.write_text("hello")
        for arguments, lines in (([], 2), (["--json"], 2)):
            code = main(["predict", str(packed), str(text), files.dark, "no.png", files.light,
                         *arguments])  # fmt: skip
            out, err = capsys.readouterr()
            assert code == 1
            assert len(out.splitlines()) == lines
            assert "notes.txt must be an image" in err
            assert "no.png cannot be read: No such file or directory" in err
            assert len(err.splitlines()) == 3
        assert main(["predict", str(packed), str(text), "--json"]) == 1
        assert json.loads(capsys.readouterr().out) == []

    def test_a_run_folder(self, image, tmp_path, capsys):
        result = cupybnn.train(
            dataset="digits", n_hidden=8, max_steps=2, device="cpu", log_dir=str(tmp_path)
        )
        ink = canvas((60, 50), (10, 20), np.full((40, 8), 255, np.uint8))
        image.fromarray(255 - ink).save(tmp_path / "one.png")
        assert main(["predict", str(result.run_folder), str(tmp_path / "one.png")]) == 0
        assert len(capsys.readouterr().out.split()) == 3

    def test_bad_options(self, packed, files, capsys):
        for arguments, words in (
            (["--top", "0"], "'--top' must be 1 or more"),
            (["--invert", "maybe"], "invalid choice: 'maybe'"),
            (["--which", "best"], "Leave it out"),
            (["-", "-"], "once at most"),
        ):
            try:
                code = main(["predict", str(packed), files.dark, *arguments])
            except SystemExit as exit:
                code = exit.code
            assert code == 2
            assert words in capsys.readouterr().err


def test_odd_values_of_any_option_end_in_a_line(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("image.npy", np.zeros((28, 28), np.uint8))
    odd = ["", "--", "-1", "nan", "9" * 400, "9" * 5000, "٣x", "a\0b", "\udcff", "x" * 5000, "."]
    for value in odd:
        for option in ("--invert", "--top", "--which", "--device", "model", "file"):
            words = ["predict", str(packed), "image.npy", f"{option}={value}"]
            if option == "model":
                words = ["predict", "--", value, "image.npy"]
            elif option == "file":
                words = ["predict", str(packed), "--", value]
            if (option, value) == ("--top", "9" * 400):
                continue  # all classes
            check_complaint(words, capsys)
        check_complaint(["evaluate", "--", value], capsys)
        if value != "--":  # which argparse drops: then MNIST would be fetched
            check_complaint(["evaluate", "--", str(packed), value], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.npy"]


def check_complaint(words: list[str], capsys) -> None:
    try:
        code = main(words)
    except SystemExit as exit:
        code = exit.code
    said = capsys.readouterr()
    assert code in (1, 2), words
    assert f"cupybnn {words[0]}: " in said.err.splitlines()[-1], words
    assert "Traceback" not in said.err
