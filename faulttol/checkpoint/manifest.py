"""The manifest: the one file that makes a checkpoint exist, and the rules it must keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from faulttol.checkpoint.boxes import Box, uncovered

FORMAT = 2
"""Version of the layout on storage; a reader refuses one that it doesn't know."""
Plain = tuple[str, str, Box]
"""Name, dtype and box of a piece, without its place and digests."""


class Incomplete(Exception):
    """A checkpoint that misses, doubles or contradicts something; nothing was committed or nothing is loaded."""


class Superseded(Incomplete):
    """A newer attempt of the run has saved; this one is over."""


def digest(data: bytes | bytearray | memoryview) -> str:
    """128 bits of SHA-256 in hex.

    Of the standard library's strong hashes the fastest on processors with SHA instructions, which every host of this class
    has (1.7 GB/s a core against 0.8 for BLAKE2b). CRC-32 does 3, but its 32 bits are few for the blocks of a large run.
    """
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass(frozen=True)
class Identity:
    """Who saves or loads."""

    run: str
    """Id of the run, which owns its folder."""
    attempt: int
    """Grows with each start of the run: a newer one shuts out what an older one still writes."""
    layout: dict[str, int]
    """Size by axis; kept as information, nothing hangs on it."""
    rank: int
    world: int


@dataclass(frozen=True)
class Tensor:
    """A global tensor that a checkpoint holds."""

    dtype: str
    shape: tuple[int, ...]
    ranks: tuple[tuple[int, int], ...]
    """First and last of the ranks whose files have a part of it."""

    def files(self) -> Iterator[int]:
        """The ranks whose files have a part of it."""
        for first, last in self.ranks:
            yield from range(first, last + 1)


@dataclass(frozen=True)
class ShardFile:
    """One rank's file."""

    bytes: int
    index: int
    """Bytes at its end that are the index of its pieces."""
    digest: str
    """Of the index, which has the digests of the pieces."""


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint."""

    run: str
    attempt: int
    step: int
    layout: dict[str, int]
    """That it was saved under; information only."""
    token: str
    """Word in the names of its files, new in each save."""
    tensors: dict[str, Tensor]
    files: tuple[ShardFile, ...]
    """By rank."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The small state, and what the model and the data were: JSON that the trainer gave."""

    @property
    def world(self) -> int:
        """Ranks that saved."""
        return len(self.files)

    def dump(self) -> bytes:
        """As JSON with a digest of itself.

        Raises:
            TypeError: where the facts aren't JSON.
        """
        tree = {
            "format": FORMAT,
            **{k: getattr(self, k) for k in ("run", "attempt", "step", "layout", "token", "facts")},
            "world": self.world,
            "tensors": {name: [t.dtype, t.shape, t.ranks] for name, t in self.tensors.items()},
            "files": [[file.bytes, file.index, file.digest] for file in self.files],
        }
        tree = json.loads(json.dumps(tree))  # keys are words from here on, as they will be read
        return json.dumps({"digest": digest(_canonical(tree)), **tree}, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """The inverse of `dump`.

        Raises:
            Incomplete: where it is torn, changed or of a format that isn't known.
        """
        try:
            tree = json.loads(text)
            if tree["format"] != FORMAT:
                raise Incomplete(
                    f"its manifest is of format {tree['format']}, and this version reads {FORMAT}"
                )
            if tree.pop("digest") != digest(_canonical(tree)):
                raise Incomplete("its manifest differs from what was saved: it contradicts its own digest")
            files = tuple(ShardFile(*row) for row in tree.pop("files"))
            if tree.pop("world") != len(files):
                raise Incomplete("its manifest has another number of files than of ranks")
            tensors = {
                name: Tensor(dtype, tuple(shape), tuple((first, last) for first, last in ranks))
                for name, (dtype, shape, ranks) in tree.pop("tensors").items()
            }
            del tree["format"]
            return cls(tensors=tensors, files=files, **tree)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Incomplete(f"its manifest is unreadable: {type(error).__name__}: {error}") from None

    @property
    def bytes(self) -> int:
        """Over all files."""
        return sum(file.bytes for file in self.files)


def _canonical(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, separators=(",", ":"), sort_keys=True).encode()


def survey(pieces: Sequence[Sequence[Plain]]) -> dict[str, Tensor]:
    """The global tensors that the ranks' pieces make up, after a check that each is whole.

    Every tensor must have one shape and dtype everywhere, and its boxes must cover it exactly: inside of it,
    disjoint, nothing left out.

    Args:
        pieces: by rank, what each has written.

    Raises:
        Incomplete: naming the tensor and the range or rank.
    """
    found: dict[str, list[tuple[int, str, Box]]] = {}
    for rank, rows in enumerate(pieces):
        for name, dtype, box in rows:
            found.setdefault(name, []).append((rank, dtype, box))
    tensors = {}
    for name, parts in found.items():
        first, dtype, box = parts[0]
        for rank, other, part in parts:
            if (other, part.whole) != (dtype, box.whole):
                raise Incomplete(
                    f"{name} is {dtype}{list(box.whole)} on rank {first} and "
                    f"{other}{list(part.whole)} on rank {rank}"
                )
        why = uncovered(Box.all_of(box.whole), [part for *_, part in parts])
        if why:
            raise Incomplete(f"{name}{why}")
        tensors[name] = Tensor(dtype, box.whole, _runs(sorted({rank for rank, *_ in parts})))
    return tensors


def _runs(ranks: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Stretches of neighbours."""
    breaks = [i for i, (a, b) in enumerate(pairwise(ranks), start=1) if b != a + 1]
    edges = [0, *breaks, len(ranks)]
    return tuple((ranks[a], ranks[b - 1]) for a, b in pairwise(edges))
