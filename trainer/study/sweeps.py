"""Collectives alone: all-reduce over size on nodes of eight, and MSCCL++'s baselines (allreduce_sweeps.csv,
mscclpp_baselines.csv).

Both against `trainer.sizing.time.fabric` from the catalogue, whose start-ups and shares inside a node were fitted to the
first table: its rows calibrate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from trainer.sizing.time.fabric import RankGroup
from trainer.study import metrics, published
from trainer.study.cases import Row, number, whole

SWEEP_COLUMNS = ("size_bytes", "h100x8_nccl_us")
BASELINE_COLUMNS = ("system", "op", "kernel", "size_bytes", "time_us")
_DEVICES = {"h100x8_nccl_us": "h100", "mi300x8_rccl_us": "mi300x", "mi300x8_rccl_graph_us": "mi300x"}
_OPS = {op.replace("_", ""): op for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")}
_LARGE = 2**20
"""Bytes from which on MSCCL++ moves what NCCL moves; below, it has kernels that NCCL lacks."""


@dataclass
class CollectiveScore:
    """Predicted and measured seconds of one table's calls."""

    table: str
    predicted: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)
    lines: set[int] = field(default_factory=set)
    """Of rows with a prediction."""
    calibrates: bool = False
    skipped: dict[str, list[int]] = field(default_factory=dict)
    """Lines of rows without one, by reason."""

    @property
    def errors(self) -> metrics.Errors | None:
        """How far the predictions are off."""
        return metrics.errors(self.predicted, self.measured)


def collectives(rows: Sequence[Row], table: str) -> CollectiveScore:
    """A table's calls, of either kind."""
    sweep = "size_bytes" in rows[0] and "op" not in rows[0]
    made = CollectiveScore(table, calibrates=sweep)
    for line, row in enumerate(rows, start=2):
        for call in _sweep(row) if sweep else (_baseline(row),):
            if isinstance(call, str):
                made.skipped.setdefault(call, []).append(line)
            else:
                made.lines.add(line)
                made.predicted.append(call[0])
                made.measured.append(call[1])
    return made


def _sweep(row: Row) -> Iterator[tuple[float, float] | str]:
    size = number(row, "size_bytes") or 0.0
    for column, device in _DEVICES.items():
        measured = number(row, column)
        if measured:
            yield _call(device, "all_reduce", size, RankGroup(8), measured)


def _baseline(row: Row) -> tuple[float, float] | str:
    ranks, each, size, op = (
        whole(row, "ranks"), whole(row, "ranks_per_node"), number(row, "size_bytes"), _OPS.get(row["op"])
    )  # fmt: skip
    measured = number(row, "time_us")
    if not (ranks and each and size and measured):
        return "ranks, size or time not printed"
    if op is None:
        return f"{row['op']} isn't one of {', '.join(_OPS)}"
    if size < _LARGE:
        return "below 1 MiB MSCCL++ has kernels that NCCL lacks, and no constants of theirs are on record"
    return _call(row["system"], op, size, RankGroup(ranks, max(1, ranks // each)), measured)


def _call(device: str, op: str, size: float, group: RankGroup, measured: float) -> tuple[float, float] | str:
    machine = published.rates(device)
    if isinstance(machine, str):
        return machine
    seconds = machine.fabric.seconds(op, size, group)
    return f"{device} has no links on record" if math.isnan(seconds) else (seconds, measured / 1e6)
