"""Loading under any layout: the newest checkpoint that every rank can read, each rank only what it needs of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError, nearest
from faulttol import exits
from faulttol.checkpoint import sharing
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder, ManifestDirectory, folder_of
from faulttol.checkpoint.manifest import Identity as Identity
from faulttol.checkpoint.manifest import Incomplete, SaveSuperseded, Tensor
from faulttol.checkpoint.manifest import ManifestHead as ManifestHead
from faulttol.checkpoint.peers import Failure, Peers, run_on_all_ranks, run_on_rank_zero
from faulttol.checkpoint.pieces import LoadTarget as LoadTarget
from faulttol.checkpoint.reading import CheckpointReader
from faulttol.checkpoint.retention import read_lease
from faulttol.checkpoint.store import CheckpointStore, StoreLike

BUFFER = 256 << 20
"""Bytes that a load takes beside what it fills, at most, whatever is loaded."""


@dataclass(frozen=True)
class Tier:
    """A place that a run may begin from."""

    name: str
    """As reports tell it: `store`, `memory`, …"""
    store: StoreLike
    owner: bool = True
    """Whether the run saves there; else it is another run's, which is only read and whose run isn't checked."""
    step: int | None = None
    """The only step that may be taken; None: any."""


def stored(root: str) -> list[Tier]:
    """The one tier of a run that has a folder or URL alone."""
    return [Tier("store", CheckpointStore(root))]


@dataclass(frozen=True)
class Restored:
    """A checkpoint that all ranks have loaded."""

    step: int
    facts: dict[str, Any]
    """That were saved with it."""
    path: str
    passed: tuple[str, ...]
    """Why newer checkpoints were passed over."""
    bytes: int
    """That this rank has read of storage, its part of the manifest included."""
    tier: str
    """Name of the tier that it was loaded from."""


@dataclass(frozen=True)
class _Candidate:
    """A commit of a tier."""

    tier: int
    commit: CheckpointCommit


def newest(tiers: Sequence[Tier], peers: Peers) -> ManifestHead | None:
    """The newest checkpoint whose manifest can be read and whose files are there; None where nothing is committed.

    Only rank 0 reads, all ranks call this together and get the same.

    Raises:
        UserError: on every rank, where a tier has checkpoints of format 1 or of several runs, or lacks its one step.
        Incomplete: on every rank, where checkpoints are committed and no manifest can be read.
    """

    def find() -> ManifestHead | None:
        candidates, passed = _candidates(tiers, None)
        for one in candidates:
            try:
                return CheckpointFolder(tiers[one.tier].store).head(one.commit)
            except Incomplete as error:
                passed.append(_passed(tiers, one, str(error)))
        if passed:
            raise _none_readable(tiers, passed)
        return None

    first = peers.gather(None) is not None
    head, failure = run_on_rank_zero(peers, first, find)
    if failure is not None:
        raise _error(failure)
    return head


def restore(
    tiers: Sequence[Tier],
    wanted: Sequence[LoadTarget],
    peers: Peers,
    identity: Identity,
    alive: Callable[[], None] = lambda: None,
) -> Restored | None:
    """Fill live tensors from the newest checkpoint that every rank can read, whatever layout saved it.

    All ranks call this together and agree on the checkpoint: the newest attempt's highest step, of the earlier tier
    where two have it. Another run's are looked at where the run has none of its own. Each rank reads the blocks that
    its boxes touch, and verifies each before it is used; what several ranks want is read by one of them and passed on.

    Args:
        tiers: the same on all ranks, the fastest first.
        wanted: what this rank needs; together the ranks must want every tensor of the checkpoint.
        identity: of this run: another run's checkpoints are refused where it saves itself.
        alive: called as bytes come in, one call at a time.

    Returns:
        None where nothing has been committed.

    Raises:
        UserError: on every rank, where a folder is another run's or of format 1, or the newest checkpoint has other
            tensors, shapes or dtypes than the ranks want: the state of another model.
        Incomplete: on every rank, where checkpoints were committed and none can be read: to start afresh would be to
            lose them in silence. Tensors may be half filled then.
    """
    first = identity.rank == 0
    answer, failure = run_on_rank_zero(peers, first, lambda: _candidates(tiers, identity))
    if failure is not None or answer is None:
        raise _error(failure)
    candidates, passed = answer
    for one in candidates:
        tier = tiers[one.tier]
        with read_lease(tier.store, one.commit) if first and tier.owner else nullcontext():
            loaded = _load(tier.store, one.commit, wanted, peers, identity, alive)
        if not isinstance(loaded, str):
            head, size = loaded
            path = f"{tier.store.url.rstrip('/')}/{folder_of(head.step)}"
            return Restored(head.step, head.facts, path, tuple(passed), size, tier.name)
        passed.append(_passed(tiers, one, loaded))
    if passed:
        raise _none_readable(tiers, passed)
    return None


def _candidates(tiers: Sequence[Tier], identity: Identity | None) -> tuple[list[_Candidate], list[str]]:
    """Committed checkpoints, newest first, and why tiers were passed over that can't be listed.

    Args:
        identity: of the run; None: whose tiers they are isn't checked.
    """
    passed: list[str] = []
    for owner in (True, False):
        candidates: list[_Candidate] = []
        for place, tier in enumerate(tiers):
            if tier.owner == owner:
                try:
                    candidates += [_Candidate(place, commit) for commit in _commits(tier, identity)]
                except OSError as error:
                    passed.append(f"{tier.name} {tier.store.url} can't be listed: {error}")
        if candidates:
            return sorted(candidates, key=lambda c: (-c.commit.attempt, -c.commit.step, c.tier)), passed
        if passed:  # what can't be listed may hold the run's own checkpoints
            return [], passed
    return [], passed


def _commits(tier: Tier, identity: Identity | None) -> list[CheckpointCommit]:
    folder = CheckpointFolder(tier.store)
    if not tier.owner or identity is None:
        folder.refuse_others()
    else:
        try:
            folder.check_owner(identity)
        except SaveSuperseded as error:  # a restart wouldn't mend it
            raise UserError(str(error)) from None
    commits = [commit for commit in folder.commits if tier.step in (None, commit.step)]
    if tier.step is not None and not commits:
        there = ", ".join(str(commit.step) for commit in folder.commits[-4:]) or "none"
        raise UserError(
            f"resume='{tier.store.url}/{folder_of(tier.step)}' isn't a committed checkpoint: the last steps there are "
            f"{there}; name one of them"
        )
    return commits


def _load(
    store: StoreLike,
    commit: CheckpointCommit,
    wanted: Sequence[LoadTarget],
    peers: Peers,
    identity: Identity,
    alive: Callable[[], None],
) -> tuple[ManifestHead, int] | str:
    """Load one checkpoint: its head and the bytes that were read, or why a rank could not."""
    head, failure = run_on_rank_zero(peers, identity.rank == 0, lambda: CheckpointFolder(store).head(commit))
    if failure is not None or head is None:
        return _reason([failure])
    directory = ManifestDirectory(store, head)
    tensors, failures = run_on_all_ranks(peers, lambda: directory.find(dict.fromkeys(w.name for w in wanted)))
    if failures or tensors is None:
        return _reason(failures)
    failure = _refuse_another(store, directory, tensors, wanted, peers)
    if failure is not None:
        return _reason([failure])
    home = identity.rank if head.world == identity.world else None
    reader = CheckpointReader(store, directory, wanted, home, alive)
    alone, groups = sharing.grouped(wanted, peers, identity)
    _, failures = run_on_all_ranks(peers, lambda: sharing.load(reader, alone, groups, peers, identity))
    if failures:
        return _reason(failures)
    return head, reader.bytes + directory.bytes


def _reason(failures: Sequence[Failure | None]) -> str:
    """Why a checkpoint is passed over.

    Raises:
        UserError: where that is what a rank raised.
    """
    for failure in failures:
        if failure is None or failure[0] is UserError:
            raise _error(failure)
    return "; ".join(failure[1] for failure in failures[:3] if failure)


def _refuse_another(
    store: StoreLike,
    directory: ManifestDirectory,
    tensors: dict[str, Tensor],
    wanted: Sequence[LoadTarget],
    peers: Peers,
) -> Failure | None:
    """Refuse a checkpoint that hasn't exactly the tensors that the ranks want; what kept rank 0 from telling.

    Raises:
        UserError: on every rank, naming tensors.
    """
    head = directory.head
    # A bit for a tensor: few bytes for thousands of names.
    answers = peers.gather((_differences(directory, tensors, wanted), directory.marks(tensors)))

    def judge() -> tuple[list[str], int]:
        problems = list(dict.fromkeys(problem for rows, _ in answers or () for problem in rows))
        count, marks = len(problems), 0
        for _, other in answers or ():
            marks |= other
        missing = head.count - marks.bit_count()
        names = directory.unmarked(marks, 3) if missing else []
        problems += [f"nothing here wants {name}" for name in names]
        return problems[:3], count + missing

    verdict, failure = run_on_rank_zero(peers, answers is not None, judge)
    if failure is not None or verdict is None:
        return failure or (Incomplete, "rank 0 gave no answer")
    problems, count = verdict
    if problems:
        rest = f"; and {count - len(problems)} more" if count > len(problems) else ""
        raise UserError(
            f"checkpoint.path='{store.url}': {folder_of(head.step)} is the state of another model or optimizer "
            f"({'; '.join(problems)}{rest}): set model and optim as run {head.run} had them, or type checkpoint.path= "
            "another folder"
        )
    return None


def _differences(
    directory: ManifestDirectory, tensors: dict[str, Tensor], wanted: Sequence[LoadTarget]
) -> list[str]:
    """Tensors that a rank wants and that the checkpoint hasn't, or has otherwise."""
    problems: list[str] = []
    for item in wanted:
        there = tensors.get(item.name)
        if there is None:
            close = nearest(item.name, directory.known) if not problems else ""
            problems.append(f"it has no {item.name}{close}")
        elif (there.dtype, there.shape) != (item.dtype, item.box.whole):
            problems.append(
                f"{item.name} is {there.dtype}{list(there.shape)} there, and {item.dtype}{list(item.box.whole)} here"
            )
    return problems


def _passed(tiers: Sequence[Tier], one: _Candidate, why: str) -> str:
    where = f" in {tiers[one.tier].name}" if len(tiers) > 1 else ""
    return f"step {one.commit.step}{where}: {why}"


def _none_readable(tiers: Sequence[Tier], passed: Sequence[str]) -> Incomplete:
    why = (
        f"no checkpoint in {', '.join(tier.store.url for tier in tiers)} can be read: {' | '.join(passed)}; restore the "
        "files, or name another checkpoint.path to start afresh"
    )
    return exits.mark_as_peers(Incomplete(why))


def _error(failure: Failure | None) -> Exception:
    kind, text = failure or (Incomplete, "rank 0 gave no answer")
    return exits.mark_as_peers(kind(text))
