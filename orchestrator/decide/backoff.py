"""How long to wait before something that failed is tried again."""

from __future__ import annotations

import math

_DOUBLINGS = 64
"""Bound on the exponent: past it the cap holds for any wait that is worth the name, and a float would overflow."""


def exponential_backoff(first: float, failures: int, cap: float) -> float:
    """Seconds to wait after so many failures in a row: `first`, then twice as long each time, up to `cap`.

    Args:
        first: seconds after the first failure.
        failures: from 1.
        cap: longest wait, in seconds.
    """
    return min(math.ldexp(first, min(failures - 1, _DOUBLINGS)), cap)
