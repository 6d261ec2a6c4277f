"""The metric line: what rank 0 appends to an attempt's `metrics.jsonl`, and how the others read it.

One JSON object a line, however long: that of a model with many experts has hundreds of KB. Rank 0 is the only writer;
node agents, the console and the sinks read. What is torn, because its writer died in it, is stepped over and named in the
log; nothing here raises for it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from configs.errors import from_json

_log = logging.getLogger("megaray.metrics")
_LONGEST = 1 << 26
"""Bytes without an end of line that are still taken for one line."""
_PENDING = 1 << 23
"""Bytes that a writer keeps while its file takes none."""
_WAITS = (0.5, 2.0, 8.0)
"""Seconds before what is left at the end is tried again."""


@dataclass(frozen=True)
class StepLine:
    """One training step, reduced over all ranks."""

    kind: ClassVar[str] = "step"
    time: float
    """Seconds since the epoch."""
    attempt: int
    step: int
    """Steps finished, so the first line says 1."""
    loss: float
    """Mean cross-entropy per token, in nats, without the auxiliary loss."""
    aux_loss: float
    lr: float
    grad_norm: float
    """Global norm before clipping."""
    tokens: int
    """Tokens trained on so far, over all attempts, counting each step once."""
    tokens_per_second: float
    """Over all ranks, since the previous line, without the time of saves and evaluations between."""
    step_seconds: float
    """Mean per step since the previous line, likewise."""
    phase_seconds: dict[str, float]
    """Mean per step by phase (`data`, `forward`, `backward`, `optimizer`, …), the slowest rank's."""
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None where the device's peak is unknown."""
    expert_load: list[list[int]]
    """Tokens per expert, a list per MoE layer, over all ranks, of this step."""
    balance_entropy: float
    """Entropy of the load over log(experts), mean over the layers; 1 is even."""
    dropped: int
    """Token-expert pairs of this step that were dropped for want of capacity; 0 without `capacity_factor`."""
    memory_bytes: int
    """Largest over the ranks: device memory peak, or the process's peak resident set on a CPU."""
    skipped: int = 0
    """Steps of this attempt so far in which nothing moved, because the gradients weren't finite."""


@dataclass(frozen=True)
class EvaluatedLine:
    """The loss on held-out documents."""

    kind: ClassVar[str] = "evaluated"
    time: float
    attempt: int
    step: int
    loss: float
    """Mean cross-entropy per token, in nats."""
    samples: int
    seconds: float
    """That training stood still for it."""


@dataclass(frozen=True)
class SavedLine:
    """A checkpoint was committed."""

    kind: ClassVar[str] = "saved"
    time: float
    attempt: int
    step: int
    path: str
    bytes: int
    """Over all ranks."""
    seconds: float
    """From the call to the commit; training continued meanwhile."""
    held: float = 0.0
    """Seconds that training stood still for it, the slowest rank's."""
    tier: str = "store"
    """`store`, or `memory` for a snapshot in the memory of nodes."""
    due: int | None = None
    """Step at which the next one is due; None where that is `checkpoint.every` steps later."""
    differs: str = ""
    """Which ranks' copies of the state weren't equal, and were saved under `checkpoint.compare=warn`; empty for none."""


@dataclass(frozen=True)
class SaveFailedLine:
    """A save was not committed, or was left out; training continued."""

    kind: ClassVar[str] = "save_failed"
    time: float
    attempt: int
    step: int
    error: str
    """Why, with the rank."""
    in_a_row: int
    """Saves that failed since the last commit, this one included; 0 where it was only left out."""

    @property
    def words(self) -> str:
        """What happened, for whoever reads the run's output."""
        what = f"step {self.step} was not saved"
        if self.in_a_row:
            what = f"the save of step {self.step} failed, {self.in_a_row} in a row"
        return f"{what}: {self.error}"


@dataclass(frozen=True)
class ResumedLine:
    """An attempt began: from step 0, or from a checkpoint."""

    kind: ClassVar[str] = "resumed"
    time: float
    attempt: int
    step: int
    path: str | None
    """What was loaded; None where nothing was."""
    mfu_basis: str
    """Numerator, peak and precision of `mfu`, or why there is none."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Versions, device name, threads, corpus size."""

    @property
    def passed(self) -> str:
        """Why newer checkpoints were passed over; empty where the newest was loaded."""
        return "; ".join(map(str, self.facts.get("passed", ())))


@dataclass(frozen=True)
class MeasuredLine:
    """One case of a measurement of the fabric is finished."""

    kind: ClassVar[str] = "measured"
    time: float
    attempt: int
    step: int
    """Cases finished."""
    steps: int
    """Cases in all."""
    case: dict[str, Any]
    """What was measured: `op`, `group`, `ranks`, `size` in bytes, `dtype`, `redop`, …"""
    result: dict[str, Any]
    """`time_us`, `alg_bw` and `bus_bw` in GB/s, `wrong`, …; empty where `note` says why there is none."""
    note: str = ""

    @property
    def text(self) -> str:
        """For a person, in one line."""
        named = ("study", "probe", "routing", "op", "group", "dtype", "redop")
        parts = [
            f"case {self.step}/{self.steps}",
            " ".join(str(self.case[n]) for n in named if n in self.case),
        ]
        if "size" in self.case:
            parts.append(f"{self.case['size']} B")
        if "time_us" in self.result:
            parts += [f"{self.result['time_us']:.4g} us", f"busbw {self.result['bus_bw']:.4g} GB/s"]
        return " | ".join([*parts, *([self.note] if self.note else [])])


