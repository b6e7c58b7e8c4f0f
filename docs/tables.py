"""Tables of the pages: options of ``cupybnn train``, and results from the records in ``bench``.

``python docs/tables.py`` prints those of ``recipes.md``, which stand in the page itself.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from cupybnn.benchmark import record as records
from cupybnn.training import recipes
from cupybnn.training.config import TrainConfig
from cupybnn.training.declaration import declared

ROOT = Path(__file__).resolve().parent.parent

#: The columns of the products' table, by the names of the methods in a record.
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


def options() -> str:
    """Return the table of the options of ``cupybnn train``, from the declared settings."""
    lines, heading = [], ""
    for name, each in declared(TrainConfig).items():
        if each.group != heading:
            heading = each.group
            lines += ["", f"### {heading.capitalize()}", ""]
            lines += ["| option | meaning | default |", "| --- | --- | --- |"]
        option = f"`--{name} {each.rule.metavar}".strip() + "`"
        if name == "data_dir":
            option = "`DATA_DIR`"
        lines.append(f"| {option} | {each.text} | {each.default_text} |".replace("|x|", r"\|x\|"))
    return "\n".join(lines)


def results(folder: Path, parts: Path) -> str:
    """Return a section for each record in `folder`; its chart is copied to `parts`.

    Products come first, and the newest record of a kind before older ones.
    """
    found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in _MAKERS}
    for path in folder.glob("*.json"):
        record = records.load(path)
        kind = records.kind_of(record)
        if kind in _MAKERS and record["gpu"]:
            section = "\n".join(_heading(path, record, parts) + _MAKERS[kind](record))
            found[kind].append((record["date"], section))
    ordered = (sorted(each, reverse=True) for each in found.values())
    return "\n\n".join(section for each in ordered for _, section in each)


def maps(folder: Path, parts: Path) -> str:
    """Return a section for each record of ``bench/product_map.py``; charts go to `parts`."""
    sections = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        ratios = {
            (cell["m"], cell["n"], cell["k"]): min(
                cell[peer] for peer in ("bfloat16", "fp8") if peer in cell
            )
            / cell["cupybnn"]
            for cell in record["cells"]
            if not cell["error"]
        }
        chart = f"map_{path.stem}.svg"
        shutil.copy(path.with_suffix(".svg"), parts / chart)
        deep = min(ratio for (_, _, k), ratio in ratios.items() if k >= 1024)
        sections.append(
            f"## Products of many shapes on one {record['gpu']['name']}\n\n"
            f"How many times as fast a packed product with an int32 result is as the fastest of "
            f"PyTorch's bfloat16 and fp8 products ({_when(record)}): {len(ratios)} shapes by "
            f"`python bench/product_map.py`. With K of 1024 or more, the least is {deep:.1f}; of "
            f"all shapes, {min(ratios.values()):.2f}.\n\n"
            f"```{{image}} /_generated/parts/{chart}\n:alt: Speedup by M, N and K\n```"
        )
    return "\n\n".join(sections)


def recipe_runs(folder: Path) -> str:
    """Return a table of the runs in the records of ``bench/recipes.py`` that are in `folder`."""
    lines = [
        "| recipe | seeds | test accuracy | its teachers | seconds a run | machine |",
        "| --- | ---: | --- | --- | --- | --- |",
    ]
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        machine = record["machine"]
        name = machine["devices"][0]["name"] if machine["devices"] else machine["cpu"]
        for recipe, found in sorted(record["recipes"].items()):
            runs = found["runs"]
            teachers = [accuracy for run in runs for accuracy in run.get("teachers", [])]
            cells = [
                f"`{recipe}`",
                ", ".join(str(run["seed"]) for run in runs),
                _spread([run["accuracy"] for run in runs]),
                _spread(teachers) if teachers else "–",
                _seconds(runs),
                f"{name}, {record['date'][:10]}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seconds(runs: list[dict[str, Any]]) -> str:
    """Return the times of runs, apart for each number of runs that shared the machine."""
    texts = []
    for shared in sorted({run.get("at_a_time", 1) for run in runs}):
        times = [round(run["seconds"]) for run in runs if run.get("at_a_time", 1) == shared]
        text = " – ".join(str(time) for time in sorted({min(times), max(times)}))
        texts.append(text + (f" ({shared} at a time)" if shared > 1 else ""))
    return "; ".join(texts)


def recipe_table() -> str:
    """Return a table of the recipes, and what each reached."""
    lines = ["| recipe | what it trains | test accuracy | measured |", "| --- | --- | --- | --- |"]
    for name in recipes.names():
        each = recipes.load(name)
        lines.append(f"| `{name}` | {each.summary} | {each.accuracy} | {each.measured} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    """Return mean and sample standard deviation, or fewer than three values as they are."""
    if len(values) < 3:
        return ", ".join(f"{value:.4f}" for value in values)
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def _heading(path: Path, record: dict[str, Any], parts: Path) -> list[str]:
    what = _TITLES[records.kind_of(record)]
    lines = [f"## {what} {record['gpu']['name']}", ""]
    chart = path.with_suffix(".svg")
    if chart.exists():
        shutil.copy(chart, parts)
        alt = what.removesuffix(" on one").removesuffix(":")
        lines += [f"```{{image}} /_generated/parts/{chart.name}\n:alt: {alt}\n```", ""]
    return lines


def _when(record: dict[str, Any]) -> str:
    versions = record["machine"]
    return (
        f"{record['date'][:10]}, driver {versions['cuda']['driver']}, CuPy "
        f"{versions['cuda']['cupy']}, PyTorch {versions['torch'] or 'not installed'}"
    )


def _number(tops: float) -> str:
    return f"{tops:,.0f}" if tops >= 9.95 else f"{tops:.1f}"


def products(record: dict[str, Any]) -> list[str]:
    """Return the lines of a table of products, with what was measured how above it."""
    present = [
        name
        for name in METHODS
        if any(r["method"] == name and "tops" in r for p in record["products"] for r in p["rows"])
    ]
    lines = [
        f"Rates in TOPS (2·M·N·K / seconds / 10¹²): medians of one run with all peers, operands "
        f"rotated out of the L2 cache ({_when(record)}). *packed* means operands or results as "
        f"bits; *float32* means arrays, packing included.",
        "",
        "| M × N × K | " + " | ".join(present).replace("->", "→") + " |",
        "| --- |" + " ---: |" * len(present),
    ]
    for product in record["products"]:
        tops = {r["method"]: r["tops"] for r in product["rows"] if "tops" in r}
        cells = [_number(tops[name]) if name in tops else "–" for name in present]
        lines.append(
            f"| {_shape(*(product[side] for side in 'mnk'))} | " + " | ".join(cells) + " |"
        )
    return lines


def _precisions(record: dict[str, Any], library: str) -> str:
    rows = [r for size in record["sizes"] for r in size["rows"] if r["library"] == library]
    found = list(dict.fromkeys(r["precision"] for r in rows)) or ["none"]
    return " and ".join(found)


def training(record: dict[str, Any]) -> list[str]:
    """Return the lines of a table of training steps, with what was measured how above it."""
    lines = [
        f"Million examples a second: medians of one run ({_when(record)}). Each figure is the "
        f"fastest of its precisions: {_precisions(record, 'cupybnn')} for cupybnn, "
        f"{_precisions(record, 'PyTorch')} for PyTorch. *memory* compares the device memory of "
        f"our fastest variant with PyTorch's fastest.",
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


def inference(record: dict[str, Any]) -> list[str]:
    """Return the lines of a table of predictions, with what was measured how above it."""
    peer = next(r for r in record["sizes"][0]["rows"] if r["library"] == "PyTorch")
    lines = [
        f"Microseconds a call of `net(x)` in a loop, on uint8 pixels: medians of one run "
        f"({_when(record)}). *real* and *binary* name the first layer; {peer['library']} replays "
        f"the same network, compiled in {peer['precision']}, as a CUDA graph.",
        "",
        "| hidden, batch | cupybnn, real | cupybnn, binary | PyTorch | times as fast |",
        "| --- |" + " ---: |" * 4,
    ]
    for size in record["sizes"]:
        ours = [r for r in size["rows"] if r["library"] == "cupybnn" and "call" in r]
        times = [1e6 * r["call"]["median"] for r in ours[:2]]
        others = [
            1e6 * r["call"]["median"]
            for r in size["rows"]
            if r["library"] == "PyTorch" and "call" in r
        ]
        ratios = [min(others) / time for time in times]
        cells = [*(f"{time:.1f}" for time in times), f"{min(others):.1f}"]
        cells.append(", ".join(f"{ratio:.2f}" for ratio in ratios))
        lines.append(f"| 3 × {size['hidden']}, {size['batch']} | " + " | ".join(cells) + " |")
    return lines


def _shape(m: int, n: int, k: int) -> str:
    return f"{m}³" if m == n == k else f"{m} × {n} × {k}"


def scaling(record: dict[str, Any]) -> list[str]:
    """Return the lines of a table of steps on several GPUs, with what was measured above it."""
    libraries = ("cupybnn", "PyTorch")
    lines = [
        f"Milliseconds a step, and examples a second as a multiple of those of one GPU: medians "
        f"of one run on GPUs of one host ({_when(record)}). PyTorch is DistributedDataParallel, "
        f"compiled, in bfloat16, without a CUDA graph; with few units its host is what takes so "
        f"long.",
        "",
        "| hidden, images | GPUs | cupybnn | gain | PyTorch | gain | ours / PyTorch |",
        "| --- |" + " ---: |" * 6,
    ]
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in record["rows"]:
        if "error" not in row and (row["kind"], row["ranks"]) != ("strong", record["counts"][0]):
            key = (row["hidden"], row["size"], row["kind"], row["ranks"])
            cases.setdefault(key, {})[row["library"]] = row
    for (hidden, size, kind, ranks), found in cases.items():
        cells = [f"{hidden}, {size} {'a GPU' if kind == 'weak' else 'in all'}", str(ranks)]
        for row in map(found.get, libraries):
            cells.append(f"{1e3 * row['step']['median']:#.3g}" if row else "–")
            cells.append(_ratio(row, "speedup"))
        lines.append(
            "| " + " | ".join([*cells, _ratio(found.get("cupybnn"), "over_pytorch")]) + " |"
        )
    return lines


def _ratio(row: dict[str, Any] | None, name: str) -> str:
    return f"{row[name]:.2f}" if row and name in row else "–"


_MAKERS = {"product": products, "train": training, "scaling": scaling, "infer": inference}
_TITLES = {
    "product": "Matrix products on one",
    "train": "Training on one",
    "scaling": "Training on several GPUs:",
    "infer": "Predictions on one",
}

if __name__ == "__main__":
    print(recipe_table(), recipe_runs(ROOT / "bench/results/recipes"), sep="\n\n")
