"""What a person sees of a command: numbers in units, columns, and a progress bar that is there on a terminal only."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from faulttol.convert.job import Estimate

_EVERY = 0.1
"""Seconds between two pictures of a bar."""
_WIDTH = 24


def size(number: float) -> str:
    """Bytes: 3.2 GiB."""
    for unit, each in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= each:
            scaled = number / each
            return f"{scaled:.0f} {unit}" if scaled >= 999.5 else f"{scaled:.3g} {unit}"
    return f"{number:.0f} B"


def rate(number: float, seconds: float) -> str:
    """Bytes in a time: 1.7 GB/s."""
    return f"{number / seconds / 1e9:.2f} GB/s" if seconds > 0 else "-"


def plural(number: int, noun: str) -> str:
    """A number and its noun: 1 file, 2 files."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def axes(layout: dict[str, int]) -> str:
    """A layout without the axes that split nothing: `pp=2 ep=4`."""
    return " ".join(f"{axis}={n}" for axis, n in layout.items() if n > 1) or "one rank"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Columns as wide as their widest cell, a line a row; the columns in `right` are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        cells = [c.rjust(widths[i]) if i in right else c.ljust(widths[i]) for i, c in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return lines


def estimate(costs: Estimate) -> list[str]:
    """What a command would do, a line a number."""
    return [
        f"would read    {size(costs.bytes_read)}",
        f"would write   {size(costs.bytes_written)}",
        f"would move    {size(costs.bytes_moved)}",
        f"peak memory   {size(costs.peak_memory)}",
    ]


class ByteProgress:
    """Progress in bytes, rewritten in place; nothing where the stream is not a terminal.

    Args:
        what: is being done, in a word or two.
        now: seconds of a clock that only goes forward.
    """

    def __init__(self, stream: TextIO, what: str, now: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._what, self._now = stream, what, now
        self._shown = 0
        self._began = self._at = now()
        self._terminal = stream.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` bytes of `total` are done."""
        at = self._now()
        if not self._terminal or (at - self._at < _EVERY and done < total):
            return
        self._at, share, gone = at, done / total if total else 1.0, at - self._began
        full = round(share * _WIDTH)
        text = f"{self._what} {'█' * full}{'░' * (_WIDTH - full)} {share:4.0%} {size(done)} of {size(total)}"
        if gone > 0 and done:
            left = round(gone * (total - done) / done)
            text += f", {rate(done, gone)}, {left // 60}:{left % 60:02d} left"
        text = text[: shutil.get_terminal_size().columns - 1]
        self._stream.write("\r" + text.ljust(self._shown))
        self._stream.flush()
        self._shown = len(text)

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._stream.write("\r" + " " * self._shown + "\r")
            self._stream.flush()
