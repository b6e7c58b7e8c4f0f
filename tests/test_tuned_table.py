"""The table of tuned configurations: what tuning cannot have written is told and never used."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import numpy as np
import pytest
from edits import edit

from cupybnn.backends.cuda import tuning
from cupybnn.backends.cuda.configs import Config

VALUES = {"kernel": "sm90", "defines": [["STAGES", 4]]}
#: A configuration as it is stored, whatever fields it has.
FIELDS = {
    field.name: VALUES.get(field.name, False if field.type in ("bool", bool) else 8)
    for field in dataclasses.fields(Config)
}
KEY = "1x8192x8192x8192"


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """Give the place of the table, in a folder that is there."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuning, "table_path", lambda device: path)
    tuning.winners.cache_clear()
    yield path
    tuning.winners.cache_clear()


def test_what_was_saved_is_read(table):
    assert tuning.winners(0) == {}
    tuning.winners.cache_clear()
    table.write_text(json.dumps({KEY: FIELDS}))
    config = tuning.winners(0)[KEY]
    assert (config.kernel, config.defines, config.tile_m) == ("sm90", (("STAGES", 4),), 8)
    tuning.save(0, {KEY: config})
    assert tuning.winners(0) == {KEY: config}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"\xff", "must be JSON"),
        (b"[]", "must be a mapping"),
        (b'{"a": 1}', "a name must be a printable text .* that matches"),
        (b'{"1x1x1x1": {"kernel": "sm90"}}', "lacks defines, tile_m"),
        (b'{"1x1x1x1": ' + b"[" * 100_000, "nested more than 32 levels deep"),
        (b'{"1x1x1x1": Infinity}', "Infinity is not a valid JSON number"),
        (b'{"1x1x1x1": 1e999}', "must be a mapping"),
    ],
)
def test_a_damaged_table_is_reported_once(table, content, message):
    table.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=rf"tuned\.json is ignored: .*{message}") as seen:
        assert tuning.winners(0) == tuning.winners(0) == {}
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel", "../../x"),
        ("kernel", ["sm90"]),
        ("tile_m", 0),
        ("tile_m", 2**40),
        ("threads", 1.5),
        ("threads", True),
        ("persistent", 1),
        ("stages", -1),
        ("defines", [["A"]]),
        ("defines", [["A\n#define B", 1]]),
        ("defines", [["A", 1e999]]),
        ("more", 1),
    ],
)
def test_an_edited_configuration_is_reported(table, name, value):
    table.write_text(json.dumps({KEY: {**FIELDS, name: value}}))
    with pytest.warns(RuntimeWarning, match="is ignored: "):
        assert tuning.winners(0) == {}


def test_any_edit_is_reported_or_leaves_configurations(table):
    whole = {f"1x{n}x{n}x{n}": FIELDS for n in range(1, 5)}
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(200):
        found = copy.deepcopy(whole)
        edit(found, rng)
        table.write_text(json.dumps(found))
        tuning.winners.cache_clear()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            winners = tuning.winners(0)
        told += len(seen)
        assert bool(winners) != bool(seen)
        for config in winners.values():
            assert config.kernel in ("sm90",)
            assert config.tile_m >= 1
            hash(config)
    assert told > 100


def test_a_table_or_folder_that_cannot_be_read(table, monkeypatch):
    table.mkdir()
    with pytest.warns(RuntimeWarning, match=r"tuned\.json is ignored: .*Is a directory"):
        assert tuning.winners(0) == {}

    def nobody(device):
        raise ValueError("no such user")

    tuning.winners.cache_clear()
    monkeypatch.setattr(tuning, "table_path", nobody)
    with pytest.warns(RuntimeWarning, match="The cache folder is ignored: no such user"):
        assert tuning.winners(0) == {}
