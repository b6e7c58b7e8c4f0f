"""The README says what is: options, variables, examples, published figures."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cupybnn.benchmark import record
from cupybnn.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))  # not those of earlier code

pytestmark = pytest.mark.skipif(
    not README.is_file(), reason="the tests do not lie in a source tree"
)


def blocks(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def help_of(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cupybnn", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": ""},
    )
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described(command):
    options = set(re.findall(r"--[a-z_]+", help_of(command)))
    options -= {"--help", "--no_", "--log"}  # --log-dir stands in the text as a spelling
    missing = {o for o in options if f"`{o}" not in README.read_text(encoding="utf-8")}
    assert not missing


def test_every_option_described_is_there():
    text = README.read_text(encoding="utf-8")
    described = set(re.findall(r"`(--[a-z_]+)[` ]", text)) - {"--no_"}
    there = {o for c in COMMANDS for o in re.findall(r"--[a-z_]+", help_of(c))}
    assert described <= there


def test_every_environment_variable_is_in_the_table():
    code = (ROOT / "cupybnn" / "settings.py").read_text(encoding="utf-8")
    read = set(re.findall(r"environ\.get\(\"([A-Z_]+)\"", code)) | {"CUPYBNN_TEST_DATA"}
    assert len(read) >= 6
    text = README.read_text(encoding="utf-8")
    table = text.partition("## Environment variables")[2].partition("\n## ")[0]
    assert not {name for name in read if f"`{name}`" not in table}


def test_only_settings_reads_environment_variables():
    guilty = []
    for path in (ROOT / "cupybnn").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "settings.py" and re.search(r"environ(\.get|\[)|getenv", text):
            guilty.append(str(path.relative_to(ROOT)))
    assert guilty == []


@pytest.mark.parametrize("code", blocks("python") if README.is_file() else [])
def test_python_examples_run(code, tmp_path):
    # Fewer steps of the same calls: where training leads to is for other tests.
    code = code.replace("max_steps=300", "max_steps=20")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=300)


def test_commands_of_the_examples_are_accepted():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [re.sub(r" +#.*", "", x) for x in lines if re.match(r"(\.venv/bin/)?cupybnn ", x)]
    assert len(commands) >= 5
    for line in commands:
        name, *arguments = line.split()[1:]
        # argparse stops at --help after it has read everything before.
        done = subprocess.run(
            [sys.executable, "-m", "cupybnn", name, *arguments, "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_files_that_the_documents_link_to_exist():
    for document in (README, ROOT / "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
        assert not [x for x in links if "://" not in x and not (ROOT / x).exists()]


# --- the table of results


@pytest.fixture
def maker():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "bench/readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_options_is_what_the_settings_declare(maker):
    begin, end = maker.MARKERS["options"]
    text = README.read_text(encoding="utf-8")
    assert text.partition(begin + "\n")[2].partition("\n" + end)[0] == maker.options_table()


@pytest.mark.parametrize("kind", ["product", "train"])
def test_the_tables_are_those_of_the_published_records(maker, kind):
    tables = [
        maker.table(found, path)
        for path in RESULTS
        if record.kind_of(found := record.load(path)) == kind and found["gpu"]
    ]
    assert tables
    begin, end = maker.MARKERS[kind]
    text = README.read_text(encoding="utf-8")
    assert text.partition(begin + "\n")[2].partition("\n" + end)[0] == "\n\n".join(tables)


def test_a_table_from_a_record(maker, tmp_path):
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
    text = maker.table(found, tmp_path / "h200.json")
    assert "| M × N × K | packed -> int32 | CuPy float32 |" in text
    assert "| 8191 × 8190 × 8001 | 9,123 | 9.9 |" in text
    assert "![" not in text
    begin, end = maker.MARKERS["product"]
    new = maker.written(f"a\n{begin}\nold\n{end}\nb", text)
    assert new == f"a\n{begin}\n{text}\n{end}\nb"
    assert maker.written(new, text) == new
    with pytest.raises(ValueError, match="one is missing"):
        maker.written("no markers", text)


def test_a_table_from_a_record_of_training(maker, tmp_path):
    def row(library, product, how, rate):
        rates = {"median": rate, "average": rate}
        return {
            "library": library,
            "product": product,
            "how": how,
            "precision": "bfloat16" if how.endswith("graph") else "tf32",
            "examples_per_second": rates,
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
    text = maker.table(found, tmp_path / "h200-train.json")
    assert "(ours bfloat16 and tf32, PyTorch's tf32 and bfloat16)" in text
    assert "| 512, 8192 | 30.0 | 24.0 | 1.25 | 0.412 | 20.0 | – | 1.50 | – |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    begin, end = maker.MARKERS["train"]
    readme = README.read_text(encoding="utf-8")
    assert f"{begin}\n{text}\n{end}" in maker.written(readme, text, "train")
