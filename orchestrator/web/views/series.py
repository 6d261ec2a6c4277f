"""A run's metric lines as curves, and its expert loads as a map: few enough points to draw, with nothing hidden between."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, nearest
from orchestrator.record import ledger
from orchestrator.web.cached_run import CachedRun
from orchestrator.web.columns import MetricColumns, expert_loads
from orchestrator.web.redact import numbers

AXES = ("step", "time")
_VALIDATIONS = 4000


def names_of(state: CachedRun) -> list[str]:
    """Names of all curves of a run."""
    names: dict[str, None] = {}
    for columns in state.columns.values():
        names |= dict.fromkeys(columns.names)
    first = [name for name in names if not name.startswith("phase.")]
    return (
        [*first[:1], "tokens", *first[1:], *(name for name in names if name.startswith("phase."))]
        if names
        else []
    )


def series(
    state: CachedRun, names: list[str], axis: str, begin: float, end: float, points: int
) -> dict[str, Any]:
    """Curves, one segment per attempt and per kept or lost part of it.

    Args:
        state: the run; its lock is held here.
        names: of `names_of`; empty: all.
        axis: of `AXES`.
        begin: on the axis, included.
        end: likewise.
        points: over all segments.

    Raises:
        UserError: for a name or an axis that isn't known.
    """
    known = names_of(state)
    if axis not in AXES:
        raise UserError(f"axis='{axis[:40]}' is none; use step or time")
    for name in names:
        if name not in known and name != "validation_loss" and known:
            raise UserError(
                f"names: '{name[:80]}' is not a curve of this run{nearest(name, known)}; it has {', '.join(known)}"
            )
    wanted = [name for name in names or known if name in known]
    pieces = _pieces(state, axis, begin, end)
    total = sum(len(rows) for _, _, _, rows in pieces)
    segments = []
    for number, columns, lost, rows in pieces:
        share = max(2, round(points * len(rows) / total)) if total > points else len(rows)
        segments.append({"attempt": number, "lost": lost} | _segment(columns, rows, wanted, share))
    steps = [int(s) for segment in segments for s in (segment["step"][0], segment["step"][-1])]
    return {
        "axis": axis,
        "names": wanted,
        "first": min(steps, default=None),
        "last": max(steps, default=None),
        "segments": segments,
        "validation": _validation(state, axis, begin, end),
        "nonfinite": [
            {"attempt": number, "step": step, "name": name}
            for number, columns in state.columns.items()
            for step, name in columns.nonfinite
        ],
    }


def lost_after(state: CachedRun) -> dict[int, int]:
    """By attempt, the step after which a later attempt trained its steps again."""
    resumed = {number: columns.resumed for number, columns in state.columns.items()}
    return ledger.lost_after({number: line.step if line else None for number, line in resumed.items()})


def _pieces(
    state: CachedRun, axis: str, begin: float, end: float
) -> list[tuple[int, MetricColumns, bool, NDArray[np.int64]]]:
    """Attempt, its columns, whether lost, and the rows between `begin` and `end`."""
    after, pieces = lost_after(state), []
    for number in sorted(state.columns):
        columns = state.columns[number]
        step, place = columns.column("step"), columns.column(axis)
        rows = np.flatnonzero((place >= begin) & (place <= end))
        lost = step[rows] > after[number] if number in after else np.zeros(len(rows), dtype=bool)
        pieces += [(number, columns, kind, rows[lost == kind]) for kind in (False, True)]
    return [one for one in pieces if len(one[3])]


def _segment(
    columns: MetricColumns, rows: NDArray[np.int64], names: list[str], points: int
) -> dict[str, Any]:
    edges = np.unique(np.linspace(0, len(rows), min(points, len(rows)) + 1).astype(np.int64))
    counts, last = np.diff(edges), rows[edges[1:] - 1]
    made: dict[str, dict[str, list[Any]]] = {}
    single = bool((counts == 1).all())
    for name in names:
        try:
            values = columns.column(name)[rows].astype(np.float64)
        except KeyError:
            values = np.full(len(rows), np.nan)
        if single:
            made[name] = {"mean": numbers(values)}
            continue
        fine = np.isfinite(values)
        clean, begins = np.where(fine, values, 0.0), edges[:-1]
        seen = np.add.reduceat(fine.astype(np.int64), begins)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.add.reduceat(clean, begins) / seen
        low = np.minimum.reduceat(np.where(fine, values, np.inf), begins)
        high = np.maximum.reduceat(np.where(fine, values, -np.inf), begins)
        made[name] = {"mean": numbers(mean), "min": numbers(low), "max": numbers(high)}
    return {
        "step": columns.column("step")[last].tolist(),
        "time": np.round(columns.column("time")[last], 3).tolist(),
        "rows": counts.tolist(),
        "series": made,
    }


def _validation(state: CachedRun, axis: str, begin: float, end: float) -> dict[str, Any]:
    lines = [line for n in sorted(state.columns) for line in state.columns[n].evaluated]
    lines = [line for line in lines if begin <= getattr(line, axis) <= end][-_VALIDATIONS:]
    return {
        "step": [line.step for line in lines],
        "time": [line.time for line in lines],
        "attempt": [line.attempt for line in lines],
        "loss": numbers([line.loss for line in lines]) if lines else [],
    }


class ExpertLoads:
    """Expert loads of a run, read from its metric lines where somebody looks, the newest of them kept."""

    def __init__(self, kept: int = 512) -> None:
        self._kept = kept
        self._known: dict[tuple[str, int, int], NDArray[np.uint32]] = {}
        self._lock = threading.Lock()
        """Of `_known`: several runs may be looked at at once."""

    def _of(self, run: str, number: int, columns: MetricColumns, row: int) -> NDArray[np.uint32]:
        key = (run, number, int(columns.places["at"][row]))
        with self._lock:
            matrix = self._known.pop(key, None)
        if matrix is None:
            matrix = _matrix(columns.line_bytes(row))
        with self._lock:
            while len(self._known) >= self._kept:
                self._known.pop(next(iter(self._known)))
            self._known[key] = matrix
        return matrix

    def map(
        self, state: CachedRun, layer: int | None, begin: float, end: float, count: int
    ) -> dict[str, Any]:
        """Load over the mean, by layer (its largest) or by expert of one layer, over steps.

        Args:
            state: the run.
            layer: from 0; None: all.
            begin: first step.
            end: last step.
            count: columns at most.

        Raises:
            UserError: for a layer that isn't there.
            OSError: where the lines can't be read.
        """
        with state.lock:
            pieces = [one for one in _pieces(state, "step", begin, end) if not one[2]]
        chosen = [(number, columns, int(row)) for number, columns, _, rows in pieces for row in rows]
        sampled = len(chosen) > count
        if sampled:
            chosen = [chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, count).astype(int))]
        drawn: list[tuple[dict[str, Any], NDArray[np.uint32]]] = []
        for number, columns, row in chosen:
            with state.lock:  # rows are joined, and a file may be made anew, while others are read
                if row < columns.rows:
                    facts = {
                        "step": int(columns.places["step"][row]), "attempt": number,
                        "dropped": _whole(columns, "dropped", row),
                        "balance_entropy": _whole(columns, "balance_entropy", row),
                    }  # fmt: skip
                    matrix = self._of(state.run.run_id, number, columns, row)
                    if matrix.size:
                        drawn.append((facts, matrix))
        layers = max((len(m) for *_, m in drawn), default=0)
        if layer is not None and layers and not 0 <= layer < layers:
            raise UserError(f"layer={layer} is none of this run's {layers} MoE layers, which count from 0")
        values = [_column(matrix, layer, layers) for *_, matrix in drawn]
        return {
            "layers": layers,
            "experts": max((m.shape[1] for *_, m in drawn), default=0),
            "layer": "all" if layer is None else layer,
            "value": "max_over_mean" if layer is None else "load_over_mean",
            "step": [facts["step"] for facts, _ in drawn],
            "attempt": [facts["attempt"] for facts, _ in drawn],
            "values": numbers(np.array(values).T, 4) if values else [],
            "tokens": [int(m.sum() // max(1, len(m))) for *_, m in drawn],
            "dropped": [facts["dropped"] for facts, _ in drawn],
            "balance_entropy": [facts["balance_entropy"] for facts, _ in drawn],
            "sampled": sampled,
        }


def _whole(columns: MetricColumns, name: str, row: int) -> float | None:
    value = float(columns.column(name)[row])
    return round(value, 6) if np.isfinite(value) else None


def _matrix(line: bytes) -> NDArray[np.uint32]:
    """Layers by experts; empty where the line has none."""
    try:
        rows = expert_loads(line)
    except (ValueError, AttributeError, TypeError):
        rows = []
    width = max((len(row) for row in rows), default=0)
    made = np.zeros((len(rows), width), dtype=np.uint32)
    for i, row in enumerate(rows):
        made[i, : len(row)] = np.clip(row, 0, 2**32 - 1)
    return made


def _column(matrix: NDArray[np.uint32], layer: int | None, layers: int) -> NDArray[np.float64]:
    mean = np.maximum(matrix.mean(axis=1, dtype=np.float64), 1e-9)
    if layer is not None:
        return np.asarray(
            matrix[layer] / mean[layer] if layer < len(matrix) else np.full(matrix.shape[1], np.nan)
        )
    made = np.full(layers, np.nan)
    made[: len(matrix)] = matrix.max(axis=1) / mean
    return made
