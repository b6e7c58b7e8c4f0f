"""``cupybnn bench train``: the peer is the same network, and nothing that fails is lost."""

import contextlib
import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from measuring import briefly

from cupybnn.autograd import Tensor
from cupybnn.backends.devices import CPU, Device
from cupybnn.benchmark import record as records
from cupybnn.benchmark.clock import HostClock, make_clock
from cupybnn.benchmark.methods import Unsupported
from cupybnn.benchmark.training import chart, ours, record, tables
from cupybnn.benchmark.training.variants import (
    CpuContention,
    Memory,
    Running,
    Size,
    Variant,
    _kernels,
    measure,
)
from cupybnn.cli import main
from cupybnn.training import Trainer

SMALL = Size(48, 32)
RESULTS = Path(__file__).parents[1] / "bench" / "results"
PUBLISHED = sorted(RESULTS.rglob("*_train*.json"))


@pytest.fixture(scope="module")
def few():
    return record.random_images(200)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run the command once on the CPU, at tiny sizes; return its output and its record.

    In this process, which imports PyTorch for other tests, too.
    """
    path = tmp_path_factory.mktemp("bench") / "record.json"
    arguments = ["--quick", "--device", "cpu", "--sizes", "16x8,32x20", "--json", str(path)]
    with contextlib.redirect_stdout(io.StringIO()) as out, briefly():
        assert main.main(["bench", "train", *arguments]) == 0
    return out.getvalue(), json.loads(path.read_text())


# --- the command


def test_record_describes_device_and_method(quick):
    _, found = quick
    assert (found["format"], found["kind"]) == (records.FORMAT, "train")
    assert found["machine"]["numpy"] == np.__version__
    assert set(found["method"]) == {"network", "data", "timing", "memory", "kernels"}
    assert "random" in found["method"]["data"]
    assert [(s["hidden"], s["batch"]) for s in found["sizes"]] == [(16, 8), (32, 20)]
    if found["machine"]["torch"] is None:
        assert any(note.startswith("PyTorch is not measured: ") for note in found["notes"])


def test_figures_follow_from_times(quick):
    _, found = quick
    for size in found["sizes"]:
        assert [r["product"] for r in size["rows"] if r["library"] == "cupybnn"] == [
            "matmul",
            "xnor",
        ]
        for row in size["rows"]:
            assert "error" not in row
            rates = row["examples_per_second"]
            assert rates["median"] == pytest.approx(size["batch"] / row["step"]["median"])
            assert rates["average"] == pytest.approx(size["batch"] / row["step"]["mean"])
            assert row["memory_bytes"] is None
            assert np.isfinite(row["loss"])


def test_the_tables_can_be_shown_again_from_the_record(quick, tmp_path, capsys):
    out, found = quick
    path = tmp_path / "record.json"
    records.save(found, path)
    for arguments in (["--from", str(path)], ["train", "--from", str(path)]):
        assert main.main(["bench", *arguments]) == 0
        again = capsys.readouterr().out
        for line in tables.lines(found):
            assert line in out
            assert line in again
    assert "training with matmul and with xnor, examples a second" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--only", "square"], "'--only' must be given to 'bench product' only"),
        (["train", "--tune"], "'--tune' must be given to 'bench product' only"),
        (["--sizes", "8x8"], "'--sizes' must be given to 'bench train or infer' only"),
        (["train", "--json", "nowhere/x.json"], "'--json' must be in an existing folder"),
        (["train", "--chart", "nowhere/x"], "'--chart' must be in an existing folder"),
        (["train", "--from", __file__, "--sizes", "8x8"], "'--sizes' must not be given with"),
        (["train", "--from", __file__], "must be JSON"),
        (["train", "--device", "gpu"], "The 'device' must be"),
    ],
)
def test_wrong_arguments_are_reported_before_measuring(arguments, message, capsys):
    assert main.main(["bench", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("sizes", ["512", "512x", "0x8", "8x8,", "8*8"])
def test_invalid_sizes_are_rejected(sizes, capsys):
    with pytest.raises(SystemExit):
        main.main(["bench", "train", "--sizes", sizes])
    assert "must be HxB" in capsys.readouterr().err


def test_a_record_of_the_product_is_not_shown_as_training(capsys):
    path = RESULTS / "h200.json"
    assert main.main(["bench", "train", "--from", str(path)]) == 2
    assert "is one of 'bench product'" in capsys.readouterr().err


def test_without_torch_ours_is_measured_and_the_record_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found, notes = record.variants_for(CPU, False)
    assert {v.library for v in found} == {"cupybnn"}
    assert notes[0].startswith("PyTorch is not measured: ")


# --- one variant


def failing(error):
    def make(*arguments):
        raise error

    return make


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (RuntimeError("no C++\ncompiler"), {"error": "RuntimeError: no C++", "failed": True}),
        (Unsupported("no fused step: reasons"), {"error": "no fused step: reasons"}),
    ],
)
def test_a_variant_that_fails_leaves_its_reason(error, row, few):
    variant = Variant("PyTorch", "compiled + graph", "matmul", "tf32", failing(error))
    found = measure(variant, SMALL, CPU, few, HostClock(), 0.0)
    assert {k: v for k, v in found.items() if k in ("error", "failed")} == row


def test_a_loss_that_is_not_finite_is_a_failure(few):
    variant = Variant(
        "cupybnn", "plain", "xnor", "float32", lambda *_: Running(lambda: None, lambda: np.nan)
    )
    found = measure(variant, SMALL, CPU, few, HostClock(), 0.0)
    assert found["error"] == "FloatingPointError: the loss is nan after the timed steps"


@pytest.mark.parametrize(("library", "code"), [("cupybnn", 1), ("PyTorch", 0)])
def test_only_a_failure_of_ours_makes_the_command_fail(library, code, monkeypatch, capsys):
    broken = Variant(library, "plain", "xnor", "float32", failing(RuntimeError("on fire")))
    working = [v for v in ours.variants(CPU, True) if v.product == "matmul"]
    monkeypatch.setattr(record, "variants_for", lambda *_: ([broken, *working], []))
    arguments = ["--quick", "--device", "cpu", "--sizes", "16x8"]
    with briefly():
        assert main.main(["bench", "train", *arguments]) == code
    out = capsys.readouterr().out
    assert "float32: RuntimeError: on fire" in out
    assert ("1 FAILED:" in out) == bool(code)
    assert "matmul, plain" in out


def test_variants_of_a_gpu_are_settings_of_fused_steps():
    device = Device("cuda", 0)
    found = ours.variants(device, False)
    assert len(set(map(str, found))) == len(found) == 12
    for variant in found:
        config = ours.config_for(variant, SMALL, device)
        assert config.binary
        assert config.batch_norm
        assert config.xnor == (variant.product != "matmul")
        assert config.grad_bits == {"4 planes": 4, "1 plane": 1}.get(variant.product, 0)
        assert config.fused == ("fused" in variant.how)
        assert config.dtype == variant.precision
        if config.fused:
            assert config.graph == ("graph" in variant.how)
    assert {v.precision for v in ours.variants(device, True) if "graph" in v.how} == {"bfloat16"}


def test_memory_is_the_most_that_was_taken():
    free = iter([100, 60, 80, 70])
    runtime = SimpleNamespace(memGetInfo=lambda: (next(free), 200))
    device = SimpleNamespace(kind="cuda", xp=SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    memory = Memory(device)
    memory.update()
    memory.update()
    assert memory.peak() == 40
    assert Memory(CPU).peak() is None


def test_other_programs_are_noticed():
    if CpuContention().processors() is None:
        pytest.skip("what other programs do is only known on Linux")
    contention = CpuContention()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        time.sleep(2.0)
        assert contention.processors() > 0.5
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_own_work_does_not_count_as_that_of_others(monkeypatch):
    # all programs, this one, the clock: in seconds
    readings = iter([(100.0, 7.0, 50.0), (105.0, 11.0, 52.0)])
    monkeypatch.setattr(CpuContention, "_read", staticmethod(lambda: next(readings)))
    assert CpuContention().processors() == pytest.approx(0.5)


@pytest.mark.parametrize(("trials", "settles"), [([1.2, 0.9, 0.6], False), ([0.9, 0.1], True)])
def test_a_disturbed_cpu_is_measured_anew_and_never_compared(trials, settles, monkeypatch):
    calls = {"xnor": iter(trials), "matmul": iter([0.0])}

    def measured(variant, *_):
        busy = next(calls[variant.product])
        return row(variant.library, variant.how, variant.product, "float32", 10.0, 0) | {
            "others_processors": busy
        }

    monkeypatch.setattr(record, "measure", measured)
    monkeypatch.setattr(record, "variants_for", lambda *_: (ours.variants(CPU, True), []))
    found = record.run(CPU, quick=True, sizes=[SMALL])
    (size,) = found["sizes"]
    assert [r["others_processors"] for r in size["rows"]] == [0.0, min(trials)]
    assert size["disturbed"] is not settles
    assert bool(size["xnor_over_matmul"]) is settles
    text = "\n".join(tables.lines(found))
    assert ("NOT COMPARED: other programs used up to 0.6" in text) is not settles
    assert (" x" in text.partition("speedup med")[2].splitlines()[1]) is settles
    pytest.importorskip("matplotlib")
    if not settles:
        with pytest.raises(ValueError, match="no training steps"):
            chart.draw(found, "never written")


def test_times_of_kernels_are_medians_behind_a_backlog():
    steps = iter([9.0, 1.0, 8.0, 2.0, 3.0, 2.5])  # the first one is only looked at for the host
    backlogs = []
    clock = SimpleNamespace(wait=lambda: None, backlog=backlogs.append)

    def kernels():
        seconds = next(steps)
        return {"gather": seconds, "fc1": 2 * seconds}

    assert _kernels(kernels, clock, 5) == {"gather": 2.5, "fc1": 5.0}
    assert len(backlogs) == 5
    assert min(backlogs) > 0


# --- what is made of the rows


def row(library, how, product, precision, rate, memory=1 << 30, **more):
    return {
        "library": library,
        "how": how,
        "product": product,
        "precision": precision,
        "step": {"median": 1 / rate, "min": 0.9 / rate, "p90": 1.2 / rate, "mean": 1 / rate},
        "examples_per_second": {"median": rate, "average": 0.95 * rate},
        "memory_bytes": memory,
        "pool_bytes": memory // 2,
        "loss": 2.3,
        **more,
    }


def gpu_rows(scale):
    parts = {"gather": 3e-6, "fc1": 20e-6}
    return [
        row("cupybnn", "fused + graph", "matmul", "bfloat16", 20e6 * scale, kernels=parts),
        row("cupybnn", "fused + graph", "xnor", "bfloat16", 26e6 * scale, 1 << 29, kernels=parts),
        row("cupybnn", "fused + graph", "xnor", "tf32", 24e6 * scale),
        row("cupybnn", "fused", "xnor", "bfloat16", 9e6 * scale),
        row("PyTorch", "eager", "matmul", "tf32", 2e6 * scale),
        row("PyTorch", "graph", "matmul", "tf32", 10e6 * scale),
        row("PyTorch", "graph", "matmul", "bfloat16", 13e6 * scale),
        {
            "library": "PyTorch",
            "how": "compiled + graph",
            "product": "matmul",
            "precision": "tf32",
            "error": "RuntimeError: no C++ compiler",
            "failed": True,
        },
    ]


def gpu_record():
    sizes = []
    for hidden, batch in [(512, 512), (512, 8192), (8192, 8192)]:
        rows = gpu_rows(1 / hidden)
        found = {"hidden": hidden, "batch": batch, "rows": rows, "disturbed": False}
        sizes.append({**found, **record.compare(rows)})
    cuda = {"driver": "580.1", "cupy": "14.2.0", "runtime_cuda": "13.0"}
    return {
        "format": records.FORMAT,
        "kind": "train",
        "date": "2026-01-02T03:04:05+00:00",
        "gpu": {"name": "NVIDIA H200", "arch": "sm_90", "multiprocessors": 132},
        "machine": {"torch": "2.13", "cupybnn": "1", "python": "3", "cuda": cuda, "cpu": "a CPU"},
        "notes": [],
        "method": record.METHOD,
        "sizes": sizes,
        "seconds": 1.0,
    }


def test_the_fastest_of_each_kind_are_compared():
    found = record.compare(gpu_rows(1.0))
    assert found["best"] == {"xnor": 1, "matmul": 0, "PyTorch": 6}
    assert found["xnor_over_matmul"] == pytest.approx({"bfloat16": 1.3, "best": 1.3})
    assert found["over_pytorch"] == pytest.approx(2.0)
    assert found["memory_of_pytorch"] == pytest.approx(0.5)


def test_a_comparison_without_pytorch_or_without_anything():
    mine = [r for r in gpu_rows(1.0) if r["library"] == "cupybnn"]
    assert record.compare(mine)["over_pytorch"] is None
    nothing = {"best": {}, "xnor_over_matmul": {}, "over_pytorch": None, "memory_of_pytorch": None}
    nothing["rounded_over_pytorch"] = {}
    assert record.compare(gpu_rows(1.0)[-1:]) == nothing


def test_steps_with_rounded_gradients_stand_apart():
    rows = [*gpu_rows(1.0), row("cupybnn", "fused + graph", "4 planes", "bfloat16", 65e6)]
    found, without = record.compare(rows), record.compare(rows[:-1])
    assert found.pop("rounded_over_pytorch") == {"4 planes": pytest.approx(5.0)}
    assert without.pop("rounded_over_pytorch") == {}
    assert found == without
    size = {"hidden": 512, "batch": 512, "rows": rows, **record.compare(rows)}
    lines = [" ".join(line.split()) for line in tables.rounded({"sizes": [size]})]
    assert any("512 512 4 planes 65,000,000 5.0" in line for line in lines), lines
    assert list(tables.rounded({"sizes": [{**size, "rows": rows[:-1]}]})) == []


def test_the_record_of_a_gpu_can_be_read(tmp_path):
    """Each product that is timed is one that a record may hold."""
    whole = json.loads((RESULTS / "h200_train.json").read_text())
    products = {row["product"] for row in whole["sizes"][0]["rows"]}
    assert products == {"matmul", "xnor", *ours.ROUNDED}
    records.save(whole, tmp_path / "record.json")
    assert records.load(tmp_path / "record.json") == whole


def test_tables_of_a_gpus_record():
    text = "\n".join(tables.lines(gpu_record()))
    assert text.startswith("NVIDIA H200, sm_90, 132 multiprocessors; driver 580.1")
    assert "  PyTorch compiled + graph, tf32: RuntimeError: no C++ compiler" in text
    assert re.search(r"  xnor, fused \+ graph +bfloat16 .* 48,242 +50,781 +512 MiB +256 MiB", text)
    assert re.search(r"  fc1 +20.0 us  87 % +20.0 us  87 %", text)
    assert re.search(r"512 +8192  fused \+ graph +bfloat16 .* 1.30 x +1.30 x", text)
    assert re.search(r"8192 +8192 .* 1.30 x +2.00 x +0.50 x", text)
    assert "FAILED" not in text  # PyTorch's failures are its own


def test_chart_is_written_as_svg_and_png(tmp_path):
    pytest.importorskip("matplotlib")
    files = chart.draw(gpu_record(), tmp_path / "training.json")
    assert [f.name for f in files] == ["training.svg", "training.png"]
    svg = files[0].read_text()
    assert svg.startswith("<?xml")
    for words in ("NVIDIA H200", "cupybnn, xnor", "PyTorch, eager", "relative to the fastest"):
        assert words in svg
    assert "compiled" not in svg  # it failed at every size
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_published_records_can_be_shown_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert PUBLISHED
    for path in PUBLISHED:
        found = records.load(path)
        assert f"{found['sizes'][0]['batch']} examples per step" in "\n".join(tables.lines(found))
        chart.draw(found, tmp_path / path.stem)


def test_chart_of_nothing_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no training steps"):
        chart.draw({**gpu_record(), "sizes": []}, tmp_path / "x")


# --- PyTorch's network


@pytest.fixture
def peer():
    pytest.importorskip("torch")
    from cupybnn.benchmark.training import peer

    return peer


def networks(peer, few, product):
    """Return our trainer and PyTorch's network, in float64, with the same weights."""
    import torch

    variant = Variant("cupybnn", "plain", product, "float32", lambda *_: None)
    config = replace(ours.config_for(variant, SMALL, CPU), dtype="float64")
    trainer = Trainer(config, data=few)
    network = peer.Network(
        torch.from_numpy(few.train_images),
        torch.from_numpy(few.train_labels.astype(np.int64)),
        SMALL.hidden,
        few.classes,
        torch.float64,
        torch.float64,
    )
    with torch.no_grad():
        for mine, theirs in pairs(trainer.model, network):
            random = np.random.default_rng(mine.size)
            if mine.ndim == 1:  # of batch norm: not the ones and zeros that it begins with
                mine.write()[...] = random.uniform(0.5, 1.5, mine.shape)
            else:
                mine.write()[0, :3] = 0.0, -0.0, 1e-3  # the sign of nothing is +1
            theirs.copy_(torch.from_numpy(mine.data))
    return trainer, network


