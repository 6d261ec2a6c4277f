"""A folder of prepared tokens, written in order, kept when killed, and whole only when `meta.json` says so."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError, from_json
from faulttol.checkpoint.store import CheckpointStore
from trainer.data import indexed, scores
from trainer.data.blocks import Fields
from trainer.data.sources import SourceFile
from trainer.data.tokenizer import Tokenizer
from trainer.data.workers import Encoder, Scorer, SourcePosition, TaskResult, map_in_order, tasks

NAME = "tokens"
"""Prefix of the token file in a folder: `tokens.bin`, `tokens.idx`, and `tokens.hash` with 8 bytes a document."""
_PARTS = ("tokens.bin.part", "ends.part", "journal.part", "tokens.hash.part", "tokens.idx.part")
_SCORES = ("scores.part", "threshold.part")

Progress = Callable[[str, int, int, int], None]
"""Called with the phase (`scores`, `tokens`, `verify`), bytes done, bytes in all, and tokens so far."""


@dataclass(frozen=True)
class PrepareJob:
    """A corpus to prepare, and the folder for it."""

    folder: Path
    key: str
    """Of all that the tokens depend on."""
    sources: list[SourceFile]
    tokenizer: Tokenizer
    fields: Fields
    keep: float
    workers: int
    progress: Progress

    @property
    def total(self) -> int:
        """Bytes of all sources."""
        return sum(source.size for source in self.sources)


class TokenScan:
    """Statistics and digests of a token file, from one pass over it.

    Args:
        hashes: where a hash of each document's content goes, 8 bytes each.
        kind: of the ids.
    """

    def __init__(self, hashes: Path, kind: np.dtype) -> None:
        self.hashes, self._width = hashes.open("wb"), kind.itemsize
        self._digest = hashlib.blake2b(kind.name.encode(), digest_size=16)
        self._open: Any = None
        self.tokens = self.documents = 0
        self.largest, self.smallest = -1, 0
        self.closing: int | None = None
        """The id that every document so far ends with; None where they differ."""

    def feed(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """More ids, and the tokens (of all) before which documents end in them."""
        if not len(ids):
            return
        raw = np.ascontiguousarray(ids).data.cast("B")
        self._digest.update(raw)
        self.largest, self.smallest = max(self.largest, int(ids.max())), min(self.smallest, int(ids.min()))
        hashes, start = [], 0
        for end in ends.tolist():
            stop = (end - self.tokens) * self._width
            document = self._open or hashlib.blake2b(digest_size=8)
            document.update(raw[start:stop])
            hashes.append(document.digest())
            self._open, start = None, stop
        if start < len(raw):
            self._open = self._open or hashlib.blake2b(digest_size=8)
            self._open.update(raw[start:])
        self.hashes.write(b"".join(hashes))
        last = np.asarray(ids)[ends[ends > self.tokens] - self.tokens - 1]
        if len(last):
            self.closing = int(last[0]) if self.documents == 0 or self.closing == int(last[0]) else None
            self.closing = self.closing if (last == last[0]).all() else None
        self.tokens += len(ids)
        self.documents += len(ends)

    def close(self) -> dict[str, Any]:
        """Flush the hashes to disk; what was found, as plain data."""
        with self.hashes as file:
            file.flush()
            os.fsync(file.fileno())
        return {
            "tokens": self.tokens, "documents": self.documents, "digest": self._digest.hexdigest(),
            "largest": self.largest, "smallest": self.smallest, "closing": self.closing,
        }  # fmt: skip


def build(job: PrepareJob) -> None:
    """Write the token file of a job into its folder, from where an earlier try was stopped.

    The sources are read once, in order, in blocks; workers encode; what they give is appended in order, so the
    bytes are the same whatever the number of workers. After each task a line of the journal says how far the
    files reach, with a digest. A try that finds a journal checks what it speaks of, cuts off the rest and continues.

    Raises:
        UserError: for data that can't be read, and for a folder that can't be written.
    """
    kind = indexed.smallest_dtype(job.tokenizer.size)
    try:
        for left in (*job.folder.glob(".*.tmp"), job.folder / "meta.json"):
            left.unlink(missing_ok=True)
        threshold, notes = _threshold(job)
        parts = _PartialFiles(job, kind)
        encoder = Encoder(job.tokenizer, job.fields, threshold, kind)
        with contextlib.closing(parts):
            todo = tasks(job.sources, job.fields, parts.position)
            with contextlib.closing(map_in_order(encoder, todo, job.workers)) as results:
                for position, made in results:
                    parts.append(position, made)
                    job.progress("tokens", position.read, job.total, parts.scan.tokens)
            parts.finish(notes)
    except OSError as error:
        raise UserError(
            f"data.cache: can't write {job.folder} ({error.strerror or error}); set data.cache to a folder with "
            "room: what is done is kept"
        ) from None


def _threshold(job: PrepareJob) -> tuple[float | None, list[str]]:
    """The score that rows must reach, and what to say of it; None where all are kept."""
    if job.fields.score is None or job.keep >= 1:
        return None, []
    raw, settled = (job.folder / name for name in _SCORES)
    try:
        known = from_json(settled.read_text())
        if known["key"] == job.key:
            return known["threshold"], known["notes"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with raw.open("wb") as file:
        todo = tasks(job.sources, job.fields, SourcePosition())
        with contextlib.closing(map_in_order(Scorer(job.fields), todo, job.workers)) as results:
            for position, scored in results:
                file.write(scored.astype("<f8").tobytes())
                job.progress("scores", position.read, job.total, 0)
    lowest, kept, rows = scores.threshold(raw, job.keep)
    note = (
        f"data.keep_fraction={job.keep}: {kept} of {rows} rows kept, those with data.score_field='{job.fields.score}' "
        f">= {lowest!r}, equal scores included"
    )
    CheckpointStore(str(job.folder)).write(
        settled.name, [json.dumps({"key": job.key, "threshold": lowest, "notes": [note]}).encode()]
    )
    raw.unlink()
    return lowest, [note]


class _PartialFiles:
    """The partial files of a folder while it is written, with a journal to recover from."""

    def __init__(self, job: PrepareJob, kind: np.dtype) -> None:
        self._job, self._kind = job, kind
        self._ids, self._ends, self._journal, hashes, self._index = (job.folder / name for name in _PARTS)
        self.scan = TokenScan(hashes, kind)
        self.position = SourcePosition()
        self._counts: Counter[str] = Counter()
        lines = self._recover()
        self._files = [path.open("ab") for path in (self._ids, self._ends)]
        with self._journal.open("w") as file:
            file.write("\n".join([json.dumps({"key": job.key}), *lines]) + "\n")
        self._lines = self._journal.open("a")

    def _recover(self) -> list[str]:
        """Verify what an interrupted try wrote and truncate the rest; the journal's lines that are valid."""
        good: list[str] = []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            head, *lines = self._journal.read_text().splitlines()
            if from_json(head)["key"] == self._job.key:
                with self._ids.open("rb") as ids, self._ends.open("rb") as ends:
                    for line in lines:
                        entry = from_json(line)
                        made = TaskResult(
                            np.frombuffer(ids.read(entry["tokens"] * self._kind.itemsize), self._kind),
                            np.frombuffer(ends.read(entry["documents"] * 8), "<i8") - self.scan.tokens,
                            Counter(entry["counts"]),
                        )
                        if self._entry(SourcePosition(*entry["mark"]), made) != entry:
                            break
                        self._count(SourcePosition(*entry["mark"]), made)
                        good.append(line)
                        self._job.progress("verify", self.position.read, self._job.total, self.scan.tokens)
        for path, size in (
            (self._ids, self.scan.tokens * self._kind.itemsize),
            (self._ends, self.scan.documents * 8),
        ):
            with path.open("ab") as file:
                file.truncate(size)
        return good

    def _entry(self, position: SourcePosition, made: TaskResult) -> dict[str, Any]:
        """A line of the journal."""
        digest = hashlib.blake2b(made.ids.tobytes() + made.ends.tobytes(), digest_size=16).hexdigest()
        return {
            "mark": list(position), "tokens": len(made.ids), "documents": len(made.ends), "counts": dict(made.counts),
            "digest": digest,
        }  # fmt: skip

    def _count(self, position: SourcePosition, made: TaskResult) -> None:
        self.scan.feed(made.ids, made.ends + self.scan.tokens)
        self._counts += made.counts
        self.position = position

    def append(self, position: SourcePosition, made: TaskResult) -> None:
        """What the next task gave."""
        for file, data in zip(
            self._files, (made.ids, (made.ends + self.scan.tokens).astype("<i8")), strict=True
        ):
            file.write(data.tobytes())
            file.flush()
        self._lines.write(json.dumps(self._entry(position, made)) + "\n")
        self._lines.flush()
        self._count(position, made)

    def finish(self, notes: list[str]) -> None:
        """Give the files their final names, then write `meta.json`, which commits them."""
        job, names = self._job, [NAME + end for end in (".bin", ".idx", ".hash")]
        for file in self._files:
            os.fsync(file.fileno())
        scanned = self.scan.close()
        ends = np.memmap(self._ends, "<i8", "r") if scanned["documents"] else np.zeros(0, np.int64)
        indexed.write_index(self._index, self._kind, ends)
        with self._index.open("rb") as index:
            os.fsync(index.fileno())
        for name in names:
            (job.folder / f"{name}.part").replace(job.folder / name)
        meta = scanned | {
            "key": job.key, "dtype": self._kind.name, "sources": len(job.sources), "rows": self._counts["rows"],
            "separator": job.tokenizer.separator, "tokenizer": job.tokenizer.digest,
            "notes": [*notes, *_count_notes(self._counts)],
        }  # fmt: skip
        CheckpointStore(str(job.folder)).write("meta.json", [json.dumps(meta, indent=1).encode()])
        for name in (*_PARTS, *_SCORES):
            (job.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the files as they are."""
        for file in (*self._files, self._lines, self.scan.hashes):
            file.close()


def _count_notes(counts: Counter[str]) -> Iterator[str]:
    """What was left out or mended, for the notes."""
    if counts["empty"]:
        yield f"{counts['empty']} of the texts are empty or null and were left out"
    if counts["zeros"]:
        yield f"{counts['zeros']} zero bytes in texts were left out: under data.tokenizer=bytes one ends a document"
    if counts["replaced"]:
        yield f"{counts['replaced']} texts or pieces aren't UTF-8; what can't be read in them became U+FFFD"
    if counts["special"]:
        yield f"{counts['special']} texts spell special tokens that are words of the tokenizer's model; kept as text"
