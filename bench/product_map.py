"""Time packed products of many shapes against the fastest dense product, and draw the ratios.

    python bench/product_map.py --json FILE [--chart FILE] [--quick]
    python bench/product_map.py --from FILE --chart FILE

The first form needs a GPU and PyTorch. A cell of the map is a product of (M, K) by (K, N):
xnor_gemm of packed operands with an int32 result, and PyTorch's bfloat16 and fp8 products with a
bfloat16 result, in one run, by the benchmark's clock with the queue never empty. Operands are views
of random memory larger than the L2 cache, and each call finds its own outside of the cache. The
result of a timed call is compared with an exact product. The exit code is 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import cupybnn
from cupybnn.backends.cuda.packing import geometry, words_shape
from cupybnn.backends.devices import Device, resolve
from cupybnn.benchmark.chart import needs_matplotlib, write
from cupybnn.benchmark.clock import make_clock
from cupybnn.benchmark.methods import Prepared, random_floats
from cupybnn.benchmark.products import release, wrong_element
from cupybnn.benchmark.record import new_record
from cupybnn.files import atomic_write
from cupybnn.packed import PackedMatrix, pack

ROWS = (1, 8, 16, 32, 64, 100, 128, 256, 512)
SIDES = (128, 512, 1024, 2048, 4096, 8192, 16384)
PEERS = ("bfloat16", "fp8")
MOST_SETS = 160  # more than are called between two flushes of the cache


class Pool:
    """Memory that is handed out in turn, beginning again at its end."""

    def __init__(self, memory: Any) -> None:
        self.memory, self._at = memory, 0

    def take(self, count: int) -> Any:
        """Return a view of `count` elements, at an address that is a multiple of 256 elements."""
        if self._at + count > len(self.memory):
            self._at = 0
        view = self.memory[self._at : self._at + count]
        self._at += -(-count // 256) * 256
        return view


class Map:
    """What all cells share: the clock, and random memory for each kind of operand."""

    def __init__(self, device: Device) -> None:
        import cupy
        import torch

        self.device, self.clock, self._torch = device, make_clock(device), torch
        cache = int(cupy.cuda.runtime.getDeviceProperties(device.index)["l2CacheSize"])
        self.bytes = max(4 * cache, 1 << 29)
        words = cupy.random.default_rng(0).integers(0, 2**32, self.bytes // 4, np.uint32)
        self._words = Pool(words)
        self._counts = Pool(cupy.zeros(1 << 20, np.int32))
        self._one = torch.ones((), device=f"cuda:{device.index}")
        floats = torch.randn(self.bytes // 2, device=self._one.device, dtype=torch.bfloat16)
        self._peers = {"bfloat16": Pool(floats), "fp8": Pool(floats.to(torch.float8_e4m3fn))}

    def _sets(self, nbytes: int) -> int:
        return max(2, min(MOST_SETS, self.bytes // 2 // nbytes))

    def cell(self, m: int, n: int, k: int) -> dict[str, Any]:
        """Return the seconds of a call, ours and of each peer, and whether ours was right."""
        cell: dict[str, Any] = {"m": m, "n": n, "k": k}
        cell["cupybnn"], cell["error"] = self._ours(m, n, k)
        for peer in PEERS:
            cell[peer] = self._time(self._peer(peer, m, n, k))
        return cell

    def _time(self, calls: Iterator[Callable[[], Any]]) -> float:
        # All results take the same memory in turn, the peers' too: to allocate 160 of each size
        # would take minutes.
        return self.clock.throughput(list(calls), 1e-3).median

    def _packed(self, shape: tuple[int, int], axis: int) -> PackedMatrix:
        """Return a matrix of random bits; padding and counts, which take no time, are wrong."""
        _, lines, k = geometry(shape, axis)
        words = self._words.take(math.prod(words_shape(1, lines, k))).reshape(
            words_shape(1, lines, k)
        )
        return PackedMatrix._of(words, self._counts.take(lines), shape, axis, self.device)

    def _ours(self, m: int, n: int, k: int) -> tuple[float, str]:
        a, b = random_floats(self.device, (m, k)), random_floats(self.device, (k, n))
        first = pack(a), pack(b, axis=-2)
        nbytes = first[0].nbytes + first[1].nbytes + 4 * m * n

        def calls() -> Iterator[Callable[[], Any]]:
            for i in range(self._sets(nbytes)):
                x, y = first if i == 0 else (self._packed((m, k), -1), self._packed((k, n), -2))
                yield lambda x=x, y=y: cupybnn.xnor_gemm(x, y)

        seconds = self._time(calls())
        result = cupybnn.xnor_gemm(*first)
        return seconds, wrong_element(Prepared([], [result], 0, a, b), self.device)

    def _peer(self, name: str, m: int, n: int, k: int) -> Iterator[Callable[[], Any]]:
        torch, pool = self._torch, self._peers[name]
        nbytes = (m * k + k * n) * pool.memory.element_size() + 2 * m * n
        for _ in range(self._sets(nbytes)):
            a = pool.take(m * k).view(m, k)
            if name == "bfloat16":
                b = pool.take(k * n).view(k, n)
                yield lambda a=a, b=b: torch.matmul(a, b)
            else:
                b = pool.take(k * n).view(n, k).t()  # it requires a column-major b
                yield lambda a=a, b=b: torch._scaled_mm(
                    a, b, scale_a=self._one, scale_b=self._one, out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )  # fmt: skip


def measure(
    device: Device, quick: bool, save: Callable[[dict[str, Any]], None] = lambda record: None
) -> dict[str, Any]:
    """Measure all cells and return the record, which is saved after each M, too."""
    record = new_record("map", device, quick, [])
    rows = (16, 128) if quick else ROWS
    sides = (1024, 16384) if quick else SIDES
    with device.scope():
        grid = Map(device)
        record["cells"] = []
        for m in rows:
            record["cells"] += [grid.cell(m, *side) for side in itertools.product(sides, sides)]
            release(device)
            save(record)
    return record


def ratio(cell: dict[str, Any]) -> float:
    """Return how many times as fast as the fastest peer our product is."""
    return float(min(cell[peer] for peer in PEERS) / cell["cupybnn"])


def draw(record: dict[str, Any], path: Path) -> tuple[Path, Path]:
    """Draw a panel of N by K for each M and write the picture as SVG and PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    ratios = {(c["m"], c["n"], c["k"]): ratio(c) for c in record["cells"]}
    rows, columns, depths = (sorted(set(axis)) for axis in zip(*ratios, strict=True))
    wide = min(3, len(rows))
    high = -(-len(rows) // wide)
    figure = Figure(figsize=(4.1 * wide, 3.5 * high + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Packed product to int32: times as fast as the fastest of PyTorch's bfloat16 and fp8, "
        f"one {record['gpu']['name']}", fontsize=11,
    )  # fmt: skip
    norm = TwoSlopeNorm(vmin=-1.0, vcenter=0.0, vmax=4.5)
    panels = figure.subplots(high, wide, squeeze=False).ravel()
    for axes, m in itertools.zip_longest(panels, rows):
        if m is None:
            axes.set_axis_off()
            continue
        values = np.array([[ratios[m, n, k] for n in columns] for k in depths])
        axes.imshow(np.log2(values), norm=norm, cmap="RdYlGn", origin="lower", aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(columns)), [str(n) for n in columns], fontsize=7)
        axes.set_yticks(range(len(depths)), [str(k) for k in depths], fontsize=7)
        axes.set_title(f"M = {m}", fontsize=9, loc="left")
        axes.set_xlabel("N", fontsize=8)
        axes.set_ylabel("K", fontsize=8)
    return write(figure, path)


def summary(record: dict[str, Any]) -> str:
    """Return the number of cells, and those below 1."""
    cells = record["cells"]
    slow = [c for c in cells if ratio(c) < 1]
    lines = [f"{len(cells)} products, {len(slow)} of them slower than the fastest dense one"]
    lines += [
        f"  {c['m']} x {c['n']} x {c['k']}: {c['cupybnn'] * 1e6:.2f} us, "
        + ", ".join(f"{peer} {c[peer] * 1e6:.2f}" for peer in PEERS)
        for c in slow
    ]
    return "\n".join(lines)


def save(record: dict[str, Any], path: Path | None) -> None:
    """Write a record as JSON, unless there is no path."""
    if path is not None:
        with atomic_write(path) as file:
            file.write((json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    """Measure or read a record, print its summary, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="read a record")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw FILE.svg and FILE.png")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    args = parser.parse_args(arguments)
    if args.chart is not None:
        needs_matplotlib()
    if args.source is not None:
        record = json.loads(args.source.read_text())
    else:
        record = measure(resolve("cuda"), args.quick, partial(save, path=args.json))
    print(summary(record))
    if args.chart is not None:
        draw(record, args.chart)
    wrong = [c for c in record["cells"] if c["error"]]
    for c in wrong:
        print(f"{c['m']} x {c['n']} x {c['k']}: {c['error']}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
