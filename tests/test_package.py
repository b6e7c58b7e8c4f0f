"""The package as users install it: wheel, sdist, editable install, source tree."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cupybnn
from cupybnn import extras

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="the tests do not lie in a source tree"
)

#: Run by each environment's Python: where cupybnn is, and the digest of each CUDA source it finds.
LOOK = """
import hashlib, json, cupybnn
from cupybnn.backends.cuda.sources import kernel_names, kernels_dir, translation_unit
folder = kernels_dir()
files = sorted([*folder.glob("*.cu"), *folder.glob("include/*.cuh")])
print(json.dumps({
    "package": cupybnn.__file__,
    "version": cupybnn.__version__,
    "names": kernel_names(),
    "units": {name: len(translation_unit(name)) for name in kernel_names()},
    "files": {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
              for f in files},
}))
"""


def sources() -> dict[str, str]:
    files = sorted([*KERNELS.rglob("*.cu"), *KERNELS.rglob("*.cuh")])
    assert files
    return {str(f.relative_to(KERNELS)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def execute(*command, **options) -> str:
    command = [str(c) for c in command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_messages_name_the_packages_of_the_extras():
    """The same packages, without their lower bounds and without this package itself."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = tomllib.loads(text)["project"]["optional-dependencies"]
    for extra, packages in extras._PACKAGES.items():
        wanted = []
        for each in declared[extra]:
            name, *bounds = re.split(r"(?=[<>])|,", each.partition(";")[0])
            if name.startswith("cupybnn["):
                continue
            wanted.append(name + "".join(bound for bound in bounds if bound.startswith("<")))
        assert shlex.split(packages) == wanted
    told = set(
        re.findall(
            r"to_install\(['\"]([\w-]+)",
            "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cupybnn").rglob("*.py")),
        )
    )
    assert told <= extras._PACKAGES.keys()
    assert extras.to_install("mpi") == "pip install mpi4py (the extra mpi)"


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Folder with an sdist built from the source tree and a wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    # Without isolation: the build needs hatchling, which the test extra brings, and no network.
    execute(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture
def fresh(tmp_path):
    """Make a virtual environment that has the dependencies but no cupybnn; return its Python."""
    home = tmp_path / "venv"
    execute(sys.executable, "-m", "venv", "--without-pip", home)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(
        execute(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")[:-1]
    )
    # The dependencies come from the environment of these tests. It is added as plain folders: their
    # own .pth files, an editable cupybnn's among them, have no effect.
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(folders) + "\n")
    return python


def look(python, folder, **env) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    return json.loads(execute(python, "-c", LOOK, cwd=folder, env=environment))


def install(python, *arguments):
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet"]
    # --ignore-installed: a cupybnn among the dependencies' folder is not the one to be tested.
    execute(*pip, "--no-index", "--no-build-isolation", "--ignore-installed", *arguments)


def is_under(path, folder) -> bool:
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def test_sdist_holds_everything_that_is_needed_to_build_and_test(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {"/".join(name.split("/")[1:]) for name in tar.getnames()}
    assert {f"kernels/{name}" for name in sources()} <= names
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert wanted | {"cupybnn/py.typed", "tests/conftest.py", ".ci/run"} <= names


def test_wheel_holds_the_package_and_nothing_else(dist):
    (archive,) = dist.glob("*.whl")
    assert archive.name == f"cupybnn-{cupybnn.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(archive) as wheel:
        names = wheel.namelist()
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        text = wheel.read(metadata).decode()
    assert {n.split("/")[0] for n in names} == {"cupybnn", metadata.split("/")[0]}
    assert {f"cupybnn/kernels/{name}" for name in sources()} <= set(names)
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "cupybnn").rglob("*.py")}
    assert modules == {n for n in names if n.endswith(".py")}
    required = {
        line.split()[1].split(">")[0]
        for line in text.splitlines()
        if line.startswith("Requires-Dist:") and ";" not in line
    }
    assert required == {"numpy", "scikit-learn", "tqdm"}


def test_wheel_in_a_fresh_environment(dist, fresh, tmp_path):
    (wheel,) = dist.glob("*.whl")
    install(fresh, wheel)
    found = look(fresh, tmp_path)
    assert is_under(found["package"], tmp_path / "venv")
    assert found["version"] == cupybnn.__version__
    assert found["files"] == sources()
    assert found["names"] == sorted(p.stem for p in KERNELS.glob("*.cu"))
    assert min(found["units"].values()) > 0

    script = fresh.parent / "cupybnn"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    assert execute(script, "info", cwd=tmp_path, env=clean).startswith("cupybnn ")
    out = execute(script, "verify", "--device", "cpu", cwd=tmp_path, env=clean)
    assert "comparisons are equal" in out


def test_editable_install_uses_the_sources_where_they_lie(fresh, tmp_path):
    install(fresh, "--editable", ROOT)
    found = look(fresh, tmp_path)
    assert is_under(found["package"], ROOT / "cupybnn")
    assert found["files"] == sources()
    # No copy of a kernel that an edit would leave behind.
    assert not [*(tmp_path / "venv").rglob("*.cu")]


def test_source_tree_without_an_install(fresh, tmp_path):
    found = look(fresh, tmp_path, PYTHONPATH=str(ROOT))
    assert is_under(found["package"], ROOT / "cupybnn")
    assert found["files"] == sources()


def test_missing_sources_are_reported_with_both_places(monkeypatch, tmp_path):
    from cupybnn.backends.cuda import sources as loader

    monkeypatch.setattr(cupybnn, "__file__", str(tmp_path / "cupybnn" / "__init__.py"))
    loader.kernels_dir.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match="neither has them") as caught:
            loader.kernels_dir()
    finally:
        loader.kernels_dir.cache_clear()
    assert str(tmp_path / "cupybnn" / "kernels") in str(caught.value)
    assert str(tmp_path / "kernels") in str(caught.value)
