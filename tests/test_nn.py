"""Layers and modules, up to a small network trained on the digits."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
from arrays import host

from cupybnn import nn, ops, optim
from cupybnn.autograd import NonFiniteError, Tensor, debug, no_grad


def device_name(xp):
    return "cpu" if xp is np else "cuda"


def small_net(rng=0, xnor=True, ste="ste_sign", keep_prob=1.0, features=6):
    rng = np.random.default_rng(rng)
    return nn.Sequential(
        fc1=nn.Linear(features, 8, rng=rng),
        bn1=nn.BatchNorm(8),
        sign1=nn.Sign(ste),
        drop=nn.SignDropout(keep_prob, rng=rng),
        fc2=nn.BinaryLinear(8, 5, bias=True, xnor=xnor, ste=ste, rng=rng),
        bn2=nn.BatchNorm(5),
        fc3=nn.Linear(5, 3, bias=True, rng=rng),
    )


def batch(xp, n=16, features=6, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, features)).astype("float32")
    return Tensor(xp.asarray(x)), xp.asarray(rng.integers(0, classes, n))


def train(model, xp, steps=5, lr=0.01):
    """Train, and return the trace: the losses, then the bytes of all weights."""
    optimizer = optim.Adam(model.parameters(), lr=lr)
    trace = []
    for step in range(steps):
        x, labels = batch(xp, seed=step)
        loss = ops.softmax_cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trace.append(loss.item())
    return trace, {k: v.tobytes() for k, v in model.state_dict().items()}


class TestLayers:
    def test_linear(self, xp):
        layer = nn.Linear(6, 4, bias=True, rng=0).to(device_name(xp))
        layer.bias.data += 1
        x, _ = batch(xp)
        expected = host(x.data) @ host(layer.weight.data) + 1
        np.testing.assert_allclose(host(layer(x).data), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", [nn.Linear, nn.BinaryLinear])
    @pytest.mark.parametrize("shape", [(16, 5), ()])
    def test_input_of_wrong_width(self, kind, shape):
        message = (
            rf"{kind.__name__}\(6, 4.*must have shape \(\.\.\., 6\); got {re.escape(str(shape))}"
        )
        with pytest.raises(ValueError, match=message):
            kind(6, 4)(ops.sign(Tensor(np.ones(shape))))

    def test_glorot(self):
        w = nn.glorot_uniform((300, 200), 0)
        limit = np.sqrt(6 / 500)
        assert w.dtype == np.float32
        assert 0.999 * limit < np.abs(w).max() <= limit
        assert abs(w.mean()) < 5 * limit / np.sqrt(3 * w.size)
        np.testing.assert_array_equal(w, nn.glorot_uniform((300, 200), np.random.default_rng(0)))

    @pytest.mark.parametrize("xnor", [True, False])
    def test_binary_linear(self, xp, xnor):
        layer = nn.BinaryLinear(6, 4, xnor=xnor, rng=0).to(device_name(xp))
        x, _ = batch(xp)
        signs = ops.sign(x)
        expected = np.where(host(x.data) >= 0, 1, -1) @ np.where(
            host(layer.weight.data) >= 0, 1, -1
        )
        np.testing.assert_array_equal(host(layer(signs).data), expected)

    def test_binary_linear_of_real_input(self, xp):
        layer = nn.BinaryLinear(6, 4, binary_input=False, rng=0).to(device_name(xp))
        x, _ = batch(xp)
        expected = host(x.data) @ np.where(host(layer.weight.data) >= 0, 1, -1)
        np.testing.assert_allclose(host(layer(x).data), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("xnor", [True, False])
    def test_binary_linear_insists_on_signs(self, xnor):
        layer = nn.BinaryLinear(6, 4, xnor=xnor, rng=0)
        with pytest.raises(
            ValueError, match=r"must hold only \+1 and -1; .* \(16, 6\).* Sign layer"
        ):
            layer(batch(np)[0])

    def test_binary_linear_scales_by_magnitude(self, xp):
        layer = nn.BinaryLinear(6, 4, ste="magnitude_aware_sign", rng=0).to(device_name(xp))
        x, _ = batch(xp)
        w = host(layer.weight.data)
        expected = np.where(host(x.data) >= 0, 1, -1) @ np.where(w >= 0, 1, -1) * abs(w).mean(0)
        np.testing.assert_allclose(host(layer(ops.sign(x)).data), expected, rtol=1e-6)

    def test_gradient_of_latent_weights_is_windowed(self, xp):
        layer = nn.BinaryLinear(2, 2, rng=0).to(device_name(xp))
        layer.weight.data = xp.asarray([[0.5, 1.5], [-1.0, -3.0]], "float32")
        x = ops.sign(Tensor(xp.asarray([[1.0, -1.0]], "float32")))
        layer(x).sum().backward()
        np.testing.assert_array_equal(host(layer.weight.grad), [[1, 0], [-1, 0]])

    def test_latent_weights_that_can_starve_are_warned_of(self):
        with pytest.warns(UserWarning, match=r"window \|w\| <= 1 .* Clip them: clip=True"):
            nn.BinaryLinear(2, 2, clip=False)
        with pytest.warns(UserWarning, match=r"\|w\| <= 0.5 .* window of at least 1"):
            nn.BinaryLinear(2, 2, ste=ops.SteSign(0.5))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nn.BinaryLinear(2, 2)
            nn.BinaryLinear(2, 2, clip=False, ste="clipped_grad")

    def test_batch_norm_trains_and_evaluates(self, xp):
        layer = nn.BatchNorm(6, decay=0.5).to(device_name(xp))
        x, _ = batch(xp)
        y = host(layer(x).data)
        np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(y.var(0), 1, rtol=1e-3)
        np.testing.assert_allclose(host(layer.mean), host(x.data).mean(0) / 2, rtol=1e-5)
        before = host(layer.mean).copy()
        layer.eval()
        single = layer(x[:1])
        np.testing.assert_array_equal(host(layer.mean), before)
        np.testing.assert_allclose(host(layer(x).data)[:1], host(single.data), rtol=1e-6)

    def test_statistics_are_refreshed(self, xp):
        net = nn.Sequential(
            nn.Dropout(0.5, rng=0), nn.Linear(6, 4, rng=0), nn.BatchNorm(4, decay=0.5)
        ).to(device_name(xp))
        net[1].train(False)
        batches = [batch(xp, seed=s)[0] for s in range(3)]
        before = net.state_dict()
        nn.refresh_statistics(net, iter(batches))
        products = [host(b.data) @ before["1.weight"] for b in batches]
        expected = np.mean([p.mean(0) for p in products], 0)
        np.testing.assert_allclose(host(net[2].mean), expected, rtol=1e-5, atol=1e-6)
        expected = np.mean([p.var(0) for p in products], 0)
        np.testing.assert_allclose(host(net[2].variance), expected, rtol=1e-5)
        assert [m.training for m in net] == [True, False, True]
        assert net[2].decay == 0.5
        for name, array in net.state_dict().items():
            if name not in ("2.mean", "2.variance"):
                np.testing.assert_array_equal(array, before[name])

    def test_dropout_only_in_training(self, xp):
        x = Tensor(xp.ones((50, 50), "float32"))
        layer = nn.Dropout(0.5, rng=0)
        assert set(np.unique(host(layer(x).data))) == {0, 2}
        assert (host(layer(x).data) != host(layer(x).data)).any()
        assert layer.eval()(x) is x
        with pytest.raises(ValueError, match=r"'keep_prob' must be in \(0, 1\]; got 2"):
            nn.Dropout(2)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: nn.Linear(-1, 3), ValueError, "'in_features' must be 0 or more; got -1"),
            (
                lambda: nn.BinaryLinear(3, -2),
                ValueError,
                "'out_features' must be 0 or more; got -2",
            ),
            (lambda: nn.Linear(2.0, 3), TypeError, r"must be a whole number; got 2\.0 \(float\)"),
            (lambda: nn.BatchNorm("8"), TypeError, r"'features' must be .*; got '8' \(str\)"),
            (lambda: nn.BatchNorm(8, eps=0), ValueError, "'eps' must be above 0; got 0"),
            (lambda: nn.BatchNorm(8, decay=1.5), ValueError, r"'decay' must be in \[0, 1\]; got 1"),
        ],
    )
    def test_sizes_and_settings_are_checked(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    def test_sequential(self):
        net = nn.Sequential(nn.ReLU(), nn.Sign(), last=nn.ReLU())
        assert len(net) == 3
        assert isinstance(net[1], nn.Sign)
        assert [name for name, _ in net.named_modules()] == ["", "0", "1", "last"]
        with pytest.raises(TypeError, match="takes modules; got function for 0"):
            nn.Sequential(ops.relu)

    def test_progress_reaches_the_quantizers(self):
        net = small_net(ste="ede_sign")
        nn.set_progress(net, 0.75)
        assert net.sign1.quantizer.progress == net.fc2.quantizer.progress == 0.75


class TestModule:
    def test_names(self):
        names = [name for name, _ in small_net().named_parameters()]
        assert names == [
            *("fc1.weight", "bn1.gamma", "bn1.beta", "fc2.weight", "fc2.bias"),
            *("bn2.gamma", "bn2.beta", "fc3.weight", "fc3.bias"),
        ]

    def test_shared_parameter_is_listed_once(self):
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        net[1].weight = net[0].weight
        assert len(list(net.parameters())) == 1

    def test_train_and_eval_reach_everything(self):
        net = small_net()
        assert all(not module.training for _, module in net.eval().named_modules())
        assert all(module.training for _, module in net.train().named_modules())

    def test_state_round_trip_continues_exactly(self, xp):
        net = small_net(keep_prob=0.8).to(device_name(xp))
        train(net, xp)
        state = net.state_dict()
        expected = train(net, xp)
        again = small_net(rng=99, keep_prob=0.8).to(device_name(xp))
        again.load_state_dict(state)
        assert train(again, xp) == expected

    def test_state_is_a_copy(self):
        net = small_net()
        state = net.state_dict()
        net.fc1.weight.data += 1
        net.drop.random.next()
        assert (state["fc1.weight"] != net.state_dict()["fc1.weight"]).all()
        assert state["drop.random_state"][1] == 0
        assert set(state) >= {"bn1.mean", "bn1.variance"}

    def test_load_lists_all_misfits_and_changes_nothing(self):
        net = small_net()
        before = {k: v.tobytes() for k, v in net.state_dict().items()}
        state = {k: v + 1 for k, v in net.state_dict().items()}
        del state["fc1.weight"]
        state["fc9.weight"] = np.zeros(3)
        state["fc3.bias"] = np.zeros(4, "float32")
        state["bn1.mean"] = np.zeros(8, int)
        with pytest.raises(ValueError, match="does not fit this Sequential") as caught:
            net.load_state_dict(state)
        for line in (
            "missing: fc1.weight",
            "unknown: fc9.weight",
            "fc3.bias: must be (3,) float32, is (4,) float32",
            "bn1.mean: must be (8,) float32, is (8,) int64",
        ):
            assert line in str(caught.value)
        assert {k: v.tobytes() for k, v in net.state_dict().items()} == before

    @pytest.mark.parametrize(
        ("state", "got"),
        [
            (None, "a mapping of names to arrays; got NoneType"),
            ([1.0], "a mapping of names to arrays; got list"),
            ({"weight": [[1.0]]}, "NumPy or CuPy arrays; got list for 'weight'"),
            ({"weight": None, "bias": "x"}, "got NoneType for 'weight', str for 'bias'"),
            ({"weight": Tensor([[1.0]])}, r"got cupybnn\.Tensor for 'weight'"),
        ],
    )
    @pytest.mark.parametrize("strict", [True, False])
    def test_load_of_what_is_no_state(self, state, got, strict):
        layer = nn.Linear(1, 1, bias=True)
        with pytest.raises(TypeError, match=rf"'state' of Linear\.load_state_dict must .*{got}"):
            layer.load_state_dict(state, strict)

    def test_load_of_a_part(self):
        net = small_net()
        net.load_state_dict({"fc3.bias": np.float32([1, 2, 3]), "other": 7}, strict=False)
        np.testing.assert_array_equal(net.fc3.bias.data, [1, 2, 3])

    def test_loading_is_an_edit_in_place(self):
        from cupybnn.autograd import GraphError

        net = small_net()
        loss = net(batch(np)[0]).sum()
        net.load_state_dict(net.state_dict())
        with pytest.raises(GraphError, match="edited in place"):
            loss.backward()

    @pytest.mark.gpu
    def test_devices(self):
        net = small_net().to("cuda")
        assert str(net.device) == "cuda:0"
        assert all(p.device.kind == "cuda" for p in net.parameters())
        assert all(str(type(b).__module__).startswith("cupy") for _, b in net.named_buffers())
        x, labels = batch(np)
        loss = ops.softmax_cross_entropy(net(x.to("cuda")), Tensor(labels).to("cuda"))
        loss.backward()
        net.to("cpu")
        assert isinstance(net.fc1.weight.data, np.ndarray)
        assert isinstance(net.fc1.weight.grad, np.ndarray)
        assert isinstance(net.bn1.mean, np.ndarray)

    def test_repr_shows_the_layers(self):
        text = repr(small_net())
        assert "fc2: BinaryLinear(8, 5, binary input, SteSign(window=1.0))" in text

    def test_non_finite_value_is_located(self):
        net = nn.Sequential(body=small_net(), head=nn.Linear(3, 2))
        net.body.fc3.weight.data[0, 0] = np.nan
        with debug.check_finite(), pytest.raises(NonFiniteError, match=r"matmul in body\.fc3") as e:
            net(batch(np)[0])
        assert e.value.place == "body.fc3"
        assert e.value.shape == (16, 3)

    def test_non_finite_gradient_is_located(self):
        net = small_net()
        net.fc3.weight.data[...] = 1e35
        x, _ = batch(np)
        with (
            np.errstate(all="ignore"),
            debug.check_finite(),
            pytest.raises(NonFiniteError, match=r"gradient of operand 0 of \w+ in fc3"),
        ):
            (net(x) * 1e-30).sum().backward(np.float32(1e38))


class TestSummary:
    def test_numbers(self):
        net = nn.Sequential(
            fc1=nn.Linear(100, 70, bias=True, rng=0),
            bn=nn.BatchNorm(70),
            sign=nn.Sign(),
            fc2=nn.BinaryLinear(70, 30, rng=0),
            out=nn.BinaryLinear(30, 10, binary_input=False, rng=0),
        )
        summary = net.summary()
        fc1, bn, fc2, out = summary.rows
        assert (fc1.name, fc1.kind, fc1.shape, fc1.bits) == ("fc1", "Linear", (100, 70), 32)
        assert (fc1.one_bit, fc1.full, fc1.nbytes) == (0, 7070, 7070 * 4)
        assert (bn.full, bn.nbytes) == (140, 4 * 70 * 4)
        assert (fc2.bits, fc2.one_bit, fc2.full) == (1, 2100, 0)
        assert fc2.nbytes == 30 * 2 * 8  # 70 inputs take two words of 64 bits
        assert fc2.training_nbytes == 2100 * 4
        assert (fc2.binary_products, fc2.full_products) == (2100, 0)
        assert (out.bits, out.binary_products, out.full_products) == (1, 0, 300)
        assert summary.binary_share == 2100 / (7000 + 2100 + 300)

    def test_table(self):
        text = str(small_net().summary())
        assert "fc2    BinaryLinear  8 × 5" in text
        assert "1-bit parameters     40" in text
        assert "binary operations    38.8% of the products" in text

    def test_model_without_parameters(self):
        assert nn.Sequential(nn.ReLU()).summary().binary_share == 0


class TestTraining:
    def test_xnor_and_dense_traces_are_identical(self, xp):
        traces = [train(small_net(xnor=xnor).to(device_name(xp)), xp) for xnor in (True, False)]
        assert traces[0] == traces[1]

    @pytest.mark.parametrize("ste", ["ste_sign", "stochastic_sign"])
    def test_same_seed_same_run(self, xp, ste):
        traces = [
            train(small_net(keep_prob=0.7, ste=ste).to(device_name(xp)), xp) for _ in range(2)
        ]
        assert traces[0] == traces[1]
        other = train(small_net(rng=1, keep_prob=0.7, ste=ste).to(device_name(xp)), xp)
        assert other[0] != traces[0][0]

    def test_gradients_of_a_binary_layer_by_formula(self):
        """One layer of signs between two dense ones, everything written out with NumPy."""
        rng = np.random.default_rng(0)
        x, w1, w2 = (rng.standard_normal(s) for s in ((7, 5), (5, 4), (4, 3)))
        w2 /= 2
        net = nn.Sequential(
            nn.Linear(5, 4, dtype="float64"),
            nn.Sign(),
            nn.BinaryLinear(4, 3, dtype="float64"),
        )
        net[0].weight.data, net[2].weight.data = w1, w2
        y = net(Tensor(x))
        grad = rng.standard_normal(y.shape)
        y.backward(grad)
        hidden = x @ w1
        signs, weight_signs = np.where(hidden >= 0, 1, -1), np.where(w2 >= 0, 1, -1)
        np.testing.assert_array_equal(y.data, signs @ weight_signs)
        expected = (signs.T @ grad) * (np.abs(w2) <= 1)
        np.testing.assert_allclose(net[2].weight.grad, expected, rtol=1e-12)
        expected = x.T @ (grad @ weight_signs.T * (np.abs(hidden) <= 1))
        np.testing.assert_allclose(net[0].weight.grad, expected, rtol=1e-12)

    @pytest.mark.parametrize("loss", [ops.softmax_cross_entropy, ops.squared_hinge])
    def test_digits(self, loss):
        datasets = pytest.importorskip("sklearn.datasets")
        images, labels = datasets.load_digits(return_X_y=True)
        images = (images / 8 - 1).astype("float32")
        order = np.random.default_rng(0).permutation(len(labels))
        learn, test = order[:1400], order[1400:]
        rng = np.random.default_rng(1)
        net = nn.Sequential(
            nn.Linear(64, 128, rng=rng),
            nn.BatchNorm(128),
            nn.Sign(),
            nn.BinaryLinear(128, 128, rng=rng),
            nn.BatchNorm(128),
            nn.Sign(),
            nn.BinaryLinear(128, 10, rng=rng),
            nn.BatchNorm(10),
        )
        optimizer = optim.Adam(net.parameters(), 5e-3, schedule=optim.schedules.cosine(400))
        for _ in range(400):
            chosen = rng.choice(learn, 100)
            value = loss(net(Tensor(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        net.eval()
        with no_grad():
            scores = net(Tensor(images[test])).data
        assert (scores.argmax(1) == labels[test]).mean() > 0.93
        assert np.abs(net[3].weight.data).max() <= 1
