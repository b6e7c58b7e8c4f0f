"""The fused step with rounded gradients: products of bit planes in the backward pass; on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from fast_networks import arrays, run, trainer

from cupybnn import nn, ops, pack
from cupybnn.backends.devices import Device
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.fast.supported import unsupported_reason
from cupybnn.training.step import PlainStep

ROUNDED = {"binary": True, "xnor": True, "batch_norm": True, "grad_bits": 4}


class TestPlan:
    """Without a GPU."""

    def reason(self, **settings) -> str | None:
        made = trainer(**{**ROUNDED, **settings, "device": "cpu"})
        return unsupported_reason(made.config, made.model, made.optimizer, 90)

    def test_hidden_binary_layers_have_planes(self):
        made = trainer(**ROUNDED, device="cpu")
        assert self.reason() is None
        plan = NetworkPlan.of(made.model, made.config)
        assert [layer.backward for layer in plan.hidden] == ["dense", "planes", "planes"]
        assert [layer.activation for layer in plan.hidden] == ["packed_sign"] * 2 + ["none"]

    def test_what_is_not_supported(self):
        assert "need packed products, as with xnor; fc2 has dense ones" in self.reason(xnor=False)
        assert "two passes through the network" in self.reason(vat=1.0)
        made = trainer(**ROUNDED, last=True, device="cpu")
        made.model.fcout.rounding = nn.GradientRounding(4)
        reason = unsupported_reason(made.config, made.model, made.optimizer, 90)
        assert reason == "the gradient of the last layer, fcout, is rounded"

    def test_the_last_layer_is_not_rounded(self):
        made = trainer(**ROUNDED, last=True, first=True, device="cpu")
        rounding = [
            name for name, m in made.model.named_modules() if type(m) is nn.GradientRounding
        ]
        assert rounding == ["fc2.rounding", "fc3.rounding"]
        assert self.reason(last=True, first=True) is None


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("batch", "count", "units"), [(96, 128, 70), (33, 45, 300), (1100, 2056, 1032), (8, 4, 5000)]
)
def test_gradients_are_those_of_the_plain_engine_bit_for_bit(bits, batch, count, units):
    import cupy

    from cupybnn.backends.cuda.fused_batch import Draw
    from cupybnn.training.fast.rounded import RoundedBackward

    rng = np.random.default_rng(0)
    x, w = (rng.choice([-1, 1], s).astype(np.float32) for s in ((batch, count), (count, units)))
    step = cupy.asarray([41])
    for real in ("float32", "uint16"):
        grads = cupy.empty((batch, count), real), cupy.empty((count, units), real)
        made = RoundedBackward(
            bits, pack(cupy.asarray(x)), pack(cupy.asarray(w), axis=-2), *grads, Device("cuda", 0)
        )
        for draw in (-41, 5):  # the second time over the first
            g = rng.normal(size=(batch, units)).astype(np.float32)
            if real == "uint16":  # bfloat16
                g = (g.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            given = cupy.asarray(g)
            if real == "uint16":
                given = (given.view(np.uint32) >> 16).astype(np.uint16)
            made.turn()
            made.measure(given)
            made.quantize(given, Draw(seed=77, offset=draw, keep_prob=1.0), step)
            made.input_gradient()
            made.weight_gradient()
            levels = ops.quantize_gradient(g, bits, 77, 41 + draw)
            rows, columns = (p.unpack(np.float64) for p in (levels.rows, levels.columns))
            wanted = (
                (rows @ w.T.astype(np.float64)).astype(np.float32) * levels.row_scale,
                (x.T.astype(np.float64) @ columns).astype(np.float32) * levels.column_scale,
            )
            for got, exact in zip(grads, wanted, strict=True):
                if real == "uint16":
                    exact = cupy.asnumpy(_rounded(cupy.asarray(exact)))
                np.testing.assert_array_equal(got.get(), exact)


def _rounded(x):
    from cupybnn.training.fast.hidden import rounded

    return rounded(x)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize(
    ("batch", "count", "units"), [(96, 128, 72), (1100, 2056, 1032), (8, 8, 5000), (300, 16, 8)]
)
def test_hopper_s_kernel_stores_the_same_gradient(bits, batch, count, units):
    import cupy

    from cupybnn.backends.cuda import sign_gemm
    from cupybnn.backends.cuda.fused_batch import Draw
    from cupybnn.training.fast.rounded import RoundedBackward

    if sign_gemm.unsupported_layer(0, "bfloat16", count, units) is not None:
        pytest.skip("not a Hopper GPU")
    rng = np.random.default_rng(0)
    x, w = (rng.choice([-1, 1], s).astype(np.float32) for s in ((batch, count), (count, units)))
    g = cupy.asarray(rng.normal(size=(batch, units)).astype(np.float32)).view(np.uint32)
    g = (g >> 16).astype(np.uint16)
    found = []
    for stored in (cupy.empty((count, units), np.uint16), None):
        out = cupy.full((batch, count), 0x7FC1, np.uint16)
        inputs, weight = pack(cupy.asarray(x)), pack(cupy.asarray(w), axis=-2)
        made = RoundedBackward(
            bits, inputs, weight, out, stored, Device("cuda", 0), hopper=stored is None
        )
        made.turn()
        made.measure(g)
        made.quantize(g, Draw(seed=7, offset=5, keep_prob=1.0), None)
        made.input_gradient()
        found.append(out)
    cupy.testing.assert_array_equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize(
    "settings",
    [{"reg": 1e-4}, {"n_hidden": (264, 72, 1040), "batch_size": 520, "lr": 0.03},
     {"penalty": "bipolar", "reg": 1e-4, "n_hidden": 2048, "batch_size": 2304, "adversarial": 0.1}],
    ids=["even", "different widths", "more tiles than multiprocessors, adversarial"],
)  # fmt: skip
def test_updates_by_products_are_those_of_a_launch_of_their_own(bits, settings, monkeypatch):
    from cupybnn.backends.cuda import plane_gemm, sign_gemm

    settings = {**ROUNDED, "grad_bits": bits, "dtype": "bfloat16", "max_steps": 12, **settings}
    found = []
    for pays in (True, False):
        monkeypatch.setattr(plane_gemm, "pays", lambda *shape, pays=pays: pays)
        made, losses = run(**settings)
        how = "fused_planes" if pays else "planes"
        if sign_gemm.unsupported_layer(0, "bfloat16", 8, 8) is not None:
            pytest.skip("not a Hopper GPU")
        assert [layer.backward for layer in made._step.plan.hidden][1:] == [how] * 2
        found.append((losses, arrays(made)))
    (a, state), (b, other) = found
    np.testing.assert_allclose(a, b, rtol=1e-5)  # penalties are added up in another order
    for name, array in state.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("settings", "whole"),
    [({"n_hidden": 256, "batch_size": 512}, True), ({"n_hidden": 45, "batch_size": 33}, False),
     ({"n_hidden": (192, 72, 130), "keep_prob": 0.5, "batch_size": 300}, False),
     ({"last": True, "adversarial": 0.1, "batch_norm": False}, False)],
    ids=["whole strips", "odd sizes", "different widths, dropout", "adversarial, no batch norm"],
)  # fmt: skip
def test_greatest_magnitudes_by_the_kernels_that_write_a_gradient(
    dtype, settings, whole, monkeypatch
):
    from cupybnn.training.fast.gradients import ProductGradients

    monkeypatch.setattr("cupybnn.backends.cuda.fused_walk._MOST_ROUNDS", 0)
    if whole:
        monkeypatch.setattr("cupybnn.backends.cuda.fused_walk.multiprocessors", lambda device: 1)
    settings = {**ROUNDED, "dtype": dtype, "max_steps": 8, **settings}
    found = []
    for by_writers in (True, False):
        if not by_writers:
            monkeypatch.setattr(ProductGradients, "greatest", lambda self, i: None)
        made, losses = run(**settings)
        # The kernel of a head whose strips are not whole does all in one launch.
        measured = made._step.passes.gradients.measured
        assert measured == {0: False, 1: by_writers, 2: by_writers and whole}
        found.append((losses, arrays(made)))
    (a, state), (b, other) = found
    assert a == b
    for name, array in state.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.gpu
class TestStep:
    @pytest.mark.parametrize("bits", [1, 4, 8])
    @pytest.mark.parametrize(
        "settings",
        [{}, {"n_hidden": 45, "batch_size": 33}, {"n_hidden": (192, 72, 130), "keep_prob": 0.5},
         {"first": True, "last": True, "adversarial": 0.1}],
        ids=["even", "odd sizes", "different widths, dropout", "all binary, adversarial"],
    )  # fmt: skip
    def test_against_the_plain_step(self, bits, settings):
        settings = {**ROUNDED, **settings, "grad_bits": bits}
        # What is almost 0 may get the other sign, an activation or the gradient by which a pixel is
        # moved, and then much differs. That is rare.
        alike = [self.alike({**settings, "seed": seed}) for seed in range(3)]
        assert sum(alike) >= 2, alike

    def alike(self, settings):
        """Whether gradients differ only where an element may be rounded the other way."""
        plain, fused = trainer(**settings, fused=False), trainer(**settings, graph=False)
        expected, got = plain.make_step(0), fused.make_step(0)
        assert isinstance(plain._step, PlainStep)
        assert not isinstance(fused._step, PlainStep)
        np.testing.assert_allclose(float(got.loss), float(expected.loss), rtol=1e-5)
        for name, state in plain.model.state_dict().items():
            if name.endswith("random_state"):
                np.testing.assert_array_equal(fused.model.state_dict()[name], state)
        found = True
        for (name, p), q in zip(
            plain.model.named_parameters(), fused.model.parameters(), strict=True
        ):
            a, b = p.grad.get(), q.grad.get()
            scale = max(abs(a).max(), abs(plain.model.fcout.weight.grad).max().item())
            found &= bool((abs(a - b) > 2e-5 * scale).mean() < 0.05)
            found &= bool(np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.999 or name.endswith("beta"))
        return found

    @pytest.mark.parametrize("bits", [1, 4])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_graph_changes_nothing_and_runs_repeat(self, bits, dtype):
        settings = {**ROUNDED, "grad_bits": bits, "max_steps": 40, "reg": 1e-4, "dtype": dtype}
        with_graph, a = run(**settings)
        without, b = run(**settings, graph=False)
        again, c = run(**settings)
        assert with_graph._step._graph is not None, with_graph.notices
        assert a == b == c
        state = arrays(without)
        for other in (with_graph, again):
            for name, array in arrays(other).items():
                np.testing.assert_array_equal(array, state[name], err_msg=name)

    def test_layers_that_share_memory(self):
        # More than 32 MB of activations: no dense copies, one stream.
        settings = {**ROUNDED, "n_hidden": 2048, "batch_size": 4500, "max_steps": 4}
        _, a = run(**settings)
        made, b = run(**settings, graph=False)
        assert not made._step.plan.keep_dense_copies
        assert a == b

    def test_restored_run_equals_an_uninterrupted_one(self, tmp_path):
        whole, _ = run(**ROUNDED, max_steps=30)
        first, _ = run(**ROUNDED, max_steps=15, log_dir=str(tmp_path), eval_every_n=14)
        second, _ = run(**ROUNDED, max_steps=30, restore=str(first.run_folder))
        state = arrays(whole)
        for name, array in arrays(second).items():
            np.testing.assert_array_equal(array, state[name], err_msg=name)

    def test_it_learns_about_as_well(self):
        settings = {**ROUNDED, "max_steps": 60}
        _, exact = run(**{**settings, "grad_bits": 0})
        for bits in (2, 4, 8):
            _, rounded = run(**{**settings, "grad_bits": bits})
            np.testing.assert_allclose(np.mean(rounded[30:]), np.mean(exact[30:]), rtol=0.5)
