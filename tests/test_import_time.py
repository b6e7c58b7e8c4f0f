"""``import cupybnn`` is quick and brings in nothing that it can do without."""

import statistics
import subprocess
import sys

LIMIT = 0.050  # seconds beyond importing numpy
HEAVY = (
    "cupy",
    "sklearn",
    "scipy",
    "tqdm",
    "matplotlib",
    "tensorboard",
    "torch",
    "nvmath",
    "numba",
)


def fresh_process(code: str, folder) -> str:
    # -I: neither the environment's PYTHON* variables nor the current folder decide what is found.
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def seconds_of(statement: str, folder) -> float:
    code = (
        f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    )
    return float(fresh_process(code, folder))


def test_import_is_at_most_50_ms_slower_than_numpys(tmp_path):
    rounds = []
    for _ in range(3):  # another program on the machine only ever adds time: the best round counts
        ours, numpys = "from cupybnn import xnor_gemm", "import numpy"
        times = {numpys: [], ours: []}
        for _ in range(5):
            for statement, seconds in times.items():
                seconds.append(seconds_of(statement, tmp_path))
        rounds.append(statistics.median(times[ours]) - statistics.median(times[numpys]))
        if rounds[-1] <= LIMIT:
            return
    assert min(rounds) <= LIMIT, f"seconds beyond numpy, a round each: {rounds}"


def test_import_and_a_product_load_no_heavy_module(tmp_path):
    code = "import sys, cupybnn; cupybnn.xnor_gemm([[1]], [[1]]); print(*sys.modules)"
    loaded = fresh_process(code, tmp_path).split()
    assert "numpy" in loaded
    assert not set(HEAVY) & set(loaded)


def test_every_public_name_is_there(tmp_path):
    code = "import cupybnn; print(*[n for n in cupybnn.__all__ if not hasattr(cupybnn, n)])"
    assert fresh_process(code, tmp_path).split() == []


def test_command_line_help_loads_no_heavy_module(tmp_path):
    code = (
        "import sys\n"
        "from cupybnn.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as exit:\n    assert exit.code == 0\n"
        "print('MODULES', *sys.modules)"
    )
    loaded = fresh_process(code, tmp_path).partition("MODULES")[2].split()
    assert "cupybnn.cli.main" in loaded
    assert not set(HEAVY) & set(loaded)


def test_modules_are_found_without_importing_each(tmp_path):
    code = "import cupybnn; print(cupybnn.nn.Linear.__name__, hasattr(cupybnn, 'nonsense'))"
    assert fresh_process(code, tmp_path).split() == ["Linear", "False"]


def test_openblas_is_tuned_only_by_the_command_line_and_on_request(tmp_path):
    name = "OPENBLAS_THREAD_TIMEOUT"
    look = f"print(os.environ.get({name!r}))\n"
    spy = f"""
import builtins, os, sys
os.environ.pop({name!r}, None)
class Spy:
    def find_spec(self, module, *rest):
        if module == "numpy":
            {look}
sys.meta_path.insert(0, Spy())
"""

    def seen(code):
        return fresh_process(f"{spy}{code}\n{look}", tmp_path).split()

    ask = "import cupybnn; cupybnn.tune_process()"
    assert seen(ask) == ["16", "None"]
    assert seen(f"os.environ[{name!r}] = '20'; {ask}") == ["20", "20"]
    # With NumPy there already it would have no effect.
    assert seen(f"import numpy; {ask}") == ["None"] * 2
    assert seen("from cupybnn import xnor_gemm") == ["None"] * 2
    command = "from cupybnn.cli.main import main; main(['verify', '--kernel', 'none'])"
    assert seen(command) == ["16", "None"]


def test_freed_memory_is_kept_only_by_the_command_line_and_on_request(tmp_path):
    spy = """
import sys
import cupybnn
from cupybnn.backends import numpy_memory
numpy_memory.keep_freed = lambda: print("KEPT")
"""
    train = "dataset='digits', device='cpu', max_steps=1"
    assert "KEPT" not in fresh_process(f"{spy}cupybnn.train({train})", tmp_path)
    assert "KEPT" in fresh_process(f"{spy}cupybnn.tune_process()", tmp_path)
    command = "from cupybnn.cli.main import main; main(['info'])"
    assert "KEPT" in fresh_process(f"{spy}{command}", tmp_path)
