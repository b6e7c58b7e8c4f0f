"""The fused step of several ranks, with kernels by NumPy; and with two ranks on one GPU."""

from __future__ import annotations

import threading
import time
import warnings
import zlib
from operator import attrgetter
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from kernels_by_numpy import Emulator
from ranks import together
from test_parallel_training import COMMON, run_together, train

from cupybnn.backends.cuda.compiler import is_dry_run
from cupybnn.deploy import PackedNetwork
from cupybnn.errors import NonFiniteError, RankError
from cupybnn.parallel.files import FileRanks
from cupybnn.training import Callback, TrainConfig, Trainer, agreement, restored_config
from cupybnn.training.fast import FusedStep
from cupybnn.training.fast.exchange import Exchange
from cupybnn.training.fast.passes import Passes
from cupybnn.training.fast.weights import Weights
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
        **XNOR, "mix": "some", "adversarial": 0.02, "augment_shift": 1.0, "augment_elastic": 1.0,
        "augment_flip": True,
    },
    "among neighbors": {**XNOR, "neighbor_noise": 0.5, "mix": "uniform", "last": True},
    "rounded": {**XNOR, "grad_bits": 4, "adversarial": 0.02, "keep_prob": 0.5},
    "virtual": {**XNOR, "vat": 0.5, "input_keep_prob": 0.8, "mix": "uniform"},
}  # fmt: skip
FUSED = {"debug": False, "graph": False, "eval_every_n": 3, "max_steps": 5}


def settings_of(name: str, **more) -> dict:
    return {**FUSED, **NETWORKS[name], **more}


@pytest.mark.parametrize(
    "name", ["dropout, penalty", "all binary", "among neighbors", "virtual", "rounded"]
)
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
        ("among neighbors", 3, True),
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


