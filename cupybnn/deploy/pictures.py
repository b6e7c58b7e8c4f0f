"""Pictures as a network wants them: gray, light ink on dark, of MNIST's size and place.

MNIST's images were made of scanned digits in black and white: each was scaled to fit a box of
20×20 pixels with its proportions kept, and put into an image of 28×28 pixels so that its center of
mass is in the middle (http://yann.lecun.com/exdb/mnist). A picture is treated likewise:

1. Transparent parts become paper: white under dark ink, black under light ink.
2. Where the outermost pixels are light, the ink is dark, and the picture is inverted.
3. What changes evenly along the border, such as a shadow, is taken away from all of the picture.
4. Paper becomes 0 and ink 1; Otsu's threshold tells them apart. Specks become paper.
5. What holds ink is cut out and scaled to fit the box, with its proportions kept.
6. Its center of mass is moved to the middle of the image, as far as all of it stays inside.

A picture that has the network's shape is inverted if need be, and otherwise taken as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupybnn.errors import DataError, SettingError

__all__ = ["INVERT", "Picture", "prepare"]

#: What `invert` may be.
INVERT = ("auto", "yes", "no")

#: For shapes of images: the box that ink is scaled to, and where its center of mass lies, counted
#: from the middle of the first pixel. scikit-learn's digits fill their images.
_FRAMES = {
    (28, 28): ((20, 20), (14.0, 14.0)),
    (8, 8): ((8, 8), (3.5, 3.5)),
}
_LEAST_CONTRAST = 0.1  # between paper and ink, of 1 between black and white
_LARGEST = 256  # height and width in which ink is looked for
_SHADED = 8  # height and width from which on a border shows a shadow
_SPECK = 0.01  # of the largest connected patch of ink: smaller ones are no part of what is drawn


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture ready for a network.

    Attributes
    ----------
    pixels : ndarray of whole numbers, shape of the network's images
        0 is paper.
    inverted : bool
        Whether it was dark ink on light paper.
    framed : bool
        Whether the ink was cut out, scaled and centered; otherwise the picture had the network's
        shape.
    """

    pixels: np.ndarray
    inverted: bool
    framed: bool


def prepare(
    gray: np.ndarray,
    shape: tuple[int, ...],
    *,
    alpha: np.ndarray | None = None,
    pixel_max: float = 255,
    invert: str = "auto",
) -> Picture:
    """Make a picture what a network was trained on; see the module for the steps.

    Parameters
    ----------
    gray : ndarray of floats, shape (height, width)
        From 0, black, to 1, white.
    shape : tuple of int
        (height, width) of the network's images.
    alpha : ndarray of floats, shape (height, width), optional
        From 0, transparent, to 1.
    pixel_max : float
        The network's pixel for full brightness.
    invert : {"auto", "yes", "no"}
        Whether the picture is dark ink on light paper; "auto": its border decides.

    Raises
    ------
    DataError
        If the picture has no pixels, or hardly any contrast.
    SettingError
        If `invert` is none of the three.
    """
    if invert not in INVERT:
        raise SettingError(f"The 'invert' must be one of {', '.join(INVERT)}; got {invert!r}.")
    if gray.size == 0:
        raise DataError(f"it has no pixels, its size is {gray.shape[1]}×{gray.shape[0]}")
    x = np.asarray(gray, np.float32)
    if alpha is not None:
        x = _on_paper(x, np.asarray(alpha, np.float32), invert)
    low, high = _range(x)
    inverted = invert == "yes"
    if invert == "auto":
        inverted = float(np.median(_border(x))) > (low + high) / 2
    if inverted:
        x = 1 - x
    framed = x.shape != tuple(shape)
    if framed:
        x = _evenly_lit(_reduced(x))
        _range(x)
        x = _framed(_ink(x), shape)
    dtype = np.uint8 if pixel_max <= 255 else np.int64
    return Picture(np.rint(x * np.float32(pixel_max)).astype(dtype), inverted, framed)


def _range(x: np.ndarray) -> tuple[float, float]:
    """Return the least and the greatest value, and complain where they hardly differ."""
    low, high = float(x.min()), float(x.max())
    if high - low < _LEAST_CONTRAST:
        raise DataError(
            f"it is empty: its brightness is between {low:.0%} and {high:.0%} everywhere"
        )
    return low, high


def _on_paper(gray: np.ndarray, alpha: np.ndarray, invert: str) -> np.ndarray:
    """Put a picture with transparent parts on white paper if its ink is dark, else on black."""
    seen = float(alpha.sum())
    dark_ink = invert == "yes"
    if invert == "auto":
        dark_ink = seen > 0 and float((gray * alpha).sum()) < seen / 2
    return gray * alpha + (1 - alpha) * dark_ink


def _border(x: np.ndarray) -> np.ndarray:
    """Return the outermost pixels."""
    return np.concatenate([x[0], x[-1], x[1:-1, 0], x[1:-1, -1]])


