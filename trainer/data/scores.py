"""The score that the best share of all rows reaches, found exactly in bounded memory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

_BITS = 16
_ROWS = 1 << 20
"""Scores that are in memory at a time."""


def threshold(path: Path, share: float) -> tuple[float, int, int]:
    """The lowest score that is kept, how many rows are kept, and of how many.

    The best ceil(share * rows) rows are kept, and with the last of them every row that has the same score: which
    of equal rows comes first doesn't decide. So more than `share` may be kept, never less.

    Args:
        path: file of float64 scores, all finite.
        share: above 0, at most 1.
    """
    rows = path.stat().st_size // 8
    if not rows:
        return -math.inf, 0, 0
    scores = np.memmap(path, "<f8", "r", 0, (rows,))
    rank = rows - math.ceil(rows * share)  # of the lowest kept score, from 0 at the lowest of all
    prefix = 0
    for done in range(0, 64, _BITS):  # 16 bits of the key are settled in each pass
        counts = np.zeros(1 << _BITS, dtype=np.int64)
        for at in range(0, rows, _ROWS):
            keys = _sortable_keys(scores[at : at + _ROWS])
            if done:
                keys = keys[keys >> np.uint64(64 - done) == np.uint64(prefix)]
            digits = (keys >> np.uint64(64 - done - _BITS)).astype(np.int64) & ((1 << _BITS) - 1)
            counts += np.bincount(digits, minlength=1 << _BITS)
        below = np.cumsum(counts)
        digit = int(np.searchsorted(below, rank, side="right"))
        rank -= int(below[digit - 1]) if digit else 0
        prefix = prefix << _BITS | digit
    lowest = _score(prefix)
    kept = sum(int((scores[at : at + _ROWS] >= lowest).sum()) for at in range(0, rows, _ROWS))
    return lowest, kept, rows


def _sortable_keys(scores: np.ndarray) -> np.ndarray:
    """uint64 keys in the order of the scores: the sign bit set, or all bits turned where it was set."""
    bits = (np.asarray(scores, dtype=np.float64) + 0.0).view(np.uint64)  # + 0.0: -0 equals 0
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))


def _score(key: int) -> float:
    bits = key & ~(1 << 63) if key >> 63 else ~key & (1 << 64) - 1
    return float(np.array([bits], dtype=np.uint64).view(np.float64)[0])
