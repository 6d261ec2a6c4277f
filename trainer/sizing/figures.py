"""A figure of a forecast: its value, its unit, how sure it is, and how it came about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Derivation = str | Callable[[], str]
"""A formula with its numbers filled in; a function where a search would make thousands that nobody reads."""


@dataclass(frozen=True)
class Figure:
    """A number on the screen. `--explain` shows what it was made from, down to what was measured or published."""

    name: str
    """Dotted, unique within one answer: what `--explain` takes."""
    value: float
    unit: str
    """`s`, `bytes`, `FLOP`, `GB/s`, `TFLOP/s`, `tokens/s`, `%`, `1`."""
    low: float
    """Lower end of the interval; equal to the value where the figure is exact."""
    high: float
    how: Derivation = ""
    parts: tuple[Figure, ...] = ()
    """Figures that it was made from."""

    @property
    def derivation(self) -> str:
        """The formula with its numbers."""
        return self.how if isinstance(self.how, str) else self.how()

    def over(self, bottom: Figure, name: str, unit: str, how: Derivation, factor: float = 1.0) -> Figure:
        """The ratio of this figure and another, times a factor."""
        value, low, high = self.value / bottom.value, self.low / bottom.high, self.high / bottom.low
        return Figure(name, value * factor, unit, low * factor, high * factor, how, (self, bottom))

    def walk(self) -> Iterator[Figure]:
        """This figure, and all that it is made from."""
        yield self
        for part in self.parts:
            yield from part.walk()


def exact(name: str, value: float, unit: str, how: Derivation, parts: tuple[Figure, ...] = ()) -> Figure:
    """A figure without uncertainty: arithmetic on what was configured."""
    return Figure(name, value, unit, value, value, how, parts)


def approximate(name: str, value: float, unit: str, share: float, how: Derivation) -> Figure:
    """A figure that is sure to within a share of its value."""
    return Figure(name, value, unit, value * (1 - share), value * (1 + share), how)


def summed(name: str, value: float, unit: str, how: Derivation, parts: Sequence[Figure]) -> Figure:
    """A figure that its parts add up to, and its interval theirs: all may be off the same way."""
    low, high = sum(part.low for part in parts), sum(part.high for part in parts)
    return Figure(name, value, unit, low, high, how, tuple(parts))


def max_or_nan(*values: float) -> float:
    """The largest; NaN where one of them is unknown, which `max` keeps only where it comes first."""
    return math.nan if math.isnan(sum(values)) else max(values)


def min_or_nan(*values: float) -> float:
    """The smallest; NaN where one of them is unknown."""
    return math.nan if math.isnan(sum(values)) else min(values)
