"""The face of all ways in which the ranks of a run exchange arrays."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cupybnn.autograd.storage import module_of
from cupybnn.errors import SettingError
from cupybnn.parallel.meeting import Meeting

__all__ = ["Alone", "Pending", "Ranks", "padded", "total", "written"]


class Pending:
    """An exchange that has begun.

    Parameters
    ----------
    finish : callable
        Waits for it and returns the result.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import parallel
    >>> pending = parallel.Alone().all_reduce(np.arange(3))
    >>> pending.wait()
    array([0, 1, 2])
    """

    def __init__(self, finish: Callable[[], Any]) -> None:
        self._finish: Callable[[], Any] | None = finish
        self._result: Any = None

    def wait(self) -> Any:
        """Return the resulting array; on a GPU, the current stream waits and the host does not."""
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
        return self._result


class Ranks:
    """The processes that train together, as one of them sees them.

    Every rank calls the same methods in the same order, with arrays of the same shape and dtype on
    its own device. Sums add the ranks' arrays in the order of the ranks on a CPU, and in an order
    that depends on the number of ranks alone with NCCL, so a run can be repeated exactly. An
    exchange begins when its method is called and ends with `Pending.wait`; until then, do not write
    to its array.

    Where a method has `out`, the result is written there, by `Pending.wait` at the latest, and
    returned; `out` may be the array itself where both have one shape. With ``bfloat16=True``, the
    arrays' elements are bit patterns of bfloat16, as uint16, and sums are rounded to bfloat16.

    Attributes
    ----------
    rank : int
        Number of this process, from 0 on.
    size : int
        Number of processes.
    device : str
        The device of this rank: "cpu", "cuda:0", ...; "auto" where there is only one.

    Examples
    --------
    Each rank sums its part of some numbers, and all get the total:

    >>> import numpy as np
    >>> from cupybnn import parallel
    >>> with parallel.connect("cpu") as ranks:
    ...     mine = np.arange(12.0)[ranks.rank :: ranks.size]
    ...     total = ranks.all_reduce(mine.sum()).wait()
    >>> float(total)
    66.0
    """

    rank = 0
    size = 1
    device = "auto"
    #: Whether exchanges between arrays on a GPU can be captured in a CUDA graph.
    capturable = False
    _meeting: Meeting | None = None
    _holders: tuple[weakref.ref[Any], ...] = ()

    def all_reduce(self, array: Any, *, out: Any = None, bfloat16: bool = False) -> Pending:
        """Sum arrays over all ranks."""
        raise NotImplementedError

    def reduce_scatter(self, array: Any, *, out: Any = None, bfloat16: bool = False) -> Pending:
        """Sum flat arrays of ``size * n`` elements; rank r gets elements ``r * n`` to the next."""
        raise NotImplementedError

    def all_gather(self, array: Any, *, out: Any = None) -> Pending:
        """Return the arrays of all ranks, shape (size, ...)."""
        raise NotImplementedError

    def all_max(self, array: Any, *, out: Any = None) -> Pending:
        """Return the greatest of all ranks' elements at each place; a NaN of the host counts most.

        Meant for small arrays.
        """
        gathered = self.all_gather(array)
        return Pending(lambda: written(gathered.wait().max(axis=0), out))

    def broadcast(self, array: Any) -> Pending:
        """Return rank 0's array."""
        raise NotImplementedError

    def shared_zeros(self, xp: Any, parts: Sequence[tuple[int, Any]]) -> list[Any]:
        """Return flat arrays of 0 from which exchanges are as fast as they can be.

        Every rank must call this with the same `parts`. An exchange's `out` is another array.

        Parameters
        ----------
        xp : module
            numpy or cupy.
        parts : sequence of (int, dtype)
            Size and dtype of each array.
        """
        return [xp.zeros(count, dtype) for count, dtype in parts]

    def distances(self, array: Any) -> tuple[int, ...] | None:
        """Return how far away each rank's array is, in bytes, for kernels that read them all.

        Added to an address in an array from `shared_zeros`, a rank's distance gives the address at
        which this process reads the same array of that rank. None, on all ranks alike, where
        processes cannot read each other's memory.

        A kernel sees complete arrays if it waits for an exchange that all ranks begin after they
        have written theirs. Ranks may write again after a further exchange, which each begins
        after such kernels.
        """
        return None

    def replayed(self, exchanges: int) -> None:
        """Record that a CUDA graph was launched in which so many exchanges have been captured."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise RankError if a rank is known to have died or to hang."""
        if self._meeting is not None:
            self._meeting.check()

    def abort(self) -> None:
        """Give up exchanges that wait for others; after this only `close` may be called."""

    def close(self, error: BaseException | None = None) -> None:
        """Leave; with an `error`, the others end and report it."""
        self._closing()
        if error is not None:
            self.abort()
        if self._meeting is not None:
            self._meeting.close(error)

    def release_before(self, holder: Any) -> None:
        """Call ``holder.release()`` before leaving: a graph with exchanges must not live longer.

        The holder is not kept alive.
        """
        self._holders = (*self._holders, weakref.ref(holder))

    def _closing(self) -> None:
        for reference in self._holders:
            if (holder := reference()) is not None:
                holder.release()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.close(error)

    # Made of these -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Context in which the others wait for this rank for as long as it lives."""
        if self._meeting is None:
            yield
            return
        before, self._meeting.busy = self._meeting.busy, True
        try:
            yield
        finally:
            self._meeting.busy = before

    def barrier(self) -> None:
        """Wait, on the host, until every rank has come here."""
        self.sums([0.0])

    def sums(self, numbers: Any) -> np.ndarray:
        """Sum numbers of the host over all ranks, as float64; the host waits."""
        array = np.asarray(numbers, np.float64)
        return self._host(self.all_reduce(self._own(array)).wait())

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Return the bytes of every rank; the host waits."""
        lengths = self._host(self.all_gather(self._own(np.array([len(content)]))).wait()).ravel()
        padding = np.zeros(max(int(lengths.max()), 1), np.uint8)
        padding[: len(content)] = np.frombuffer(content, np.uint8)
        rows = self._host(self.all_gather(self._own(padding)).wait())
        return [row[:n].tobytes() for row, n in zip(rows, lengths.tolist(), strict=True)]

    def agree(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise unless all ranks have the same values.

        Parameters
        ----------
        what : str
            The rule, to follow "All ranks must".
        values : mapping of str to JSON values

        Raises
        ------
        SettingError
            Naming the first rank that differs from rank 0, and both values.
        """
        if self.size == 1:
            return
        text = json.dumps(dict(values), sort_keys=True, default=str)
        first, *others = (json.loads(each) for each in self.gather_bytes(text.encode()))
        for rank, other in enumerate(others, 1):
            names = [n for n in {**first, **other} if first.get(n) != other.get(n)]
            if names:
                shown = "; ".join(
                    f"{n}: rank 0 {first.get(n)!r}, rank {rank} {other.get(n)!r}" for n in names
                )
                error = SettingError(f"All ranks must {what}; got {shown}.")
                error.report = self.rank == 0
                raise error

    def _own(self, array: np.ndarray) -> Any:
        """Move a host array to where this rank's exchanges take place."""
        return array

    def _host(self, array: Any) -> np.ndarray:
        """Move an array to the host."""
        return array

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size}, device={self.device!r})"


