"""The ranks that save and load together, as much as this room needs of them."""

from __future__ import annotations

from typing import Any, Protocol


class Peers(Protocol):
    """A group of ranks; every method is called by all of them together."""

    def gather(self, item: Any) -> list[Any] | None:
        """All ranks' items on rank 0, in rank order; None elsewhere."""

    def broadcast(self, item: Any) -> Any:
        """Rank 0's item on all ranks."""


class Alone:
    """`Peers` of a single rank."""

    def gather(self, item: Any) -> list[Any] | None:
        """The item."""
        return [item]

    def broadcast(self, item: Any) -> Any:
        """The item."""
        return item
