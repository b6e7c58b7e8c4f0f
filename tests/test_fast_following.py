"""What is changed between steps: the fused step takes it up, as the plain one does."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fast_networks import SMALL, arrays, dataset, trainer

from cupybnn import nn, optim
from cupybnn.training import Callback, TrainConfig, Trainer
from cupybnn.training.fast.following import Edits, Wiring
from cupybnn.training.fast.step import FusedStep
from cupybnn.training.step import PlainStep


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(96, 64, rng=0),
        nn.Dropout(0.5, rng=3),
        nn.BatchNorm(64),
        nn.Sign(),
        nn.BinaryLinear(64, 48, rng=1),
        nn.BatchNorm(48),
        nn.Linear(48, 10, rng=2),
    )


def set_item(p: nn.Parameter) -> None:
    p.data[0, 0] = -p.data[0, 0]


EDITS = {
    "by item": set_item,
    "by data += ": lambda p: setattr(p, "data", np.add(p.data, 0.5, out=p.data)),
    "by write": lambda p: p.write().fill(0.5),
    "by a view": lambda p: p.data.T[1].fill(0.25),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edit_refreshes_the_copies_once(edit):
    layer = nn.BinaryLinear(4, 3, rng=0)
    refreshed: list[int] = []
    hidden = SimpleNamespace(
        copied=False,
        packed_weight=object(),
        plan=SimpleNamespace(linear=layer),
        refresh=lambda: refreshed.append(1),
    )
    edits = Edits([hidden])
    edits.refresh_copies()
    assert refreshed == []
    layer.weight.data.sum()  # reading is no edit
    edits.refresh_copies()
    assert refreshed == []
    edit(layer.weight)
    edits.refresh_copies()
    edits.mark_current()
    edits.refresh_copies()
    assert refreshed == [1]


def replace_layer(model, optimizer):
    setattr(model, "4", nn.BinaryLinear(64, 48, rng=9))


CHANGES = {
    "weights": lambda m, o: setattr(m[4].weight, "data", np.zeros((64, 48), np.float32)),
    "statistics": lambda m, o: setattr(m[2], "mean", np.zeros(64, np.float32)),
    "eps": lambda m, o: setattr(m[2], "eps", 1e-3),
    "dropout": lambda m, o: setattr(m[1], "keep_prob", 0.9),
    "pseudo-gradient": lambda m, o: setattr(m[3], "quantizer", nn.Sign("identity").quantizer),
    "product": lambda m, o: setattr(m[4], "xnor", False),
    "frozen": lambda m, o: setattr(m[0].weight, "requires_grad", False),
    "limit": lambda m, o: setattr(m[4].weight, "limit", None),
    "layer": replace_layer,
    "one more layer": lambda m, o: setattr(m, "7", nn.ReLU()),
    "means": lambda m, o: o._slots.clear(),
    "groups": lambda m, o: setattr(o, "groups", list(o.groups)),
    "parameters": lambda m, o: o.groups[0]["params"].pop(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_replacing_a_part_makes_a_step_stale(change):
    model = small()
    optimizer = optim.Adam(model.parameters())
    wiring = Wiring(model, optimizer)
    model.eval()
    model.train()
    model[1].random.next()
    model.load_state_dict(model.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.set_lr(0.5)
    assert not wiring.changed()
    change(model, optimizer)
    assert wiring.changed()


def test_a_timed_step_does_not_bring_back_a_graph_of_old_options(monkeypatch):
    """Without a GPU: what a step launches is a stand-in."""
    launched: list[str] = []
    step = object.__new__(FusedStep)
    step._team = step.exchange = step._compared = None
    step._quantizers = []
    nothing = SimpleNamespace(
        refresh_copies=lambda: None, mark_current=lambda: None, prepare=lambda number: None
    )
    step._edits = step.feed = nothing
    step._dropouts, step._offsets, step._parameters = [], (), []
    step._optimizer = SimpleNamespace(steps=0)
    step.passes = SimpleNamespace(
        launch=lambda fork, draws: launched.append("kernels"), shared=SimpleNamespace()
    )
    step.buffers = SimpleNamespace(kept_grads={}, loss=np.zeros(1), logits=None, labels=None)
    step._warm = step._capture = True
    step._bypass_graph = False

    def graph(name):
        return SimpleNamespace(launch=lambda: launched.append(name))

    step._graph = graph("old graph")
    monkeypatch.setattr(step, "_update_options", lambda: None)
    monkeypatch.setattr(step, "_capture_graph", lambda: graph("new graph"))
    step(0)
    monkeypatch.setattr(step, "_update_options", lambda: setattr(step, "_graph", None))
    pytest.importorskip("cupy")
    assert step.spans(1) == {}
    monkeypatch.setattr(step, "_update_options", lambda: None)
    step(2)
    assert launched == ["old graph", "kernels", "new graph"]


# On a GPU ----------------------------------------------------------------------------------


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, do) -> None:
        self.step, self.do = step, do

    def on_step(self, trainer, step, output):
        if step == self.step:
            self.do(trainer)


def new_start(made: Trainer) -> None:
    other = trainer(binary=True, xnor=True, batch_norm=True, seed=5)
    made.model.load_state_dict(other.model.state_dict())


def flip(made: Trainer) -> None:
    made.model.fc2.weight.data[...] *= -1


def option(**options):
    return lambda made: made.optimizer.groups[0].update(options)


def thaw(made: Trainer) -> None:
    made.model.bn2.eps = 1e-2


ON_GPU = {
    "a new start": new_start,
    "flipped in place": flip,
    "new array": lambda made: setattr(made.model.fc2.weight, "data", -made.model.fc2.weight.data),
    "betas": option(betas=(0.5, 0.9)),
    "weight decay": option(weight_decay=0.5),
    "rates of layers": option(lr_scale=lambda p: 3.0 if p.bits == 1 else 0.1),
    "eps of a norm": thaw,
}


@pytest.mark.gpu
@pytest.mark.parametrize("change", ON_GPU.values(), ids=ON_GPU.keys())
def test_changes_between_steps_act_as_on_plain_steps(change):
    settings = {"binary": True, "xnor": True, "batch_norm": True, "optimizer": "adamw"}
    settings |= {"max_steps": 6, "eval_every_n": 100}
    plain = trainer([At(2, change)], **settings, fused=False)
    fused = trainer([At(2, change)], **settings)
    untouched = trainer(**settings)
    for made in (plain, fused, untouched):
        made.run()
    assert not isinstance(fused._step, PlainStep)
    expected, got = arrays(plain), arrays(fused)
    distance = {n: abs(got[n] - expected[n]).mean() for n in got if n.endswith("weight")}
    effect = {n: abs(arrays(untouched)[n] - expected[n]).mean() for n in distance}
    for name, off in distance.items():
        if name.endswith("fc2.weight"):
            assert off < 0.35 * effect[name], name
    for hidden in fused._step.buffers.hidden:
        if hidden.packed_weight is not None:
            kept = hidden.packed_weight.words.copy()
            hidden.refresh()
            assert bool((hidden.packed_weight.words == kept).all())


@pytest.mark.gpu
def test_custom_chains_are_trained_by_the_kernels():
    def mixed() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(96, 64, rng=0),
            nn.BatchNorm(64),
            nn.Sign(),
            nn.BinaryLinear(64, 200, rng=1),
            nn.BatchNorm(200),
            nn.ReLU(),
            nn.Linear(200, 33, rng=2),
            nn.BatchNorm(33),
            nn.ReLU(),
            nn.Dropout(0.5, rng=3),
            nn.Linear(33, 10, rng=4),
        )

    def binary() -> nn.Sequential:
        return nn.Sequential(
            nn.Dropout(0.5, rng=7),
            nn.Linear(96, 300, rng=0),
            nn.BatchNorm(300),
            nn.Sign(),
            nn.BinaryLinear(300, 45, rng=1),
            nn.BatchNorm(45),
            nn.Sign(),
            nn.BinaryLinear(45, 128, rng=2),
            nn.BatchNorm(128),
            nn.Sign(),
            nn.BinaryLinear(128, 10, rng=3),
            nn.BatchNorm(10),
        )

    for make in (mixed, binary):
        losses = []
        for fused in (False, True):
            config = TrainConfig(
                reg=0.0, batch_size=64, device="cuda", fused=fused, dtype="float32"
            )
            made = Trainer(config, model=make(), data=dataset())
            losses.append([float(made.make_step(step).loss) for step in range(8)])
            assert isinstance(made._step, PlainStep) != fused
        np.testing.assert_allclose(losses[1][:2], losses[0][:2], rtol=1e-4)
        np.testing.assert_allclose(losses[1], losses[0], rtol=0.15)


@pytest.mark.gpu
def test_layers_of_different_width_share_memory(monkeypatch):
    def run(spared: bool):
        widths = (160, 96, 264, 40)
        layers: list[nn.Module] = []
        for i, (inputs, units) in enumerate(zip((96, *widths), widths, strict=False)):
            linear = nn.BinaryLinear if i else nn.Linear
            layers += [linear(inputs, units, rng=i), nn.BatchNorm(units)]
            layers += [nn.Sign()] if i < 3 else []
        model = nn.Sequential(*layers, nn.Linear(40, 10, rng=9))
        if spared:
            monkeypatch.setattr("cupybnn.training.fast.plan._DENSE_COPY_BYTES", 0)
        config = TrainConfig(**{**SMALL, "dtype": "bfloat16", "device": "cuda", "n_hidden": 512})
        made = Trainer(config, model=model, data=dataset())
        losses = [float(made.make_step(step).loss) for step in range(30)]
        assert made._step.plan.keep_dense_copies != spared
        return losses

    assert run(spared=False) == run(spared=True)


def test_trainer_reports_why_it_does_not_fuse_and_rejects_other_models():
    heard: list[str] = []

    class Ear(Callback):
        def on_notice(self, trainer, sentence):
            heard.append(sentence)

    config = TrainConfig(reg=0.0, max_steps=3, device="cpu", batch_size=16)
    Trainer(config, [Ear()], model=small(), data=dataset()).run()
    assert heard == []  # without a GPU plain steps are what one expects
    with pytest.raises(TypeError, match=r"'model' must be an nn\.Module; got list"):
        Trainer(config, model=[], data=dataset())
    with pytest.raises(ValueError, match="must have trainable parameters"):
        Trainer(config, model=nn.ReLU(), data=dataset())
    with pytest.raises(ValueError, match=r"defaults; got n_hidden, binary"):
        Trainer(TrainConfig(n_hidden=8, binary=True), model=small(), data=dataset())
