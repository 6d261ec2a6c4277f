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
    """BLAKE2b of the whole file, 16 bytes, in hex."""
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

    Every rank must be there, every tensor must have one shape and dtype everywhere, and its boxes must cover
    it: by count of elements with no box twice, but for boxes that are equal on several ranks (replicas).

    Raises:
        Incomplete: naming the rank or tensor.
    """
    missing = set(range(world)) - {shard.rank for shard in shards}
    if missing:
        raise Incomplete(f"ranks {sorted(missing)} saved nothing")
    boxes: dict[str, dict[tuple[int, ...], Entry]] = {}
    for shard in shards:
        for entry in shard.entries:
            known = boxes.setdefault(entry.name, {})
            first = next(iter(known.values()), entry)
            if (first.dtype, first.global_shape) != (entry.dtype, entry.global_shape):
                raise Incomplete(f"{entry.name} is {first.dtype}{first.global_shape} on one rank and "
                                 f"{entry.dtype}{entry.global_shape} on rank {shard.rank}")  # fmt: skip
            twin = known.setdefault(entry.start, entry)
            if twin.shape != entry.shape:
                raise Incomplete(f"{entry.name} has two boxes at {entry.start}")
    for name, known in boxes.items():
        whole = prod(next(iter(known.values())).global_shape)
        covered = sum(prod(entry.shape) for entry in known.values())
        if covered != whole:
            raise Incomplete(f"{name} has {whole} elements, and the ranks saved {covered}")
