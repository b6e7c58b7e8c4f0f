"""The command line's frame, ``info`` and ``verify``, run as a user runs them."""

import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import pytest

import cupybnn
from cupybnn import machine, settings
from cupybnn.backends import devices
from cupybnn.backends.devices import CPU, Device, cuda_status
from cupybnn.cli import info, main, streams, verify
from cupybnn.extras import to_install
from cupybnn.training import TrainConfig, Trainer
from cupybnn.training.limits import needed_bytes


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


def test_a_wrong_argument_is_reported_in_one_line():
    done = command("verify", "--device", "gpu")
    assert done.returncode == 2
    assert done.stderr.startswith("cupybnn verify: The 'device' must be")
    assert len(done.stderr.splitlines()) == 1


def test_out_of_memory_is_reported_in_one_line(monkeypatch, capsys):
    def too_large():
        raise MemoryError("Unable to allocate 1. TiB")

    monkeypatch.setattr(info, "lines", too_large)
    assert main.main(["info"]) == 1
    assert capsys.readouterr().err == "cupybnn info: out of memory. Unable to allocate 1. TiB\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--batch_size", "9" * 20], "'batch_size'"),
        (["train", "--batch_size", str(10**8)], "'batch_size'"),
        (["train", "--n_hidden", "9" * 20], "'n_hidden'"),
        (["train", "--n_hidden", "9" * 4000], "'n_hidden'"),
        (["train", "--n_hidden", str(10**6), "--binary"], "'n_hidden'"),
        (["train", "--n_hidden", f"4,{'9' * 20},4"], "n_hidden = 4,99999999999999999999,4, hidden"),
        (["train", "--hidden_layers", "9" * 20], "'hidden_layers'"),
        (["train", "--hidden_layers", str(10**8), "--n_hidden", "1"], "'hidden_layers'"),
        (["bench", "train", "--sizes", f"512x{'9' * 20}"], "'batch_size'"),
        (["bench", "train", "--sizes", f"64x64,{'9' * 20}x64"], "'n_hidden'"),
    ],
)
def test_a_run_that_cannot_fit_into_memory_is_refused(arguments, named, capsys):
    more = ["--dataset", "digits", "--max_steps", "1"] if arguments[0] == "train" else []
    assert main.main([*arguments, "--device", "cpu", *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cupybnn {arguments[0]}: A run must fit into the memory of its device")
    assert named in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("options", [{}, {"binary": True}, {"dtype": "float64"}])
@pytest.mark.parametrize(
    "sizes", [{"n_hidden": 1500}, {"batch_size": 20000}, {"n_hidden": (1000, 1500)}]
)
def test_needed_memory_is_a_lower_bound(options, sizes):
    small = {"dataset": "digits", "n_hidden": 100, "max_steps": 1, "device": "cpu"}
    config = TrainConfig(**{**small, **sizes, **options})
    data = Trainer(config).dataset
    tracemalloc.start()
    try:
        Trainer(config, data=data).run()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / 10 < sum(needed_bytes(config, data.features, data.classes, CPU)) < peak


def test_memory_of_this_machine():
    assert 2**28 < machine.memory_bytes(CPU) <= 2**46


def test_other_errors_keep_their_traceback(monkeypatch):
    # Only a check of our own may be told in one line: this one would be a bug.
    monkeypatch.setattr(info, "lines", lambda: np.zeros(3).reshape(2))
    with pytest.raises(ValueError, match="reshape"):
        main.main(["info"])


def test_setting_checks_raise_setting_error():
    folder = Path(cupybnn.__file__).parent
    files = [*(folder / "cli").glob("*.py"), *(folder / "training" / "recipes").glob("*.py")]
    files += [folder / "training" / name for name in ("checks.py", "config.py")]
    for file in files:
        assert not re.search(r"raise (ValueError|TypeError)\b", file.read_text()), file


def test_a_closed_pipe_causes_no_traceback():
    script = f"{sys.executable} -m cupybnn verify --device cpu | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="closes streams by a shell")
@pytest.mark.parametrize(
    ("words", "closed"),
    [
        ("info", ">&-"),
        ("info", "2>&-"),
        ("train --dataset digits --max_steps 2 --log_dir log", "<&- >&- 2>&-"),
    ],
)
def test_standard_streams_may_be_missing(tmp_path, words, closed):
    package = os.path.dirname(os.path.dirname(cupybnn.__file__))
    script = f"{sys.executable} -m cupybnn {words} {closed}"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": package},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (done.stdout == "") == (">&-" in closed.split())


@pytest.mark.parametrize("words", [["info"], ["nonsense"], ["verify", "--seed", "-1"], ["--help"]])
def test_standard_streams_may_be_none(monkeypatch, words):
    """As under pythonw."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    try:
        code = main.main(words)
    except SystemExit as error:
        code = error.code
    assert code == (0 if words[0] in ("info", "--help") else 2)
    assert (sys.stdin, sys.stdout, sys.stderr) == (None, None, None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_unwritable_output_is_reported_once():
    script = f"{sys.executable} -m cupybnn info > /dev/full"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "cupybnn info: [Errno 28] No space left on device\n"


@pytest.mark.skipif(os.name == "nt", reason="names of files are bytes elsewhere only")
def test_undecodable_file_names_are_printed_with_escapes(tmp_path, monkeypatch):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", printed)
    words = ["train", "--dataset", "digits", "--max_steps", "1", "--log_dir", folder]
    assert main.main(words) == 0
    assert b"/\\udcff/" in printed.buffer.getvalue()
    assert printed.errors == "strict"
    assert os.path.isdir(folder)


def test_the_c_locale_prints_escapes_and_the_bytes_of_file_names(monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), "ascii", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdout", printed)
    assert main.main(["train", "--list_recipes"]) == 0
    assert b"0.9689 \\xb1 0.0021" in printed.buffer.getvalue()
    with streams.usable_streams():
        print(os.fsdecode(b"name \xff"))
        printed.flush()
    assert printed.buffer.getvalue().endswith(b"name \xff" + os.linesep.encode())
    assert printed.errors == "surrogateescape"


def test_commands_run_outside_the_main_thread(capsys):
    codes = []
    words = ["train", "--dataset", "digits", "--max_steps", "1", "--device", "cpu"]
    thread = threading.Thread(target=lambda: codes.append(main.main(words)))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("option", ["--gpu=--", "--seed=--", "--log-dir=--", "--restore=--"])
def test_two_dashes_are_not_a_value(option, capsys):
    command = "verify" if option == "--seed=--" else "train"
    with pytest.raises(SystemExit) as caught:
        main.main([command, option])
    assert caught.value.code == 2
    name = option.partition("=")[0]
    assert f"argument {name}: invalid value: '--'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--only="], ["train", "--only="], ["--only", ","]])
def test_naming_no_section_of_bench_is_an_error(words, capsys):
    assert main.main(["bench", *words]) == 2
    assert capsys.readouterr().err.startswith("cupybnn bench: The '")


@pytest.mark.parametrize("words", [["--sizes="], ["--json="], ["--chart", "a\0b"], ["--from", ""]])
def test_an_empty_option_of_bench_is_an_error(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["bench", *words])
    assert caught.value.code == 2
    assert "must " in capsys.readouterr().err


# --- info


def test_info_names_versions_devices_kernels_and_folders(tmp_path):
    env = {"CUPYBNN_CACHE_DIR": str(tmp_path / "cache"), "CUPYBNN_DATA_DIR": str(tmp_path)}
    done = command("info", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = dict(re.findall(r"^(\S[^\n]{0,13}?) {2,}(\S.*)$", done.stdout, re.MULTILINE))
    assert rows["cupybnn"].startswith(cupybnn.__version__)
    assert rows["numpy"] == np.__version__
    assert rows["cache folder"] == f"{tmp_path / 'cache'} (not created yet)"
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


def test_info_reports_two_cupy_wheels_in_one_sentence(tmp_path):
    names = ("cupy-cuda12x", "cupy-cuda13x")
    done = run_with_fake_site(tmp_path, "raise RuntimeError('wrong half')", names)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("CUDA"))
    assert "cupy-cuda12x, cupy-cuda13x" in line
    assert "uninstall all of them, then install one" in line
    assert re.search(r"device='auto' +cpu", done.stdout)
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("where", ["cupy.py", "cupy/__init__.py"])
def test_another_module_named_cupy_is_not_cupy(tmp_path, where):
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("")
    done = run_with_fake_site(tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("CUDA"))
    assert f"CuPy is not installed (the file {tmp_path / where} is imported" in line
    assert re.search(r"device='auto' +cpu", done.stdout)


def test_an_empty_folder_named_cupy_is_not_cupy(tmp_path, monkeypatch, capsys):
    """What Python makes of one: a namespace package."""
    (tmp_path / "cupy").mkdir()
    space = importlib.util.module_from_spec(PathFinder.find_spec("cupy", [str(tmp_path)]))
    monkeypatch.setitem(sys.modules, "cupy", space)
    status = cuda_status.__wrapped__()
    assert not status.available
    assert status.cupy_version is None
    assert f"(the folder {tmp_path / 'cupy'} is imported in its place)" in status.reason
    assert len(status.reason.splitlines()) == 1
    monkeypatch.setattr(devices, "cuda_status", lambda: status)
    monkeypatch.setattr(machine, "cuda_status", lambda: status)
    monkeypatch.setattr(info, "cuda_status", lambda: status)
    monkeypatch.setattr(verify, "cuda_status", lambda: status)
    for command in (["info"], ["train", "--dataset", "digits", "--max_steps", "1"]):
        assert main.main(command) == 0
    assert devices.resolve("auto") == CPU
    assert not devices.is_cupy(np.zeros(1))
    assert main.main(["verify", "--device", "cuda"]) == 1
    assert status.reason in capsys.readouterr().err


@pytest.mark.parametrize("raised", ["raise SystemExit(3)", "raise RuntimeError", "\0"])
def test_info_survives_whatever_importing_cupy_raises(tmp_path, raised):
    done = run_with_fake_site(tmp_path, raised)
    assert done.returncode == 0, done.stderr
    assert re.search(r"CUDA +CuPy is installed but cannot be imported: .", done.stdout)


def test_info_without_a_home_folder_shows_the_temporary_one(monkeypatch, tmp_path, capsys):
    def nobody(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "CUPYBNN_CACHE_DIR", "CUPYBNN_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    pwd = pytest.importorskip("pwd")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(pwd, "getpwnam", nobody)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert main.main(["info"]) == 0
    assert str(tmp_path / f"cupybnn-{os.getuid()}") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "threads"),
    [("3", 3), ("4,2", 4), ("007", 7), ("9" * 9, 1024), ("9" * 5000, None), ("0", None)],
)
def test_number_of_threads_from_the_environment(monkeypatch, value, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    number = settings.cpu_threads.__wrapped__()
    assert number == threads if threads else 1 <= number <= 8


def test_info_reports_a_cupy_without_devices(tmp_path):
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
    assert re.search(
        r"  cuda-bindings +(\d+\.\d|not installed; enables the 1-bit backward)", done.stdout
    )
    assert re.search(r"device='auto' +cpu", done.stdout)


def test_info_reports_missing_cupy_extras(tmp_path):
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
        "NVRTC": f"cannot be loaded, but is needed to compile kernels: {to_install('cuda13')}, or "
        "the extra cuda12, which include it",
        "runtime": "cannot be loaded",
        "driver": "no NVIDIA driver found",
    }


@pytest.mark.parametrize(
    ("driver", "cuda", "expected"),
    [
        (None, None, "no NVIDIA driver found"),
        ("580.65.06", "13.0", "580.65.06, up to CUDA 13.0"),
        (None, "13.0", "unknown version, up to CUDA 13.0"),
        ("580.65.06", None, "580.65.06, not usable by CUDA"),
    ],
)
def test_driver_in_words(driver, cuda, expected):
    assert info._driver(driver, cuda) == expected


def test_info_reports_a_cupy_that_cannot_be_imported(tmp_path):
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


def test_verify_reports_a_kernel_that_raises_and_continues(monkeypatch, capsys):
    product = verify._product

    def broken(a, b, *how):
        if a.shape == (3, 5):
            raise RuntimeError("illegal address")
        return product(a, b, *how)

    monkeypatch.setattr(verify, "_product", broken)
    assert main.main(["verify", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED: RuntimeError: illegal address") == 5
    assert out.count(" equal (") == COMPARISONS - 5


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
    assert outcomes(times=lambda x: 4 - x) == ["levels"]
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
    assert "'--seed' must be at least 0; got -1" in done.stderr


def test_verify_rejects_an_unknown_kernel():
    done = command("verify", "--device", "cpu", "--kernel", "sm90_xnor_gemm")
    assert done.returncode == 2
    assert (
        "'--kernel' must be one that this machine can run (numpy); got sm90_xnor_gemm"
        in done.stderr
    )


def test_verify_layouts_have_the_named_strides():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    strided = verify._on_device(x, CPU, "strided")
    assert strided.strides == (2 * 9 * 4, 3 * 4)
    assert np.array_equal(strided, x)
    transposed = verify._on_device(x.T, CPU, "transposed")
    assert transposed.flags.f_contiguous
    assert np.array_equal(transposed, x.T)
