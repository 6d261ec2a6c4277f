"""Reading from one checkpoint what one rank needs: whole blocks, each verified, straight into the live tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from faulttol.checkpoint.boxes import Box, uncovered
from faulttol.checkpoint.folder import Commit, tag
from faulttol.checkpoint.manifest import Incomplete, Manifest, digest
from faulttol.checkpoint.pieces import BLOCK, Wanted
from faulttol.checkpoint.shards import Entry, Index
from faulttol.checkpoint.store import Store

_SPAN = 16 * BLOCK
"""Bytes that are read at once."""
_THREADS = 4
"""Spans read at once: with `_SPAN` the bound of the memory that a load takes, twice that on an object store."""


@dataclass(frozen=True)
class _Block:
    """A block of a piece that some wanted box has elements of."""

    entry: Entry
    wanted: tuple[Wanted, ...]
    number: int
    offset: int
    """In the file."""
    length: int
    first: int
    """Its first element, counted in the piece."""


@dataclass(frozen=True)
class _Span:
    """Neighbouring blocks of a file, read at once."""

    path: str
    blocks: tuple[_Block, ...]


class Reader:
    """Fills wanted tensors from one checkpoint.

    Args:
        store: where it is.
        manifest: of the checkpoint.
        wanted: with the shapes and dtypes that the manifest tells.
    """

    def __init__(self, store: Store, manifest: Manifest, wanted: Sequence[Wanted]) -> None:
        self._store, self._manifest = store, manifest
        self._commit = Commit(manifest.attempt, manifest.step, tag(manifest.run))
        self._wanted: dict[str, list[Wanted]] = {}
        for item in wanted:
            if item.box.elements:
                self._wanted.setdefault(item.name, []).append(item)
        self._lock = threading.Lock()
        self.bytes = 0
        """Read so far, indexes included."""

    def fill(self) -> None:
        """Read all that is wanted, in bounded memory.

        What is raised may leave tensors half filled; another checkpoint then fills them whole.

        Raises:
            Incomplete: where a file is missing, torn, changed or another checkpoint's, or an element has no source or
                two; naming file, tensor and range.
        """
        ranks = sorted({rank for name in self._wanted for rank in self._manifest.tensors[name].files()})
        with ThreadPoolExecutor(_THREADS) as pool:
            plans = list(pool.map(self._plan, ranks))
            self._check([entry for entries, _ in plans for entry in entries])
            for _ in pool.map(self._take, [span for _, spans in plans for span in spans]):
                pass

    def _check(self, entries: Iterable[Entry]) -> None:
        """Every wanted element must have exactly one source, before anything is read."""
        boxes: dict[str, list[Box]] = {}
        for entry in entries:
            boxes.setdefault(entry.name, []).append(entry.box)
        for name, items in self._wanted.items():
            for item in items:
                parts = [
                    common for box in boxes.get(name, ()) if (common := item.box.overlap(box)) is not None
                ]
                why = uncovered(item.box, parts)
                if why:
                    raise Incomplete(f"{self._store.url.rstrip('/')}/{self._commit.manifest}: {name}{why}")

    def _plan(self, rank: int) -> tuple[list[Entry], list[_Span]]:
        """The pieces of a file that are needed, and what is to be read for them."""
        path = self._commit.shard(rank, self._manifest.token)
        index = self._index(rank, path)
        file = self._manifest.files[rank]
        base = file.bytes - file.index - index.bytes
        needed: list[Entry] = []
        blocks: list[_Block] = []
        for entry in index.entries:
            wanted = tuple(
                w for w in self._wanted.get(entry.name, ()) if w.box.overlap(entry.box) is not None
            )
            if wanted:
                needed.append(entry)
                blocks += _blocks(entry, wanted, base, index.block)
        return needed, [_Span(path, span) for span in _spans(blocks)]

    def _index(self, rank: int, path: str) -> Index:
        file = self._manifest.files[rank]
        text = self._read(path, file.bytes - file.index, file.bytes, f"the index of rank {rank}")
        if digest(text) != file.digest:
            raise Incomplete(f"{self._path(path)}: {self._stranger(text)}")
        return Index.parse(text)

    def _stranger(self, text: bytearray) -> str:
        """Why an index isn't the one that was committed: whose it is, where it can be told."""
        try:
            index = Index.parse(text)
        except Incomplete:
            return "its index differs from what was saved"
        told, mine = ((x.run, x.attempt, x.step) for x in (index, self._manifest))
        if told == mine:
            return f"its index differs from what was saved: it is rank {index.rank}'s of another save of this step"
        return (
            f"it is the file of step {index.step}, attempt {index.attempt} of run {index.run}, in a checkpoint of "
            f"step {mine[2]}, attempt {mine[1]} of run {mine[0]}"
        )

    def _take(self, span: _Span) -> None:
        """Read a span, verify its blocks and fill what wants them."""
        start, end = span.blocks[0].offset, span.blocks[-1].offset + span.blocks[-1].length
        what = f"{span.blocks[0].entry.name}{span.blocks[0].entry.box}"
        data = memoryview(self._read(span.path, start, end, what))
        for block in span.blocks:
            at = block.offset - start
            if digest(data[at : at + block.length]) != block.entry.digest(block.number):
                count = block.length // block.entry.item
                ranges = " ".join(str(box) for box in block.entry.box.flat(block.first, block.first + count))
                raise Incomplete(
                    f"{self._path(span.path)} differs from what was saved in {block.entry.name}{ranges}, "
                    f"bytes {block.offset} to {block.offset + block.length}"
                )
        for blocks in _runs(span.blocks):
            _fill(blocks, data[blocks[0].offset - start :])

    def _read(self, path: str, start: int, end: int, what: str) -> bytearray:
        try:
            data = self._store.read_range(path, start, end)
        except OSError as error:
            raise Incomplete(f"{self._path(path)} can't be read: {error}") from None
        with self._lock:
            self.bytes += len(data)
        if len(data) != end - start:
            raise Incomplete(f"{self._path(path)} is truncated: it ends before byte {end}, where {what} ends")
        return data

    def _path(self, name: str) -> str:
        return f"{self._store.url.rstrip('/')}/{name}"


