"""What a fused step plans for a network, and what it refuses; without a GPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from fast_networks import SMALL, trainer

from cupybnn import nn, ops, optim
from cupybnn import settings as cupybnn_settings
from cupybnn.backends.cuda import sign_gemm
from cupybnn.training import Callback, TrainConfig, setup
from cupybnn.training.fast import NetworkPlan, unsupported_reason
from cupybnn.training.fast.layers import exact_product_dtype, latent_gate
from cupybnn.training.network import build_network


def plan(device: int | None = None, **settings) -> NetworkPlan:
    config = TrainConfig(**{**SMALL, **settings})
    return NetworkPlan.of(build_network(config, 784, 10), config, device)


def chain(*hidden: nn.Module, head: tuple[nn.Module, ...] = ()) -> nn.Sequential:
    """Return 96-64-32-10 with what stands after the first product and after the second."""
    head = head or (nn.Linear(32, 10, rng=2),)
    return nn.Sequential(nn.Linear(96, 64, rng=0), *hidden, *head)


def test_the_products_of_a_plan():
    assert [h.product for h in plan().hidden] == ["dense"] * 3
    assert [h.product for h in plan(binary=True).hidden] == ["dense", "sign", "sign"]
    assert [h.product for h in plan(binary=True, xnor=True).hidden] == ["dense", "xnor", "xnor"]
    small, large = plan(binary=True, xnor=True), plan(binary=True, xnor=True, batch_size=1 << 17)
    assert [h.activation for h in small.hidden] == ["both_signs", "both_signs", "none"]
    assert [h.activation for h in large.hidden] == ["packed_sign", "packed_sign", "none"]
    assert [h.inputs for h in plan().hidden] == [784, 128, 128]


def test_when_the_first_two_layers_are_updated_together(monkeypatch):
    assert plan().updates_together
    assert plan(hidden_layers=2).updates_together
    assert not plan(hidden_layers=1).updates_together
    # Gradients of weights share memory, so that each must be used before the next is computed.
    monkeypatch.setattr("cupybnn.training.fast.plan._DENSE_COPY_BYTES", 0)
    assert not plan().updates_together
    monkeypatch.setattr(sign_gemm, "unsupported_reason", lambda *arguments: None)
    monkeypatch.setattr(sign_gemm, "pays", lambda *arguments: True)
    assert plan(device=0, binary=True, xnor=True).updates_together


def test_which_layers_have_a_1_bit_backward_pass(monkeypatch, capsys):
    monkeypatch.setattr(sign_gemm, "architecture", lambda device: 90)
    monkeypatch.setattr(sign_gemm, "multiprocessors", lambda device: 8)  # as small a GPU as layers
    monkeypatch.setattr(sign_gemm, "_can_map", lambda: True)
    monkeypatch.setattr(cupybnn_settings, "debug", lambda: True)
    wide = {"binary": True, "xnor": True, "dtype": "bfloat16", "n_hidden": 512}

    def ways(**settings):
        made = plan(**{"device": 0, "batch_size": 512, **wide, **settings})
        return [hidden.backward for hidden in made.hidden], capsys.readouterr().err

    made = plan(device=0, batch_size=512, **wide)
    assert [h.activation for h in made.hidden] == ["packed_sign", "packed_sign", "none"]
    capsys.readouterr()
    told = "".join(
        f"cupybnn: backward pass of fc{i}, 512 × 512, 512 examples: packed signs\n" for i in (2, 3)
    )
    assert ways() == (["dense", "bits", "bits"], told)
    # As few weights with enough images are divided among blocks by the images.
    monkeypatch.setattr(sign_gemm, "multiprocessors", lambda device: 132)
    by, told = ways(batch_size=8192)
    assert by == ["dense", "parts", "parts"]
    assert "fc2, 512 × 512, 8192 examples: of weights by packed signs, 16 parts of" in told
    made = plan(device=0, **{**wide, "batch_size": 8192})
    assert not any(hidden.updates for hidden in made.hidden)
    assert [h.activation for h in made.hidden] == ["packed_sign", "packed_sign", "none"]
    capsys.readouterr()
    monkeypatch.setattr(sign_gemm, "multiprocessors", lambda device: 8)
    for settings, reason in (
        ({"batch_size": 128}, "fewer tiles"),
        ({"dtype": "float32"}, "in float32"),
        ({"n_hidden": 516}, "multiple of 8"),
    ):
        by, told = ways(**settings)
        assert by == ["dense"] * 3
        assert ": dense products, because " in told
        assert reason in told
    monkeypatch.setattr(sign_gemm, "_can_map", lambda: False)
    assert "cuda-bindings is missing" in ways()[1]
    # Where nothing of it is possible nothing is reported.
    assert ways(xnor=False) == (["dense"] * 3, "")
    assert ways(device=None) == (["dense"] * 3, "")


@pytest.mark.parametrize(
    ("m", "n", "tiles"), [(1, 1, 1), (128, 256, 1), (129, 256, 2), (128, 257, 2), (4096, 4096, 512)]
)
def test_tiles_of_a_product_by_signs(m, n, tiles):
    assert sign_gemm.tiles(m, n) == tiles


@pytest.mark.parametrize(
    ("batch", "inputs", "units", "parts"),
    [
        (8192, 512, 512, 16),  # 8 tiles in each
        (7000, 512, 512, 13),
        (4096, 512, 512, 0),  # 8 parts, and 64 tiles together
        (16384, 384, 512, 22),
        (16384, 256, 256, 0),  # 32 parts of two tiles
        (65536, 1024, 1024, 0),  # 4 parts
    ],
)
def test_in_how_many_parts_the_gradient_of_few_weights_is_computed(
    monkeypatch, batch, inputs, units, parts
):
    monkeypatch.setattr(sign_gemm, "multiprocessors", lambda device: 132)
    assert sign_gemm.parts(0, batch, inputs, units) == parts


def test_only_products_of_real_numbers_are_rounded():
    def dtypes(**settings):
        return [h.product_dtype.name for h in plan(**settings).hidden]

    assert dtypes(dtype="bfloat16") == ["uint16"] * 3
    assert dtypes(dtype="bfloat16", binary=True) == ["uint16", "float32", "float32"]
    assert dtypes(dtype="bfloat16", binary=True, xnor=True) == ["uint16", "float16", "float16"]
    assert dtypes(dtype="tf32", binary=True, xnor=True) == ["float32", "float16", "float16"]


def test_the_gates_of_a_plan():
    assert {h.gate for h in plan().hidden} == {"mask"}
    # Nothing stands between the last hidden layer's batch norm and a real head.
    assert [h.gate for h in plan(binary=True).hidden] == ["mask", "mask", "none"]
    clipped = plan(binary=True, ste="clipped_grad", last=True, batch_norm=True)
    assert {h.gate for h in clipped.hidden} == {"clip"}
    assert {h.gate for h in plan(binary=True, ste="identity").hidden} == {"none"}
    assert latent_gate(plan(binary=True).hidden[0].linear) == "none"
    assert latent_gate(plan(binary=True).hidden[1].linear) == "window"
    assert latent_gate(plan(binary=True, ste="clipped_grad").hidden[1].linear) == "clip"


def test_packing_does_not_change_the_order_in_which_the_penalty_is_added_up():
    from cupybnn.backends.cuda.fused_update import ParameterUpdate

    names = ("weight", "grad", "mean", "square")
    arrays = {name: np.zeros((45, 70), np.float32) for name in names}
    dense = ParameterUpdate(**arrays, binary=True)
    packed = ParameterUpdate(**arrays, binary=True, packed=object())
    assert dense.geometry() == packed.geometry() == (45, 70)
    assert dense.blocks() == packed.blocks()


def test_what_the_last_layer_reads():
    all_binary = plan(binary=True, xnor=True, first=True, last=True, batch_norm=True)
    assert [made.head.reads for made in (plan(), plan(binary=True), all_binary)] == [
        "relu",
        "none",
        "sign",
    ]
    assert [h.product for h in all_binary.hidden] == ["sign", "xnor", "xnor"]


@pytest.mark.parametrize("k", [1, 2, 2048, 2049, 4095, 4096, 4098, 8192, 32767, 32768])
def test_product_dtype_holds_every_value(k):
    possible = np.arange(-k, k + 1, 2).astype(np.float64)
    dtype = exact_product_dtype(k)
    np.testing.assert_array_equal(possible.astype(dtype).astype(np.float64), possible)
    smaller = {np.float16: [], np.int16: [np.float16], np.float32: [np.float16, np.int16]}
    for other in smaller[dtype.type]:
        assert (possible.astype(other).astype(np.float64) != possible).any()


@pytest.mark.parametrize(
    ("settings", "capability", "words"),
    [
        ({}, 90, None),
        ({"dtype": "tf32"}, 80, None),
        ({"dtype": "bfloat16"}, 75, "compute capability 8.0"),
        ({"dtype": "float64"}, 90, "float64"),
        ({"binary": True, "first": True, "batch_norm": False}, 90, "Scale"),
        ({"binary": True, "first": True, "last": True, "batch_norm": True}, 90, None),
        ({"binary": True, "ste": "approx_sign"}, 90, "ApproxSign"),
        ({"optimizer": "sgd"}, 90, "SGD"),
        ({"debug": True}, 90, "--debug"),
        ({"augment_shift": 1.0, "augment_rotation": 5.0}, 90, None),
        ({"augment_elastic": 1.0, "augment_flip": True}, 90, None),
        ({"binary": True, "sign_keep_prob": 0.9}, 90, "SignDropout"),
        ({"adversarial": 0.1}, 90, None),
        ({"binary": True, "optimizer": "bop"}, 90, "Combined"),
        ({"penalty": "l2", "reg": 0.1}, 90, "the penalty 'l2'"),
        ({"penalty": "l2", "reg": 0.0, "shuffle": False, "eval_every_n": 0}, 90, None),
        ({"schedule": "step", "milestones": (5,), "average": "ema", "latent_lr": 0.5}, 90, None),
    ],
)
def test_unsupported_settings(settings, capability, words):
    made = trainer(**{**settings, "device": "cpu"})
    reason = unsupported_reason(made.config, made.model, made.optimizer, capability)
    assert reason is None if words is None else words in reason


def test_unsupported_optimizers():
    made = trainer(device="cpu")

    def reason(optimizer):
        return unsupported_reason(made.config, made.model, optimizer, 90)

    parameters = list(made.model.parameters())
    assert "SGD" in reason(optim.SGD(parameters, 0.1))
    assert "exactly the parameters" in reason(optim.Adam(parameters[:-1]))
    two = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    assert "more than one group" in reason(optim.Adam(two))


class Doubled(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2.0


def relu_chain(**options) -> nn.Sequential:
    return chain(nn.ReLU(), nn.Linear(64, 32, rng=1, **options), nn.ReLU())


def sign_chain(binary: nn.Module, *after: nn.Module, sign: nn.Module | None = None):
    return chain(nn.BatchNorm(64), sign or nn.Sign(), binary, *after)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (relu_chain(), None),
        (sign_chain(nn.BinaryLinear(64, 32)), None),
        (nn.Sequential(nn.Dropout(0.9), relu_chain(), nn.Dropout(1.0)), None),
        (chain(nn.ReLU(), nn.BinaryLinear(64, 32, binary_input=False), nn.ReLU()), None),
        (nn.Linear(96, 10), "not a chain"),
        (Doubled(*relu_chain()), "not a chain"),
        (nn.Sequential(nn.Linear(96, 10)), "no hidden layer"),
        (relu_chain(bias=True), "2 has a bias"),
        (relu_chain(dtype="float64"), "float64"),
        (chain(nn.Linear(64, 32), nn.ReLU()), "neither sign nor ReLU"),
        (
            chain(nn.ReLU(), nn.BatchNorm(64), nn.Linear(64, 32)),
            "a BatchNorm layer is not supported at its place after 0",
        ),
        (chain(nn.ReLU(), nn.BinaryLinear(64, 32), nn.ReLU()), "the input of 2 must be signs"),
        (sign_chain(nn.BinaryLinear(64, 32), nn.Sign()), "binary weights and inputs, or neither"),
        (sign_chain(nn.BinaryLinear(64, 32, ste=ops.SteSign(2.0))), "must have the window 1"),
        (
            sign_chain(nn.BinaryLinear(64, 32), sign=nn.Sign(ops.ClippedGrad(2.0))),
            "the pseudo-gradient",
        ),
        (
            chain(nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), head=(nn.Linear(32, 40),)),
            "more than 32 classes",
        ),
    ],
)
def test_supported_chains(model, words):
    config = TrainConfig(batch_size=8)
    reason = unsupported_reason(config, model, optim.Adam(model.parameters()), 90)
    assert reason is None if words is None else words in reason


def test_repeated_and_frozen_layers_are_unsupported():
    config = TrainConfig(batch_size=8)
    norm = nn.BatchNorm(64)
    model = chain(norm, nn.ReLU(), nn.Linear(64, 64), norm, nn.ReLU(), head=(nn.Linear(64, 10),))
    reason = unsupported_reason(config, model, optim.Adam(model.parameters()), 90)
    assert "more than once" in reason
    model = relu_chain()
    model[0].weight.requires_grad = False
    reason = unsupported_reason(config, model, optim.Adam(model.parameters()), 90)
    assert "0.weight has requires_grad=False" in reason


def test_hidden_layers_may_differ_in_width_and_kind():
    model = nn.Sequential(
        nn.Linear(96, 64, rng=0),
        nn.BatchNorm(64),
        nn.Sign(),
        nn.BinaryLinear(64, 48, rng=1),
        nn.BatchNorm(48),
        nn.ReLU(),
        nn.Linear(48, 32, rng=2),
        nn.BatchNorm(32),
        nn.ReLU(),
        nn.Dropout(0.5, rng=3),
        nn.Linear(32, 10, rng=4),
    )
    made = NetworkPlan.of(model, TrainConfig(batch_size=8))
    assert [(h.inputs, h.units) for h in made.hidden] == [(96, 64), (64, 48), (48, 32)]
    assert [h.product for h in made.hidden] == ["dense", "xnor", "dense"]
    assert [h.activation for h in made.hidden] == ["both_signs", "relu", "none"]


def test_rounding_that_the_cpu_does_not_have_is_reported():
    heard: list[str] = []

    class Ear(Callback):
        def on_notice(self, trainer, sentence):
            heard.append(sentence)

    trainer([Ear()], device="cpu", dtype="bfloat16", max_steps=1).run()
    assert heard == ["Dense products are in float32, not bfloat16: there is no GPU."]


def test_settings_of_the_step_are_plain_settings():
    config = TrainConfig(**SMALL, fused=False, graph=False)
    assert TrainConfig.from_json(config.to_json()) == config
    assert dataclasses.replace(config, dtype="tf32").storage_dtype == "float32"


@pytest.mark.parametrize(
    ("side", "settings", "fits"),
    [
        (28, {"augment_elastic": 1.0}, True),
        (350, {"augment_elastic": 1.0}, True),
        (400, {"augment_shift": 1.0}, True),
        (400, {"augment_elastic": 1.0}, False),  # 160,000 bytes, and 80,000 of the elastic field
        (500, {"augment_flip": True}, False),
        (500, {}, True),
    ],
)
def test_images_that_do_not_fit_into_shared_memory(monkeypatch, side, settings, fits):
    from cupybnn.backends.cuda import compiler

    monkeypatch.setattr(compiler, "architecture", lambda index: 90)
    monkeypatch.setattr(compiler, "shared_memory_limit", lambda index: 232_448)
    made = trainer(**settings, device="cpu")
    data = SimpleNamespace(
        device=SimpleNamespace(kind="cuda", index=0), pixel_scale=1.0, image_shape=(side, side)
    )
    reason = setup._unfused_reason(made.model, made.optimizer, data, made.config, None)
    assert reason == (None if fits else "the images are too large to be deformed in shared memory")
