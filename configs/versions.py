"""Ranges of versions, as `>=2.12,<2.28`: compared number by number, so that 2.9 comes before 2.10."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

Version = tuple[int, ...]

_COMPARE: dict[str, Callable[[list[int], list[int]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_BOUND = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*([0-9]+(?:\.[0-9]+)*)\s*", re.ASCII)


@dataclass(frozen=True)
class Versions:
    """A range: every comparison must hold. Missing numbers are zeros, so 2.18 is 2.18.0."""

    bounds: tuple[tuple[str, Version], ...]

    @classmethod
    def parse(cls, text: str) -> Versions:
        """The range that `text` spells: comparisons, separated by commas.

        Raises:
            ValueError: where a part isn't one of >=, <=, ==, !=, >, < and a dotted number.
        """
        parts = [_BOUND.fullmatch(part) for part in text.split(",")]
        bounds = [(part[1], tuple(map(int, part[2].split(".")))) for part in parts if part]
        if len(bounds) < len(parts):
            raise ValueError(f"'{text}' is not a range of versions; type e.g. '>=2.18' or '>=2.12,<2.28'")
        return cls(tuple(bounds))

    @property
    def everything(self) -> bool:
        """Whether no version is outside, as of `>=0`; then it needn't be known."""
        return all(compare == ">=" and not any(bound) for compare, bound in self.bounds)

    def __contains__(self, version: Version) -> bool:
        """Whether `version` is in the range."""
        return all(_holds(compare, version, bound) for compare, bound in self.bounds)


def _holds(compare: str, version: Version, bound: Version) -> bool:
    padded = list(zip_longest(version, bound, fillvalue=0))
    return _COMPARE[compare]([mine for mine, _ in padded], [other for _, other in padded])
