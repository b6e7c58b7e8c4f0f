"""A benchmark's record as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cupybnn.text_table import table

__all__ = [
    "heading",
    "host",
    "lines",
    "original",
    "packing",
    "percent",
    "product",
    "starts",
    "summary",
    "time",
    "times",
    "torch_layers",
]


def time(seconds: float) -> str:
    """Format a time with at least three digits: 12.3 us, 4.56 ms, 1.23 s."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 1000:
            return f"{seconds * scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{seconds:.3g} s"


def _unit(record: dict[str, Any]) -> tuple[str, float]:
    """Return the unit of rates, and how many of it make a TOPS."""
    return ("TOPS", 1.0) if record["gpu"] else ("GOPS", 1e3)


def _rate(tops: float, scale: float) -> str:
    rate = tops * scale
    # Whole numbers from 1,000 on, because :.4g would format 12,513 with an exponent.
    return f"{rate:,.0f}" if rate >= 999.95 else f"{rate:#.4g}".rstrip(".")


def percent(share: float | None) -> str:
    """Format a fraction as a percentage; "" for None."""
    return "" if share is None else f"{100 * share:.0f} %"


def times(ratio: float | None) -> str:
    """Format a ratio: 1.23 x; "" for None."""
    if ratio is None:
        return ""
    return f"{ratio:.0f} x" if ratio >= 99.5 else f"{ratio:#.3g}".rstrip(".") + " x"


def heading(record: dict[str, Any]) -> Iterator[str]:
    """Yield device, versions and date."""
    facts = record["machine"]
    gpu = record["gpu"]
    if gpu:
        cuda = facts["cuda"]
        yield (
            f"{gpu['name']}, {gpu['arch']}, {gpu['multiprocessors']} multiprocessors; "
            f"driver {cuda['driver'] or 'unknown'}, CUDA {cuda.get('runtime_cuda')}, "
            f"CuPy {cuda['cupy']}, torch {facts['torch'] or 'not installed'}"
        )
    else:
        yield (
            f"NumPy {facts['numpy']} on {facts['cpu']}, {facts['cpus']} processors; "
            f"torch {facts['torch'] or 'not installed'}"
        )
    yield f"cupybnn {facts['cupybnn']}, Python {facts['python']}, {record['date']}"
    yield from record["notes"]
    if "copy" not in record:
        return
    copy = record["copy"]["bytes_per_second"]
    line = f"copy: {copy / 1e9:,.0f} GB/s read and written"
    if record.get("peak_operations_per_second"):
        line += (
            "; 1-bit peak as measured on an H200, scaled by the number of multiprocessors: "
            f"{record['peak_operations_per_second'] / 1e12:,.0f} TOPS"
        )
    yield line


def original(record: dict[str, Any]) -> Iterator[str]:
    """Yield the original program's table: times of single calls, from arrays to arrays."""
    rows = []
    for row in record["original"]:
        if "error" in row:
            rows.append([str(row["n"]), str(row["runs"]), row["error"], *[""] * 7])
            continue
        cells = [str(row["n"]), str(row["runs"])]
        for name in ("matmul", "xnor_gemm"):
            cells += [f"{row[name][key] * 1e3:.4f}" for key in ("mean", "std", "median")]
        rows.append([*cells, times(row["speedup_average"]), times(row["speedup_median"])])
    yield "matmul and xnor_gemm on float32 arrays, single calls, milliseconds"
    header = ["N", "runs"]
    header += [f"{n} {s}" for n in ("matmul", "xnor") for s in ("avg", "std", "med")]
    yield from table([*header, "speedup avg", "speedup med"], rows)


def product(record: dict[str, Any], result: dict[str, Any]) -> Iterator[str]:
    """Yield the table of one product of a record."""
    unit, scale = _unit(record)
    note = f", {result['note']}" if result["note"] else ""
    yield f"M x N x K = {result['m']} x {result['n']} x {result['k']} ({result['group']}{note})"
    header = [
        "",
        "median",
        "min",
        "p10",
        "p90",
        "issued",
        unit,
        "of peak",
        "of memory",
        "speedup",
    ]
    rows = []
    errors = []
    for row in result["rows"]:
        if "error" in row:
            errors.append(f"  {row['method']}: {row['error']}")
        if "throughput" not in row:
            continue
        t = row["throughput"]
        rows.append(
            [
                "  " + row["method"],
                *(time(t[key]) for key in ("median", "min", "p10", "p90")),
                time(row["issued"]["median"]),
                _rate(row["tops"], scale),
                percent(row.get("of_peak")),
                percent(row.get("of_memory")),
                times(row.get("speedup_throughput")),
            ]
        )
    yield from table(header, rows)
    yield from errors


