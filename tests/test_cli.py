"""The command line's frame, ``info`` and ``verify``, run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupybnn
from cupybnn.backends.devices import CPU, Device, cuda_status
from cupybnn.cli import info, main, verify


def command(*arguments, env=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "cupybnn", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        check=False,
        **options,
    )


def test_help_lists_every_command():
    done = command("--help")
    assert done.returncode == 0
    for name in main.COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", sorted(main.COMMANDS))
def test_every_command_has_help(name):
    done = command(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: cupybnn {name}")


def test_version():
    done = command("--version")
    assert done.stdout == f"cupybnn {cupybnn.__version__}\n"


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("info", "--nonsense")])
def test_a_wrong_command_line_exits_with_2_and_usage(arguments):
    done = command(*arguments)
    assert done.returncode == 2
    assert "usage: cupybnn" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_argument_is_told_in_one_line():
    done = command("verify", "--device", "gpu")
    assert done.returncode == 2
    assert done.stderr.startswith("cupybnn verify: The 'device' must be")
    assert len(done.stderr.splitlines()) == 1


def test_too_little_memory_is_told_in_one_line():
    done = command("train", "--dataset", "digits", "--n_hidden", str(10**12))
    assert done.returncode == 1
    assert done.stderr.startswith("cupybnn train: out of memory. Unable to allocate")
    assert len(done.stderr.splitlines()) == 1


def test_an_error_below_cupybnn_keeps_its_traceback(monkeypatch):
    # Only a check of our own may be told in one line: this one would be a bug.
    monkeypatch.setattr(info, "lines", lambda: np.zeros(3).reshape(2))
    with pytest.raises(ValueError, match="reshape"):
        main.main(["info"])


def test_checks_of_what_the_command_line_sets_raise_the_class_that_it_tells_in_one_line():
    folder = Path(cupybnn.__file__).parent
    files = [*(folder / "cli").glob("*.py"), *(folder / "training" / "recipes").glob("*.py")]
    files += [folder / "training" / name for name in ("checks.py", "config.py")]
    for file in files:
        assert not re.search(r"raise (ValueError|TypeError)\b", file.read_text()), file


def test_a_reader_that_goes_away_is_no_traceback():
    script = f"{sys.executable} -m cupybnn verify --device cpu | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


# --- info


def test_info_names_versions_devices_kernels_and_folders(tmp_path):
    env = {"CUPYBNN_CACHE_DIR": str(tmp_path / "cache"), "CUPYBNN_DATA_DIR": str(tmp_path)}
    done = command("info", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = dict(re.findall(r"^(\S[^\n]{0,13}?) {2,}(\S.*)$", done.stdout, re.MULTILINE))
    assert rows["cupybnn"].startswith(cupybnn.__version__)
    assert rows["numpy"] == np.__version__
    assert rows["cache folder"] == f"{tmp_path / 'cache'} (not made yet)"
    assert rows["data folder"] == str(tmp_path)
    assert rows["CUDA"] == cuda_status().reason
    assert "CUPYBNN_DATA_DIR" in rows["environment"]
    assert re.search(r"^  kernels +numpy$", done.stdout, re.MULTILINE)


def run_with_fake_site(tmp_path, code="", distributions=()):
    """Run ``info`` where another module ``cupy`` and other installed packages come first."""
    if code:
        (tmp_path / "cupy.py").write_text(code)
    for name in distributions:
        folder = tmp_path / f"{name.replace('-', '_')}-14.2.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 14.2.0\n")
    package = os.path.dirname(os.path.dirname(cupybnn.__file__))
    path = os.pathsep.join([str(tmp_path), package])
    return command("info", env={"PYTHONPATH": path}, cwd=tmp_path)


def test_info_tells_of_two_cupy_wheels_in_one_sentence(tmp_path):
    names = ("cupy-cuda12x", "cupy-cuda13x")
    done = run_with_fake_site(tmp_path, "raise RuntimeError('wrong half')", names)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("CUDA"))
    assert "cupy-cuda12x, cupy-cuda13x" in line
    assert "uninstall all of them, then install one" in line
    assert re.search(r"device='auto' +cpu", done.stdout)
    assert "Traceback" not in done.stdout + done.stderr


def test_info_tells_of_a_cupy_that_sees_no_device(tmp_path):
    code = (
        "__version__ = '14.2.0'\n"
        "class cuda:\n"
        "    class runtime:\n"
        "        @staticmethod\n"
        "        def getDeviceCount(): raise RuntimeError('cudaErrorNoDevice: no device')\n"
        "        driverGetVersion = runtimeGetVersion = getDeviceCount\n"
        "    class nvrtc:\n"
        "        @staticmethod\n"
        "        def getVersion(): return (13, 0)\n"
    )
    done = run_with_fake_site(tmp_path, code)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("CUDA"))
    assert "sees no CUDA device" in line
    assert "cudaErrorNoDevice" in line
    assert re.search(r"  NVRTC +13.0", done.stdout)
    assert re.search(r"  cuda-bindings +(\d+\.\d|not installed, for the backward)", done.stdout)
    assert re.search(r"device='auto' +cpu", done.stdout)


def test_info_tells_in_plain_words_what_is_missing_beside_cupy(tmp_path):
    code = (
        "__version__ = '14.2.0'\n"
        "class cuda:\n"
        "    class runtime:\n"
        "        @staticmethod\n"
        "        def getDeviceCount(): raise RuntimeError('cudaErrorInsufficientDriver')\n"
        "        @staticmethod\n"
        "        def driverGetVersion(): return 0\n"
        "        @staticmethod\n"
        "        def runtimeGetVersion(): raise RuntimeError('not\\nthis')\n"
        "    class nvrtc:\n"
        "        @staticmethod\n"
        "        def getVersion():\n"
        "            raise RuntimeError('Failure finding \"libnvrtc.so\"')\n"
    )
    # This machine may have a driver: its own version is not read here.
    (tmp_path / "sitecustomize.py").write_text(
        "import cupybnn.machine\ncupybnn.machine._driver_version = lambda: None\n"
    )
    done = run_with_fake_site(tmp_path, code)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^  (NVRTC|runtime|driver) +(\S.*)$", done.stdout, re.MULTILINE))
    assert rows == {
        "NVRTC": "cannot be loaded, and without it no kernel can be compiled: install "
        "cupybnn[cuda13] or cupybnn[cuda12], which bring it along",
        "runtime": "cannot be loaded",
        "driver": "no NVIDIA driver found",
    }


@pytest.mark.parametrize(
    ("driver", "cuda", "expected"),
    [
        (None, None, "no NVIDIA driver found"),
        ("580.65.06", "13.0", "580.65.06, up to CUDA 13.0"),
        (None, "13.0", "of unknown version, up to CUDA 13.0"),
        ("580.65.06", None, "580.65.06, not usable by CUDA"),
    ],
)
def test_driver_in_words(driver, cuda, expected):
    assert info._driver(driver, cuda) == expected


def test_info_tells_of_a_cupy_that_cannot_be_imported(tmp_path):
    done = run_with_fake_site(tmp_path, "raise ImportError('libcublas.so.13 not found')")
    assert done.returncode == 0, done.stderr
    assert "cannot be imported: libcublas.so.13 not found" in done.stdout
    assert re.search(r"device='auto' +cpu", done.stdout)


@pytest.mark.gpu
def test_info_names_the_gpu_and_its_kernels():
    done = command("info")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^cuda:0 +.*sm_\d+, \d+ multiprocessors", done.stdout, re.MULTILINE)
    from cupybnn.backends import cuda

    assert ", ".join(cuda.kernels_for(Device("cuda", 0))) in done.stdout


# --- verify

#: Comparisons for each kernel.
COMPARISONS = sum(len(verify.kinds(case)) for case in verify.CASES)


def test_verify_on_numpy_has_a_line_for_each_case():
    done = command("verify", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    equal = [line for line in done.stdout.splitlines() if re.match("cpu .* equal [(]", line)]
    assert len(equal) == COMPARISONS
    assert f"All {len(equal)} comparisons are equal (numpy on cpu)." in done.stdout


@pytest.mark.gpu
def test_verify_runs_every_kernel_of_the_gpu():
    from cupybnn.backends import cuda

    done = command("verify", "--device", "cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in cuda.kernels_for(Device("cuda", 0)):
        lines = [x for x in done.stdout.splitlines() if re.match(f"cuda:0 +{kernel} ", x)]
        assert sum(" equal (" in line for line in lines) == COMPARISONS


def test_verify_names_the_first_element_that_differs(monkeypatch, capsys):
    product = verify._product

    def broken(a, b, kind, terms):
        result = product(a, b, kind, terms)
        if kind == "packed" and result.shape == (17, 31):
            result[4, 30] += 2
            result[9, 2] -= 2
        return result

    monkeypatch.setattr(verify, "_product", broken)
    assert main.main(["verify", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"packed +\(17, 33\) @ \(33, 31\)  DIFFERS at \[4, 30\]: xnor_gemm gives", out)
    assert "(2 of 527 elements differ)" in out
    assert f"1 of {COMPARISONS} comparisons FAILED" in out


def test_verify_tells_a_kernel_that_raises_and_goes_on(monkeypatch, capsys):
    product = verify._product

    def broken(a, b, *how):
        if a.shape == (3, 5):
            raise RuntimeError("illegal address")
        return product(a, b, *how)

    monkeypatch.setattr(verify, "_product", broken)
    assert main.main(["verify", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED: RuntimeError: illegal address") == 4
    assert out.count(" equal (") == COMPARISONS - 4


def test_verify_finds_a_wrong_scale_threshold_and_popcount(monkeypatch):
    """Each is set wrong in turn; then exactly the comparisons that it takes part in differ."""
    cases = (verify.Case((17, 33), (33, 31)), verify.Case((63,), (63,)))
    product = verify._product

    def outcomes(**wrong):
        def broken(a, b, kind, terms):
            return product(a, b, kind, {**terms, **{n: f(terms[n]) for n, f in wrong.items()}})

        monkeypatch.setattr(verify, "_product", broken if wrong else product)
        found = verify.check(CPU, "numpy", cases=cases[: 1 if wrong else 2])
        return [outcome.kind for outcome in found if outcome.problem]

    assert outcomes() == []
    for name in ("row", "column", "bias"):
        assert outcomes(**{name: lambda x: x + np.float32(1)}) == ["scaled"]
    assert outcomes(threshold=lambda x: x + 4) == ["signs"]
    assert outcomes(flip=lambda x: ~x) == ["signs"]
    miscounted = verify._with_counts
    monkeypatch.setattr(verify, "_with_counts", lambda s, n: miscounted(s, n + (n.dtype == "i4")))
    assert outcomes() == ["signs"]


def test_verify_finds_a_wrong_shape():
    assert "shape (2, 3)" in verify._difference(np.ones((2, 3)), np.ones((3, 2)))
    assert "at []" in verify._difference(np.float32(1), np.float32(3))
    assert verify._difference(np.float32(1), np.float32(1)) == ""


def test_verify_rejects_a_negative_seed():
    done = command("verify", "--seed", "-1")
    assert done.returncode == 2
    assert "'--seed' must be 0 or more; got -1" in done.stderr


def test_verify_rejects_a_kernel_that_is_not_there():
    done = command("verify", "--device", "cpu", "--kernel", "sm90_xnor_gemm")
    assert done.returncode == 2
    assert (
        "'--kernel' must name a kernel of this machine (numpy); got sm90_xnor_gemm" in done.stderr
    )


def test_verify_layouts_are_what_they_say():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    strided = verify._on_device(x, CPU, "strided")
    assert strided.strides == (2 * 9 * 4, 3 * 4)
    assert np.array_equal(strided, x)
    transposed = verify._on_device(x.T, CPU, "transposed")
    assert transposed.flags.f_contiguous
    assert np.array_equal(transposed, x.T)