@dataclass(frozen=True)
class FindingLine:
    """A measurement found something slow or wrong."""

    kind: ClassVar[str] = "finding"
    time: float
    attempt: int
    finding: dict[str, Any]
    """As `collectives.analysis.judge.BandwidthFinding` writes itself."""


@dataclass(frozen=True)
class EndedLine:
    """All steps of a training run, or all cases of a measurement, are done."""

    kind: ClassVar[str] = "ended"
    time: float
    attempt: int
    step: int
    loss: float | None
    """Of the last step; None where nothing was trained."""
    tokens: int


@dataclass(frozen=True)
class StoppedLine:
    """The ranks were asked to stop by SIGTERM, and have finished their step."""

    kind: ClassVar[str] = "stopped"
    time: float
    attempt: int
    step: int
    """Steps finished."""
    saved: bool
    """Whether the state behind it was committed."""


MetricLine = (
    StepLine
    | EvaluatedLine
    | SavedLine
    | SaveFailedLine
    | ResumedLine
    | MeasuredLine
    | FindingLine
    | EndedLine
    | StoppedLine
)
_KINDS: dict[str, type[MetricLine]] = {
    c.kind: c
    for c in (
        StepLine, EvaluatedLine, SavedLine, SaveFailedLine, ResumedLine, MeasuredLine, FindingLine, EndedLine,
        StoppedLine,
    )
}  # fmt: skip


class MetricWriter:
    """Appends metric lines to one file, each whole before the next.

    Where the file takes nothing for a while, as on a full disk, lines wait in memory and training continues.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._pending = bytearray()
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            self._pending += b"\n"  # an earlier writer died in a line

    def write(self, line: MetricLine) -> None:
        """Append one line.

        Raises:
            OSError: where the file has taken nothing for so long that too much waits.
        """
        self._pending += (json.dumps({"kind": line.kind, **asdict(line)}) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            if len(self._pending) > _PENDING:
                raise
            _log.warning("%s takes no lines: %s; %d bytes wait", self._path, error, len(self._pending))

    def _flush(self) -> None:
        while self._pending:
            written = os.write(self._fd, self._pending)  # may take a part
            del self._pending[:written]

    def close(self) -> None:
        """Write what still waits, and close the file.

        Raises:
            OSError: where it takes nothing after some tries.
        """
        for wait in (*_WAITS, None):
            try:
                self._flush()
                break
            except OSError:
                if wait is None:
                    raise
                time.sleep(wait)
        os.close(self._fd)


def parse_line(text: str | bytes) -> MetricLine:
    """One line of `metrics.jsonl`.

    Raises:
        ValueError: where it isn't one.
    """
    tree = from_json(text)
    try:
        return _KINDS[tree.pop("kind")](**tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a metric line: {error}") from error


def read_from(path: Path, offset: int, limit: int = 1 << 20) -> tuple[list[MetricLine], int]:
    """Whole lines of `path` from byte `offset` on, at most about `limit` bytes or one line, and the offset after them.

    A missing file has no lines. A torn last line stays for the next call; one in the middle is stepped over and named in
    the log.

    Raises:
        OSError: where the file can't be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(limit)
            while b"\n" not in data and len(data) < _LONGEST and (more := file.read(max(limit, len(data)))):
                data += more
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    if not end and len(data) >= _LONGEST:
        _log.warning("%s has no line in %d bytes from byte %d; stepped over", path, len(data), offset)
        return [], offset + len(data)
    return list(_parsed(path, offset, data[:end])), offset + end


def _parsed(path: Path, offset: int, data: bytes) -> Iterator[MetricLine]:
    for row in data.split(b"\n"):
        if row.strip():
            try:
                yield parse_line(row)
            except ValueError as error:
                _log.warning("%s, byte %d: stepped over a line: %s", path, offset, error)
        offset += len(row) + 1


def read_all(path: Path) -> Iterator[MetricLine]:
    """All whole lines of `path`, a part of the file at a time."""
    offset, end = -1, 0
    while offset != end:
        offset = end
        lines, end = read_from(path, offset)
        yield from lines


def last_step(path: Path, window: int = 1 << 17) -> StepLine | MeasuredLine | None:
    """The newest line of `path` that says how far its run is; reads the last `window` bytes, or more where it must."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            data, start = b"", size
            while start:
                begin = max(0, start - max(window, size - start))
                file.seek(begin)
                data, start = file.read(start - begin) + data, begin
                whole = data if not start else data.partition(b"\n")[2]
                line = _newest(whole)
                if line is not None or size - start > _LONGEST:
                    return line
    except FileNotFoundError:
        pass
    return None


def _newest(data: bytes) -> StepLine | MeasuredLine | None:
    """The last line in `data` that says a step; what follows the last end of line is torn."""
    for row in reversed(data.split(b"\n")[:-1]):
        try:
            line = parse_line(row) if row.strip() else None
        except ValueError:
            continue
        if isinstance(line, StepLine | MeasuredLine):
            return line
    return None
