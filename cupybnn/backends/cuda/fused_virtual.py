"""Launches for images that are moved or mixed within a training step, and for its teachers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cupybnn.backends.cuda.fused import THREADS, Launcher
from cupybnn.backends.cuda.fused_batch import ALL_KEPT, Draw
from cupybnn.backends.cuda.structs import Kernel, Struct

__all__ = ["MixImages", "MoveImages", "Soften", "TeacherLayer"]

# As in the kernels.
_DIRECTIONS = {"none": 0, "gradient": 1, "random": 2}
_KINDS = {"affine": 0, "relu": 1, "sign": 2}

MOVE = Struct(
    "Move",
    "ptr x, gradient, step, out, pops; i64 rows, cols, pop_count, first; u64 seed, drop_seed;"
    "i64 draw, last; double distance",
)
MIX = Struct(
    "Mix",
    "ptr x, step, labels, out, targets; i64 rows, cols, classes, sources, first; u64 seed;i64 some",
)
MOVE_IMAGES = Kernel("smxx_virtual", "move_images", "Move p", MOVE)
MIX_IMAGES = Kernel("smxx_virtual", "mix_images", "Mix p", MIX)
TEACHER_LAYER = Kernel("smxx_teacher", "teacher_layer", "ptr z, a, b; i64 rows, cols; ptr out")
SOFTEN = Kernel(
    "smxx_teacher", "soften", "ptr logits; i64 rows; float temperature, share; int add; ptr out"
)


@dataclass(frozen=True, kw_only=True)
class MoveImages:
    """Move each image of a batch along a direction of its own, and drop pixels."""

    x: Any  # (batch, pixels), a dense operand
    out: Any  # likewise; may be `x`
    step: Any  # int64, (1,): the step number, on the device
    direction: (
        str  # "gradient" (of dropped pixels it is 0), "random", or "none" to drop pixels only
    )
    distance: float = 0.0  # the Euclidean length of each move
    gradient: Any = None  # (batch, pixels), for "gradient"
    seed: int = 0  # for "random"
    drop: Draw | None = None
    pops: Any = None  # int32: set to 0
    first: int = 0  # place of the first row in the whole batch, of which it may be a part

    def launch(self, launcher: Launcher) -> None:
        """Launch on the current stream."""
        rows, cols = self.x.shape
        draw = (self.drop or ALL_KEPT).fields()
        packed = MOVE.pack(
            x=self.x, gradient=self.gradient, step=self.step, out=self.out, pops=self.pops,
            rows=rows, cols=cols, pop_count=0 if self.pops is None else self.pops.size,
            first=self.first,
            seed=self.seed, drop_seed=draw["seed"], draw=draw["draw"], last=draw["last"],
            distance=self.distance,
        )  # fmt: skip
        defines = (
            ("DIRECTION", _DIRECTIONS[self.direction]),
            ("DROP", int(self.drop is not None)),
        )
        launcher.launch(MOVE_IMAGES, {"p": packed}, grid=(rows,), defines=defines)


@dataclass(frozen=True, kw_only=True)
class MixImages:
    """Mix the images of a batch in pairs, and their labels; see `cupybnn.data.Mixing`."""

    # (batch, pixels), a dense operand; of a part of a batch with the image after its last.
    x: Any
    out: Any  # (batch, pixels), likewise, other memory
    step: Any  # int64, (1,)
    labels: Any  # int64, one for each row of `x`
    targets: Any  # float32, (batch, classes): receives the labels' shares; or None
    seed: int
    kind: str  # "some" or "uniform"
    first: int = 0  # place of the first row in the whole batch

    def launch(self, launcher: Launcher) -> None:
        """Launch on the current stream."""
        rows, cols = self.out.shape
        packed = MIX.pack(
            x=self.x, step=self.step, labels=self.labels, out=self.out, targets=self.targets,
            rows=rows, cols=cols, classes=0 if self.targets is None else self.targets.shape[1],
            sources=self.x.shape[0], first=self.first, seed=self.seed, some=self.kind == "some",
        )  # fmt: skip
        defines = (("DIRECTION", 0), ("DROP", 0))
        launcher.launch(MIX_IMAGES, {"p": packed}, grid=(rows,), defines=defines)


@dataclass(frozen=True, kw_only=True)
class TeacherLayer:
    """What follows a product of a network that is not trained."""

    kind: str  # "affine", "relu" or "sign"
    z: Any  # float32, (batch, units): the product; receives the result without `out`
    a: Any  # float32, (units,): factors; thresholds for "sign"
    b: Any  # float32, (units,): summands; for "sign" what is there where the threshold is reached
    out: Any = None  # (batch, units), a dense operand

    def launch(self, launcher: Launcher) -> None:
        """Launch on the current stream."""
        rows, cols = self.z.shape
        launcher.launch(
            TEACHER_LAYER,
            {"z": self.z, "a": self.a, "b": self.b, "rows": rows, "cols": cols, "out": self.out},
            grid=launcher.flat_grid(rows * cols),
            defines=(("KIND", _KINDS[self.kind]), ("CLASSES", 2)),
        )


@dataclass(frozen=True, kw_only=True)
class Soften:
    """Compute ``share * softmax(logits / temperature)``, or add it to what is there."""

    logits: Any  # float32, (batch, classes)
    out: Any  # likewise
    temperature: float = 1.0
    share: float = 1.0
    add: bool = False

    def launch(self, launcher: Launcher) -> None:
        """Launch on the current stream."""
        rows, classes = self.logits.shape
        launcher.launch(
            SOFTEN,
            {
                "logits": self.logits, "rows": rows, "temperature": self.temperature,
                "share": self.share, "add": int(self.add), "out": self.out,
            },
            grid=(-(-rows // THREADS),),
            defines=(("KIND", 0), ("CLASSES", classes)),
        )  # fmt: skip
