"""The training loop. It prints nothing; callbacks report its progress."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn import nn
from cupybnn.autograd import debug
from cupybnn.backends.devices import resolve
from cupybnn.data import BatchOrder, Dataset, DeviceData
from cupybnn.errors import CheckpointError, NonFiniteError, SettingError
from cupybnn.files import remove_leftovers
from cupybnn.parallel import Alone, Ranks
from cupybnn.training import checkpoint as checkpoints
from cupybnn.training import state
from cupybnn.training.best import best_before
from cupybnn.training.config import TrainConfig
from cupybnn.training.evaluation import Averaging, evaluate, right_answers
from cupybnn.training.limits import check_memory
from cupybnn.training.network import build_network
from cupybnn.training.records import Callback, Evaluation, TrainResult, closing
from cupybnn.training.restore import check_settings
from cupybnn.training.runs import new_run_folder
from cupybnn.training.saved import DataDescription
from cupybnn.training.setup import (
    check_data,
    check_images,
    check_model,
    check_ranks,
    choose_step,
    find_dataset,
    find_neighbors,
    in_turn,
)
from cupybnn.training.step import Objective, Step, StepOutput, make_optimizer
from cupybnn.training.teachers import Teachers
from cupybnn.training.team import Team
from cupybnn.training.timing import StepTimer

__all__ = ["Trainer"]

#: Tiny probabilities and gradients become 0, even if the caller makes NumPy raise on underflow.
_UNDERFLOW_IS_ZERO: dict[str, Any] = {"under": "ignore"}


class Trainer:
    """One run: data, model, optimizer and the loop over steps.

    Parameters
    ----------
    config : TrainConfig, optional
        By default ``TrainConfig()``; with a `model`, ``TrainConfig(reg=0)``.
    callbacks : iterable of Callback, optional
        Called in this order; a run with a log directory adds its own.
    model : Module, optional
        Trained instead of the network that `config` describes, and moved to the device. Any module
        that maps inputs of shape (batch, features) to logits of shape (batch, classes). On a GPU
        the fused kernels train a chain of layers (`cupybnn.nn.Sequential`) that they support; other
        models are trained operation by operation, and a notice gives the reason.
    data : Dataset, optional
        Instead of the one that `config` names; `Dataset.from_arrays` makes one from any arrays.
    ranks : Ranks, optional
        From `cupybnn.parallel.connect`: the processes that train together. Each makes the same
        Trainer and calls the same methods. Rank 0 alone has a log directory, and callbacks other
        than those with `on_every_rank`. Binary weights hold signs in ``on_step``, and latent
        weights in the other methods of callbacks.

    Examples
    --------
    >>> from cupybnn import TrainConfig, Trainer, nn
    >>> from cupybnn.data import load
    >>> model = nn.Sequential(
    ...     nn.Linear(64, 128, rng=0), nn.BatchNorm(128), nn.Sign(),
    ...     nn.BinaryLinear(128, 64, rng=1), nn.BatchNorm(64), nn.Sign(),
    ...     nn.BinaryLinear(64, 10, rng=2), nn.BatchNorm(10),
    ... )
    >>> config = TrainConfig(max_steps=200, reg=0, device="cpu")
    >>> trainer = Trainer(config, model=model, data=load("digits"))
    >>> trainer.run().final_accuracy > 0.8
    True

    Attributes
    ----------
    config : TrainConfig
    device : Device
    dataset : Dataset
    model : Module
    optimizer : Optimizer
    objective : Objective
    data : DeviceData
    teachers : Teachers or None
        The networks whose predictions are learned.
    step : int
        Updates made, including those of earlier runs that were restored.
    run_folder : Path or None
        Made when `run` starts, if there is a log directory and a step left to run.
    history : list of Evaluation
    timer : StepTimer
    ranks : Ranks
        One, unless they are given.

    Raises
    ------
    DataError, DeviceError, CheckpointError
        As for `train`.
    ValueError
        If the data set has no test part, unless `config` asks for no evaluations
        (``eval_every_n=0``) and no log; or is to be augmented but has no images; or has too few
        examples for `neighbors` (a SettingError).
    """

    def __init__(
        self,
        config: TrainConfig | None = None,
        callbacks: Iterable[Callback] = (),
        *,
        model: nn.Module | None = None,
        data: Dataset | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if config is None:
            config = TrainConfig() if model is None else TrainConfig(reg=0.0)
        if not isinstance(config, TrainConfig):
            raise TypeError(
                f"The 'config' must be a TrainConfig; got {type(config).__name__}. Convert a dict "
                f"of settings with TrainConfig.from_mapping."
            )
        if model is not None:
            check_model(model, config)
        self.config = config
        self._given_model = model is not None
        self.ranks = Alone() if ranks is None else ranks
        self._team: Team | None = None
        self.callbacks = [
            c for c in callbacks if self.ranks.rank == 0 or getattr(c, "on_every_rank", False)
        ]
        self._alone = False  # whether this rank runs a callback that others do not
        self.notices: list[str] = []
        self.run_folder: Path | None = None
        self.history: list[Evaluation] = []
        self.step = 0
        self._stop = self._started = False
        check_ranks(config, self.ranks)
        self.device = resolve(config.device if self.ranks.size == 1 else self.ranks.device)
        stored = checkpoints.load_run(config.restore) if config.restore is not None else None
        if config.restore is not None and stored is not None:
            remove_leftovers(checkpoints.find(config.restore).parent)
            for sentence in check_settings(config, stored):
                self.notice(sentence)
        dataset = in_turn(self.ranks, lambda: find_dataset(config, data, stored, self.notice))
        check_images(config, dataset)
        self.dataset = dataset
        with self.device.scope():
            self.teachers = in_turn(self.ranks, lambda: Teachers.open(config, dataset, self.device))
            self._build(model)
            if stored is not None:
                self._restore(stored)
            if self.ranks.size > 1:
                self._team = self._join(stored)

    def _join(self, stored: checkpoints.Checkpoint | None) -> Team:
        """Check that all ranks do the same, and give them the weights of rank 0."""
        same: dict[str, Any] = {"data": self._description.sha256, "step": self.step}
        if stored is not None:
            same["checkpoint"] = state.checksum(stored.arrays)
        if self.teachers is not None:  # a rank may have copies of its own
            same["teachers"] = [state.checksum(arrays) for arrays in self.teachers.arrays()]
        free = ("data_dir", "device", "log_dir", "restore", "teacher")
        settings = {n: v for n, v in asdict(self.config).items() if n not in free}
        self.ranks.agree("have the same options, data and checkpoint", {**settings, **same})
        team = Team(
            self.ranks, self.model, self.optimizer, self.objective, self.config, lambda: self._stop
        )
        team.begin()
        return team

    def _gather(self) -> None:
        """Make the weights whole; all ranks come here at the same time."""
        if self._team is None:
            return
        if self._alone and not self._team.is_whole:
            raise SettingError(
                f"Trainer.evaluate, state and averaged must be called on all ranks after a step, "
                f"and on_step of a callback runs on rank 0 alone; got {self.ranks.size} ranks. Set "
                f"on_every_rank = True in the callback's class, or call them in on_evaluate."
            )
        self._team.gather()

    def _build(self, model: nn.Module | None) -> None:
        config = self.config
        if model is None:
            check_memory(config, self.dataset.features, self.dataset.classes, self.device)
            model = build_network(config, self.dataset.features, self.dataset.classes)
        self.model = model.to(self.device)
        dtype = next((p.dtype for p in model.parameters()), config.storage_dtype)
        self.data = DeviceData(self.dataset, self.device, dtype)
        self.order = BatchOrder(
            len(self.dataset.train_labels),
            config.batch_size,
            config.seed,
            self.device,
            self.dataset.train_weights,
            config.shuffle,
        )
        self.objective = Objective(self.model, config)
        self.optimizer = make_optimizer(self.model, config)
        self._averaging = Averaging(self.model, self.data, self.order, config)
        self.timer = StepTimer(self.device, config.batch_size)
        self._step: Step | None = None  # chosen at the first step, after weights are restored

    # State -------------------------------------------------------------------------------------

    def state(self) -> checkpoints.Checkpoint:
        """Return everything needed to continue from here: training weights, also in `averaged`."""
        self._gather()
        with self.device.scope(), self._averaging.suspended():
            arrays = state.gather(self.model, self.optimizer, self._averaging)
        if self._averaging.exists:  # `load_model` has no images to compute these from
            with self.averaged():
                arrays |= state.averaged_statistics(self.model)
        info = {
            "config": asdict(self.config.with_absolute_paths()),
            "dataset": self.dataset.name,
            "data": self._description.to_dict(),
            "given_model": self._given_model,
            "history": [evaluation.to_dict() for evaluation in self.history],
        }
        return checkpoints.Checkpoint(self.step, arrays, info)

    @cached_property
    def _description(self) -> DataDescription:
        return DataDescription.of(self.dataset)

    def _evaluated_model(self) -> nn.Module:
        """Return the model that is evaluated; a copy if its weights are averages."""
        model = self.model
        self._gather()
        if self._averaging.exists:
            with self.averaged():
                state = self.model.state_dict()
            model = copy.deepcopy(model)
            model.load_state_dict(state)
        model.eval()
        # As `load_model` does: `PackedNetwork.from_model` wants to know how inputs are scaled.
        description = DataDescription.of(self.dataset, hashed=False)
        object.__setattr__(model, "trained_on", description)
        return model

    def _restore(self, stored: checkpoints.Checkpoint) -> None:
        check_data(self.dataset.name, stored)
        try:
            state.load(stored.arrays, self.model, self.optimizer, self._averaging)
            self.history = [Evaluation(**fields) for fields in stored.info["history"]]
        except (KeyError, TypeError, ValueError) as error:
            hint = ""
            if stored.info.get("given_model") and not self._given_model:
                hint = " Its run trained a model of its own: give Trainer the same one as 'model'."
            raise CheckpointError(
                f"The checkpoint {self.config.restore} does not fit the network: {error}{hint}"
            ) from error
        self.step = stored.step
        if sentence := DataDescription.stored(stored).difference(self._description):
            self.notice(sentence)

    # The loop ----------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Number of whole passes over the training examples so far."""
        return self.step * self.config.batch_size // self.order.images

    def request_stop(self) -> None:
        """Ask the run to stop after the current step; safe to call from a signal handler."""
        self._stop = True

    def notice(self, sentence: str) -> None:
        """Report `sentence` to the callbacks, and keep it for the result."""
        self.notices.append(sentence)
        self._mention(sentence)

    def _mention(self, sentence: str) -> None:
        """Report `sentence` to the callbacks; it does not concern the result."""
        for callback in self.callbacks:
            callback.on_notice(self, sentence)

    def run(self) -> TrainResult:
        """Train to ``max_steps`` or until asked to stop, and evaluate.

        Raises
        ------
        NonFiniteError
            With ``debug=True``; its attribute `step` is the step.
        """
        if self._started:
            raise RuntimeError("A Trainer runs once; restore its checkpoint in a new one instead.")
        self._started = True
        with self.device.scope(), np.errstate(**_UNDERFLOW_IS_ZERO), closing(self.callbacks):
            if self.step < self.config.max_steps or self._averaging.exists:
                with self.ranks.busy():
                    find_neighbors(self.config, self.data, self._mention)
            if self.config.log_dir is not None and self.step < self.config.max_steps:
                if self.ranks.rank == 0:
                    with self.ranks.busy():
                        self._open_log()
                if self.ranks.size > 1:
                    folder = self.ranks.gather_bytes(os.fsencode(self.run_folder or ""))[0]
                    self.run_folder = Path(os.fsdecode(folder))
            return self._run()

    def _open_log(self) -> None:
        """Make the run folder, and add the callbacks that write into it."""
        from cupybnn.training.logs import CheckpointWriter, TensorBoardWriter

        start = self.state()
        best = best_before(start, self.config.restore)
        self.run_folder = new_run_folder(self.config, lambda folder: best.save(folder, start))
        if best.checkpoint is None and self.history:
            self.notice(
                f"The best checkpoint so far (test accuracy {best.accuracy:.4f}) is not in the "
                f"folder of {self.config.restore}; {checkpoints.BEST} will be written to "
                f"{self.run_folder} only if this run exceeds it."
            )
        # Checkpoints first: an error in a log must not cost one.
        self.callbacks[:0] = [CheckpointWriter(self.run_folder, best.accuracy)]
        self.callbacks.append(TensorBoardWriter(self.run_folder))

    def _run(self) -> TrainResult:
        output: StepOutput | None = None
        self._call("on_start")
        while self.step < self.config.max_steps and not self._must_stop():
            step = self.step
            self.timer.start()
            output = self._checked_step(step)
            self.timer.stop()
            if self._averaging.wants(step):
                self._gather()
            self._averaging.update(step)
            self.step = step + 1
            self._call("on_step", step, output)
            if self.config.eval_every_n and step % self.config.eval_every_n == 0:
                evaluation = self._evaluation(output)
                self.history.append(evaluation)
                self._call("on_evaluate", evaluation)
        result = TrainResult(
            config=self.config,
            dataset=self.dataset.name,
            fallback_reason=self.dataset.fallback_reason,
            steps=self.step,
            history=tuple(self.history),
            final=self._evaluation(output),
            average_examples_per_second=self.timer.average(),
            median_examples_per_second=self.timer.median(),
            run_folder=self.run_folder,
            stopped=self.step < self.config.max_steps,
            notices=tuple(self.notices),
            model=self._evaluated_model(),
        )
        self._call("on_end", result)
        if self._team is not None:
            self.ranks.barrier()  # a rank that leaves earlier would count as lost
        return result

    def _must_stop(self) -> bool:
        """Whether to stop before the next step; all ranks stop before the same one."""
        return self._stop if self._team is None else self._team.stop

    def _call(self, method: str, *arguments: Any) -> None:
        """Call a method of every callback, while the other ranks wait."""
        with self.ranks.busy():
            for callback in self.callbacks:
                with self._calling(callback):
                    getattr(callback, method)(self, *arguments)

    @contextlib.contextmanager
    def _calling(self, callback: Callback) -> Iterator[None]:
        """Context in which a callback runs, on this rank alone or on all."""
        self._alone = self._team is not None and not getattr(callback, "on_every_rank", False)
        try:
            yield
        finally:
            self._alone = False

    def make_step(self, step: int) -> StepOutput:
        """Perform training step number `step`, with the fused kernels if they support it.

        Raises
        ------
        RuntimeError
            Within `averaged`, because the training weights will be restored at its end.
        """
        if self._averaging.is_applied:
            raise RuntimeError(
                "A training step must be outside of Trainer.averaged(): at its end the averaged "
                "weights are discarded and the training weights restored. Leave that context first."
            )
        with self.device.scope():
            stale = self._step is not None and self._step.stale()
            if self._team is not None and (stale or self._team.is_whole):
                if stale:
                    self._team.gather()  # another kind of step may follow
                self._team.share_out()
                stale = self._step is not None and self._step.stale()
            if self._step is not None and not stale:
                return self._step(step)
            with self.ranks.busy():  # others may have compiled the kernels before
                self._step = choose_step(
                    self.model, self.objective, self.optimizer, self.data, self.order, self.config,
                    self.notice, self.teachers, self._team,
                )  # fmt: skip
                self._step.prepare(self._evaluate_dry, self._mention)
                return self._step(step)  # compiles the rest

    def _evaluate_dry(self) -> None:
        """Launch what `evaluate` launches; one of several ranks does so by itself."""
        if self._team is None:
            self.evaluate()
        else:
            evaluate(self.model, self.objective, self.data, Alone())

    def _checked_step(self, step: int) -> StepOutput:
        if not self.config.debug:
            return self.make_step(step)
        try:
            # NumPy would only warn; the check also reports where.
            with debug.check_finite(), np.errstate(all="ignore"):
                return self.make_step(step)
        except NonFiniteError as error:
            error.step = step
            raise

    def _evaluation(self, output: StepOutput | None) -> Evaluation:
        self._gather()
        test_loss, test_accuracy = self.evaluate()
        train_loss = train_accuracy = float("nan")
        if output is not None:
            train_loss = float(output.loss)
            right, count = right_answers(output.logits, output.labels), len(output.labels)
            if self._team is not None:
                right, count = self.ranks.sums([right, count])
            train_accuracy = float(right / count)
        return Evaluation(
            step=self.step - 1,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            examples_per_second=self.timer.interval(),
        )

    def evaluate(self) -> tuple[float, float]:
        """Return loss (with penalty) and accuracy on the test set, with averaged weights if any."""
        with self.averaged(), np.errstate(**_UNDERFLOW_IS_ZERO):
            # The weights are whole, so one rank can do it by itself.
            ranks = Alone() if self._alone else self.ranks
            return evaluate(self.model, self.objective, self.data, ranks)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which `model` has the averaged weights, if any: to fold or save it, say.

        At its end the training weights are restored, and changes to the model are lost. It may be
        nested; `evaluate` and `state` may be called within, `make_step` may not.
        """
        self._gather()
        with self.device.scope(), self._averaging.applied():
            yield
