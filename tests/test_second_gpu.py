"""The second GPU of a machine: it computes what the first does, in turn with it and at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from fast_networks import arrays, run
from gemm_cases import check_random_cases

import cupybnn
from cupybnn import BinaryMLPClassifier, PackedNetwork, nn
from cupybnn.backends.devices import cuda_status

pytestmark = pytest.mark.gpu

#: Twice in turn: what is kept from the first time must not be used on the other device.
IN_TURN = (0, 1, 0, 1)


@pytest.fixture(scope="module", autouse=True)
def cupy():
    if cuda_status().device_count < 2:
        pytest.skip(f"needs 2 GPUs; there is {cuda_status().device_count}")
    import cupy

    return cupy


@pytest.fixture(autouse=True)
def the_current_device_stays(cupy):
    yield
    assert cupy.cuda.runtime.getDevice() == 0


SHAPES = [
    (1, 4096, 4096),
    (100, 300, 1000),
    (512, 512, 4096),
    (128, 128, 70_000),
    (3000, 2050, 5000),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(cupy, shape):
    m, n, k = shape
    rng = np.random.default_rng(m)
    a, b = (rng.choice([-1, 1], size).astype(np.int8) for size in ((m, k), (k, n)))
    want = (a.astype(np.float32) @ b.astype(np.float32)).astype(np.int32)
    levels = rng.integers(0, 16, (m, k)).astype(np.int8)
    of_levels = levels.astype(np.float64) @ b
    for index in IN_TURN:
        with cupy.cuda.Device(index):
            x, y = cupy.asarray(a), cupy.asarray(b)
            p, q = cupybnn.pack(x), cupybnn.pack(y, axis=-2)
            results = [
                cupybnn.xnor_gemm(x, y, dtype=np.int32),
                cupybnn.xnor_gemm(p, q),
                cupybnn.xnor_gemm(x.astype(np.float32), q, scale=2.0, bias=cupy.ones(n)) / 2 - 0.5,
            ]
            signs = cupybnn.xnor_gemm_packed(p, q)
            several = cupybnn.xnor_gemm(cupybnn.pack(cupy.asarray(levels), bits=4, signed=False), q)
        for result in results:
            assert result.device.id == index
            np.testing.assert_array_equal(result.get(), want)
        np.testing.assert_array_equal(signs.to_numpy().unpack(np.int8), np.where(want >= 0, 1, -1))
        np.testing.assert_array_equal(several.get(), of_levels)


def test_random_products(cupy):
    with cupy.cuda.Device(1):
        check_random_cases(cupy, seed=0)


def test_packed_matrices_of_another_device_than_the_current_one(cupy):
    x = np.random.default_rng(0).choice([-1.0, 1.0], (40, 70))
    with cupy.cuda.Device(1):
        p = cupybnn.pack(cupy.asarray(x))
    assert p.unpack().device.id == 1
    assert p.to_numpy() == cupybnn.pack(x)
    assert p[3:5].T.unpack().device.id == 1
    with pytest.raises(ValueError, match="on the current device, cuda:0; got cuda:1"):
        cupybnn.xnor_gemm(p, p.T)


def test_both_at_once_from_two_threads(cupy):
    rng = np.random.default_rng(0)
    a, b = (rng.choice([-1, 1], size).astype(np.int8) for size in ((300, 900), (900, 200)))
    want = (a.astype(np.float32) @ b.astype(np.float32)).astype(np.int32)
    wrong: list[object] = []

    def work(index):
        with cupy.cuda.Device(index), cupy.cuda.Stream(non_blocking=True):
            p, q = cupybnn.pack(cupy.asarray(a)), cupybnn.pack(cupy.asarray(b), axis=-2)
            for _ in range(100):
                result, signs = cupybnn.xnor_gemm(p, q), cupybnn.xnor_gemm_packed(p, q)
                if not (result.get() == want).all() or signs.device.index != index:
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


TRAINED = {
    "operation by operation": {"fused": False, "binary": True, "xnor": True, "batch_norm": True},
    "fused": {"binary": True, "xnor": True, "batch_norm": True, "dtype": "bfloat16"},
    "fused, all binary, virtual adversarial, mixed": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "first": True,
        "last": True,
        "vat": 2.0,
        "mix": "some",
        "keep_prob": 0.5,
    },
    "fused, rounded gradients": {"binary": True, "xnor": True, "batch_norm": True, "grad_bits": 4},
    "fused, deformed images": {"batch_norm": True, "augment_elastic": 1.0, "augment_shift": 1.0},
}


@pytest.mark.parametrize("name", TRAINED)
def test_training(cupy, name):
    """The same bits: the two GPUs are of one kind."""
    kinds = {cupy.cuda.runtime.getDeviceProperties(index)["name"] for index in (0, 1)}
    if len(kinds) > 1:
        pytest.skip(f"the GPUs differ: {kinds}")
    found = [run(**TRAINED[name], max_steps=40, device=f"cuda:{index}") for index in IN_TURN]
    for made, losses in found[1:]:
        assert losses == found[0][1]
        for key, array in arrays(made).items():
            np.testing.assert_array_equal(array, arrays(found[0][0])[key], err_msg=key)
    assert str(found[1][0].model.device) == "cuda:1"


@pytest.mark.parametrize("first", [False, True])
def test_packed_networks(cupy, first, tmp_path):
    """By one launch, by graphs, and by products of many rows; arrays of the host or the device."""
    settings = {"dataset": "digits", "binary": True, "xnor": True, "first": first}
    result = cupybnn.train(**settings, n_hidden=256, max_steps=60, device="cuda:1")
    PackedNetwork.from_model(result.model).save(tmp_path / "net.npz")
    nets = [PackedNetwork.load(tmp_path / "net.npz", device=f"cuda:{index}") for index in (0, 1)]
    for rows in (1, 64, 1000, 9000):
        x = np.random.default_rng(rows).integers(0, 256, (rows, 64)).astype(np.uint8)
        want = nets[0](cupy.asarray(x)).get()
        for index in IN_TURN:
            with cupy.cuda.Device(index):
                there = cupy.asarray(x)
            got = nets[index](there)
            assert got.device.id == index
            np.testing.assert_array_equal(got.get(), want)
    with pytest.raises(TypeError, match="must be where the network is, on cuda:1; got a cupy"):
        nets[1](cupy.asarray(x))
    moved = nets[1].to("cuda:0")
    np.testing.assert_array_equal(moved(cupy.asarray(x)).get(), want)
    if first:  # all products are exact
        np.testing.assert_array_equal(nets[1].predict(there).get(), nets[1].to("cpu").predict(x))


def test_layers(cupy):
    x = np.random.default_rng(0).standard_normal((30, 70)).astype(np.float32)
    found = []
    for index in IN_TURN:
        layer = nn.Sequential(nn.Sign(), nn.BinaryLinear(70, 33, rng=0)).to(f"cuda:{index}")
        with cupy.cuda.Device(index):
            out = layer(cupybnn.Tensor(cupy.asarray(x), requires_grad=True))
            (out * out).sum().backward()
        found.append(layer[1].weight.grad.get())
    for gradient in found[1:]:
        np.testing.assert_array_equal(gradient, found[0])


def test_the_estimator():
    x = np.random.default_rng(0).standard_normal((300, 20))
    y = np.where(x[:, 0] > 0, "right", "left")
    found = [
        BinaryMLPClassifier(max_iter=3, device=f"cuda:{i}", random_state=0).fit(x, y)
        for i in (0, 1)
    ]
    for each in found[1:]:
        np.testing.assert_array_equal(each.predict_proba(x), found[0].predict_proba(x))


def test_pytorch():
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install .[torch]")
    from cupybnn.torch import XnorLinear, clip_after_step, pack_linear

    found = []
    for index in IN_TURN:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(20, 33), XnorLinear(33, 64), XnorLinear(64, 3)]
        model = torch.nn.Sequential(*layers)
        x = torch.randn(100, 20)
        model, x = model.to(f"cuda:{index}"), x.to(f"cuda:{index}")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        clip_after_step(optimizer, model)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) ** 2).mean().backward()
            optimizer.step()
        with torch.inference_mode():
            expected = model(x)
            packed = pack_linear(model.eval())(x)
            net = PackedNetwork.from_torch(model)(x)
        assert torch.cuda.current_device() == 0
        assert str(packed.device) == f"cuda:{index}"
        torch.testing.assert_close(packed, expected)
        torch.testing.assert_close(torch.as_tensor(net).cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)
        found.append(expected.cpu())
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=0, atol=0)
