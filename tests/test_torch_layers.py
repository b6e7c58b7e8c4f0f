"""cupybnn.torch: exact forward products, straight-through gradients, PyTorch's own machinery."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import pickle
import pkgutil

import numpy as np
import pytest
from test_ops_quantizers import CASES, GRADS, POINTS

from cupybnn import nn, ops
from cupybnn.autograd import Tensor

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install .[torch]")

from torch.library import opcheck  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import cupybnn.torch as ct  # noqa: E402
from cupybnn.torch import SignSTE, XnorLinear, calls, operators, pack_linear, sign_ste  # noqa: E402
from cupybnn.torch import xnor_linear as functional_xnor_linear  # noqa: E402

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
device = pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])(
    lambda request: request.param
)


def numbers(*shape, seed=0, dtype=torch.float32, device="cpu"):
    """Return random numbers with zeros of both signs, NaN and infinities among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    special = rng.choice(np.array([0.0, -0.0, np.nan, np.inf, -np.inf], np.float32), shape)
    x = np.where(rng.random(shape) < 0.2, special, x)
    return torch.from_numpy(x).to(device, dtype)


def signs(x):
    """Return the signs as int64, by NumPy alone."""
    return np.where(x.detach().float().cpu().numpy() >= 0, np.int64(1), np.int64(-1))


def exact(x, weight, dtype):
    product = signs(x) @ signs(weight).T
    return torch.from_numpy(np.asarray(product, np.float64)).float().to(dtype)


def layer_of(weight, **options):
    layer = XnorLinear(weight.shape[1], weight.shape[0], **options)
    layer = layer.to(weight.device, weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


# --- the product


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 37), (2, 3, 64), (130,), (0, 40), (4, 0, 9), (3, 1), (17, 0), (2, 2, 2, 1030)]
)
def test_a_product_is_that_of_the_signs(device, dtype, shape):
    x = numbers(*shape, dtype=dtype, device=device)
    weight = numbers(11, shape[-1], seed=1, dtype=dtype, device=device)
    layer = layer_of(weight)
    for found in (layer(x), functional_xnor_linear(x, weight), pack_linear(layer)(x)):
        assert (found.dtype, found.device, found.is_contiguous()) == (dtype, x.device, True)
        assert torch.equal(found.cpu(), exact(x, weight, dtype))


