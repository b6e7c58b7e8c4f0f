"""Joining the ranks that a launcher has started."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cupybnn
from cupybnn import settings
from cupybnn.backends.devices import Device, cuda_status, resolve
from cupybnn.errors import DeviceError, RankError, SettingError
from cupybnn.parallel.launch import Launch, detect
from cupybnn.parallel.locks import remove_abandoned, user_prefix
from cupybnn.parallel.meeting import Meeting
from cupybnn.parallel.ranks import Alone, Ranks
from cupybnn.parallel.starting import why_no_gpus
from cupybnn.paths import user_path

__all__ = ["connect"]

#: How long a rank may hang, by default, in seconds.
SECONDS = 30.0


def connect(
    device: str = "auto",
    folder: str | os.PathLike[str] | None = None,
    *,
    seconds: float = SECONDS,
    last_resort: Callable[[RankError], Any] | None = None,
) -> Ranks:
    """Join the ranks that torchrun, mpirun, srun or ``cupybnn train --gpus`` has started.

    Parameters
    ----------
    device : str
        "auto": a GPU for each rank if there are any, else the CPU; "cuda"; or "cpu". A rank's GPU
        becomes the current device of the thread.
    folder : path-like, optional
        A folder that all ranks see, needed where they are on several hosts; the environment
        variable ``CUPYBNN_RENDEZVOUS`` overrides it. By default, the host's folder for temporary
        files.
    seconds : float
        How long a rank may hang before the others give up; to start, ranks have ten times that.
    last_resort : callable, optional
        See `cupybnn.parallel.meeting.Meeting`.

    Returns
    -------
    Ranks
        On GPUs, connected by NCCL; on CPUs by MPI under mpirun, else by files in the folder. If
        there is no launcher, or it started a single process, a run of one rank. Close it, or use
        it as a context manager.

    Raises
    ------
    SettingError
        If the launcher's variables are inconsistent, mpi4py is missing or wrong, or the ranks run
        different versions of cupybnn.
    DeviceError
        If there is no GPU for this rank, or NCCL cannot be loaded.
    RankError
        If a rank does not come.

    Examples
    --------
    >>> from cupybnn import TrainConfig, Trainer, parallel
    >>> with parallel.connect("cpu") as ranks:
    ...     config = TrainConfig(dataset="digits", max_steps=10, device=ranks.device)
    ...     result = Trainer(config, ranks=ranks).run()
    """
    launch = detect(settings.launch_variables())
    if launch is None:
        return Alone()
    target = _device_of(launch, device)
    communicator = None
    if launch.by == "mpirun":
        from cupybnn.parallel.mpi import world

        communicator = world(launch)
    base = _base(launch, folder, communicator)
    meeting = None
    if base is not None:
        meeting = Meeting(base, launch.rank, launch.size, seconds, last_resort)
    try:
        _check_devices(launch, target, meeting, communicator)
        target.use()
        ranks = _connected(launch, target, meeting, communicator)
        ranks.agree("run the same version of cupybnn", _version())
    except BaseException as error:
        if meeting is not None:
            meeting.close(error)
        raise
    return ranks


def _connected(launch: Launch, target: Device, meeting: Meeting | None, communicator: Any) -> Ranks:
    if target.kind == "cuda":
        from cupybnn.parallel.nccl import NcclRanks, new_id

        if communicator is not None:
            unique_id = communicator.bcast(new_id() if launch.rank == 0 else None)
        else:
            assert meeting is not None
            unique_id = meeting.share("nccl-id", new_id)
        return NcclRanks(target, launch.rank, launch.size, unique_id, meeting)
    if communicator is not None:
        from cupybnn.parallel.mpi import MpiRanks

        return MpiRanks(communicator, meeting)
    from cupybnn.parallel.files import FileRanks

    assert meeting is not None
    return FileRanks(meeting)


def _device_of(launch: Launch, name: str) -> Device:
    """Return the device of this rank: the GPU with the number of its local rank."""
    if name not in ("auto", "cuda", "cpu") and not name.startswith("cuda"):
        resolve(name)  # raises
    if name == "cpu" or (name == "auto" and not cuda_status().available):
        return Device("cpu")
    if ":" in name:
        raise SettingError(
            f"The 'device' of a run of several ranks must be auto, cuda or cpu, because each rank "
            f"takes the GPU of its own number; got {name!r}."
        )
    if not cuda_status().available:
        raise DeviceError(f"The device {name!r} cannot be used. {why_no_gpus()}")
    # Where a launcher shows each rank its own GPU only, that one is number 0.
    index = 0 if cuda_status().device_count == 1 else launch.local_rank
    return resolve(f"cuda:{index}")


def _check_devices(
    launch: Launch, device: Device, meeting: Meeting | None, communicator: Any
) -> None:
    """Raise SettingError if one rank has a GPU and another has not, or two have the same one.

    Before they are connected: both would wait for each other, and NCCL would give no reason.
    """
    place = "the CPU"
    if device.kind == "cuda":
        bus = device.xp.cuda.runtime.deviceGetPCIBusId(device.index)
        place = f"{socket.gethostname()} {bus}"
    if communicator is not None:
        places = communicator.allgather(place)
    else:
        assert meeting is not None
        places = [each.decode() for each in meeting.gather("device", place.encode())]
    sentence = None
    for rank, each in enumerate(places):
        if (each == "the CPU") != (places[0] == "the CPU"):
            sentence = (
                f"All ranks must have a GPU, or none; got {places[0]} for rank 0 and {each} for "
                f"rank {rank}. With --device cpu, none uses one."
            )
        elif each != "the CPU" and each in places[:rank]:
            sentence = (
                f"Each rank must have a GPU of its own; got {each} for the ranks "
                f"{places.index(each)} and {rank}. Start as many ranks on a host as it has GPUs."
            )
        if sentence is not None:
            error = SettingError(sentence)
            error.report = launch.rank == 0
            raise error


def _base(launch: Launch, folder: Any, communicator: Any) -> Path | None:
    """Return the folder in which the ranks meet; None if they share none and have MPI."""
    given = settings.rendezvous()
    if given is not None:
        return given
    if communicator is not None:
        # All ranks take rank 0's choice.
        hosts = set(communicator.allgather(socket.gethostname()))
        name = communicator.bcast(os.urandom(6).hex())
        if folder is None and len(hosts) > 1:
            return None
    else:
        name = launch.job
    if folder is not None:
        parent, prefix = user_path(folder), ".cupybnn-ranks-"
    else:
        parent, prefix = Path(tempfile.gettempdir()), user_prefix()
    path = parent / f"{prefix}{name}"
    if launch.rank == 0:
        remove_abandoned(parent, prefix)
    if folder is not None:
        return path
    path.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "geteuid") and path.stat().st_uid != os.geteuid():  # anyone may write there
        raise SettingError(
            f"The folder where the ranks meet must belong to this user; {path} belongs to another. "
            f"Choose one with CUPYBNN_RENDEZVOUS."
        )
    return path


@cache
def _version() -> dict[str, str]:
    """Return the version of cupybnn, and a hash of its source files and kernels."""
    from cupybnn.backends.cuda.sources import kernels_dir  # with modules that a CPU does not need

    digest = hashlib.sha256()
    # Names within each folder: kernels lie inside a wheel's package, and beside it in a checkout.
    for folder, pattern in ((Path(cupybnn.__file__).parent, "*.py"), (kernels_dir(), "*.cu*")):
        for path in sorted(folder.rglob(pattern)):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return {"version": cupybnn.__version__, "code": digest.hexdigest()[:12]}
