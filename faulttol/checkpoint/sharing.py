"""What several ranks want alike is read by one of them, verified, and passed on to the others in rounds of bounded bytes.

Ranks find each other by digests of the boxes that they want. Ranks that share boxes divide the files that these boxes lie
in; each tells what it found, all see alike whether every element has one source, and then the blocks go around, in an
order that all work out from the same list. A rank that fails says so at its next turn, and the group gives up together.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from configs.errors import from_json
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.manifest import Identity, Incomplete
from faulttol.checkpoint.peers import Peers
from faulttol.checkpoint.pieces import DTYPES, LoadTarget
from faulttol.checkpoint.reading import CheckpointReader, Span, WantedBlock, coalesce, fill

MAX_READ = 4 << 20
"""Bytes that are passed on in one message, at most."""
ROUND = 32 << 20
"""Bytes that go around a group at once: with as many that are read ahead the bound of the memory that passing on takes,
twice that on an object store."""
_THREADS = 4
_KEY = 8
"""Bytes of a digest of a wanted box."""


@dataclass(frozen=True)
class SharingGroup:
    """Ranks that want the same boxes."""

    ranks: tuple[int, ...]
    """Ascending; this rank is one of them."""
    items: tuple[tuple[LoadTarget, ...], ...]
    """In the same order on all of them; the same box several times where a rank wants it for several tensors."""


@dataclass(frozen=True)
class _SharedRead:
    """Neighbouring blocks of a piece that one rank reads and passes on."""

    item: int
    """Place of the box that wants it."""
    piece: Box
    first: int
    last: int
    """Elements `[first, last)`, counted in the piece."""
    owner: int
    size: int
    """In bytes."""
    span: Span | None
    """Where its owner reads it."""


# ---- who wants the same ----


def grouped(
    wanted: Sequence[LoadTarget], peers: Peers, identity: Identity
) -> tuple[list[LoadTarget], list[SharingGroup]]:
    """What this rank wants alone, and what it shares, with whom; all ranks call this together."""
    if identity.world == 1:
        return list(wanted), []
    mine: dict[bytes, list[LoadTarget]] = {}
    for item in wanted:
        if item.box.elements:
            mine.setdefault(_key(item), []).append(item)
    answers = peers.gather(b"".join(mine))
    places, members = peers.broadcast(_groups(answers) if answers is not None else None)
    shared: dict[int, dict[bytes, list[LoadTarget]]] = {}
    alone: list[LoadTarget] = []
    for key, items in mine.items():
        if key in places:
            shared.setdefault(places[key], {})[key] = items
        else:
            alone += items
    groups = [
        SharingGroup(members[place], tuple(tuple(items[key]) for key in sorted(items)))
        for place, items in sorted(shared.items())
    ]
    return alone, groups


def _key(item: LoadTarget) -> bytes:
    return hashlib.sha256(f"{item.name}\0{item.dtype}\0{item.box}".encode()).digest()[:_KEY]


def _groups(answers: Sequence[bytes]) -> tuple[dict[bytes, int], list[tuple[int, ...]]]:
    """Which group each key belongs to that several ranks sent, and the groups' ranks."""
    import numpy as np

    keys = np.frombuffer(b"".join(answers), ">u8")
    ranks = np.repeat(np.arange(len(answers), dtype=np.int32), [len(answer) // _KEY for answer in answers])
    order = np.argsort(keys, kind="stable")
    keys, ranks = keys[order], ranks[order]
    begins = np.append(True, keys[1:] != keys[:-1]) if len(keys) else np.empty(0, bool)
    edges = np.append(np.flatnonzero(begins), len(keys))
    members: dict[tuple[int, ...], int] = {}
    places: dict[bytes, int] = {}
    for at in np.flatnonzero(np.diff(edges) > 1):
        first, last = int(edges[at]), int(edges[at + 1])
        who = tuple(ranks[first:last].tolist())
        places[int(keys[first]).to_bytes(_KEY, "big")] = members.setdefault(who, len(members))
    return places, list(members)


# ---- passing on ----


def share(
    reader: CheckpointReader, group: SharingGroup, peers: Peers, identity: Identity, failed: bool
) -> bool:
    """Fill what a group of ranks wants; each of them calls this, in the order of `grouped`.

    Args:
        failed: whether this rank has failed already, so that it only tells.

    Returns:
        Whether all of it is filled: False where any rank of the group has failed.

    Raises:
        Incomplete: where this rank couldn't read, or an element has no source or two.
    """
    # First what lies in the ranks' own files: under the layout that it was saved with that is all there is.
    for home in (True, False) if reader.home is not None else (False,):
        problem: Exception | None = None
        own: list[_SharedRead] = []
        if not failed:
            try:
                own = _plan_reads(reader, group, identity, home)
            except Exception as error:  # sent to the others first
                problem = error
        rows = None if failed or problem else [_row(read) for read in own]
        answers = _gather_in_group(peers, group, identity, zlib.compress(json.dumps(rows).encode(), 1))
        lists = [from_json(zlib.decompress(answer)) for answer in answers]
        if problem is not None:
            raise problem
        if any(rows is None for rows in lists):
            return False
        all_of = [
            own if rank == identity.rank else [_shared_read(group, rank, row) for row in rows]
            for rank, rows in zip(group.ranks, lists, strict=True)
        ]
        try:
            _check(reader, group, all_of)
            break
        except Incomplete:  # all ranks of the group see it alike
            if not home:
                raise
    return _rounds(reader, group, peers, identity, list(_order(all_of)))


def _plan_reads(
    reader: CheckpointReader, group: SharingGroup, identity: Identity, home: bool
) -> list[_SharedRead]:
    """What this rank reads for its group.

    Args:
        home: whether each rank looks into its own file alone.
    """
    names = {items[0].name for items in group.items}
    files, reads = reader.ranks(names), list[_SharedRead]()
    turns = [(identity.rank, 0, 1)] if home else _files(files, group.ranks, identity.rank)
    for rank, share_of, shares in turns:
        if rank not in files:
            continue
        for place, items in enumerate(group.items):
            blocks = reader.blocks(rank, {items[0].name: items[:1]})
            turn = blocks[len(blocks) * share_of // shares : len(blocks) * (share_of + 1) // shares]
            for entry in {id(block.entry): block.entry for block in turn}.values():
                mine = [block for block in turn if block.entry is entry]
                for run in coalesce(mine, MAX_READ):
                    reads.append(_own(place, run, identity.rank, reader.path(rank)))
    return reads


def _files(files: Sequence[int], ranks: Sequence[int], me: int) -> Iterator[tuple[int, int, int]]:
    """Files that this rank reads of a group's: number, and which of how many shares of it.

    They are dealt in turn; where there are fewer files than ranks, ranks share them.
    """
    place, count = ranks.index(me), len(ranks)
    for turn, file in enumerate(files):
        readers = range(turn, count, len(files)) if len(files) < count else [turn % count]
        if place in readers:
            yield file, list(readers).index(place), len(readers)


def _own(item: int, blocks: tuple[WantedBlock, ...], rank: int, path: str) -> _SharedRead:
    entry, last = blocks[0].entry, blocks[-1]
    size = sum(block.length for block in blocks)
    end = last.first + last.length // entry.item
    return _SharedRead(item, entry.box, blocks[0].first, end, rank, size, Span(path, blocks))


def _row(read: _SharedRead) -> list[Any]:
    return [read.item, read.piece.start, read.piece.shape, read.first, read.last]


def _shared_read(group: SharingGroup, owner: int, row: list[Any]) -> _SharedRead:
    item, start, shape, first, last = row
    wanted = group.items[item][0]
    size = (last - first) * DTYPES[wanted.dtype][1]
    return _SharedRead(
        item, Box(wanted.box.whole, tuple(start), tuple(shape)), first, last, owner, size, None
    )


def _check(reader: CheckpointReader, group: SharingGroup, all_of: Sequence[Sequence[_SharedRead]]) -> None:
    """Every element must have exactly one source; all ranks of the group come to the same answer."""
    boxes: list[list[Box]] = [[] for _ in group.items]
    for mine in all_of:
        for read in mine:
            boxes[read.item] += read.piece.flat(read.first, read.last)
    for items, parts in zip(group.items, boxes, strict=True):
        reader.check(items[0], parts)


def _order(all_of: Sequence[Sequence[_SharedRead]]) -> Iterator[list[_SharedRead]]:
    """Reads in rounds: of each rank one in turn, so that in a round many ranks read at once."""
    now: list[_SharedRead] = []
    size = 0
    for turn in range(max(map(len, all_of), default=0)):
        for mine in all_of:
            if turn < len(mine):
                if now and size + mine[turn].size > ROUND:
                    yield now
                    now, size = [], 0
                now.append(mine[turn])
                size += mine[turn].size
    if now:
        yield now


def _rounds(
    reader: CheckpointReader,
    group: SharingGroup,
    peers: Peers,
    identity: Identity,
    rounds: Sequence[list[_SharedRead]],
) -> bool:
    """Read, pass on and fill round by round, and read ahead for the next one meanwhile."""
    with ThreadPoolExecutor(_THREADS) as pool:

        def begin(number: int) -> list[Future[memoryview]]:
            if number >= len(rounds):
                return []
            spans = [one.span for one in rounds[number] if one.span is not None]
            return [pool.submit(reader.verified, span) for span in spans]

        reading = begin(0)
        for number, reads in enumerate(rounds):
            ahead = begin(number + 1)
            problem: Exception | None = None
            data: list[memoryview] = []
            for future in reading:
                try:
                    data.append(future.result())
                except Exception as error:  # sent to the others first
                    problem = error
            owners = sorted({one.owner for one in reads})
            whole = _exchange_flags(peers, group, identity, owners, problem is None)
            if problem is not None or not whole:
                for future in ahead:
                    future.cancel()
                if problem is not None:
                    raise problem
                return False
            _pass_on(group, peers, identity, reads, data)
            reading = ahead
    return True


def _pass_on(
    group: SharingGroup,
    peers: Peers,
    identity: Identity,
    reads: Sequence[_SharedRead],
    data: list[memoryview],
) -> None:
    """One round: send what this rank has read, take what the others have, and fill."""
    others = [rank for rank in group.ranks if rank != identity.rank]
    given = iter(data)
    values = [next(given) if one.owner == identity.rank else memoryview(bytearray(one.size)) for one in reads]
    pairs = list(zip(reads, values, strict=True))
    out = [(rank, value) for one, value in pairs if one.owner == identity.rank for rank in others]
    peers.exchange(out, [(one.owner, value) for one, value in pairs if one.owner != identity.rank])
    for one, value in pairs:
        fill(group.items[one.item], one.piece, (one.first, one.last), value)


def _gather_in_group(peers: Peers, group: SharingGroup, identity: Identity, mine: bytes) -> list[bytes]:
    """What each rank of a group tells, in its order."""
    others = [rank for rank in group.ranks if rank != identity.rank]
    size = memoryview(bytearray(len(mine).to_bytes(8, "little")))
    sizes = {rank: memoryview(bytearray(8)) for rank in others}
    peers.exchange([(rank, size) for rank in others], list(sizes.items()))
    texts = {rank: memoryview(bytearray(int.from_bytes(sizes[rank], "little"))) for rank in others}
    text = memoryview(bytearray(mine))
    peers.exchange([(rank, text) for rank in others], list(texts.items()))
    return [mine if rank == identity.rank else bytes(texts[rank]) for rank in group.ranks]


def _exchange_flags(
    peers: Peers, group: SharingGroup, identity: Identity, owners: Sequence[int], good: bool
) -> bool:
    """Whether all owners of a round have read their part."""
    others = [rank for rank in group.ranks if rank != identity.rank]
    mine = memoryview(bytearray([good]))
    heard = {rank: memoryview(bytearray(1)) for rank in owners if rank != identity.rank}
    peers.exchange([(rank, mine) for rank in others] if identity.rank in owners else [], list(heard.items()))
    return all(flag[0] for flag in heard.values())


def load(
    reader: CheckpointReader,
    wanted: Sequence[LoadTarget],
    groups: Sequence[SharingGroup],
    peers: Peers,
    identity: Identity,
) -> None:
    """Fill what this rank wants alone, and then what it shares, group by group; all ranks call this together.

    Raises:
        Incomplete: as `CheckpointReader.fill` does, on the ranks that met it; the others return.
    """
    problem: Exception | None = None
    failed = False
    try:
        reader.fill(wanted)
    except Exception as error:  # the groups wait for this rank
        problem, failed = error, True
    for group in groups:
        try:
            failed |= not share(reader, group, peers, identity, failed)
        except (Incomplete, OSError, ValueError) as error:
            problem, failed = problem or error, True
    if problem is not None:
        raise problem
