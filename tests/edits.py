"""Random edits of JSON values, for tests of what reads them."""

from __future__ import annotations

NASTY = (
    None, True, -1, 0, 2.7, 10**400, 2**60, float("nan"), float("inf"), "", "str", "\0", "\udcff",
    "../../x", [], [[]], {}, {"a": 1}, [None], 1e308,
)  # fmt: skip


def edit(value, rng) -> None:
    """Replace, remove or add something at a random place of a JSON value."""
    while True:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.integers(len(value))
        key = str(key) if isinstance(value, dict) else int(key)
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        action = rng.integers(4)
        if action == 0:
            del value[key]
        elif action == 1 and isinstance(value, dict):
            value["more"] = value.pop(key)
        else:
            value[key] = NASTY[rng.integers(len(NASTY))]
        return
