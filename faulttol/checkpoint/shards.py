"""One rank's file: a safetensors file whose last tensor is the index of its pieces, with a digest for each MiB.

Any reader of safetensors opens it. The index says what the header can't: where each piece is in its global tensor, and
what its bytes must be. A reader of this project takes the index's place and digest from the manifest, reads the index
and then only the blocks that it needs; the header is never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import xxhash

from configs.errors import from_json
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.manifest import FORMAT, Identity, Incomplete, Plain, ShardFile, digest
from faulttol.checkpoint.pieces import BLOCK, DTYPES, TensorPiece, check_dtype

INDEX = "__index__"
"""Name of the index among the file's tensors."""
ALIGNMENT = 4096
"""Values begin at a multiple of it: a page of memory, and of most disks."""


def block_digest(data: bytes | bytearray | memoryview) -> str:
    """128 bits of XXH3 in hex, of one block of values.

    It finds what breaks by itself: flipped bits, torn writes, mixed files. It isn't made against who forges; nor would a
    strong hash be, as a forger would write its digest too. At 10 GB/s and more a core it costs nothing beside the write,
    where SHA-256 (1.3 to 1.7 GB/s with a processor's own instructions) was slower than a disk.
    """
    return xxhash.xxh3_128_hexdigest(data)


_DIGITS = 20
"""Characters that an index has for its step."""
_HEX = len(block_digest(b""))


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
class ShardIndex:
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
        """As JSON with blanks behind it: neither the digests' values nor the step change its length, so memory that was got
        for one file serves the next.
        """
        head = {k: getattr(self, k) for k in ("run", "attempt", "step", "rank", "block")}
        rows = [(e.name, e.dtype, e.box.whole, e.box.start, e.box.shape, e.digests) for e in self.entries]
        text = json.dumps({"format": FORMAT, **head, "pieces": rows}, separators=(",", ":")).encode()
        return text + b" " * (_DIGITS - len(str(self.step)))

    @classmethod
    def parse(cls, text: bytes | bytearray) -> ShardIndex:
        """The inverse of `dump`.

        Raises:
            Incomplete: where it isn't one.
        """
        try:
            tree = from_json(text)
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


@dataclass(frozen=True)
class ShardLayout:
    """Where everything lies in a rank's file, before a value is there: plain data that another process can use."""

    step: int
    identity: Identity
    pieces: tuple[Plain, ...]
    """In the order of the file, as `ordered` gives it."""

    def sizes(self) -> Iterator[int]:
        """Bytes by piece."""
        for _, dtype, box in self.pieces:
            yield box.elements * DTYPES[dtype][1]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First byte of each piece in the file, and the first after the last."""
        return tuple(accumulate(self.sizes(), initial=len(self.header)))

    @cached_property
    def size(self) -> int:
        """Of the file, in bytes."""
        return self.offsets[-1] + self._index_bytes

    @cached_property
    def header(self) -> bytes:
        """That of safetensors: its length in eight bytes, then JSON, padded with blanks.

        Raises:
            Incomplete: where a box is there twice.
        """
        who = self.identity
        meta = {
            "checkpoint": str(FORMAT),
            "run": who.run,
            "attempt": str(who.attempt),
            "step": str(self.step),
        }
        tree: dict[str, object] = {"__metadata__": meta}
        offset = 0
        for (name, dtype, box), size in zip(self.pieces, self.sizes(), strict=True):
            key = name if box.shape == box.whole else f"{name}{box}"
            if key in tree:
                raise Incomplete(f"{name}{box} is there twice on rank {who.rank}")
            end = offset + size
            tree[key] = {"dtype": DTYPES[dtype][0], "shape": box.shape, "data_offsets": (offset, end)}
            offset = end
        end = offset + self._index_bytes
        tree[INDEX] = {"dtype": "U8", "shape": (self._index_bytes,), "data_offsets": (offset, end)}
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def _index_bytes(self) -> int:
        return len(self.index(["0" * (_HEX * -(-size // BLOCK)) for size in self.sizes()]))

    def index(self, digests: Sequence[str]) -> bytes:
        """The index.

        Args:
            digests: by piece, those of its blocks one after the other.
        """
        who, rows = self.identity, zip(self.pieces, digests, strict=True)
        entries = tuple(Entry(name, dtype, box, 0, digest) for (name, dtype, box), digest in rows)
        return ShardIndex(who.run, who.attempt, self.step, who.rank, BLOCK, entries).dump()

    def stream(self, values: Iterable[Iterable[memoryview]], index: list[bytes]) -> Iterator[memoryview]:
        """The file's bytes in order, digested on the way, in blocks.

        Args:
            values: by piece, its bytes in chunks of whole blocks, but for the last.
            index: takes the index, once all was given.

        Raises:
            Incomplete: where a piece has more or fewer bytes than its box.
        """
        yield memoryview(self.header)
        digests = []
        for chunks, size, (name, _, box) in zip(values, self.sizes(), self.pieces, strict=True):
            blocks, count = [], 0
            for chunk in chunks:
                for at in range(0, len(chunk), BLOCK):
                    block = chunk[at : at + BLOCK]
                    blocks.append(block_digest(block))
                    count += len(block)
                    yield block
            if count != size:
                raise Incomplete(f"{name}{box} has {count} bytes, and {size} are its size")
            digests.append("".join(blocks))
        index.append(self.index(digests))
        yield memoryview(index[0])

    def record(self, index: bytes) -> ShardFile:
        """What the manifest says of the file."""
        return ShardFile(self.offsets[-1] + len(index), len(index), digest(index))


def ordered(pieces: Iterable[TensorPiece]) -> list[TensorPiece]:
    """Pieces in the order of a file: wide dtypes first, so that each is aligned without holes, which the format forbids.

    Boxes without elements tell nothing and are left out, but where the whole tensor is empty.

    Raises:
        ValueError: where a dtype can't be saved.
    """
    kept = [piece for piece in pieces if piece.box.elements or 0 in piece.box.whole]
    for piece in kept:
        check_dtype(piece.name, piece.dtype)
    return sorted(kept, key=lambda piece: -DTYPES[piece.dtype][1])


def layout(step: int, identity: Identity, pieces: Iterable[TensorPiece]) -> ShardLayout:
    """The layout of a file of these pieces, which are `ordered`."""
    return ShardLayout(step, identity, tuple((piece.name, piece.dtype, piece.box) for piece in pieces))


class Shard:
    """One rank's pieces, laid out as a file that is written in one pass.

    Raises:
        Incomplete: where a box is there twice.
        ValueError: where a dtype can't be saved.
    """

    def __init__(self, step: int, identity: Identity, pieces: Iterable[TensorPiece]) -> None:
        self._pieces = ordered(pieces)
        self.layout = layout(step, identity, self._pieces)
        _ = self.layout.header  # refuses what is there twice, before anything is written
        self._sealed: list[bytes] = []

    @property
    def plain(self) -> list[Plain]:
        """The pieces without their values, in the order of the file."""
        return list(self.layout.pieces)

    def chunks(self) -> Iterator[memoryview]:
        """The file's bytes in order; each piece is read now."""
        self._sealed.clear()
        yield from self.layout.stream((piece.chunks() for piece in self._pieces), self._sealed)

    def record(self) -> ShardFile:
        """What the manifest says of the file, once all chunks were taken."""
        return self.layout.record(self._sealed[0])
