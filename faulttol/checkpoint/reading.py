"""Reading from one checkpoint what one rank needs: whole blocks, each verified, straight into the live tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from faulttol.checkpoint.boxes import Box, coverage_error
from faulttol.checkpoint.folder import CheckpointCommit, ManifestDirectory, run_tag
from faulttol.checkpoint.manifest import Incomplete, Manifest, ManifestHead, ShardFile, digest
from faulttol.checkpoint.pieces import BLOCK, DTYPES, LoadTarget, staging_buffer
from faulttol.checkpoint.shards import Entry, ShardIndex, block_digest
from faulttol.checkpoint.store import StoreLike

_SPAN = 16 * BLOCK
"""Bytes that are read at once."""
_THREADS = 4
"""Spans read at once: with `_SPAN` the bound of the memory that a load takes, twice that on an object store."""


@dataclass(frozen=True)
class WantedBlock:
    """A block of a piece that some wanted box has elements of."""

    entry: Entry
    wanted: tuple[LoadTarget, ...]
    number: int
    offset: int
    """In the file."""
    length: int
    first: int
    """Its first element, counted in the piece."""


@dataclass(frozen=True)
class Span:
    """Neighbouring blocks of a file, read at once."""

    path: str
    blocks: tuple[WantedBlock, ...]

    @property
    def start(self) -> int:
        """First byte in the file."""
        return self.blocks[0].offset

    @property
    def size(self) -> int:
        """In bytes."""
        return self.blocks[-1].offset + self.blocks[-1].length - self.start


@dataclass(frozen=True)
class _File:
    """What of a rank's file this rank may need."""

    path: str
    base: int
    """First byte of its first piece."""
    block: int
    """Bytes that one digest covers."""
    entries: tuple[Entry, ...]


