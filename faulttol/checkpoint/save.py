"""Saving: every rank its file, then rank 0 the manifest. The manifest is the commit."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from faulttol.checkpoint.folder import Commit, Folder, folder_of, tag
from faulttol.checkpoint.manifest import Identity as Identity
from faulttol.checkpoint.manifest import Incomplete, Manifest, Plain, ShardFile, survey
from faulttol.checkpoint.peers import Failure, Peers, caught, on_first
from faulttol.checkpoint.pieces import Piece as Piece
from faulttol.checkpoint.pieces import owned as owned
from faulttol.checkpoint.shards import Shard
from faulttol.checkpoint.store import Store

_log = logging.getLogger("megaray.checkpoint")


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
class _Save:
    """One save on one rank."""

    root: str
    store: Store
    step: int
    identity: Identity
    token: str
    """New in each save, so what an interrupted one left is never taken for part of a later one."""

    @property
    def commit(self) -> Commit:
        return Commit(self.identity.attempt, self.step, tag(self.identity.run))

    @property
    def file(self) -> str:
        return self.commit.shard(self.identity.rank, self.token)


def save(
    root: str,
    step: int,
    pieces: Iterable[Piece],
    identity: Identity,
    facts: dict[str, Any],
    peers: Peers,
    keep: int,
) -> Saved:
    """Save and commit one step; every rank calls this together.

    The pieces of all ranks must cover each tensor exactly once; `owned` chooses among replicas. Old checkpoints of the
    run are removed after the commit: their manifests first, then their files.

    Args:
        root: folder or fsspec URL, which belongs to the run that saves there first.
        pieces: of this rank; their tensors mustn't change before this returns.
        facts: JSON that a resumed run needs and that tells what it resumes: samples, loss, fingerprints. Rank 0's is kept.
        keep: committed checkpoints to keep, at least 1.

    Raises:
        UserError: on every rank, where the folder is another run's or of format 1.
        Superseded: on every rank, where a newer attempt of the run has begun to save there.
        Incomplete: on every rank, where any rank failed to write or the pieces don't make up a whole. Whatever is
            raised, nothing was committed.
    """
    began = time.monotonic()
    store, first = Store(root), identity.rank == 0

    def begin() -> str:
        Folder(store).admit(identity)
        return secrets.token_hex(4)

    token, failure = on_first(peers, first, begin)
    if failure is not None:
        raise _failed(root, step, failure)
    this = _Save(root, store, step, identity, str(token))
    answers = peers.gather(caught(lambda: _write(this, pieces)))
    outcome: tuple[int | None, Failure | None] | None = None
    if answers is not None:
        outcome = caught(lambda: _commit(this, answers, facts))
    size, failure = peers.broadcast(outcome)
    if failure is not None:
        _discard(store, this.file)
        raise _failed(root, step, failure)
    if first:
        _retire(this, keep)
    return Saved(f"{root.rstrip('/')}/{folder_of(step)}", step, int(size or 0), time.monotonic() - began)


def _failed(root: str, step: int, failure: Failure) -> Exception:
    kind, text = failure
    return kind(text) if kind is UserError else kind(f"step {step} was not saved to {root}: {text}")


def _write(this: _Save, pieces: Iterable[Piece]) -> tuple[ShardFile, list[Plain]]:
    # Boxes without elements tell nothing, but where the whole tensor is empty.
    kept = [p for p in pieces if p.box.elements or 0 in p.box.whole]
    shard = Shard(this.step, this.identity, kept)
    size = this.store.write(this.file, shard.chunks())
    record = shard.record()
    if size != record.bytes:
        raise Incomplete(f"{this.file} has {size} bytes, and {record.bytes} were laid out")
    return record, shard.plain


def _commit(
    this: _Save,
    answers: list[tuple[tuple[ShardFile, list[Plain]] | None, Failure | None]],
    facts: dict[str, Any],
) -> int:
    """Check what the ranks have written and write the manifest; bytes of all files."""
    failed = [
        f"rank {rank}: {failure[1]}" for rank, (_, failure) in enumerate(answers) if failure is not None
    ]
    if failed:
        raise Incomplete("; ".join(failed[:3]))
    written = [answer for answer, _ in answers if answer is not None]
    if len(written) != this.identity.world:
        raise Incomplete(f"{len(written)} ranks have saved, of {this.identity.world}")
    tensors = survey([plain for _, plain in written])
    identity = this.identity
    manifest = Manifest(
        run=identity.run,
        attempt=identity.attempt,
        step=this.step,
        layout=identity.layout,
        token=this.token,
        tensors=tensors,
        files=tuple(record for record, _ in written),
        facts=facts,
    )
    text = manifest.dump()
    Folder(this.store).admit(identity)  # as late as can be: a newer attempt may have started meanwhile
    this.store.write(this.commit.manifest, [text])
    return manifest.bytes


def _discard(store: Store, path: str) -> None:
    """Remove what a failed save wrote: where the storage is full, the next save needs the room."""
    try:
        store.remove(path)
    except Exception as error:  # the failure that is being told matters more
        _log.warning("could not remove %s: %s", path, error)


def _retire(this: _Save, keep: int) -> None:
    try:
        Folder(this.store).retire(this.identity, keep, this.commit, this.token)
    except Exception as error:  # the new checkpoint is committed, so training goes on
        _log.warning("could not remove old checkpoints in %s: %s", this.root, error)
