"""The same steps in PyTorch, with DistributedDataParallel. Imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cupybnn import settings
from cupybnn.backends.devices import Device
from cupybnn.benchmark.scaling.steps import time_steps
from cupybnn.benchmark.training.peer import Network, Stepper
from cupybnn.benchmark.training.record import random_images
from cupybnn.parallel import Alone, Ranks

__all__ = ["connected", "measure"]


@contextlib.contextmanager
def connected(ranks: Ranks, device: Device) -> Iterator[None]:
    """Context in which PyTorch's ranks are connected."""
    gpu = device.kind == "cuda"
    if gpu:
        torch.cuda.set_device(device.index)
        torch.set_float32_matmul_precision("high")
    if ranks.size > 1:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            init_method=f"file://{settings.rendezvous()}/torch",
            rank=ranks.rank,
            world_size=ranks.size,
        )
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def measure(ranks: Ranks, task: dict[str, Any], device: Device) -> dict[str, Any]:
    """Time steps of the network on all ranks, and on one with as many images as each has."""
    gpu = device.kind == "cuda"
    where = torch.device(f"cuda:{device.index}" if gpu else "cpu")
    wait = torch.cuda.synchronize if gpu else lambda: None
    stepper = _stepper(ranks, task, where)
    row: dict[str, Any] = {"step": time_steps(stepper, wait, ranks, task["seconds"])}
    row["how"] = "compiled" if gpu else "eager"
    row["state_bytes"] = sum(3 * w.numel() * w.element_size() for w in stepper.network.latent)
    row["alone"], row["alone_how"] = row["step"]["median"], row["how"]
    if ranks.size > 1:
        del stepper
        alone = _stepper(Alone(), {**task, "batch": task["batch"] // ranks.size}, where)
        row["alone"] = time_steps(alone, wait, Alone(), task["seconds"])["median"]
    return row


def _stepper(ranks: Ranks, task: dict[str, Any], where: Any) -> Stepper:
    data = random_images(task["images"])
    dtype = torch.bfloat16 if task["precision"] == "bfloat16" else torch.float32
    torch.manual_seed(ranks.rank)
    network = Network(
        torch.from_numpy(data.train_images).to(where),
        torch.from_numpy(data.train_labels.astype("int64")).to(where),
        task["hidden"],
        data.classes,
        dtype,
    )
    gpu = where.type == "cuda"
    stepper = Stepper(network, task["batch"] // ranks.size)
    forward: Any = network
    if ranks.size > 1:
        # The images are buffers: sending them in every step, as by default, would be unfair.
        forward = DistributedDataParallel(
            network,
            device_ids=[where.index] if gpu else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        if dtype == torch.bfloat16:
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            forward.register_comm_hook(None, default_hooks.bf16_compress_hook)
    if gpu:
        torch._dynamo.reset()  # each network is compiled anew, as if it were the first
    stepper._forward = torch.compile(forward, dynamic=False) if gpu else forward
    return stepper
