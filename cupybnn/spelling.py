"""What someone may have meant who wrote a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

__all__ = ["nearest"]


def nearest(name: str, names: Mapping[str, Iterable[str]], most: int = 3) -> list[str]:
    """Return the names that someone who wrote `name` may have meant, the likeliest first.

    Parameters
    ----------
    name : str
    names : mapping of str to iterable of str
        Each name and its synonyms.
    most : int
        Return no more than this.
    """
    given = name.lower().replace("-", "_")
    words = set(given.split("_"))

    def likeness(candidate: str) -> float:
        if given == candidate:
            return 1.0
        ratio = difflib.SequenceMatcher(None, given, candidate).ratio()
        parts = candidate.split("_")
        shared = len(words & set(parts)) / len(words | set(parts))
        return max(ratio, 0.6 + 0.4 * shared if shared else 0.0)

    scores = {
        known: max([likeness(known), *(0.99 * likeness(other) for other in synonyms)])
        for known, synonyms in names.items()
    }
    best = sorted(names, key=lambda known: -scores[known])[:most]
    least = max(0.65, 0.8 * scores[best[0]]) if best else 0.0
    return [known for known in best if scores[known] >= least]
