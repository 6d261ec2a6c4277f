"""Token files in Megatron's format: `x.bin`, token ids end to end, and `x.idx`, where each sequence and document begins.

The index, little-endian (Megatron-LM, `megatron/core/datasets/indexed_dataset.py` and its readme): 9 bytes
`MMIDIDX\\0\\0` · uint64 version, 1 · uint8 code of the ids' type · uint64 sequences S · uint64 documents + 1, D ·
int32[S] tokens of each sequence · int64[S] byte at which each begins · int64[D] sequence at which each document begins,
and last S.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
CODES: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
"""Code -> type of the ids. There is no uint32."""
_HEADER = struct.Struct("<9sQBQQ")
MAX_SEQUENCE_TOKENS = 1 << 30
"""Tokens of a sequence; a longer document is written as several, since lengths are int32."""
_ROWS = 1 << 20
"""Documents that are handled at a time."""


def smallest_dtype(size: int) -> np.dtype:
    """The smallest type of the format that holds ids below `size`."""
    return np.dtype(np.uint8 if size <= 1 << 8 else np.uint16 if size <= 1 << 16 else np.int32)


@dataclass(frozen=True)
class IndexedTokens:
    """An `.idx` file and the `.bin` beside it, both mapped into memory."""

    prefix: Path
    """Their common path, without a suffix."""
    tokens: np.ndarray
    """[N] ids."""
    lengths: np.ndarray
    """[S] tokens of each sequence."""
    begins: np.ndarray
    """[documents + 1] first sequence of each document; last S."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.begins) - 1

    def ends(self) -> np.ndarray:
        """[documents] int64: the token behind the last one of each document."""
        before = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return before[self.begins[1:]]


def prefix_of(path: str) -> Path | None:
    """The prefix that a path names: `x.bin`, `x.idx`, `x` without such a file, or a folder with one pair in it.

    Raises:
        UserError: for one of a pair without the other, and for a folder with several.
    """
    given = Path(path).expanduser()
    if given.suffix in (".bin", ".idx") and not given.is_dir():
        other = given.with_suffix(".idx" if given.suffix == ".bin" else ".bin")
        if given.is_file() and not other.is_file():
            raise UserError(
                f"data.path='{path}' has no {other.name} beside it; a token file is a pair of both"
            )
        return given.with_suffix("") if given.is_file() else None
    if given.is_dir():
        pairs = [p.with_suffix("") for p in sorted(given.glob("*.idx")) if p.with_suffix(".bin").is_file()]
        if len(pairs) > 1:
            raise UserError(
                f"data.path='{path}' holds {len(pairs)} token files; name one, such as {pairs[0]}.bin, or several "
                "with their weights in data.mixture"
            )
        return pairs[0] if pairs else None
    beside = [given.with_name(given.name + suffix).is_file() for suffix in (".bin", ".idx")]
    return given if all(beside) and not given.exists() else None


def read(prefix: Path, checked: bool = False) -> IndexedTokens:
    """A pair, mapped.

    Args:
        checked: whether it was read before in this process, so that its rows needn't be looked at again.

    Raises:
        UserError: where the index isn't one, is cut short, or doesn't fit its `.bin`.
    """
    index, ids = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    try:
        with index.open("rb") as file:
            head = file.read(_HEADER.size)
        size, stored = index.stat().st_size, ids.stat().st_size
    except OSError as error:
        raise UserError(
            f"{index} can't be read: {error.strerror}; a token file is a .bin and an .idx"
        ) from None
    if len(head) < _HEADER.size or head[:9] != MAGIC:
        raise UserError(
            f"{index} is not an index of a token file (it doesn't begin with MMIDIDX); make the pair again"
        )
    _, version, code, sequences, places = _HEADER.unpack(head)
    kind = CODES.get(code)
    if version != VERSION or kind is None or not np.issubdtype(kind, np.integer):
        what = (
            "holds no integers"
            if kind and version == VERSION
            else f"is version {version} with type code {code}"
        )
        raise UserError(f"{index} {what}; tokens are integers in version {VERSION}: make the pair again")
    if size < _HEADER.size + 12 * sequences + 8 * places:
        raise UserError(
            f"{index} is cut short ({size} bytes, {sequences} sequences); make or copy the pair again"
        )
    at = _HEADER.size
    lengths = np.memmap(index, "<i4", "r", at, (sequences,)) if sequences else np.zeros(0, np.int32)
    starts = (
        np.memmap(index, "<i8", "r", at + 4 * sequences, (sequences,)) if sequences else np.zeros(0, np.int64)
    )
    begins = np.memmap(index, "<i8", "r", at + 12 * sequences, (places,)) if places else np.zeros(1, np.int64)
    if not checked:
        _check(index, lengths, starts, begins, np.dtype(kind).itemsize, stored)
    count = stored // np.dtype(kind).itemsize
    tokens = np.memmap(ids, kind, "r", 0, (count,)) if count else np.zeros(0, kind)
    return IndexedTokens(prefix, tokens, lengths, begins)


