"""The one launch for pixels: how it is dealt out, what it reads, and that it is exact."""

from __future__ import annotations

import numpy as np
import pytest
from test_packed_network import hidden, settle

from cupybnn import PackedNetwork, nn
from cupybnn.backends.cuda import pixel_network
from cupybnn.backends.cuda.pixel_network import Team
from cupybnn.backends.cuda.pixel_tiles import BitLayer, PixelLayer, bit_tiles, pixel_tiles


def test_narrow_networks_go_to_clusters_and_wide_ones_to_the_grid():
    assert pixel_network.choose_team(16, 1, 132) == Team(8, 16, 16, 16)
    assert pixel_network.choose_team(3, 64, 132) == Team(8, 16, 16, 128)
    assert pixel_network.choose_team(17, 64, 132) == Team(16, 1, 17, 68)
    assert pixel_network.choose_team(32, 64, 132) == Team(16, 1, 32, 128)
    assert pixel_network.choose_team(128, 1, 132) == Team(8, 1, 128, 128)
    assert pixel_network.choose_team(128, 64, 132) == Team(64, 1, 128, 128)
    assert pixel_network.choose_team(133, 1, 132) is None


def by_fragments(tile: np.ndarray, rows: np.ndarray, steps: int, multiply) -> np.ndarray:
    """Multiply as the tensor cores do, (rows, 32): lane 4 g + q has units g and g + 8 of 16."""
    out = np.zeros((len(rows), 32), np.int64)
    fragments = tile.reshape(2, steps, 8, 4, 4)
    for m in range(2):
        for half in range(2):
            for g in range(8):
                for step in range(steps):
                    for high in range(2):
                        words = fragments[m, step, g, :, 2 * high + half]
                        there = rows[:, step * 8 + high * 4 :][:, :4]
                        out[:, m * 16 + half * 8 + g] += multiply(words, there)
    return out


