"""Figures for reading."""

from __future__ import annotations

import math


def number(value: float, digits: int = 4) -> str:
    """A figure with about `digits` significant ones, and at most as many decimals."""
    if not math.isfinite(value):
        return "N/A"
    if value and abs(value) < 10.0**-digits:
        return f"{value:.1e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else digits - 2
    return f"{value:.{min(max(decimals, 0), digits)}f}"
