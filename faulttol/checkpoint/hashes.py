"""Any box of a committed checkpoint as plain bytes, and hashes of its tensors that no layout changes. Without torch."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Any

from faulttol.checkpoint.boxes import Box, coverage_error, covers_exactly
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder
from faulttol.checkpoint.manifest import Incomplete, digest
from faulttol.checkpoint.pieces import BLOCK, DTYPES
from faulttol.checkpoint.shards import Entry, ShardIndex, block_digest
from faulttol.checkpoint.store import StoreLike

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and all there are, by one thread at a time."""
MAX_READ = 16 * BLOCK
"""Bytes that are read, verified and handed on at once."""
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Reads at once: three times `MAX_READ` for each bound the memory that a pass over a checkpoint takes."""
_FEW = 16
"""Boxes that are compared one by one."""
_INDEXES = 64 << 20
"""Bytes of parsed indexes that are kept."""


def no_progress(done: int, total: int) -> None:  # noqa: ARG001  (the shape of `Progress`)
    """A `Progress` that tells nothing."""


@dataclass(frozen=True)
class Located:
    """A piece, and where its bytes lie."""

    rank: int
    path: str
    """Of its file, in the store."""
    entry: Entry
    offset: int
    """Of its first byte, in the file."""
    block: int
    """Bytes that one digest covers."""


@dataclass(frozen=True)
class _File:
    """A file's index."""

    size: int
    """Bytes of it, as it was read."""
    pieces: list[Located] = field(default_factory=list)
    """In the order of the file."""
    by_name: dict[str, list[Located]] = field(default_factory=dict)


Span = tuple[Located, int, int]
"""Blocks of a piece, the first and the one after the last."""