class Alone(Ranks):
    """A run of one process.

    Examples
    --------
    >>> from cupybnn import parallel
    >>> parallel.Alone()
    Alone(rank=0, size=1, device='auto')
    """

    def all_reduce(self, array: Any, *, out: Any = None, bfloat16: bool = False) -> Pending:
        return Pending(lambda: written(array, out))

    reduce_scatter = all_reduce

    def all_gather(self, array: Any, *, out: Any = None) -> Pending:
        return Pending(lambda: written(array[None], out))

    def broadcast(self, array: Any) -> Pending:
        return Pending(lambda: array)


def written(result: Any, out: Any) -> Any:
    """Return `result`, or `out` after it has been written there."""
    if out is None:
        return result
    if out is not result:
        out[...] = result
    return out


def total(parts: Any, bfloat16: bool = False) -> Any:
    """Add arrays of the host in their order; those of bfloat16 in float32, rounded once."""
    first, *others = parts
    if not bfloat16:
        first = first.copy()
        for part in others:
            first += part
        return first
    wide = _widened(first)
    with np.errstate(all="ignore"):  # as NCCL
        for part in others:
            wide += _widened(part)
    bits = wide.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(wide), (bits >> 16) | np.uint32(0x40), near).astype(np.uint16)


def _widened(patterns: np.ndarray) -> np.ndarray:
    """Return the float32 numbers of bit patterns of bfloat16."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def padded(array: Any, multiple: int) -> Any:
    """Return `array`, flat, with zeros appended up to a multiple of `multiple` elements."""
    flat = array.reshape(-1)
    rest = -flat.size % multiple
    if not rest:
        return flat
    xp = module_of(array)
    longer = xp.empty(flat.size + rest, flat.dtype)
    longer[: flat.size] = flat
    longer[flat.size :] = 0
    return longer
