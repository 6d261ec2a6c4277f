"""Numbers, durations and tables as a person reads them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from faulttol.commands import terminal
from orchestrator.web.redact import Redactor


def count(number: float) -> str:
    """A number in three digits: 1.28 B, 12.3 M, 4.5 k, 678."""
    for unit, each in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * each:  # what rounds to 1000 of a unit is 1 of the next
            return f"{number / each:.3g} {unit}"
    return f"{number:.3g}"


size = terminal.size


def span(seconds: float | None) -> str:
    """A duration: 0:35, 12:07, 3:04:05, 2d 03:04."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def clock(seconds: float | None) -> str:
    """A local time of day with its date."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell, a line a row, without secrets; the columns in `right` are flush right."""
    return "\n".join(terminal.table([[clean(cell) for cell in row] for row in rows], right))


@cache
def _redactor() -> Redactor:
    return Redactor()


def plain(text: str) -> str:
    """Text in one line that moves nothing on a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def clean(text: str) -> str:
    """What a run has written, for a person: in one line, and without what looks like a secret."""
    return plain(_redactor().text(text))


def redacted(text: str) -> str:
    """Lines of a log without what looks like a secret."""
    return _redactor().text(text)


def shareable(tree: Any) -> Any:
    """What a run has written, for a program: without what looks like a secret; numbers that aren't finite are None."""
    return _redactor().tree(tree)


def indented(text: str) -> str:
    """Each line two columns to the right."""
    return "\n".join("  " + line for line in text.splitlines())


def plural(number: int, noun: str) -> str:
    """A number and its noun: 1 attempt, 2 attempts."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def short(path: str) -> str:
    """A path with the user's home folder as `~`, which a shell takes back."""
    home = str(Path.home())
    return "~" + path[len(home) :] if path.startswith(home + "/") else path
