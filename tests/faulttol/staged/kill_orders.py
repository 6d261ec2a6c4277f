"""What passes between `tests.faulttol.kills`, its ranks and its judge; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WORLD = 2
"""Ranks of an attempt."""
KEEP = 2
"""Checkpoints that are kept."""


@dataclass(frozen=True)
class Order:
    """What the ranks of one attempt do."""

    root: str
    attempt: int
    rows: int
    """Of the large tensor, which has 4 KiB a row."""
    background: bool
    """Through `Saver`, not `save`."""
    log: str
    """Beginning of the names of the ranks' logs."""
    variables: Mapping[str, str]
    """Of the environment."""
    most: int | None = None
    """Saves after which a rank ends by itself."""


@dataclass(frozen=True)
class Judged:
    """What a process that had no part in it finds in the folder."""

    newest: tuple[int, int] | None
    """Attempt and step of what loads."""
    problem: str
    commits: int
    begun: int
    """Steps without a manifest: what kills have left."""
