"""Saving: every rank its file, then rank 0 the manifest. The manifest is the commit."""

from __future__ import annotations

import errno
import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from faulttol.checkpoint import retention as retention_of
from faulttol.checkpoint.coverage import CoverageCache, FilePlan
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder, folder_of, run_tag
from faulttol.checkpoint.manifest import Identity as Identity
from faulttol.checkpoint.manifest import Incomplete, Manifest, Plain, ShardFile, Uncertain
from faulttol.checkpoint.peers import Failure, Peers, by_rank, capture_failure, run_on_rank_zero
from faulttol.checkpoint.pieces import TensorPiece as TensorPiece
from faulttol.checkpoint.pieces import owned as owned
from faulttol.checkpoint.retention import Retention as Retention
from faulttol.checkpoint.shards import Shard
from faulttol.checkpoint.store import CheckpointStore, StoreLike

_log = logging.getLogger("megaray.checkpoint")
_CHECKED = CoverageCache()
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a file system says that has written nothing."""


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint."""

    path: str
    step: int
    bytes: int
    """Over all ranks."""
    seconds: float
    """From the call to the commit."""


@dataclass(frozen=True)
class ShardReceipt:
    """What one rank has written, as it tells rank 0."""

    record: ShardFile
    plain: Sequence[Plain] | None
    """Its pieces, in the order of the file; None where rank 0 knows them by their digest."""
    plan: str = ""
    """Digest of the pieces."""

    def __post_init__(self) -> None:
        if self.plain is not None:
            plan = self.plain if isinstance(self.plain, FilePlan) else FilePlan(self.plain)
            object.__setattr__(self, "plain", plan)
            object.__setattr__(self, "plan", plan.digest)

    @property
    def without_pieces(self) -> ShardReceipt:
        """Without the pieces."""
        return ShardReceipt(self.record, None, self.plan)


def is_checked(plans: Sequence[str]) -> bool:
    """Whether `commit` has checked ranks with these plans, by digest, in this process: then it needs no pieces."""
    return _CHECKED.known(plans)


def save(
    root: str,
    step: int,
    pieces: Iterable[TensorPiece],
    identity: Identity,
    facts: dict[str, Any],
    peers: Peers,
    retention: Retention,
) -> Saved:
    """Save and commit one step; every rank calls this together.

    The pieces of all ranks must cover each tensor exactly once; `owned` chooses among replicas. Old checkpoints of the
    run are removed after the commit: their manifests first, then their files.

    Args:
        root: folder or fsspec URL, which belongs to the run that saves there first.
        pieces: of this rank; their tensors mustn't change before this returns.
        facts: JSON that a resumed run needs and that tells what it resumes: samples, loss, fingerprints. Rank 0's is kept.
        retention: which committed checkpoints are kept.

    Raises:
        UserError: on every rank, where the folder is another run's or of format 1.
        SaveSuperseded: on every rank, where a newer attempt of the run has begun to save there.
        Incomplete: on every rank, where any rank failed to write or the pieces don't make up a whole. Whatever is
            raised, nothing was committed.
    """
    began = time.monotonic()
    store, first = CheckpointStore(root), identity.rank == 0

    def begin() -> str:
        check_owner(store, identity)
        return new_token()

    word, failure = run_on_rank_zero(peers, first, begin)
    if failure is not None:
        raise _failed(root, step, failure)
    token = str(word)
    written, failure = capture_failure(lambda: write(store, step, token, identity, pieces))
    answers = peers.gather((written.without_pieces if written else None, failure))
    unknown = answers is not None and not is_checked([one.plan for one, _ in answers if one])
    if peers.broadcast(unknown):  # once in a run: its next save has the same pieces
        answers = peers.gather((written, failure))
    outcome: tuple[int | None, Failure | None] | None = None
    if answers is not None:
        reports = answers
        outcome = capture_failure(
            lambda: commit(store, step, token, identity, collect_receipts(reports), facts)
        )
    size, failure = peers.broadcast(outcome)
    if failure is not None:
        if failure[0] is not Uncertain:
            discard(store, step, token, identity)
        raise _failed(root, step, failure)
    if first:
        prune_after_commit(store, step, token, identity, retention, facts)
    return Saved(f"{root.rstrip('/')}/{folder_of(step)}", step, int(size or 0), time.monotonic() - began)


def _failed(root: str, step: int, failure: Failure) -> Exception:
    kind, text = failure
    how = "may be saved or not" if kind is Uncertain else "was not saved"
    return kind(text) if kind is UserError else kind(f"step {step} {how} to {root}: {text}")


def new_token() -> str:
    """A word for the names of one save's files, so what an interrupted one left is never taken for part of it."""
    return secrets.token_hex(4)


def check_owner(store: StoreLike, identity: Identity) -> None:
    """Refuse all but the run that owns the folder, and its attempts before the newest.

    Raises:
        UserError: where the folder is another run's or of format 1.
        SaveSuperseded: where a newer attempt of the run has begun to save there.
    """
    CheckpointFolder(store).check_owner(identity)


