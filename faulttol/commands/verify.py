"""Whether a committed checkpoint is what was saved: every block of every file, and one source for every element."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from configs.errors import from_json
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import CheckpointCommit
from faulttol.checkpoint.hashes import (
    MAX_READ,
    THREADS,
    CheckpointSource,
    Located,
    Progress,
    Span,
    byte_range,
    coverage_error_in,
    no_progress,
)
from faulttol.checkpoint.manifest import Incomplete, Tensor
from faulttol.checkpoint.pieces import DTYPES
from faulttol.checkpoint.shards import INDEX
from faulttol.checkpoint.store import StoreLike
from faulttol.commands.terminal import plural, rate, size

_SHOWN = 20
"""Damages that a person is shown; JSON has all."""


@dataclass
class Verified:
    """What was found of one checkpoint."""

    url: str
    step: int
    attempt: int
    run: str
    files: int = 0
    tensors: int = 0
    bytes: int = 0
    """Of the files, as committed."""
    read: int = 0
    """Bytes that were read."""
    seconds: float = 0.0
    damage: list[str] = field(default_factory=list)
    """File, tensor and range of each."""

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.damage

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        return {"whole": self.whole, **asdict(self)}

    def lines(self) -> list[str]:
        """For a person."""
        name = f"step {self.step}, attempt {self.attempt} of run {self.run} in {self.url}"
        if self.whole:
            what = f"{plural(self.tensors, 'tensor')} in {plural(self.files, 'file')}, {size(self.bytes)}"
            return [f"{name} is whole: {what} verified at {rate(self.read, self.seconds)}"]
        more = [f"  … and {len(self.damage) - _SHOWN} more"] if len(self.damage) > _SHOWN else []
        return [f"{name} is damaged:", *(f"  {text}" for text in self.damage[:_SHOWN]), *more]


def verify(store: StoreLike, commit: CheckpointCommit, progress: Progress = no_progress) -> Verified:
    """Read all of a checkpoint and compare it with its digests; damage is reported, and the rest read all the same."""
    began = time.monotonic()
    verified = Verified(store.url, commit.step, commit.attempt, commit.run)
    try:
        source = CheckpointSource(store, commit)
    except Incomplete as error:
        verified.damage.append(str(error))
        return verified
    verified.files, verified.tensors, verified.bytes = (
        source.manifest.world,
        len(source.tensors),
        source.manifest.bytes,
    )
    with ThreadPoolExecutor(THREADS) as pool:
        opened = list(pool.map(lambda rank: _open(source, rank), range(source.manifest.world)))
        verified.damage += [text for _, damage in opened for text in damage]
        if all(pieces is not None for pieces, _ in opened):
            verified.damage += coverage(source.tensors, [p for pieces, _ in opened for p in pieces or ()])
        spans = [span for pieces, _ in opened for span in _spans(pieces or ())]
        verified.damage += _read(source, spans, pool, progress)
    verified.read, verified.seconds = source.bytes, time.monotonic() - began
    return verified


def _open(source: CheckpointSource, rank: int) -> tuple[list[Located] | None, list[str]]:
    """The pieces of a file, None where its index is damaged; and what is wrong with index, header and length."""
    try:
        pieces = source.file(rank)
        return pieces, list(_header(source, rank, pieces))
    except Incomplete as error:
        return None, [str(error)]


def _header(source: CheckpointSource, rank: int, pieces: list[Located]) -> Iterator[str]:
    """What safetensors' header, which has no digest of its own, tells otherwise than the index."""
    file = source.manifest.files[rank]
    path = source.commit.shard(rank, source.manifest.token)
    base = pieces[0].offset if pieces else file.bytes - file.index
    try:
        head = bytes(source.store.read_range(path, 0, base))
        # From the last byte on: S3 refuses a range behind the end.
        tail = source.store.read_range(path, file.bytes - 1, file.bytes + 1)
    except OSError as error:
        yield f"{source.url(path)} can't be read: {error}"
        return
    if len(tail) > 1:
        yield f"{source.url(path)} has more than the {file.bytes} bytes that were committed"
    expected = {}
    for piece in pieces:
        entry = piece.entry
        key = entry.name if entry.box.shape == entry.box.whole else f"{entry.name}{entry.box}"
        offsets = [entry.offset, entry.offset + entry.bytes]
        expected[key] = [DTYPES[entry.dtype][0], list(entry.box.shape), offsets]
    end = sum(piece.entry.bytes for piece in pieces)
    expected[INDEX] = ["U8", [file.index], [end, end + file.index]]
    try:
        tree = from_json(head[8:])
        actual = {
            key: [row["dtype"], row["shape"], row["data_offsets"]]
            for key, row in tree.items()
            if key != "__metadata__"
        }
        if int.from_bytes(head[:8], "little") + 8 != base:
            raise ValueError("its length is wrong")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{source.url(path)}: the header is unreadable: {error}"
        return
    for key in expected.keys() | actual.keys():
        if expected.get(key) != actual.get(key):
            yield f"{source.url(path)}: the header tells {key} otherwise than the index"


