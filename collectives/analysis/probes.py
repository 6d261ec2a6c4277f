"""What the study of faults measures: each endpoint's own speed, and messages in every direction. Plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pair = tuple[int, int]
"""Source rank and target rank."""
_PART = 500
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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
    passes: tuple[Sequence[float] | Floats, ...]
    """Messages of each pass, in order; the confirmations too."""
    confirmations: int = 0
    """The last so many passes had the machines to themselves."""

    @property
    def pair(self) -> Pair:
        """Source and target."""
        return self.source, self.target

    @property
    def alone(self) -> tuple[Sequence[float] | Floats, ...]:
        """Passes that had the machines to themselves."""
        return self.passes[len(self.passes) - self.confirmations :]

    def to_json(self) -> dict[str, Any]:
        """As a plain tree, times to a tenth of a microsecond."""
        passes = [np.round(np.asarray(one), 7).tolist() for one in self.passes]
        return vars(self) | {"first": round(self.first, 7), "passes": passes}


@dataclass(frozen=True)
class DirectionTable:
    """All directions as arrays over P directions: 1,024 ranks have 130,048, too many for a loop over each message."""

    source: Ints
    target: Ints
    first: Floats
    """Seconds of the first message."""
    messages: Floats
    """[P, passes, messages] in seconds, NaN where a direction has fewer."""
    quick: Floats
    """What three quarters of a direction's messages exceed: noise comes and goes, a fault stays."""
    seconds: Floats
    """What a message usually takes: the median of all passes' messages."""

    @classmethod
    def of(cls, directions: Sequence[Direction]) -> DirectionTable:
        """The table of directions that each have a message."""
        passes = max((len(d.passes) for d in directions), default=0) or 1
        longest = max((len(one) for d in directions for one in d.passes), default=0) or 1
        messages = np.full((len(directions), passes, longest), np.nan)
        for row, d in zip(messages, directions, strict=True):
            for number, one in enumerate(d.passes):
                row[number, : len(one)] = one
        ordered = np.sort(messages.reshape(len(directions), passes * longest), axis=1)  # NaN comes last
        count, at = np.isfinite(ordered).sum(axis=1), np.arange(len(directions))
        middle = (ordered[at, (count - 1) // 2] + ordered[at, count // 2]) / 2 if directions else np.zeros(0)
        return cls(
            source=np.array([d.source for d in directions], dtype=np.int64),
            target=np.array([d.target for d in directions], dtype=np.int64),
            first=np.array([d.first for d in directions]),
            messages=messages,
            quick=ordered[at, count // 4] if directions else np.zeros(0),
            seconds=middle,
        )

    @cached_property
    def place(self) -> dict[Pair, int]:
        """Row of a pair."""
        pairs = zip(self.source.tolist(), self.target.tolist(), strict=True)
        return {pair: row for row, pair in enumerate(pairs)}

    def pair(self, row: int) -> Pair:
        """Source and target of a row."""
        return int(self.source[row]), int(self.target[row])


@dataclass(frozen=True)
class Probes:
    """All that the fault study measured."""

    size: int
    """Bytes of a message."""
    endpoints: tuple[Endpoint, ...]
    directions: tuple[Direction, ...]

    @cached_property
    def table(self) -> DirectionTable:
        """The directions as arrays."""
        return DirectionTable.of(self.directions)

    @cached_property
    def hosts(self) -> dict[int, str]:
        """Address of each rank's host."""
        return {endpoint.rank: endpoint.host for endpoint in self.endpoints}

    def rates(self) -> list[tuple[int, int, float]]:
        """Source rank, target rank, GB/s."""
        table = self.table
        rates = self.size / table.seconds / 1e9
        return list(zip(table.source.tolist(), table.target.tolist(), rates.tolist(), strict=True))

    def json_parts(self) -> Iterator[str]:
        """As JSON, in parts of some hundred directions: those of 1,024 ranks are 55 MB, and many times that as a tree."""
        head = json.dumps({"size": self.size, "endpoints": [vars(endpoint) for endpoint in self.endpoints]})
        yield f'{head[:-1]}, "directions": ['
        for begin in range(0, len(self.directions), _PART):
            part = json.dumps([one.to_json() for one in self.directions[begin : begin + _PART]])
            yield f"{',' if begin else ''}\n{part[1:-1]}"
        yield "]}\n"