@pytest.mark.parametrize(("inputs", "units"), [(40, 33), (300, 64), (256, 5)])
def test_tiles_of_signs_hold_the_weights_as_lanes_take_them(inputs, units):
    rng = np.random.default_rng(units)
    plus, flip = rng.random((inputs, units)) < 0.5, rng.random(units) < 0.5
    threshold = rng.integers(-5, 5, units).astype(np.int32)
    threshold[0] = np.iinfo(np.int32).min
    tiles, steps = bit_tiles(BitLayer(plus, threshold, flip))
    signs = rng.random((7, inputs)) < 0.5
    lines = np.zeros((7, steps * 32), np.uint8)
    lines[:, : -(-inputs // 8)] = np.packbits(signs, axis=1, bitorder="little")
    words = lines.view("<u4")

    def both(a, b):
        return np.bitwise_count(a & b).sum(1).astype(np.int64)

    expected = (np.where(signs, 1, -1) @ np.where(plus, 1, -1) >= threshold) != flip
    for i, tile in enumerate(tiles):
        count = by_fragments(tile[: 512 * steps // 2], words, steps, both)
        value = 4 * count - 2 * signs.sum(1)[:, None]
        least, flips = tile[-36:-4].view(np.int32), tile[-4]
        got = (value >= least) != (flips >> np.arange(32) & 1).astype(bool)
        here = expected[:, 32 * i : 32 * i + 32]
        np.testing.assert_array_equal(got[:, : here.shape[1]], here)
        assert not got[:, here.shape[1] :].any()


def test_tiles_of_pixels_hold_the_digits():
    rng = np.random.default_rng(0)
    digits = rng.integers(-128, 128, (3, 40, 50)).astype(np.int8)
    threshold = rng.integers(-9, 9, 40).astype(np.int32)
    tiles, steps = pixel_tiles(PixelLayer(digits, threshold, threshold > 0))
    pixels = np.zeros((5, steps * 32), np.uint8)
    pixels[:, :50] = rng.integers(0, 256, (5, 50))

    def dot(a, b):
        signed, unsigned = a.copy().view(np.int8), b.copy().view(np.uint8)
        return (signed.astype(np.int64) * unsigned).sum(1)

    for i, tile in enumerate(tiles):
        for d in range(3):
            part = tile[d * 256 * steps : (d + 1) * 256 * steps]
            got = by_fragments(part, pixels.view("<u4"), steps, dot)
            expected = pixels[:, :50].astype(np.int64) @ digits[d, 32 * i : 32 * i + 32].T
            np.testing.assert_array_equal(got[:, : expected.shape[1]], expected)


# --- on a GPU

BATCHES = (1, 2, 7, 8, 9, 16, 17, 31, 33, 63, 64, 65)


def exact_real(inputs: int, units: int, seed: int) -> nn.Module:
    layer = nn.Linear(inputs, units, rng=0)
    weight = np.random.default_rng(seed).integers(-32, 33, (inputs, units)) / 64
    layer.weight.write()[...] = weight
    return layer


def network(sizes: tuple[int, ...], first: str, last: str) -> nn.Module:
    """A network whose logits are exact for pixels divided by 256."""
    if first == "real":
        chain: list[nn.Module] = [exact_real(*sizes[:2], 1)]
    else:
        chain = [nn.BinaryLinear(*sizes[:2], binary_input=False, rng=0)]
    chain += [nn.BatchNorm(sizes[1]), nn.Sign()]
    for i in range(1, len(sizes) - 2):
        chain += hidden(*sizes[i : i + 2], i)
    if last == "real":
        return settle(nn.Sequential(*chain, exact_real(*sizes[-2:], 2)))
    end = [nn.BinaryLinear(*sizes[-2:], rng=2), nn.Scale(0.5), nn.BatchNorm(sizes[-1]), nn.ReLU()]
    return settle(nn.Sequential(*chain, *end))


NETWORKS = [((784, 512, 512, 512, 10), "real", "real"), ((784, 512, 10), "binary", "binary"),
            ((20, 40, 7), "real", "real"), ((785, 100, 320, 33, 64), "binary", "real"),
            ((30, 545, 1000, 3), "real", "binary"), ((784, 4096, 4096, 10), "real", "real"),
            ((127, 2050, 31, 1), "binary", "real"), ((1, 1, 1), "real", "real")]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "first", "last"), NETWORKS)
def test_pixels_give_exact_logits_in_one_launch(sizes, first, last):
    import cupy

    net = PackedNetwork.from_model(network(sizes, first, last), pixel_max=256)
    on_gpu = net.to("cuda")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (max(BATCHES), sizes[0])).astype(np.uint8)
    pixels[3] = 255
    expected, there = net(pixels), cupy.asarray(pixels)
    assert on_gpu(there[:1]).shape == (1, sizes[-1])
    if on_gpu._forward.cuda.pixel_launch is None:
        pytest.skip("the launch for pixels needs a Hopper GPU")
    on_gpu._forward.cuda.one_launch = None  # never instead
    on_gpu._forward.cuda.most_rows = 0
    for count in BATCHES:
        many = [on_gpu(there[i % 2 : i % 2 + count]) for i in range(20)]  # aligned, or maybe not
        for i, got in enumerate(many):
            here = expected[i % 2 : i % 2 + count]
            np.testing.assert_array_equal(got.get(), here)


@pytest.mark.gpu
def test_a_launch_that_begins_early_waits_for_its_pixels():
    import cupy

    net = PackedNetwork.from_model(network((784, 512, 10), "real", "real"), pixel_max=256)
    on_gpu = net.to("cuda")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 784)).astype(np.uint8)
    expected, there = net(pixels), cupy.asarray(pixels)
    on_gpu(there[:8])
    if on_gpu._forward.cuda.pixel_launch is None:
        pytest.skip("the launch for pixels needs a Hopper GPU")
    x = cupy.empty((8, 784), np.uint8)
    got = []
    for i in range(290):
        cupy.subtract(there[i : i + 8], 0, out=x)  # by a kernel, in front of the launch
        got += [on_gpu(x), on_gpu(x[:5])]
    for i in range(290):
        np.testing.assert_array_equal(got[2 * i].get(), expected[i : i + 8])
        np.testing.assert_array_equal(got[2 * i + 1].get(), expected[i : i + 5])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 2048])
def test_streams_and_a_users_graph_do_not_disturb_each_other(width):
    import cupy

    net = PackedNetwork.from_model(network((50, width, width, 5), "binary", "real"), pixel_max=256)
    on_gpu = net.to("cuda")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 50)).astype(np.uint8)
    expected, there = net(pixels), cupy.asarray(pixels)
    on_gpu(there[:1])
    if on_gpu._forward.cuda.pixel_launch is None:
        pytest.skip("the launch for pixels needs a Hopper GPU")
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    pool, graphs = cupy.cuda.MemoryPool(), []
    for stream in streams[:2]:
        with stream, cupy.cuda.using_allocator(pool.malloc):
            on_gpu(there[:9])
            stream.synchronize()
            stream.begin_capture()
            logits = on_gpu(there[20:29])
            graphs.append((stream.end_capture(), logits))
    results = []
    for i in range(200):
        with streams[i % 3]:
            results.append((i, on_gpu(there[i : i + 1 + i % 64])))
            if i % 3 < 2:
                graphs[i % 3][0].launch()
    for stream in streams:
        stream.synchronize()
    for i, got in results:
        np.testing.assert_array_equal(got.get(), expected[i : i + 1 + i % 64])
    for _, got in graphs:
        np.testing.assert_array_equal(got.get(), expected[20:29])
