"""Which configuration multiplies a shape on an architecture: data, and its look-up."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from cupybnn import settings
from cupybnn.backends.cuda.configs import (
    KERNELS,
    Config,
    default_kernel,
    kernels_for,
    sm75,
    sm80,
    sm90,
    smxx,
)
from cupybnn.errors import SettingError

__all__ = ["candidates", "choose", "force_kernel", "forced", "shape_key", "shipped"]


def _sm90(m: int, n: int, k: int, batch: int, packed: bool, scaled: bool) -> Config:
    chunks = -(-k // 1024)
    if min(m, n) <= 64:
        swap = m <= 64 and not packed
        narrow, wide = (m, n) if swap else (n, m)
        if narrow <= 64:
            least = 32 if packed else 16
            tile_n = next(t for t in (16, 32, 64) if t >= max(narrow, least))
            tiles = -(-wide // 128) * batch
            split = _split(tiles, chunks)
            return sm90(1, tile_n, 8, split_k=split, swap=swap)
    tiles = -(-m // 128) * -(-n // 128) * batch
    if tiles * 2 <= 132 and chunks == 1:
        # One slot is loaded, multiplied and written out: the less of it a block has, the sooner.
        return sm90(1, 64, 8, consumers=1 if tiles * 4 <= 132 else 2)
    if tiles * 2 <= 132:
        return sm90(1, 128, 6, split_k=_split(tiles, chunks))
    if tiles <= 132 or (tiles <= 264 and not packed):
        return sm90(1, 128, 6)
    # Measured at 4096, 8192 and 16384 cubed (bench/NOTES.md). With a long K the tensor cores take
    # most of the time, and the tile with the least traffic wins; with a short one writing out does,
    # which deferring hides. Deferred, an accumulator must fit 16 bits and four products follow.
    if k >= 12288 or chunks < 4:
        return sm90(2, 128 if scaled else 192, 4)
    if packed and k < 6144:
        return sm90(2, 128, 4, deferred=True)
    return sm90(1, 256, 4, deferred=True, group=16)


def _split(tiles: int, chunks: int) -> int:
    """Parts of K that fill the GPU: a power of two, no more than there are chunks."""
    split = 1
    while split < 8 and 2 * split <= chunks and 2 * split * tiles <= 132:
        split *= 2
    return split


def _sm80(capability: int, m: int, n: int, batch: int) -> Config:
    # sm_86, sm_89 and sm_12x have 99 KiB of shared memory a block, the others at least 163.
    roomy = capability in (80, 87, 90) or 100 <= capability < 120
    tiles = -(-m // 256) * -(-n // 128) * batch
    if roomy and tiles >= 100:
        return sm80(4, 2, 4, 8, 3)
    if -(-m // 128) * -(-n // 128) * batch >= 60:
        return sm80(2, 4, 4, 4, 3)
    return sm80(2, 2, 2, 4, 4)


def shipped(
    kernel: str, capability: int, m: int, n: int, k: int, batch: int, packed: bool, scaled: bool
) -> Config:
    """Return the configuration that the shipped table has for a shape."""
    if kernel == "sm90":
        return _sm90(m, n, k, batch, packed, scaled)
    if kernel == "sm80":
        return _sm80(capability, m, n, batch)
    return sm75() if kernel == "sm75" else smxx()


def candidates(kernel: str, capability: int, m: int, n: int, k: int, packed: bool) -> list[Config]:
    """Return the configurations of a kernel worth measuring for a shape."""
    chunks = -(-k // 1024)
    splits = [s for s in (1, 2, 4, 8) if s <= chunks]
    if kernel == "sm90":
        narrow = min(m, n)
        if narrow <= 64 and (m > 64 or not packed or n <= 64):
            swap = m <= 64 and not packed
            least = 32 if packed else 16
            tile_n = next(t for t in (16, 32, 64) if t >= max(narrow, least))
            if swap or n <= 64:
                return [
                    sm90(1, tile_n, stages, consumers=consumers, split_k=split, swap=swap)
                    for consumers, stages in ((1, 10), (2, 8))
                    for split in splits
                ]
        small = [sm90(1, 128, 6, split_k=split) for split in splits]
        small += [
            sm90(1, 64, 8, consumers=consumers, split_k=split)
            for consumers in (2, 1)
            for split in splits
        ]
        large = [
            sm90(blocks_m, tile_n, 4, cluster=cluster, deferred=deferred, group=group)
            for blocks_m, tile_n, deferred in (
                (1, 256, True), (2, 128, True), (1, 256, False), (2, 128, False), (2, 192, False),
            )
            for cluster in ((1, 1), (2, 1), (1, 2))
            for group in (8, 16)
            if not deferred or 4 <= chunks <= 63
        ]  # fmt: skip
        return small if m * n <= 1024 * 1024 else small[:1] + large
    if kernel == "sm80":
        tiles = [
            (2, 2, 2, 4, 4),
            (2, 4, 4, 4, 2),
            (2, 4, 4, 4, 3),
            (4, 2, 4, 8, 2),
            (4, 2, 4, 8, 3),
        ]
        room = 99 * 1024 if capability in (86, 89) or capability >= 120 else 163 * 1024
        return [c for c in (sm80(*t) for t in tiles) if c.shared_bytes(False) <= room]
    return [shipped(kernel, capability, m, n, k, 1, packed, False)]


_local = threading.local()


@contextlib.contextmanager
def force_kernel(name: str | Config | None) -> Iterator[None]:
    """Use one kernel, or one configuration, for all products of this thread inside the context.

    For tests, measurements and `cupybnn verify`; ``CUPYBNN_KERNEL`` does it for a whole process.

    Raises
    ------
    ValueError
        If there is no kernel of that name.
    """
    if isinstance(name, str):
        _check(name)
    before = forced()
    _local.forced = name
    try:
        yield
    finally:
        _local.forced = before


def _check(name: str) -> str:
    if name not in KERNELS:
        raise SettingError(f"The kernel must be one of {', '.join(KERNELS)}; got {name!r}.")
    return name


_from_environment = settings.kernel_override()


def forced() -> str | Config | None:
    """Return what `force_kernel` or the environment asks for, or None."""
    return getattr(_local, "forced", _from_environment)


def choose(
    capability: int,
    m: int,
    n: int,
    k: int,
    batch: int,
    packed: bool,
    scaled: bool,
    tuned: dict[str, Config],
) -> Config:
    """Return the configuration for `batch` products of (m, k) by (k, n).

    What is forced comes first, then what `cupybnn bench --tune` has measured on this GPU, then the
    shipped table. A compute capability that nobody planned for gets the portable kernel.

    Parameters
    ----------
    capability : int
        90 for 9.0.
    packed, scaled : bool
        Whether the result is packed, or scaled.
    tuned : dict
        Measured winners by `tuning.shape_key`.
    """
    asked = forced()
    if isinstance(asked, Config):
        config = asked
    else:
        applicable = kernels_for(capability)
        kernel = _check(asked) if asked else default_kernel(capability)
        if kernel not in applicable:
            raise SettingError(
                f"The kernel {kernel!r} does not run on compute capability "
                f"{capability // 10}.{capability % 10}; here run {', '.join(applicable)}."
            )
        config = shipped(kernel, capability, m, n, k, batch, packed, scaled)
        measured = tuned.get(shape_key(m, n, k, batch, packed))
        # A file may say anything: only a configuration that could have been measured is launched.
        if (
            measured is not None
            and not (asked or scaled)
            and measured in candidates(kernel, capability, m, n, k, packed)
        ):
            config = measured
    if settings.debug():
        print(
            f"cupybnn: {batch} x ({m}, {k}) @ ({k}, {n}){' packed' if packed else ''}: {config}",
            file=sys.stderr,
        )
    return config


def shape_key(m: int, n: int, k: int, batch: int, packed: bool) -> str:
    """Name of a shape in a tuned table."""
    return f"{batch}x{m}x{n}x{k}{'p' if packed else ''}"
