"""Saving: every rank its shard, then rank 0 the manifest. The manifest is the commit."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from faulttol.checkpoint.load import folder_of, steps
from faulttol.checkpoint.manifest import FILE, Entry, Incomplete, Manifest, ShardFile, check
from faulttol.checkpoint.pieces import Shard
from faulttol.checkpoint.store import Store

_ALIGN = 64


class Peers(Protocol):
    """The ranks that save together."""

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
    word = peers.broadcast(secrets.token_hex(4))
    try:
        answer: ShardFile | str = _write_shard(store, folder, word, shard)
    except Exception as error:  # told to all ranks, which raise it together
        answer = f"rank {shard.rank}: {type(error).__name__}: {error}"
    answers = peers.gather(answer)
    failure, size = "", 0
    if answers is not None:
        try:
            size = _commit(store, step, shard, answers)
        except Exception as error:  # likewise
            failure = str(error)
    failure, size = peers.broadcast((failure, size))
    if failure:
        raise Incomplete(f"step {step} was not saved to {root}: {failure}")
    if shard.rank == 0:
        _retire(store, keep)
    return Saved(f"{root.rstrip('/')}/{folder}", step, size, time.monotonic() - began)


def _write_shard(store: Store, folder: str, word: str, shard: Shard) -> ShardFile:
    digest = hashlib.blake2b(digest_size=16)
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

    name = f"{shard.rank:05d}-{word}.bin"
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


def _retire(store: Store, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted saves before them left."""
    kept = steps(store)[-keep:]
    for name in store.names():
        if name.startswith("step-") and name < folder_of(kept[0]):
            store.remove(f"{name}/{FILE}")
            store.remove(name)
