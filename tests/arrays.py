"""Arrays of either backend, as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np


def host(array: Any) -> np.ndarray:
    """Return `array` itself if it is NumPy's, else a copy of it on the host."""
    return array if isinstance(array, np.ndarray) else array.get()
