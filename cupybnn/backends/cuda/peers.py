"""Launches of exchanges between the GPUs of one host (smxx_peers.cu)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cupybnn.backends.cuda.compiler import load_kernel
from cupybnn.backends.cuda.structs import Kernel, Struct

__all__ = [
    "CONTROL_BYTES",
    "KINDS",
    "MOST_RANKS",
    "PIECE",
    "Host",
    "combine",
    "prepare",
    "words_of",
]

#: How elements are combined, as in smxx_peers.cu.
KINDS = {"copied": 0, "float32": 1, "bfloat16": 2}
MOST_RANKS = 8
#: Bytes that a thread reads at a time. Arrays are aligned to this, and their sizes are multiples.
PIECE = 16
#: Few blocks: each waits for others, and keeps its multiprocessor's registers meanwhile.
_THREADS, _MOST_BLOCKS = 512, 64
#: Memory of a rank by which it meets others: 8 words for each block, and a word for each.
CONTROL_BYTES = 4 * (MOST_RANKS + 1) * _MOST_BLOCKS

PEERS = Struct(
    "Peers", f"ptr sent[{MOST_RANKS}]; ptr marks[{MOST_RANKS}]; ptr meetings, ended; i64 rank"
)
COMBINE = Kernel("smxx_peers", "combine", "Peers p; i64 first, count; ptr out", PEERS)


@dataclass(frozen=True)
class Host:
    """The GPUs of one host, as a rank sees them.

    Attributes
    ----------
    device : int
        Index of this rank's GPU.
    rank, size : int
    control : tuple of int
        Addresses of each rank's `CONTROL_BYTES`, zero at first.
    ended : int
        Address of a word of the host's memory; if it is not 0, ranks wait for each other no longer.
    """

    device: int
    rank: int
    size: int
    control: tuple[int, ...]
    ended: int


def prepare(device: int, size: int) -> None:
    """Load the kernels for a device and so many ranks: compile them, if they have not been."""
    for kind in KINDS:
        _kernel(kind, device, size)


def _kernel(kind: str, device: int, size: int) -> Any:
    defines = (("KIND", KINDS[kind]), ("RANKS", size), ("REAL", "float"))
    return load_kernel(COMBINE.source, COMBINE.function, defines, device)


def combine(
    host: Host,
    kind: str,
    sent: Sequence[int],
    out: int,
    *,
    first: int = 0,
    nbytes: int,
    stream: Any,
) -> None:
    """Combine what lies at an address of each rank; all ranks must launch the same.

    Parameters
    ----------
    host : Host
    kind : str
        A key of `KINDS`: with "copied", `out` receives each rank's bytes one after another.
    sent : sequence of int
        An address for each rank.
    out : int
        An address of this rank that no other reads.
    first, nbytes : int
        Where the bytes begin that are combined, and their number; multiples of `PIECE`.
    stream : cupy.cuda.Stream
    """
    assert first % PIECE == 0
    assert nbytes % PIECE == 0
    count = nbytes // PIECE
    peers = PEERS.pack(
        sent=words_of(sent), marks=words_of(host.control), ended=host.ended,
        meetings=host.control[host.rank] + 4 * MOST_RANKS * _MOST_BLOCKS,
        rank=host.rank,
    )  # fmt: skip
    arguments = COMBINE.arguments(p=peers, first=first // PIECE, count=count, out=out)
    _kernel(kind, host.device, host.size)((_blocks(count),), (_THREADS,), arguments, stream=stream)


def _blocks(count: int) -> int:
    """Return the blocks that combine so many pieces, the same on all ranks."""
    return max(1, min(-(-count // _THREADS), _MOST_BLOCKS))


def words_of(numbers: Sequence[int]) -> bytes:
    """Return addresses, or distances between them, as a field of a struct: 8 bytes each."""
    return b"".join((number % (1 << 64)).to_bytes(8, "little") for number in numbers)
