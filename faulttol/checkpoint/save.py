"""Saving: every rank its shard, then rank 0 the manifest. The manifest is the commit."""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

from faulttol.checkpoint.load import folder_of, steps
from faulttol.checkpoint.manifest import FILE, Entry, Incomplete, Manifest, ShardFile, check
from faulttol.checkpoint.peers import Peers
from faulttol.checkpoint.pieces import Shard
from faulttol.checkpoint.store import Store

_log = logging.getLogger("megaray.checkpoint")
_ALIGN = 64
"""Pieces begin at a multiple of this many bytes, so that a mapped file can be read as any dtype."""


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint."""

    path: str
    step: int
    bytes: int
    """Over all ranks."""
    seconds: float
    """From the call to the commit."""


def save(root: str, step: int, shard: Shard, peers: Peers, keep: int) -> Saved:
    """Save and commit one step; every rank calls this together.

    Shard files carry a word that is new in each save, so what an interrupted save left is never taken for part
    of a later one. Old checkpoints are removed after the commit: their manifests first, then their shards.

    Args:
        root: folder or fsspec URL.
        keep: committed checkpoints to keep.

    Raises:
        Incomplete: on every rank, where any rank failed to write or the shards don't make up a whole; nothing
            is committed then.
    """
    began = time.monotonic()
    store = Store(root)
    folder = folder_of(step)
    name = f"{shard.rank:05d}-{peers.broadcast(secrets.token_hex(4))}.bin"
    try:
        answer: ShardFile | str = _write_shard(store, folder, name, shard)
    except Exception as error:  # told to all ranks, which raise it together
        answer = f"rank {shard.rank}: {type(error).__name__}: {error}"
    answers = peers.gather(answer)
    failure, size = "", 0
    if answers is not None:
        try:
            size = _commit(store, step, shard, answers)
        except Exception as error:  # likewise
            failure = str(error) or type(error).__name__
    failure, size = peers.broadcast((failure, size))
    if failure:
        _discard(store, f"{folder}/{name}")
        raise Incomplete(f"step {step} was not saved to {root}: {failure}")
    if shard.rank == 0:
        _retire(store, keep)
    return Saved(f"{root.rstrip('/')}/{folder}", step, size, time.monotonic() - began)


def _write_shard(store: Store, folder: str, name: str, shard: Shard) -> ShardFile:
    digest = hashlib.sha256()
    entries: list[Entry] = []

    def chunks() -> Iterator[bytes | memoryview]:
        offset = 0
        for piece in shard.pieces:
            padding = bytes(-offset % _ALIGN)
            offset += len(padding)
            entries.append(
                Entry(
                    piece.name,
                    piece.dtype,
                    piece.shape,
                    piece.global_shape,
                    piece.start,
                    offset,
                    len(piece.data),
                )
            )
            for chunk in (padding, piece.data):
                digest.update(chunk)
                yield chunk
            offset += len(piece.data)

    size = store.write(f"{folder}/{name}", chunks())
    return ShardFile(shard.rank, name, size, digest.hexdigest(), tuple(entries))


def _commit(store: Store, step: int, shard: Shard, answers: list[ShardFile | str]) -> int:
    failed = [answer for answer in answers if isinstance(answer, str)]
    if failed:
        raise Incomplete("; ".join(failed))
    shards = tuple(answer for answer in answers if isinstance(answer, ShardFile))
    check(shards, shard.world)
    manifest = Manifest(step, shard.layout, shards, shard.scalars)
    store.write(f"{folder_of(step)}/{FILE}", [manifest.dump()])
    return manifest.bytes


def _discard(store: Store, path: str) -> None:
    """Remove what a failed save wrote: where the storage is full, the next save needs the room."""
    try:
        store.remove(path)
    except Exception as error:  # the failure that is being told matters more
        _log.warning("could not remove %s: %s", path, error)


def _retire(store: Store, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted saves before them left.

    The new checkpoint is committed, so a failure here is told and training goes on.
    """
    try:
        kept = steps(store)[-keep:]
        for name in store.names():
            if name.startswith("step-") and name < folder_of(kept[0]):
                store.remove(f"{name}/{FILE}")
                store.remove(name)
    except Exception as error:
        _log.warning("could not remove old checkpoints in %s: %s", store.url, error)