class CheckpointSource:
    """A committed checkpoint that is read box by box; several threads may do so at once.

    Raises:
        Incomplete: where its manifest is damaged or a file is missing.
    """

    def __init__(self, store: StoreLike, commit: CheckpointCommit) -> None:
        self.store, self.commit = store, commit
        self.manifest = CheckpointFolder(store).manifest(commit)
        self.tensors = self.manifest.tensors
        """By name, in the order in which they were saved."""
        self._lock = threading.Lock()
        self._indexes: OrderedDict[int, _File] = OrderedDict()
        self._opening: dict[int, threading.Lock] = {}
        self.bytes = 0
        """Read so far, indexes included."""

    def size(self, name: str) -> int:
        """Bytes of a whole tensor."""
        tensor = self.tensors[name]
        return prod(tensor.shape) * DTYPES[tensor.dtype][1]

    def url(self, path: str) -> str:
        """Path of a file, as messages name it."""
        return f"{self.store.url.rstrip('/')}/{path}"

    def pieces(self, name: str) -> list[Located]:
        """All pieces of a tensor.

        Raises:
            Incomplete: where an index is missing, torn or differs from what was committed.
        """
        ranks = self.tensors[name].files()
        return [piece for rank in ranks for piece in self._file(rank).by_name.get(name, ())]

    def file(self, rank: int) -> list[Located]:
        """All pieces of a rank's file, in its order.

        Raises:
            Incomplete: where its index is missing, torn or differs from what was committed.
        """
        return self._file(rank).pieces

    def _file(self, rank: int) -> _File:
        with self._lock:
            mine = self._opening.setdefault(rank, threading.Lock())
        with mine:  # of several threads that want it one reads it
            with self._lock:
                if rank in self._indexes:
                    self._indexes.move_to_end(rank)
                    return self._indexes[rank]
            opened = self._open(rank)
            with self._lock:
                self._indexes[rank] = opened
                while len(self._indexes) > 1 and sum(one.size for one in self._indexes.values()) > _INDEXES:
                    self._indexes.popitem(last=False)
        return opened

    def _open(self, rank: int) -> _File:
        file, path = self.manifest.files[rank], self.commit.shard(rank, self.manifest.token)
        text = self._read(path, file.bytes - file.index, file.bytes, f"the index of rank {rank}")
        if digest(text) != file.digest:
            raise Incomplete(f"{self.url(path)}: its index differs from what was saved")
        index = ShardIndex.parse(text)
        base = file.bytes - file.index - index.bytes
        opened = _File(file.index)
        for entry in index.entries:
            piece = Located(rank, path, entry, base + entry.offset, index.block)
            opened.pieces.append(piece)
            opened.by_name.setdefault(entry.name, []).append(piece)
        return opened

    def read(self, name: str, box: Box, pieces: Sequence[Located] | None = None) -> Any:
        """The values of a box, as a numpy array of its shape and of unsigned integers of the dtype's size.

        Every block that is touched is verified. Takes the memory of the box and of one read.

        Args:
            pieces: those of the tensor, where they are known already.

        Raises:
            Incomplete: where a file is missing, torn or changed, or an element has no source or two; naming file, tensor
                and range.
        """
        import numpy as np

        kind = np.dtype(f"u{DTYPES[self.tensors[name].dtype][1]}")
        values = np.empty(box.shape, kind)
        if not box.elements:
            return values
        parts = []
        for piece in self.pieces(name) if pieces is None else pieces:
            common = piece.entry.box.overlap(box)
            if common is not None:
                parts.append((piece, common))
        why = coverage_error_in(box, [common for _, common in parts])
        if why:
            raise Incomplete(f"{self.url(self.commit.manifest)}: {name}{why}")
        for piece, common in parts:
            for first, last in _spans(piece, common):
                data = np.frombuffer(self.blocks(piece, first, last), kind)
                for part in piece.entry.box.flat(*element_range(piece, first, last)):
                    given, data = data[: part.elements].reshape(part.shape), data[part.elements :]
                    shared = part.overlap(box)
                    if shared is not None:
                        values[shared.slices_within(box)] = given[shared.slices_within(part)]
        return values

    def blocks(self, piece: Located, first: int, last: int) -> bytearray:
        """Blocks `[first, last)` of a piece, verified.

        Raises:
            Incomplete: naming file, tensor and range of the first block that can't be read or differs.
        """
        start, end = byte_range(piece, first, last)
        data = self._read(piece.path, start, end, f"{piece.entry.name}{piece.entry.box}")
        self._check(piece, first, last, memoryview(data))
        return data

    def check(self, spans: Sequence[Span]) -> None:
        """Read blocks that follow each other in a file, of one piece or several, at once, and verify them.

        Raises:
            Incomplete: as `blocks` does.
        """
        begin, end = byte_range(*spans[0])[0], byte_range(*spans[-1])[1]
        entry = spans[0][0].entry
        data = memoryview(self._read(spans[0][0].path, begin, end, f"{entry.name}{entry.box}"))
        for piece, first, last in spans:
            start, end = byte_range(piece, first, last)
            self._check(piece, first, last, data[start - begin : end - begin])

    def _check(self, piece: Located, first: int, last: int, data: memoryview) -> None:
        for number in range(first, last):
            at = (number - first) * piece.block
            if block_digest(data[at : at + piece.block]) != piece.entry.digest(number):
                ranges = " ".join(map(str, piece.entry.box.flat(*element_range(piece, number, number + 1))))
                begin, end = byte_range(piece, number, number + 1)
                raise Incomplete(
                    f"{self.url(piece.path)} differs from what was saved in {piece.entry.name}{ranges}, bytes {begin} to "
                    f"{end}"
                )

    def chunks(self, name: str, box: Box) -> Iterator[memoryview]:
        """The bytes of a box, row-major, in chunks of at most `MAX_READ` bytes.

        Raises:
            Incomplete: as `read` does.
        """
        if not box.elements:
            return
        pieces = self.pieces(name)
        for part in parts_of(box, MAX_READ // DTYPES[self.tensors[name].dtype][1]):
            yield memoryview(self.read(name, part, pieces).reshape(-1)).cast("B")

    def cost(self, name: str, box: Box) -> int:
        """Bytes that `chunks` reads for a box, without the indexes.

        Raises:
            Incomplete: where an index is damaged.
        """
        pieces, total = self.pieces(name), 0
        for part in parts_of(box, MAX_READ // DTYPES[self.tensors[name].dtype][1]):
            for piece in pieces:
                common = piece.entry.box.overlap(part)
                for first, last in _spans(piece, common) if common is not None else ():
                    begin, end = element_range(piece, first, last)
                    total += (end - begin) * piece.entry.item
        return total

    def _read(self, path: str, start: int, end: int, what: str) -> bytearray:
        try:
            data = self.store.read_range(path, start, end)
        except OSError as error:
            raise Incomplete(f"{self.url(path)} can't be read: {error}") from None
        with self._lock:
            self.bytes += len(data)
        if len(data) != end - start:
            raise Incomplete(f"{self.url(path)} is truncated: it ends before byte {end}, where {what} ends")
        return data


def byte_range(piece: Located, first: int, last: int) -> tuple[int, int]:
    """First byte of block `first` of a piece in its file, and the one after block `last - 1`."""
    return piece.offset + first * piece.block, piece.offset + min(last * piece.block, piece.entry.bytes)


def element_range(piece: Located, first: int, last: int) -> tuple[int, int]:
    """First element of block `first` of a piece, and the one after the last of block `last - 1`."""
    per = piece.block // piece.entry.item
    return first * per, min(last * per, piece.entry.box.elements)


def coverage_error_in(target: Box, boxes: Sequence[Box]) -> str | None:
    """`coverage_error`, fast where there are many boxes and nothing is wrong with them."""
    if len(boxes) > _FEW and all(box.valid and box.whole == target.whole for box in boxes):
        import numpy as np

        start = np.array([box.start for box in boxes], np.int64) - np.array(target.start, np.int64)
        if covers_exactly(
            np.array(target.shape, np.int64), start, np.array([box.shape for box in boxes], np.int64)
        ):
            return None
    return coverage_error(target, boxes)


def parts_of(box: Box, most: int) -> Iterator[Box]:
    """A box in parts of at most `most` elements, each without holes in its memory, in row-major order."""
    if box.elements <= most:
        yield box
        return
    dim = next(d for d, size in enumerate(box.shape) if size > 1)
    size = box.shape[dim]
    rows = max(1, most * size // box.elements)
    for first in range(0, size, rows):
        yield from parts_of(box.cut(dim, first, min(first + rows, size)), most)


def _spans(piece: Located, common: Box) -> Iterator[tuple[int, int]]:
    """Runs of blocks of a piece that have elements of `common`, as first and end, each of at most `MAX_READ` bytes."""
    box, per = piece.entry.box, piece.block // piece.entry.item
    begin = end = 0
    for at, start, shape, size in zip(common.start, box.start, common.shape, box.shape, strict=True):
        begin, end = begin * size + at - start, end * size + at - start + shape - 1
    first: int | None = None
    most = MAX_READ // piece.block
    for number in range(begin // per, end // per + 1):
        touched = any(common.overlap(part) for part in box.flat(*element_range(piece, number, number + 1)))
        if first is not None and (not touched or number - first == most):
            yield first, number
            first = None
        if touched and first is None:
            first = number
    if first is not None:
        yield first, end // per + 1


def tensor_hashes(
    store: StoreLike,
    commit: CheckpointCommit,
    progress: Progress = no_progress,
    names: Sequence[str] | None = None,
) -> dict[str, str]:
    """SHA-256 of each global tensor's bytes in row-major order, in hex: the same under every layout.

    What is read is verified on the way. Takes `3 * THREADS * MAX_READ` bytes of memory and the indexes.

    Args:
        names: tensors; None: all.

    Raises:
        Incomplete: where the checkpoint is damaged, naming tensor and range.
    """
    source = CheckpointSource(store, commit)
    chosen = list(source.tensors) if names is None else list(names)
    total, done, lock = sum(map(source.size, chosen)), 0, threading.Lock()

    def one(name: str) -> str:
        nonlocal done
        running = hashlib.sha256()
        for chunk in source.chunks(name, Box.full(source.tensors[name].shape)):
            running.update(chunk)
            with lock:
                done += len(chunk)
                progress(done, total)
        return running.hexdigest()

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(chosen, pool.map(one, chosen), strict=True))
