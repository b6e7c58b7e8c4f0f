"""The kernels of a fused step by NumPy, so that the step runs on the host, launch for launch.

What is launched reads its arguments as a kernel does: structs, addresses, strides. So a fused step
can be compared with the plain one without a GPU, in all that is not the kernels themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from types import SimpleNamespace

import numpy as np

from cupybnn import backends
from cupybnn.backends import numpy_planes
from cupybnn.backends.cuda import (
    compiler,
    fused,
    fused_batch,
    fused_head,
    fused_layers,
    fused_neighbors,
    fused_parameter,
    fused_shares,
    fused_update,
    fused_virtual,
    fused_walk,
    plane_gemm,
    planes,
    sign_gemm,
)
from cupybnn.backends.cuda.structs import Kernel, Struct
from cupybnn.backends.devices import CPU
from cupybnn.backends.levels import SIGNS, levels_of
from cupybnn.backends.random import from_row
from cupybnn.data import Augmentation
from cupybnn.data.augmentation import bump_width, count_knots, sample

MODULES = (
    fused_batch, fused_head, fused_layers, fused_neighbors, fused_parameter, fused_shares,
    fused_update, fused_virtual, planes, sign_gemm,
)  # fmt: skip
KERNELS = {
    (k.source, k.function): k for m in MODULES for k in vars(m).values() if isinstance(k, Kernel)
}
STRUCTS = {s.name: s for m in MODULES for s in vars(m).values() if isinstance(s, Struct)}
PRODUCTS = {"float": np.float32, "float16_bits": np.float16, "short": np.int16}


class Fields(dict):
    """Arguments by name."""

    __getattr__ = dict.__getitem__


def decode(struct: Struct, data: bytes) -> Fields:
    found = Fields()
    for field, value in zip(struct.fields, struct._struct.unpack(data), strict=True):
        inner = STRUCTS.get(field.type)
        if inner is not None:
            size = len(value) // (field.count or 1)
            parts = [value[i * size : (i + 1) * size] for i in range(field.count or 1)]
            value = [decode(inner, part) for part in parts]
        found[field.name] = value
    return found


def at(address: int, shape, dtype) -> np.ndarray | None:
    """Return the array at an address, or None for a null pointer."""
    if not address:
        return None
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_char * nbytes).from_address(int(address))
    return np.frombuffer(memory, dtype).reshape(shape)


def widened(patterns: np.ndarray) -> np.ndarray:
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def narrowed(values) -> np.ndarray:
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


def read_real(address, shape, kind: str) -> np.ndarray:
    if kind == "bfloat16_bits":
        return widened(at(address, shape, np.uint16))
    return at(address, shape, PRODUCTS[kind]).astype(np.float32)


def write_real(address, values, kind: str) -> None:
    if kind == "bfloat16_bits":
        at(address, values.shape, np.uint16)[...] = narrowed(values)
    else:
        at(address, values.shape, np.float32)[...] = values


def words(seed: int, number: int, first: int, count: int) -> np.ndarray:
    """Return random words of an array, from an element on."""
    block, skipped = divmod(int(first), 4)
    make = backends.get(CPU).random_words
    return make((skipped + count,), int(seed) % 2**64, int(number), block)[skipped:]


def bits_of(mask: np.ndarray, cols: int) -> np.ndarray:
    """Return the elements of a mask with one bit each."""
    bits = mask[:, :, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    return bits.reshape(len(mask), -1)[:, :cols].astype(bool)


def mask_of(bits: np.ndarray) -> np.ndarray:
    rows, cols = bits.shape
    wide = np.zeros((rows, -(-cols // 32) * 32), np.uint32)
    wide[:, :cols] = bits
    wide = wide.reshape(rows, -1, 32) << np.arange(32, dtype=np.uint32)
    return wide.sum(axis=-1, dtype=np.uint32)


# The layout of packed signs (layout.cuh) ---------------------------------------------------------


def places(lines: int, k: int) -> np.ndarray:
    """Return the index of each line's words, shape (lines, words)."""
    line, word = np.arange(lines)[:, None], np.arange(-(-k // 32))[None]
    position = (line & ~15) | ((line & 2) << 2) | ((line & 12) >> 1) | (line & 1)
    padded = (lines + 15) & ~15
    piece, within = (word % 32) >> 2, word & 3
    swizzled = ((piece ^ (position & 7)) << 2) | within
    return ((word // 32) * padded + position) * 32 + swizzled


def word_count(lines: int, k: int) -> int:
    return (-(-k // 1024) or 1) * ((lines + 15) & ~15) * 32


def write_signs(address, bits: np.ndarray) -> None:
    """Pack lines of bits, shape (lines, k)."""
    memory = at(address, word_count(*bits.shape), np.uint32)
    memory[places(*bits.shape)] = mask_of(bits)


def read_signs(address, lines: int, k: int) -> np.ndarray:
    memory = at(address, word_count(lines, k), np.uint32)
    return np.where(bits_of(memory[places(lines, k)], k), np.float32(1), np.float32(-1))


def pack(x: np.ndarray, axis: int):
    """Return a packed matrix as the kernels read it."""
    bits = (np.asarray(x) >= 0).T if axis == -2 else np.asarray(x) >= 0
    memory = np.zeros(word_count(*bits.shape), np.uint32)
    write_signs(memory.ctypes.data, bits)
    pops = bits.sum(axis=1).astype(np.int32)
    return SimpleNamespace(words=memory, popcounts=pops, shape=x.shape, axis=axis, levels=SIGNS)


# Bit planes (planes.py): the words of all planes of a matrix, the highest first -------------------


def write_numbers(to, numbers: np.ndarray, bits: int) -> None:
    """Write lines of levels' numbers, shape (lines, k), and their sums."""
    for plane in range(bits):
        step = 4 * (bits - 1 - plane) * word_count(*numbers.shape)
        write_signs(to.words + step, numbers >> plane & 1 != 0)
    at(to.sums, len(numbers), np.int32)[...] += numbers.sum(axis=1, dtype=np.int32)


def unpacked(matrix) -> np.ndarray:
    """Return a packed matrix of signs or levels as numbers."""
    lines, k = matrix.shape[:: -1 if matrix.axis == -2 else 1]
    count = word_count(lines, k)
    memory = matrix.words.reshape(-1)
    of = [memory[i : i + count] for i in range(0, memory.size, count)]
    total = 0
    for plane in of:
        total = 2 * total + (read_signs(plane.ctypes.data, lines, k) > 0)
    assert (total.sum(axis=1) == matrix.popcounts).all()
    total = 2 * total.astype(np.float64) - matrix.levels.top
    return total.T if matrix.axis == -2 else total


def prepare_scaled(a, b, out, *, rows=None, columns=None):
    """Multiply packed matrices, and scale the rows or columns of the product."""

    def launch(stream) -> None:
        if compiler.is_dry_run():
            return
        product = (unpacked(a) @ unpacked(b)).astype(np.float32)
        product *= columns if rows is None else rows[:, None]
        out[...] = narrowed(product) if out.dtype == np.uint16 else product

    return launch


def find_greatest(d, address, shape, row_most, col_most) -> None:
    g = np.abs(read_real(address, shape, d["REAL"]))
    at(row_most, shape[0], np.float32)[...] = g.max(axis=1)
    at(col_most, shape[1], np.float32)[...] = g.max(axis=0)


def most(d, p) -> None:
    find_greatest(d, p.g, (p.rows, p.cols), p.row_most, p.col_most)


def quantize(d, p) -> None:
    g, levels = read_real(p.g, (p.rows, p.cols), d["REAL"]), levels_of(d["PLANES"], True)
    step = int(at(p.step, 1, np.int64)[0]) if p.step else 0
    first = 8 * int(p.first) + d["OFFSET"]
    drawn = numpy_planes.drawn_for(g.shape, levels, int(p.seed), int(p.draw) + step, first)
    places = (1, p.row_most, p.row_scale, p.by_row), (0, p.col_most, p.col_scale, p.by_col)
    for axis, found, scale, (to,) in places:
        count = g.shape[1 - axis]
        numbers, scales = numpy_planes.rounded_numbers(
            g, at(found, count, np.float32), axis, drawn, levels
        )
        at(scale, count, np.float32)[...] = scales
        write_numbers(to, numbers if axis else numbers.T, d["PLANES"])


def turn(d, p) -> None:
    bits = read_signs(p.words, p.lines, p.k).T > 0
    write_numbers(p.to[0], bits.astype(np.uint8), 1)


# Kernels -----------------------------------------------------------------------------------------


def gather(d, p, deformation=None) -> None:
    step = int(at(p.step, 1, np.int64)[0])
    place = (p.first + np.arange(p.rows)) % p.whole
    images = at(p.order, (p.ring, p.rows), np.int32)[step % p.ring]
    pixels = at(p.images, (images.max() + 1, p.cols), np.uint8)[images].astype(np.float32)
    if deformation is not None:
        f = deformation
        amounts = Augmentation(
            f.shift, np.degrees(f.rotation), f.scale, f.shear, f.elastic, bool(f.flip)
        )
        shape = (f.height, f.width)
        if f.elastic:
            assert (f.knots_down, f.knots_right) == tuple(map(count_knots, shape))
            assert (f.bump_height, f.bump_width) == tuple(map(bump_width, shape))
        for i, row in enumerate(place):
            with from_row(int(row)):
                where = amounts.coordinates(1, shape, f.seed, step, np)
            pixels[i] = sample(pixels[i].reshape(1, *shape), *where).reshape(-1)
    at(p.labels, p.rows, np.int64)[...] = at(p.all_labels, images.max() + 1, np.int64)[images]
    write_real(p.x, dropped_pixels(d, p, pixels, step, place), d["REAL"])
    clear(p)


def move_among_neighbors(d, p) -> None:
    step = int(at(p.step, 1, np.int64)[0])
    order = at(p.order, (p.ring, p.rows), np.int32)[step % p.ring]
    known = order.max() + 1
    around = at(p.table, (known, p.nearest), np.int32)[order]
    images = at(p.images, (max(known, around.max() + 1), p.cols), np.uint8).astype(np.int64)
    out = at(p.out, (p.rows, p.cols), np.uint8)
    for row, image in enumerate(order):
        place = (p.first + row) % p.whole
        drawn = words(p.seed, step, place * p.nearest, p.nearest)
        draws = sum((drawn >> (8 * i) & 255).astype(np.int64) for i in range(4)) - 510
        total = draws @ (images[around[row]] - images[image])
        moved = images[image] + (total * p.factor + (1 << d["DIGITS"] - 1)) // (1 << d["DIGITS"])
        out[row] = moved.clip(0, p.brightest)
    at(p.labels, p.rows, np.int64)[...] = at(p.all_labels, known, np.int64)[order]


def dropped_pixels(d, p, pixels, step, place, seed=None):
    if d["DROP"]:
        for i, row in enumerate(place):
            drawn = words(p.seed if seed is None else seed, step + p.draw, row * p.cols, p.cols)
            pixels[i][drawn > p.last] = 0
    return pixels


def clear(p) -> None:
    if p.pops:
        at(p.pops, p.pop_count, np.int32)[...] = 0


def attack(d, p, gradient, amount) -> None:
    shape, step = (p.rows, p.cols), int(at(p.step, 1, np.int64)[0])
    moved = read_real(p.x, shape, d["REAL"])
    moved = moved + np.float32(amount) * np.sign(read_real(gradient, shape, d["REAL"]))
    place = p.first + np.arange(p.rows)
    write_real(p.x, dropped_pixels(d, p, moved, step, place), d["REAL"])
    clear(p)


def dropout_mask(d, step, rows, cols, first, seed, draw, last, kept) -> None:
    number = int(at(step, 1, np.int64)[0]) + int(draw)
    drawn = words(seed, number, first * cols, int(rows * cols)).reshape(rows, cols)
    at(kept, (rows, -(-cols // 32)), np.uint32)[...] = mask_of(drawn <= last)


def move_images(d, p) -> None:
    shape, step = (p.rows, p.cols), int(at(p.step, 1, np.int64)[0])
    place = p.first + np.arange(p.rows)
    direction = np.zeros(shape, np.float32)
    if d["DIRECTION"] == 1:
        direction = read_real(p.gradient, shape, d["REAL"])
        direction = dropped_pixels(d, p, direction.copy(), step, place, p.drop_seed)
    elif d["DIRECTION"] == 2:
        drawn = words(p.seed, step, p.first * p.cols, p.rows * p.cols).reshape(shape)
        direction = sum((drawn >> (8 * i) & 255).astype(np.float32) for i in range(4)) - 510
    length = np.sqrt((direction.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    factor = np.where(length > 0, p.distance / np.where(length > 0, length, 1), 0)
    moved = read_real(p.x, shape, d["REAL"]) + (direction * factor).astype(np.float32)
    write_real(p.out, dropped_pixels(d, p, moved, step, place, p.drop_seed), d["REAL"])
    clear(p)


def mix_images(d, p) -> None:
    step = int(at(p.step, 1, np.int64)[0])
    x = read_real(p.x, (p.sources, p.cols), d["REAL"])
    drawn = words(p.seed, step, 2 * p.first, 2 * p.rows).reshape(-1, 2) >> 8
    drawn = drawn.astype(np.float32) * np.float32(2.0**-24)
    share = drawn[:, :1] * np.float32(0.5)
    if p.some:
        share = np.where(drawn[:, 1:] < 0.5, share, np.float32(0))
    own, following = np.arange(p.rows), (np.arange(p.rows) + 1) % p.sources
    write_real(p.out, x[own] + share * (x[following] - x[own]), d["REAL"])
    if p.targets:
        labels = at(p.labels, p.sources, np.int64)
        one_hot = (labels[:, None] == np.arange(p.classes)).astype(np.float32)
        mixed = one_hot[own] + share * (one_hot[following] - one_hot[own])
        at(p.targets, (p.rows, p.classes), np.float32)[...] = mixed


class Hidden:
    """A layer's products after dropout, and their batch norm."""

    def __init__(self, d, p) -> None:
        self.d, self.p, self.shape = d, p, (p.rows, p.cols)
        self.z = read_real(p.z, self.shape, d["PRODUCT"])
        self.kept = np.ones(self.shape, bool)
        if d["DROP"]:
            self.kept = bits_of(at(p.kept, (p.rows, -(-p.cols // 32)), np.uint32), p.cols)
        self.scale = np.float32(p.keep_scale)
        if d["DROP"] == 1:
            self.z = np.where(self.kept, self.z * self.scale, np.float32(0))

    def read_norm(self) -> None:
        names = ("mean", "inverse", "gamma", "beta")
        self.mean, self.inverse, self.gamma, self.beta = (
            at(self.p[name], self.p.cols, np.float32) for name in names
        )

    def inputs(self) -> np.ndarray:
        """Return what the non-linearity gets."""
        if not self.d["NORM"]:
            return self.z
        self.read_norm()
        self.normal = (self.z - self.mean) * self.inverse
        return self.normal * self.gamma + self.beta

    def of_product(self, dy, gamma, beta) -> np.ndarray:
        """Return the gradient of the products from that after the gate."""
        if self.d["NORM"]:
            share = np.float32(self.p.share)
            dy = dy - beta * share - self.normal * (gamma * share)
            dy = dy * (self.gamma * self.inverse)
        if self.d["DROP"] == 1:
            dy = np.where(self.kept, dy * self.scale, np.float32(0))
        return dy


def normalise(
    d, p, partials, tickets, mean, inverse, running_mean, running_variance, sums_of_rows, decay,
    gain, eps, to,
) -> None:  # fmt: skip
    z = Hidden(d, p).z.astype(np.float64)
    if d.get("SHARED_BATCH"):
        at(sums_of_rows, (2, p.cols), np.float64)[...] = z.sum(axis=0), (z * z).sum(axis=0)
        return
    statistics = (z.sum(axis=0), ((z - z[0]) ** 2).sum(axis=0))
    average = statistics[0] * p.share
    variance = statistics[1] * p.share - (average - z[0]) ** 2
    set_statistics(p, average, variance, mean, inverse, running_mean, running_variance, decay, eps)


def set_statistics(p, average, variance, mean, inverse, running_mean, running_variance, decay, eps):
    average, variance = average.astype(np.float32), np.maximum(variance, 0).astype(np.float32)
    at(mean, p.cols, np.float32)[...] = average
    at(inverse, p.cols, np.float32)[...] = 1 / np.sqrt(variance + np.float32(eps))
    for address, value in ((running_mean, average), (running_variance, variance)):
        array = at(address, p.cols, np.float32)
        array[...] = array * decay + (1 - decay) * value


def whole_statistics(
    d, p, sums_of_rows, mean, inverse, running_mean, running_variance, decay, gain, eps
) -> None:
    first, second = at(sums_of_rows, (2, p.cols), np.float64) * p.share
    variance = second - first**2
    set_statistics(p, first, variance, mean, inverse, running_mean, running_variance, decay, eps)


def activate(d, p, to) -> None:
    layer = Hidden(d, p)
    y = layer.inputs()
    if d["OUTPUT"] == 2:
        passes, out = y > 0, np.maximum(y, 0)
        if d["DROP"] == 2:
            passes, out = passes & layer.kept, np.where(layer.kept, out * layer.scale, 0)
    else:
        passes, out = abs(y) <= np.float32(to.window), np.where(y >= 0, 1, -1)
        if d["OUTPUT"] in (0, 4):
            write_signs(to.words, y >= 0)
            at(to.pops, p.rows, np.int32)[...] += (y >= 0).sum(axis=1, dtype=np.int32)
    if d["OUTPUT"] != 0:
        write_real(to.dense, out.astype(np.float32), d["REAL"])
    if d["GATE"]:
        at(to.gate, (p.rows, -(-p.cols // 32)), np.uint32)[...] = mask_of(passes)


def incoming(d, p, layer, grad, gate) -> np.ndarray:
    dy = read_real(grad, layer.shape, d["REAL"])
    if d["GATE"] == 1:
        dy = np.where(bits_of(at(gate, (p.rows, -(-p.cols // 32)), np.uint32), p.cols), dy, 0)
    if d["GATE"] == 2:
        dy = dy.clip(-1, 1)
    return dy * layer.scale if d["DROP"] == 2 else dy


def gradient_sums(d, p, grad, out, gate, partials, tickets, grad_gamma, grad_beta) -> None:
    layer = Hidden(d, p)
    layer.inputs()
    dy = incoming(d, p, layer, grad, gate).astype(np.float64)
    at(grad_beta, p.cols, np.float32)[...] = dy.sum(axis=0)
    at(grad_gamma, p.cols, np.float32)[...] = (dy * layer.normal).sum(axis=0)


def gradient(d, p, grad, out, gate, grad_gamma, grad_beta, row_most, col_most) -> None:
    layer = Hidden(d, p)
    layer.inputs()
    sums = [at(address, p.cols, np.float32) for address in (grad_gamma, grad_beta)]
    dz = layer.of_product(incoming(d, p, layer, grad, gate), *sums)
    write_real(out, dz.astype(np.float32), d["REAL"])
    if "GREATEST" in d:
        find_greatest(d, out, dz.shape, row_most, col_most)


def loss_and_gradient(d, logits, labels, smoothing, share):
    """Return the loss of each row, and the gradient of the mean loss."""
    rows, classes = logits.shape
    logits = logits.astype(np.float64)
    if d["SOFT"]:
        targets = at(labels, (rows, classes), np.float32).astype(np.float64)
    else:
        targets = at(labels, rows, np.int64)[:, None] == np.arange(classes)
        targets = targets.astype(np.float64)
    if d["LOSS"] == 1:
        signs = 2 * targets - 1
        over = np.maximum(1 - signs * logits, 0)
        return (over**2).sum(axis=1) / classes, signs * over * (-2 / classes * share)
    entropy = 0.0
    if d["LOSS"] == 0:
        targets = targets * (1 - smoothing) + smoothing / classes
    else:
        entropy = (targets * np.log(np.maximum(targets, 1e-300))).sum(axis=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    softmax = np.exp(shifted - log_total)
    loss = (targets * (log_total - shifted)).sum(axis=1) + entropy
    return loss, (softmax * targets.sum(axis=1, keepdims=True) - targets) * share


def stride(classes: int) -> int:
    return -(-classes // 4) * 4


class LastLayer(Hidden):
    """The last hidden layer as the head reads it."""

    def __init__(self, d, p, weight, window=0.0) -> None:
        super().__init__(d, p)
        self.weight = at(weight, (p.cols, d["CLASSES"]), np.float32)
        y = self.inputs()
        self.passes = np.ones(self.shape, np.float32)
        self.values = y
        if d["HEAD"] == 1:
            self.passes, self.values = (y > 0).astype(np.float32), np.maximum(y, 0)
        elif d["HEAD"] == 2:
            self.weight = np.where(self.weight >= 0, np.float32(1), np.float32(-1))
            self.passes = (abs(y) <= np.float32(window)).astype(np.float32)
            self.values = np.where(y >= 0, np.float32(1), np.float32(-1))
        if d["DROP"] == 2:
            factor = np.where(self.kept, self.scale, np.float32(0))
            self.values, self.passes = self.values * factor, self.passes * factor

    def gated(self, dh) -> np.ndarray:
        if self.d["GATE"] == 2:
            return dh.clip(-1, 1)
        return dh if self.d["GATE"] == 0 and self.d["HEAD"] == 2 else dh * self.passes


def logits(d, p, weight, labels, smoothing, share, factor, out, grad, partials) -> None:
    layer, classes = LastLayer(d, p, weight), d["CLASSES"]
    product = layer.values.astype(np.float64) @ layer.weight
    found = at(out, (p.rows, classes), np.float32)
    found[...] = product
    if d["OUTPUT_NORM"]:
        return
    scale = float(at(factor, 1, np.float32)[0]) if d["HEAD"] == 2 else 1.0
    found[...] = product * scale
    losses, of_logits = loss_and_gradient(d, found, labels, float(smoothing), float(share))
    at(grad, (p.rows, stride(classes)), np.float32)[:, :classes] = of_logits * scale
    # Kept for `head_sums`, which launches follow; the kernels' blocks leave parts there.
    Emulator.loss[partials] = losses.sum(), (of_logits * product).sum()


def output_norm(d, p) -> None:
    classes, part = d["CLASSES"], d.get("PART", 0)
    z = at(p.logits, (p.rows, classes), np.float32)
    wide = z.astype(np.float64)
    totals = at(p.totals, (2, classes), np.float64)
    if part == 1:
        totals[...] = wide.sum(axis=0), (wide**2).sum(axis=0)
        return
    average = wide.mean(axis=0) if part == 0 else totals[0] * p.share
    variance = wide.var(axis=0) if part == 0 else totals[1] * p.share - average**2
    average, variance = average.astype(np.float32), np.maximum(variance, 0).astype(np.float32)
    inverse = 1 / np.sqrt(variance + np.float32(p.eps))
    gamma, beta = (at(address, classes, np.float32) for address in (p.gamma, p.beta))
    normal = (z - average) * inverse
    grads = at(p.grad, (p.rows, stride(classes)), np.float32)[:, :classes]
    if part != 3:
        for address, value in ((p.running_mean, average), (p.running_variance, variance)):
            array = at(address, classes, np.float32)
            array[...] = array * p.decay + (1 - p.decay) * value
        losses, of_logits = loss_and_gradient(
            d, normal * gamma + beta, p.labels, p.smoothing, p.loss_share
        )
        grads[...] = of_logits
        at(p.grad_beta, classes, np.float32)[...] = of_logits.sum(axis=0)
        at(p.grad_gamma, classes, np.float32)[...] = (of_logits * normal).sum(axis=0)
        at(p.mean_loss, 1, np.float32)[...] = losses.sum() * p.loss_share
    if part != 2:
        sources = (p.whole_gamma, p.whole_beta) if part else (p.grad_gamma, p.grad_beta)
        of_gamma, of_beta = (at(address, classes, np.float32) for address in sources)
        grads[...] = (grads - of_beta * p.share - normal * (of_gamma * p.share)) * (gamma * inverse)
        z[...] = normal * gamma + beta


def head_sums(d, p, back, partials, tickets, grad_weight, grad_gamma, grad_beta) -> None:
    layer, classes = LastLayer(d, p, back.weight, back.window), d["CLASSES"]
    of_logits = at(back.grad, (p.rows, stride(classes)), np.float32)[:, :classes]
    wide = of_logits.astype(np.float64)
    at(grad_weight, (p.cols, classes), np.float32)[...] = layer.values.T.astype(np.float64) @ wide
    if not d["OUTPUT_NORM"]:
        total, of_factor = Emulator.loss[back.partials]
        at(back.mean_loss, 1, np.float32)[...] = total * back.share
        if d["HEAD"] == 2:
            at(back.grad_factor, 1, np.float32)[...] = of_factor
    if d["NORM"]:
        dy = layer.gated(wide @ layer.weight.T)
        at(grad_beta, p.cols, np.float32)[...] = dy.sum(axis=0)
        at(grad_gamma, p.cols, np.float32)[...] = (dy * layer.normal).sum(axis=0)


def head_gradient(d, p, back, grad_gamma, grad_beta, row_most, col_most) -> None:
    layer, classes = LastLayer(d, p, back.weight, back.window), d["CLASSES"]
    of_logits = at(back.grad, (p.rows, stride(classes)), np.float32)[:, :classes]
    sums = [at(address, p.cols, np.float32) for address in (grad_gamma, grad_beta)]
    dz = layer.of_product(layer.gated(of_logits @ layer.weight.T), *sums)
    write_real(back.out, dz.astype(np.float32), d["REAL"])
    if "GREATEST" in d:
        find_greatest(d, back.out, dz.shape, row_most, col_most)


def adam(
    d, parameters, rates, ring, step, gain_mean, gain_square, mean_loss, loss, partials, earlier,
    counted, final, ticket,
) -> None:  # fmt: skip
    at_step = int(at(step, 1, np.int64)[0])
    lr, factor, eps, _ = at(rates, (ring, 4), np.float32)[at_step % ring].astype(np.float64)
    for p in parameters.at[: parameters.count]:
        flags, count = p.flags, p.count
        w, m, s = (at(p[name], count, np.float32) for name in ("weight", "mean", "square"))
        rounded = d["REAL"] != "float" and flags & 16
        g = read_real(p.grad, count, "bfloat16_bits" if rounded else "float").astype(np.float64)
        v = w.astype(np.float64)
        if flags & 2:
            g = g.clip(-1, 1)
        if flags & 4:
            g = np.where(abs(v) <= 1, g, 0)
        if d["PENALTY"] == 1:
            part = p.penalty * abs(v).sum()
            g = g + p.penalty * np.sign(v)
        elif d["PENALTY"] == 2:
            part = p.penalty * (1 - v**2).sum()
            g = g - 2 * p.penalty * v
        m[...] += (g - m) * gain_mean
        s[...] += (g * g - s) * gain_square
        v = v * (1 - lr * p.lr_scale * p.weight_decay)
        v = v - m / (np.sqrt(s.astype(np.float64)) + eps) * factor * p.lr_scale
        w[...] = v.clip(-p.limit, p.limit) if p.limit > 0 else v
        if d["WRITE_GRADIENT"]:
            at(p.kept_grad, count, np.float32)[...] = g
        if d["PENALTY"]:
            tiles = -(-p.cols // 128) * -(-p.rows // 32)
            own = at(partials, earlier + p.first_block + tiles, np.float32)[-tiles:]
            own[...], own[0] = 0, part
        signs = w.reshape(p.rows, p.cols) >= 0 if flags & 1 else None
        if flags & 1 and p.words and flags & 32:
            sent = at(p.words, (-(-p.rows // 32), p.cols), np.uint32)
            sent[...] = mask_of(signs.T).T
        elif flags & 1 and p.words:
            write_signs(p.words, signs.T)
            at(p.pops, p.cols, np.int32)[...] = signs.sum(axis=0)
        if p["copy"]:
            copied = np.where(signs, 1, -1).reshape(-1) if flags & 1 else w
            write_real(p["copy"], copied.astype(np.float32), d["REAL"])
    if final:
        total = 0.0
        if d["PENALTY"]:
            total = at(partials, max(counted, 1), np.float32)[:counted].astype(np.float64).sum()
        at(loss, 1, np.float32)[...] = at(mean_loss, 1, np.float32)[0] + total
        at(step, 1, np.int64)[...] += 1


def adam_of_ranks(d, parameters, *others) -> None:
    """Each gradient is the sum of those of all ranks, in their order; rounded once."""
    *others, away = others
    distances = np.frombuffer(away["of"], np.int64)[: d["RANKS"]].tolist()
    real = d["REAL"]
    sums = []  # kept until they have been read
    for p in parameters.at[: parameters.count]:
        total, *more = (read_real(p.grad + far, p.count, real) for far in distances)
        total = total.copy()
        for gradient in more:
            total += gradient
        sums.append(total if real == "float" else narrowed(total))
        p["grad"] = sums[-1].ctypes.data
    adam(d, parameters, *others)


def unpack_rows(d, signs, rows, cols, out) -> None:
    write_real(out, read_signs(signs, int(rows), int(cols)), d["REAL"])


def unpack_columns(d, signs, rows, cols, out) -> None:
    write_real(out, read_signs(signs, int(cols), int(rows)).T, d["REAL"])


def place_signs(d, weights) -> None:
    for p in weights.at[: weights.count]:
        lines = np.empty((-(-p.rows // 32), p.cols), np.uint32)
        for word in range(len(lines)):
            rank, own = divmod(word, p.groups)
            sent = p.gathered + 4 * (rank * weights.of_rank + own * p.cols)
            lines[word] = at(sent, p.cols, np.uint32)
        bits = bits_of(lines.T, p.rows)
        if p.words:
            write_signs(p.words, bits)
            at(p.pops, p.cols, np.int32)[...] = bits.sum(axis=1)
        if p.dense:
            kind = "float" if p.wide else d["REAL"]
            write_real(p.dense, np.where(bits.T, np.float32(1), np.float32(-1)), kind)


def soften(d, address, rows, temperature, share, add, out) -> None:
    z = at(address, (rows, d["CLASSES"]), np.float32).astype(np.float64) / temperature
    powers = np.exp(z - z.max(axis=1, keepdims=True))
    to = at(out, z.shape, np.float32)
    to[...] = (to if add else 0) + share * powers / powers.sum(axis=1, keepdims=True)


def teacher_layer(d, address, a, b, rows, cols, out) -> None:
    z = at(address, (rows, cols), np.float32)
    a, b = at(a, cols, np.float32), at(b, cols, np.float32)
    y = np.where(z >= a, b, -b) if d["KIND"] == 2 else z * a + b
    y = np.maximum(y, 0) if d["KIND"] == 1 else y
    if out:
        write_real(out, y.astype(np.float32), d["REAL"])
    else:
        z[...] = y


EMULATED = {
    f.__name__: f
    for f in (
        gather, move_among_neighbors, attack, dropout_mask, move_images, mix_images, normalise,
        whole_statistics, activate, gradient_sums, gradient, logits, output_norm, head_sums,
        head_gradient, adam, adam_of_ranks, unpack_rows, unpack_columns, place_signs, soften,
        teacher_layer, most, quantize, turn,
    )
} | {"gather_deformed": gather}  # fmt: skip


class Array(np.ndarray):
    """An array with the methods of CuPy's that a step uses."""

    def get(self, stream=None):
        return np.array(self)

    def set(self, array, stream=None):
        self[...] = array

    @property
    def data(self):
        clear = lambda value, nbytes: self.fill(value)  # noqa: E731
        return SimpleNamespace(device_id=0, memset_async=clear)

    @property
    def device(self):
        return SimpleNamespace(id=0)


class Stream(contextlib.nullcontext):
    """All streams: what is launched ends before the launch returns."""

    ptr = 1

    def record(self, event=None) -> None:
        """Do nothing."""

    wait_event = record


class Blas:
    """Products of what lies in arrays of the operands' type."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def multiply(self, a, b, out, *, transpose_a=False, transpose_b=False, scale=1.0) -> None:
        a, b = (widened(x) if x.dtype == np.uint16 else x for x in (a, b))
        a, b = (a.T if transpose_a else a), (b.T if transpose_b else b)
        found = (np.float32(scale) * (a.astype(np.float64) @ b)).astype(np.float32)
        out[...] = narrowed(found) if out.dtype == np.uint16 else found


def gemm(a, b, out, options) -> None:
    """Multiply packed signs."""
    (rows, k), cols = a.shape, b.shape[1]
    left = read_signs(a.words.ctypes.data, rows, k)
    assert (a.popcounts == (left > 0).sum(axis=1)).all()
    right = read_signs(b.words.ctypes.data, cols, k).T
    assert (b.popcounts == (right > 0).sum(axis=0)).all()
    out[...] = left @ right


def transposed_product(signs, matrix, out, device, below=None, scratch=None) -> None:
    weights = read_signs(signs.words.ctypes.data, signs.shape[1], signs.shape[0])
    out[...] = narrowed(widened(matrix) @ weights)
    if below is not None:
        choices = {**dict(below.layer.defines()), "REAL": "bfloat16_bits"}
        choices["GATE"] = fused_layers.GATES[below.gate]
        sums = {n: _address(array) for n, array in below.layer.gradients().items()}
        gradient_sums(
            choices, decode(STRUCTS["Layer"], below.layer.pack()), grad=_address(out), out=0,
            gate=_address(below.mask), partials=0, tickets=0, **sums,
        )  # fmt: skip


def weight_gradient(signs, matrix, out, device) -> None:
    inputs = read_signs(signs.words.ctypes.data, *signs.shape)
    out[...] = narrowed(inputs.T @ widened(matrix))


class Emulator:
    """Makes fused steps run on the host, within a test."""

    loss: dict = {}  # noqa: RUF012

    def __init__(self, monkeypatch, by_bits: bool = False, parts: int = 0) -> None:
        self.launches: list[str] = []
        made = lambda make: lambda *a, **k: make(*a, **k).view(Array)  # noqa: E731
        nothing = lambda *a, **k: None  # noqa: E731
        stream = Stream()
        cupy = SimpleNamespace(
            **{n: made(getattr(np, n)) for n in ("empty", "zeros", "empty_like", "zeros_like")},
            **{n: getattr(np, n) for n in ("add", "where", "isnan", "asarray")},
            ndarray=type("ndarray", (), {}),
            cuda=SimpleNamespace(
                Stream=lambda **k: stream,
                get_current_stream=lambda: stream,
                Event=lambda **k: SimpleNamespace(record=nothing, synchronize=nothing),
                Device=lambda: SimpleNamespace(use=nothing),
                alloc_pinned_memory=bytearray,
            ),
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        for module in (fused, planes):
            monkeypatch.setattr(module, "load_kernel", self._load)
        monkeypatch.setattr("cupybnn.training.fast.rounded.prepare_scaled", prepare_scaled)
        for module in (fused, fused_walk):
            monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(fused_walk, "architecture", lambda device: 80)
        monkeypatch.setattr(fused_walk, "shared_memory_limit", lambda device: 99 << 10)
        monkeypatch.setattr("cupybnn.backends.cuda.structs.address", _address)
        for name in ("fused_parameter", "fused_shares"):
            monkeypatch.setattr(f"cupybnn.backends.cuda.{name}.address", _address)
        fast = "cupybnn.training.fast"
        monkeypatch.setattr(f"{fast}.buffers.address", _address)
        monkeypatch.setattr(f"{fast}.step.compile_together", _run_dry)
        monkeypatch.setattr("cupybnn.backends.cuda.blas.Blas", Blas)
        monkeypatch.setattr("cupybnn.backends.cuda.blas.capturable", lambda: True)
        monkeypatch.setattr("cupybnn.backends.cuda.gemm", gemm)
        monkeypatch.setattr(f"{fast}.hidden.pack", pack)
        reason = None if by_bits else "the host has no tensor cores"
        monkeypatch.setattr(sign_gemm, "unsupported_reason", lambda *a: reason)
        monkeypatch.setattr(sign_gemm, "unsupported_layer", lambda *a: reason)
        monkeypatch.setattr(sign_gemm, "pays", lambda *a: not parts)
        monkeypatch.setattr(sign_gemm, "parts", lambda *a: parts)
        monkeypatch.setattr(plane_gemm, "pays", lambda *a: True)
        monkeypatch.setattr(plane_gemm, "stored_product", self._stored_product)
        monkeypatch.setattr(plane_gemm, "weight_update", self._plane_update)
        monkeypatch.setattr(sign_gemm, "transposed_product", transposed_product)
        monkeypatch.setattr(sign_gemm, "weight_gradient", self._weight_gradient)
        monkeypatch.setattr(sign_gemm, "weight_update", self._weight_update)
        monkeypatch.setattr("cupybnn.training.setup._unfused_reason", self._unfused_reason)

    def _weight_gradient(self, signs, matrix, out, device, scratch=None) -> None:
        if scratch is None:
            self.launches.append("weight_gradient")
            weight_gradient(signs, matrix, out, device)
            return
        number = len(scratch)
        self.launches.append(f"weight_gradient in {number} parts")
        inputs = np.array_split(read_signs(signs.words.ctypes.data, *signs.shape), number)
        gradients = np.array_split(widened(matrix), number)
        for part, some, gradient in zip(scratch, inputs, gradients, strict=True):
            part[...] = some.T @ gradient
        out[...] = narrowed(scratch.sum(axis=0))

    def _weight_update(self, signs, matrix, update, *, defines, device) -> None:
        if compiler.is_dry_run():
            return
        gradient = np.empty((signs.shape[1], matrix.shape[1]), np.uint16)
        weight_gradient(signs, matrix, gradient, device)
        self._update(gradient, update, defines)

    def _stored_product(self, a, b, scale, out, device) -> None:
        self.launches.append("stored_product")
        prepare_scaled(a, b, out, rows=scale)(None)

    def _plane_update(self, a, b, scale, update, *, defines, device) -> None:
        if compiler.is_dry_run():
            return
        self.launches.append("plane_update")
        gradient = np.empty((a.shape[0], b.shape[1]), np.uint16)
        prepare_scaled(a, b, gradient, columns=scale)(None)
        self._update(gradient, update, defines)

    @staticmethod
    def _update(gradient, update, defines) -> None:
        p = decode(STRUCTS["Parameter"], update["parameter"])
        p |= {"grad": gradient.ctypes.data, "flags": p.flags | 16}
        rest = {n: _address(update[n]) for n in ("rates", "step", "partials")}
        choices = {"REAL": "bfloat16_bits", **dict(defines)}
        adam(
            choices, Fields(at=[p], count=1), ring=update["ring"],
            gain_mean=update["gain_mean"], gain_square=update["gain_square"], mean_loss=0, loss=0,
            earlier=update["earlier"], counted=0, final=False, ticket=0, **rest,
        )  # fmt: skip

    @staticmethod
    def _unfused_reason(model, optimizer, data, config, teachers):
        from cupybnn.training.fast import unsupported_reason

        if not config.fused:
            return "fused is False"
        return unsupported_reason(config, model, optimizer, 90, teachers)

    def _load(self, source, function, defines, device, shared=0):
        if compiler.is_dry_run():
            return lambda *arguments, **options: None
        kernel, run = KERNELS[source, function], EMULATED[function]
        choices = {"SOFT": 0, **dict(defines)}

        def launch(grid, block, arguments, shared_mem=0) -> None:
            values = []
            for field, value in zip(kernel.fields, arguments, strict=True):
                struct = kernel._structs.get(field.type)
                if struct is None:
                    values.append(value.item())
                else:
                    values.append(decode(struct, value.tobytes()))
            self.launches.append(function)
            run(choices, *values)

        return launch


def _run_dry(launch, notify) -> None:
    """Do what comes before a first step, without the compilation."""
    with compiler._dry(lambda key: None), np.errstate(all="ignore"):
        launch()


def _address(x) -> int:
    if x is None or isinstance(x, int):
        return x or 0
    return int(x.ctypes.data)
