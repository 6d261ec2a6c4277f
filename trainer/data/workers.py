"""Tokenises blocks on several cores; results come in the order of the blocks, whatever the number of workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from configs.errors import UserError
from configs.rank import PARENT, die_with_parent
from trainer.data.blocks import Fields, FileBlock, blocks, rows
from trainer.data.sources import SourceFile
from trainer.data.tokenizer import Tokenizer

TASK_BYTES = 4 << 20
"""Bytes of text that a worker gets at a time, many small files together."""
_BATCH_TEXTS = 256
"""Texts that are encoded at a time."""


class SourcePosition(NamedTuple):
    """A position in the sources, between two blocks."""

    source: int = 0
    block: int = 0
    read: int = 0
    """Bytes of all sources, as stored, that lie before it."""


@dataclass(frozen=True)
class TaskResult:
    """The result of a task."""

    ids: np.ndarray
    """[N] token ids with separators."""
    ends: np.ndarray
    """[documents] int64: the id behind each separator."""
    counts: Counter[str]
    """Rows read and left out, by reason."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def tasks(
    sources: list[SourceFile], fields: Fields, start: SourcePosition
) -> Iterator[tuple[SourcePosition, list[FileBlock]]]:
    """Blocks in groups for a worker, each with the place behind it; from `start` on."""
    before = sum(source.size for source in sources[: start.source])
    group: list[FileBlock] = []
    size, position = 0, start
    for i in range(start.source, len(sources)):
        for number, block in enumerate(blocks(sources[i], fields)):
            if i == start.source and number < start.block:
                continue
            group.append(block)
            size += _size(block)
            read = before + min(block.read, sources[i].size)
            position = (
                SourcePosition(i + 1, 0, before + sources[i].size)
                if block.ends
                else SourcePosition(i, number + 1, read)
            )
            if size >= TASK_BYTES:
                yield position, group
                group, size = [], 0
        before += sources[i].size
    if group:
        yield position, group


def _size(block: FileBlock) -> int:
    return sum(len(text or b"") for text in block.data[0]) if block.kind == "parquet" else len(block.data)


@dataclass
class Encoder:
    """Turns a task into ids; can be sent to another process."""

    tokenizer: Tokenizer
    fields: Fields
    threshold: float | None
    """Rows with a lower score are left out; None: none are."""
    kind: np.dtype

    def __call__(self, task: list[FileBlock]) -> TaskResult:
        """The ids of a task.

        Raises:
            UserError: for a malformed row, with file and row.
        """
        output = _Output(self.tokenizer.separator, self.kind)
        texts: list[tuple[bytes, bool]] = []
        for block in task:
            for row in rows(block, self.fields):
                if block.kind == "text":
                    self._encode(texts, output)
                    self._encode([(row.text or b"", row.ends)], output, begun=block.first > 1)
                    continue
                output.counts["rows"] += 1
                if self.threshold is not None and row.score is not None and row.score < self.threshold:
                    output.counts["below"] += 1
                else:
                    texts.append((row.text or b"", True))
                if len(texts) >= _BATCH_TEXTS:
                    self._encode(texts, output)
        self._encode(texts, output)
        return output.result()

    def _encode(self, texts: list[tuple[bytes, bool]], output: _Output, begun: bool = False) -> None:
        if texts:
            encoded = self.tokenizer.encode([text for text, _ in texts], output.counts)
            for ids, (_, ends) in zip(encoded, texts, strict=True):
                output.add(ids, ends, begun)
        texts.clear()


@dataclass
class _Output:
    separator: int
    kind: np.dtype
    parts: list[np.ndarray] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    size: int = 0

    def add(self, ids: np.ndarray, ends: bool, begun: bool) -> None:
        """One text, or a piece of one that was `begun` before; an empty one makes no document."""
        self.parts.append(ids.astype(self.kind))
        self.size += len(ids)
        if ends and (len(ids) or begun):
            self.parts.append(np.array([self.separator], dtype=self.kind))
            self.size += 1
            self.ends.append(self.size)
        elif ends:
            self.counts["empty"] += 1

    def result(self) -> TaskResult:
        ids = np.concatenate(self.parts) if self.parts else np.zeros(0, self.kind)
        return TaskResult(ids, np.array(self.ends, dtype=np.int64), self.counts)


@dataclass
class Scorer:
    """Reads the scores of a task."""

    fields: Fields

    def __call__(self, task: list[FileBlock]) -> np.ndarray:
        """[rows] float64 scores of a task."""
        return np.array([row.score for block in task for row in rows(block, self.fields)], dtype=np.float64)


class _WorkerState:
    """State of a worker process, set as it starts."""

    work: Callable[[list[FileBlock]], Any]


def _init_worker(parent: int, work: Callable[[list[FileBlock]], Any]) -> None:
    die_with_parent({PARENT: str(parent)})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _WorkerState.work = work


def _run(task: list[FileBlock]) -> Any:
    return _WorkerState.work(task)


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are started in here don't import the program's main module: workers need nothing of it, and a
    script that isn't guarded would prepare once more in each of them, each waiting for the lock of this one."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def map_in_order(
    work: Callable[[list[FileBlock]], Any],
    some: Iterator[tuple[SourcePosition, list[FileBlock]]],
    workers: int,
) -> Generator[tuple[SourcePosition, Any], None, None]:
    """The result of `work` for each task, in order; at most twice as many tasks as workers are in flight.

    Raises:
        UserError: what `work` raises first in the order of tasks; and where a worker process dies.
    """
    if workers == 1:
        for position, task in some:
            yield position, work(task)
        return
    waiting: deque[tuple[SourcePosition, Future[Any]]] = deque()
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_init_worker, initargs=(os.getpid(), work)
    )
    try:
        for position, task in some:
            with _without_main():
                waiting.append((position, pool.submit(_run, task)))
            if len(waiting) >= 2 * workers:
                position, made = waiting.popleft()
                yield position, made.result()
        while waiting:
            position, made = waiting.popleft()
            yield position, made.result()
    except BrokenProcessPool:
        raise UserError(
            f"a worker of {workers} died while preparing data, most likely of memory; type --workers "
            f"{max(1, workers // 2)}: what is done is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
