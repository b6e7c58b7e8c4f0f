"""README and pages: examples run, and what is read from the code is complete."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from cupybnn import settings
from cupybnn.benchmark import record
from cupybnn.cli.main import COMMANDS
from cupybnn.estimator import parameters
from cupybnn.training import recipes

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [
    README,
    *(p for p in sorted(DOCS.rglob("*.md")) if not {"_build", "_generated"} & set(p.parts)),
]

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the tests do not lie in a source tree")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.usefixtures("own_quantizers")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Fewer steps of the same calls: where training leads to is for other tests.
    monkeypatch.setattr(parameters, "_UPDATES", 50)
    monkeypatch.setattr(parameters, "_FEWEST", 2)
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        if code.startswith(">>>"):
            continue  # a session with its output: test_sessions_print_what_they_show
        exec(compile(code.replace("max_steps=300", "max_steps=20"), str(page), "exec"), {})


@pytest.mark.usefixtures("own_quantizers")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_sessions_print_what_they_show(page):
    import doctest

    text = page.read_text(encoding="utf-8")
    sessions = [code for code in blocks(text, "python") if code.startswith(">>>")]
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for number, code in enumerate(sessions):
        test = doctest.DocTestParser().get_doctest(code, {}, f"{page.name}{number}", str(page), 0)
        assert runner.run(test).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_the_examples_are_accepted(page, capsys):
    from cupybnn.cli import main

    lines = [x for code in blocks(page.read_text(encoding="utf-8"), "sh") for x in code.split("\n")]
    for line in lines:
        command = re.search(r"(?:^|/bin/)cupybnn ([^#]*)", line)
        words = command[1].split() if command else []
        if words and "|" not in words:
            # argparse stops at --help after it has read everything before.
            with pytest.raises(SystemExit) as stopped:
                main.main([*words, "--help"])
            assert stopped.value.code == 0, (line, capsys.readouterr().err)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for document in (README, ROOT / "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
        assert not [x for x in links if "://" not in x and not (ROOT / x).exists()]


def test_options_that_the_pages_name_are_there(capsys):
    from cupybnn.cli import main

    there = set()
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main.main([name, "--help"])
        there |= set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    for page in PAGES:
        named = set(re.findall(r"`(--[a-z_]+)[` ]", page.read_text(encoding="utf-8")))
        named = {option.replace("--no_", "--") for option in named}
        assert named - {"--", "--l1", "--fast"} <= there, page


@pytest.fixture(scope="module")
def generate():
    pytest.importorskip("matplotlib", reason="draws the quantizers")
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("generate")
    finally:
        sys.path.remove(str(DOCS))
        sys.modules.pop("generate")
        sys.modules.pop("tables")


def test_every_command_and_option_has_its_place(generate):
    text = generate.command_sections() + generate.tables.options()
    assert all(f"## cupybnn {name}\n" in text for name in COMMANDS)
    assert {"--n_hidden", "--restore", "--onnx_target", "--invert", "--tune"} <= set(
        re.findall(r"--[a-z_]+", text)
    )


def test_every_environment_variable_is_described():
    read = set()
    for path in (ROOT / "cupybnn").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"environ(?:\.get\(|\[)\"([A-Z_0-9]+)\"", text)
        assert path.name == "settings.py" or not re.search(r"environ(\.get|\[)|getenv", text), path
        read |= set(found)
    assert len(read) >= 6
    read -= {"LOCALAPPDATA", "XDG_CACHE_HOME"}  # the system's, named in an entry
    assert read <= set(settings.VARIABLES)


def test_every_quantizer_has_an_entry(generate, tmp_path):
    text = generate.quantizer_sections(tmp_path)
    for kind in generate.quantizer_classes():
        assert f"## {kind.__name__}\n" in text
        assert generate.WHEN[kind.__name__]
    assert len(list(tmp_path.glob("*.svg"))) == len(generate.quantizer_classes()) >= 8
    assert text.count("**Source.** ") == text.count("**When to use it.** ") >= 8


def test_every_public_name_is_in_the_reference(generate, tmp_path):
    generate.reference(tmp_path / "reference")
    pages = {path.stem: path.read_text("utf-8") for path in (tmp_path / "reference").glob("*.rst")}
    for module in generate.MODULES:
        for name in importlib.import_module(module).__all__:
            if name != "__version__" and not hasattr(
                sys.modules.get(f"{module}.{name}"), "__file__"
            ):
                assert re.search(rf"\b{name}\b", pages[module]), (module, name)


def test_the_published_records_have_their_tables(generate, tmp_path):
    text = generate.tables.results(ROOT / "bench" / "results", tmp_path)
    for path in (ROOT / "bench" / "results").glob("*.json"):
        found = record.load(path)
        if found["gpu"]:
            assert found["gpu"]["name"] in text
    assert text.count("| ---") >= 2
    titles = re.findall(r"^## (\w+)", text, re.MULTILINE)
    kinds = ["Matrix", "Training", "Predictions"]
    assert titles == sorted(titles, key=kinds.index)  # products first
    assert re.search(r"^\| 8192³ \| ", text, re.MULTILINE)


def test_maps_of_products_are_shown(generate, tmp_path):
    text = generate.tables.maps(ROOT / "bench" / "results" / "maps", tmp_path)
    assert re.search(r"the least is \d\.\d; of all shapes, \d\.\d\d\.", text)
    assert (tmp_path / "map_h200.svg").exists()


def test_runs_of_recipes_are_in_a_table(generate, tmp_path):
    def run(seed, accuracy, **more):
        return {"seed": seed, "accuracy": accuracy, "seconds": 20.4 + seed, "device": "x", **more}

    runs = [run(0, 0.99), run(1, 0.992), run(2, 0.994)]
    shared = [run(3, 0.5, teachers=[0.75, 0.25], at_a_time=2), run(4, 0.5)]
    found = {
        "date": "2026-11-29T07:13:00+00:00",
        "machine": {"cpu": "a CPU", "devices": []},
        "recipes": {"b": {"runs": runs}, "a": {"runs": shared}},
    }
    (tmp_path / "one.json").write_text(json.dumps(found))
    rows = generate.tables.recipe_runs(tmp_path).splitlines()[2:]
    assert rows == [
        "| `a` | 3, 4 | 0.5000, 0.5000 | 0.7500, 0.2500 | 24; 23 (2 at a time) "
        "| a CPU, 2026-11-29 |",
        "| `b` | 0, 1, 2 | 0.9920 ± 0.0020 | – | 20 – 22 | a CPU, 2026-11-29 |",
    ]


@pytest.mark.parametrize("table", ["recipe_table", "recipe_runs"])
def test_the_tables_in_the_page_of_recipes_are_current(generate, table):
    folder = [ROOT / "bench" / "results" / "recipes"] if table == "recipe_runs" else []
    current = getattr(generate.tables, table)(*folder)
    heading = current.splitlines()[0]
    _, _, below = (DOCS / "recipes.md").read_text(encoding="utf-8").partition(heading)
    shown, _, _ = below.partition("\n\n")
    assert heading + shown == current, "python docs/tables.py prints the current table"


def test_a_table_of_the_recipes(generate):
    rows = generate.tables.recipe_table().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| `{name}`" for name in recipes.names()]
    assert all(re.search(r"\| 0\.9\d{3}( ± 0\.\d{4})? \| \w+ seeds", row) for row in rows)


def test_a_table_from_a_record(generate):
    rows = [
        {"method": "packed -> int32", "tops": 9123.4},
        {"method": "CuPy float32", "tops": 9.94},
        {"method": "torch fp8", "error": "needs N and K that are multiples of 16"},
    ]
    found = {
        "products": [{"m": 8191, "n": 8190, "k": 8001, "rows": rows}],
        "gpu": {"name": "NVIDIA H200"},
        "machine": {"torch": None, "cuda": {"driver": "580.1", "cupy": "14.2.0"}},
        "date": "2026-01-02T03:04:05+00:00",
    }
    text = "\n".join(generate.tables.products(found))
    assert "| M × N × K | packed → int32 | CuPy float32 |" in text
    assert "| 8191 × 8190 × 8001 | 9,123 | 9.9 |" in text


def test_a_table_from_a_record_of_training(generate):
    def row(library, product, how, rate):
        return {
            "library": library,
            "product": product,
            "how": how,
            "precision": "bfloat16" if how.endswith("graph") else "tf32",
            "examples_per_second": {"median": rate, "average": rate},
        }

    rows = [
        row("cupybnn", "xnor", "fused + graph", 30.04e6),
        row("cupybnn", "matmul", "fused + graph", 24.0e6),
        row("cupybnn", "matmul", "plain", 1.0e6),
        row("PyTorch", "matmul", "eager", 0.412e6),
        row("PyTorch", "matmul", "graph", 20.0e6),
        {**row("PyTorch", "matmul", "compiled + graph", 1), "error": "no compiler"},
    ]
    size = {"hidden": 512, "batch": 8192, "rows": rows, "over_pytorch": 1.502}
    size |= {"xnor_over_matmul": {"best": 1.252}, "memory_of_pytorch": None}
    found = {
        "kind": "train",
        "sizes": [size],
        "gpu": {"name": "NVIDIA H200"},
        "machine": {"torch": "2.13.0", "cuda": {"driver": "580.1", "cupy": "14.2.0"}},
        "date": "2026-01-02T03:04:05+00:00",
    }
    text = "\n".join(generate.tables.training(found))
    assert "bfloat16 and tf32 for cupybnn, tf32 and bfloat16 for PyTorch" in text
    assert "| 512, 8192 | 30.0 | 24.0 | 1.25 | 0.412 | 20.0 | – | 1.50 | – |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_steps_on_several_gpus_are_in_a_table(generate):
    found = record.load(ROOT / "bench" / "results" / "h200_scaling.json")
    found["counts"] = [1, 2]
    for row in found["rows"]:
        if (row["library"], row["hidden"], row["kind"], row["ranks"]) == (
            "cupybnn",
            8192,
            "weak",
            2,
        ):
            row |= {
                "step": {**row["step"], "median": 0.00789},
                "speedup": 1.936,
                "over_pytorch": 1.7,
            }
    text = "\n".join(generate.tables.scaling(found))
    assert re.search(
        r"^\| 8192, 8192 a GPU \| 2 \| 7\.89 \| 1\.94 \| .* \| 1\.70 \|$", text, re.MULTILINE
    )
    assert "| 8192, 8192 in all | 2 |" in text
    assert "in all | 1 |" not in text  # the same as with images a GPU
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