def _check(
    index: Path, lengths: np.ndarray, starts: np.ndarray, begins: np.ndarray, width: int, stored: int
) -> None:
    """Refuse sequences that don't lie end to end, and documents that aren't made of them."""
    at = 0
    for i in range(0, len(lengths), _ROWS):
        part = lengths[i : i + _ROWS].astype(np.int64)
        ends = at + np.cumsum(part) * width
        if (part < 0).any() or not np.array_equal(starts[i : i + _ROWS], np.concatenate([[at], ends[:-1]])):
            raise UserError(f"{index}: its sequences don't lie end to end; make the pair again")
        at = int(ends[-1])
    if at != stored:
        raise UserError(
            f"{index} speaks of {at} bytes of tokens, the .bin beside it has {stored}; make or copy the pair again"
        )
    if begins[0] != 0 or begins[-1] != len(lengths) or (np.diff(begins) < 0).any():
        raise UserError(f"{index}: its documents aren't made of its sequences; make the pair again")


def write_index(path: Path, kind: np.dtype, ends: np.ndarray) -> None:
    """Write the index of documents that end before the tokens `ends` [documents], the first beginning at 0.

    The file is flushed to disk; its name is the caller's to move. Memory stays bounded however many there are.
    """
    pieces = sum(int(counts.sum()) for counts, _ in _sequences(ends))
    code = next(code for code, known in CODES.items() if np.dtype(known) == kind)
    with path.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, VERSION, code, pieces, len(ends) + 1))
        for _, lengths in _sequences(ends):
            file.write(lengths.astype("<i4").tobytes())
        at = 0
        for _, lengths in _sequences(ends):
            after = at + np.cumsum(lengths) * kind.itemsize
            file.write(np.concatenate([[at], after[:-1]]).astype("<i8").tobytes())
            at = int(after[-1])
        file.write(np.zeros(1, "<i8").tobytes())
        sequence = 0
        for counts, _ in _sequences(ends):
            file.write((sequence + np.cumsum(counts)).astype("<i8").tobytes())
            sequence += int(counts.sum())


def _sequences(ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For some documents at a time: sequences of each, and the length of each sequence."""
    at = 0
    for i in range(0, len(ends), _ROWS):
        some = np.asarray(ends[i : i + _ROWS], dtype=np.int64)
        lengths = np.diff(some, prepend=at)
        counts = np.maximum(1, -(-lengths // MAX_SEQUENCE_TOKENS))
        pieces = np.repeat(lengths, counts)
        if len(pieces) > len(lengths):
            place = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
            pieces = np.minimum(pieces - place * MAX_SEQUENCE_TOKENS, MAX_SEQUENCE_TOKENS)
        yield counts, pieces
        at = int(some[-1])


def scan(
    index: IndexedTokens, feed: Callable[[np.ndarray, np.ndarray], None], tokens: int = 1 << 22
) -> Iterator[int]:
    """Feed all tokens and document ends, some at a time; yields how many tokens are done."""
    ends, done = index.ends(), 0
    for at in range(0, len(index.tokens), tokens):
        stop = min(at + tokens, len(index.tokens))
        upto = len(ends) if stop == len(index.tokens) else int(np.searchsorted(ends, stop, side="right"))
        feed(index.tokens[at:stop], ends[done:upto])
        done = upto
        yield stop
