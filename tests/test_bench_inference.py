"""``cupybnn bench infer``: every library predicts with the same network, and ours is exact."""

import json
import sys

import numpy as np
import pytest
from measuring import briefly

from cupybnn import PackedNetwork
from cupybnn.autograd import Tensor, no_grad
from cupybnn.backends.devices import CPU, Device
from cupybnn.benchmark import record as records
from cupybnn.benchmark.clock import HostClock
from cupybnn.benchmark.inference import chart, ours, record, tables
from cupybnn.benchmark.inference.network import PIXEL_MAX, Network, random_inputs
from cupybnn.benchmark.inference.variants import Calls, Variant, measure
from cupybnn.benchmark.methods import Unsupported
from cupybnn.benchmark.training.variants import Size
from cupybnn.cli import main

NETWORK = Network.random(24)
X = random_inputs(9)
NUMBERS = X.astype(np.float32) / PIXEL_MAX
EXPECTED = NETWORK.logits(X)


def measured(variant: Variant) -> dict:
    return measure(variant, NETWORK, X, EXPECTED, CPU, HostClock(), 0.0)


def variant(make, library="cupybnn") -> Variant:
    return Variant(library, "some way", "float32", make)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run the command once on the CPU, at tiny sizes; return its record."""
    path = tmp_path_factory.mktemp("bench") / "record.json"
    arguments = ["--quick", "--device", "cpu", "--sizes", "16x1,16x20", "--json", str(path)]
    with briefly():
        assert main.main(["bench", "infer", *arguments]) == 0
    return json.loads(path.read_text())


# --- the network


def test_the_model_gives_the_exact_logits():
    with no_grad():
        np.testing.assert_array_equal(NETWORK.model(Tensor(NUMBERS)).data, EXPECTED)
    net = PackedNetwork.from_model(NETWORK.model, pixel_max=PIXEL_MAX)
    np.testing.assert_array_equal(net(X), EXPECTED)
    binary = Network.random(24, binary_first=True)
    net = PackedNetwork.from_model(binary.model, pixel_max=PIXEL_MAX)
    assert [layer.product for layer in net.layers] == ["signs", "bits", "bits", "real"]
    np.testing.assert_array_equal(net(X), binary.logits(X))


def test_sums_are_exact_in_any_order():
    first = np.abs(NETWORK.weights[0]).astype(np.float64).sum(0).max()
    assert first * 64 * 256 < 2**24  # in units of the last place
    assert np.array_equal(NETWORK.weights[0] * 64, np.round(NETWORK.weights[0] * 64))
    shuffled = np.random.default_rng(0).permutation(784)
    a = NUMBERS[:, shuffled] @ NETWORK.weights[0][shuffled]
    np.testing.assert_array_equal(a, NUMBERS.astype(np.float64) @ NETWORK.weights[0])


def test_logits_differ_between_inputs():
    assert len({row.tobytes() for row in EXPECTED}) > len(X) / 2
    assert len(set(EXPECTED.argmax(1).tolist())) > 1


@pytest.mark.parametrize("library", ["PyTorch", "onnxruntime"])
def test_the_others_have_the_same_network(library):
    pytest.importorskip({"PyTorch": "torch", "onnxruntime": "onnxruntime"}[library])
    if library == "onnxruntime":
        pytest.importorskip("onnx")
    found, _ = record.variants_for(CPU, False)
    (peer,) = (v for v in found if v.library == library)
    calls = peer.make(peer, NETWORK, X, CPU)
    np.testing.assert_array_equal(calls.host(calls.call()), EXPECTED)


# --- the command


def test_the_record_says_what_was_measured_and_how(quick):
    assert (quick["format"], quick["kind"]) == (records.FORMAT, "infer")
    assert [(s["hidden"], s["batch"]) for s in quick["sizes"]] == [(16, 1), (16, 20)]
    assert "multiples" not in quick["method"]["network"]
    for size in quick["sizes"]:
        mine = size["rows"][0]
        assert (mine["library"], mine["how"], mine["equal"]) == ("cupybnn", "net(x)", True)
        rate = mine["examples_per_second"]
        assert rate == pytest.approx(size["batch"] / mine["call"]["median"])
        assert "device" not in mine


def test_the_tables_can_be_shown_again_from_the_record(quick, tmp_path, capsys):
    path = tmp_path / "record.json"
    records.save(quick, path)
    for arguments in (["--from", str(path)], ["infer", "--from", str(path)]):
        assert main.main(["bench", *arguments]) == 0
        assert capsys.readouterr().out.splitlines() == list(tables.lines(quick))
    assert main.main(["bench", "train", "--from", str(path)]) == 2
    assert "is one of 'bench infer'" in capsys.readouterr().err


def test_options_of_the_product_are_refused(capsys):
    assert main.main(["bench", "infer", "--only", "square"]) == 2
    assert "'--only' must be given to 'bench product' only" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [
    lambda r: r["sizes"][0].pop("over"),
    lambda r: r["sizes"][0]["rows"][0].pop("equal"),
    lambda r: r["sizes"][0]["rows"][0]["call"].update(median=-1),
    lambda r: r["sizes"][0]["rows"][0].update(library="another"),
])  # fmt: skip
def test_a_record_that_lacks_something_is_refused(quick, tmp_path, damage):
    found = json.loads(json.dumps(quick))
    damage(found)
    path = tmp_path / "record.json"
    records.save(found, path)
    with pytest.raises(records.RecordError, match="must be a complete record"):
        records.load(path)


# --- one variant


def test_a_wrong_logit_of_ours_is_a_failure():
    def wrong(*_):
        logits = EXPECTED.copy()
        logits[3, 2] += 1
        return Calls(lambda: logits, lambda y: y)

    row = measured(variant(wrong))
    assert row["failed"]
    assert row["error"].startswith("wrong logit at [3, 2]: ")
    row = measured(variant(wrong, "PyTorch"))
    assert "error" not in row
    assert (row["equal"], row["same_classes"] > 0.8) == (False, True)


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (RuntimeError("no C++\ncompiler"), {"error": "RuntimeError: no C++", "failed": True}),
        (Unsupported("no such thing"), {"error": "no such thing"}),
    ],
)
def test_a_variant_that_fails_leaves_its_reason(error, row):
    def make(*_):
        raise error

    found = measured(variant(make))
    assert {k: v for k, v in found.items() if k in ("error", "failed")} == row
    assert "call" not in found


@pytest.mark.parametrize(("library", "code"), [("cupybnn", 1), ("PyTorch", 0)])
def test_only_a_failure_of_ours_makes_the_command_fail(library, code, monkeypatch, capsys):
    def make(*_):
        raise RuntimeError("on fire")

    found = [variant(make, library), *ours.variants(CPU)]
    monkeypatch.setattr(record, "variants_for", lambda *_: (found, []))
    with briefly():
        arguments = ["--quick", "--device", "cpu", "--sizes", "16x2"]
        assert main.main(["bench", "infer", *arguments]) == code
    out = capsys.readouterr().out
    assert "some way, float32: RuntimeError: on fire" in out
    assert ("1 FAILED:" in out) == bool(code)


def test_without_other_libraries_ours_is_measured_and_the_record_says_so(monkeypatch):
    for name in ("torch", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("torch_peer", "onnx_peer"):
        monkeypatch.delitem(sys.modules, f"cupybnn.benchmark.inference.{name}", raising=False)
        monkeypatch.delattr(f"cupybnn.benchmark.inference.{name}", raising=False)
    found, notes = record.variants_for(CPU, False)
    assert [v.library for v in found] == ["cupybnn"]
    assert [note.partition(":")[0] for note in notes] == [
        "PyTorch is not measured",
        "onnxruntime is not measured",
    ]


@pytest.mark.parametrize(("busy", "trials"), [([0.0], 1), ([0.9, 0.1], 2), ([0.9, 0.8, 0.7], 3)])
def test_a_disturbed_cpu_is_measured_anew_and_never_compared(busy, trials, monkeypatch):
    values = iter(busy)

    def fake(variant, *_):
        return row(variant.library, variant.how, 1.0, others_processors=next(values))

    monkeypatch.setattr(record, "measure", fake)
    monkeypatch.setattr(record, "variants_for", lambda *_: (ours.variants(CPU), []))
    (size,) = record.run(CPU, quick=True, sizes=[Size(16, 2)])["sizes"]
    assert next(values, None) is None
    assert size["rows"][0]["others_processors"] == min(busy)
    assert size["disturbed"] == (min(busy) > 0.2)


# --- what is made of the rows


def row(library: str, how: str, seconds: float, **more) -> dict:
    figures = {"median": seconds, "min": seconds, "p90": seconds}
    return {"library": library, "how": how, "precision": "bfloat16", "call": figures,
            "device": figures, "examples_per_second": 1 / seconds, "equal": library == "cupybnn",
            "same_classes": 0.97, **more}  # fmt: skip


def gpu_record() -> dict:
    rows = [row("cupybnn", "net(x)", 12e-6), row("PyTorch", "compiled + graph", 36e-6),
            row("cupybnn", "net(x)", 10e-6, binary_first=True),
            row("PyTorch", "eager", 200e-6), {"library": "PyTorch", "how": "graph",
            "precision": "bfloat16", "error": "RuntimeError: no", "failed": True}]  # fmt: skip
    sizes = [
        {
            "hidden": h,
            "batch": b,
            "rows": rows,
            "disturbed": False,
            "over": record.compare(rows),
            "over_binary_first": record.compare(rows, True),
        }
        for h, b in ((512, 1), (512, 64), (4096, 1))
    ]
    cuda = {"driver": "580.1", "cupy": "14.2.0", "runtime_cuda": "13.0"}
    machine = {"torch": "2.13", "cupybnn": "1", "python": "3", "cuda": cuda, "cpu": "a CPU"}
    gpu = {"name": "NVIDIA H200", "arch": "sm_90", "multiprocessors": 132}
    return {"format": records.FORMAT, "kind": "infer", "date": "2026-01-02T03:04:05+00:00",
            "gpu": gpu, "machine": machine, "notes": [], "method": record.METHOD, "sizes": sizes,
            "seconds": 1.0}  # fmt: skip


def test_ours_is_compared_with_the_fastest_way_of_each_library():
    rows = [row("cupybnn", "net(x)", 2.0), row("PyTorch", "eager", 8.0), row("PyTorch", "graph", 5)]
    rows.append(row("onnxruntime", "CPU", 9.0))
    assert record.compare(rows) == {"PyTorch": 2.5, "onnxruntime": 4.5}
    assert record.compare(rows[1:]) == {}
    rows.append(row("cupybnn", "net(x)", 1.0, binary_first=True))
    assert record.compare(rows) == {"PyTorch": 2.5, "onnxruntime": 4.5}
    assert record.compare(rows, binary_first=True) == {"PyTorch": 5, "onnxruntime": 9}


def test_tables_and_chart_of_a_gpus_record(tmp_path):
    text = "\n".join(tables.lines(gpu_record()))
    assert "PyTorch graph, bfloat16: RuntimeError: no" in text
    assert "over PyTorch" in text
    assert "3.00 x" in text
    assert "over PyTorch, binary first" in text
    assert "3.60 x" in text
    assert "FAILED" not in text
    pytest.importorskip("matplotlib")
    files = chart.draw(gpu_record(), tmp_path / "inference.json")
    assert [f.name for f in files] == ["inference.svg", "inference.png"]
    svg = files[0].read_text()
    for words in ("NVIDIA H200", "cupybnn net(x)", "784-4096-4096-4096-10", "microseconds"):
        assert words in svg
    with pytest.raises(ValueError, match="no predictions to draw"):
        chart.draw({**gpu_record(), "sizes": []}, tmp_path / "x")


def test_what_is_measured_on_a_gpu():
    assert {s.batch for s in record.sizes_for(Device("cuda"), False)} == {
        1, 16, 64, 1024, 8192, 65_536
    }  # fmt: skip
    pytest.importorskip("torch")
    from cupybnn.benchmark.inference import torch_peer

    found = [(v.how, v.precision) for v in torch_peer.variants(Device("cuda"), False)]
    assert found == [
        ("compiled + graph", "bfloat16"),
        ("graph", "bfloat16"),
        ("eager", "float32"),
    ]
