"""``cupybnn bench``: what it measures is right, and nothing that fails is lost or hidden."""

import contextlib
import copy
import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edits import edit
from measuring import briefly

from cupybnn.backends.cuda.architectures import smxx
from cupybnn.backends.devices import CPU, Device
from cupybnn.benchmark import (
    chart,
    methods,
    overheads,
    products,
    record,
    shapes,
    tables,
    torch_layers,
)
from cupybnn.benchmark.clock import HostClock, make_clock
from cupybnn.benchmark.products import Limits, measure
from cupybnn.benchmark.shapes import Shape
from cupybnn.cli import main

SMALL = Shape("ragged", 37, 29, 130)
NUMPY_METHODS = methods.methods_for(CPU)[0]


def device_for(xp):
    return CPU if xp is np else Device("cuda", 0)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run the command once on the CPU; return its output and its record."""
    path = tmp_path_factory.mktemp("bench") / "record.json"
    with contextlib.redirect_stdout(io.StringIO()) as out, briefly():
        assert main.main(["bench", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    return out.getvalue(), json.loads(path.read_text())


def test_record_has_machine_versions_and_date(quick):
    _, found = quick
    assert found["format"] == record.FORMAT
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    assert found["machine"]["numpy"] == np.__version__
    assert found["machine"]["cpus"] >= 1
    assert found["device"] == "cpu"
    assert found["gpu"] is None


def test_record_has_every_section_without_errors(quick):
    _, found = quick
    assert {p["group"] for p in found["products"]} == set(shapes.GROUPS)
    rows = [r for p in found["products"] for r in p["rows"]]
    rows += found["original"] + found["packing"] + found["host"] + found["first_call"]
    assert not [r for r in rows if "error" in r]
    assert [r["n"] for r in found["original"]] == list(shapes.original_sizes(False, True))
    assert [r["cache"] for r in found["first_call"]] == ["cold", "warm", "warm"]


def test_all_our_timed_products_are_checked(quick):
    out, found = quick
    ours = [r for p in found["products"] for r in p["rows"] if r["ours"]]
    assert len(ours) == 4 * len(found["products"])
    assert all(r["checked"] for r in ours)
    assert f"{len(ours)} timed results equal the exact product." in out


def test_figures_follow_from_times(quick):
    _, found = quick
    for product in found["products"]:
        baseline = next(r for r in product["rows"] if r["method"] == "NumPy float32")
        for row in product["rows"]:
            seconds = row["throughput"]["median"]
            work = 2 * product["m"] * product["n"] * product["k"]
            assert row["tops"] == pytest.approx(work / seconds / 1e12)
            ratio = baseline["throughput"]["median"] / seconds
            assert row["speedup_throughput"] == pytest.approx(ratio)
            assert row["throughput"]["min"] <= seconds <= row["throughput"]["p90"]
    for row in found["original"]:
        ratio = row["matmul"]["median"] / row["xnor_gemm"]["median"]
        assert row["speedup_median"] == pytest.approx(ratio)


def test_without_a_gpu_a_note_says_that_numpy_is_measured(quick):
    out, found = quick
    assert out.startswith("NumPy ")
    if found["machine"]["cuda"]["available"]:
        pytest.skip("there is a GPU here")
    assert "NumPy is measured, because there is no usable GPU: " in out


def test_the_tables_can_be_shown_again_from_the_record(quick, tmp_path, capsys):
    out, found = quick
    path = tmp_path / "record.json"
    record.save(found, path)
    assert main.main(["bench", "--from", str(path)]) == 0
    again = capsys.readouterr().out
    for line in tables.original(found):
        assert line in out
        assert line in again


@pytest.mark.parametrize(
    ("tops", "scale", "written"),
    [
        (12512.9, 1.0, "12,513"),
        (1723.5, 1.0, "1,724"),
        (999.96, 1.0, "1,000"),
        (52.0, 1.0, "52.00"),
        (1.486, 1.0, "1.486"),
        (0.0918, 1e3, "91.80"),
        (0.00000123, 1e3, "0.001230"),
    ],
)
def test_rates_are_written_without_an_exponent(tops, scale, written):
    assert tables._rate(tops, scale) == written


def test_only_the_sections_asked_for(tmp_path):
    with briefly():
        found = record.run(CPU, quick=True, only=["host"])
    assert found["products"] == []
    assert "host" in found
    assert not {"original", "packing", "first_call"} & set(found)


def test_a_section_that_fails_leaves_a_note_and_the_others(monkeypatch):
    def fail(device, clock):
        raise RuntimeError("the GPU has fallen off the bus")

    monkeypatch.setattr(record, "host_time", fail)
    with briefly():
        found = record.run(CPU, quick=True, only=["host", "packing"])
    assert "host failed: RuntimeError: the GPU has fallen off the bus" in found["notes"]
    assert "host" not in found
    assert "bytes_per_second" in found["packing"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "cubes"], "'only' must name sections of original, square, .*; got 'cubes'"),
        (["--json", "nowhere/x.json"], "'--json' must be in an existing folder"),
        (["--chart", "nowhere/x"], "'--chart' must be in an existing folder"),
        (["--json", "."], "'--json' must be a file; got the folder '.'"),
        (["--chart", "."], "'--chart' must be a file; got the folder '.'"),
        (["--chart", "x", "--only", "host,mlp"], "'--chart' needs the section 'square'"),
        (["--tune", "--device", "cpu"], "'--tune' needs a GPU"),
        (["--from", __file__], "must be JSON"),
    ],
)
def test_wrong_arguments_are_reported_before_measuring(arguments, message, capsys, tmp_path):
    assert main.main(["bench", "--quick", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_tuning_without_a_gpu_gives_the_reason(monkeypatch, capsys):
    from cupybnn.backends.devices import CudaStatus
    from cupybnn.cli import bench

    monkeypatch.setattr(bench, "resolve", lambda name: CPU)
    monkeypatch.setattr(bench, "cuda_status", lambda: CudaStatus(False, "The driver is too old."))
    assert main.main(["bench", "--tune"]) == 2
    said = capsys.readouterr().err
    assert "'--tune' needs a GPU, because it measures CUDA kernels" in said
    assert said.endswith("got cpu. The driver is too old.\n")


def test_an_interrupted_run_leaves_a_readable_record(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "original_table", interrupt)
    path = str(tmp_path / "r.json")
    assert main.main(["bench", "--quick", "--device", "cpu", "--json", path]) == 130
    capsys.readouterr()
    assert main.main(["bench", "--from", path]) == 0
    assert "copy: " in capsys.readouterr().out


def test_a_record_without_its_parts_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"format": 1, "gpu": null}')
    with pytest.raises(ValueError, match=r"a complete record .* lacks date, machine, notes"):
        record.load(path)


def test_a_record_of_another_format_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="must be a record of cupybnn bench, format 1"):
        record.load(path)


RESULTS = Path(__file__).parents[1] / "bench" / "results"
PUBLISHED = sorted(RESULTS.rglob("*.json"))


def small(path) -> dict:
    """Return a published record with few products or sizes, so that an edit meets any part."""
    found = json.loads(path.read_text())
    for name in ("products", "sizes"):
        if name in found:
            found[name] = found[name][:2]
            for part in found[name]:
                best = part.get("best", {"": 3})
                part["rows"] = part["rows"][: 1 + max(best.values())]
    return found


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_an_edited_record_is_shown_or_raises_record_error(path, tmp_path, capsys):
    whole, edited = small(path), tmp_path / "edited.json"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(75):
        found = copy.deepcopy(whole)
        edit(found, rng)
        edited.write_text(json.dumps(found))
        try:
            record.load(edited)
        except record.RecordError as error:
            refused += 1
            message = str(error)
            assert "\n" not in message
            assert len(message) < 600
            continue
        assert main.main(["bench", "--from", str(edited)]) in (0, 1)
    assert refused > 30
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tops": ', '"tops": -', r"products\[0\]\.rows\[0\]\.tops must be a finite number from"),
        ('"tops": ', '"tips": ', r"rows\[0\] lacks tops"),
        ('"median": ', '"median": 1e999, "x": ', "median must be a finite number"),
        ('"median": ', '"median": NaN, "x": ', "NaN is not a valid JSON number"),
        ('"notes": [', '"notes": 3, "x": [', "notes must be a list"),
        ('"notes": [', '"notes": ["\\u001b[2J"], "x": [', r"notes\[0\] must be a printable text"),
        ('"notes": [', '"notes": [], "x": ' + "[" * 9000 + "[", "nested more than 32 levels deep"),
        ('"kind": "product"', '"kind": "train"', "it lacks method, sizes"),
        ('"kind": "product"', '"kind": "other"', "kind must be one of 'product'"),
    ],
)
def test_the_first_fault_of_a_record_is_named(old, new, message, tmp_path, capsys):
    path = tmp_path / "x.json"
    content = (RESULTS / "h200.json").read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))
    assert main.main(["bench", "--from", str(path)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"3", b"null", b'"format"', b"{}"])
def test_other_files_are_not_records(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(record.RecordError, match="record of cupybnn bench"):
        record.load(tmp_path / "x")


def test_records_are_written_to_pipes_and_devices(tmp_path, capfd):
    """To a device, through a link, into a pipe: nothing is replaced by a file."""
    found = small(RESULTS / "h200.json")
    record.save(found, "/dev/null")
    (tmp_path / "link").symlink_to("target")
    record.save(found, tmp_path / "link")
    assert record.load(tmp_path / "target") == found
    arguments = ["bench", "--quick", "--device", "cpu", "--only", "host", "--json", "/dev/fd/1"]
    with briefly():
        assert main.main(arguments) == 0
    text = capfd.readouterr().out
    (whole,) = re.findall(r"^\{$.*?^\}$", text, re.MULTILINE | re.DOTALL)  # once, not each time
    assert "host" in json.loads(whole)


@pytest.mark.parametrize("option", ["--json", "--chart", "--from"])
@pytest.mark.parametrize("path", ["a\0b", "~nosuchuser/x", ""])
def test_invalid_paths(option, path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main(["bench", "--quick", option, path])
    assert re.search(f"argument {option}: .*path", capsys.readouterr().err)


# --- one product


@pytest.mark.parametrize("method", methods.OURS, ids=lambda m: m.name)
def test_each_of_our_methods_gives_the_exact_product(xp, method):
    device = device_for(xp)
    for shape in (SMALL, Shape("skinny", 1, 200, 1025)):
        prepared = method.prepare(shape, device, 3)
        for call in prepared.calls:
            call()
        assert products.wrong_element(prepared, device) == ""
        assert len({id(result) for result in prepared.results}) == 3


@pytest.mark.parametrize("method", methods.OURS, ids=lambda m: m.name)
def test_a_wrong_result_is_found_and_named(method):
    prepared = method.prepare(SMALL, CPU, 1)
    prepared.calls[0]()
    result = prepared.results[0]
    if method.name == "packed -> packed":
        result.words.reshape(-1)[0] ^= 1
        where = "[0, 0]"
    else:
        result[36, 28] += 2
        where = "[36, 28]"
    assert f"wrong result at {where}" in products.wrong_element(prepared, CPU)


def test_a_wrong_result_makes_the_command_fail(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(products, "wrong_element", lambda *_: "wrong result at [0, 0]: 1 not 2")
    path = tmp_path / "r.json"
    only = ["--only", "skinny", "--quick", "--device", "cpu", "--json", str(path)]
    with briefly():
        assert main.main(["bench", *only]) == 1
    assert "4 FAILED:" in capsys.readouterr().out
    assert not any(r.get("checked") for r in json.loads(path.read_text())["products"][0]["rows"])


def test_a_peer_that_fails_leaves_its_error_and_the_others_figures():
    def fail(operands):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore words")

    broken = replace(NUMPY_METHODS[-1], name="broken", make=fail)
    result = measure(
        SMALL, (broken, *NUMPY_METHODS), CPU, HostClock(), Limits(None, None), budget=0.001
    )
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["broken"]["error"] == "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED"
    assert all("tops" in row for name, row in rows.items() if name != "broken")
    text = "\n".join(tables.product({"gpu": None}, result))
    assert "broken: RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED" in text


def test_a_product_that_does_not_fit_is_left_out_with_the_reason():
    result = measure(
        Shape("square", 1 << 20, 1 << 20, 1 << 10),
        NUMPY_METHODS[-1:],
        CPU,
        HostClock(),
        Limits(None, None),
        budget=0.001,
    )
    (row,) = result["rows"]
    assert re.match(r"needs about \d+\.\d GiB; .* are free", row["error"])


@pytest.mark.parametrize(
    ("set_bytes", "sets"),
    [(1 << 10, 1024), (1 << 20, 100), (60 << 20, 2), (1 << 30, 2), (9 << 30, 1)],
)
def test_rotated_sets_fill_the_cache_twice_and_memory_at_most_half(set_bytes, sets):
    assert products.rotation(set_bytes, 50 << 20, 16 << 30) == sets


def test_shares_of_the_limits():
    shares = Limits(1e15, 4e12).shares(2 * 10**12, 10**9, 1e-2)
    assert shares == {"of_peak": pytest.approx(0.2), "of_memory": pytest.approx(0.025)}
    assert Limits(None, None).shares(1, 1, 1.0) == {"of_peak": None, "of_memory": None}
    assert products.peak_operations({"arch": "sm_90", "multiprocessors": 132}) == 15.5e15
    assert products.peak_operations({"arch": "sm_120", "multiprocessors": 170}) is None


@pytest.mark.parametrize("method", methods.TORCH, ids=lambda m: m.name)
def test_torch_peers_give_the_right_product(method):
    torch = pytest.importorskip("torch")
    prepared = method.prepare(Shape("square", 32, 48, 64), CPU, 1)
    prepared.calls[0]()
    (result,) = prepared.results
    assert tuple(result.shape) == (32, 48)
    expected = {"torch int8": torch.int32}.get(method.name, torch.bfloat16)
    assert result.dtype == expected
    assert prepared.operand_bytes == (32 * 64 + 64 * 48) * method.operand_bits[0] // 8
    assert prepared.bytes_moved() - prepared.operand_bytes == 32 * 48 * method.result_bits // 8


@pytest.mark.parametrize("method", methods.TORCH[1:], ids=lambda m: m.name)
def test_torch_peers_reject_unsupported_shapes(method):
    pytest.importorskip("torch")
    with pytest.raises(methods.Unsupported, match="multiples of"):
        method.prepare(Shape("ragged", 1000, 1001, 999), CPU, 1)


@pytest.mark.gpu
def test_tf32_is_another_compute_type_only_inside_its_scope():
    import cupy
    from cupy._core import _routines_linalg as linalg

    a = cupy.full((256, 256), 1 + 2.0**-12, dtype=cupy.float32)  # beyond TF32's ten bits
    exact = float((a @ a)[0, 0])
    with methods._cupy_float32_as("COMPUTE_TYPE_TF32"):
        rounded = float((a @ a)[0, 0])
    assert rounded == 256
    assert exact > 256.1
    assert linalg.get_compute_type(np.float32) == linalg.COMPUTE_TYPE_DEFAULT
    assert float((a @ a)[0, 0]) == exact


@pytest.mark.gpu
def test_every_method_runs_on_the_gpu():
    device = Device("cuda", 0)
    shape = Shape("square", 256, 256, 256)
    found, _ = methods.methods_for(device)
    result = measure(shape, found, device, make_clock(device), Limits(None, None), budget=0.001)
    assert {r["method"]: r["error"] for r in result["rows"] if "error" in r} == {}


@pytest.mark.gpu
def test_the_record_names_the_configuration_that_ran(capfd, monkeypatch):
    device = Device("cuda", 0)
    shape = Shape("square", 264, 264, 264)  # a shape that no other test has planned for
    monkeypatch.setenv("CUPYBNN_DEBUG", "1")
    result = measure(
        shape, methods.OURS[1:2], device, make_clock(device), Limits(None, None), budget=0.001
    )
    monkeypatch.delenv("CUPYBNN_DEBUG")
    (row,) = result["rows"]
    assert f"(264, 264) @ (264, 264): {row['configuration']}" in capfd.readouterr().err


def test_tuning_prints_one_line_per_shape(monkeypatch, capsys):
    from cupybnn.backends.cuda import tuning as table
    from cupybnn.benchmark import tuning
    from cupybnn.cli import bench

    shape = (64, 32, 1000, True)
    config = smxx.config()
    trials = [
        tuning.Trial(shape, config, 20e-6, True),
        tuning.Trial(shape, replace(config, tile_m=128), 15e-6, False),
        tuning.Trial(shape, replace(config, tile_m=256), None, False),
        tuning.Trial((8, 8, 8, False), config, None, True),
    ]
    monkeypatch.setattr(tuning, "tune", lambda device: iter(trials))
    monkeypatch.setattr(table, "table_path", lambda device: f"/cache/tuned-{device}.json")
    bench._tune(Device("cuda", 1))
    assert capsys.readouterr().out.splitlines() == [
        "tune 64 x 32 x 1000 packed: best of 2 smxx 128x64 15.0 us, "
        "built in smxx 64x64 20.0 us, 1 failed",
        "tune 8 x 8 x 8: none of 1 configurations ran",
        "wrote /cache/tuned-1.json",
        "",
    ]


# --- around the product


def test_packing_covers_every_dtype_along_both_axes():
    rows = overheads.packing(CPU, HostClock(), 1e10, size=64, quick=False)
    assert len(rows) == 2 * len(overheads.PACKED_DTYPES)
    by_name = {(r["dtype"], r["packed_along"]): r for r in rows}
    assert by_name["float32", "rows"]["bytes"] == 64 * 64 * 4 + 64 * 8
    assert by_name["bool", "columns"]["bytes"] == 64 * 64 + 64 * 8
    done = [r for r in rows if "error" not in r]
    assert all(r["of_copy"] == pytest.approx(r["bytes_per_second"] / 1e10) for r in done)
    assert len(done) >= 10  # bfloat16 needs ml_dtypes


def test_a_first_call_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(overheads, "_FIRST_CALL", "raise SystemExit('no driver')")
    rows = overheads.first_call(CPU)
    assert [r["error"] for r in rows] == ["no driver"] * 3


# --- chart


def a_gpu_record():
    products = []
    for n in (1024, 2048, 4096, 8192):
        rows = [
            {"method": name, "ours": False, "tops": n * scale, "throughput": {"median": 1.0}}
            for name, scale in [("packed -> packed", 1.2), ("torch fp8", 0.1), ("odd one", 0.2)]
        ]
        products.append({"group": "square", "m": n, "n": n, "k": n, "rows": rows})
    return {
        "products": products,
        "gpu": {"name": "NVIDIA H200"},
        "machine": {"cpu": "a CPU"},
        "peak_operations_per_second": 15.5e15,
    }


def test_chart_is_written_as_svg_and_png(tmp_path):
    pytest.importorskip("matplotlib")
    files = chart.draw(a_gpu_record(), tmp_path / "square.svg")
    assert [f.name for f in files] == ["square.svg", "square.png"]
    svg = files[0].read_text()
    assert svg.startswith("<?xml")
    assert "NVIDIA H200" in svg
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["square.png", "square.svg"]


def test_a_record_is_drawn_the_same_each_time(tmp_path):
    """So that a published chart can be made again from its record and compared."""
    pytest.importorskip("matplotlib")
    first, second = (chart.draw(a_gpu_record(), tmp_path / name) for name in ("a", "b"))
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]


def test_peak_names_the_gpu_it_was_measured_on(tmp_path):
    """It was measured on an H200; for other GPUs of its architecture it is worked out."""
    pytest.importorskip("matplotlib")
    (svg, _) = chart.draw(a_gpu_record(), tmp_path / "x")
    assert "peak of the 1-bit instruction as measured on an H200" in svg.read_text()
    with briefly():
        found = record.run(CPU, quick=True, only=["host"])
    heading = list(tables.heading({**found, "peak_operations_per_second": 15.5e15}))
    assert heading[-1].endswith(
        "; 1-bit peak as measured on an H200, scaled by the number of multiprocessors: 15,500 TOPS"
    )


@pytest.mark.parametrize(
    ("places", "apart"),
    [
        ([], []),
        ([0.0, 5.0], [0.0, 5.0]),
        ([1.0, 1.0], [0.5, 1.5]),
        ([0.0, 3.0, 3.2, 3.4, 9.0], [0.0, 2.2, 3.2, 4.2, 9.0]),
        ([0.0, 0.9, 1.6], [-1 / 6, 5 / 6, 11 / 6]),
    ],
)
def test_line_names_do_not_overlap(places, apart):
    assert chart._apart(places, 1.0) == pytest.approx(apart)


def test_chart_without_square_products_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no square products"):
        chart.draw({**a_gpu_record(), "products": []}, tmp_path / "x")


def test_missing_matplotlib_is_reported_before_measuring(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main.main(["bench", "--quick", "--chart", str(tmp_path / "x")]) == 2
    assert "'--chart' needs matplotlib" in capsys.readouterr().err


# --- layers of PyTorch


def test_layers_of_pytorch_are_compared_and_checked(monkeypatch):
    pytest.importorskip("torch", reason="needs PyTorch: pip install .[torch]")
    monkeypatch.setattr(torch_layers, "CPU_QUICK", (48,))
    with briefly():
        rows = torch_layers.torch_layers(CPU, HostClock(), quick=True)
    assert [r["layer"] for r in rows] == ["nn.Linear", "XnorLinear", "packed XnorLinear"]
    assert not any("error" in r for r in rows)
    assert [r.get("checked") for r in rows] == [None, True, True]
    for row in rows:
        expected = rows[0]["call"]["median"] / row["call"]["median"]
        assert row["over_linear"] == pytest.approx(expected)
    text = "\n".join(tables.torch_layers({"torch": rows}))
    assert "48" in text
    assert "packed XnorLinear, eager" in text
    monkeypatch.setattr(torch_layers, "_is_exact", lambda *_: False)
    with briefly():
        rows = torch_layers.torch_layers(CPU, HostClock(), quick=True)
    assert [r.get("error", "")[:12] for r in rows] == ["", "wrong result", "wrong result"]