def _blocks(entry: Entry, wanted: tuple[Wanted, ...], base: int, size: int) -> Iterator[_Block]:
    """The blocks of a piece that have wanted elements."""
    per = size // entry.item
    every = any(w.box.overlap(entry.box) == entry.box for w in wanted)
    for number in range(-(-entry.box.elements // per)):
        first = number * per
        last = min(first + per, entry.box.elements)
        if every or any(w.box.overlap(box) for box in entry.box.flat(first, last) for w in wanted):
            offset = base + entry.offset + first * entry.item
            yield _Block(entry, wanted, number, offset, (last - first) * entry.item, first)


def _spans(blocks: Sequence[_Block]) -> Iterator[tuple[_Block, ...]]:
    """Blocks in the order of the file, joined where they touch."""
    span: list[_Block] = []
    for block in blocks:
        if span and (
            block.offset != span[-1].offset + span[-1].length
            or block.offset + block.length - span[0].offset > _SPAN
        ):
            yield tuple(span)
            span = []
        span.append(block)
    if span:
        yield tuple(span)


def _runs(blocks: Sequence[_Block]) -> Iterator[list[_Block]]:
    """Blocks of one piece that follow each other: within a span, all of one piece do."""
    for _, run in groupby(blocks, key=lambda block: id(block.entry)):
        yield list(run)


def _fill(blocks: Sequence[_Block], data: memoryview) -> None:
    """Fill what wants elements of a stretch of a piece; `data` begins with it."""
    entry, at = blocks[0].entry, 0
    last = blocks[-1].first + blocks[-1].length // entry.item
    for box in entry.box.flat(blocks[0].first, last):
        size = box.elements * entry.item
        for wanted in blocks[0].wanted:
            wanted.fill(data[at : at + size], box)
        at += size
