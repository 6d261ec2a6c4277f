"""Which part of a mixture each sample comes from: by weights alone, evenly, at any position in constant time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class _Node:
    left: _Node | int
    right: _Node | int
    share: tuple[int, int]
    """Weight of the left side, and of both."""

    def before(self, position: int) -> int:
        """Samples of the left side among the first `position`: its exact share, rounded."""
        part, whole = self.share
        return (2 * position * part + whole) // (2 * whole)


class Mixture:
    """Deals samples to parts.

    Two parts: of the first n samples, round(n * weight) are the first part's; that grows by 0 or 1 with each
    sample, so it says whose each is. More parts: a Huffman tree of such splits, the weights taken exactly. A part's
    count so never differs from its exact share by 2 samples, of three parts or fewer by 1, however long the run.
    A part's own samples come in order, whatever lies between.

    Args:
        weights: of the parts, above 0; they needn't add up to 1.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        scale = math.lcm(*(one.denominator for one in exact))
        heap: list[tuple[int, int, _Node | int]] = [(int(w * scale), i, i) for i, w in enumerate(exact)]
        heapq.heapify(heap)
        self._parts = order = len(heap)
        while len(heap) > 1:
            (small, _, left), (large, _, right) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (small + large, order, _Node(left, right, (small, small + large))))
            order += 1
        self._root = heap[0][2]

    def choose(self, position: int) -> tuple[int, int]:
        """Part of the sample at `position`, and how many samples of that part come before it."""
        node = self._root
        while isinstance(node, _Node):
            left = node.before(position)
            if node.before(position + 1) > left:
                node, position = node.left, left
            else:
                node, position = node.right, position - left
        return node, position

    def counts(self, position: int) -> list[int]:
        """Samples of each part among the first `position`."""
        counts = [0] * self._parts
        todo: list[tuple[_Node | int, int]] = [(self._root, position)]
        while todo:
            node, among = todo.pop()
            if isinstance(node, _Node):
                left = node.before(among)
                todo += [(node.left, left), (node.right, among - left)]
            else:
                counts[node] = among
        return counts
