"""Which checkpoints are kept, by rule, by name and while they are read, and how the others go.

A removal takes the manifest first: one that is interrupted leaves no manifest without its files.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from configs.errors import UserError
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder, folder_of, run_tag
from faulttol.checkpoint.manifest import Identity
from faulttol.checkpoint.store import StoreLike

LEASE_SECONDS = 3600.0
"""A lease of a reader that wasn't renewed for so long has expired: the reader was killed."""
_RENEW_SECONDS = LEASE_SECONDS / 6
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_log = logging.getLogger("megaray.checkpoint")


@dataclass(frozen=True)
class Retention:
    """Which of a run's committed checkpoints are kept."""

    last: int = 2
    """The newest so many, at least 1."""
    every: int | None = None
    """Those whose step is a multiple of it, for good; None: none of them."""


@dataclass(frozen=True)
class PruneCandidate:
    """A checkpoint that needn't be kept."""

    commit: CheckpointCommit
    why: str


class CheckpointListing(Protocol):
    """What `plan` looks at; a `CheckpointFolder` is one."""

    commits: list[CheckpointCommit]
    """With a manifest, oldest first."""
    pins: dict[CheckpointCommit, list[str]]

    def whole(self, commit: CheckpointCommit) -> bool:
        """Whether the manifest can be read and all files are there."""

    def lease_times(self, commit: CheckpointCommit) -> list[float]:
        """When readers last renewed their leases, in seconds since 1970."""


def plan(
    folder: CheckpointListing, retention: Retention, now: float, broken: Collection[CheckpointCommit] = ()
) -> list[PruneCandidate]:
    """Checkpoints that may go, oldest first; changes nothing.

    Kept are the newest `last` that are whole and all that are newer than the oldest of them; of each step that is a
    multiple of `every` the newest attempt's; what is pinned; what is read now. Where none is whole, all are.

    Args:
        now: seconds since 1970.
        broken: commits that are known to be damaged inside, which a listing doesn't show.
    """
    whole: list[CheckpointCommit] = []
    for commit in reversed(folder.commits):
        if len(whole) < max(1, retention.last) and commit not in broken and folder.whole(commit):
            whole.append(commit)
    if not whole:
        return []
    oldest = whole[-1]
    newest_of = {commit.step: commit for commit in folder.commits}
    doomed: list[PruneCandidate] = []
    for commit in folder.commits:
        milestone = retention.every is not None and commit.step % retention.every == 0
        if commit >= oldest or (milestone and newest_of[commit.step] == commit) or folder.pins.get(commit):
            continue
        if any(now - renewed < LEASE_SECONDS for renewed in folder.lease_times(commit)):
            continue
        why = f"older than the newest {len(whole)}"
        if retention.every is not None:
            left = f"attempt {newest_of[commit.step].attempt} has saved this step again"
            why += f", and {left if milestone else f'not a multiple of {retention.every}'}"
        doomed.append(PruneCandidate(commit, why))
    return doomed


def remove(store: StoreLike, doomed: Sequence[PruneCandidate]) -> list[PruneCandidate]:
    """Remove checkpoints, each manifest before its files; those that were removed.

    What has been pinned or is read since the plan was made stays, and so does the only checkpoint that is whole.
    """
    folder = CheckpointFolder(store)
    going = {one.commit for one in doomed}
    spared = next((c for c in reversed(folder.commits) if c not in going and folder.whole(c)), None)
    if spared is None:  # nothing that stays is whole
        spared = next((c for c in reversed(folder.commits) if folder.whole(c)), None)
    now, done = time.time(), []
    for one in doomed:
        kept = folder.pins.get(one.commit) or any(
            now - t < LEASE_SECONDS for t in folder.lease_times(one.commit)
        )
        if one.commit != spared and one.commit in folder.commits and not kept:
            store.remove(one.commit.manifest)
            done.append(one)
    for one in done:
        _remove_files(store, folder, one.commit)
    return done


def prune(
    store: StoreLike, retention: Retention, broken: Collection[CheckpointCommit] = ()
) -> list[PruneCandidate]:
    """Remove what needn't be kept; what was removed."""
    return remove(store, plan(CheckpointFolder(store), retention, time.time(), broken))