def losses_both_ways(monkeypatch, tmp_path, size, name, launched, parts=0):
    """Return the losses of Hopper's products by bits and of dense ones, after their launches agree.

    `launched` are the kernels that must be launched, by name, or must not, as a function of whether
    products are by bits; in `parts`, if any.
    """
    settings = settings_of(name, dtype="bfloat16", sync_batch_norm=True)
    found = []
    for by_bits in (True, False):
        with monkeypatch.context() as patch:
            emulator = Emulator(patch, by_bits, parts)
            run = run_together(tmp_path, size, **settings)[0] if size > 1 else train(**settings)
            for kernel, expected in launched(by_bits).items():
                assert (kernel in emulator.launches) == expected, kernel
        found.append(run[0])
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_by_bits(monkeypatch, tmp_path, size):
    """Two ways to the same gradients in bfloat16; on one rank, neither stores them."""
    by_bits, dense = losses_both_ways(
        monkeypatch, tmp_path, size, "xnor", lambda bits: {"weight_gradient": bits and size > 1}
    )
    np.testing.assert_allclose(by_bits, dense, rtol=2e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_by_bits_of_parts_of_a_batch(monkeypatch, tmp_path, size):
    """They are stored on one rank, too."""
    by_bits, dense = losses_both_ways(
        monkeypatch, tmp_path, size, "xnor",
        lambda bits: {"weight_gradient in 3 parts": bits, "weight_gradient": False}, parts=3,
    )  # fmt: skip
    np.testing.assert_allclose(by_bits, dense, rtol=2e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_rounded_gradients_by_the_kernels_of_hopper(monkeypatch, tmp_path, size):
    """One rank's update follows its product; several store the product, and exchange it."""
    by_bits, dense = losses_both_ways(
        monkeypatch, tmp_path, size, "rounded",
        lambda bits: {"plane_update": bits and size == 1, "stored_product": bits},
    )  # fmt: skip
    np.testing.assert_allclose(by_bits, dense, rtol=2e-3)


#: What makes a network large.
LARGE = {"batch": "plan._DENSE_COPY_BYTES", "weights": "exchange._READ_FROM"}


def reading(monkeypatch):
    """Let ranks in threads read each other's arrays; rank 1 is late with all that they do apart."""

    def shared_zeros(ranks, xp, parts):
        ends = np.cumsum([0, *(-(-n * np.dtype(kind).itemsize // 64) * 64 for n, kind in parts)])
        memory = xp.zeros(int(ends[-1]), np.uint8)
        start = memory.ctypes.data
        given = ranks.gather_bytes(start.to_bytes(8, "little"))
        ranks.far = tuple(int.from_bytes(each, "little") - start for each in given)
        return [
            memory[a:][: n * np.dtype(kind).itemsize].view(kind)
            for a, (n, kind) in zip(ends.tolist(), parts, strict=False)
        ]

    monkeypatch.setattr(FileRanks, "shared_zeros", shared_zeros)
    monkeypatch.setattr(FileRanks, "distances", lambda ranks, array: ranks.far)

    def late(call):
        def wait_and_call(part, *given):
            if part._buffers.exchange.ranks.rank == 1 and not is_dry_run():
                time.sleep(0.03)
            call(part, *given)

        return wait_and_call

    monkeypatch.setattr(Passes, "_backward", late(Passes._backward))
    monkeypatch.setattr(Weights, "update_shares", late(Weights.update_shares))


@pytest.mark.parametrize(
    ("name", "size", "large", "more"),
    [
        ("xnor", 2, "batch", {"dtype": "bfloat16"}),
        ("xnor", 3, "weights", {"log_dir": "log"}),  # gradients are recorded
        ("dropout, penalty", 3, "batch", {}),
        ("all binary", 3, "weights", {"dtype": "bfloat16"}),
        ("clipped, without batch norm", 2, "batch", {}),
        ("rounded", 2, "batch", {}),
        ("virtual", 2, "weights", {}),
        ("full precision", 2, "batch", {}),
    ],
)
def test_updates_that_read_gradients_compute_what_those_of_sums_do(
    monkeypatch, tmp_path, name, size, large, more
):
    """In large networks, which send nothing before the backward pass is done. Bit for bit."""
    monkeypatch.setattr(f"cupybnn.training.fast.{LARGE[large]}", 0)
    if "log_dir" in more:
        more = {"log_dir": str(tmp_path / "log")}
    found = []
    for reads in (False, True):
        with monkeypatch.context() as patch:
            emulator = Emulator(patch)
            if reads:
                reading(patch)
            found.append(run_together(tmp_path, size, **settings_of(name, **more)))
            shared_out = name != "full precision"
            assert ("adam_of_ranks" in emulator.launches) == (reads and shared_out)
    for by_sums, by_reading in zip(*found, strict=True):
        assert by_sums[0] == by_reading[0]
        for key, array in by_sums[2].arrays.items():
            assert array.tobytes() == by_reading[2].arrays[key].tobytes(), key


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


class Kind(Callback):
    """Remembers the kind of step of each rank, and what was reported on it."""

    on_every_rank = True

    def __init__(self):
        self.losses, self.kinds, self.said = [], set(), []

    def on_notice(self, trainer, sentence):
        self.said.append(sentence)

    def on_step(self, trainer, step, output):
        self.losses.append(float(output.loss))
        self.kinds.add(type(trainer._step))


def run_of_each_rank(folder, size, begins=lambda ranks: None, **settings):
    """Return what `Kind` found on each rank; `begins` is called with each first."""

    def run(ranks):
        begins(ranks)
        found = Kind()
        Trainer(TrainConfig(**{**COMMON, **settings}), [found], ranks=ranks).run()
        return found

    return together(folder, size, run)


def test_ranks_on_two_sides_of_a_limit_exchange_in_the_same_order(monkeypatch, tmp_path):
    Emulator(monkeypatch)
    settings = settings_of("xnor", sync_batch_norm=True)
    alone = train(**settings)[0]
    # Of 47 images, one rank has 23 and one 24.
    monkeypatch.setattr("cupybnn.training.fast.plan._DENSE_COPY_BYTES", 23 * 48 * 4)
    for found in run_of_each_rank(tmp_path, 2, **settings):
        np.testing.assert_allclose(found.losses, alone, rtol=1e-4)


def test_a_rank_without_the_fused_step_leaves_none_to_the_others(monkeypatch, tmp_path):
    emulator, here = Emulator(monkeypatch), threading.local()
    fused = emulator._unfused_reason

    def reason(*given):
        return "the images are too large" if here.rank == 1 else fused(*given)

    monkeypatch.setattr("cupybnn.training.setup._unfused_reason", reason)
    begins = lambda ranks: setattr(here, "rank", ranks.rank)  # noqa: E731
    for found in run_of_each_rank(tmp_path, 2, begins, **settings_of("xnor")):
        assert found.kinds == {PlainStep}
    assert not emulator.launches


@pytest.mark.parametrize("which", ["products", "capture", "none"])
def test_a_rank_without_a_graph_leaves_none_to_the_others(monkeypatch, tmp_path, which):
    """NCCL does not allow that one rank alone captures an exchange."""
    Emulator(monkeypatch)
    here, replays = threading.local(), []

    def capture(stream, launch):
        if which == "capture" and here.rank == 1:
            raise RuntimeError("a CUDA graph cannot be captured: out of memory")
        rank = here.rank
        return SimpleNamespace(launch=lambda: (replays.append(rank), launch()))

    monkeypatch.setattr("cupybnn.training.fast.step.capture", capture)
    monkeypatch.setattr(
        "cupybnn.backends.cuda.blas.capturable", lambda: which != "products" or here.rank != 1
    )
    monkeypatch.setattr(FileRanks, "capturable", True)
    monkeypatch.setattr(FileRanks, "replayed", lambda self, exchanges: None)
    settings = settings_of("xnor", graph=True, sync_batch_norm=True)
    begins = lambda ranks: setattr(here, "rank", ranks.rank)  # noqa: E731
    found = run_of_each_rank(tmp_path, 2, begins, **settings)
    assert found[0].losses == found[1].losses
    assert sorted(replays) == ([0] * 6 + [1] * 6 if which == "none" else [])
    said = [" ".join(each.said) for each in found]
    if which == "none":
        assert said == ["", ""]
    elif which == "products":
        assert "cannot be captured on another rank. To use one: pip install" in said[0]
        assert "cannot be captured. To use one: pip install" in said[1]
    else:
        assert "without a CUDA graph: another rank cannot capture one." in said[0]
        assert "cannot be captured: out of memory." in said[1]


class TestDebug:
    """The fused step of several ranks compares what they have after each step."""

    SETTINGS: ClassVar = settings_of("all binary", debug=True)

    def test_it_is_used(self, monkeypatch, tmp_path):
        compared, check = [], agreement.check_equal

        def check_equal(ranks, arrays):
            compared.append((ranks.rank, list(arrays)))
            check(ranks, arrays)

        monkeypatch.setattr("cupybnn.training.team.check_equal", check_equal)
        Emulator(monkeypatch)
        for found in run_of_each_rank(tmp_path, 2, **self.SETTINGS):
            assert found.kinds == {FusedStep}
        assert sorted(rank for rank, _ in compared) == [0] * 5 + [1] * 5
        names = compared[0][1]
        assert {"fc2.weight", "bn1.gamma", "packed signs of fc2", "popcounts of fc3"} <= set(names)

    @pytest.mark.parametrize("what", ["packed_weight.words", "packed_weight.popcounts", "weight"])
    def test_it_finds_signs_that_differ(self, monkeypatch, tmp_path, what):
        receive, steps = Exchange.receive_signs, []

        def wrong(exchange, hidden, launcher):
            receive(exchange, hidden, launcher)
            if exchange.ranks.rank == 1 and not is_dry_run():
                steps.append(1)
                if len(steps) == 3:
                    array = attrgetter(what)(hidden[1])
                    array.reshape(-1)[0] = 1 - array.reshape(-1)[0]

        monkeypatch.setattr(Exchange, "receive_signs", wrong)
        Emulator(monkeypatch)
        for error in run_of_each_rank(tmp_path, 2, **self.SETTINGS):
            assert isinstance(error, RankError)
            name = {"packed_weight.words": "packed signs of fc2", "weight": "copy of fc2.weight"}
            found = name.get(what, "popcounts of fc2")
            assert f"the {found} differs between rank 0 and rank 1" in str(error)
        assert len(steps) == 3

    def test_it_finds_a_loss_that_is_not_finite(self, monkeypatch, tmp_path):
        Emulator(monkeypatch)
        with np.errstate(all="ignore"):
            errors = run_of_each_rank(tmp_path, 2, **{**self.SETTINGS, "lr": 1e30})
        assert [type(error) for error in errors] == [NonFiniteError] * 2
        assert [error.report for error in errors] == [True, False]
        assert "the loss of a fused step" in str(errors[0])
        assert errors[0].step == errors[1].step > 0


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
        self.alike(first[0], plain[0][0], name)
        assert first[0] == second[0]
        for key, array in first[1].arrays.items():
            assert array.tobytes() == second[1].arrays[key].tobytes(), key
        if sync:
            self.alike(first[0], self.losses(tmp_path, 1, **settings)[0][0], name)

    @staticmethod
    def alike(losses, expected, name):
        np.testing.assert_allclose(losses[0], expected[0], rtol=1e-3)
        # An element of a gradient that differs in its last bit may be rounded the other way.
        np.testing.assert_allclose(losses, expected, rtol=0.1 if name == "rounded" else 1e-3)

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
        # Sums for batch norm are added up in another order, and signs soon differ.
        np.testing.assert_allclose(by_bits[0][0][:4], dense[0][0][:4], rtol=1e-2)

    @pytest.mark.parametrize("large", [None, *LARGE])
    @pytest.mark.parametrize("name", ["xnor", "all binary", "dropout, penalty", "rounded"])
    def test_exchanges_by_nccl_in_a_graph(self, monkeypatch, name, large):
        """One rank with itself, whose step is replayed as a graph with all exchanges in it.

        In a large network, updates read the gradients of all ranks.
        """
        if large:
            monkeypatch.setattr("cupybnn.training.fast.plan._DENSE_COPY_BYTES", 0)
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
            assert trainer._step._captured >= (2 if large else 5)
            assert bool(trainer._step.exchange.distances) == bool(large)
            trainer._team.gather()
            trainer._team.finish()
        self.alike(found, alone, name)
