"""A packed network on a GPU: how it is dealt out to launches, and that each way gives the same."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from test_packed_network import MODELS, hidden, made, settle

from cupybnn import PackedNetwork, nn
from cupybnn.backends.cuda import packed_network
from cupybnn.backends.cuda.packed_network import NETWORK, NETWORK_LAYER, Layer, NetworkLaunch, Team
from cupybnn.backends.epilogue import Epilogue, apply
from cupybnn.deploy.cuda_forward import split_steps
from cupybnn.deploy.cuda_graphs import Recent
from cupybnn.deploy.layers import Step, apply_steps

# --- what is decided on the host


def layers(*sizes: int, product: str = "bits") -> list[Layer]:
    pairs = list(itertools.pairwise(sizes))
    return [
        Layer(product if i else "real", None, a, b, threshold=None if i + 1 == len(pairs) else "t")
        for i, (a, b) in enumerate(pairs)
    ]


def test_few_rows_of_narrow_networks_go_to_clusters_and_the_rest_to_the_whole_grid():
    narrow, wide = layers(784, 512, 512, 10), layers(784, 4096, 4096, 10)
    large, small = 227 << 10, 99 << 10
    assert packed_network.choose_team(narrow, 1, 90, 132, large) == Team(8, 16, 16)
    assert packed_network.choose_team(narrow, 16, 90, 132, large) == Team(8, 16, 32)
    assert packed_network.choose_team(narrow, 64, 90, 132, large) == Team(32, 1, 128)
    assert packed_network.choose_team(narrow, 64, 120, 132, large) == Team(32, 1, 128)
    assert packed_network.choose_team(wide, 1, 90, 132, large) == Team(8, 1, 128)
    assert packed_network.choose_team(wide, 9, 90, 132, large) == Team(16, 1, 132)
    assert packed_network.choose_team(wide, 64, 80, 108, large) == Team(32, 1, 108)
    assert packed_network.choose_team(wide, 64, 86, 84, small) == Team(32, 1, 84, 1 << 14)
    assert Team(32, 1, 84, 1 << 14).shared <= small


def test_a_tile_is_a_word_of_signs_or_a_few_numbers():
    assert [(y.width, y.tiles) for y in layers(784, 100, 10)] == [(32, 4), (32, 1)]
    assert [(y.width, y.tiles) for y in layers(784, 100, 10, product="real")] == [(32, 4), (4, 3)]
    assert layers(784, 129)[0].width == 32


@pytest.mark.parametrize(
    ("given", "capability", "words"),
    [
        (layers(784, 512, 10), 90, ""),
        (layers(784, 512, 10), 75, "needs compute capability 8.0; this is 7.5"),
        (layers(*[32] * 18), 90, "16 layers at most; there are 17"),
        (layers(784, 30000, 10), 90, "16384 signs a row at most; there are 30000"),
        ([Layer("real", None, 4, 3, steps=[("relu", None)] * 5)], 90, "4 steps after a product"),
    ],
)
def test_what_one_launch_cannot_walk(given, capability, words):
    reason = packed_network.unsupported_reason(given, capability)
    assert words in reason
    assert bool(words) == bool(reason)


def array(pointer: int, *shape: int) -> SimpleNamespace:
    flags = SimpleNamespace(c_contiguous=True)
    return SimpleNamespace(data=SimpleNamespace(ptr=pointer), shape=shape, flags=flags)


def test_layers_are_what_the_kernel_reads():
    given = [
        Layer("real", array(16, 20, 36), 20, 36, array(32), array(48)),
        Layer("bits", SimpleNamespace(words=array(64), popcounts=array(80)), 36, 40,
              steps=[("multiply", array(96)), ("add", array(112)), ("relu", None)]),
        Layer("real", array(128, 40, 8), 40, 8),
    ]  # fmt: skip
    launch = NetworkLaunch(given, 0.25, 0)
    assert launch.most_rows == 64
    size = NETWORK_LAYER.size
    fixed = np.frombuffer(launch._argument, np.int64)
    names = ["weight", "pops", "threshold", "flip", "by0", "by1", "by2", "by3", "kinds", "steps",
             "inputs", "units", "product", "pitch", "width"]  # fmt: skip
    first, second, third = (
        dict(zip(names, fixed[i * size // 8 :].tolist(), strict=False)) for i in range(3)
    )
    assert first == dict(
        zip(names, [16, 0, 32, 48, 0, 0, 0, 0, 0, 0, 20, 36, 0, 36, 32], strict=True)
    )
    # Kinds from the lowest four bits on: multiply 0, add 1, relu 2.
    assert second == dict(
        zip(names, [64, 80, 0, 0, 96, 112, 0, 0, 0x210, 3, 36, 40, 2, 0, 32], strict=True)
    )
    assert (third["width"], third["pitch"]) == (4, 8)
    after = fixed[16 * size // 8 :]
    assert after[:3].tolist() == [3, 2, 40]  # layers; words and numbers of a row between them
    assert after[3:4].view(np.float64) == 0.25
    assert not after[4:].any()  # what each launch sets
    assert (len(after[4:]), packed_network._OF_LAUNCH.offset) == (6, NETWORK.size - 48)


def test_large_real_layers_take_fewer_rows_in_one_launch():
    given = [Layer("real", array(16, 1, 4), 1 << 14, 1 << 10)]
    assert NetworkLaunch(given, 1.0, 0).most_rows == 16
    given = [Layer("real", array(16, 1, 4), 1 << 15, 1 << 14)]
    assert NetworkLaunch(given, 1.0, 0).most_rows == 0


def test_the_least_recently_used_goes_first():
    kept = Recent(3, 10)
    for key in "abc":
        kept.put(key, key.upper(), 1)
    assert kept.get("a") == "A"
    kept.put("d", "D", 1)
    assert [kept.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    kept.put("a", "new", 8)
    assert [kept.get(key) for key in "acd"] == ["new", "C", "D"]
    kept.put("e", "E", 9)  # 19 with the rest
    assert [kept.get(key) for key in "acde"] == [None, None, "D", "E"]
    kept.put("f", "F", 100)  # one is kept in any case
    assert (len(kept), kept.get("f")) == (1, "F")


@pytest.mark.parametrize(
    "kinds", ["", "multiply", "add", "relu", "multiply add", "add multiply", "multiply add relu",
              "multiply multiply add"],
)  # fmt: skip
def test_steps_are_split_so_that_nothing_changes(kinds):
    rng = np.random.default_rng(0)
    steps = [
        Step(kind, None if kind == "relu" else rng.normal(size=9).astype(np.float32))
        for kind in kinds.split()
    ]
    product = rng.integers(-99, 99, (7, 9)).astype(np.float32)
    epilogue, rest = split_steps(steps)
    if epilogue is None:
        assert list(rest) == steps
        return
    assert isinstance(epilogue, Epilogue)
    got = np.empty_like(product)
    apply(product.astype(np.int32), epilogue, got)
    np.testing.assert_array_equal(apply_steps(rest, got), apply_steps(steps, product.copy()))


def test_a_network_can_be_copied():
    net = PackedNetwork.from_model(made("all binary"))
    net._forward.cuda = object()  # stands for graphs, which cannot be
    again = copy.deepcopy(net)
    assert again._forward.cuda is None
    x = np.ones((3, 20), np.float32)
    np.testing.assert_array_equal(again(x), net(x))


# --- on a GPU

BATCHES = (1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 1000)


def wide(name: str) -> nn.Module:
    sizes = {"512": (784, 512, 512, 512, 10), "odd": (785, 100, 1101, 2050, 10)}[name]
    chain: list[nn.Module] = [nn.BinaryLinear(*sizes[:2], binary_input=False, rng=0)]
    chain += [nn.BatchNorm(sizes[1]), nn.Sign()]
    chain += hidden(*sizes[1:3], 1) + hidden(*sizes[2:4], 2)
    return settle(nn.Sequential(*chain, nn.Linear(*sizes[3:], rng=3)))


def whole_numbers(features: int, count: int) -> np.ndarray:
    """Return inputs whose products with signs are exact in any order."""
    return np.random.default_rng(count).integers(-9, 9, (count, features)).astype(np.float32)


def agree(got, expected) -> None:
    """Compare logits of which a real last layer may have been summed in another order."""
    np.testing.assert_allclose(got, expected, 1e-4, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*MODELS, "512", "odd"])
def test_every_batch_size_gives_the_same_three_times_over(name):
    import cupy

    model = made(name) if name in MODELS else wide(name)
    net = PackedNetwork.from_model(model)
    on_gpu = net.to("cuda")
    exact = name in ("all binary", "scales")
    for count in BATCHES:
        x = whole_numbers(net.inputs.features, count)
        expected, there = net(x), cupy.asarray(x)
        # Above 64 rows the second call captures a graph, and the third replays it.
        for got in [on_gpu(there) for _ in range(3)]:
            if exact:
                np.testing.assert_array_equal(got.get(), expected)
            else:
                agree(got.get(), expected)


@pytest.mark.gpu
def test_batch_sizes_are_walked_and_captured():
    import cupy

    net = PackedNetwork.from_model(wide("512")).to("cuda")
    x = cupy.asarray(whole_numbers(784, 65))
    for _ in range(3):
        net(x)
    forward = net._forward.cuda
    assert forward.most_rows == 64
    assert len(forward._graphs) == int(forward._captures)
    net(x[:64])
    assert len(forward._graphs) == int(forward._captures)


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [1, 16])
@pytest.mark.parametrize("rows", [8, 16, 32])
def test_every_team_gives_the_same(rows, cluster):
    import cupy

    team = Team(rows, cluster, 16 * 8 if cluster > 1 else 5)
    net = PackedNetwork.from_model(wide("512")).to("cuda")
    x = cupy.asarray(whole_numbers(784, 64))
    first = net(x).get()
    launch = net._forward.cuda.one_launch
    if cluster > 1 and (rows > 8 or packed_network.architecture(0) not in range(90, 120)):
        pytest.skip("clusters take eight rows each, on Hopper and data center Blackwell")
    launch.use(team, 64, "f")
    np.testing.assert_array_equal(net(x).get(), first)


@pytest.mark.gpu
def test_pixels_are_scaled_in_the_launch():
    import cupy

    net = PackedNetwork.from_model(wide("512"), pixel_max=256, image_shape=(28, 28))
    on_gpu = net.to("cuda")
    for count in (1, 40, 100):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28)).astype(np.uint8)
        for x in (pixels, pixels.astype(np.int64), pixels.reshape(count, 784)):
            for _ in range(3):
                agree(on_gpu(cupy.asarray(x)).get(), net(x))
        agree(on_gpu(cupy.asarray(pixels[0])).get(), net(pixels[0]))
    strided = cupy.asarray(np.repeat(pixels.reshape(100, 784), 2, axis=1))[:, ::2]
    agree(on_gpu(strided).get(), net(pixels))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [3, 100])
def test_results_are_kept_across_calls_streams_and_networks(count):
    import cupy

    nets = [PackedNetwork.from_model(made(n)) for n in ("all binary", "scales")]
    there = [net.to("cuda") for net in nets]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    results = []
    for i in range(60):
        x = whole_numbers(20, count) + i % 7
        net, stream = i % 2, streams[i // 2 % 2]
        with stream:
            results.append((net, x, there[net](cupy.asarray(x))))
    for stream in streams:
        stream.synchronize()
    for net, x, got in results:
        np.testing.assert_array_equal(got.get(), nets[net](x))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [3, 100])
@pytest.mark.parametrize("name", ["all binary", "scales"])
def test_a_stream_does_not_wait_for_the_one_of_the_first_call(name, count):
    """Weights that the first call arranges, on a stream that is busy, are there for all others."""
    import cupy

    net = PackedNetwork.from_model(made(name))
    x = cupy.asarray(whole_numbers(20, count))
    busy, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    numbers = cupy.ones((2048, 2048), np.float32)
    numbers @ numbers  # loads cuBLAS
    there = net.to("cuda")
    cupy.cuda.Device().synchronize()
    with busy:
        for _ in range(50):
            numbers @ numbers
        first = there(x)
    with other:
        second = there(x)
    for stream in (busy, other):
        stream.synchronize()
    for got in (first, second):
        np.testing.assert_array_equal(got.get(), net(x.get()))


@pytest.mark.gpu
def test_a_users_own_graph_may_hold_a_call():
    import cupy

    host = PackedNetwork.from_model(made("all binary"))
    net = host.to("cuda")
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    for count in (5, 70):
        x = cupy.asarray(whole_numbers(20, count))
        net(x)
        with stream, cupy.cuda.using_allocator(pool.malloc):
            net(x)  # compiles, and takes the memory
            stream.synchronize()
            stream.begin_capture()
            got = net(x)
            graph = stream.end_capture()
            for change in (0, 3):
                x += change
                graph.launch()
                stream.synchronize()
                np.testing.assert_array_equal(got.get(), host(x.get()))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 31), (16, 1024), (17, 1025), (70, 3000), (999, 4096)]
)
def test_thresholds_are_packed(shape):
    import cupy

    from cupybnn import pack
    from cupybnn.backends.cuda.threshold_pack import threshold_pack

    rng = np.random.default_rng(0)
    y = rng.integers(-3, 4, shape).astype(np.float32)
    y.ravel()[::17] = np.nan
    threshold = rng.integers(-3, 4, shape[1]).astype(np.float32)
    flip = rng.random(shape[1]) < 0.5
    expected = pack(cupy.asarray((y >= threshold) != flip))
    words, popcounts = threshold_pack(*map(cupy.asarray, (y, threshold, flip)))
    np.testing.assert_array_equal(popcounts.get(), expected.popcounts.get())
    np.testing.assert_array_equal(words.get(), expected.words.get())
