"""Which rank this process is, from the variables that a launcher sets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cupybnn.errors import SettingError

__all__ = ["Launch", "detect"]


@dataclass(frozen=True)
class Launch:
    """A process's place among those that a launcher started together.

    Attributes
    ----------
    by : {"torchrun", "mpirun", "srun"}
        Whose variables were found. ``cupybnn train --gpus`` sets torchrun's.
    rank, size : int
        Number of this process, from 0 on, and number of processes.
    local_rank : int
        Number of this process among those on the same host.
    job : str
        The same for all processes of a job, and different for another job.

    Examples
    --------
    >>> from cupybnn import parallel
    >>> parallel.Launch(by="torchrun", rank=3, size=4, local_rank=1, job="a").rank
    3
    """

    by: str
    rank: int
    size: int
    local_rank: int
    job: str


#: For each launcher, the variables of rank, size and local rank, and those that name the job.
#: A variable whose name ends with "?" may be missing.
_LAUNCHERS = {
    "torchrun": (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK?"),
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
    ),
    "mpirun": (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK?"),
        ("PMIX_NAMESPACE",),
    ),
    "mpirun of MPICH": (("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID?"), ()),
    # Not SLURM_NTASKS, which is also set in a batch script outside of srun.
    "srun": (
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID?"),
        ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    ),
}
_ALONE = {"srun": "SLURM_PROCID", "mpirun of MPICH": "PMI_RANK"}


def detect(variables: Mapping[str, str]) -> Launch | None:
    """Return this process's place, or None if no launcher started more than one process.

    Parameters
    ----------
    variables : mapping of str to str
        Environment variables. Those of torchrun come first, then Open MPI's, MPICH's, Slurm's.

    Raises
    ------
    SettingError
        If a launcher's variables contradict each other, or one is missing.

    Examples
    --------
    >>> from cupybnn import parallel
    >>> launch = parallel.detect({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    >>> launch.by, launch.rank, launch.size
    ('torchrun', 1, 2)
    """
    for by, (places, job) in _LAUNCHERS.items():
        if places[0] not in variables or (by in _ALONE and places[1] not in variables):
            continue
        rank, size, local_rank = (_number(by, name, variables) for name in places)
        if size == 1:
            return None
        if not 0 <= rank < size:
            raise SettingError(
                f"The {places[0]} that {by} sets must be from 0 to {places[1]} - 1; got {rank} "
                f"and {size}."
            )
        text = "\n".join([by, *(variables.get(name, "") for name in job)])
        name = hashlib.sha256(text.encode()).hexdigest()[:12]
        return Launch(by.split()[0], rank, size, local_rank, name)
    return None


def _number(by: str, name: str, variables: Mapping[str, str]) -> int:
    name, optional = name.removesuffix("?"), name.endswith("?")
    text = variables.get(name, "0" if optional else None)
    if text is None or not text.strip().isdecimal():
        got = "nothing" if text is None else repr(text)
        raise SettingError(
            f"The variable {name}, which {by} sets, must be a whole number; got {got}. Start the "
            f"processes with a launcher, or unset its variables for a run of one process."
        )
    return int(text)