def packing(record: dict[str, Any]) -> Iterator[str]:
    """Yield the bandwidth of packing."""
    size = record["packing"][0]["size"]
    yield f"pack {size} x {size}, bytes read and written"
    rows = []
    for row in record["packing"]:
        name = f"  {row['dtype']}, along {row['packed_along']}"
        if "error" in row:
            rows.append([name, row["error"], "", ""])
            continue
        rate = f"{row['bytes_per_second'] / 1e9:,.0f} GB/s"
        rows.append([name, time(row["median"]), rate, percent(row.get("of_copy"))])
    yield from table(["", "median", "rate", "of copy"], rows)


def host(record: dict[str, Any]) -> Iterator[str]:
    """Yield the host time of a call."""
    yield "host time per call, 64 x 64 operands"
    rows = [
        ["  " + row["call"], row["error"], ""]
        if "error" in row
        else ["  " + row["call"], time(row["median"]), time(row["min"])]
        for row in record["host"]
    ]
    yield from table(["", "median", "min"], rows)


def torch_layers(record: dict[str, Any]) -> Iterator[str]:
    """Yield the times of PyTorch's linear layers and of ours."""
    yield "torch: N inputs through a layer of N x N weights, packing of inputs included"
    rows, errors = [], []
    for row in record["torch"]:
        name = f"{row['layer']}, {row['how']}"
        if "error" in row:
            errors.append(f"  {row['size']} {name}: {row['error']}")
        if "call" in row:
            call, device = (time(row[key]["median"]) for key in ("call", "device"))
            over = times(row.get("over_linear"))
            rows.append([f"  {row['size']}", name, row["dtype"], call, device, over])
    yield from table(["N", "", "dtype", "call", "device", "over nn.Linear"], rows)
    yield from errors


def starts(record: dict[str, Any]) -> Iterator[str]:
    """Yield the times of the first call in a new process."""
    yield "first xnor_gemm in a new process (1024 x 1024 float32), including import cupybnn"
    for row in record["first_call"]:
        if "error" in row:
            yield f"  {row['cache']} cache: {row['error']}"
        else:
            yield (
                f"  {row['cache']} cache: {time(row['first_call'])}; "
                f"second call {time(row['second_call'])}"
            )


def summary(record: dict[str, Any]) -> Iterator[str]:
    """Yield one line per product: TOPS of each method."""
    methods: list[str] = []
    for result in record["products"]:
        methods += [r["method"] for r in result["rows"] if r["method"] not in methods]
    unit, scale = _unit(record)
    rows = []
    for result in record["products"]:
        tops = {r["method"]: r["tops"] for r in result["rows"] if "tops" in r}
        cells = [_rate(tops[m], scale) if m in tops else "-" for m in methods]
        rows.append([f"  {result['m']} x {result['n']} x {result['k']}", *cells])
    power = "1e12" if unit == "TOPS" else "1e9"
    yield f"{unit} (2 M N K / seconds / {power}), medians"
    yield from table(["M x N x K", *methods], rows)
    wrong = [
        f"  {r['method']} at {p['m']} x {p['n']} x {p['k']}: {r['error']}"
        for p in record["products"]
        for r in p["rows"]
        if r["ours"] and "error" in r
    ]
    checked = sum(bool(r.get("checked")) for p in record["products"] for r in p["rows"])
    yield f"{checked} timed results equal the exact product."
    if wrong:
        yield f"{len(wrong)} FAILED:"
        yield from wrong


def lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield the whole record."""
    yield from heading(record)
    if "original" in record:
        yield ""
        yield from original(record)
    for result in record["products"]:
        yield ""
        yield from product(record, result)
    sections = {
        "packing": packing,
        "host": host,
        "torch": torch_layers,
        "first_call": starts,
    }
    for key, section in sections.items():
        if key in record:
            yield ""
            yield from section(record)
    if record["products"]:
        yield ""
        yield from summary(record)
