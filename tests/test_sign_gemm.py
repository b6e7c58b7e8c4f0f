"""Products of packed signs with a bfloat16 matrix, against plain ones; on Hopper."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fast_networks import arrays, run, trainer

from cupybnn import pack
from cupybnn.backends.cuda import fused_update, sign_gemm
from cupybnn.backends.cuda.fused import Launcher
from cupybnn.backends.cuda.fused_layers import ActivationGradient, BatchNorm, Layer

pytestmark = pytest.mark.gpu

#: (batch, inputs, units): tiles are 128 inputs by 256 columns, 64 of K a slot, 4 slots. The last
#: two have more tiles than a GPU has multiprocessors.
SIZES = [
    (1, 8, 8),
    (16, 128, 256),
    (64, 136, 264),
    (65, 120, 248),
    (257, 1032, 72),
    (1000, 1024, 1000),
    (513, 2304, 640),
    (64, 4104, 4104),
    (2048, 4096, 2560),
]


@pytest.fixture(autouse=True)
def hopper():
    reason = sign_gemm.unsupported_reason(0, "bfloat16", 8, 8)
    if reason is not None:
        pytest.skip(f"needs a product by signs: {reason}")


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bit patterns, rounded to nearest even."""
    return x.astype(ml_dtypes.bfloat16).view(np.uint16)


