"""The choice of combinations that stand for all, which the tests of compilation rely on."""

from __future__ import annotations

from itertools import combinations, product

from covering import covering

EVERY = [
    dict(zip("abcd", values, strict=True)) for values in product(range(3), range(3), "xy", range(3))
]


def values(variants) -> set:
    return {item for variant in variants for item in variant.items()}


def pairs(variants) -> set:
    return {pair for v in variants for pair in combinations(sorted(v.items()), 2)}


def test_every_pair_of_values_is_shown_by_few():
    chosen = covering(EVERY)
    assert pairs(chosen) == pairs(EVERY)
    assert all(variant in EVERY for variant in chosen)
    assert len(chosen) <= 14  # of 54; nine are the least that show three times three values


def test_pairs_that_no_variant_has_are_not_asked_for():
    some = [v for v in EVERY if v["a"] != v["b"]]
    assert pairs(covering(some)) == pairs(some)


def test_values_alone():
    chosen = covering(EVERY, pairs=False)
    assert values(chosen) == values(EVERY)
    assert len(chosen) == 3


def test_values_that_must_come_together():
    chosen = covering(EVERY, together="abc", pairs=False)
    assert {(v["a"], v["b"], v["c"]) for v in chosen} == set(product(range(3), range(3), "xy"))
    assert len(chosen) == 18


def test_unpaired_parameters_show_each_value():
    chosen = covering(EVERY, unpaired=["d"])
    assert values(chosen) == values(EVERY)
    assert len(chosen) == 9


def test_what_is_covered_is_not_chosen_again():
    assert covering(EVERY, covered=covering(EVERY)) == []
    rest = covering(EVERY, covered=EVERY[:30])
    assert pairs(rest) | pairs(EVERY[:30]) == pairs(EVERY)
    assert 0 < len(rest) < len(covering(EVERY))


def test_missing_parameters_are_no_values():
    some = [{"a": 1}, {"a": 1, "b": 2}, {"b": 3}]
    assert covering(some) == [some[1], some[2]]
