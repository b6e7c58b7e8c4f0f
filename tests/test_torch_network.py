"""`PackedNetwork.from_torch` predicts as the model does, or says which layer it cannot pack."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from cupybnn import PackedNetwork, data

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install .[torch]")

from cupybnn.torch import SignSTE, XnorLinear, clip_after_step, pack_linear  # noqa: E402

T = torch.nn
device = pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])(
    lambda request: request.param
)


def norm(features):
    """Return a batch norm with statistics as after training."""
    layer = T.BatchNorm1d(features)
    T.init.normal_(layer.weight)
    T.init.normal_(layer.bias)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


NETWORKS = {
    "signs in the layers": lambda: [
        T.Linear(20, 33), norm(33), XnorLinear(33, 40), norm(40), XnorLinear(40, 7), norm(7)
    ],
    "signs as layers": lambda: [
        T.Linear(20, 16), norm(16), SignSTE("approx_sign"), XnorLinear(16, 70), norm(70), SignSTE(),
        T.Linear(70, 4),
    ],
    "real inputs, scales and biases": lambda: [
        T.Flatten(), XnorLinear(20, 30, binary_input=False, bias=True),
        T.BatchNorm1d(30, affine=False), T.Dropout(0.5),
        XnorLinear(30, 9, ste="magnitude_aware_sign", bias=True),
        XnorLinear(9, 3, ste="magnitude_aware_sign", bias=True),
    ],
    "nested, and real layers": lambda: [
        T.Sequential(T.Linear(20, 12), T.ReLU(), T.Linear(12, 24), norm(24)),
        T.Sequential(SignSTE(), T.Dropout(), T.Identity(), XnorLinear(24, 5)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_predicts_as_its_model(device, name):
    torch.manual_seed(0)
    model = T.Sequential(*NETWORKS[name]()).eval().to(device)
    x = torch.randn(200, 20, device=device)
    state = pickle.dumps(model.state_dict())
    net = PackedNetwork.from_torch(model)
    with torch.no_grad():
        expected = model(x)
    found = net(x)
    assert (net.device.kind, found.device) == (device, expected.device)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert pickle.dumps(model.state_dict()) == state
    assert torch.equal(pack_linear(model)(x), expected)


def test_layers_keep_their_names():
    model = T.Sequential(*NETWORKS["nested, and real layers"]())
    assert [layer.name for layer in PackedNetwork.from_torch(model).layers] == ["0.0", "0.2", "1.3"]


def test_a_trained_network(tmp_path):
    torch.manual_seed(0)
    digits = data.load("digits")
    x, y = (torch.from_numpy(np.asarray(a)) for a in (digits.train_images, digits.train_labels))
    x, y = x.reshape(len(x), -1).float() / 16, y.long()
    model = T.Sequential(
        XnorLinear(64, 128, binary_input=False), T.BatchNorm1d(128), XnorLinear(128, 10),
        T.BatchNorm1d(10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    clip_after_step(optimizer, model)
    for _ in range(3):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            T.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()
    test = torch.from_numpy(np.asarray(digits.test_images))
    net = PackedNetwork.from_torch(model, pixel_max=16, image_shape=(8, 8), classes="0123456789")
    with torch.no_grad():
        expected = model(test.reshape(-1, 64).float() / 16)
    torch.testing.assert_close(net(test), expected, rtol=1e-5, atol=1e-5)
    names = np.array(list("0123456789"))[expected.argmax(1)]
    np.testing.assert_array_equal(net.predict(test), names)
    assert (names.astype(int) == np.asarray(digits.test_labels)).mean() > 0.8
    net.save(tmp_path / "net.npz")
    loaded = PackedNetwork.load(tmp_path / "net.npz")
    np.testing.assert_array_equal(loaded(test.numpy()), net(test.numpy()))


class Doubled(T.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = T.Linear(3, 2)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([T.Linear(3, 2), T.Tanh()], "got 1, a Tanh, which is none of Linear, "),
        ([T.Sequential(T.Linear(3, 2), Doubled(2, 2))], r"got 0\.1, a Doubled, which is none of"),
        ([hooked()], "got 0, a Linear, which has forward hooks"),
        ([XnorLinear(3, 2)], "got 0, a XnorLinear, which takes the signs of the network's inputs"),
        ([T.Linear(3, 2), T.BatchNorm1d(2, track_running_stats=False)],
         "got 1, a BatchNorm1d, which has no running statistics"),
        ([T.Linear(3, 2), T.Linear(2, 2).half()],
         r"got 1, a Linear, which holds weight in torch\.float16, not float32"),
        ([T.Flatten(0), T.Linear(3, 2)], "got 0, a Flatten, which merges axes 0 to -1"),
        ([T.Linear(3, 2, device="meta")], "which holds weight without values"),
        ([T.Linear(3, 2), SignSTE()], "must end with numbers, its logits; got the sign after 0"),
        ([T.Linear(3, 2), T.BatchNorm1d(2, eps=0.0)], r"has eps=0\.0, which must be positive"),
    ],
)  # fmt: skip
def test_a_layer_that_cannot_be_packed_is_named(layers, message):
    with pytest.raises(ValueError, match=message):
        PackedNetwork.from_torch(T.Sequential(*layers))


def test_a_model_must_be_a_chain():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Sequential of layers; got"):
        PackedNetwork.from_torch(T.Linear(2, 2))
