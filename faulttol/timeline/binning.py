"""Bins the columns of a level into the wider columns that are drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class BinTotals:
    """Sums, weights and maxima of wide columns, to which narrow ones are added.

    Args:
        rows: ranks.
        edges: [columns + 1] where the wide columns begin, and the last one's end; all as wide.
    """

    def __init__(self, rows: int, edges: NDArray[np.int64]) -> None:
        self._edges = edges
        shape = (rows, len(edges) - 1)
        self._sums, self._weights = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._mosts = np.full(shape, np.nan, np.float32)
        self._has = np.zeros(shape[1], bool)

    def add(
        self, means: NDArray[np.float32], mosts: NDArray[np.float32], steps: NDArray[np.int64], size: int
    ) -> None:
        """Add columns [rows, columns] that begin at `steps`, ascending, and hold `size` steps each."""
        # A multiple of `size`, as are the distances of steps and edges.
        width = int(self._edges[1] - self._edges[0])
        first, inside = divmod(int(steps[0] - self._edges[0]), width)
        joins, lead = width // size, inside // size
        count = -(-(lead + len(steps)) // joins)
        into = slice(first, first + count)
        if joins == 1 and not self._has[into].any():
            self._sums[:, into], self._weights[:, into], self._mosts[:, into] = means, ~np.isnan(means), mosts
            self._sums[:, into][np.isnan(means)] = 0
            self._has[into] = True
            return
        means, mosts = (_padded(part, lead, count * joins) for part in (means, mosts))
        known = ~np.isnan(means)
        whole = bool(known.all())
        values = means if whole else np.where(known, means, np.float32(0))
        total, most = values[:, ::joins].copy(), mosts[:, ::joins].copy()
        weight = np.full((1, count), joins, np.float32) if whole else known[:, ::joins].astype(np.float32)
        for part in range(1, joins):  # some long sums instead of many short ones
            total += values[:, part::joins]
            np.fmax(most, mosts[:, part::joins], out=most)
            if not whole:
                weight += known[:, part::joins]
        self._sums[:, into] += total * np.float32(size)
        self._weights[:, into] += weight * np.float32(size)
        self._mosts[:, into] = np.fmax(self._mosts[:, into], most)
        self._has[into] = True

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and maximum."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._sums / self._weights, self._mosts


def _padded(values: NDArray[np.float32], lead: int, length: int) -> NDArray[np.float32]:
    """Columns with unknown ones before and behind, up to a length."""
    if not lead and values.shape[1] == length:
        return values
    padded = np.full((len(values), length), np.nan, np.float32)
    padded[:, lead : lead + values.shape[1]] = values
    return padded
