"""The manifest: the one file that makes a checkpoint exist, and the rules it must keep.

It is a short head. What grows with the model and the ranks, the names of the tensors and the digests of the files, is in a
directory beside it, in blocks whose places and digests the head tells: a rank reads the head and the few blocks it needs.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from configs.errors import from_json
from faulttol.checkpoint.boxes import Box

FORMAT = 2
"""Version of the layout on storage; a reader refuses one that it doesn't know."""
DIRECTORY_BLOCK = 64 << 10
"""Bytes of a block of the directory, at most, but for a tensor that needs more alone."""
Plain = tuple[str, str, Box]
"""Name, dtype and box of a piece, without its place and digests."""


class Incomplete(Exception):
    """A checkpoint that misses, doubles or contradicts something; nothing was committed or nothing is loaded."""


class SaveSuperseded(Incomplete):
    """A newer attempt of the run has saved; this one is over."""


class Uncertain(Incomplete):
    """Nobody can say whether a save was committed, so nothing of it may be removed: it may be the newest."""


def digest(data: bytes | bytearray | memoryview) -> str:
    """128 bits of SHA-256 in hex: of heads, directories and indexes. Blocks of values have a faster one."""
    return hashlib.sha256(data).hexdigest()[:32]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts or settings by dotted name."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return values


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
class DirectoryBlock:
    """A block of the directory: rows of neighbours."""

    first: str | int
    """Name of its first tensor, or the rank of its first file."""
    count: int
    offset: int
    """In the directory, in bytes."""
    length: int
    digest: str


