"""A conversion that is ready to run: what it will cost, and then the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from faulttol.checkpoint.hashes import MAX_READ
from faulttol.checkpoint.hashes import THREADS as THREADS
from faulttol.checkpoint.hashes import Progress as Progress
from faulttol.checkpoint.hashes import no_progress as no_progress
from faulttol.checkpoint.pieces import BLOCK

T = TypeVar("T")
WORK = 6 * MAX_READ
"""Bytes that one thread holds at most while it reads, converts and writes a chunk: as read, as numbers of the wanted
dtype with what converting them takes, and as blocks on their way out."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that a conversion takes."""

    bytes_read: int
    bytes_written: int
    """Of the files with values; what names them beside (an index, a manifest) is small and apart."""
    bytes_moved: int
    """Of what is written, what is in the source in other files."""
    peak_memory: int
    """At once, beside the interpreter and its libraries."""


@dataclass(frozen=True)
class ConversionResult:
    """A conversion that has ended."""

    path: str
    tensors: int
    """That were written."""
    bytes_read: int
    bytes_written: int
    notes: tuple[str, ...] = ()
    """What was made up, left out or changed, a line each."""


@dataclass(frozen=True)
class ConversionJob:
    """A conversion whose inputs were looked at and found right; nothing is written before `run`."""

    estimate: Estimate
    notes: tuple[str, ...]
    """What will be made up, left out or changed, a line each."""
    work: Callable[[Progress], ConversionResult]

    def run(self, progress: Progress = no_progress) -> ConversionResult:
        """Do it; what fails leaves nothing that could be taken for the result.

        Args:
            progress: gets the bytes that are written and that there are.
        """
        return self.work(progress)


class ConversionProgress:
    """Adds up what several threads have done."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._done, self._lock = 0, threading.Lock()

    def __call__(self, count: int) -> None:
        """`count` more bytes are done."""
        with self._lock:
            self._done += count
            self._progress(self._done, self._total)


def at_once(work: Sequence[Callable[[], T]]) -> list[T]:
    """Results of calls that run on `THREADS` threads; the first failure is raised when all that had begun has ended."""
    with ThreadPoolExecutor(THREADS) as pool:
        tasks = [pool.submit(one) for one in work]
        try:
            return [task.result() for task in tasks]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def blocked(chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same bytes in chunks of whole blocks, but for the last."""
    rest = bytearray()
    for chunk in chunks:
        if rest:
            take = min(len(chunk), BLOCK - len(rest))
            rest += chunk[:take]
            chunk = chunk[take:]
            if len(rest) == BLOCK:
                yield memoryview(rest)
                rest = bytearray()
        whole = len(chunk) // BLOCK * BLOCK
        if whole:
            yield chunk[:whole]
        rest += chunk[whole:]
    if rest:
        yield memoryview(rest)