def _evenly_lit(x: np.ndarray) -> np.ndarray:
    """Return a picture of light ink less the plane through its border, where paper is seen."""
    middle = (float(x.min()) + float(x.max())) / 2
    if min(x.shape) < _SHADED or np.median(_border(x)) > middle:
        return x  # there is no border, or it is ink
    places = np.indices(x.shape).transpose(1, 2, 0).astype(np.float32)
    terms = np.dstack([np.ones(x.shape, np.float32), places / max(x.shape)])
    border = np.concatenate([_border(terms[..., i])[:, None] for i in range(3)], axis=1)
    values = _border(x)
    used = np.ones(len(values), bool)
    for _ in range(4):  # without the pixels where ink reaches the border
        plane = np.linalg.lstsq(border[used], values[used], rcond=None)[0]
        apart = np.abs(values - border @ plane)
        used = apart <= 2.5 * np.median(apart) + 0.02
    return np.clip(x - terms @ plane, 0, 1)


def _ink(x: np.ndarray) -> np.ndarray:
    """Return how much ink there is, from 0 to 1, in a picture of light ink on dark paper."""
    threshold = _otsu(x)
    light = x > threshold
    paper, ink = float(np.median(x[~light])), float(np.median(x[light]))
    # Noise and shades of the paper, up to half of the way to the threshold, are paper.
    paper += (threshold - paper) / 2
    ink_of = np.clip((x - paper) / (ink - paper), 0, 1)
    return ink_of * _near(_without_specks(light))


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Return a mask without connected patches that are small in comparison with the largest one."""
    numbers = np.arange(1, mask.size + 1).reshape(mask.shape)
    labels = np.where(mask, numbers, 0)
    while True:  # until each pixel has the greatest number of its patch
        greatest = np.where(mask, _around(labels), 0)
        # Who has the number of a pixel takes that pixel's number: patches are few rounds long.
        greatest = np.concatenate([[0], greatest.ravel()])[greatest]
        if np.array_equal(greatest, labels):
            break
        labels = greatest
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return (areas >= _SPECK * areas.max())[labels] & mask


def _near(mask: np.ndarray) -> np.ndarray:
    """Return a mask with the two rings of pixels around it, where ink fades into paper."""
    return _around(_around(mask))


def _around(x: np.ndarray) -> np.ndarray:
    """Return the maximum of each pixel and its eight neighbors."""
    for axis in (0, 1):
        before, after = np.zeros_like(x), np.zeros_like(x)
        source, target = [slice(None)] * 2, [slice(None)] * 2
        source[axis], target[axis] = slice(1, None), slice(None, -1)
        before[tuple(target)] = x[tuple(source)]
        after[tuple(source)] = x[tuple(target)]
        x = np.maximum(np.maximum(before, after), x)
    return x


def _otsu(x: np.ndarray) -> float:
    """Return the threshold between dark and light pixels.

    N. Otsu: A threshold selection method from gray-level histograms. IEEE Transactions on Systems,
    Man, and Cybernetics 9, 1979.
    """
    counts, edges = np.histogram(x, bins=256)
    middles = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()
    sums = (counts * middles).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = sums / below - (sums[-1] - sums) / above
        spread = np.nan_to_num(below.astype(float) * above * apart**2)
    best = np.flatnonzero(spread == spread.max())  # where no pixel lies between, all are as good
    return float(edges[(best[0] + best[-1]) // 2 + 1])


def _reduced(x: np.ndarray) -> np.ndarray:
    """Return a large picture made smaller, its proportions kept."""
    factor = _LARGEST / max(x.shape)
    if factor >= 1:
        return x
    height, width = (max(1, round(n * factor)) for n in x.shape)
    return _resize(_resize(x, height).T, width).T


def _framed(ink: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return an image of `shape` with the ink scaled to its box and its center of mass centered."""
    rows, columns = (np.flatnonzero((ink > 0.5).any(axis=axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = shape
    usual = (
        (max(1, round(height * 20 / 28)), max(1, round(width * 20 / 28))),
        (height / 2, width / 2),
    )
    box, middle = _FRAMES.get((height, width), usual)
    factor = min(box[0] / ink.shape[0], box[1] / ink.shape[1])
    size = [max(1, min(box[i], round(ink.shape[i] * factor))) for i in range(2)]
    small = _resize(ink, size[0]) if ink.shape[0] != size[0] else ink
    small = _resize(small.T, size[1]).T if ink.shape[1] != size[1] else small
    total = float(small.sum())
    image = np.zeros(shape, np.float32)
    places = []
    for axis in range(2):
        mass = small.sum(axis=1 - axis)
        center = float(mass @ np.arange(len(mass))) / total
        place = round(middle[axis] - center)
        places.append(min(max(place, 0), shape[axis] - len(mass)))
    image[places[0] : places[0] + size[0], places[1] : places[1] + size[1]] = small
    return image


def _resize(x: np.ndarray, size: int) -> np.ndarray:
    """Return `x` with `size` rows, by linear interpolation.

    The weights are a triangle that reaches to the neighbors' centers, in the coarser of the two
    grids.
    """
    before = len(x)
    step = before / size
    reach = max(step, 1.0)
    centers = (np.arange(size) + 0.5) * step - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(before) - centers[:, None]) / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32) @ x
