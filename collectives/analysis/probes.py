"""What the study of faults measures: each endpoint's own speed, and messages in every direction. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import median

Pair = tuple[int, int]
"""Source rank and target rank."""


@dataclass(frozen=True)
class Endpoint:
    """What is probed: a rank on its host, with its adapter and its device."""

    rank: int
    host: str
    """Address."""
    lane: int
    """Rank within the host; endpoints of one lane are paired across hosts."""
    cpu_seconds: tuple[float, ...]
    """Repeats of a fixed piece of work in the interpreter."""
    device_seconds: tuple[float, ...] = ()
    """Repeats of a fixed matmul; empty without a GPU."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.host} rank {self.rank}"


@dataclass(frozen=True)
class Direction:
    """Messages from one endpoint to another, each acknowledged; in seconds."""

    source: int
    """Rank."""
    target: int
    first: float
    """The very first message, which sets up the connection."""
    passes: tuple[tuple[float, ...], ...]
    """Messages of each pass, in order; the confirmations too."""
    confirmations: int = 0
    """The last so many passes had the machines to themselves."""

    @property
    def alone(self) -> tuple[tuple[float, ...], ...]:
        """Passes that had the machines to themselves."""
        return self.passes[len(self.passes) - self.confirmations :]

    @property
    def seconds(self) -> float:
        """What a message usually takes: the median of all passes' messages."""
        return median(self._messages)

    @property
    def quick(self) -> float:
        """What three quarters of the messages exceed: noise comes and goes, a fault stays."""
        return self._messages[len(self._messages) // 4]

    @cached_property
    def _messages(self) -> list[float]:
        return sorted(t for one in self.passes for t in one)


@dataclass(frozen=True)
class Probes:
    """All that the fault study measured."""

    size: int
    """Bytes of a message."""
    endpoints: tuple[Endpoint, ...]
    directions: tuple[Direction, ...]

    def rates(self) -> list[tuple[int, int, float]]:
        """Source rank, target rank, GB/s."""
        return [(d.source, d.target, self.size / d.seconds / 1e9) for d in self.directions]
