"""``cupybnn bench``: time the 1-bit product, training and predictions against dense peers."""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cupybnn.backends.devices import Device, cuda_status, resolve
from cupybnn.cli.outputs import check_chart, check_output
from cupybnn.errors import SettingError
from cupybnn.files import is_stream
from cupybnn.parallel.starting import check_gpus
from cupybnn.paths import user_path

__all__ = ["add_parser", "run"]


_DESCRIPTION = """\
cupybnn bench [product]
  Time xnor_gemm, with packed operands and with arrays, against the dense
  products of CuPy and PyTorch; without a GPU, against NumPy's. Times are
  medians, by CUDA events after a warm-up. Operands are random, and rotated
  so that they do not stay in the L2 cache. The exit code is 1 if a timed
  result is wrong.

cupybnn bench train
  Time training steps of a binarized network on random data, with dense
  products and with xnor_gemm, against the same network in PyTorch. The exit
  code is 1 if a cupybnn step fails. With --gpus 1,2,4, time steps of several
  ranks, against PyTorch's DistributedDataParallel.

cupybnn bench infer
  Time predictions of a packed network against the same network in PyTorch
  and, on a CPU, in onnxruntime. The exit code is 1 if a timed cupybnn result
  is not exact.

PyTorch and onnxruntime are included if they are installed."""
_COLUMNS = """
Columns of the tables:
  median ... p90  time per call on the device, with a full queue
  issued          time per call in a Python loop
  of peak         fraction of the 1-bit instruction's peak rate, as measured on
                  an H200 and scaled by the number of multiprocessors
  of memory       bandwidth as a fraction of a copy's
  speedup         relative to float32"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of ``cupybnn bench``."""
    from cupybnn.benchmark.record import SECTIONS

    parser = subparsers.add_parser(
        "bench",
        help="time the 1-bit product against dense products",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
        epilog=f"Sections of 'product': {', '.join(SECTIONS)}.\n{_COLUMNS}",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("product", "train", "infer"),
        help="what to time: the product (the default), training steps or predictions",
    )
    parser.add_argument(
        "--device", metavar="D", default="auto", help="auto (the default), cpu, cuda or cuda:N"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    parser.add_argument(
        "--only",
        metavar="SECTION",
        type=_sections,
        help="with 'product': run only these sections, comma-separated",
    )
    parser.add_argument(
        "--sizes",
        metavar="HxB,...",
        type=_sizes,
        help="with 'train' and 'infer': units per hidden layer and examples per step or call, such "
        "as 512x8192,4096x4096",
    )
    for option, what in (("gpus", "GPUs"), ("ranks", "ranks on the CPU")):
        parser.add_argument(
            f"--{option}",
            metavar="N,...",
            type=_counts,
            help=f"with 'train': what these numbers of {what} gain, each compared with the first",
        )
    parser.add_argument("--json", metavar="FILE", type=_file, help="write the record to FILE")
    parser.add_argument(
        "--chart", metavar="FILE", type=_file, help="draw FILE.svg and FILE.png (needs matplotlib)"
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        type=_file,
        help="show (or draw) a record written by --json instead of measuring",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="with 'product': first measure the kernels' configurations on this GPU and store the "
        "fastest in the cache folder, for xnor_gemm to use from then on",
    )


def _sections(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _file(text: str) -> Path:
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _counts(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1 or any(b <= a for a, b in itertools.pairwise(numbers)):
        raise argparse.ArgumentTypeError(f"must be increasing numbers, such as 1,2,4; got {text!r}")
    return numbers


def _sizes(text: str) -> list[tuple[int, int]]:
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9][0-9]{0,99})x([1-9][0-9]{0,99})\s*", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"must be HxB,... (comma-separated); got {part!r}")
        found.append((int(match[1]), int(match[2])))
    return found


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the requested files."""
    _check(args)
    from cupybnn.benchmark import record as records

    if args.source is not None:
        try:
            record = records.load(args.source)
        except ValueError as error:
            raise SettingError(str(error)) from error
        kind = records.kind_of(record)
        if args.what not in (None, "train" if kind == "scaling" else kind):
            raise SettingError(
                f"The '--from' of 'bench {args.what}' must be a record of 'bench {args.what}'; "
                f"'{args.source}' is one of 'bench {kind}'."
            )
        _print(_module(kind, "tables").lines(record))
    else:
        kind = args.what or "product"
        if args.gpus or args.ranks:
            kind = "scaling"
            record = _measure_scaling(args)
        else:
            record = _measure(args) if kind == "product" else _measure_sizes(args, kind)
        print(f"took {record['seconds']:.0f} s", file=sys.stderr)
        if args.json is not None:
            records.save(record, args.json)
            print(f"wrote {args.json}")
    if args.chart is not None:
        for file in _module(kind, "chart").draw(record, args.chart):
            print(f"wrote {file}")
    if kind == "scaling":
        return int(any(r.get("failed") and r["library"] == "cupybnn" for r in record["rows"]))
    if kind != "product":
        rows = [row for found in record["sizes"] for row in found["rows"]]
        return int(any(row.get("failed") and row["library"] == "cupybnn" for row in rows))
    rows = [row for result in record["products"] for row in result["rows"] if row["ours"]]
    wrong = any(row.get("checked") is False for row in record.get("torch", ()))
    return int(wrong or any("error" in row for row in rows))


def _check(args: argparse.Namespace) -> None:
    """Check the options before measuring, which takes minutes."""
    from cupybnn.benchmark.record import SECTIONS

    what = args.what or "product"
    homes = {"only": ("product",), "tune": ("product",), "sizes": ("train", "infer")}
    homes |= {"gpus": ("train",), "ranks": ("train",)}
    for option, kinds in homes.items():
        if getattr(args, option) not in (None, False) and what not in kinds:
            raise SettingError(
                f"The '--{option}' must be given to 'bench {' or '.join(kinds)}' only; got it with "
                f"'bench {what}'."
            )
    if args.source is not None:
        for option in ("only", "tune", "sizes", "gpus", "ranks", "json"):
            if getattr(args, option) not in (None, False):
                raise SettingError(
                    f"The '--{option}' must not be given with '--from', which measures nothing."
                )
    if args.gpus and args.ranks:
        raise SettingError("The '--gpus' and '--ranks' must not be given together.")
    if args.gpus:
        check_gpus(args.gpus[-1])
    unknown = [name for name in args.only or () if name not in SECTIONS]
    if unknown or args.only == []:
        raise SettingError(
            f"The 'only' must name sections of {', '.join(SECTIONS)}; got {', '.join(unknown)!r}."
        )
    if args.json is not None:
        check_output("--json", args.json)
    if args.chart is not None:
        check_chart(args.chart)
        if args.only is not None and "square" not in args.only:
            raise SettingError(
                f"The '--chart' needs the section 'square', which it draws; got '--only' with "
                f"{', '.join(args.only) or 'none'}."
            )
        from cupybnn.benchmark.chart import needs_matplotlib

        needs_matplotlib()


def _module(kind: str, name: str) -> Any:
    """Return the module "record", "tables" or "chart" for a kind of record."""
    folder = {"product": "", "train": ".training", "scaling": ".scaling", "infer": ".inference"}[
        kind
    ]
    return importlib.import_module(f"cupybnn.benchmark{folder}.{name}")


def _measure_sizes(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Measure training steps or predictions, size by size."""
    from cupybnn.benchmark.training.variants import Size
    from cupybnn.training import TrainConfig
    from cupybnn.training.limits import check_memory

    measured, tables = _module(kind, "record"), _module(kind, "tables")
    bar: Any = None

    def starting(name: str, total: int) -> None:
        nonlocal bar
        if bar is None and sys.stderr.isatty():
            from tqdm import tqdm

            bar = tqdm(total=total, unit="variant", file=sys.stderr, leave=False)
        elif bar is not None:
            bar.update()
        if bar is not None:
            bar.set_description(name)

    def progress(record: dict[str, Any], done: str) -> None:
        if bar is not None:
            bar.clear()
        _print(tables.heading(record) if done == "begun" else tables.size(record["sizes"][-1]))
        print()
        if done == "size":
            _save_so_far(record, args)

    sizes = [Size(*size) for size in args.sizes] if args.sizes else None
    device = resolve(args.device)
    for size in (sizes or ()) if kind == "train" else ():
        config = TrainConfig(n_hidden=size.hidden, batch_size=size.batch, binary=True)
        check_memory(config, measured.FEATURES, measured.CLASSES, device)
    try:
        record = measured.run(
            device,
            quick=args.quick,
            sizes=sizes,
            starting=starting,
            progress=progress,
        )
    finally:
        if bar is not None:
            bar.close()
    _print(tables.summary(record))
    return record


def _measure_scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Measure steps of several ranks."""
    from cupybnn.benchmark.scaling import record as scaling
    from cupybnn.benchmark.scaling import tables
    from cupybnn.benchmark.training.variants import Size

    so_far: dict[str, Any] = {"rows": []}
    shown: set[str] = set()

    def progress(record: dict[str, Any], done: str) -> None:
        so_far.update(record)
        if done == "begun":
            _print(tables.heading(record))
            return
        lines = dict.fromkeys(map(tables.row, record["rows"]))
        _print(line for line in lines if line not in shown)
        shown.update(lines)
        _save_so_far(record, args)

    try:
        record = scaling.run(
            resolve("cuda" if args.gpus else "cpu"),
            args.gpus or args.ranks,
            quick=args.quick,
            sizes=[Size(*size) for size in args.sizes] if args.sizes else None,
            progress=progress,
        )
    finally:  # of what has been measured, if it is interrupted
        print()
        _print(tables.summary(so_far))
    return record


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from cupybnn.benchmark import record as records

    device = resolve(args.device)
    if args.tune:
        _tune(device)

    def progress(record: dict[str, Any], done: str) -> None:
        _print(_lines_of(record, done))
        _save_so_far(record, args)

    record = records.run(device, quick=args.quick, only=args.only, progress=progress)
    from cupybnn.benchmark import tables

    if record["products"]:
        _print(tables.summary(record))
    return record


def _save_so_far(record: dict[str, Any], args: argparse.Namespace) -> None:
    """Save an unfinished record, in case the run is interrupted; a pipe gets only the final one."""
    from cupybnn.benchmark import record as records

    if args.json is not None and not is_stream(args.json):
        records.save(record, args.json)


def _lines_of(record: dict[str, Any], done: str) -> Iterable[str]:
    from cupybnn.benchmark import tables

    if done == "copy":
        yield from tables.heading(record)
    elif done == "product":
        yield from tables.product(record, record["products"][-1])
    else:
        section = {
            "original": tables.original,
            "packing": tables.packing,
            "host": tables.host,
            "torch": tables.torch_layers,
            "first-call": tables.starts,
        }[done]
        yield from section(record)
    yield ""


def _tune(device: Device) -> None:
    if device.kind != "cuda":
        status = cuda_status()
        why = "" if status.available else f" {status.reason}"
        raise SettingError(
            f"The '--tune' needs a GPU, because it measures CUDA kernels; got {device}.{why}"
        )
    from cupybnn.backends.cuda.tuning import table_path
    from cupybnn.benchmark import tuning

    for shape, trials in itertools.groupby(tuning.tune(device.index), key=lambda t: t.shape):
        print(_tuned_line(shape, list(trials)), flush=True)
    print(f"wrote {table_path(device.index)}\n")


def _tuned_line(shape: tuple[int, int, int, bool], trials: list[Any]) -> str:
    m, n, k, packed = shape
    what = f"tune {m} x {n} x {k}{' packed' if packed else ''}:"
    measured = [t for t in trials if t.seconds is not None]
    if not measured:
        return f"{what} none of {len(trials)} configurations ran"
    best = min(measured, key=lambda t: t.seconds)
    builtin = next((t for t in measured if t.builtin), None)
    before = f", built in {builtin.config} {builtin.seconds * 1e6:.1f} us" if builtin else ""
    failed = len(trials) - len(measured)
    without = f", {failed} failed" if failed else ""
    return (
        f"{what} best of {len(measured)} {best.config} {best.seconds * 1e6:.1f} us{before}{without}"
    )


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)
