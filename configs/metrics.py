"""The metric line: what rank 0 appends to an attempt's `metrics.jsonl`, and how the others read it.

One JSON object a line. Rank 0 is the only writer; node agents, the console and the sinks read. Lines are
written whole by one `write` on an append-mode file, so a reader sees at most one torn line, the last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar


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
    """From the call to the commit; training went on meanwhile."""
    held: float = 0.0
    """Seconds that training stood still for it, the slowest rank's."""
    tier: str = "store"
    """`store`, or `memory` for a snapshot in the memory of nodes."""
    due: int | None = None
    """Step at which the next one is due; None where that is `checkpoint.every` steps later."""


@dataclass(frozen=True)
class SaveFailedLine:
    """A save was not committed, or was left out; training went on."""

    kind: ClassVar[str] = "save_failed"
    time: float
    attempt: int
    step: int
    error: str
    """Why, with the rank."""
    in_a_row: int
    """Saves that failed since the last commit, this one included; 0 where it was only left out."""


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
    """As `collectives.judge.Finding` writes itself."""


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


MetricLine = (
    StepLine
    | EvaluatedLine
    | SavedLine
    | SaveFailedLine
    | ResumedLine
    | MeasuredLine
    | FindingLine
    | EndedLine
)
_KINDS: dict[str, type[MetricLine]] = {
    c.kind: c
    for c in (
        StepLine, EvaluatedLine, SavedLine, SaveFailedLine, ResumedLine, MeasuredLine, FindingLine, EndedLine,
    )
}  # fmt: skip


class MetricWriter:
    """Appends metric lines to one file; each line reaches the kernel whole before `write` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, line: MetricLine) -> None:
        """Append one line."""
        os.write(self._fd, (json.dumps({"kind": line.kind, **asdict(line)}) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def parse_line(text: str | bytes) -> MetricLine:
    """One line of `metrics.jsonl`.

    Raises:
        ValueError: where it isn't one.
    """
    tree = json.loads(text)
    try:
        return _KINDS[tree.pop("kind")](**tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a metric line: {error}") from error


def read_from(path: Path, offset: int, limit: int = 1 << 20) -> tuple[list[MetricLine], int]:
    """Whole lines of `path` from byte `offset` on, at most about `limit` bytes, and the offset after them.

    A missing file has no lines. A torn last line stays for the next call.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(limit)
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    return [parse_line(row) for row in data[:end].splitlines() if row.strip()], offset + end


def read_all(path: Path) -> Iterator[MetricLine]:
    """All whole lines of `path`, a part of the file at a time."""
    offset, end = -1, 0
    while offset != end:
        offset = end
        lines, end = read_from(path, offset)
        yield from lines


def last_step(path: Path, window: int = 1 << 17) -> StepLine | MeasuredLine | None:
    """The newest line of `path` that says how far its run is, read from its last `window` bytes."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    for line in reversed(list(_tail(path, max(0, size - window)))):
        if isinstance(line, StepLine | MeasuredLine):
            return line
    return None


def _tail(path: Path, offset: int) -> Iterator[MetricLine]:
    with path.open("rb") as file:
        file.seek(offset)
        if offset:
            file.readline()  # the rest of a line that began before the window
        for row in file:
            if row.endswith(b"\n"):
                yield parse_line(row)