class CheckpointReader:
    """Fills wanted tensors from one checkpoint.

    Args:
        store: where it is.
        source: what the checkpoint's files and tensors are taken from.
        wanted: with the shapes and dtypes that the checkpoint has.
        home: rank whose file is likely to have all of it, since it was saved under this layout; None: none.
        alive: called after each read, by any thread.
    """

    def __init__(
        self,
        store: StoreLike,
        source: Manifest | ManifestDirectory,
        wanted: Sequence[LoadTarget],
        home: int | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._source, self.home, self._alive = store, source, home, alive
        self._head: ManifestHead | Manifest = source.head if isinstance(source, ManifestDirectory) else source
        self._commit = CheckpointCommit(self._head.attempt, self._head.step, run_tag(self._head.run))
        self._rows: dict[int, ShardFile] = {}
        self._files: dict[int, _File] = {}
        self._all = list(wanted)
        self._wanted = _by_name(wanted)
        self._lock = threading.Lock()
        self._memory = threading.local()
        self.bytes = 0
        """Read so far, indexes included."""

    def fill(self, wanted: Sequence[LoadTarget] | None = None) -> None:
        """Read what is wanted, in bounded memory.

        What is raised may leave tensors half filled; another checkpoint then fills them whole.

        Args:
            wanted: of what the reader was made for; None: all.

        Raises:
            Incomplete: where a file is missing, torn, changed or another checkpoint's, or an element has no source or
                two; naming file, tensor and range.
        """
        here = _by_name(self._all if wanted is None else wanted)
        with ThreadPoolExecutor(_THREADS) as pool:
            spans, rest = self._at_home(here)
            ranks = self.ranks(rest) if rest else []
            self._locate_indexes(ranks)
            by_rank = list(pool.map(lambda rank: self.blocks(rank, rest), ranks))
            boxes = _boxes(block for blocks in by_rank for block in blocks)
            for name, items in rest.items():
                for item in items:
                    self.check(item, boxes.get(name, ()))
            for rank, blocks in zip(ranks, by_rank, strict=True):
                spans += [Span(self._files[rank].path, span) for span in coalesce(blocks, _SPAN)]
            for _ in pool.map(self._read_and_fill, spans):
                pass

    def _at_home(
        self, here: Mapping[str, list[LoadTarget]]
    ) -> tuple[list[Span], dict[str, list[LoadTarget]]]:
        """What this rank's own file of the checkpoint has whole, so that no other index is read for it; and the rest.

        That no other file has it too was proven when the checkpoint was committed.
        """
        if self.home is None or not here or self.home not in self.ranks(here):
            return [], dict(here)
        self._locate_indexes([self.home])
        boxes = _boxes(self.blocks(self.home, here))
        mine: dict[str, list[LoadTarget]] = {}
        rest: dict[str, list[LoadTarget]] = {}
        for name, items in here.items():
            for item in items:
                whole = _reason(item, boxes.get(name, ())) is None
                (mine if whole else rest).setdefault(name, []).append(item)
        blocks = self.blocks(self.home, mine)
        return [Span(self._files[self.home].path, span) for span in coalesce(blocks, _SPAN)], rest

    def ranks(self, names: Iterable[str]) -> list[int]:
        """Ranks whose files have a part of these tensors."""
        tensors = self._source.find(names)
        return sorted({rank for tensor in tensors.values() for rank in tensor.files()})

    def _locate_indexes(self, ranks: Iterable[int]) -> None:
        """Learn where the indexes of files are."""
        self._rows |= self._source.rows(rank for rank in ranks if rank not in self._rows)

    def blocks(self, rank: int, wanted: Mapping[str, Sequence[LoadTarget]]) -> list[WantedBlock]:
        """The blocks of a file that have elements of `wanted`, in the order of the file; its index is read once.

        Args:
            wanted: by name.
        """
        if rank not in self._files:
            if rank not in self._rows:
                self._locate_indexes([rank])
            self._files[rank] = self._open(rank)
        file, blocks = self._files[rank], list[WantedBlock]()
        for entry in file.entries:
            items = tuple(w for w in wanted.get(entry.name, ()) if w.box.overlap(entry.box) is not None)
            if items:
                blocks += _blocks(entry, items, file.base, file.block)
        return blocks

    def path(self, rank: int) -> str:
        """Of a file that was opened by `blocks`, in the store."""
        return self._files[rank].path

    def check(self, item: LoadTarget, boxes: Iterable[Box]) -> None:
        """Refuse a wanted box whose elements haven't exactly one source each.

        Args:
            boxes: of the pieces of its tensor that were found.

        Raises:
            Incomplete: naming tensor and range.
        """
        why = _reason(item, boxes)
        if why:
            raise Incomplete(f"{self._path(self._commit.manifest)}: {item.name}{why}")

    def _open(self, rank: int) -> _File:
        """A file's index, as far as this rank wants what it tells of."""
        path = self._commit.shard(rank, self._head.token)
        index = self._index(rank, path)
        file = self._rows[rank]
        entries = tuple(
            entry
            for entry in index.entries
            if any(w.box.overlap(entry.box) is not None for w in self._wanted.get(entry.name, ()))
        )
        return _File(path, file.bytes - file.index - index.bytes, index.block, entries)

    def _index(self, rank: int, path: str) -> ShardIndex:
        file = self._rows[rank]
        text = self._read(path, file.bytes - file.index, file.bytes, f"the index of rank {rank}")
        if digest(text) != file.digest:
            raise Incomplete(f"{self._path(path)}: {self._foreign_index_reason(text)}")
        return ShardIndex.parse(text)

    def _foreign_index_reason(self, text: bytearray) -> str:
        """Why an index isn't the one that was committed: whose it is, where it is known."""
        try:
            index = ShardIndex.parse(text)
        except Incomplete:
            return "its index differs from what was saved"
        theirs, mine = ((x.run, x.attempt, x.step) for x in (index, self._head))
        if theirs == mine:
            return f"its index differs from what was saved: it is rank {index.rank}'s of another save of this step"
        return (
            f"it is the file of step {index.step}, attempt {index.attempt} of run {index.run}, in a checkpoint of "
            f"step {mine[2]}, attempt {mine[1]} of run {mine[0]}"
        )

    def verified(self, span: Span, into: memoryview | None = None) -> memoryview:
        """The bytes of a span, every block compared with its digest.

        Args:
            into: memory of at least that size; None: they get their own.

        Raises:
            Incomplete: naming file, tensor and range of the first block that differs.
        """
        start, size = span.start, span.size
        what = f"{span.blocks[0].entry.name}{span.blocks[0].entry.box}"
        data = memoryview(bytearray(size)) if into is None else into[:size]
        self._read_into(span.path, start, data, what)
        for block in span.blocks:
            at = block.offset - start
            if block_digest(data[at : at + block.length]) != block.entry.digest(block.number):
                count = block.length // block.entry.item
                ranges = " ".join(str(box) for box in block.entry.box.flat(block.first, block.first + count))
                raise Incomplete(
                    f"{self._path(span.path)} differs from what was saved in {block.entry.name}{ranges}, "
                    f"bytes {block.offset} to {block.offset + block.length}"
                )
        return data

    def _read_and_fill(self, span: Span) -> None:
        """Read a span and fill what wants its blocks."""
        data, start = self.verified(span, self._thread_buffer(span.size)), span.start
        # Of one piece, all follow each other.
        for _, run in groupby(span.blocks, key=lambda block: id(block.entry)):
            blocks = list(run)
            last = blocks[-1].first + blocks[-1].length // blocks[-1].entry.item
            at = blocks[0].offset - start
            fill(blocks[0].wanted, blocks[0].entry.box, (blocks[0].first, last), data[at:])

    def _thread_buffer(self, size: int) -> memoryview:
        """This thread's, used again for each span: memory that is new each time is cleared and mapped each time."""
        memory: memoryview | None = getattr(self._memory, "landing", None)
        if memory is None or len(memory) < size:
            memory = self._memory.landing = staging_buffer(size, any(w.on_device for w in self._all))
        return memory

    def _read(self, path: str, start: int, end: int, what: str) -> bytearray:
        data = bytearray(end - start)
        with memoryview(data) as view:
            self._read_into(path, start, view, what)
        return data

    def _read_into(self, path: str, start: int, into: memoryview, what: str) -> None:
        try:
            count = self._store.read_into(path, start, into)
        except OSError as error:
            raise Incomplete(f"{self._path(path)} can't be read: {error}") from None
        with self._lock:
            self.bytes += count
            self._alive()
        if count != len(into):
            end = start + len(into)
            raise Incomplete(f"{self._path(path)} is truncated: it ends before byte {end}, where {what} ends")

    def _path(self, name: str) -> str:
        return f"{self._store.url.rstrip('/')}/{name}"


def _blocks(entry: Entry, wanted: tuple[LoadTarget, ...], base: int, size: int) -> Iterator[WantedBlock]:
    """The blocks of a piece that have wanted elements."""
    per = size // entry.item
    every = any(w.box.overlap(entry.box) == entry.box for w in wanted)
    for number in range(-(-entry.box.elements // per)):
        first = number * per
        last = min(first + per, entry.box.elements)
        if every or any(w.box.overlap(box) for box in entry.box.flat(first, last) for w in wanted):
            offset = base + entry.offset + first * entry.item
            yield WantedBlock(entry, wanted, number, offset, (last - first) * entry.item, first)


def coalesce(blocks: Sequence[WantedBlock], most: int) -> Iterator[tuple[WantedBlock, ...]]:
    """Blocks in the order of the file, joined where they touch, up to so many bytes."""
    span: list[WantedBlock] = []
    for block in blocks:
        if span and (
            block.offset != span[-1].offset + span[-1].length
            or block.offset + block.length - span[0].offset > most
        ):
            yield tuple(span)
            span = []
        span.append(block)
    if span:
        yield tuple(span)


def fill(wanted: Iterable[LoadTarget], piece: Box, elements: tuple[int, int], data: memoryview) -> None:
    """Fill what wants elements `[first, last)` of a piece, counted row by row; `data` begins with them."""
    items, at = list(wanted), 0
    for box in piece.flat(*elements):
        for item in items:
            size = box.elements * DTYPES[item.dtype][1]
            item.fill(data[at : at + size], box)
        at += box.elements * DTYPES[items[0].dtype][1]


def _boxes(blocks: Iterable[WantedBlock]) -> dict[str, list[Box]]:
    """Boxes of the pieces that blocks belong to, by name."""
    boxes: dict[str, list[Box]] = {}
    for entry in {id(block.entry): block.entry for block in blocks}.values():
        boxes.setdefault(entry.name, []).append(entry.box)
    return boxes


def _reason(item: LoadTarget, boxes: Iterable[Box]) -> str | None:
    """Why pieces don't cover a wanted box exactly once; None where they do."""
    parts = [common for box in boxes if (common := item.box.overlap(box)) is not None]
    return coverage_error(item.box, parts)


def _by_name(wanted: Sequence[LoadTarget]) -> dict[str, list[LoadTarget]]:
    by_name: dict[str, list[LoadTarget]] = {}
    for item in wanted:
        if item.box.elements:
            by_name.setdefault(item.name, []).append(item)
    return by_name
