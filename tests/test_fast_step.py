"""The fused step: what it plans, and that it computes what the plain step does."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from cupybnn import nn, optim
from cupybnn import settings as cupybnn_settings
from cupybnn.backends.cuda import sign_gemm
from cupybnn.backends.devices import Device
from cupybnn.data import BatchOrder
from cupybnn.data.dataset import Dataset
from cupybnn.training import Callback, TrainConfig, Trainer
from cupybnn.training.fast import NetworkPlan, obstacle
from cupybnn.training.fast.feed import Feed
from cupybnn.training.fast.plan import exact_product_dtype
from cupybnn.training.step import PlainStep

#: Every network that the fused step knows, with each thing that changes what a kernel does. Dropout
#: keeps a half: other factors do not leave the sums of a binary product exact, and where a unit is
#: exactly at its mean the last bit would decide its sign.
NETWORKS = {
    "xnor": {"binary": True, "xnor": True, "batch_norm": True},
    "xnor, odd sizes": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 45,
        "batch_size": 33,
    },
    "xnor, wide": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 2048,
        "batch_size": 300,
    },
    "xnor, a word more than a chunk": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 1056,
        "batch_size": 700,
    },
    "xnor without batch norm": {"binary": True, "xnor": True},
    "sign": {"binary": True, "batch_norm": True},
    "dropout before sign": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "keep_prob": 0.5,
    },
    "clipped": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "ste": "clipped_grad",
        "loss": "squared_hinge",
    },
    "all binary": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "first": True,
        "last": True,
        "loss": "squared_hinge",
        "input_keep_prob": 0.8,
    },
    "last layer binary, clipped": {
        "binary": True,
        "batch_norm": True,
        "last": True,
        "ste": "clipped_grad",
        "label_smoothing": 0.1,
        "batch_size": 700,
    },
    "last layer binary, without batch norm": {"binary": True, "last": True},
    "deformed images": {
        "batch_norm": True,
        "augment_shift": 1.5,
        "augment_rotation": 10.0,
        "augment_scale": 0.1,
        "augment_shear": 0.1,
    },
    "against the network": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "first": True,
        "last": True,
        "loss": "squared_hinge",
        "keep_prob": 0.5,
        "input_keep_prob": 0.8,
        "adversarial": 0.1,
    },
    "many rows": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 64,
        "batch_size": 5000,
    },
    "xnor, products of 16-bit integers": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 4104,
        "batch_size": 64,
    },
    "more rows than shared memory holds": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 40,
        "batch_size": 20000,
    },
    "deep": {"binary": True, "xnor": True, "batch_norm": True, "hidden_layers": 5},
    "shallow": {"binary": True, "xnor": True, "batch_norm": True, "hidden_layers": 1},
    "full precision": {},
    "full precision, batch norm, dropout": {
        "batch_norm": True,
        "keep_prob": 0.6,
        "input_keep_prob": 0.8,
        "label_smoothing": 0.1,
    },
}
SMALL = {"n_hidden": 128, "batch_size": 96, "reg": 0.0, "max_steps": 1000}


def dataset(images: int = 500, classes: int = 10) -> Dataset:
    random = np.random.default_rng(7)
    pixels = random.integers(0, 256, (images, 96)).astype(np.uint8)
    labels = random.integers(0, classes, images).astype(np.uint8)
    return Dataset("digits", pixels, labels, pixels[:50], labels[:50], (8, 12), 255, classes)


def trainer(callbacks=(), data: Dataset | None = None, **settings) -> Trainer:
    config = TrainConfig(**{**SMALL, "device": "cuda", "fused": True, **settings})
    return Trainer(config, callbacks, dataset=data or dataset())


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, trainer, step, output):
        self.losses.append(float(output.loss))


def run(**settings) -> tuple[Trainer, list[float]]:
    losses = Losses()
    made = trainer([losses], **settings)
    made.run()
    return made, losses.losses


def arrays(made: Trainer) -> dict[str, np.ndarray]:
    return dict(made.state().arrays)


# Without a GPU -----------------------------------------------------------------------------------


def plan(device: int | None = None, **settings) -> NetworkPlan:
    return NetworkPlan.of(TrainConfig(**{**SMALL, **settings}), 784, 10, device)


def test_the_products_of_a_plan():
    assert [h.product for h in plan().hidden] == ["dense"] * 3
    assert [h.product for h in plan(binary=True).hidden] == ["dense", "sign", "sign"]
    assert [h.product for h in plan(binary=True, xnor=True).hidden] == ["dense", "xnor", "xnor"]
    small, large = plan(binary=True, xnor=True), plan(binary=True, xnor=True, batch_size=1 << 17)
    assert [h.activation for h in small.hidden] == ["both_signs", "both_signs", "none"]
    assert [h.activation for h in large.hidden] == ["packed_sign", "packed_sign", "none"]
    assert [h.inputs for h in plan().hidden] == [784, 128, 128]


def test_which_layers_go_backward_by_bits(monkeypatch, capsys):
    monkeypatch.setattr(sign_gemm, "architecture", lambda device: 90)
    monkeypatch.setattr(sign_gemm, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(sign_gemm, "_can_map", lambda: True)
    monkeypatch.setattr(cupybnn_settings, "debug", lambda: True)
    wide = {"binary": True, "xnor": True, "dtype": "bfloat16", "n_hidden": 4096}

    def ways(**settings):
        made = plan(**{"device": 0, "batch_size": 4096, **wide, **settings})
        return [hidden.backward for hidden in made.hidden], capsys.readouterr().err

    made = plan(device=0, batch_size=4096, **wide)
    assert [h.activation for h in made.hidden] == ["packed_sign", "packed_sign", "none"]
    capsys.readouterr()
    told = "cupybnn: backward pass of 4096 units, 4096 examples: by bits\n"
    assert ways() == (["dense", "bits", "bits"], told)
    for settings, reason in (
        ({"batch_size": 1024}, "fewer tiles"),
        ({"dtype": "float32"}, "in float32"),
        ({"n_hidden": 4100}, "multiple of 8"),
    ):
        by, told = ways(**settings)
        assert by == ["dense"] * 3
        assert "by dense products, since " in told
        assert reason in told
    monkeypatch.setattr(sign_gemm, "_can_map", lambda: False)
    assert "cuda-bindings is missing" in ways()[1]
    # Where nothing of it is possible nothing is told.
    assert ways(xnor=False) == (["dense"] * 3, "")
    assert ways(device=None) == (["dense"] * 3, "")


@pytest.mark.parametrize(
    ("m", "n", "tiles"), [(1, 1, 1), (128, 256, 1), (129, 256, 2), (128, 257, 2), (4096, 4096, 512)]
)
def test_tiles_of_a_product_by_signs(m, n, tiles):
    assert sign_gemm.tiles(m, n) == tiles


def test_only_products_of_real_numbers_are_rounded():
    def dtypes(**settings):
        return [h.product_dtype.name for h in plan(**settings).hidden]

    assert dtypes(dtype="bfloat16") == ["uint16"] * 3
    assert dtypes(dtype="bfloat16", binary=True) == ["uint16", "float32", "float32"]
    assert dtypes(dtype="bfloat16", binary=True, xnor=True) == ["uint16", "float16", "float16"]
    assert dtypes(dtype="tf32", binary=True, xnor=True) == ["float32", "float16", "float16"]


def test_the_gates_of_a_plan():
    assert {h.gate for h in plan().hidden} == {"mask"}
    assert {h.gate for h in plan(binary=True).hidden} == {"mask"}
    assert {h.gate for h in plan(binary=True, ste="clipped_grad").hidden} == {"clip"}
    assert {h.gate for h in plan(binary=True, ste="identity").hidden} == {"none"}
    assert plan(binary=True).latent_gate == "window"
    assert plan(binary=True, ste="clipped_grad").latent_gate == "clip"


def test_packing_does_not_change_the_order_in_which_the_penalty_is_added_up():
    from cupybnn.backends.cuda.fused_update import Updated

    arrays = [np.zeros((45, 70), np.float32) for _ in range(4)]
    dense = Updated(*arrays, binary=True)
    packed = Updated(*arrays, binary=True, packed=object())
    assert dense.geometry() == packed.geometry() == (45, 70)
    assert dense.blocks() == packed.blocks()


def test_what_the_last_layer_reads():
    all_binary = plan(binary=True, xnor=True, first=True, last=True, batch_norm=True)
    assert [plan().head, plan(binary=True).head, all_binary.head] == ["relu", "none", "sign"]
    assert [h.product for h in all_binary.hidden] == ["sign", "xnor", "xnor"]


@pytest.mark.parametrize("k", [1, 2, 2048, 2049, 4095, 4096, 4098, 8192, 32767, 32768])
def test_products_are_kept_in_a_type_that_holds_them(k):
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
        ({"binary": True, "first": True}, 90, "without batch norm"),
        ({"binary": True, "first": True, "last": True, "batch_norm": True}, 90, None),
        ({"binary": True, "ste": "approx_sign"}, 90, "'approx_sign'"),
        ({"optimizer": "sgd"}, 90, "SGD"),
        ({"debug": True}, 90, "--debug"),
        ({"augment_shift": 1.0, "augment_rotation": 5.0}, 90, None),
        ({"augment_elastic": 1.0}, 90, "'augment_elastic'"),
        ({"binary": True, "sign_keep_prob": 0.9}, 90, "'sign_keep_prob'"),
        ({"adversarial": 0.1}, 90, None),
        ({"binary": True, "optimizer": "bop"}, 90, "Combined"),
        ({"schedule": "step", "milestones": (5,), "average": "ema", "latent_lr": 0.5}, 90, None),
    ],
)
def test_what_stands_against_the_fused_step(settings, capability, words):
    made = trainer(**{**settings, "device": "cpu"})
    reason = obstacle(made.config, made.model, made.optimizer, capability)
    assert reason is None if words is None else words in reason


def test_another_network_or_optimiser_is_not_taken():
    made = trainer(device="cpu")
    assert "optimiser" in obstacle(made.config, made.model, optim.SGD([], 0.1), 90)
    assert "network" in obstacle(made.config, made.model.fc1, made.optimizer, 90)


def test_rounding_that_the_cpu_does_not_have_is_told():
    heard: list[str] = []

    class Ear(Callback):
        def on_notice(self, trainer, sentence):
            heard.append(sentence)

    trainer([Ear()], device="cpu", dtype="bfloat16", max_steps=1).run()
    assert heard == ["Dense products are in float32, not bfloat16: there is no GPU."]


# On a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS.keys())
class TestAgainstThePlainStep:
    def pair(self, **settings) -> tuple[Trainer, Trainer]:
        return trainer(**settings, fused=False), trainer(**settings, graph=False)

    def test_gradients_loss_and_statistics(self, settings):
        plain, fused = self.pair(**settings)
        expected, got = plain.make_step(0), fused.make_step(0)
        assert isinstance(plain._step, PlainStep)
        assert not isinstance(fused._step, PlainStep)
        np.testing.assert_array_equal(got.labels.get(), expected.labels.get())
        np.testing.assert_allclose(got.logits.get(), expected.logits.get(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(float(got.loss), float(expected.loss), rtol=1e-5)
        for (name, p), q in zip(
            plain.model.named_parameters(), fused.model.parameters(), strict=True
        ):
            scale = float(abs(p.grad).max())
            if name.endswith("beta"):  # where batch norm follows, these are sums that cancel
                scale = max(scale, float(abs(plain.model.fcout.weight.grad).max()))
            np.testing.assert_allclose(
                q.grad.get(), p.grad.get(), rtol=0, atol=2e-5 * scale, err_msg=name
            )
        for (name, a), (_, b) in zip(
            plain.model.named_buffers(), fused.model.named_buffers(), strict=True
        ):
            np.testing.assert_allclose(b.get(), a.get(), rtol=1e-5, atol=1e-5, err_msg=name)

    @pytest.mark.parametrize(
        "update",
        [
            {"reg": 1e-3},
            {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "warm_up": 3},
            {"reg": 1e-3, "penalty": "bipolar", "lr_scale": "binarynet"},
        ],
        ids=["adam, l1", "adamw, schedule", "bipolar, scaled"],
    )
    def test_the_update(self, settings, update):
        plain, fused = self.pair(**{**settings, **update})
        expected, got = plain.make_step(0), fused.make_step(0)
        np.testing.assert_allclose(float(got.loss), float(expected.loss), rtol=1e-5)
        for (name, p), q in zip(
            plain.model.named_parameters(), fused.model.parameters(), strict=True
        ):
            # Adam's first step has the size of the learning rate, whatever the gradient's: only its
            # sign counts, and where that is lost in rounding weights differ.
            change = abs(p.data - q.data).get()
            assert (change > 0.02 * plain.config.lr).mean() < 0.02 or name.endswith("beta"), name
        assert fused.optimizer.steps == 1

    def test_the_trace(self, settings):
        plain, fused = self.pair(**settings)
        expected = [float(plain.make_step(s).loss) for s in range(8)]
        got = [float(fused.make_step(s).loss) for s in range(8)]
        np.testing.assert_allclose(got, expected, rtol=0.15)

    def test_the_graph_changes_nothing(self, settings):
        settings = {**settings, "max_steps": 60, "reg": 1e-4}
        with_graph, a = run(**settings)
        without, b = run(**settings, graph=False)
        assert with_graph._step._graph is not None, with_graph.notices
        assert without._step._graph is None
        assert a == b
        state = arrays(without)
        for name, array in arrays(with_graph).items():
            np.testing.assert_array_equal(array, state[name], err_msg=name)

    def test_the_same_run_twice(self, settings):
        settings = {**settings, "max_steps": 30}
        _, a = run(**settings)
        _, b = run(**settings)
        assert a == b

    @pytest.mark.parametrize("dtype", ["tf32", "bfloat16"])
    def test_rounded_products_learn_alike(self, settings, dtype):
        _, exact = run(**settings, max_steps=40)
        _, rounded = run(**settings, max_steps=40, dtype=dtype)
        assert np.isfinite(rounded).all()
        # What is left of the loss; of next to nothing, a fifth says nothing.
        left = 0.01 * exact[0]
        np.testing.assert_allclose(np.mean(rounded[20:]), np.mean(exact[20:]), rtol=0.2, atol=left)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [4500, 9000])
def test_xnor_and_dense_products_of_signs_train_alike_with_many_rows(batch_size):
    settings = {"binary": True, "batch_norm": True, "dtype": "bfloat16", "max_steps": 10}
    settings |= {"batch_size": batch_size, "n_hidden": 64}
    a, with_xnor = run(**settings, xnor=True)
    b, with_matmul = run(**settings)
    assert with_xnor == with_matmul
    state = arrays(b)
    for name, array in arrays(a).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("reg", [0.0, 1e-4])
def test_xnor_and_dense_products_of_signs_train_alike(dtype, reg):
    settings = {"binary": True, "batch_norm": True, "dtype": dtype, "max_steps": 40, "reg": reg}
    a, with_xnor = run(**settings, xnor=True)
    b, with_matmul = run(**settings)
    assert with_xnor == with_matmul
    state = arrays(b)
    for name, array in arrays(a).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


@pytest.mark.gpu
def test_packed_weights_follow_the_latent_ones():
    import cupybnn

    made, _ = run(binary=True, xnor=True, batch_norm=True, max_steps=50, lr=0.05)
    for hidden in made._step.buffers.hidden[1:]:
        latent = getattr(made.model, f"fc{hidden.plan.number}").weight.data
        fresh = cupybnn.pack(latent, axis=-2)
        assert bool((hidden.packed_weight.words == fresh.words).all())
        assert bool((hidden.packed_weight.popcounts == fresh.popcounts).all())
        assert bool((hidden.weight == cupybnn.sign(latent)).all())


@pytest.mark.gpu
def test_latent_weights_stay_within_their_limit():
    made, _ = run(binary=True, xnor=True, batch_norm=True, max_steps=60, lr=0.3)
    weight = made.model.fc2.weight.data
    assert float(abs(weight).max()) == 1.0
    assert float(abs(made.model.fc1.weight.data).max()) > 1.0


@pytest.mark.gpu
def test_restored_run_equals_an_uninterrupted_one(tmp_path):
    settings = {"binary": True, "xnor": True, "batch_norm": True, "keep_prob": 0.5}
    whole, _ = run(**settings, max_steps=50)
    first, _ = run(**settings, max_steps=20, log_dir=str(tmp_path), eval_every_n=19)
    second, _ = run(**settings, max_steps=50, restore=str(first.run_folder))
    state = arrays(whole)
    for name, array in arrays(second).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


@pytest.mark.gpu
def test_a_learning_rate_that_is_set_meanwhile_counts():
    made = trainer(binary=True, xnor=True, batch_norm=True)
    for step in range(3):
        made.make_step(step)
    made.optimizer.set_lr(0.0)
    before = made.model.fc1.weight.data.copy()
    made.make_step(3)
    assert bool((made.model.fc1.weight.data == before).all())


@pytest.mark.gpu
def test_steps_that_cannot_be_captured_are_launched_and_it_is_said_once(monkeypatch):
    from cupybnn.training.fast import step as module

    def refuse(stream, launch):
        raise RuntimeError("a CUDA graph cannot be captured: not today")

    settings = {"binary": True, "xnor": True, "batch_norm": True, "max_steps": 10}
    _, expected = run(**settings)
    monkeypatch.setattr(module, "capture", refuse)
    made, losses = run(**settings)
    assert losses == expected
    assert made.notices == [
        "Steps are launched kernel by kernel, since a CUDA graph cannot be captured: not today."
    ]


@pytest.mark.gpu
def test_without_nvmath_steps_are_launched_and_it_is_said_once(monkeypatch):
    from cupybnn.backends.cuda import blas

    settings = {"binary": True, "xnor": True, "batch_norm": True, "max_steps": 10}
    _, expected = run(**settings)
    monkeypatch.setattr(blas, "capturable", lambda: False)
    made, losses = run(**settings)
    np.testing.assert_allclose(losses[:2], expected[:2], rtol=1e-5)
    assert [n for n in made.notices if "nvmath-python" in n] == made.notices
    assert len(made.notices) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_dense_products(precision, transpose_a, transpose_b):
    import cupy

    from cupybnn.backends.cuda import blas

    random = np.random.default_rng(0)
    # Small integers are exact in each type, and so are the sums.
    a = random.integers(-8, 9, (70, 130)).astype(np.float32)
    b = random.integers(-8, 9, (130, 50)).astype(np.float32)

    def operand(x):
        x = cupy.asarray(np.ascontiguousarray(x))
        if precision == "bfloat16":
            x = (x.view(np.uint32) >> 16).astype(np.uint16)
        return x

    out = cupy.empty((70, 50), np.float32)
    blas.Blas(precision).multiply(
        operand(a.T if transpose_a else a),
        operand(b.T if transpose_b else b),
        out,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        scale=0.5,
    )
    np.testing.assert_array_equal(out.get(), 0.5 * (a @ b))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (40, 1030), (130, 2048)])
def test_dropout_masks_are_the_plain_engines(shape):
    import cupy

    from cupybnn.backends.cuda import fused, fused_arguments
    from cupybnn.backends.random import chosen, random_words

    launcher = fused.Launcher(0, np.dtype(np.float32), *shape, 10)
    draw = fused_arguments.Draw(seed=2**63 - 5, offset=4, keep_prob=0.3)
    out = cupy.empty(fused_arguments.mask_shape(*shape), np.uint32)
    launcher.dropout_mask(cupy.asarray([3], np.int64), draw, shape, out)
    bits = np.unpackbits(out.get().view(np.uint8), axis=1, bitorder="little")
    expected = chosen(random_words(shape, draw.seed, 7, np), 0.3)
    np.testing.assert_array_equal(bits[:, : shape[1]].astype(bool), expected)
    assert not bits[:, shape[1] :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 5), (64, 1024), (257, 1100)])
@pytest.mark.parametrize("real", [np.float32, np.uint16])
def test_unpacked_rows(shape, real):
    import cupy

    import cupybnn
    from cupybnn.backends.cuda import fused

    x = cupy.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    out = cupy.empty(shape, real)
    fused.Launcher(0, np.dtype(real), *shape, 10).unpack_rows(cupybnn.pack(x), out)
    one, minus_one = (0x3F80, 0xBF80) if real is np.uint16 else (1, -1)
    np.testing.assert_array_equal(out.get(), np.where(x.get() >= 0, one, minus_one).astype(real))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 5), (64, 1024), (257, 1100), (1100, 257), (2080, 36)])
@pytest.mark.parametrize("real", [np.float32, np.uint16])
def test_unpacked_columns(shape, real):
    import cupy

    import cupybnn
    from cupybnn.backends.cuda import fused

    x = cupy.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    out = cupy.empty(shape, real)
    packed = cupybnn.pack(x, axis=-2)
    fused.Launcher(0, np.dtype(real), *shape, 10).unpack_columns(packed, out)
    one, minus_one = (0x3F80, 0xBF80) if real is np.uint16 else (1, -1)
    np.testing.assert_array_equal(out.get(), np.where(x.get() >= 0, one, minus_one).astype(real))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("xnor", [True, False])
@pytest.mark.parametrize("log_dir", [False, True])
def test_sparing_memory_changes_nothing(monkeypatch, tmp_path, dtype, xnor, log_dir):
    settings = {"binary": True, "batch_norm": True, "dtype": dtype, "xnor": xnor, "reg": 1e-4}
    settings |= {"max_steps": 30, "hidden_layers": 4, "n_hidden": 160}
    if log_dir:
        settings["log_dir"] = str(tmp_path)
    a, roomy = run(**settings)
    monkeypatch.setattr("cupybnn.training.fast.plan._ROOM", 0)
    b, spared = run(**settings)
    assert a._step.plan.roomy
    assert not b._step.plan.roomy
    assert b._step._graph is not None
    assert roomy == spared
    state = arrays(b)
    for name, array in arrays(a).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)
    if log_dir:
        for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
            np.testing.assert_array_equal(p.grad.get(), q.grad.get())


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [2, 10, 26])
def test_other_numbers_of_classes(classes):
    data = dataset(classes=classes)
    plain = trainer(data=data, batch_norm=True, fused=False)
    fused = trainer(data=data, batch_norm=True)
    expected, got = plain.make_step(0), fused.make_step(0)
    np.testing.assert_allclose(float(got.loss), float(expected.loss), rtol=1e-5)
    np.testing.assert_allclose(
        fused.model.fcout.weight.grad.get(), plain.model.fcout.weight.grad.get(), atol=1e-6
    )


def test_settings_of_the_step_are_plain_settings():
    config = TrainConfig(**SMALL, fused=False, graph=False)
    assert TrainConfig.from_json(config.to_json()) == config
    assert dataclasses.replace(config, dtype="tf32").storage_dtype == "float32"


def test_the_order_of_images_is_drawn_ahead_and_is_the_same():
    feed = object.__new__(Feed)  # without what it keeps on a device
    feed._order, feed.ring = BatchOrder(100, 8, seed=3, device=Device("cpu")), 7
    waited: list[int] = []
    feed._staging = [np.empty((feed.ring, 8), np.int32) for _ in range(2)]
    feed._copied = [
        SimpleNamespace(synchronize=lambda side=side: waited.append(side)) for side in range(2)
    ]
    feed._thread, feed._ahead = ThreadPoolExecutor(1), {}
    expected = BatchOrder(100, 8, seed=3, device=Device("cpu"))
    for first in (0, 7, 14, 70, 77, 7, 14):  # with two jumps, as after a restored checkpoint
        drawn = feed._drawn(first)
        assert any(drawn is staging for staging in feed._staging)
        for number, images in enumerate(drawn):
            np.testing.assert_array_equal(images, expected.indices(first + number))
        assert list(feed._ahead) == [first + feed.ring]
    feed._thread.shutdown()
    # Each array only once the device has read it: both in turn, and anew after a jump.
    assert waited == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]


@pytest.mark.gpu
def test_tables_on_the_device_follow_the_steps(monkeypatch):
    import cupy

    from cupybnn.training.fast import feed as module

    monkeypatch.setattr(module, "_STEPS", 3)
    order = BatchOrder(100, 8, seed=3, device=Device("cpu"))
    feed = Feed(order, optim.Adam([nn.Parameter(cupy.zeros(4, np.float32))]))
    assert feed.ring == 3
    for step in (*range(14), 30, 31, 4, *range(5, 9)):
        feed.prepare(step)
        assert int(feed.step[0]) == step
        images = feed.images[step % feed.ring].get()
        np.testing.assert_array_equal(images, order.indices(step))
        feed.step += 1  # as the update does
