"""The ranks that save and load together, as much as this package needs of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from configs.errors import UserError
from faulttol import exits
from faulttol.checkpoint.manifest import Incomplete, SaveSuperseded, Uncertain

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
Failure = tuple[type[Exception], str]
"""Kind and text of an error, as ranks tell it each other."""


class Peers(Protocol):
    """A group of ranks; `gather` and `broadcast` are called by all of them together."""

    def gather(self, item: Any) -> list[Any] | None:
        """All ranks' items on rank 0, in rank order; None elsewhere."""

    def broadcast(self, item: Any) -> Any:
        """Rank 0's item on all ranks."""

    def exchange(self, out: Sequence[tuple[int, memoryview]], into: Sequence[tuple[int, memoryview]]) -> None:
        """Send bytes to ranks and fill buffers with what ranks send; returns when all of it is done.

        Called by the ranks that are named. Two ranks name the same sizes for each other, in the same order.

        Args:
            out: by receiver, what is sent; may be read until this returns.
            into: by sender, what is filled.
        """


class SoloPeers:
    """`Peers` of a single rank."""

    def gather(self, item: Any) -> list[Any] | None:
        """The item."""
        return [item]

    def broadcast(self, item: Any) -> Any:
        """The item."""
        return item

    def exchange(self, out: Sequence[tuple[int, memoryview]], into: Sequence[tuple[int, memoryview]]) -> None:
        """Nobody is there to be named."""
        assert not out and not into


def exchange(
    out: Sequence[tuple[int, memoryview]],
    into: Sequence[tuple[int, memoryview]],
    group: dist.ProcessGroup | None = None,
) -> None:
    """`Peers.exchange` over gloo.

    Args:
        group: of all ranks; None: the default one.
    """
    import torch
    import torch.distributed as dist

    turns: dict[tuple[bool, int], int] = {}
    works = []
    for sends, rows in ((False, into), (True, out)):
        for rank, data in rows:
            if len(data):
                turn = turns[sends, rank] = turns.get((sends, rank), -1) + 1
                tensor = torch.frombuffer(data, dtype=torch.uint8)
                act = dist.isend if sends else dist.irecv
                works.append(act(tensor, rank, group=group, tag=turn))
    for work in works:
        if work is not None:
            work.wait()


def failure_of(error: Exception) -> Failure:
    """What other ranks learn of an error: the kinds that somebody acts upon stay what they are."""
    for kind in (UserError, SaveSuperseded, Uncertain, Incomplete):
        if isinstance(error, kind):
            return kind, str(error)
    return Incomplete, f"{type(error).__name__}: {error}"


def capture_failure(act: Callable[[], T]) -> tuple[T | None, Failure | None]:
    """What `act` returns, or how it failed, so that a rank tells its peers before it raises."""
    try:
        return act(), None
    except Exception as error:
        exits.record_own_error(error)
        return None, failure_of(error)


def by_rank(failed: Sequence[tuple[int, str]]) -> str:
    """What ranks failed by, each reason once with its first rank and how many have it too; three reasons at most.

    Args:
        failed: rank and reason; a full disk gives every rank the same.
    """
    ranks: dict[str, list[int]] = {}
    for rank, text in failed:
        ranks.setdefault(text, []).append(rank)
    said = []
    for text, having in list(ranks.items())[:3]:
        others = f" and {len(having) - 1} more" if len(having) > 1 else ""
        said.append(f"rank {having[0]}{others}: {text}")
    left = len(ranks) - len(said)
    return "; ".join(said) + (f"; and {left} other reasons" if left > 1 else "; and another" if left else "")


def run_on_rank_zero(peers: Peers, first: bool, act: Callable[[], T]) -> tuple[T | None, Failure | None]:
    """What `act` gave on rank 0, on all ranks.

    Args:
        first: whether this is rank 0.
    """
    answer: tuple[T | None, Failure | None] = peers.broadcast(capture_failure(act) if first else None)
    return answer


def run_on_all_ranks(peers: Peers, act: Callable[[], T]) -> tuple[T | None, list[Failure]]:
    """What `act` gave on this rank, and on all ranks the failures of all, each once, `UserError` first."""
    mine, failure = capture_failure(act)
    answers = peers.gather(failure)
    failed = None
    if answers is not None:
        failed = sorted(dict.fromkeys(filter(None, answers)), key=lambda f: f[0] is not UserError)
    failures: list[Failure] = peers.broadcast(failed)
    return mine, failures
