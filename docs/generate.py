"""Write the parts of the pages that are read from the code: nothing on them can be out of date.

``conf.py`` calls `write_all` before each build. Pages include what it writes below ``_generated``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tables

import cupybnn
from cupybnn.cli.main import COMMANDS
from cupybnn.cli.parser import Parser
from cupybnn.ops import quantizer as registry
from cupybnn.training import recipes

ROOT = Path(__file__).resolve().parent.parent

#: The modules of the API reference, with the heading of each.
MODULES = {
    "cupybnn": "The top level",
    "cupybnn.packed": "Packed matrices",
    "cupybnn.deploy": "Trained networks",
    "cupybnn.training": "Training",
    "cupybnn.training.measures": "Measures of binary networks",
    "cupybnn.training.stopping": "Early stopping",
    "cupybnn.parallel": "Several ranks",
    "cupybnn.nn": "Layers",
    "cupybnn.ops": "Operations",
    "cupybnn.optim": "Optimizers",
    "cupybnn.optim.schedules": "Learning rate schedules",
    "cupybnn.data": "Data sets",
    "cupybnn.autograd": "Automatic differentiation",
    "cupybnn.errors": "Errors",
}
if importlib.util.find_spec("torch") is not None:
    MODULES["cupybnn.torch"] = "PyTorch"


def write_all(folder: Path) -> None:
    """Write every generated page and part into `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    parts = folder / "parts"
    parts.mkdir(parents=True)
    (parts / "options.md").write_text(tables.options(), encoding="utf-8")
    (parts / "environment.md").write_text(environment(), encoding="utf-8")
    (parts / "recipes.md").write_text(recipe_sections(), encoding="utf-8")
    (parts / "commands.md").write_text(command_sections(), encoding="utf-8")
    (parts / "quantizers.md").write_text(quantizer_sections(parts), encoding="utf-8")
    (parts / "benchmarks.md").write_text(
        tables.results(ROOT / "bench/results", parts)
        + "\n\n"
        + tables.maps(ROOT / "bench/results/maps", parts),
        encoding="utf-8",
    )
    for name in ("CHANGELOG", "CONTRIBUTING"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        (parts / f"{name.lower()}.md").write_text(text, encoding="utf-8")
    reference(folder / "reference")
    browser(folder / "lite")
    shutil.copytree(
        ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_*")
    )


def browser(folder: Path) -> None:
    """Write JupyterLite's settings, with a wheel of this checkout: notebooks import that one."""
    folder.mkdir()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The wheel for the browser cannot be built: {done.stderr}")
    (wheel,) = folder.glob("*.whl")
    settings = {"PipliteAddon": {"piplite_urls": [str(wheel)]}}
    (folder / "jupyter_lite_config.json").write_text(json.dumps(settings), encoding="utf-8")


def environment() -> str:
    """Return the table of environment variables, from the docstring of `cupybnn.settings`."""
    rows = cupybnn.settings.VARIABLES.items()
    lines = ["| variable | meaning |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{name}` | {text} |" for name, text in rows)])


def command_sections() -> str:
    """Return a section for each command: what it does, its usage and its options."""
    sections = []
    for name, summary in COMMANDS.items():
        subparsers = Parser(prog="cupybnn").add_subparsers()
        importlib.import_module(f"cupybnn.cli.{name}").add_parser(subparsers)
        parser = subparsers.choices[name]
        lines = [f"(cupybnn-{name})=", f"## cupybnn {name}", ""]
        lines += [f"{summary[0].upper()}{summary[1:]}.", ""]
        if name == "train":
            lines += [
                "See [the options by topic](#options-of-cupybnn-train-by-topic). Besides:",
                "",
            ]
        else:
            lines += [_text(parser.description), ""]
        options = [action for action in parser._actions if action.dest != "help"]
        if name == "train":
            options = [each for each in options if each.dest in ONLY_ON_THE_COMMAND_LINE]
        if options:
            lines += ["| option | meaning |", "| --- | --- |", *map(_option_row, options), ""]
        if name != "train" and parser.epilog:
            lines += [_text(parser.epilog)]
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


#: Options of ``cupybnn train`` that are no settings of a run.
ONLY_ON_THE_COMMAND_LINE = (
    "recipe",
    "list_recipes",
    "gpu",
    "gpus",
    "ranks",
    "restarts",
    "export",
)


def _text(description: str) -> str:
    """Return a parser's text: a paragraph, or as it is if its lines are broken by hand."""
    text = description.strip()
    return f"```text\n{text}\n```" if "\n" in text else text


def _option_row(action: argparse.Action) -> str:
    names = action.option_strings or [action.metavar or action.dest.upper()]
    value = "" if action.nargs == 0 or not action.option_strings else action.metavar or ""
    if not value and action.choices and action.option_strings:
        value = "|".join(map(str, action.choices))
    spelled = ", ".join(f"`{name} {value}".strip() + "`" for name in names)
    meaning = (action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))
    cells = (cell.replace("|", r"\|") for cell in (spelled, meaning))
    return f"| {' | '.join(cells)} |"


def recipe_sections() -> str:
    """Return a section for each recipe: its file, whole."""
    sections = []
    for name in recipes.names():
        path = Path(recipes.__file__).parent / f"{name}.toml"
        text = path.read_text(encoding="utf-8").strip()
        summary = recipes.load(name).summary
        sections.append(f"### {name}\n\n{summary}.\n\n```toml\n{text}\n```")
    return "\n\n".join(sections)


def quantizer_sections(folder: Path) -> str:
    """Return an entry for each quantizer: names, formula, plot, paper; and draw the plots."""
    import matplotlib

    matplotlib.use("Agg")
    sections = []
    for kind in quantizer_classes():
        names = [name for name in registry.quantizer_names() if _class_of(name) is kind]
        _plot(kind, folder / f"{names[0]}.svg")
        sections.append(_quantizer_section(kind, names))
    return "\n\n".join(sections)


