"""The fused step of several ranks, with kernels by NumPy; and with two ranks on one GPU."""

from __future__ import annotations

import warnings
import zlib

import numpy as np
import pytest
from kernels_by_numpy import Emulator
from ranks import together
from test_parallel_training import COMMON, run_together, train

from cupybnn.deploy import PackedNetwork
from cupybnn.training import Callback, TrainConfig, Trainer, restored_config
from cupybnn.training.fast import FusedStep
from cupybnn.training.step import PlainStep

XNOR = {"binary": True, "xnor": True}
NETWORKS = {
    "xnor": {**XNOR, "max_steps": 7},
    "dropout, penalty": {**XNOR, "keep_prob": 0.5, "input_keep_prob": 0.8, "reg": 1e-4},
    "all binary": {
        **XNOR, "first": True, "last": True, "loss": "squared_hinge", "lr_scale": "binarynet",
    },
    "clipped, without batch norm": {
        **XNOR, "last": True, "ste": "clipped_grad", "batch_norm": False, "penalty": "bipolar",
        "reg": 1e-4,
    },
    "full precision": {
        "batch_norm": True, "keep_prob": 0.8, "optimizer": "adamw", "weight_decay": 0.01,
    },
    "mixed, against the network": {
        **XNOR, "mix": "some", "adversarial": 0.02, "augment_shift": 1.0, "augment_rotation": 10.0,
    },
    "rounded": {**XNOR, "grad_bits": 4, "adversarial": 0.02, "keep_prob": 0.5},
    "virtual": {**XNOR, "vat": 0.5, "input_keep_prob": 0.8, "mix": "uniform"},
}  # fmt: skip
FUSED = {"debug": False, "graph": False, "eval_every_n": 3, "max_steps": 5}


def settings_of(name: str, **more) -> dict:
    return {**FUSED, **NETWORKS[name], **more}


@pytest.mark.parametrize("name", ["dropout, penalty", "all binary", "virtual", "rounded"])
def test_kernels_by_numpy_compute_the_plain_step(monkeypatch, name):
    emulator = Emulator(monkeypatch)
    plain = train(**settings_of(name), fused=False)
    assert not emulator.launches
    np.testing.assert_allclose(train(**settings_of(name))[0], plain[0], rtol=1e-4)
    assert emulator.launches


