"""Logs, stacks and records of ranks, a bounded part of each."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import UserError, from_json
from configs.paths import RunPaths

_BLOCK = 1 << 18
_LONGEST = 4000
"""Characters of a line."""
_READ = 4 << 20
"""Bytes that one answer reads without a search."""
_SEARCH_SECONDS = 2.0
_STACK = 1 << 20
_RECORDS = 400
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """A line without what moves a terminal's cursor, colours or turns the direction of writing."""
    text = text.rsplit("\r", 1)[-1] if "\r" in text.rstrip("\r") else text
    return _CONTROL.sub("", _ANSI.sub("", text))[:_LONGEST]


def path_of(run: RunPaths, attempt: int, rank: int) -> Path:
    """A rank's log.

    Raises:
        FileNotFoundError: where there is none, with a sentence.
    """
    path = run.attempt(attempt).log(rank)
    if not path.is_file():
        raise FileNotFoundError(f"rank {rank} of attempt {attempt} has no log")
    return path


def log(
    run: RunPaths, attempt: int, rank: int, search: str, before: int | None, count: int
) -> dict[str, Any]:
    """Lines of a rank's log, the last ones before a byte.

    Raises:
        FileNotFoundError: where it has no log.
        OSError: where it can't be read.
    """
    path = path_of(run, attempt, rank)
    size = path.stat().st_size
    end = size if before is None else max(0, min(before, size))
    deadline = time.monotonic() + _SEARCH_SECONDS
    wanted, lines, at, matches, complete = search.casefold(), list[dict[str, Any]](), end, 0, True
    for offset, row in _backwards(path, end):
        at = offset
        text = row.decode(errors="replace")
        if not wanted or wanted in text.casefold():
            matches += bool(wanted)
            lines.append({"at": offset, "text": clean(text)})
        if len(lines) >= count:
            break
        if time.monotonic() > deadline or (not wanted and end - at > _READ):
            complete = False
            break
    return {
        "attempt": attempt, "rank": rank, "path": str(path), "bytes": size, "lines": lines[::-1], "before": at,
        "after": end, "matches": matches if wanted else None, "complete": complete,
    }  # fmt: skip


def _backwards(path: Path, end: int) -> Iterator[tuple[int, bytes]]:
    """Lines before a byte, the last first, each with where it begins; a very long one in parts.

    A log that has grown long is cut to nothing while it is read: what isn't there any more has no lines.
    """
    with path.open("rb") as file:
        tail, start, newest = b"", min(end, os.fstat(file.fileno()).st_size), True
        while start > 0:
            begin = max(0, start - _BLOCK)
            file.seek(begin)
            block = file.read(start - begin)
            if len(block) < start - begin:
                return
            data = block + tail
            rows, at = data.split(b"\n"), begin + len(data)
            if newest and not rows[-1]:  # `end` is right behind the end of a line
                rows.pop()
                at -= 1
            newest = False
            for row in reversed(rows[1:]):
                at -= len(row)
                yield at, row
                at -= 1
            tail, start = rows[0], begin
            if len(tail) > _BLOCK:
                yield start, tail
                tail = b""
        if tail:
            yield 0, tail


def search_all(run: RunPaths, attempt: int, search: str, count: int) -> dict[str, Any]:
    """Lines of all ranks' logs that hold a text, the newest of each rank, in the order of ranks.

    Raises:
        UserError: without a text.
    """
    if not search:
        raise UserError("rank=all needs a text to search for; add search=TEXT, or name one rank")
    folder = run.attempt(attempt).ranks
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".log" and path.stem.isdigit())
    except OSError:
        paths = []
    deadline = time.monotonic() + _SEARCH_SECONDS
    wanted, lines, looked = search.casefold(), list[dict[str, Any]](), 0
    for path in paths:
        if time.monotonic() > deadline or len(lines) >= count:
            break
        looked += 1
        matches = []
        with contextlib.suppress(FileNotFoundError):  # its attempt was removed meanwhile
            for offset, row in _backwards(path, sys.maxsize):
                text = row.decode(errors="replace")
                if wanted in text.casefold():
                    matches.append({"rank": int(path.stem), "at": offset, "text": clean(text)})
                if time.monotonic() > deadline or len(lines) + len(matches) >= count:
                    break
        lines += matches[::-1]
    return {
        "attempt": attempt, "rank": "all", "path": str(folder), "lines": lines[:count], "matches": len(lines),
        "looked": looked, "ranks": len(paths), "complete": looked == len(paths) and len(lines) < count,
    }  # fmt: skip


def stack(run: RunPaths, attempt: int, rank: int) -> dict[str, Any]:
    """A rank's stack and newest records, as they were kept before its end, or asked for."""
    evidence = run.attempt(attempt).evidence
    path = evidence / f"{rank:05d}.stack.txt"
    text, when, note = "", None, ""
    try:
        path = max(evidence.rglob(path.name), key=lambda p: p.stat().st_mtime, default=path)
        when = path.stat().st_mtime
        with path.open("rb") as file:
            text = file.read(_STACK).decode(errors="replace")
    except OSError:
        note = (
            "no stack of this rank was kept: it is written before ranks are stopped for a hang, and where somebody asks "
            "for it while the run is active"
        )
    records: list[dict[str, Any]] = []
    try:
        ring = from_json(path.with_name(f"{rank:05d}.ring.json").read_bytes())
        records = [dict(one) for one in ring[-_RECORDS:]]
    except (OSError, ValueError, TypeError):
        pass
    return {
        "attempt": attempt, "rank": rank, "time": when, "recorder": records, "note": note,
        "stack": "\n".join(clean(line) for line in text.split("\n")),
    }  # fmt: skip
