"""Metric lines as rows of a tracker: plain names and numbers. Pure."""

from __future__ import annotations

import json
from typing import Any

from configs.metrics import MeasuredLine, ResumedLine, SavedLine, SaveFailedLine, StepLine

MAX_EXPERT_SERIES = 64
"""Experts per layer that get a series of their own; beyond it only the layer's spread and its histogram are logged."""
MAX_BINS = 512
"""Bins of a histogram, as W&B has it; more experts share them."""
HISTOGRAMS = 1000
"""Histograms of each layer over a run, about."""
_GIB = 1 << 30


def row_of(line: StepLine) -> dict[str, Any]:
    """A step line as a row."""
    plain = ("step", "attempt", "loss", "aux_loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds",
             "balance_entropy", "dropped", "skipped")  # fmt: skip
    row: dict[str, Any] = {f"train/{name}": getattr(line, name) for name in plain}
    row |= {"train/lost": 0, "train/memory_gib": line.memory_bytes / _GIB}
    if line.mfu is not None:
        row["train/mfu"] = line.mfu
    row |= {f"phase/{name}": seconds for name, seconds in line.phase_seconds.items()}
    for layer, load in enumerate(line.expert_load):
        mean = sum(load) / len(load) or 1.0
        row[f"experts/layer{layer:02d}/max_over_mean"] = max(load) / mean
        row[f"experts/layer{layer:02d}/min_over_mean"] = min(load) / mean
        if len(load) <= MAX_EXPERT_SERIES:
            row |= {f"experts/layer{layer:02d}/expert{i:03d}": n for i, n in enumerate(load)}
    return row


def histograms(line: StepLine, steps: int) -> dict[str, tuple[list[int], list[float]]]:
    """Each layer's load as (tokens by bin, edges of the bins in experts); empty for most lines of a long run.

    W&B draws them over steps as a heat map.

    Args:
        line: the step.
        steps: of the run, by which lines are left out.
    """
    if line.step % max(1, steps // HISTOGRAMS):
        return {}
    made = {}
    for layer, load in enumerate(line.expert_load):
        joined = -(-len(load) // MAX_BINS)
        bins = [sum(load[at : at + joined]) for at in range(0, len(load), joined)]
        edges = [float(min(i * joined, len(load))) for i in range(len(bins) + 1)]
        made[f"experts/layer{layer:02d}/load"] = bins, edges
    return made


def save_row(line: SavedLine | SaveFailedLine) -> dict[str, Any]:
    """A save as a row: `checkpoint/*` in storage, `memory/*` in the memory of nodes; `failed` counts those in a row."""
    if isinstance(line, SaveFailedLine):
        return {"train/step": line.step, "checkpoint/failed": line.in_a_row, "checkpoint/error": line.error}
    family = "checkpoint" if line.tier == "store" else line.tier
    row = {"train/step": line.step, f"{family}/held": line.held, f"{family}/seconds": line.seconds}
    row |= {f"{family}/bytes": line.bytes}
    if line.tier == "store":
        row |= {"checkpoint/failed": 0, "checkpoint/copies_differ": int(bool(line.differs))}
    return row


def rewind_row(line: ResumedLine) -> dict[str, Any]:
    """The beginning of an attempt, at the step that it continues from."""
    return {"train/step": line.step, "train/attempt": line.attempt, "train/rewind_to": line.step}


def series_name(line: MeasuredLine) -> str:
    """Operation, group and type of a case."""
    return ".".join(str(line.case[name]) for name in ("op", "group", "dtype"))


def measured_row(line: MeasuredLine) -> dict[str, Any]:
    """A case of a sweep as a row, over its size."""
    name, result = f"collectives/{series_name(line)}", line.result
    figures = ("time_us", "p99_us", "alg_bw", "bus_bw", "wrong")
    row = {f"{name}/{figure}": result[figure] for figure in figures if result.get(figure) is not None}
    return row | {"collectives/size": line.case["size"], "collectives/case": line.step}


def cell(value: Any) -> Any:
    """A value that a table takes: numbers and text as they are, the rest as JSON."""
    return value if value is None or isinstance(value, int | float | str) else json.dumps(value, default=str)
