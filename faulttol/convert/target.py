"""A checkpoint of ours, written tensor by tensor without ever holding one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Protocol

from configs.errors import UserError
from faulttol.checkpoint import save as saving
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import CheckpointFolder, folder_of, run_tag
from faulttol.checkpoint.manifest import Identity, Uncertain
from faulttol.checkpoint.pieces import BLOCK, DTYPES, TensorPiece
from faulttol.checkpoint.shards import layout, ordered
from faulttol.checkpoint.store import StoreLike
from faulttol.convert.job import THREADS, ConversionProgress, ConversionResult, Progress, at_once, blocked

_PIECE = 256 * BLOCK
"""Most bytes of a piece that can be cut: so many lie in one file and may be read by one rank alone."""
_FILE = 4 << 30
"""Bytes of a file, about."""


@dataclass(frozen=True)
class Value:
    """A global tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[Box], Iterator[memoryview]]
    """The bytes of a box of whole rows, row-major, in chunks of any size."""
    divisible: bool = True
    """Whether it may be read in several boxes."""

    @property
    def bytes(self) -> int:
        """Of all values."""
        return prod(self.shape) * DTYPES[self.dtype][1]

    def boxes(self) -> Iterator[Box]:
        """What is written at a time."""
        whole = Box.full(self.shape)
        if not self.divisible or self.bytes <= _PIECE or not self.shape:
            yield whole
            return
        rows = max(1, _PIECE * self.shape[0] // self.bytes)
        for first in range(0, self.shape[0], rows):
            yield whole.cut(0, first, min(first + rows, self.shape[0]))


def zeros(name: str, dtype: str, shape: tuple[int, ...]) -> Value:
    """A tensor of zeros."""
    return filled(name, dtype, shape, bytes(DTYPES[dtype][1]))


def filled(name: str, dtype: str, shape: tuple[int, ...], element: bytes) -> Value:
    """A tensor whose elements all have the same bytes."""
    block = memoryview(element * (BLOCK // len(element)))

    def read(box: Box) -> Iterator[memoryview]:
        left = box.elements * len(element)
        while left:
            yield block[:left]
            left -= min(left, len(block))

    return Value(name, dtype, shape, read)


@dataclass(frozen=True)
class _Lazy(TensorPiece):
    """A piece whose values are read when they are written."""

    read: Callable[[Box], Iterator[memoryview]] = field(kw_only=True)
    tell: Callable[[int], None] = field(kw_only=True)

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes in order, in whole blocks but for the last."""
        for chunk in blocked(self.read(self.box)):
            yield chunk
            self.tell(len(chunk))


def lazy(
    name: str, dtype: str, box: Box, read: Callable[[Box], Iterator[memoryview]], tell: Callable[[int], None]
) -> TensorPiece:
    """A piece whose values are read when they are written."""
    return _Lazy(name, dtype, box, memoryview(b""), read=read, tell=tell)


def write_all(
    store: StoreLike,
    step: int,
    who: Sequence[Identity],
    pieces: Sequence[Sequence[TensorPiece]],
    facts: dict[str, Any],
) -> int:
    """Write a checkpoint's files, several at once, and commit them; bytes of all files.

    Args:
        who: by file.
        pieces: by file.

    Raises:
        Uncertain: where the manifest may have been written or not; the files stay then.
        Incomplete: where the pieces don't make up whole tensors. Then, as after any other error, nothing was committed.
    """
    token = saving.new_token()
    try:
        written = at_once(
            [
                partial(saving.write, store, step, token, one, mine)
                for one, mine in zip(who, pieces, strict=True)
            ]
        )
        return saving.commit(store, step, token, who[0], written, facts)
    except BaseException as error:
        if not isinstance(error, Uncertain):
            for one in who:
                saving.discard(store, step, token, one)
        raise


class ByteCounter(Protocol):
    """What values are read from."""

    bytes: int
    """Read so far."""


class ConversionTarget:
    """A checkpoint that will be written.

    Args:
        store: of its folder.
        run: that it belongs to.
        step: of it.
        values: its tensors.

    Raises:
        UserError: where the folder is another run's, or has a checkpoint of the step or a later one already.
        SaveSuperseded: where it has checkpoints of a newer attempt of the run.
    """

    def __init__(self, store: StoreLike, run: str, step: int, values: Sequence[Value]) -> None:
        self._store, self._run, self._step, self.values = store, run, step, values
        self._files = _share(values)
        saving.check_owner(store, self._identity(0))
        for commit in CheckpointFolder(store).commits:
            if commit.run == run_tag(run) and commit.step >= step:
                raise UserError(
                    f"--out={store.url} has step {commit.step} of run {commit.run} already: name another folder"
                )

    @property
    def bytes(self) -> int:
        """Of all values."""
        return sum(value.bytes for value in self.values)

    @property
    def size(self) -> int:
        """Of all files, in bytes; headers and indexes included."""
        total = 0
        for rank, parts in enumerate(self._files):
            pieces = ordered(
                TensorPiece(value.name, value.dtype, box, memoryview(b"")) for value, box in parts
            )
            total += layout(self._step, self._identity(rank), pieces).size
        return total

    @property
    def at_once(self) -> int:
        """Files that are written at once."""
        return min(THREADS, len(self._files))

    def write(self, facts: dict[str, Any], tell: ConversionProgress) -> tuple[str, int]:
        """Write all files and commit them: the path of the step, and the bytes of the files.

        Raises:
            Incomplete: where the values don't make up whole tensors. Whatever is raised, nothing was committed.
        """
        who = [self._identity(rank) for rank in range(len(self._files))]
        pieces = [
            [lazy(value.name, value.dtype, box, value.read, tell) for value, box in parts]
            for parts in self._files
        ]
        size = write_all(self._store, self._step, who, pieces, facts)
        return f"{self._store.url.rstrip('/')}/{folder_of(self._step)}", size

    def run(
        self, origin: ByteCounter, facts: dict[str, Any], notes: tuple[str, ...], progress: Progress
    ) -> ConversionResult:
        """`write`, and what came of it.

        Args:
            origin: that the values are read from.
        """
        before = origin.bytes
        path, size = self.write(facts, ConversionProgress(progress, self.bytes))
        return ConversionResult(path, len(self.values), origin.bytes - before, size, notes)

    def _identity(self, rank: int) -> Identity:
        return Identity(self._run, 1, {}, rank, len(self._files))


def _share(values: Sequence[Value]) -> list[list[tuple[Value, Box]]]:
    """What each file gets, evenly."""
    total = sum(value.bytes for value in values)
    count = max(-(-total // _FILE), THREADS if total > _PIECE else 1)
    files: list[list[tuple[Value, Box]]] = [[] for _ in range(count)]
    filled = [0] * count
    for value in values:
        for box in value.boxes():
            least = min(range(count), key=lambda i: filled[i])
            files[least].append((value, box))
            filled[least] += box.elements * DTYPES[value.dtype][1]
    return [file for file in files if file] or [[]]