def test_large_sums_are_rounded_once(device):
    x, weight = torch.ones(3, 4099, device=device), torch.ones(2, 4099, device=device)
    weight[1, :1000] = -1
    for dtype in FLOATS:
        expected = torch.tensor([4099.0, 2099.0]).to(dtype).expand(3, 2)
        assert torch.equal(layer_of(weight.to(dtype))(x.to(dtype)).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(device, dtype):
    x = numbers(40, 6, 8, dtype=dtype, device=device).permute(2, 1, 0)
    weight = numbers(40, 14, dtype=dtype, device=device).T
    for w in (weight, weight[::2], weight.flip(0)):
        found = functional_xnor_linear(x[:, ::2], w)
        assert torch.equal(found.cpu(), exact(x[:, ::2], w, dtype))
    odd = numbers(4 * 33 + 1, dtype=dtype, device=device)[1:].view(4, 33)  # not aligned
    w = numbers(5, 33, dtype=dtype, device=device)
    assert torch.equal(functional_xnor_linear(odd, w).cpu(), exact(odd, w, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scale_and_bias_are_those_of_a_simulated_layer(device, dtype):
    x, weight = numbers(6, 50, dtype=dtype, device=device), torch.randn(7, 50)
    weight = weight.to(device, dtype)
    layer = layer_of(weight, bias=True, ste="magnitude_aware_sign")
    torch.nn.init.normal_(layer.bias)
    product = exact(x, weight, dtype).to(device)
    scale = weight.double().abs().mean(1).to(dtype)
    torch.testing.assert_close(layer.scale(), scale)
    expected = product * layer.scale() + layer.bias
    assert torch.equal(layer(x), expected)
    assert torch.equal(pack_linear(layer)(x), expected)
    layer.xnor = False
    assert torch.equal(layer(x), expected)


def test_real_inputs_meet_the_signs_of_the_weights():
    layer = XnorLinear(20, 6, binary_input=False, bias=True)
    x = torch.randn(3, 20)
    expected = torch.nn.functional.linear(x, torch.from_numpy(signs(layer.weight)).float())
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="binary_input=False, whose product with real inputs"):
        pack_linear(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_signs(device, dtype):
    x = numbers(5, 30, dtype=dtype, device=device)
    found = sign_ste(x.T)
    assert (found.dtype, found.is_contiguous()) == (dtype, True)
    np.testing.assert_array_equal(found.float().cpu().numpy(), signs(x.T))


def test_autocast_decides_the_dtype(device):
    layer = layer_of(numbers(9, 70, device=device), bias=True, ste="magnitude_aware_sign")
    x = numbers(4, 70, seed=2, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64
    assert layer.float()(x.to(torch.bfloat16)).dtype == torch.bfloat16


# --- gradients


@pytest.mark.parametrize("case", CASES)
def test_pseudo_gradients(device, case):
    quantizer, reference = CASES[case]
    x = torch.tensor(POINTS, device=device, requires_grad=True)
    module = SignSTE(quantizer).to(device)
    module(x).backward(torch.tensor(GRADS, device=device))
    expected = [reference(a, g) for a, g in zip(POINTS, GRADS, strict=True)]
    tolerance = 1e-6 if "ede" in case else 1e-12  # its progress is a float32
    np.testing.assert_allclose(x.grad.cpu().numpy(), expected, rtol=tolerance, atol=1e-300)


@pytest.mark.parametrize("ste", ["ste_sign", "approx_sign", "clipped_grad", ops.SteSign(1.5)])
def test_gradients_are_those_of_our_own_layer(device, ste):
    rng = np.random.default_rng(0)
    x = (rng.integers(-8, 9, (6, 21)) / 4).astype(np.float32)
    weight = (rng.integers(-8, 9, (21, 5)) / 4).astype(np.float32)
    grad = (rng.integers(-8, 9, (6, 5)) / 8).astype(np.float32)
    ours = nn.BinaryLinear(21, 5, ste=ste)
    ours.weight.write()[...] = weight
    a = Tensor(x, requires_grad=True)
    y = ours(ops.sign(a, ste))
    y.backward(grad)
    layer = layer_of(torch.from_numpy(weight.T).to(device), ste=ste, input_ste=ste)
    b = torch.tensor(x, device=device, requires_grad=True)
    z = layer(b.view(2, 3, 21))
    z.backward(torch.from_numpy(grad).to(device).view(2, 3, 5))
    for got, want in (
        (z.detach().view(6, 5), y.data),
        (b.grad, a.grad.data),
        (layer.weight.grad.T, ours.weight.grad.data),
    ):
        np.testing.assert_array_equal(got.cpu().numpy(), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_have_the_dtype_of_their_tensors(device, dtype):
    layer = XnorLinear(16, 4, bias=True).to(device)
    x = torch.randn(3, 16, device=device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        layer(x).float().sum().backward()
    assert (x.grad.dtype, layer.weight.grad.dtype) == (torch.float32, torch.float32)
    expected = signs(layer.weight).sum(0) * (x.detach().abs() <= 1).cpu().numpy()
    np.testing.assert_array_equal(x.grad.cpu().numpy(), expected)


def test_only_what_is_needed_is_computed():
    layer = XnorLinear(8, 4).requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    layer.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("module", [XnorLinear(8, 4), SignSTE()], ids=["XnorLinear", "SignSTE"])
def test_a_second_differentiation_is_an_error(module):
    x = torch.randn(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient cannot be differentiated again"):
        grad.sum().backward()


def test_random_signs_in_training_alone(device):
    layer = XnorLinear(64, 8, ste="stochastic_sign").to(device)
    x = torch.randn(3, 64, device=device)
    y = layer(x)
    assert any(not torch.equal(layer(x), y) for _ in range(9))
    y.sum().backward()
    inside = layer.weight.detach().abs() <= 1
    expected = torch.from_numpy(signs(x).sum(0)).to(device).float() * inside
    assert torch.equal(layer.weight.grad, expected)
    layer.eval()
    assert torch.equal(layer(x).cpu(), exact(x, layer.weight, torch.float32))
    draws = SignSTE("stochastic_sign").to(device)(torch.full((20_000,), 0.5, device=device))
    assert set(draws.tolist()) == {-1.0, 1.0}
    assert float((draws > 0).float().mean()) == pytest.approx(0.75, abs=0.02)


def test_progress_sharpens_a_pseudo_gradient():
    module = torch.nn.Sequential(SignSTE("ede_sign"), XnorLinear(3, 2))
    x = torch.zeros(1, 3, requires_grad=True)
    for progress, height in ((0.0, 1.0), (1.0, 10.0)):
        ct.set_progress(module, progress)
        (grad,) = torch.autograd.grad(module[0](x).sum(), x)
        torch.testing.assert_close(grad, torch.full((1, 3), height))
    assert "progress" not in " ".join(module.state_dict())


# --- PyTorch's machinery


class Tagged(torch.Tensor):
    """A subclass, which may change what operators do."""


def watched(x):
    """Yield the name of each case in which PyTorch must see a call on `x`, and its tensor."""
    other = {
        "subclass": x.as_subclass(Tagged), "sparse": x.to_sparse(), "meta": x.to("meta"),
        "negated": torch.complex(x, x).conj().imag,
    }  # fmt: skip
    yield from other.items()
    with torch.device(x.device):
        yield "mode of functions", x
    with FlopCounterMode(display=False):
        yield "mode of the dispatcher", x
    with torch.autograd.forward_ad.dual_level():
        yield "forward mode", x
    with torch._subclasses.FakeTensorMode() as fakes:
        yield "fake", fakes.from_tensor(x)
    with torch.autograd.profiler.profile():
        yield "profiler", x


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_the_dispatcher_is_passed_by_only_where_it_has_nothing_to_do(device):
    x, weight = torch.randn(4, 6, device=device), torch.nn.Parameter(torch.randn(3, 6))
    weight = weight.to(device)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast(device)):
        with mode():
            for plain in (x, x[1:], x.T.contiguous().T, torch.randn(4, 6, device=device)):
                assert calls.are_plain(plain, weight)
                assert calls.are_plain(plain, weight.detach())
    for case, tensor in watched(x):
        assert not calls.are_plain(tensor, weight), case
    seen = []

    def look(row):
        seen.append(calls.are_plain(row, weight))
        return row.sum()

    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    assert seen == [False] * len(seen)
    assert len(seen) >= 3


def test_a_profiler_sees_the_operator(device):
    layer, x = XnorLinear(6, 3).to(device), torch.randn(4, 6, device=device)
    with torch.autograd.profiler.profile() as profile:
        layer(x)
    assert "cupybnn::xnor_linear" in [event.key for event in profile.key_averages()]


def test_operators_are_what_pytorch_expects(device):
    x = torch.randn(2, 3, 40, device=device, requires_grad=True)
    weight = torch.randn(5, 40, device=device, requires_grad=True)
    progress = torch.tensor(0.5, device=device)
    opcheck(operators.xnor_linear, (x, weight, torch.bfloat16, "ede_sign", "ste_sign", progress))
    # What the last of opcheck's tests does, the tests of compiled models do for the others.
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(operators.sign_ste, (x, None, "ste_sign", progress), test_utils=quick)
    scaled = weight.detach(), "magnitude_aware_sign"
    opcheck(operators.weight_scale, scaled, test_utils=quick)
    packed = pack_linear(layer_of(weight.detach()))
    words = packed.words if device == "cpu" else packed._layout
    arguments = x.detach(), words, packed._popcounts, torch.float32
    opcheck(operators.packed_linear, arguments, test_utils=quick)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 24),
        torch.nn.BatchNorm1d(24),
        SignSTE("approx_sign"),
        XnorLinear(24, 20, ste="magnitude_aware_sign"),
        torch.nn.BatchNorm1d(20),
        XnorLinear(20, 5, ste="ede_sign", bias=True),
    )


def exact_network():
    """Return a network in which every sign is that of an integer, however sums are rounded."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        SignSTE("approx_sign"),
        XnorLinear(16, 20),
        XnorLinear(20, 24, ste="ede_sign"),
        XnorLinear(24, 5, ste="magnitude_aware_sign", bias=True),
    )


def compiles(model, device, backend, dynamic):
    """Compare forward and backward passes of a compiled model with those of a plain one."""
    torch._dynamo.reset()
    model = model.to(device)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (4, 9, 7) if dynamic else (4, 4):
        x = torch.randn(rows, 16, device=device)
        expected, found = model(x), compiled(x)
        expected.square().sum().backward()
        found.square().sum().backward()
        torch.testing.assert_close(found, expected)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "dynamic"), [("eager", False), ("aot_eager", True)])
def test_a_model_compiles_without_graph_breaks(backend, dynamic):
    compiles(network(), "cpu", backend, dynamic)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_compiles_on_a_gpu(dynamic):
    pytest.importorskip("triton")
    compiles(exact_network(), "cuda", "inductor", dynamic)


def test_progress_recompiles_nothing():
    torch._dynamo.reset()
    model = torch.nn.Sequential(SignSTE("ede_sign"))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    heights = []
    for progress in (0.0, 0.5, 1.0):
        ct.set_progress(model, progress)
        x = torch.zeros(2, requires_grad=True)
        compiled(x).sum().backward()
        heights.append(float(x.grad[0]))
    np.testing.assert_allclose(heights, [1.0, 1.0, 10.0], rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_a_training_step_in_a_cuda_graph():
    torch.manual_seed(0)
    layer = XnorLinear(200, 30).cuda()
    x, target = torch.randn(64, 200, device="cuda"), torch.randn(64, 30, device="cuda")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad(set_to_none=True)
        y = layer(x)
        (y - target).square().sum().backward()
        optimizer.step()
        return y

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        y = step()
    for seed in range(3):
        x.copy_(numbers(64, 200, seed=seed, device="cuda"))
        expected = exact(x, layer.weight, torch.float32)
        before = layer.weight.clone()
        graph.replay()
        assert torch.equal(y.cpu(), expected)
        assert not torch.equal(layer.weight, before)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [256, 1000])
def test_products_in_a_cuda_graph_share_memory_one_after_another(size):
    torch.manual_seed(0)
    layers = [XnorLinear(size, size).cuda() for _ in range(3)]
    layers[1] = pack_linear(layers[1])
    x = torch.empty(size, size, device="cuda")

    @torch.no_grad()
    def forward():
        results = [x]
        for layer in layers:  # the memory of one product's words is that of the next
            results.append(layer(results[-1]))
        return results[1:]

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        x.normal_()
        forward()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward()
    for _ in range(20):
        x.normal_()
        graph.replay()
        for mine, alone in zip(results, forward(), strict=True):
            assert torch.equal(mine, alone)


@pytest.mark.gpu
def test_a_product_runs_on_the_callers_stream_in_pytorchs_memory():
    import cupy

    layer = layer_of(numbers(300, 500, device="cuda"))
    packed = pack_linear(layer)
    x = numbers(200, 500, seed=1, device="cuda")
    expected = exact(x, layer.weight, torch.float32)
    layer(x), packed(x)
    pool = cupy.get_default_memory_pool()
    used, mode = pool.total_bytes(), torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    late = torch.full_like(x, 1.0)
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream), torch.no_grad():
            torch.cuda._sleep(50_000_000)  # whoever reads on another stream reads too early
            late.copy_(x)
            found, bits = layer(late), packed(late)
        assert not stream.query()  # and nobody has waited
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    stream.synchronize()
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(bits.cpu(), expected)
    assert pool.total_bytes() == used


# --- modules


def test_weights_are_clipped_after_a_step():
    model = torch.nn.Sequential(XnorLinear(6, 4), torch.nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=r"can leave the window \|w\| <= 1 .*clip=True"):
        model.append(XnorLinear(3, 2, clip=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    handle = ct.clip_after_step(optimizer, model)

    def step():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return [float(model[i].weight.detach().abs().max()) for i in range(3)]

    first, *others = step()
    assert first == 1.0
    assert min(others) > 90
    handle.remove()
    assert step()[0] > 90
    ct.clip_weights(model)
    assert float(model[0].weight.detach().abs().max()) == 1.0


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save", "state_dict"])
@pytest.mark.parametrize("packed", [False, True])
def test_copies_do_the_same(device, copied, packed):
    module = XnorLinear(70, 9, bias=True, ste=ops.MagnitudeAwareSign(1.25)).to(device)
    torch.nn.init.normal_(module.bias)
    if packed:
        module = pack_linear(module)
    if copied == "deepcopy":
        other = copy.deepcopy(module)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif copied == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False, map_location=device)
    else:
        other = ct.PackedLinear(70, 9, bias=True, scale=True) if packed else None
        other = other or XnorLinear(70, 9, bias=True, ste=ops.MagnitudeAwareSign(1.25))
        other = other.to(device)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, 70, device=device)
    assert torch.equal(other(x), module(x))
    assert repr(other) == repr(module)


def test_settings_of_a_quantizer_are_part_of_its_key():
    keys = {
        XnorLinear(2, 2, ste=ste)._key
        for ste in ("ste_sign", ops.SteSign(), ops.SteSign(2.0), ops.SwishSign(2.0))
    }
    assert len(keys) == 4
    late = ops.EdeSign()
    late.progress = 1.0
    assert float(SignSTE(late).progress) == 1.0


class OwnForward(ops.Quantizer):
    def forward(self, x, training=True):
        return x


def test_a_quantizer_of_ones_own():
    class Half(ops.Quantizer):
        def pseudo_gradient(self, x, grad):
            return grad * (abs(x) <= 0.5)

    x = torch.tensor([0.25, 0.75], requires_grad=True)
    sign_ste(x, Half()).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0]
    with pytest.raises(TypeError, match=r"forward pass of Quantizer, sign.* got OwnForward"):
        SignSTE(OwnForward())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: XnorLinear(8, 4)(torch.ones(2, 7)), ValueError,
         r"input of XnorLinear\(8, 4\) must have shape \(\.\.\., 8\); got \(2, 7\)"),
        (lambda: XnorLinear(8, 4)(torch.tensor(1.0)), ValueError, r"got \(\)"),
        (lambda: XnorLinear(8, 4)(torch.ones(2, 8, dtype=torch.int32)), TypeError,
         r"must be of floating dtype; got torch\.int32"),
        (lambda: XnorLinear(8, 4)(np.ones((2, 8), np.float32)), TypeError,
         r"input of XnorLinear\(8, 4\) must be a torch\.Tensor; got ndarray"),
        (lambda: sign_ste([1.0]), TypeError, r"must be a torch\.Tensor; got list"),
        (lambda: sign_ste(torch.ones(2, dtype=torch.bool)), TypeError, r"'x' of sign_ste"),
        (lambda: functional_xnor_linear(torch.ones(2, 3), torch.ones(3)), ValueError,
         r"'weight' of xnor_linear must have shape \(out_features, in_features\); got \(3,\)"),
        (lambda: XnorLinear(8, 4, ste="nonsense"), ValueError, "must be one of approx_sign"),
        (lambda: pack_linear(XnorLinear(8, 4))(torch.ones(2, 8, requires_grad=True)), RuntimeError,
         "for inference and has none"),
        (lambda: pack_linear(torch.nn.Linear(2, 2)), ValueError, "XnorLinear with binary input"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("binary_input", [True, False])
def test_the_meta_device_has_shapes_alone(binary_input):
    layer = XnorLinear(8, 4, binary_input=binary_input).to("meta")
    result = layer(torch.ones(2, 8, device="meta"))
    assert result.is_meta
    assert result.shape == (2, 4)


@pytest.mark.gpu
def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="must be on one device; got cuda:0 and cpu"):
        functional_xnor_linear(torch.ones(2, 3, device="cuda"), torch.ones(2, 3))


@pytest.mark.gpu
def test_packed_weights_move_between_devices():
    layer = XnorLinear(100, 20)
    packed, x = pack_linear(layer), torch.randn(3, 100)
    there = copy.deepcopy(packed).cuda()
    assert torch.equal(there(x.cuda()).cpu(), packed(x))
    assert torch.equal(there.cpu()(x), packed(x))
    there = ct.PackedLinear(100, 20, device="cuda")
    there.load_state_dict(packed.state_dict())
    assert torch.equal(there(x.cuda()).cpu(), packed(x))


def test_a_module_is_packed_as_a_whole():
    torch.manual_seed(1)
    shared = XnorLinear(24, 24)
    model = torch.nn.Sequential(
        XnorLinear(30, 24, binary_input=False), torch.nn.BatchNorm1d(24), shared,
        torch.nn.ModuleDict({"a": XnorLinear(24, 3, bias=True)})["a"],
    )  # fmt: skip
    x = torch.randn(5, 30)
    model(x)
    packed = pack_linear(model)
    assert [type(m).__name__ for m in packed] == [
        "XnorLinear", "BatchNorm1d", "PackedLinear", "PackedLinear",
    ]  # fmt: skip
    assert model[2] is shared
    assert model.training
    assert not packed.training
    with torch.no_grad():
        assert torch.equal(packed(x), model.eval()(x))
    assert sum(b.nbytes for b in packed[2].state_dict().values()) == 24 * 8


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(ct.__path__)])
def test_examples(name):
    if name == "cuda":
        pytest.importorskip("cupy")
    module = importlib.import_module(f"cupybnn.torch.{name}")
    assert doctest.testmod(module).failed == 0