def pairs(model, network):
    layers = (model.fc1, model.fc2, model.fc3, model.fcout)
    yield from zip((layer.weight for layer in layers), network.weights, strict=True)
    for mine, theirs in zip((model.bn1, model.bn2, model.bn3), network.norms, strict=True):
        yield mine.gamma, theirs.weight
        yield mine.beta, theirs.bias


@pytest.mark.parametrize("product", ours.PRODUCTS)
def test_pytorchs_network_has_our_loss_and_gradients(peer, few, product):
    import torch

    trainer, network = networks(peer, few, product)
    index = np.random.default_rng(1).integers(0, 200, SMALL.batch)
    inputs, labels = trainer.data.batch(index)
    trainer.model.train()
    mine = trainer.objective(trainer.model(Tensor(inputs)), labels)
    mine.backward()
    theirs = network(torch.from_numpy(index))
    theirs.backward()
    assert float(theirs.detach()) == pytest.approx(float(mine.data), rel=1e-10)
    for ours_, torchs in pairs(trainer.model, network):
        expected = ours_.grad
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(torchs.grad.numpy(), expected, rtol=1e-7, atol=1e-12)


def test_pytorchs_update_is_ours(peer, few, monkeypatch):
    import torch

    trainer, network = networks(peer, few, "matmul")
    indices = iter([trainer.order.indices(step) for step in range(5)])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.from_numpy(next(indices)))
    stepper = peer.Stepper(network, SMALL.batch)
    for step in range(5):
        output = trainer.make_step(step)
        stepper()
        assert float(stepper.loss) == pytest.approx(float(output.loss), rel=1e-6)
    for mine, theirs in pairs(trainer.model, network):
        np.testing.assert_allclose(theirs.detach().numpy(), mine.data, atol=1e-6)


