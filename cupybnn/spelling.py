"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

__all__ = ["nearest"]


def nearest(name: str, names: Mapping[str, Iterable[str]]) -> list[str]:
    """Return up to three known names that are most similar to `name`, most likely first.

    Parameters
    ----------
    name : str
    names : mapping of str to iterable of str
        Each name with its synonyms.
    """
    given = name.lower().replace("-", "_")
    words = set(given.split("_"))

    def similarity(candidate: str) -> float:
        if given == candidate:
            return 1.0
        ratio = difflib.SequenceMatcher(None, given, candidate).ratio()
        parts = candidate.split("_")
        shared = len(words & set(parts)) / len(words | set(parts))
        return max(ratio, 0.6 + 0.4 * shared if shared else 0.0)

    scores = {
        known: max([similarity(known), *(0.99 * similarity(other) for other in synonyms)])
        for known, synonyms in names.items()
    }
    best = sorted(names, key=lambda known: -scores[known])[:3]
    least = max(0.65, 0.8 * scores[best[0]]) if best else 0.0
    return [known for known in best if scores[known] >= least]
