"""Make the README's table of results from the record of a run of ``cupybnn bench``.

    python bench/readme_table.py bench/results/h200.json           prints it
    python bench/readme_table.py bench/results/h200.json --write   puts it into the README

The chart of the same name (.svg) stands above the table if it lies beside the record.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cupybnn.benchmark import record as records
from cupybnn.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
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


def number(tops: float) -> str:
    return f"{tops:,.0f}" if tops >= 9.95 else f"{tops:.1f}"


def table(record: dict[str, Any], path: Path) -> str:
    """Return the lines between the README's two markers."""
    present = [
        name
        for name in METHODS
        if any(r["method"] == name and "tops" in r for p in record["products"] for r in p["rows"])
    ]
    gpu = record["gpu"]
    versions = record["machine"]
    relative = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
    lines = []
    if path.with_suffix(".svg").exists():
        chart = relative.with_suffix(".svg").as_posix()
        lines += [f"![Rates of matrix products on one {gpu['name']}]({chart})", ""]
    lines += [
        f"TOPS (2·M·N·K / seconds / 10¹²) on one {gpu['name']}, medians of one run with all peers, "
        f"operands rotated out of the L2 cache: {record['date'][:10]}, driver "
        f"{versions['cuda']['driver']}, CuPy {versions['cuda']['cupy']}, PyTorch "
        f'{versions["torch"] or "not installed"}. "packed" is operands or results as bits, '
        f'"float32" arrays, packing included. The record, made by `cupybnn bench`, with more '
        f"products and what stands around them: [{relative.name}]({relative.as_posix()}).",
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
    return "\n".join(lines)


def written(readme: str, text: str) -> str:
    """Return the README with `text` between the markers."""
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"The README must hold the lines {BEGIN} and {END}; one is missing.")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    args = parser.parse_args()
    record = records.load(args.record)
    if not record["gpu"]:
        parser.error("the record is of a run without a GPU")
    text = table(record, args.record)
    if not args.write:
        print(text)
        return 0
    readme = ROOT / "README.md"
    new = written(readme.read_text(encoding="utf-8"), text)
    with atomic_write(readme) as file:
        file.write(new.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
