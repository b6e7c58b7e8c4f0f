"""Layers and modules, up to a small network trained on the digits."""

from __future__ import annotations

import math
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

    @pytest.mark.parametrize(
        "layer", [nn.Linear(2, 3), nn.BinaryLinear(2, 3, binary_input=False), nn.Flatten()]
    )
    def test_input_that_is_no_array(self, layer):
        with pytest.raises(TypeError, match=r"must be a Tensor or an array; got list"):
            nn.Sequential(layer)([[1.0, 2.0]])

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

    def test_batch_norm_of_large_float16(self, xp):
        layer = nn.BatchNorm(2, decay=0.5, dtype="float16").to(device_name(xp))
        values = np.float16([[6e4, 1], [-6e4, 3], [6e4, 5], [5e4, -7]])
        x = Tensor(xp.asarray(values), requires_grad=True)
        y = layer(x)
        y.sum().backward()
        wide = values.astype("f8")
        assert layer.variance.dtype == layer.mean.dtype == np.float32
        np.testing.assert_allclose(host(layer.mean), wide.mean(0) / 2, rtol=1e-6)
        np.testing.assert_allclose(host(layer.variance), (1 + wide.var(0)) / 2, rtol=1e-6)
        expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-4)
        np.testing.assert_allclose(host(y.data), expected, rtol=1e-3, atol=1e-3)
        layer.eval()
        expected = (wide - host(layer.mean)) / np.sqrt(host(layer.variance) + 1e-4)
        got = layer(x)
        np.testing.assert_allclose(host(got.data), expected, rtol=1e-3, atol=1e-3)
        assert y.dtype == got.dtype == layer.gamma.grad.dtype == np.float16

    def test_float16_network_trains(self, xp):
        net = nn.Sequential(
            nn.Linear(6, 8, bias=True, rng=0, dtype="float16"),
            nn.BatchNorm(8, dtype="float16"),
            nn.Sign(),
            nn.BinaryLinear(8, 3, rng=0, dtype="float16"),
            nn.Scale(0.5, "float16"),
        ).to(device_name(xp))
        optimizer = optim.Adam(net.parameters(), 0.01)
        x, labels = batch(xp, 64)
        x = x.astype("float16")
        losses = []
        for _ in range(30):
            loss = ops.softmax_cross_entropy(net(x), labels)
            optimizer.zero_grad()
            loss.backward()
            assert math.isfinite(float(optim.clip_grad_norm(net.parameters(), 1.0)))
            optimizer.step()
            losses.append(loss.item())
        assert all(np.isfinite(a).all() for a in net.state_dict().values())
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1

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
            (lambda: nn.Linear(2.0, 3), TypeError, r"must be an integer; got 2\.0 \(float\)"),
            (lambda: nn.BatchNorm("8"), TypeError, r"'features' must be .*; got '8' \(str\)"),
            (lambda: nn.BatchNorm(8, eps=0), ValueError, "'eps' must be positive; got 0"),
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
        with pytest.raises(TypeError, match="takes modules; got function for '0'"):
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

    def test_shared_module_is_listed_once(self):
        norm = nn.BatchNorm(2)
        net = nn.Sequential(norm, nn.Linear(2, 2, rng=0), norm)
        assert [name for name, _ in net.named_modules()] == ["", "0", "1"]
        assert [name for name, _ in net.named_parameters()] == ["0.gamma", "0.beta", "1.weight"]
        assert set(net.state_dict()) == {"0.gamma", "0.beta", "0.mean", "0.variance", "1.weight"}
        assert [row.name for row in net.summary().rows] == ["0", "1"]

    def test_modules_that_refer_to_each_other(self):
        net = nn.Sequential(nn.Linear(2, 2, rng=0))
        net[0].parent = net
        assert len(list(net.parameters())) == len(list(net[0].parameters())) == 1
        assert "..." in repr(net)

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

    def test_load_lists_all_mismatches_and_changes_nothing(self):
        net = small_net()
        before = {k: v.tobytes() for k, v in net.state_dict().items()}
        state = {k: v + 1 for k, v in net.state_dict().items()}
        del state["fc3.weight"]
        state["fc1.weight"] = np.zeros((6, 8), bool)
        state["fc2.bias"] = np.zeros(5, "complex64")
        state["fc2.weight"] = np.zeros((8, 5), object)
        state["bn2.mean"] = np.full(5, 1e300)
        state["drop.random_state"] = np.array([-1, -1])
        state["fc9.weight"] = np.zeros(3)
        state["fc3.bias"] = np.zeros(4, "float32")
        state["bn1.mean"] = np.zeros(8, int)
        with pytest.raises(ValueError, match="does not match this Sequential") as caught:
            net.load_state_dict(state)
        for line in (
            "missing: fc3.weight",
            "unknown: fc9.weight",
            "fc3.bias: must be (3,) float32, is (4,) float32",
            "bn1.mean: must be (8,) float32, is (8,) int64",
            "fc2.bias: must be (5,) float32, is (5,) complex64",
            "fc2.weight: must be (8, 5) float32, is (8, 5) object",
            "fc1.weight: must be (6, 8) float32, is (6, 8) bool",
            "drop.random_state: must fit in uint64; got values from -1 to -1",
            "bn2.mean: must fit in float32; 5 of its values overflow",
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

    def test_weights_of_another_precision_and_diverged_ones_are_loaded(self, xp):
        layer = nn.Linear(2, 2, rng=0).to(device_name(xp))
        layer.load_state_dict({"weight": xp.asarray([[np.nan, np.inf], [1, 2]], "float64")})
        np.testing.assert_array_equal(host(layer.weight.data), [[np.nan, np.inf], [1, 2]])
        assert layer.weight.dtype == np.float32
        half = nn.Linear(2, 2, dtype="float16")
        with pytest.raises(ValueError, match="weight: must fit in float16; 1 of its values overf"):
            half.load_state_dict({"weight": np.float32([[1e5, 1], [1, np.inf]])})

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
        net = nn.Sequential(body=nn.Sequential(nn.BinaryLinear(8, 5, rng=0)), act=nn.ReLU())
        assert repr(net).splitlines() == [
            "Sequential(",
            "  (body): Sequential(",
            "    (0): BinaryLinear(8, 5, binary input, SteSign(window=1.0))",
            "  )",
            "  (act): ReLU()",
            ")",
        ]

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


class Net(nn.Module):
    def __init__(self, **attributes):
        self.first = nn.Linear(2, 2, rng=0)
        for name, value in attributes.items():
            setattr(self, name, value)


class Helper:
    """Not a module, with a module in it."""

    def __init__(self, *layers):
        self.layer = layers[0]
        self.layers = list(layers)

    def __call__(self, x):
        return self.layer(x)


class TestPartsThatWouldNotBeSeen:
    @pytest.mark.parametrize(
        ("wrap", "place", "fix"),
        [
            (lambda m: [m], r"layers\[0\]\) in a list", "nn.ModuleList for 'layers'"),
            (lambda m: (1, m), r"layers\[1\]\) in a tuple", "nn.ModuleList"),
            (lambda m: {"a": m}, r"layers\['a'\]\) in a dict", "nn.ModuleDict for 'layers'"),
            (lambda m: {"a": [[], [m]]}, r"\['a'\]\[1\]\[0\]\) in a dict", "nn.ModuleDict"),
            (lambda m: {m}, "in a set", "nn.ModuleList"),
            (Helper, r"layers\.layer\) in a Helper", "nn.Module as the base class of Helper"),
        ],
    )
    def test_are_refused(self, wrap, place, fix):
        message = (
            rf"'layers' of Net must not hold a Linear \(at .*{place}.* do not find it\. Use {fix}"
        )
        with pytest.raises(TypeError, match=message):
            Net(layers=wrap(nn.Linear(2, 2, rng=0)))

    def test_parameters_in_a_list(self):
        with pytest.raises(
            TypeError, match=r"a Parameter \(at weights\[0\]\).* of its own for each"
        ):
            Net(weights=[nn.Parameter(np.ones(2))])

    @pytest.mark.parametrize(
        "use",
        [
            lambda net: list(net.parameters()),
            lambda net: net.state_dict(),
            lambda net: net.zero_grad(),
            lambda net: net.to("cpu"),
            lambda net: optim.Adam(net.parameters()),
            lambda net: nn.Sequential(net).summary(),
        ],
    )
    def test_are_noticed_when_appended_later(self, use):
        net = Net(layers=[])
        net.layers.append(nn.Linear(2, 2, rng=0))
        with pytest.raises(TypeError, match=r"at layers\[0\]\) in a list.* nn.ModuleList"):
            use(net)

    def test_a_list_of_parts_that_have_attributes_is_allowed(self):
        net = Net()
        net.layers = [net.first]
        net.weights = {"first": net.first.weight}
        net.optimizer = optim.Adam(net.parameters())
        net.trainer = Helper(net)
        assert [name for name, _ in net.named_parameters()] == ["first.weight"]
        net.first = nn.Linear(2, 2, rng=1)
        with pytest.raises(TypeError, match="'layers' of Net"):
            list(net.parameters())

    def test_a_function_may_refer_to_another_model(self):
        other = nn.Linear(2, 2, rng=0)
        assert len(list(Net(teacher=lambda: other).parameters())) == 1

    def test_other_values_are_attributes_as_ever(self):
        loop = []
        loop.append(loop)
        net = Net(a=[1, "x", None], b={"k": (1.0, np.ones(2))}, c=Tensor([1.0]), d=loop, e=np)
        assert len(list(net.parameters())) == 1

    def test_class_attributes_and_slots(self):
        with pytest.raises(TypeError, match=r"class attribute 'fc' of Bad must not .*self\.fc = "):

            class Bad(nn.Module):
                fc = nn.Linear(2, 2, rng=0)

        with pytest.raises(TypeError, match=r"class attribute 'fcs' of Bad .*; got a list"):

            class Bad(nn.Module):
                fcs = [nn.Linear(2, 2, rng=0)]  # noqa: RUF012

        with pytest.raises(TypeError, match="Bad must not define __slots__"):

            class Bad(nn.Module):
                __slots__ = ("fc",)

    @pytest.mark.parametrize(
        "value", [np.ones((2, 2)), Tensor(np.ones((2, 2))), 1.0, [nn.Parameter(np.ones(2))]]
    )
    def test_a_parameter_is_not_replaced_by_something_that_does_not_learn(self, value):
        net = Net()
        with pytest.raises(TypeError, match=r"parameter 'weight' of Linear .*\.weight\.data = "):
            net.first.weight = value
        net.first.weight = nn.Parameter(np.ones((2, 2)))
        net.first.weight = None
        net.first.weight = nn.Parameter(np.ones((2, 2)))
        assert len(list(net.parameters())) == 1

    def test_a_module_without_forward(self):
        with pytest.raises(NotImplementedError, match=r"Net defines no forward\(\)"):
            Net()(Tensor([1.0]))


class TestElementwiseLayers:
    def test_values(self, xp):
        x = np.array([[-2.0, -0.5, 0.0], [0.5, 2.0, 300.0]])
        for layer, expected in (
            (nn.Identity(), x),
            (nn.ReLU(), np.maximum(x, 0)),
            (nn.HardTanh(), x.clip(-1, 1)),
            (nn.Tanh(), np.tanh(x)),
            (nn.Sigmoid(), 1 / (1 + np.exp(-x))),
            (nn.Scale(0.25).to(device_name(xp)), x / 4),
        ):
            got = host(layer(Tensor(xp.asarray(x))).data)
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)

    def test_sigmoid_does_not_overflow(self, xp):
        for dtype in ("float16", "float32"):
            x = Tensor(xp.asarray([-1e4, 1e4], dtype), requires_grad=True)
            y = nn.Sigmoid()(x)
            y.sum().backward()
            np.testing.assert_array_equal(host(y.data), [0, 1])
            np.testing.assert_array_equal(host(x.grad), [0, 0])
            assert y.dtype == dtype

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [((4, 3, 2), (4, 6)), ((4, 5), (4, 5)), ((4,), (4, 1)), ((0, 3, 2), (0, 6))],
    )
    def test_flatten(self, xp, shape, expected):
        x = ops.sign(Tensor(xp.ones(shape, "float32")))
        y = nn.Flatten()(x)
        assert y.shape == expected
        assert y.two_valued

    def test_flatten_needs_a_batch(self):
        with pytest.raises(ValueError, match=r"must have a batch axis; got shape \(\)"):
            nn.Flatten()(Tensor(1.0))

    def test_scale_learns(self):
        layer = nn.Scale(0.5, "float64")
        layer(Tensor(np.array([[1.0, 2.0]]))).sum().backward()
        assert layer.factor.grad == [3.0]
        for value in (np.nan, "a", None):
            with pytest.raises(ValueError, match=r"'value' of Scale must be a finite number; got"):
                nn.Scale(value)


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
        summary = small_net().summary()
        text = str(summary)
        assert repr(summary) == text  # what a REPL shows
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
