"""The manifest: the one file that makes a checkpoint exist, and the rules it must keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod

FORMAT = 1
"""Version of the layout on storage; a reader refuses one that it doesn't know."""
FILE = "manifest.json"


class Incomplete(Exception):
    """A checkpoint that misses, doubles or contradicts something; nothing was committed or nothing is loaded."""


@dataclass(frozen=True)
class Entry:
    """One piece in a shard file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    offset: int
    """First byte in the file."""
    length: int


@dataclass(frozen=True)
class ShardFile:
    """One rank's file."""

    rank: int
    file: str
    """Name within the checkpoint's folder."""
    bytes: int
    digest: str
    """SHA-256 of the whole file in hex: of the standard library's strong hashes the fastest on processors with
    SHA instructions, which every host of this class has (1.7 GB/s a core against 0.8 for BLAKE2b; CRC-32 does 3,
    but its 32 bits are few for the number of files that a large run writes)."""
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint."""

    step: int
    layout: dict[str, int]
    shards: tuple[ShardFile, ...]
    scalars: dict[str, object]

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}).encode()

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """The inverse of `dump`.

        Raises:
            Incomplete: where it is torn or of a format that isn't known.
        """
        try:
            tree = json.loads(text)
            if tree.pop("format") != FORMAT:
                raise Incomplete(f"its format isn't {FORMAT}; it was written by another version")
            shards = tuple(
                ShardFile(
                    **{
                        **shard,
                        "entries": tuple(
                            Entry(
                                **{
                                    **entry,
                                    **{k: tuple(entry[k]) for k in ("shape", "global_shape", "start")},
                                }
                            )
                            for entry in shard["entries"]
                        ),
                    }
                )
                for shard in tree.pop("shards")
            )
            return cls(shards=shards, **tree)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Incomplete(f"its manifest is unreadable: {error}") from error

    @property
    def bytes(self) -> int:
        """Over all shards."""
        return sum(shard.bytes for shard in self.shards)


def check(shards: Sequence[ShardFile], world: int) -> None:
    """Refuse shards that don't make up one whole state.

    Every rank must be there once, every tensor must have one shape and dtype everywhere, and its boxes must
    cover it exactly: inside the tensor, disjoint, with as many elements as it has. Boxes that are equal on
    several ranks are replicas and count once.

    Raises:
        Incomplete: naming the rank or tensor.
    """
    ranks = [shard.rank for shard in shards]
    if sorted(ranks) != list(range(world)):
        raise Incomplete(f"of ranks 0 to {world - 1}, ranks {sorted(ranks)} have saved")
    boxes: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], Entry]] = {}
    for shard in shards:
        for entry in shard.entries:
            known = boxes.setdefault(entry.name, {})
            first = next(iter(known.values()), entry)
            if (first.dtype, first.global_shape) != (entry.dtype, entry.global_shape):
                raise Incomplete(
                    f"{entry.name} is {first.dtype}{first.global_shape} on one rank and "
                    f"{entry.dtype}{entry.global_shape} on rank {shard.rank}"
                )
            known.setdefault((entry.start, entry.shape), entry)
    for known in boxes.values():
        _check_cover(list(known.values()))


def _check_cover(boxes: list[Entry]) -> None:
    name, whole = boxes[0].name, boxes[0].global_shape
    for box in boxes:
        ends = zip(box.start, box.shape, whole, strict=True)
        if any(at < 0 or at + size > limit for at, size, limit in ends):
            raise Incomplete(f"{name}{whole} has a box at {box.start} of {box.shape}, which is outside of it")
    covered = sum(prod(box.shape) for box in boxes)
    twins = _overlap([box for box in boxes if prod(box.shape)])
    if twins:
        raise Incomplete(f"{name} has boxes at {twins[0].start} and {twins[1].start} that overlap")
    if covered != prod(whole):
        raise Incomplete(f"{name} has {prod(whole)} elements, and the ranks saved {covered}")


def _overlap(boxes: list[Entry]) -> tuple[Entry, Entry] | None:
    """Two boxes that share an element, by a sweep along the dim that is cut most often."""
    dims = range(len(boxes[0].shape)) if boxes else range(0)
    if not dims:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    sweep = max(dims, key=lambda d: len({box.start[d] for box in boxes}))
    open_boxes: list[Entry] = []
    for box in sorted(boxes, key=lambda b: b.start[sweep]):
        open_boxes = [o for o in open_boxes if o.start[sweep] + o.shape[sweep] > box.start[sweep]]
        for other in open_boxes:
            if all(box.start[d] < other.start[d] + other.shape[d]
                   and other.start[d] < box.start[d] + box.shape[d] for d in dims):  # fmt: skip
                return other, box
        open_boxes.append(box)
    return None
