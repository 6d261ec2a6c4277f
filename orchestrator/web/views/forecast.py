"""Forecast beside measured: the plan's figures, when the run will be done, and where its loss is going."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError, from_json
from orchestrator.record.partition import TimePart
from orchestrator.web.cached_run import CachedRun
from orchestrator.web.redact import numbers
from orchestrator.web.views import series
from trainer.sizing.forecast import CONFIDENCE, StepHistory, forecast

_RECENT = 200
"""Newest lines that a measured figure is the median of."""
_FITTED = 4000
"""Losses that the law is fitted to, at most."""
_BAND = 60
_FRESH = 20.0
"""Seconds for which a fitted law holds."""


def plan_of(path: Path) -> dict[str, Any]:
    """A run's plan; empty where there is none that can be read."""
    try:
        return dict(from_json(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


class Forecasts:
    """Forecasts of runs; a law that was just fitted isn't fitted again."""

    def __init__(self) -> None:
        self._laws: dict[str, tuple[float, dict[str, Any]]] = {}

    def of(self, state: CachedRun, warmup: int, now: float) -> dict[str, Any]:
        """A run's forecast.

        Args:
            state: the run.
            warmup: its steps of warm-up.
            now: seconds since the epoch.
        """
        plan = plan_of(state.run.plan)
        with state.lock:
            measured = _measured(state)
            finish = _finish(state, measured, now)
        return {
            "figures": list(_figures(plan, measured)),
            "finish": finish,
            "loss": self._loss(state, warmup),
        }

    def _loss(self, state: CachedRun, warmup: int) -> dict[str, Any]:
        known = self._laws.get(state.run.run_id)
        if known is not None and time.monotonic() - known[0] < _FRESH:
            return known[1]
        made = _loss(state, warmup)
        if len(self._laws) > 32:
            self._laws.clear()
        self._laws[state.run.run_id] = time.monotonic(), made
        return made


def _measured(state: CachedRun) -> dict[str, tuple[float, float, float]]:
    """Median of the newest lines, and the 5th and 95th in a hundred, by name."""
    if not state.columns:
        return {}
    newest = state.columns[max(state.columns)]
    if newest.rows == 0 and len(state.columns) > 1:
        newest = max(
            state.columns.values(), key=lambda c: float(c.places["time"][c.rows - 1]) if c.rows else 0.0
        )
    figures = {}
    for name in ("step_seconds", "tokens_per_second", "mfu", "memory_bytes"):
        values = newest.column(name)[-_RECENT:].astype(np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
            figures[name] = float(middle), float(low), float(high)
    return figures


def _figures(plan: Mapping[str, Any], measured: Mapping[str, tuple[float, float, float]]) -> Any:
    step = plan.get("step_time") or {}
    tokens, basis = plan.get("tokens_per_step"), str(step.get("unknown", "")) or "the plan's step time"
    seconds = (step.get("seconds"), step.get("low"), step.get("high"))
    yield _figure(
        "step_seconds", "s", seconds, measured, f"no forecast: {basis}" if seconds[0] is None else basis
    )
    rate = tuple(tokens / s if s and tokens else None for s in (seconds[0], seconds[2], seconds[1]))
    yield _figure("tokens_per_second", "tokens/s", rate, measured, "tokens of a step over its seconds")
    memory = plan.get("memory") or {}
    total = sum(v for v in memory.values() if isinstance(v, int | float)) or None
    yield _figure(
        "memory_bytes", "bytes", (total, None, None), measured, "of the rank with most, by the plan"
    )
    mfu = step.get("mfu")
    yield _figure(
        "mfu",
        "ratio",
        (mfu if isinstance(mfu, float) else None, None, None),
        measured,
        str(plan.get("mfu_basis", "")),
    )


def _figure(
    name: str,
    unit: str,
    forecast: tuple[Any, ...],
    measured: Mapping[str, tuple[float, float, float]],
    basis: str,
) -> dict[str, Any]:
    value, low, high = forecast
    got = measured.get(name)
    known = got is not None and value
    return {
        "name": name, "unit": unit, "forecast": value, "low": low, "high": high,
        "measured": got[0] if got else None, "measured_low": got[1] if got else None,
        "measured_high": got[2] if got else None,
        "ratio": got[0] / value if got is not None and known else None,
        "inside": low <= got[0] <= high if got is not None and low is not None and high is not None else None,
        "basis": basis,
    }  # fmt: skip


def _finish(
    state: CachedRun, measured: Mapping[str, tuple[float, float, float]], now: float
) -> dict[str, Any]:
    row = state.row or {}
    left = int(row.get("steps") or 0) - int(row.get("step") or 0)
    seconds = measured.get("step_seconds")
    if state.terminal or seconds is None or left <= 0:
        why = "it has ended" if state.terminal else "no step is measured yet"
        return {
            "time": None,
            "low": None,
            "high": None,
            "basis": why if left > 0 or state.terminal else "all steps are done",
        }
    made = state.ledger(now)
    spent = made.seconds
    steps = spent[TimePart.PRODUCTIVE]
    ran = made.wall - spent[TimePart.IDLE] - spent[TimePart.WAITING] - spent[TimePart.STARTUP]
    smooth = spent[TimePart.EVALUATION] + spent[TimePart.CHECKPOINT] + spent[TimePart.OVERHEAD] + steps
    share, best = (steps / ran if ran > 0 else 1.0), (steps / smooth if smooth > 0 else 1.0)
    share, best = min(1.0, max(share, 0.01)), min(1.0, max(best, 0.01))
    usual, low, high = seconds
    return {
        "time": now + left * usual / share,
        "low": now + left * low / best,
        "high": now + left * high / min(share, best),
        "basis": f"{left} steps of {usual:.3g} s, which were {share:.0%} of the time since the start-up; without faults "
        f"{best:.0%}",
    }


def _loss(state: CachedRun, warmup: int) -> dict[str, Any]:
    row = state.row or {}
    end = int(row.get("steps") or 0)
    with state.lock:
        pieces = [one for one in series._pieces(state, "step", 0, float("inf")) if not one[2]]
        columns = [
            np.concatenate([c.column(name)[rows] for _, c, _, rows in pieces] or [np.empty(0)]).astype(
                np.float64
            )
            for name in ("step", "tokens", "loss")
        ]
    nothing = {"end_step": end, "value": None, "low": None, "high": None, "band": None}
    if not end or not len(columns[0]):
        return nothing | {"note": "no step is logged yet"}
    every = max(1, len(columns[0]) // _FITTED)
    order = np.argsort(columns[0], kind="stable")[::every]
    history = StepHistory(*(column[order] for column in columns))
    try:
        made = forecast(history, warmup, end)
    except UserError as error:
        return nothing | {"note": str(error)}
    now = float(history.steps[-1])
    steps = np.unique(np.linspace(min(now, made.begin), end, _BAND).astype(int)).astype(np.float64)
    tokens = steps * float(history.tokens[-1]) / max(1.0, now)
    curves = made.laws.at(tokens)
    edge = (1 - CONFIDENCE) / 2
    low, high = np.quantile(curves[1:], (edge, 1 - edge), axis=0)
    final = made.final
    return {
        "end_step": end, "value": final.value, "low": final.low, "high": final.high, "confidence": CONFIDENCE,
        "band": {
            "step": steps.astype(int).tolist(), "value": numbers(curves[0]), "low": numbers(np.minimum(low, curves[0])),
            "high": numbers(np.maximum(high, curves[0])),
        },
        "noise": made.laws.noise,
        "note": final.derivation,
    }  # fmt: skip