def coverage(tensors: dict[str, Tensor], pieces: list[Located]) -> Iterator[str]:
    """Tensors that the files don't make up exactly once."""
    parts: dict[str, list[Located]] = {}
    for piece in pieces:
        parts.setdefault(piece.entry.name, []).append(piece)
    for name in parts.keys() - tensors.keys():
        yield f"{parts[name][0].path} has {name}, which isn't in the manifest"
    for name, tensor in tensors.items():
        mine = parts.get(name, [])
        for piece in mine:
            if (piece.entry.dtype, piece.entry.box.whole) != (tensor.dtype, tensor.shape):
                stored = f"{piece.entry.dtype}{list(piece.entry.box.whole)}"
                yield f"{piece.path}: {name} is {stored}, and {tensor.dtype}{list(tensor.shape)} in the manifest"
        why = coverage_error_in(Box.full(tensor.shape), [piece.entry.box for piece in mine])
        if why:
            yield f"{name}{why}"


def _spans(pieces: Sequence[Located]) -> Iterator[list[Span]]:
    """Block ranges of the pieces of a file: a large piece is cut, and small neighbours are read at once."""
    small: list[Span] = []
    size = 0
    for piece in pieces:
        count, most = -(-piece.entry.bytes // piece.block), MAX_READ // piece.block
        if small and size + piece.entry.bytes > MAX_READ:  # what is read at once lies together
            yield small
            small, size = [], 0
        if count <= most:
            small, size = [*small, (piece, 0, count)], size + piece.entry.bytes
        else:
            yield from ([(piece, at, min(at + most, count))] for at in range(0, count, most))
    if small:
        yield small


def _read(
    source: CheckpointSource, work: Sequence[list[Span]], pool: ThreadPoolExecutor, progress: Progress
) -> list[str]:
    """Read all block ranges; what differs, block by block."""
    total, done, lock = sum(map(_bytes, work)), 0, threading.Lock()

    def one(spans: list[Span]) -> list[str]:
        nonlocal done
        damage: list[str] = []
        try:
            source.check(spans)
        except Incomplete:
            for piece, first, last in spans:
                damage += [text for number in range(first, last) for text in _block(source, piece, number)]
        with lock:
            done += _bytes(spans)
            progress(done, total)
        return damage

    return list(dict.fromkeys(text for damage in pool.map(one, work) for text in damage))


def _block(source: CheckpointSource, piece: Located, number: int) -> list[str]:
    try:
        source.blocks(piece, number, number + 1)
    except Incomplete as error:
        return [str(error)]
    return []


def _bytes(spans: Sequence[Span]) -> int:
    return byte_range(*spans[-1])[1] - byte_range(*spans[0])[0]
