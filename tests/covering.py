"""Few combinations of parameters that stand for many."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

Variant = Mapping[str, Any]


def covering(
    variants: Sequence[Variant],
    *,
    together: Sequence[str] = (),
    unpaired: Sequence[str] = (),
    pairs: bool = True,
    covered: Iterable[Variant] = (),
) -> list[Variant]:
    """Choose variants that show each value, and each pair of values, that any variant has.

    Nearly every fault of a program with many parameters needs one or two of them to be set
    (Kuhn, Wallace, Gallo: Software fault interactions and implications for software testing, IEEE
    TSE 2004). So these show what all combinations would, and are a fraction of them.

    Parameters
    ----------
    variants : sequence of mapping
        Value of each parameter; not every variant needs every parameter.
    together : sequence of str
        Parameters whose values must also all appear as they come together.
    unpaired : sequence of str
        Parameters of which only each value counts.
    pairs : bool
        False asks only for each value and for what is `together`.
    covered : iterable of mapping
        What these show need not be shown again.

    Returns
    -------
    list of mapping
        Some of the variants. The choice is the same in each process.
    """

    def shown(variant: Variant) -> set[Hashable]:
        values = sorted(variant.items())
        parts: set[Hashable] = {(value,) for value in values}
        parts.add(("together", *((name, variant.get(name)) for name in together)))
        paired = [value for value in values if pairs and value[0] not in unpaired]
        return parts | set(combinations(paired, 2))

    parts = [shown(variant) for variant in variants]
    missing = set().union(*parts) - set().union(*map(shown, covered))
    chosen = []
    while missing:
        best = max(range(len(variants)), key=lambda i: len(parts[i] & missing))
        missing -= parts[best]
        chosen.append(variants[best])
    return chosen