def integers(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Small ones: products of them and signs are exact, in whichever order they are added up."""
    return random.integers(-8, 9, shape).astype(np.float32)


def signs(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.where(random.random(shape) < 0.5, -1, 1).astype(np.float32)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradient_of_inputs(sizes):
    import cupy

    batch, inputs, units = sizes
    random = np.random.default_rng(units)
    gradient, weight = integers(random, (batch, units)), signs(random, (inputs, units))
    # Poisoned, and with a margin that must stay as it is.
    out = cupy.full((batch + 1, inputs), 0x7FC1, np.uint16)
    packed = pack(cupy.asarray(weight), axis=-2)
    matrix = cupy.asarray(to_bfloat16(gradient))
    sign_gemm.transposed_product(packed, matrix, out[:batch], 0)
    np.testing.assert_array_equal(out[:batch].get(), to_bfloat16(gradient @ weight.T))
    assert (out[batch:] == 0x7FC1).all()


@pytest.mark.parametrize("number", [1, 2, 7, 16], ids=lambda number: f"{number} parts")
@pytest.mark.parametrize("sizes", [*SIZES, (8192, 512, 512)], ids=str)
def test_gradient_of_weights(sizes, number):
    import cupy

    batch, inputs, units = sizes
    if number > -(-batch // 64):
        pytest.skip("a part has at least a slot of 64 images")
    random = np.random.default_rng(units)
    gradient, entered = integers(random, (batch, units)), signs(random, (batch, inputs))
    out = cupy.full((inputs + 1, units), 0x7FC1, np.uint16)
    packed = pack(cupy.asarray(entered), axis=-1)
    matrix = cupy.asarray(to_bfloat16(gradient))
    memory = scratch = None
    if number > 1:
        memory = sign_gemm.part_scratch(number * inputs * units + 1)
        memory[...] = np.nan
        scratch = memory[:-1].reshape(number, inputs, units)
    sign_gemm.weight_gradient(packed, matrix, out[:inputs], 0, scratch)
    np.testing.assert_array_equal(out[:inputs].get(), to_bfloat16(entered.T @ gradient))
    assert (out[inputs:] == 0x7FC1).all()
    if memory is not None:  # each part has been written, and nothing beyond
        assert bool(cupy.isnan(memory[-1]))
        assert not bool(cupy.isnan(memory[:-1]).any())


def mask_words(passes: np.ndarray) -> np.ndarray:
    """Masks of a row's elements, in words of 32."""
    wide = np.zeros((len(passes), -(-passes.shape[1] // 32) * 32), bool)
    wide[:, : passes.shape[1]] = passes
    return np.packbits(wide, axis=1, bitorder="little").view(np.uint32)


@pytest.mark.parametrize(
    ("product", "gate"), [("int16", "mask"), ("float16", "none"), ("float32", "clip")]
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradient_of_inputs_with_the_sums_for_the_batch_norm_below(sizes, product, gate):
    import cupy

    batch, inputs, units = sizes
    random = np.random.default_rng(units)
    gradient, weight = integers(random, (batch, units)), signs(random, (inputs, units))
    z = random.integers(-40, 41, (batch, inputs)).astype(product)
    passes = random.random((batch, inputs)) < 0.7
    mean, inverse = random.normal(size=inputs), random.random(inputs) + 0.1
    arrays = {name: cupy.full(inputs, np.nan, np.float32) for name in ("grad_gamma", "grad_beta")}
    for name, values in {"mean": mean, "inverse": inverse}.items():
        arrays[name] = cupy.asarray(values, np.float32)
    for name in ("gamma", "beta", "running_mean", "running_variance"):
        arrays[name] = cupy.full(inputs, np.nan, np.float32)
    out = cupy.full((batch + 1, inputs), 0x7FC1, np.uint16)
    below = ActivationGradient(
        layer=Layer(product=cupy.asarray(z), norm=BatchNorm(**arrays, decay=0.9, eps=1e-4)),
        gate=gate, mask=cupy.asarray(mask_words(passes)), grad=out[:batch], out=out[:batch],
    )  # fmt: skip
    assert below.can_be_summed()
    packed, scratch = pack(cupy.asarray(weight), axis=-2), sign_gemm.NormScratch(batch, inputs)
    for sign in (1, -1):  # the second time over the first
        matrix = cupy.asarray(to_bfloat16(sign * gradient))
        sign_gemm.transposed_product(packed, matrix, out[:batch], 0, below, scratch)
        patterns = to_bfloat16(sign * gradient @ weight.T)
        np.testing.assert_array_equal(out[:batch].get(), patterns)
        dy = patterns.view(ml_dtypes.bfloat16).astype(np.float64)
        if gate == "mask":
            dy[~passes] = 0
        elif gate == "clip":
            dy = dy.clip(-1, 1)
        normal = (z.astype(np.float32) - arrays["mean"].get()) * arrays["inverse"].get()
        # Integers, so that their sum is exact.
        np.testing.assert_array_equal(arrays["grad_beta"].get(), dy.sum(axis=0))
        most = abs(dy * normal).sum(axis=0).max()
        np.testing.assert_allclose(
            arrays["grad_gamma"].get(), (dy * normal).sum(axis=0), rtol=0, atol=1e-6 * most
        )
    assert (out[batch:] == 0x7FC1).all()
    assert not scratch.tickets.any()


@pytest.mark.parametrize("penalty", fused_update.PENALTIES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_update_equals_that_by_a_stored_gradient(sizes, penalty):
    import cupy

    batch, inputs, units = sizes
    random = np.random.default_rng(inputs)
    gradient, entered = integers(random, (batch, units)), signs(random, (batch, inputs))
    shape = (inputs, units)
    latent = random.uniform(-1.1, 1.1, shape).astype(np.float32)
    latent[random.random(shape) < 0.3] *= 1e-3  # so that some change their sign
    means = random.normal(size=shape).astype(np.float32)
    squares = random.random(shape).astype(np.float32)
    rates = cupy.asarray([[1e-2, 1e-2, 1e-8, 0]], np.float32)
    launcher = Launcher(0, np.dtype(np.uint16))

    def updated(grad: Any) -> fused_update.ParameterUpdate:
        weight, mean, square = (cupy.asarray(x.copy()) for x in (latent, means, squares))
        return fused_update.ParameterUpdate(
            weight=weight,
            grad=grad,
            mean=mean,
            square=square,
            kept_grad=cupy.zeros(shape, np.float32),
            packed=pack(weight, axis=-2),
            binary=True,
            gate="window",
            limit=1.0,
            penalty=1e-3,
            weight_decay=0.1,
        )

    names = ("weight", "grad", "mean", "square", "kept_grad")
    zeros = {name: cupy.zeros(8, np.float32) for name in names}
    small = fused_update.ParameterUpdate(**zeros)
    stored = updated(cupy.asarray(to_bfloat16(entered.T @ gradient)))
    at_once = updated(None)
    losses = []
    for parameter in (stored, at_once):
        groups = [[parameter, small], [small]]
        step, mean_loss = cupy.zeros(1, np.int64), cupy.ones(1, np.float32)
        loss = cupy.full(1, np.nan, np.float32)
        update = fused_update.Update(
            launcher,
            groups,
            betas=(0.9, 0.999),
            penalty=penalty,
            keep_gradients=True,
            rates=rates,
            step=step,
            mean_loss=mean_loss,
            loss=loss,
        )
        if parameter is at_once:
            packed = pack(cupy.asarray(entered), axis=-1)
            matrix = cupy.asarray(to_bfloat16(gradient))
            update.launch_fused_update(0, signs=packed, matrix=matrix)
        for group in (0, 1):
            update.launch(group)
        assert int(step[0]) == 1
        losses.append(float(loss[0]))
    for name in ("weight", "mean", "square", "kept_grad"):
        expected, got = getattr(stored, name), getattr(at_once, name)
        np.testing.assert_array_equal(got.get(), expected.get(), err_msg=name)
    assert (cupy.signbit(stored.weight) != cupy.asarray(np.signbit(latent))).any()
    again = pack(at_once.weight, axis=-2)
    for name in ("words", "popcounts"):
        np.testing.assert_array_equal(
            getattr(at_once.packed, name).get(), getattr(again, name).get(), err_msg=name
        )
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


NETWORKS = {
    "three layers": {"batch_norm": True},
    "memory spared": {"batch_norm": True, "spared": True},
    "without batch norm": {},
    "five layers, ragged": {
        "batch_norm": True,
        "hidden_layers": 5,
        "n_hidden": 264,
        "batch_size": 90,
    },
    "clipped, l1": {"batch_norm": True, "ste": "clipped_grad", "reg": 1e-4},
    "all binary, against the network": {
        "batch_norm": True,
        "first": True,
        "last": True,
        "keep_prob": 0.5,
        "adversarial": 0.1,
    },
    "recorded": {"batch_norm": True, "recorded": True},
}


@pytest.mark.parametrize("way", ["bits", "parts"])
@pytest.mark.parametrize("room", [None, 0], ids=["dense copies", "memory spared"])
def test_the_graph_changes_nothing_by_bits(monkeypatch, room, way):
    monkeypatch.setattr(sign_gemm, "pays", lambda *sizes: way == "bits")
    monkeypatch.setattr(sign_gemm, "parts", lambda *sizes: 3)
    if room is not None:
        monkeypatch.setattr("cupybnn.training.fast.plan._DENSE_COPY_BYTES", room)
    settings = {"binary": True, "xnor": True, "batch_norm": True, "dtype": "bfloat16"}
    settings |= {"n_hidden": 1024, "batch_size": 300, "max_steps": 60, "reg": 1e-4}
    with_graph, a = run(**settings)
    without, b = run(**settings, graph=False)
    assert {h.backward for h in with_graph._step.plan.hidden[1:]} == {way}
    assert a == b
    expected = arrays(without)
    for name, array in arrays(with_graph).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("bits", ["bits", "parts"])
@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS.keys())
def test_steps_by_bits_are_those_by_dense_products(monkeypatch, tmp_path, settings, bits):
    settings = {"binary": True, "xnor": True, "dtype": "bfloat16", "max_steps": 40, **settings}
    if settings.pop("spared", False):
        monkeypatch.setattr("cupybnn.training.fast.plan._DENSE_COPY_BYTES", 0)
    log = {"log_dir": str(tmp_path)} if settings.pop("recorded", False) else {}
    losses, parameters, gradients = {}, {}, {}
    for way in ("dense", bits):
        parts = 2 * (way == "parts")
        monkeypatch.setattr(sign_gemm, "pays", lambda *sizes, way=way: way == "bits")
        monkeypatch.setattr(sign_gemm, "parts", lambda *sizes, parts=parts: parts)
        made = trainer(**settings, **log)
        losses[way] = [float(made.make_step(0).loss)]
        assert {h.backward for h in made._step.plan.hidden[1:]} == {way}
        named = dict(made.model.named_parameters())
        parameters[way] = {name: p.data.copy() for name, p in named.items()}
        gradients[way] = {name: p.grad.copy() for name, p in named.items() if p.grad is not None}
        losses[way] += [float(made.make_step(s).loss) for s in range(1, 40)]
        # What the products read has followed the weights.
        for number in range(2, len(made._step.plan.hidden) + 1):
            packed = made._step.buffers.hidden[number - 1].packed_weight
            latent = pack(named[f"fc{number}.weight"].data, axis=-2)
            np.testing.assert_array_equal(packed.words.get(), latent.words.get())
    assert losses[bits][0] == losses["dense"][0]
    # After it, sums in another order, rounded to bfloat16: now and then a pixel or a weight goes
    # another way.
    np.testing.assert_allclose(np.mean(losses[bits]), np.mean(losses["dense"]), rtol=0.1)
    for name, expected in parameters["dense"].items():
        changed = abs(parameters[bits][name] - expected) > 0.1 * made.config.lr
        assert float(changed.mean()) < 0.05, name
    assert gradients[bits].keys() == gradients["dense"].keys()
    assert "fc2.weight" in gradients[bits] or not log
    for name, expected in gradients["dense"].items():
        apart = abs(gradients[bits][name] - expected).mean()
        assert float(apart) <= 0.02 * float(abs(expected).mean()) + 1e-8, name
