"""The map of products: its record is summed up and drawn."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "bench" / "product_map.py"
_spec = importlib.util.spec_from_file_location("product_map", PATH)
product_map = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(product_map)


@pytest.fixture
def record():
    cells = [
        {"m": m, "n": n, "k": k, "cupybnn": 2e-6, "bfloat16": 9e-6, "fp8": 3e-6, "error": ""}
        for m, n, k in itertools.product((1, 64, 100), (128, 1024), (1024, 4096))
    ]
    cells[5] |= {"bfloat16": 1.5e-6}
    return {"gpu": {"name": "H200"}, "cells": cells}


def test_the_fastest_peer_counts(record):
    ratios = [product_map.ratio(cell) for cell in record["cells"]]
    assert ratios[5] == pytest.approx(0.75)
    assert ratios[:5] == pytest.approx([1.5] * 5)
    assert product_map.summary(record).splitlines() == [
        "12 products, 1 of them slower than the fastest dense one",
        "  64 x 128 x 4096: 2.00 us, bfloat16 1.50, fp8 3.00",
    ]


def test_a_record_is_drawn_the_same_each_time(record, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    source = tmp_path / "map.json"
    source.write_text(json.dumps(record))
    drawn = []
    for name in ("one", "two"):
        assert product_map.main(["--from", str(source), "--chart", str(tmp_path / name)]) == 0
        drawn.append((tmp_path / f"{name}.svg").read_bytes())
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert drawn[0] == drawn[1]


def test_a_wrong_result_is_reported(record, tmp_path, capsys):
    record["cells"][3]["error"] = "wrong result at [0, 1]: 2 instead of 3"
    source = tmp_path / "map.json"
    source.write_text(json.dumps(record))
    assert product_map.main(["--from", str(source)]) == 1
    assert "1 x 1024 x 4096: wrong result" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_cell_is_measured():
    pytest.importorskip("torch", reason="the peers are PyTorch's")
    from cupybnn.backends.devices import resolve

    device = resolve("cuda")
    with device.scope():
        cell = product_map.Map(device).cell(16, 256, 512)
    assert cell["error"] == ""
    assert all(0 < cell[name] < 1 for name in ("cupybnn", *product_map.PEERS))
