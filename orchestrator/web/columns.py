"""The metric lines of one attempt as columns, read as they are written, in bounded memory.

A line's expert loads, which are most of its bytes, are left in the file: its place is kept, and they are read where
somebody looks at them. Where there are more lines than `most`, neighbours of the older part are joined: the seconds of
their steps are added up, so that the ledger stays exact, and of the other values those with the larger gradient norm
stay, so that spikes are still seen.
"""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import from_json
from configs.metrics import (
    EndedLine,
    EvaluatedLine,
    FindingLine,
    MeasuredLine,
    MetricLine,
    ResumedLine,
    SavedLine,
    SaveFailedLine,
    StepLine,
    StoppedLine,
    parse_line,
)
from orchestrator.record.ledger import AttemptLines

SCALARS = (
    "loss", "aux_loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "mfu", "memory_bytes", "balance_entropy",
    "dropped", "skipped",
)  # fmt: skip
MAX_ROWS_VIEWED = 150_000
"""Lines kept of an attempt that somebody looks at."""
MAX_ROWS_BACKGROUND = 4_000
"""Lines kept of another one."""
_PHASES = 16
_CHUNK = 1 << 18
_LONGEST = 1 << 26
"""Bytes without an end of line that are still taken for one line."""
_KEPT_SAVES = 2_000
_LOADS, _AFTER = b'"expert_load": [', b'"balance_entropy"'
_PLACES = np.dtype(
    [("time", "f8"), ("tokens", "f8"), ("at", "i8"), ("step", "i4"), ("size", "i4"), ("busy", "f4")]
)