def prune_after_commit(
    store: StoreLike, identity: Identity, retention: Retention, newest: CheckpointCommit, token: str
) -> None:
    """Remove a run's checkpoints that needn't be kept, and what interrupted saves up to now left.

    Args:
        newest: the commit that was just made.
        token: word in the names of its files.
    """
    folder, own = CheckpointFolder(store), run_tag(identity.run)
    doomed = plan(folder, retention, time.time())
    if doomed:
        remove(store, doomed)
    kept = [commit for commit in folder.commits if commit.run == own][-max(1, retention.last) :]
    oldest = min(commit.step for commit in [*kept, newest])
    for commit in folder.begun:
        over = commit.attempt < newest.attempt or commit.step < oldest
        if commit.run == own and over and commit < newest:
            _remove_files(store, folder, commit)
    for name in folder.empty(oldest):
        store.remove(name)
    for name in folder.names(newest):
        left = f".{token}." not in name and (
            ".safetensors" in name or ".jsonl" in name or name.endswith(".tmp")
        )
        if left:
            store.remove(f"{folder_of(newest.step)}/{name}")


def remove_interrupted(store: StoreLike, identity: Identity) -> None:
    """Remove what interrupted saves of a run's earlier attempts left.

    For a save that has failed: on a full storage the next one may need the room, and a commit, after which leftovers go,
    is what it can't have.
    """
    folder, own = CheckpointFolder(store), run_tag(identity.run)
    for commit in folder.begun:
        if commit.run == own and commit.attempt < identity.attempt:
            _remove_files(store, folder, commit)


def _remove_files(store: StoreLike, folder: CheckpointFolder, commit: CheckpointCommit) -> None:
    """Remove a commit's files, or at once its folder where nothing else is in it."""
    if folder.alone(commit):
        store.remove(folder_of(commit.step))
        return
    for name in folder.names(commit):
        store.remove(f"{folder_of(commit.step)}/{name}")


# ---- pins and read leases ----


def pin(store: StoreLike, step: int, name: str) -> CheckpointCommit:
    """Keep a committed step under a name until `unpin`; its newest attempt's.

    Raises:
        UserError: where the name can't be part of a file name or is another step's, or the step isn't committed.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"a checkpoint can't be pinned as '{name}': type letters, digits, - and _, at most 64 of them"
        )
    folder = CheckpointFolder(store)
    commits = [commit for commit in folder.commits if commit.step == step]
    if not commits:
        there = ", ".join(str(commit.step) for commit in folder.commits[-4:])
        advice = (
            f"type one that is; the last are {there}"
            if there
            else "name another run or folder, since it has none"
        )
        raise UserError(f"step {step} isn't a checkpoint of {store.url}: {advice}")
    for commit, names in folder.pins.items():
        if name in names and commit != commits[-1]:
            raise UserError(
                f"the pin '{name}' holds step {commit.step} of {store.url}: unpin it there first, or type another name"
            )
    store.write(f"{commits[-1].prefix}pin-{name}", [b"\n"])
    return commits[-1]


def pin_agreed(store: StoreLike, step: int) -> None:
    """Keep the newest step whose copies agreed as `agreed-STEP`, where copies differ now: later saves have the fault, and
    would push it out. Nothing where the step isn't there, or a person has unpinned it: each later save calls this again."""
    if any(name.endswith(f".unpinned-agreed-{step}") for name in store.names(folder_of(step))):
        return
    with suppress(UserError):
        pin(store, step, f"agreed-{step}")


def unpin(store: StoreLike, step: int, name: str) -> None:
    """Give a name back. Of the pin that a run sets itself (`pin_agreed`), a file beside the checkpoint says so.

    Raises:
        UserError: where the step isn't pinned under it.
    """
    commits = [c for c, names in CheckpointFolder(store).pins.items() if c.step == step and name in names]
    if not commits:
        raise UserError(f"step {step} of {store.url} isn't pinned as '{name}': `inspect` shows the pins")
    for commit in commits:
        if name == f"agreed-{step}":
            store.write(f"{commit.prefix}unpinned-{name}", [b"\n"])
        store.remove(f"{commit.prefix}pin-{name}")


def pins(store: StoreLike) -> dict[CheckpointCommit, list[str]]:
    """Names that commits are pinned under."""
    return CheckpointFolder(store).pins


@contextmanager
def read_lease(store: StoreLike, commit: CheckpointCommit) -> Iterator[None]:
    """Keep a checkpoint while it is read: a thread renews a lease beside it, which a killed reader leaves to expire.

    Where the lease can't be written the checkpoint is read without it.
    """
    name = f"{commit.prefix}use-{secrets.token_hex(4)}"
    ended = threading.Event()

    def write_lease() -> bool:
        try:
            store.write(name, [repr(time.time()).encode()])
        except Exception as error:  # a folder that may only be read
            _log.debug("%s isn't marked as in use: %s", commit.manifest, error)
            return False
        return True

    def renew() -> None:
        while not ended.wait(_RENEW_SECONDS):
            write_lease()

    leased = write_lease()
    thread = threading.Thread(target=renew, daemon=True)
    if leased:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if leased:
            thread.join()
            try:
                store.remove(name)
            except Exception as error:
                _log.debug("%s stays marked as in use for an hour: %s", commit.manifest, error)
