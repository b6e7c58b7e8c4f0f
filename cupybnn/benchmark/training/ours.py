"""Our own steps: fused and captured, fused, and operation by operation."""

from __future__ import annotations

import itertools

from cupybnn.backends.devices import Device
from cupybnn.benchmark.methods import Unsupported
from cupybnn.benchmark.training.variants import Memory, Running, Size, Variant
from cupybnn.data import Dataset
from cupybnn.training import TrainConfig, Trainer

__all__ = ["ROUNDED", "config_for", "variants"]

PRODUCTS = ("matmul", "xnor")
#: Products of runs with rounded gradients, and their bits. They learn something else, so that they
#: are not compared as the others are.
ROUNDED = {"4 planes": 4, "1 plane": 1}


def variants(device: Device, quick: bool) -> list[Variant]:
    """Return this library's variants for a kind of device."""
    if device.kind == "cpu":
        return [Variant("cupybnn", "plain", p, "float32", _make) for p in PRODUCTS]
    precisions = ("bfloat16",) if quick else ("float32", "tf32", "bfloat16")
    ways = [("fused + graph", p) for p in precisions]
    ways += [("fused", "bfloat16"), ("plain", "float32")]
    found = [
        Variant("cupybnn", how, product, precision, _make)
        for how, precision in ways
        for product in PRODUCTS
    ]
    rounded = [Variant("cupybnn", "fused + graph", p, "bfloat16", _make) for p in ROUNDED]
    return found + rounded


def config_for(variant: Variant, size: Size, device: Device) -> TrainConfig:
    """Return the `Trainer` settings for a variant of this library."""
    return TrainConfig(
        n_hidden=size.hidden,
        batch_size=size.batch,
        binary=True,
        xnor=variant.product != "matmul",
        grad_bits=ROUNDED.get(variant.product, 0),
        batch_norm=True,
        reg=0.0,
        dtype=variant.precision,
        fused=variant.how.startswith("fused"),
        graph=variant.how.endswith("graph"),
        max_steps=1 << 40,
        device=str(device),
    )


def _make(variant: Variant, size: Size, device: Device, data: Dataset, memory: Memory) -> Running:
    pool = None if device.kind == "cpu" else device.xp.get_default_memory_pool()
    used_before = 0 if pool is None else pool.total_bytes()  # by the clock, for example
    trainer = Trainer(config_for(variant, size, device), data=data)
    numbers = itertools.count()
    outputs = [trainer.make_step(next(numbers))]
    memory.update()

    def step() -> None:
        outputs[0] = trainer.make_step(next(numbers))

    running = Running(step, lambda: float(outputs[0].loss))
    if pool is None:
        return running
    running.pool = lambda: pool.total_bytes() - used_before
    if trainer.config.fused:
        from cupybnn.training.fast import FusedStep

        fused = trainer._step
        if not isinstance(fused, FusedStep):
            raise Unsupported(_unfused_reason(trainer))
        if trainer.config.graph:
            step()  # captures the graph, or adds a notice
            if trainer.notices:
                raise Unsupported(trainer.notices[-1])
            running.kernels = lambda: fused.spans(next(numbers))
    return running


def _unfused_reason(trainer: Trainer) -> str:
    """Return why a trainer does not use the fused step."""
    from cupybnn.backends.cuda.compiler import architecture
    from cupybnn.training.fast import unsupported_reason

    capability = architecture(trainer.device.index)
    reason = unsupported_reason(trainer.config, trainer.model, trainer.optimizer, capability)
    return f"no fused step: {reason}"