class MetricColumns:
    """Lines of one file.

    Args:
        path: the attempt's metric lines.
        most: step lines kept.
    """

    def __init__(self, path: Path, most: int = MAX_ROWS_VIEWED) -> None:
        self.path, self.most = path, max(64, most)
        self._reset()

    def _reset(self) -> None:
        self.offset = self.size = self.rows = self.damaged = 0
        self.phases: list[str] = []
        self.places = np.empty(256, dtype=_PLACES)
        """Time, tokens, step of each row, seconds that its steps took, and where its line lies in the file."""
        self.values = np.empty((256, len(SCALARS)), dtype=np.float32)
        """Rows by `SCALARS` and then `phases`; NaN where there is none."""
        self.resumed: ResumedLine | None = None
        self.ended: EndedLine | StoppedLine | None = None
        self.newest: StepLine | None = None
        """Without its expert loads."""
        self.measured: MeasuredLine | None = None
        self.saves: deque[SavedLine | SaveFailedLine] = deque(maxlen=_KEPT_SAVES)
        self.saves_seen = self.commits = self.differing = 0
        self.saved: SavedLine | None = None
        """The newest commit in storage."""
        self.held: list[tuple[float, float]] = []
        self.evaluated: list[EvaluatedLine] = []
        self.nonfinite: deque[tuple[int, str]] = deque(maxlen=100)
        self.steps_done = self.lines = 0

    @property
    def joined(self) -> bool:
        """Some rows stand for more than one line."""
        return self.lines > self.rows

    @property
    def indexed(self) -> float:
        """Part of the file that was read."""
        return 1.0 if self.offset >= self.size else self.offset / self.size

    @property
    def names(self) -> list[str]:
        """Of the columns of `values`."""
        return [*SCALARS, *(f"phase.{name}" for name in self.phases)]

    def update(self, deadline: float = math.inf) -> bool:
        """Read what is new, until `deadline` of `time.monotonic()`; whether all of it was read.

        Raises:
            OSError: where the file can't be read.
        """
        try:
            self.size = self.path.stat().st_size
        except FileNotFoundError:
            return True
        if self.size < self.offset:  # another file
            self._reset()
            return self.update(deadline)
        while self.offset < self.size:
            if not self._chunk():
                return True  # the last line has no end yet
            if time.monotonic() > deadline:
                return self.offset >= self.size
        return True

    def _chunk(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(_CHUNK)
            while b"\n" not in data and len(data) < _LONGEST and (more := file.read(_CHUNK)):
                data += more
        end = data.rfind(b"\n") + 1
        if not end:
            if len(data) >= _LONGEST:
                self.damaged, self.offset = self.damaged + 1, self.offset + len(data)
                return True
            return False
        at, places, values = self.offset, list[tuple[Any, ...]](), list[list[float]]()
        for row in data[:end].split(b"\n")[:-1]:
            try:
                self._line(row, at, places, values)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                self.damaged += bool(row.strip())
            at += len(row) + 1
        self._extend(places, values)
        self.offset += end
        return True

    def _line(self, row: bytes, at: int, places: list[tuple[Any, ...]], values: list[list[float]]) -> None:
        if row.startswith(b'{"kind": "step"'):
            begin = row.find(_LOADS)
            after = row.find(_AFTER, begin) if begin > 0 else -1
            cut = row[:begin] + b'"expert_load": [], ' + row[after:] if after > 0 else row
            line: MetricLine | None = parse_line(cut)
        else:
            line = parse_line(row) if row.strip() else None
        if not isinstance(line, StepLine):
            self._other(line)
            return
        before = self.newest.step if self.newest else (self.resumed.step if self.resumed else line.step - 1)
        count = max(1, line.step - before)
        self.steps_done += count
        self.newest = line
        self.ended = None
        for name in line.phase_seconds:
            if name not in self.phases and len(self.phases) < _PHASES:
                self.phases.append(name)
        for name in ("loss", "grad_norm", "aux_loss"):
            if not math.isfinite(getattr(line, name)):
                self.nonfinite.append((line.step, name))
        # A torn file may go back: a line that isn't newer is not a row of its own.
        places.append((line.time, line.tokens, at, line.step, len(row), count * line.step_seconds))
        values.append(
            [
                *(math.nan if (value := getattr(line, name)) is None else value for name in SCALARS),
                *(line.phase_seconds.get(name, math.nan) for name in self.phases),
            ]
        )

    def _other(self, line: MetricLine | None) -> None:
        match line:
            case ResumedLine():
                self.resumed = line
            case SavedLine() | SaveFailedLine():
                self.saves.append(line)
                self.saves_seen += 1
                if isinstance(line, SavedLine) and line.tier == "store":
                    self.saved, self.commits = line, self.commits + 1
                    self.differing += bool(line.differs)
                if isinstance(line, SavedLine) and line.held > 0:
                    self.held.append((line.time - line.seconds, line.held))
            case EvaluatedLine():
                self.evaluated.append(line)
            case MeasuredLine():
                self._measured(line)
            case EndedLine() | StoppedLine():
                self.ended = line
            case FindingLine() | None:
                pass

    def _measured(self, line: MeasuredLine) -> None:
        """A case of a measurement is a row too: its time is work that counts."""
        self.measured = line
        self.steps_done += 1
        row = [math.nan] * (len(SCALARS) + len(self.phases))
        gap = line.time - (float(self.places["time"][self.rows - 1]) if self.rows else line.time)
        self._extend([(line.time, 0, -1, line.step, 0, max(0.0, gap))], [row])

    def _extend(self, places: list[tuple[Any, ...]], values: list[list[float]]) -> None:
        if not places:
            return
        width = len(SCALARS) + len(self.phases)
        fresh = np.full((len(values), width), np.nan, dtype=np.float32)
        with np.errstate(over="ignore"):  # a loss that has diverged is infinite here
            for i, row in enumerate(values):
                fresh[i, : len(row)] = row
        if self.values.shape[1] < width:
            wider = np.full((len(self.values), width), np.nan, dtype=np.float32)
            wider[:, : self.values.shape[1]] = self.values
            self.values = wider
        rows = self.rows + len(places)
        if rows > len(self.places):
            room = int(rows * 1.25) + 64
            self.places = np.concatenate(
                [self.places[: self.rows], np.empty(room - self.rows, dtype=_PLACES)]
            )
            grown = np.full((room, width), np.nan, dtype=np.float32)
            grown[: self.rows] = self.values[: self.rows]
            self.values = grown
        self.places[self.rows : rows] = np.array(places, dtype=_PLACES)
        self.values[self.rows : rows] = fresh
        self.rows = rows
        self.lines += len(places)
        self.limit_rows(self.most)

    def limit_rows(self, most: int) -> None:
        """Hold at most so many rows from now on."""
        self.most = max(64, most)
        while self.rows > self.most:
            self._downsample()

    def _downsample(self) -> None:
        """Join neighbours of the older three quarters."""
        half = self.rows * 3 // 4 // 2 * 2
        places, values = self.places[:half].reshape(-1, 2), self.values[:half]
        norm = values[:, SCALARS.index("grad_norm")].reshape(-1, 2)
        norm = np.where(np.isfinite(norm), norm, np.inf)
        chosen = np.arange(half // 2) * 2 + (norm[:, 1] >= norm[:, 0])
        joined = places[:, 1].copy()
        joined["busy"] = places["busy"].sum(axis=1)
        self.places = np.concatenate([joined, self.places[half : self.rows]])
        self.values = np.concatenate([values[chosen], self.values[half : self.rows]])
        self.rows = len(self.places)

    def column(self, name: str) -> NDArray[Any]:
        """One column of all rows; NaN where a line lacks it.

        Raises:
            KeyError: where no line has it.
        """
        if name in ("time", "tokens", "step", "busy"):
            return self.places[name][: self.rows]
        names = self.names
        if name not in names:
            raise KeyError(name)
        index = names.index(name)
        if index >= self.values.shape[1]:
            return np.full(self.rows, np.nan, dtype=np.float32)
        return self.values[: self.rows, index]

    def trace(self) -> AttemptLines:
        """As the ledger takes it. A line that isn't newer than the one before is left out."""
        step = self.places["step"][: self.rows].astype(np.int64)
        fresh = (
            np.append(True, step[1:] > np.maximum.accumulate(step)[:-1]) if self.rows else np.empty(0, bool)
        )
        resumed = self.resumed
        return AttemptLines(
            time=self.places["time"][: self.rows][fresh],
            step=step[fresh],
            busy=self.places["busy"][: self.rows][fresh].astype(np.float64),
            saves=self.held,
            evaluations=[(line.time - line.seconds, line.seconds) for line in self.evaluated],
            resumed=resumed.time if resumed else None,
            begin=resumed.step if resumed else None,
            ended=self.ended.time if self.ended else None,
        )

    def line_bytes(self, row: int) -> bytes:
        """The whole line of a row, from the file; empty where it isn't there.

        Raises:
            OSError: where the file can't be read.
        """
        place = self.places[row]
        if place["at"] < 0:
            return b""
        with self.path.open("rb") as file:
            file.seek(int(place["at"]))
            return file.read(int(place["size"]))

    @property
    def bytes(self) -> int:
        """Memory of the columns."""
        return self.places.nbytes + self.values.nbytes


def expert_loads(row: bytes) -> list[list[int]]:
    """Expert loads of a step line, a list per MoE layer; none where there are none."""
    begin = row.find(_LOADS)
    after = row.find(_AFTER, begin) if begin > 0 else -1
    if after < 0:
        return list(from_json(row).get("expert_load", [])) if row else []
    text = row[begin + len(_LOADS) - 1 : after].rstrip(b", ")
    return [list(map(int, layer)) for layer in from_json(text)]
