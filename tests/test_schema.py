"""Checks of JSON: what is right passes, and the first fault is named with its place."""

from __future__ import annotations

import math

import pytest

from cupybnn.schema import (
    SchemaError,
    anything,
    boolean,
    integer,
    list_of,
    mapping_of,
    nullable,
    number,
    one_of,
    parse,
    real,
    record,
    text,
)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (integer(1, 3), [1, 3], [0, 4, 1.0, True, "1", None, 10**400]),
        (number(), [0, -1.5, 2**70], [math.nan, math.inf, -math.inf, 10**400, "1", False, 1j]),
        (number(0, 1), [0, 0.5, 1], [-0.1, 1.1]),
        (number(above=0), [1e-300], [0, -1]),
        (real, [1, math.nan, math.inf], ["nan", None, True, 10**400]),
        (boolean, [True, False], [0, 1, "true", None]),
        (text(), ["", "a\nb", "é"], [1, None, "a\0b", "\x1b[2J", "\udcff", "x" * 4001]),
        (text(r"\d+x"), ["12x"], ["12x\n", "x"]),
        (one_of("a", 1), ["a", 1], [True, 1.0, "b", ["a"], {}]),
        (nullable(integer()), [None, 3], ["x"]),
        (list_of(integer(), least=1, most=2), [[1], [1, 2]], [[], [1, 2, 3], ["x"], "12", {1: 2}]),
        (mapping_of(integer(), key=text(r"[a-z]")), [{}, {"a": 1}], [{"A": 1}, {"a": ""}, [], 1]),
        (record({"a": integer()}, {"b": boolean}), [{"a": 1}], [{}, {"a": 1, "c": 2}, [], None]),
        (record({}, others=True), [{"x": [object()]}], [1]),
        (anything, [object()], []),
    ],
)
def test_checks(check, right, wrong):
    for value in right:
        check(value, "")
    for value in wrong:
        with pytest.raises(SchemaError) as caught:
            check(value, "place")
        assert str(caught.value).startswith("place")
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rows": [{"n": 1}, {"n": 0}]}, r"rows\[1\]\.n must be an integer from 1 to 9; got 0"),
        ({"rows": []}, r"rows must be a list of 1 to 1,000,000 items; got a list of 0"),
        ({}, "it lacks rows"),
        ({"rows": [{}]}, r"rows\[0\] lacks n"),
        ({"rows": [{"n": 1}], "\x1b": 2}, r"no other names than rows, by; got '\\x1b'"),
        ({"rows": [{"n": 1}], "by": {"a": "b"}}, r"by\['a'\] must be true or false; got 'b'"),
        ({"rows": [{"n": "x" * 99}]}, r"got 'x{56}\.\.\."),
        ([], "the whole must be a mapping; got a list of 0"),
    ],
)
def test_the_place_of_a_fault(value, message):
    check = record(
        {"rows": list_of(record({"n": integer(1, 9)}), least=1)}, {"by": mapping_of(boolean)}
    )
    with pytest.raises(SchemaError, match=message + "$"):
        check(value, "")


def test_a_rule_for_the_whole():
    def ordered(value, place):
        if value["a"] > value["b"]:
            raise SchemaError(f"{place}.a must not exceed b")

    check = list_of(record({"a": integer(), "b": integer()}, also=ordered))
    check([{"a": 1, "b": 2}], "x")
    with pytest.raises(SchemaError, match=r"^x\[1\]\.a must not exceed b"):
        check([{"a": 1, "b": 2}, {"a": 3, "b": 2}], "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be JSON"),
        (b"\xff", "must be JSON"),
        ("{", "must be JSON"),
        ('"\\', "must be JSON"),
        ("[" * 100_000, "nested more than 32 levels deep"),
        ('{"a":' * 33 + "1" + "}" * 33, "nested more than 32 levels deep"),
        ("[NaN]", "NaN is not a valid JSON number"),
        ("[-Infinity]", "-Infinity is not a valid JSON number"),
        ("9" * 5000, "must be JSON"),
    ],
)
def test_what_is_no_json(content, message):
    with pytest.raises(SchemaError, match=message):
        parse(content)


def test_json():
    assert parse(b'\xef\xbb\xbf{"a": [1, "]]["]}') == {"a": [1, "]]["]}
    assert parse("[" * 32 + "]" * 32)
    assert parse('["' + "[" * 1000 + '\\"]"]') == ["[" * 1000 + '"]']
    assert math.isnan(parse("NaN", constants=True))
