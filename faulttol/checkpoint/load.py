"""Loading: the newest checkpoint that is whole, verified byte by byte."""

from __future__ import annotations

import hashlib

from configs.errors import UserError
from faulttol.checkpoint.manifest import FILE, Incomplete, Manifest
from faulttol.checkpoint.peers import Peers
from faulttol.checkpoint.pieces import Piece, Shard
from faulttol.checkpoint.store import Store


def folder_of(step: int) -> str:
    """Folder of a step's checkpoint; names sort by step."""
    return f"step-{step:010d}"


def steps(store: Store) -> list[int]:
    """Steps that have a manifest, oldest first; there is no file that names the latest."""
    found = []
    for name in store.names():
        prefix, _, number = name.partition("-")
        if prefix == "step" and number.isdigit() and FILE in store.names(name):
            found.append(int(number))
    return sorted(found)


def manifest_of(store: Store, step: int) -> Manifest:
    """The manifest of a step.

    Raises:
        Incomplete: where it is missing or unreadable, or a shard file's name is missing.
    """
    folder = folder_of(step)
    try:
        manifest = Manifest.parse(store.read(f"{folder}/{FILE}"))
    except FileNotFoundError:
        raise Incomplete(f"step {step} has no manifest") from None
    missing = {shard.file for shard in manifest.shards} - set(store.names(folder))
    if missing:
        raise Incomplete(f"{store.url}/{folder} misses {', '.join(sorted(missing)[:3])}")
    return manifest


def load(root: str, step: int, layout: dict[str, int], rank: int) -> Shard:
    """One rank's shard.

    Raises:
        UserError: where another layout saved it.
        Incomplete: where its file differs from what was committed.
    """
    store = Store(root)
    manifest = manifest_of(store, step)
    if manifest.layout != layout:
        saved, wanted = (
            " ".join(f"{axis}={size}" for axis, size in tree.items()) for tree in (manifest.layout, layout)
        )
        raise UserError(
            f"the checkpoint {root}/{folder_of(step)} was saved under {saved}, and this run is {wanted}; "
            "this version loads the same layout only: set parallel.* to the saved one, or another checkpoint.path"
        )
    file = next(shard for shard in manifest.shards if shard.rank == rank)
    path = f"{root.rstrip('/')}/{folder_of(step)}/{file.file}"
    try:
        data = memoryview(store.read(f"{folder_of(step)}/{file.file}"))
    except OSError as error:
        raise Incomplete(f"{path} can't be read: {error}") from None
    digest = hashlib.sha256(data).hexdigest()
    if (len(data), digest) != (file.bytes, file.digest):
        raise Incomplete(
            f"{path} differs from what was saved: {len(data)} bytes with SHA-256 {digest[:12]}, "
            f"and {file.bytes} with {file.digest[:12]} were committed"
        )
    pieces = [
        Piece(e.name, e.dtype, e.shape, e.global_shape, e.start, data[e.offset : e.offset + e.length])
        for e in file.entries
    ]
    return Shard(rank, len(manifest.shards), manifest.layout, pieces, dict(manifest.scalars))


def restore(
    root: str, layout: dict[str, int], rank: int, peers: Peers
) -> tuple[int | None, Shard | None, list[str]]:
    """The newest checkpoint that every rank can read; all ranks call this together and agree on it.

    Returns:
        The step and this rank's shard, None where nothing has been committed, and why newer checkpoints were
        passed over.

    Raises:
        UserError: where another layout saved the newest.
        Incomplete: where checkpoints were committed and none can be read: to start afresh would be to lose
            them in silence.
    """
    store = Store(root)
    passed: list[str] = []
    for step in reversed(peers.broadcast(steps(store) if rank == 0 else None)):
        shard, refusal, why = None, None, None
        try:
            shard = load(root, step, layout, rank)
        except UserError as error:
            refusal = str(error)
        except Exception as error:  # told to all ranks, which decide together
            why = str(error) if isinstance(error, Incomplete) else f"{type(error).__name__}: {error}"
        answers = peers.gather((refusal, why))
        refusals, reasons = peers.broadcast(_distinct(answers) if answers is not None else None)
        if refusals:
            raise UserError(refusals[0])
        if not reasons:
            return step, shard, passed
        passed.append(f"step {step}: {'; '.join(reasons[:3])}")
    if passed:
        raise Incomplete(
            f"no checkpoint in {root} can be read: {' | '.join(passed)}; restore the files, or name another "
            "checkpoint.path to start afresh"
        )
    return None, None, passed


def _distinct(answers: list[tuple[str | None, str | None]]) -> tuple[list[str], list[str]]:
    """Refusals and reasons, each told once."""
    refusals, reasons = zip(*answers, strict=True)
    return list(dict.fromkeys(filter(None, refusals))), list(dict.fromkeys(filter(None, reasons)))