def quantizer_classes() -> list[type]:
    """Return the classes of the quantizers that come with cupybnn, the default first."""
    names = ("hard_tanh", *registry.quantizer_names())
    found = dict.fromkeys(_class_of(name) for name in names)
    return [kind for kind in found if kind.__module__.startswith("cupybnn.")]


def _class_of(name: str) -> type:
    return type(registry.get_quantizer(name))


def _quantizer_section(kind: type, names: list[str]) -> str:
    doc = inspect.getdoc(kind) or ""
    summary, _, rest = doc.partition("\n")
    # The sketch in the docstring is what a terminal can show of the plot below.
    formula = re.sub(r"::\n.*?(?=\n\n\S|\Z)", ".", rest, flags=re.DOTALL)
    formula = formula.partition("\nParameters\n")[0].partition("\nNotes\n")[0]
    paper = doc.partition("\nNotes\n-----\n")[2].partition("\n\n")[0]
    spelled = ", ".join(f"`{name}`" for name in sorted(names))
    where = f"{{class}}`cupybnn.ops.{kind.__name__}`"
    lines = [
        f"(quantizer-{names[0]})=",
        f"## {kind.__name__}",
        "",
        f"**{summary}** `--ste` {spelled}; {where}",
        "",
        formula.strip().rstrip(":.").replace("``", "`") + ".",
        "",
        f"```{{image}} /_generated/parts/{names[0]}.svg\n:alt: {kind.__name__} and its "
        f"pseudo-gradient\n:width: 520px\n```",
        "",
        f"**When to use it.** {WHEN[kind.__name__]}",
        "",
        f"**Source.** {' '.join(paper.split())}",
    ]
    return "\n".join(lines)


#: When each quantizer is a good choice: one entry for each class, or the build fails.
WHEN = {
    "SteSign": "The default, for weights and for activations. Latent weights outside the window "
    "stop learning, so clip them or keep the learning rate small.",
    "ClippedGrad": "To reproduce the TensorFlow program of 2017. Every weight learns forever; "
    "on MNIST it ends some four percent below `hard_tanh`.",
    "IdentitySign": "As a baseline in comparisons, and for weights that an optimizer bounds by "
    "other means.",
    "ApproxSign": "For activations of deeper networks: the gradient is largest where the sign is "
    "least certain.",
    "SwishSign": "When weights should be pushed away from 0: far from 0 the gradient changes its "
    "direction.",
    "MagnitudeAwareSign": "For weights, where each unit should keep its own scale. Not for "
    "activations.",
    "StochasticSign": "As a regularizer: the noise acts like dropout. Training takes a few more "
    "steps.",
    "EdeSign": "For long runs of a known length: all weights learn at first, and those near 0 at "
    "the end.",
}


def _plot(kind: type, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.0), layout="constrained")
    if kind.__name__ == "EdeSign":
        x = np.linspace(-2, 2, 801)
        axes.plot(x, np.sign(x), "k-", label="forward")
        for progress, color in ((0.0, "C0"), (0.5, "C1"), (0.8, "C2")):
            quantizer = kind()
            quantizer.progress = progress
            gradient = quantizer.pseudo_gradient(x, np.ones_like(x))
            axes.plot(x, gradient, f"{color}--", label=f"pseudo-gradient, progress {progress:g}")
        axes.set(xlabel="x", ylabel="value for a gradient of 1", title=kind.__name__)
        axes.legend()
    else:
        kind().plot(axes)
    figure.savefig(path, transparent=False)
    plt.close(figure)


def reference(folder: Path) -> None:
    """Write the API reference: a page for each module, and on it every public name."""
    folder.mkdir(parents=True)
    entries = []
    for name, title in MODULES.items():
        module = importlib.import_module(name)
        _write_module(folder / f"{name}.rst", module, title)
        first = _first_sentence(module)
        entries.append(f"* :doc:`{title} <{name}>`: ``{name}``. {first}")
    toctree = "\n".join(f"   {name}" for name in MODULES)
    text = (
        "API reference\n=============\n\n" + "\n".join(entries) + "\n\n"
        ".. toctree::\n   :hidden:\n\n" + toctree + "\n"
    )
    (folder / "index.rst").write_text(text, encoding="utf-8")


def _first_sentence(module: Any) -> str:
    text = " ".join((inspect.getdoc(module) or "").partition("\n\n")[0].split())
    return text if text.endswith(".") else f"{text}."


def _write_module(path: Path, module: Any, title: str) -> None:
    top = () if module is cupybnn else cupybnn.__all__  # documented once, there
    public = [n for n in module.__all__ if not n.startswith("__") and n not in top]
    elsewhere = [name for name in module.__all__ if name in top and name != "__version__"]
    kinds: dict[str, list[str]] = {"Functions": [], "Classes": [], "Others": []}
    for name in public:
        value = getattr(module, name)
        if inspect.ismodule(value):
            continue
        kind = "Classes" if inspect.isclass(value) else "Functions"
        kinds[kind if callable(value) else "Others"].append(name)
    lines = [title, "=" * len(title), "", f".. currentmodule:: {module.__name__}", ""]
    lines += [_first_sentence(module), ""]
    for kind, names in kinds.items():
        if not names:
            continue
        lines += [kind, "-" * len(kind), "", ".. autosummary::", "   :toctree: generated", ""]
        lines += [f"   {name}" for name in sorted(names, key=str.lower)]
        lines += [""]
    if elsewhere:
        links = ", ".join(f":py:obj:`cupybnn.{name}`" for name in elsewhere)
        lines += [f"At the top level, too: {links}.", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