def write(
    store: StoreLike, step: int, token: str, identity: Identity, pieces: Iterable[TensorPiece]
) -> ShardReceipt:
    """Write one rank's file.

    Raises:
        Incomplete: where a box is there twice, or the file isn't as long as was laid out.
        OSError: where it can't be written; nothing is left under its name.
        ValueError: where a dtype can't be saved.
    """
    shard = Shard(step, identity, pieces)
    file = _commit(step, identity).shard(identity.rank, token)
    size = store.write(file, shard.chunks())
    record = shard.record()
    if size != record.bytes:
        raise Incomplete(f"{file} has {size} bytes, and {record.bytes} were laid out")
    return ShardReceipt(record, shard.plain)


def collect_receipts(answers: Sequence[tuple[ShardReceipt | None, Failure | None]]) -> list[ShardReceipt]:
    """What all ranks have written, by rank.

    Raises:
        Incomplete: where one failed, naming the first three reasons.
    """
    failed = [(rank, failure[1]) for rank, (_, failure) in enumerate(answers) if failure is not None]
    if failed:
        raise Incomplete(by_rank(failed))
    return [answer for answer, _ in answers if answer is not None]


def commit(
    store: StoreLike,
    step: int,
    token: str,
    identity: Identity,
    written: Sequence[ShardReceipt],
    facts: dict[str, Any],
) -> int:
    """Check what all ranks have written and write the manifest, which commits it; rank 0 alone.

    Args:
        written: by rank.

    Returns:
        Bytes of all files.

    Raises:
        UserError: where the folder has become another run's.
        SaveSuperseded: where a newer attempt has begun to save.
        Uncertain: where the manifest may have been written or not, as after a connection that broke.
        Incomplete: where the pieces don't make up a whole.
        OSError: where it wasn't committed for sure.
    """
    if len(written) != identity.world:
        raise Incomplete(f"{len(written)} ranks have saved, of {identity.world}")
    plans = [one.plain if isinstance(one.plain, FilePlan) else None for one in written]
    manifest = Manifest(
        run=identity.run,
        attempt=identity.attempt,
        step=step,
        layout=identity.layout,
        token=token,
        tensors=_CHECKED.check([one.plan for one in written], plans),
        files=tuple(one.record for one in written),
        facts=facts,
    )
    head, directory = manifest.split()
    text, this = head.dump(), _commit(step, identity)
    store.write(this.directory(token), directory)
    check_owner(store, identity)  # as late as can be: a newer attempt may have started meanwhile
    try:
        store.create(this.manifest, [text])
    except FileExistsError:
        if store.read(this.manifest) != text:  # equal where an answer was lost and the request repeated
            raise Incomplete(
                f"attempt {identity.attempt} has committed this step already: {this.manifest}"
            ) from None
    except Exception as error:
        if not _manifest_exists(store, this.manifest, text, error):
            raise
    return head.size


def _manifest_exists(store: StoreLike, name: str, text: bytes, error: Exception) -> bool:
    """Whether a manifest is there though writing it failed with `error`.

    Raises:
        Uncertain: where nobody knows: a store may still carry out a request whose answer was lost.
    """
    stored: bytes | None = None
    with suppress(Exception):
        stored = store.read(name)
    if stored is None and not (isinstance(error, OSError) and error.errno in _REFUSED):
        raise Uncertain(f"{name} may be written or not: {type(error).__name__}: {error}") from error
    return stored == text


def discard(store: StoreLike, step: int, token: str, identity: Identity) -> None:
    """Remove this rank's file of a save that failed, and on rank 0 what earlier attempts left: where the storage is full,
    the next one needs the room.

    Never raises.
    """
    this = _commit(step, identity)
    paths = [this.shard(identity.rank, token)]
    if identity.rank == 0:
        paths.append(this.directory(token))
    for path in paths:
        try:
            store.remove(path)
        except Exception as error:  # the failure that is being reported matters more
            _log.warning("could not remove %s: %s", path, error)
    if identity.rank == 0:
        try:
            retention_of.remove_interrupted(store, identity)
        except Exception as error:
            _log.warning("could not remove what earlier attempts left in %s: %s", store.url, error)


def prune_after_commit(
    store: StoreLike, step: int, token: str, identity: Identity, retention: Retention, facts: dict[str, Any]
) -> None:
    """Remove the run's checkpoints that needn't be kept, after `step` was committed; rank 0 alone.

    Never raises: the new checkpoint is committed, so training continues.

    Args:
        facts: of that step; `agreed` is the step before it that is pinned first, since copies of the state differ now.
    """
    try:
        if facts.get("agreed") is not None:
            retention_of.pin_agreed(store, facts["agreed"])
        retention_of.prune_after_commit(store, identity, retention, _commit(step, identity), token)
    except Exception as error:
        _log.warning("could not remove old checkpoints in %s: %s", store.url, error)


def _commit(step: int, identity: Identity) -> CheckpointCommit:
    return CheckpointCommit(identity.attempt, step, run_tag(identity.run))
