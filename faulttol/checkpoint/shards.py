"""One rank's file: a safetensors file whose last tensor is the index of its pieces, with a digest for each MiB.

Any reader of safetensors opens it. The index says what the header can't: where each piece is in its global tensor, and
what its bytes must be. A reader of this project takes the index's place and digest from the manifest, reads the index
and then only the blocks that it needs; the header is never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.manifest import FORMAT, Identity, Incomplete, Plain, ShardFile, digest
from faulttol.checkpoint.pieces import BLOCK, DTYPES, Piece

INDEX = "__index__"
"""Name of the index among the file's tensors."""
_HEX = len(digest(b""))


@dataclass(frozen=True)
class Entry:
    """One piece in a file."""

    name: str
    dtype: str
    box: Box
    offset: int
    """First byte, counted from the first of the file's first piece."""
    digests: str
    """Those of its blocks, one after the other."""

    @property
    def bytes(self) -> int:
        """Of its values."""
        return self.box.elements * self.item

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype][1]

    def digest(self, block: int) -> str:
        """That of one block."""
        return self.digests[block * _HEX : (block + 1) * _HEX]


@dataclass(frozen=True)
class Index:
    """What a file says of itself."""

    run: str
    attempt: int
    step: int
    rank: int
    block: int
    """Bytes that one digest covers."""
    entries: tuple[Entry, ...]
    """In the order of the file: without holes, and the index behind the last."""

    def dump(self) -> bytes:
        """As JSON, whose length the digests' values don't change."""
        head = {k: getattr(self, k) for k in ("run", "attempt", "step", "rank", "block")}
        rows = [(e.name, e.dtype, e.box.whole, e.box.start, e.box.shape, e.digests) for e in self.entries]
        return json.dumps({"format": FORMAT, **head, "pieces": rows}, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, text: bytes | bytearray) -> Index:
        """The inverse of `dump`.

        Raises:
            Incomplete: where it isn't one.
        """
        try:
            tree = json.loads(text)
            if tree.pop("format") != FORMAT:
                raise Incomplete(f"its index isn't of format {FORMAT}")
            entries, offset = [], 0
            for name, dtype, whole, start, shape, digests in tree.pop("pieces"):
                box = Box(tuple(whole), tuple(start), tuple(shape))
                entries.append(Entry(name, dtype, box, offset, digests))
                offset += entries[-1].bytes
            return cls(**tree, entries=tuple(entries))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Incomplete(f"its index is unreadable: {error}") from None

    @property
    def bytes(self) -> int:
        """Of all pieces."""
        return sum(entry.bytes for entry in self.entries)


class Shard:
    """One rank's pieces, laid out as a file that is written in one pass.

    Raises:
        Incomplete: where a box is there twice.
        ValueError: where a dtype can't be saved.
    """

    def __init__(self, step: int, identity: Identity, pieces: Sequence[Piece]) -> None:
        # Wide dtypes first: then each piece is aligned without holes, which the format forbids.
        self._pieces = sorted(pieces, key=lambda piece: -(piece.bytes // max(1, piece.box.elements)))
        self._identity, self._step = identity, step
        self.plain: list[Plain] = [(piece.name, piece.dtype, piece.box) for piece in self._pieces]
        self._digests = ["0" * (_HEX * -(-piece.bytes // BLOCK)) for piece in self._pieces]
        self._header = self._head(len(self._index().dump()))

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The file's bytes in order; each piece is read now."""
        yield self._header
        for place, piece in enumerate(self._pieces):
            found, count = [], 0
            for chunk in piece.chunks():
                for at in range(0, len(chunk), BLOCK):
                    block = chunk[at : at + BLOCK]
                    found.append(digest(block))
                    count += len(block)
                    yield block
            if count != piece.bytes:
                raise Incomplete(f"{piece.name}{piece.box} has {count} bytes, and {piece.bytes} are its size")
            self._digests[place] = "".join(found)
        yield self._index().dump()

    def record(self) -> ShardFile:
        """What the manifest says of the file, once all chunks were taken."""
        index = self._index().dump()
        size = len(self._header) + sum(piece.bytes for piece in self._pieces) + len(index)
        return ShardFile(size, len(index), digest(index))

    def _index(self) -> Index:
        who, rows = self._identity, zip(self._pieces, self._digests, strict=True)
        entries = tuple(Entry(piece.name, piece.dtype, piece.box, 0, found) for piece, found in rows)
        return Index(who.run, who.attempt, self._step, who.rank, BLOCK, entries)

    def _head(self, index: int) -> bytes:
        """The header of safetensors: its length in eight bytes, then JSON, padded with blanks."""
        who = self._identity
        meta = {
            "checkpoint": str(FORMAT),
            "run": who.run,
            "attempt": str(who.attempt),
            "step": str(self._step),
        }
        tree: dict[str, object] = {"__metadata__": meta}
        offset = 0
        for piece in self._pieces:
            key = piece.name if piece.box.shape == piece.box.whole else f"{piece.name}{piece.box}"
            if key in tree:
                raise Incomplete(f"{piece.name}{piece.box} is there twice on rank {who.rank}")
            end = offset + piece.bytes
            tree[key] = {
                "dtype": DTYPES[piece.dtype][0],
                "shape": piece.box.shape,
                "data_offsets": (offset, end),
            }
            offset = end
        tree[INDEX] = {"dtype": "U8", "shape": (index,), "data_offsets": (offset, offset + index)}
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