@pytest.mark.parametrize(
    ("name", "size", "sync"),
    [
        ("xnor", 2, True),
        ("dropout, penalty", 3, True),
        ("all binary", 3, False),
        ("clipped, without batch norm", 3, False),
        ("full precision", 2, True),
        ("mixed, against the network", 3, True),
        ("virtual", 2, True),
        ("rounded", 3, True),
        ("rounded", 2, False),
    ],
)
def test_ranks_compute_the_plain_step(monkeypatch, tmp_path, name, size, sync):
    settings = settings_of(name, sync_batch_norm=sync)
    emulator = Emulator(monkeypatch)
    plain = run_together(tmp_path, size, **settings, fused=False)[0]
    assert not emulator.launches
    first, *others = run_together(tmp_path, size, **settings)
    assert "place_signs" in emulator.launches or name == "full precision"
    np.testing.assert_allclose(first[0], plain[0], rtol=1e-4)
    if sync:
        np.testing.assert_allclose(first[0], train(**settings)[0], rtol=1e-4)
    for other in others:  # all have the same weights
        for key, array in first[2].arrays.items():
            assert array.tobytes() == other[2].arrays[key].tobytes(), key


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_by_bits(monkeypatch, tmp_path, size):
    """Two ways to the same gradients in bfloat16; on one rank, neither stores them."""
    settings = settings_of("xnor", dtype="bfloat16", sync_batch_norm=True)

    def losses(by_bits):
        with monkeypatch.context() as patch:
            emulator = Emulator(patch, by_bits)
            run = run_together(tmp_path, size, **settings)[0] if size > 1 else train(**settings)
            assert ("weight_gradient" in emulator.launches) == (by_bits and size > 1)
        return run[0]

    np.testing.assert_allclose(losses(True), losses(False), rtol=2e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_rounded_gradients_by_the_kernels_of_hopper(monkeypatch, tmp_path, size):
    """One rank's update follows its product; several store the product, and exchange it."""
    settings = settings_of("rounded", dtype="bfloat16", sync_batch_norm=True)

    def losses(by_bits):
        with monkeypatch.context() as patch:
            emulator = Emulator(patch, by_bits)
            run = run_together(tmp_path, size, **settings)[0] if size > 1 else train(**settings)
            assert ("plane_update" in emulator.launches) == (by_bits and size == 1)
            assert ("stored_product" in emulator.launches) == by_bits
        return run[0]

    np.testing.assert_allclose(losses(True), losses(False), rtol=2e-3)


class Watch(Callback):
    """Looks at what a rank has after each step."""

    on_every_rank = True

    def __init__(self):
        self.sums, self.equal, self.steps = [], [], set()

    def on_step(self, trainer, step, output):
        assert type(trainer._step) is FusedStep
        self.steps.add(id(trainer._step))
        sums = []
        for hidden in trainer._step.buffers.hidden:
            parameter = hidden.plan.linear.weight
            if hidden.packed_weight is None:
                sums.append(zlib.crc32(host(parameter.data).tobytes()))
                continue
            sums.append(zlib.crc32(host(hidden.packed_weight.words).tobytes()))
            sums.append(zlib.crc32(host(hidden.packed_weight.popcounts).tobytes()))
            signs = parameter.data  # follow when they are read
            self.equal.append(set(np.unique(host(signs))) == {-1.0, 1.0})
            self.equal.append(
                (host(self.pack(signs).words) == host(hidden.packed_weight.words)).all()
            )
        self.sums.append(sums)

    def pack(self, signs):
        from cupybnn.training.fast import hidden

        return hidden.pack(signs, axis=-2)


def host(array):
    return np.asarray(array.get() if hasattr(array, "get") else array)


def signs_are_the_same_on_all_ranks(folder, size, ranks_of, **settings):
    def run(ranks):
        watch = Watch()
        Trainer(TrainConfig(**{**COMMON, **settings}), [watch], ranks=ranks_of(ranks)).run()
        return watch

    found = together(folder, size, run)
    assert not any(isinstance(watch, Exception) for watch in found), found
    first, *others = found
    assert len(first.sums) == settings["max_steps"]
    assert all(other.sums == first.sums for other in others)
    assert all(all(watch.equal) for watch in (first, *others))
    assert len(first.steps) == 1  # kept over evaluations, where weights are whole
    assert len({str(sums) for sums in first.sums}) > 3  # they change


def test_packed_signs_are_the_same_on_all_ranks(monkeypatch, tmp_path):
    Emulator(monkeypatch)
    signs_are_the_same_on_all_ranks(
        tmp_path, 3, lambda ranks: ranks, **settings_of("xnor", lr=0.01)
    )


def a_checkpoint_continues(folder, ranks_of, **more):
    """Continue a run of two ranks on one, and the other way."""
    settings = {**settings_of("xnor", sync_batch_norm=True, max_steps=9), "eval_every_n": 4, **more}

    def go(size, **options):
        def run(ranks):
            trainer = Trainer(options["config"], ranks=ranks_of(ranks))
            trainer.run()
            return trainer.state()

        states = together(folder, size, run) if size > 1 else [run(None)]
        assert not any(isinstance(state, Exception) for state in states), states
        return states[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = TrainConfig(**{**COMMON, **settings})
        whole = go(1, config=config)
        for size, then in ((2, 1), (1, 2), (2, 2)):
            log = folder / f"log-{size}-{then}"
            half = TrainConfig(**{**COMMON, **settings, "max_steps": 5, "log_dir": str(log)})
            go(size, config=half)
            (newest,) = log.rglob("newest.npz")
            rest = restored_config(str(newest), max_steps=9, log_dir=None)
            state = go(then, config=rest)
            for name, array in whole.arrays.items():
                np.testing.assert_allclose(
                    state.arrays[name], array, rtol=2e-3, atol=2e-3, err_msg=name
                )


def test_a_checkpoint_continues_on_any_number_of_ranks(monkeypatch, tmp_path):
    Emulator(monkeypatch)
    a_checkpoint_continues(tmp_path, lambda ranks: ranks)


def test_ranks_learn_from_teachers(monkeypatch, tmp_path):
    teacher = str(tmp_path / "teacher.npz")
    PackedNetwork.from_model(train(binary=True, max_steps=20)[1].model).save(teacher)
    settings = settings_of("xnor", sync_batch_norm=True, teacher=(teacher,), mix="uniform")
    Emulator(monkeypatch)
    run = run_together(tmp_path, 2, **settings)[0]
    np.testing.assert_allclose(run[0], train(**settings)[0], rtol=1e-4)


def test_one_rank_that_is_asked_to_stop_stops_all(monkeypatch, tmp_path):
    class Stop(Callback):
        on_every_rank = True

        def on_step(self, trainer, step, output):
            if step == 2 and trainer.ranks.rank == 1:
                trainer.request_stop()

    def run(ranks):
        config = TrainConfig(**{**COMMON, **settings_of("xnor", max_steps=9)})
        return Trainer(config, [Stop()], ranks=ranks).run()

    Emulator(monkeypatch)
    assert [(r.stopped, r.steps) for r in together(tmp_path, 2, run)] == [(True, 4)] * 2


def test_edits_between_steps_take_effect(monkeypatch, tmp_path):
    class Edit(Callback):
        on_every_rank = True

        def on_evaluate(self, trainer, evaluation):  # weights are whole
            trainer.model.fc2.weight.data[...] *= -1
            trainer.model.fc1.weight.data[...] *= 0.5

    def losses(ranks=None, **more):
        found = []

        class Losses(Callback):
            def on_step(self, trainer, step, output):
                found.append(float(output.loss))

        config = TrainConfig(**{**COMMON, **settings_of("xnor", sync_batch_norm=True), **more})
        Trainer(config, [Edit(), Losses()], ranks=ranks).run()
        return found

    Emulator(monkeypatch)
    edited, _ = together(tmp_path, 2, losses)
    np.testing.assert_allclose(edited, losses(fused=False), rtol=1e-4)


@pytest.mark.gpu
class TestOnOneGpu:
    """Two ranks that have one GPU between them; their exchanges go through files."""

    @staticmethod
    def staged(ranks):
        from cupybnn.backends.devices import resolve
        from cupybnn.parallel.staged import StagedRanks

        return None if ranks is None else StagedRanks(ranks, resolve("cuda"))

    def losses(self, folder, size, kind=FusedStep, **settings):
        """Return each rank's losses and the state of the run."""

        class Losses(Callback):
            on_every_rank = True

            def __init__(self):
                self.losses = []

            def on_step(self, trainer, step, output):
                assert type(trainer._step) is kind
                self.losses.append(float(output.loss))

        def run(ranks):
            found = Losses()
            config = TrainConfig(**{**COMMON, **settings, "device": "cuda"})
            trainer = Trainer(config, [found], ranks=self.staged(ranks))
            trainer.run()
            return found.losses, trainer.state()

        runs = together(folder, size, run) if size > 1 else [run(None)]
        assert not any(isinstance(each, Exception) for each in runs), runs
        return runs

    @pytest.mark.parametrize("sync", [False, True])
    @pytest.mark.parametrize("name", NETWORKS)
    def test_the_plain_step(self, tmp_path, name, sync):
        sync = sync and NETWORKS[name].get("batch_norm", True)
        settings = settings_of(name, sync_batch_norm=sync)
        plain = self.losses(tmp_path, 2, PlainStep, **settings, fused=False)
        first, second = self.losses(tmp_path, 2, **settings)
        np.testing.assert_allclose(first[0], plain[0][0], rtol=1e-3)
        assert first[0] == second[0]
        for key, array in first[1].arrays.items():
            assert array.tobytes() == second[1].arrays[key].tobytes(), key
        if sync:
            np.testing.assert_allclose(
                first[0], self.losses(tmp_path, 1, **settings)[0][0], rtol=1e-3
            )

    def test_packed_signs_are_the_same_on_all_ranks(self, tmp_path):
        settings = settings_of("xnor", lr=0.01, device="cuda")
        signs_are_the_same_on_all_ranks(tmp_path, 2, self.staged, **settings)

    def test_a_checkpoint_continues_on_any_number_of_ranks(self, tmp_path):
        a_checkpoint_continues(tmp_path, self.staged, device="cuda")

    def test_gradients_by_bits(self, monkeypatch, tmp_path):
        from cupybnn.backends.cuda import sign_gemm

        settings = settings_of("xnor", dtype="bfloat16", n_hidden=1056, batch_size=1200)
        used = []
        launch = sign_gemm.weight_gradient
        monkeypatch.setattr(
            sign_gemm, "weight_gradient", lambda *given: (used.append(1), launch(*given))
        )
        monkeypatch.setattr(sign_gemm, "pays", lambda *given: True)
        by_bits = self.losses(tmp_path, 2, **settings)
        if sign_gemm.unsupported_reason(0, "bfloat16", 1056, 1056) is None:
            assert used
        monkeypatch.setattr(sign_gemm, "pays", lambda *given: False)
        dense = self.losses(tmp_path, 2, **settings)
        np.testing.assert_allclose(by_bits[0][0], dense[0][0], rtol=1e-2)

    @pytest.mark.parametrize("name", ["xnor", "all binary", "dropout, penalty"])
    def test_exchanges_by_nccl_in_a_graph(self, name):
        """One rank with itself, whose step is replayed as a graph with all exchanges in it."""
        from cupybnn.backends.devices import resolve
        from cupybnn.parallel.nccl import NcclRanks, new_id

        settings = {**settings_of(name, max_steps=12), "graph": True, "device": "cuda"}
        config = TrainConfig(**{**COMMON, **settings})

        def steps(ranks):
            trainer = Trainer(config, ranks=ranks)
            if ranks is not None:
                trainer._team = trainer._join(None)
            losses = [float(trainer.make_step(step).loss) for step in range(12)]
            assert trainer._step._graph is not None, trainer.notices
            return losses, trainer

        alone, _ = steps(None)
        with NcclRanks(resolve("cuda"), 0, 1, new_id(), None) as ranks:
            found, trainer = steps(ranks)
            assert trainer._step._captured >= 5
            trainer._team.gather()
            trainer._team.finish()
        np.testing.assert_allclose(found, alone, rtol=1e-3)
