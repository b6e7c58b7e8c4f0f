"""Make the README's tables: of results, from records of ``cupybnn bench``, and of options.

    python bench/readme_table.py bench/results/h200.json           prints it
    python bench/readme_table.py bench/results/h200.json --write   writes it to the README
    python bench/readme_table.py --options --write                 options of cupybnn train

Several records of one kind, with different sizes, make several tables. If the record's folder has a
chart of the same name (.svg), it is placed above the table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cupybnn.benchmark import record as records
from cupybnn.files import atomic_write
from cupybnn.training.config import TrainConfig
from cupybnn.training.declaration import declared

ROOT = Path(__file__).resolve().parent.parent
#: The lines of the README that enclose the table of each kind of record.
MARKERS = {
    "product": ("<!-- results -->", "<!-- /results -->"),
    "train": ("<!-- training-results -->", "<!-- /training-results -->"),
    "options": ("<!-- options -->", "<!-- /options -->"),
}
METHODS = (
    "packed -> packed",
    "packed -> int32",
    "float32 -> float32",
    "CuPy float32",
    "CuPy TF32",
    "torch bfloat16",
    "torch int8",
    "torch fp8",
)
#: PyTorch's variants in the table of training.
TORCH = ("eager", "graph", "compiled + graph")


def number(tops: float) -> str:
    return f"{tops:,.0f}" if tops >= 9.95 else f"{tops:.1f}"


def table(record: dict[str, Any], path: Path) -> str:
    """Return the lines between the README's two markers."""
    relative = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
    lines = []
    training = records.kind_of(record) == "train"
    if path.with_suffix(".svg").exists():
        chart = relative.with_suffix(".svg").as_posix()
        what = "Throughput of training" if training else "Rates of matrix products"
        lines += [f"![{what} on one {record['gpu']['name']}]({chart})", ""]
    make = training_lines if training else product_lines
    link = f"[{relative.name}]({relative.as_posix()})"
    return "\n".join([*lines, *make(record, link)])


def when(record: dict[str, Any]) -> str:
    versions = record["machine"]
    return (
        f"{record['date'][:10]}, driver {versions['cuda']['driver']}, CuPy "
        f"{versions['cuda']['cupy']}, PyTorch {versions['torch'] or 'not installed'}"
    )


def product_lines(record: dict[str, Any], link: str) -> list[str]:
    present = [
        name
        for name in METHODS
        if any(r["method"] == name and "tops" in r for p in record["products"] for r in p["rows"])
    ]
    lines = [
        f"TOPS (2·M·N·K / seconds / 10¹²) on one {record['gpu']['name']}, medians of one run with "
        f"all peers, operands rotated out of the L2 cache: {when(record)}. "
        f'"packed" is operands or results as bits, "float32" arrays, packing included. The record, '
        f"made by `cupybnn bench`, with more products and what stands around them: {link}.",
        "",
        "| M × N × K | " + " | ".join(present) + " |",
        "| --- |" + " ---: |" * len(present),
    ]
    for product in record["products"]:
        tops = {r["method"]: r["tops"] for r in product["rows"] if "tops" in r}
        cells = [number(tops[name]) if name in tops else "–" for name in present]
        lines.append(
            f"| {product['m']} × {product['n']} × {product['k']} | " + " | ".join(cells) + " |"
        )
    return lines


def precisions(record: dict[str, Any], library: str) -> str:
    """Return the precisions of a library's variants, as text."""
    rows = [r for size in record["sizes"] for r in size["rows"] if r["library"] == library]
    found = list(dict.fromkeys(r["precision"] for r in rows)) or ["none"]
    return " and ".join(found)


def training_lines(record: dict[str, Any], link: str) -> list[str]:
    lines = [
        f"Million examples a second on one {record['gpu']['name']}, medians of one run; each the "
        f"fastest of its precisions (ours {precisions(record, 'cupybnn')}, PyTorch's "
        f"{precisions(record, 'PyTorch')}); memory that of our fastest as a part of the fastest "
        f"PyTorch's: {when(record)}. The record, made by `cupybnn bench train`, with every variant "
        f"and the kernels of a step: {link}.",
        "",
        "| hidden, batch | xnor | dense | xnor / dense | "
        + " | ".join(f"PyTorch {how}" for how in TORCH)
        + " | ours / PyTorch | memory |",
        "| --- |" + " ---: |" * (5 + len(TORCH)),
    ]
    for size in record["sizes"]:
        done = [r for r in size["rows"] if "error" not in r]
        kinds = [("cupybnn", product, None) for product in ("xnor", "matmul")]
        kinds += [("PyTorch", "matmul", how) for how in TORCH]
        rates = []
        for library, product, how in kinds:
            found = [
                r["examples_per_second"]["median"] / 1e6
                for r in done
                if (r["library"], r["product"]) == (library, product) and how in (None, r["how"])
            ]
            rates.append(f"{max(found):#.3g}".rstrip(".") if found else "–")
        ratios = [size["xnor_over_matmul"].get("best"), size["over_pytorch"]]
        ratios.append(size["memory_of_pytorch"])
        shares = ["–" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        cells = [*rates[:2], shares[0], *rates[2:], *shares[1:]]
        lines.append(f"| {size['hidden']}, {size['batch']} | " + " | ".join(cells) + " |")
    return lines


def options_table() -> str:
    """Return the table of the options of ``cupybnn train``, from the declared settings."""
    lines = ["| option | meaning | default |", "| --- | --- | --- |"]
    heading = ""
    for name, each in declared(TrainConfig).items():
        if each.group != heading:
            heading = each.group
            lines.append(f"| **{heading}** | | |")
        option = f"`--{name} {each.rule.metavar}".strip() + "`"
        if name == "data_dir":
            option = "`DATA_DIR`"
        lines.append(f"| {option} | {each.text} | {each.default_text} |".replace("|x|", r"\|x\|"))
    return "\n".join(lines)


def written(readme: str, text: str, kind: str = "product") -> str:
    """Return the README with `text` between the markers of a kind of record."""
    begin, end = MARKERS[kind]
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"The README must have the lines {begin} and {end}; one is missing.")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="*", metavar="record")
    parser.add_argument("--options", action="store_true", help="the table of options")
    parser.add_argument("--write", action="store_true", help="write the table to README.md")
    args = parser.parse_args()
    if args.options == bool(args.records):
        parser.error("give either records or --options")
    if args.options:
        return put(options_table(), "options", args.write)
    try:
        loaded = {path: records.load(path) for path in args.records}
    except (OSError, records.RecordError) as error:
        parser.error(str(error))
    kinds = {records.kind_of(record) for record in loaded.values()}
    if len(kinds) > 1:
        parser.error("the records must all be of one kind, product or train")
    if not all(record["gpu"] for record in loaded.values()):
        parser.error("the records must be of runs on a GPU")
    text = "\n\n".join(table(record, path) for path, record in loaded.items())
    return put(text, kinds.pop(), args.write)


def put(text: str, kind: str, write: bool) -> int:
    """Print a table, or write it to the README."""
    if not write:
        print(text)
        return 0
    readme = ROOT / "README.md"
    new = written(readme.read_text(encoding="utf-8"), text, kind)
    with atomic_write(readme) as file:
        file.write(new.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
