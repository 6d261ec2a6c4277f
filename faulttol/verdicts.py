"""Verdicts: what a detector found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class VerdictKind(StrEnum):
    """What is wrong. The order is the order of severity: the first names a cause before a later one does."""

    USER_ERROR = "user_error"
    CLUSTER_LOST = "cluster_lost"
    NODE_LOST = "node_lost"
    AGENT_LOST = "agent_lost"
    NODE_UNFIT = "node_unfit"
    """The node could not start ranks: a mount, an I/O error, its memory. The run is sound."""
    REPLICAS_DIFFER = "replicas_differ"
    """Copies of the state that must be equal aren't: a device computed wrongly, or memory flipped a bit. It names a
    node where it is known whose copy is wrong."""
    RANK_EXIT = "rank_exit"
    HANG = "hang"
    START_TIMEOUT = "start_timeout"
    CHECKPOINT_OVERDUE = "checkpoint_overdue"
    """The run trains, and its state isn't saved; the one kind that stops nothing."""


@dataclass(frozen=True)
class Verdict:
    """A finding about one rank, one node or the gang as a whole."""

    kind: VerdictKind
    detail: str
    """One sentence for a person."""
    rank: int | None = None
    node: str | None = None
    """Address of the node."""
    time: float | None = None
    """When it happened, in seconds since the epoch; None where only the finding has a time."""
    evidence: str = ""
    """Path to look at."""

    def to_json(self) -> dict[str, Any]:
        """As a plain tree."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Verdict:
        """The inverse of `to_json`."""
        return cls(**{**tree, "kind": VerdictKind(tree["kind"])})