def test_pytorchs_signs(peer):
    import torch

    x = torch.tensor([-1.5, -1.0, -1e-9, -0.0, 0.0, 1.0, 1.0001], requires_grad=True)
    one = torch.tensor(1.0)
    y = peer.HardTanhSign.apply(x, one, -one)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    y.backward(torch.arange(1.0, 8.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]


def test_latent_weights_of_pytorch_stay_within_the_window(peer, few):
    import torch

    network = peer.Network(
        torch.from_numpy(few.train_images),
        torch.from_numpy(few.train_labels.astype(np.int64)),
        SMALL.hidden,
        few.classes,
        torch.bfloat16,
    )
    with torch.no_grad():
        network.weights[1][:] = 1.0
    stepper = peer.Stepper(network, SMALL.batch)
    for _ in range(3):
        stepper()
    assert float(network.weights[1].detach().abs().max()) <= 1
    assert float(network.weights[1].detach().min()) < 1
    assert network.weights[1].dtype == torch.float32
    assert np.isfinite(float(stepper.loss))


# --- on a GPU


@pytest.mark.gpu
def test_every_variant_runs_on_the_gpu(few):
    device = Device("cuda", 0)
    clock = make_clock(device)
    found, _ = record.variants_for(device, False)
    for variant in found:
        measured = measure(variant, Size(64, 96), device, few, clock, 0.0)
        if measured.get("failed") and not variant.ours:
            continue  # such as torch.compile without a compiler: the record says why
        assert measured.get("error") is None, f"{variant}: {measured['error']}"
        assert measured["memory_bytes"] >= 0
        # What the clock has is not in it; 0 if the pool had room left by earlier tests.
        assert 0 <= measured["pool_bytes"] < 1 << 28
        if variant.ours and "graph" in variant.how:
            assert {"gather", "fc1", "fc2", "fc3", "update"} <= set(measured["kernels"])
