"""What a check found. `unknown` is not `bad`: an instrument that can't look must not bar a sound node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class CheckOutcome(StrEnum):
    """How a check came out."""

    GOOD = "good"
    BAD = "bad"
    UNKNOWN = "unknown"
    """It could not look."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    outcome: CheckOutcome
    text: str
    """What was measured, or why it is bad or couldn't be; one line."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Preflight:
    """All that was looked at on a node."""

    checks: tuple[Check, ...]

    @property
    def why(self) -> str:
        """What is bad, in one line; empty where nothing is."""
        return "; ".join(f"{one.name}: {one.text}" for one in self.checks if one.outcome is CheckOutcome.BAD)

    def to_json(self) -> dict[str, Any]:
        """As a plain tree."""
        return {"bad": self.why, "checks": [asdict(one) for one in self.checks]}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Preflight:
        """The inverse of `to_json`.

        Raises:
            ValueError: where it isn't one.
        """
        try:
            return cls(
                tuple(Check(**{**one, "outcome": CheckOutcome(one["outcome"])}) for one in tree["checks"])
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a preflight: {error}") from error

    def lines(self) -> Sequence[str]:
        """For a person."""
        rows = [
            f"{one.outcome.upper():<8} {one.name:<22} {one.text} ({one.seconds:.2f} s)" for one in self.checks
        ]
        return [*rows, f"not fit: {self.why}" if self.why else "fit to serve"]