@dataclass(frozen=True)
class ManifestHead:
    """What commits a checkpoint: a few KB at any size."""

    run: str
    attempt: int
    step: int
    layout: dict[str, int]
    """That it was saved under; information only."""
    token: str
    """Word in the names of its files, new in each save."""
    world: int
    """Ranks that saved."""
    size: int
    """Bytes of all files of ranks."""
    tensors: tuple[DirectoryBlock, ...]
    """Of the directory, in the order of names."""
    files: tuple[DirectoryBlock, ...]
    """Of the directory, by rank."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The small state, and what the model and the data were: JSON that the trainer gave."""

    def dump(self) -> bytes:
        """As JSON with a digest of itself.

        Raises:
            TypeError: where the facts aren't JSON.
        """
        tree = {"format": FORMAT, **asdict(self)}
        for part in ("tensors", "files"):
            tree[part] = [list(block.values()) for block in tree[part]]
        tree = from_json(json.dumps(tree))  # keys are words from here on, as they will be read
        return json.dumps({"digest": digest(_canonical(tree)), **tree}, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, text: bytes) -> ManifestHead:
        """The inverse of `dump`.

        Raises:
            Incomplete: where it is torn, changed or of a format that isn't known.
        """
        try:
            tree = from_json(text)
            if tree["format"] != FORMAT:
                raise Incomplete(
                    f"its manifest is of format {tree['format']}, and this version reads {FORMAT}"
                )
            if tree.pop("digest") != digest(_canonical(tree)):
                raise Incomplete("its manifest differs from what was saved: it contradicts its own digest")
            del tree["format"]
            tensors, files = (
                tuple(DirectoryBlock(*row) for row in tree.pop(part)) for part in ("tensors", "files")
            )
            return cls(tensors=tensors, files=files, **tree)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Incomplete(f"its manifest is unreadable: {type(error).__name__}: {error}") from None

    @property
    def count(self) -> int:
        """Tensors."""
        return sum(block.count for block in self.tensors)

    def blocks_of(self, names: Iterable[str]) -> list[int]:
        """Numbers of the blocks that tell of tensors, ascending; a name that isn't there gives its neighbours'."""
        firsts = [str(block.first) for block in self.tensors]
        return sorted({max(0, bisect_right(firsts, name) - 1) for name in names}) if firsts else []

    def blocks_of_files(self, ranks: Iterable[int]) -> list[int]:
        """Numbers of the blocks that tell of ranks' files, ascending."""
        firsts = [int(block.first) for block in self.files]
        return sorted({bisect_right(firsts, rank) - 1 for rank in ranks})


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint with its whole directory."""

    run: str
    attempt: int
    step: int
    layout: dict[str, int]
    """That it was saved under; information only."""
    token: str
    """Word in the names of its files, new in each save."""
    tensors: dict[str, Tensor]
    """By name; in the order of names, once it was read."""
    files: tuple[ShardFile, ...]
    """By rank."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The small state, and what the model and the data were: JSON that the trainer gave."""

    @property
    def world(self) -> int:
        """Ranks that saved."""
        return len(self.files)

    def find(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, those of the names that are there."""
        return {name: self.tensors[name] for name in names if name in self.tensors}

    def rows(self, ranks: Iterable[int]) -> dict[int, ShardFile]:
        """Files by rank."""
        return {rank: self.files[rank] for rank in ranks}

    def split(self) -> tuple[ManifestHead, list[bytes]]:
        """The head, and the directory in blocks."""
        rows = [(name, [name, t.dtype, t.shape, t.ranks]) for name, t in sorted(self.tensors.items())]
        texts: list[bytes] = []
        tensors = _blocks(rows, texts)
        files = _blocks([(at, [f.bytes, f.index, f.digest]) for at, f in enumerate(self.files)], texts)
        head = ManifestHead(
            run=self.run,
            attempt=self.attempt,
            step=self.step,
            layout=self.layout,
            token=self.token,
            world=self.world,
            size=self.bytes,
            tensors=tensors,
            files=files,
            facts=self.facts,
        )
        return head, texts

    @classmethod
    def join(cls, head: ManifestHead, tensors: dict[str, Tensor], files: Sequence[ShardFile]) -> Manifest:
        """The inverse of `split`, of blocks that were read.

        Raises:
            Incomplete: where the directory hasn't as many files as ranks have saved.
        """
        if len(files) != head.world:
            raise Incomplete(f"its directory has {len(files)} files, of {head.world} ranks")
        return cls(
            head.run, head.attempt, head.step, head.layout, head.token, tensors, tuple(files), head.facts
        )

    @property
    def bytes(self) -> int:
        """Over all files of ranks."""
        return sum(file.bytes for file in self.files)


def _blocks(rows: Sequence[tuple[str | int, list[Any]]], texts: list[bytes]) -> tuple[DirectoryBlock, ...]:
    """Rows in blocks, each a line of JSON; the lines are added to `texts`."""
    blocks: list[DirectoryBlock] = []
    offset, at = sum(map(len, texts)), 0
    lines = [json.dumps(row, separators=(",", ":")) for _, row in rows]
    while at < len(rows):
        end, size = at + 1, len(lines[at]) + 3
        while end < len(rows) and size + len(lines[end]) + 1 <= DIRECTORY_BLOCK:
            size += len(lines[end]) + 1
            end += 1
        text = f"[{','.join(lines[at:end])}]\n".encode()
        blocks.append(DirectoryBlock(rows[at][0], end - at, offset, len(text), digest(text)))
        texts.append(text)
        offset, at = offset + len(text), end
    return tuple(blocks)


def tensors_of(text: bytes | bytearray | memoryview) -> dict[str, Tensor]:
    """What a block of the directory tells of tensors; its digest was compared."""
    return {
        name: Tensor(dtype, tuple(shape), tuple((first, last) for first, last in ranks))
        for name, dtype, shape, ranks in from_json(bytes(text))
    }


def files_of(text: bytes | bytearray | memoryview) -> list[ShardFile]:
    """What a block of the directory tells of files; its digest was compared."""
    return [ShardFile(*row) for row in from_json(bytes(text))]


def _canonical(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, separators=(",", ":"), sort_keys=True).encode()
