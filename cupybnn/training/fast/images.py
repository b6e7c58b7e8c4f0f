"""The images of a fused step, as `TrainingImages` makes them, then moved; and what they teach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from cupybnn.backends.cuda.fused import Launcher
from cupybnn.backends.cuda.fused_batch import Attack, Deformation, Draw, Gather
from cupybnn.backends.cuda.fused_neighbors import MoveAmongNeighbors
from cupybnn.backends.cuda.fused_virtual import MixImages, MoveImages
from cupybnn.backends.cuda.graph import Fork
from cupybnn.data import Augmentation, DeviceData, NeighborNoise
from cupybnn.data.augmentation import bump_width, count_knots
from cupybnn.training.config import TrainConfig
from cupybnn.training.fast.buffers import Buffers
from cupybnn.training.fast.feed import Feed
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.fast.teaching import Teaching
from cupybnn.training.images import (
    DIRECTIONS,
    MIXING,
    NEIGHBOR_NOISE,
    augmentation_seed,
    stream_seed,
)

__all__ = ["Images", "deformation"]


def deformation(amounts: Augmentation, shape: tuple[int, int], seed: int) -> Deformation:
    """Return how the kernel deforms images of a shape, (height, width)."""
    bumps = tuple((bump_width(size), count_knots(size)) for size in shape)
    return Deformation(shape=shape, seed=seed, bumps=bumps, **asdict(amounts))


class Images:
    """Launches of kernels that make and move a step's images; allocates nothing.

    Parameters
    ----------
    plan, buffers, feed, data, config, teaching
        Those of `Passes`.
    """

    def __init__(
        self,
        plan: NetworkPlan,
        buffers: Buffers,
        feed: Feed,
        data: DeviceData,
        config: TrainConfig,
        teaching: Teaching | None,
    ) -> None:
        self._plan, self._buffers, self._feed, self._data = plan, buffers, feed, data
        self._teaching = teaching
        self._noise = NeighborNoise(config.neighbor_noise)
        self._noise_seed = stream_seed(config, NEIGHBOR_NOISE)
        # Kept: captured graphs read it.
        self._neighbors = data.nearest_neighbors(plan.neighbors) if plan.neighbors else None
        self._mixing_seed = stream_seed(config, MIXING)
        self._vat_seed = stream_seed(config, DIRECTIONS)
        self._deformation = None
        if plan.augment:
            assert data.image_shape is not None, "checked before: only images are augmented"
            self._deformation = deformation(
                plan.augment, data.image_shape, augmentation_seed(config)
            )

    def gather(
        self, launcher: Launcher, fork: Fork, pixel_draw: Draw | None, span: Callable[[str], Any]
    ) -> Any:
        """Make the batch's images and targets.

        Returns
        -------
        event or None
            After which the teachers' predictions are there; they run on the second stream, if any.
        """
        plan, buffers, feed = self._plan, self._buffers, self._feed
        direct = buffers.gathered is buffers.inputs
        images, labels = self._data.train_images, self._data.train_labels
        order = feed.images
        if plan.neighbors:
            with span("neighbors"):
                MoveAmongNeighbors(
                    images=images,
                    all_labels=labels,
                    order=order,
                    table=self._neighbors,
                    step=feed.step,
                    out=buffers.moved,
                    labels=buffers.moved_labels,
                    seed=self._noise_seed,
                    factor=self._noise.factor,
                    digits=self._noise.DIGITS,
                    brightest=self._data.brightest,
                    first=plan.first,
                    whole=plan.whole,
                ).launch(launcher)
            images, labels, order = buffers.moved, buffers.moved_labels, buffers.places
        with span("gather"):
            Gather(
                images=images,
                all_labels=labels,
                order=order,
                step=feed.step,
                x=buffers.gathered,
                labels=buffers.all_labels,
                drop=pixel_draw if direct else None,
                pops=buffers.pops,
                deformation=self._deformation,
                first=plan.first,
                whole=plan.whole,
            ).launch(launcher)
        if plan.mix != "none":
            with span("mix"):
                MixImages(
                    x=buffers.gathered,
                    out=buffers.undropped,
                    step=feed.step,
                    labels=buffers.all_labels,
                    targets=None if self._teaching else buffers.targets,
                    seed=self._mixing_seed,
                    kind=plan.mix,
                    first=plan.first,
                ).launch(launcher)
        taught = None
        if self._teaching is not None:
            with fork.aside(), span("teachers"):
                self._teaching.launch(launcher, buffers.undropped, buffers.targets)
            taught = fork.mark()
        if buffers.undropped is not buffers.inputs:
            with span("dropout"):
                MoveImages(
                    x=buffers.undropped,
                    out=buffers.inputs,
                    step=feed.step,
                    direction="none",
                    drop=pixel_draw,
                    first=plan.first,
                ).launch(launcher)
        return taught

    def attack(self, launcher: Launcher, pixel_draw: Draw | None) -> None:
        """Move the batch along the sign of the pixels' gradient."""
        buffers = self._buffers
        Attack(
            gradient=buffers.input_grad,
            step=self._feed.step,
            drop=pixel_draw,
            amount=self._plan.adversarial / float(self._data.pixel_scale),
            x=buffers.inputs,
            pops=buffers.pops,
            first=self._plan.first,
            whole=self._plan.whole,
        ).launch(launcher)

    def move(
        self, launcher: Launcher, direction: str, distance: float, pixel_draw: Draw | None
    ) -> None:
        """Make the second pass's images of the first's; see `MoveImages`.

        Parameters
        ----------
        launcher : Launcher
        direction : {"random", "gradient"}
        distance : float
            In pixels of brightness 1.
        pixel_draw : Draw or None
        """
        buffers, second = self._buffers, self._buffers.passes[1]
        MoveImages(
            x=buffers.inputs,
            out=second.inputs,
            step=self._feed.step,
            direction=direction,
            distance=distance / float(self._data.pixel_scale),
            gradient=buffers.input_grad,
            seed=self._vat_seed,
            drop=pixel_draw,
            pops=second.pops,
            first=self._plan.first,
        ).launch(launcher)
