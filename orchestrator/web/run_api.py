"""The answers to questions about one run: parameters checked, files read, views made. Called in threads alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from configs.errors import UserError, from_json
from configs.paths import RunPaths
from faulttol.timeline.heat import HeatMap, HeatRequest, heat_map
from faulttol.timeline.reader import AttemptSteps
from orchestrator import PROGRAM
from orchestrator.record.history import AttemptHistory
from orchestrator.record.rank_status import RankStatus
from orchestrator.web.cached_run import CachedRun
from orchestrator.web.read_model import HomeReadModel
from orchestrator.web.redact import numbers
from orchestrator.web.views import home, logs, past, series
from orchestrator.web.views import layout as layouts
from orchestrator.web.views.forecast import Forecasts, plan_of
from orchestrator.web.views.series import ExpertLoads

Query = Mapping[str, str]
_CONFIG = 1 << 20
_ROWS = 1024
"""Rows of a map, at most."""


def int_parameter(query: Query, name: str, default: int, low: int, high: int) -> int:
    """A whole number of a question.

    Raises:
        UserError: where it isn't one, or out of its bounds.
    """
    text = query.get(name, "")
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise UserError(f"{name}='{text[:40]}' is not a whole number between {low} and {high}")
    return value


def float_parameter(query: Query, name: str, default: float) -> float:
    """A number of a question.

    Raises:
        UserError: where it isn't a finite one.
    """
    text = query.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{name}='{text[:40]}' is not a number")
    return value


class RunApi:
    """Answers about runs of a home.

    Raises (each answer):
        UserError: for a run or a parameter that isn't there or isn't right.
        FileNotFoundError: for a file that isn't there.
        OSError: where storage doesn't give it.
    """

    def __init__(self, live: HomeReadModel) -> None:
        self._live = live
        self._experts, self._forecasts = ExpertLoads(), Forecasts()
        self._steps: dict[str, AttemptSteps] = {}
        self._layouts: dict[Any, tuple[list[RankStatus], dict[str, Any]]] = {}
        """Newest answers, with the looks that they are made of."""
        self._reading = threading.Lock()
        """Held while step files are read, which one thread may do at a time."""
        self.handlers: dict[str, Callable[[CachedRun, Query], dict[str, Any]]] = {
            "": self.run,
            "series": self.series,
            "experts": self.experts,
            "checkpoints": self.checkpoints,
            "incidents": self.incidents,
            "attempts": self.attempts,
            "ledger": self.ledger,
            "forecast": self.forecast,
            "heat": self.heat,
            "layout": self.layout,
            "group": self.group,
            "log": self.log,
            "stack": self.stack,
            "config": self.config,
        }

    def answer(self, run_id: str, what: str, query: Query) -> dict[str, Any]:
        """The answer to a question about a run."""
        state = self._live.open_run(run_id)
        return {"as_of": self._live.snapshot.as_of} | self.handlers[what](state, query)

    # ---- numbers ----

    def run(self, state: CachedRun, _: Query) -> dict[str, Any]:
        """The run, its plan, source and attempts."""
        run = state.run
        plan = plan_of(run.plan)
        kept = (
            "parameters",
            "memory",
            "step_time",
            "tokens_per_step",
            "mfu_basis",
            "choices",
            "warnings",
            "notes",
            "hardware",
        )
        with state.lock:
            attempts = past.attempts(state)
            row = home.row(state, full=True)
        return {
            "run": row,
            "plan": {name: plan[name] for name in kept if name in plan},
            "source": _tree(run),
            "attempts": attempts,
            "links": list(_links(run)),
            "indexed": state.indexed,
        }

    def series(self, state: CachedRun, query: Query) -> dict[str, Any]:
        """Curves."""
        names = [name for name in query.get("names", "").split(",") if name]
        points = int_parameter(query, "points", 500, 10, 4000)
        begin, end = float_parameter(query, "from", -math.inf), float_parameter(query, "to", math.inf)
        with state.lock:
            made = series.series(state, names, query.get("axis") or "step", begin, end, points)
        return {"indexed": state.indexed} | made

    def experts(self, state: CachedRun, query: Query) -> dict[str, Any]:
        """Expert loads."""
        layer = None if query.get("layer", "all") == "all" else int_parameter(query, "layer", 0, 0, 10_000)
        count = int_parameter(query, "columns", 96, 1, 400)
        return self._experts.map(
            state,
            layer,
            float_parameter(query, "from", -math.inf),
            float_parameter(query, "to", math.inf),
            count,
        )

    def ledger(self, state: CachedRun, _: Query) -> dict[str, Any]:
        """Where the time went."""
        with state.lock:
            return {"indexed": state.indexed} | past.ledger(state, self._live.clock())

    def attempts(self, state: CachedRun, _: Query) -> dict[str, Any]:
        """The time axis."""
        with state.lock:
            return past.time_axis(state, self._live.clock())

    def forecast(self, state: CachedRun, _: Query) -> dict[str, Any]:
        """Forecast beside measured."""
        warmup = _setting(_config(state.run), "optim", "warmup_steps")
        return self._forecasts.of(state, int(warmup or 0), self._live.clock())

    def checkpoints(self, state: CachedRun, _: Query) -> dict[str, Any]:
        """Saves."""
        every = _setting(_config(state.run), "checkpoint", "every")
        with state.lock:
            return past.checkpoints(state, int(every) if isinstance(every, int) else None)

    def incidents(self, state: CachedRun, _: Query) -> dict[str, Any]:
        """What broke."""
        with state.lock:
            return past.incidents(state, self._live.clock())

    # ---- ranks ----

    def _attempt(self, state: CachedRun, query: Query) -> AttemptHistory:
        with state.lock:
            attempts = dict(past.history_of(state).attempts)
        number = int_parameter(query, "attempt", max(attempts, default=0), 0, 1_000_000)
        if number not in attempts:
            there = ", ".join(map(str, list(attempts)[-8:])) or "none yet"
            raise UserError(f"attempt={number} is none of this run; it has {there}")
        return attempts[number]

    def _rank(self, own: AttemptHistory, query: Query) -> int:
        rank = int_parameter(query, "rank", 0, 0, 10_000_000)
        if rank >= own.ranks:
            raise UserError(
                f"rank={rank} is none of attempt {own.number}'s {own.ranks} ranks, which count from 0"
            )
        return rank

    def heat(self, state: CachedRun, query: Query) -> dict[str, Any]:
        """Ranks by steps."""
        own = self._attempt(state, query)
        folder = str(state.run.attempt(own.number).root)
        with self._reading:
            if folder not in self._steps and len(self._steps) > 8:
                self._steps.pop(next(iter(self._steps))).close()
            steps = self._steps.setdefault(folder, AttemptSteps(Path(folder)))
            span = steps.span
            some = _rank_range(query, own.ranks)
            request = HeatRequest(
                field=query.get("field") or "compute",
                first=int_parameter(query, "from", span[0] if span else 0, 0, 1 << 40),
                last=int_parameter(query, "to", span[1] - 1 if span else 0, 0, 1 << 40) + 1,
                mode=query.get("mode") or "raw",
                group="rank" if some else query.get("group") or "rank",
                columns=int_parameter(query, "columns", 200, 1, 1000),
                # Of some ranks, none are joined; their peers are still all of their stage.
                rows=own.ranks if some else int_parameter(query, "rows", 256, 1, _ROWS),
            )
            made = heat_map(steps, request, own.layout)
            if some:
                made = _select_ranks(made, some)
        values = made.mean if query.get("of") == "mean" else made.most
        edges = made.edges
        return {
            "attempt": own.number, "field": request.field, "mode": request.mode, "unit": made.unit, "group": request.group,
            "first": span[0] if span else None, "last": span[1] - 1 if span else None,
            "columns": np.stack([edges[:-1], edges[1:] - 1], axis=1).tolist() if len(edges) > 1 else [],
            "rows": [{"label": row.label, "ranks": _compact_ranks(row.ranks)} for row in made.rows],
            "values": numbers(values, 4) if values.size else [],
            "low": made.low, "high": made.high, "recorded": span is not None,
        }  # fmt: skip

    def layout(self, state: CachedRun, query: Query) -> dict[str, Any]:
        """Who is where, and who waits for whom."""
        own = self._attempt(state, query)
        with state.lock:
            incidents = list(past.history_of(state).incidents.values())
        named = [
            event.rank for _, event in incidents if event.attempt == own.number and event.rank is not None
        ]
        looks, now = state.rank_statuses(own.number), self._live.clock()
        key = (state.run.run_id, own.number, own.ended, tuple(named))
        known = self._layouts.get(key)
        if known is None or known[0] is not looks:
            if len(self._layouts) > 4:
                self._layouts.clear()
            known = self._layouts[key] = looks, layouts.layout(own, looks, named)
        return {"attempt": own.number, "live": layouts.is_live(own, known[1], now)} | known[1]

    def group(self, state: CachedRun, query: Query) -> dict[str, Any]:
        """The ranks of one group."""
        own = self._attempt(state, query)
        rank = self._rank(own, query)
        axis = query.get("axis", "")
        return {"axis": axis, "rank": rank, "ranks": layouts.group(own.layout, own.ranks, axis, rank)}

    def log(self, state: CachedRun, query: Query) -> dict[str, Any]:
        """A rank's log."""
        own, search = self._attempt(state, query), query.get("search", "")[:500]
        count = int_parameter(query, "lines", 200, 1, 1000)
        if query.get("rank") == "all":
            return logs.search_all(state.run, own.number, search, count)
        before = int_parameter(query, "before", -1, 0, 1 << 50) if query.get("before") else None
        return logs.log(state.run, own.number, self._rank(own, query), search, before, count)

    def stack(self, state: CachedRun, query: Query) -> dict[str, Any]:
        """A rank's stack and records."""
        own = self._attempt(state, query)
        return logs.stack(state.run, own.number, self._rank(own, query))

    def config(self, state: CachedRun, _: Query) -> dict[str, Any]:
        """The configuration of the newest attempt."""
        path = _config_path(state.run)
        with path.open("rb") as file:
            return {"name": path.name, "text": file.read(_CONFIG).decode(errors="replace")}


def _config_path(run: RunPaths) -> Any:
    numbers_ = run.attempt_numbers()
    own = run.attempt(numbers_[-1]).config if numbers_ else run.config
    return own if own.is_file() else run.newest_config


def _config(run: RunPaths) -> dict[str, Any]:
    """The resolved configuration as a plain tree; empty where it can't be read."""
    try:
        with _config_path(run).open("rb") as file:
            tree = yaml.load(file.read(_CONFIG), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return tree if isinstance(tree, dict) else {}
    except (OSError, yaml.YAMLError, ValueError):
        return {}


def _setting(config: Mapping[str, Any], *names: str) -> Any:
    value: Any = config
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _tree(run: RunPaths) -> dict[str, Any]:
    try:
        tree = from_json(run.source.read_bytes())
        return tree if isinstance(tree, dict) else {}
    except (OSError, ValueError):
        return {}


def _links(run: RunPaths) -> Any:
    """Reports that lie with the run, and what to type for others."""
    if run.measurement.is_dir():
        there = (run.measurement / "report.html").is_file()
        yield {"title": "collectives report", "path": str(run.measurement / "report.html") if there else "",
               "command": f"python -m collectives report {run.measurement}"}  # fmt: skip
    if run.plan.is_file():
        yield {"title": "sizing report", "path": "", "command": f"python -m trainer forecast {run.root}"}
    yield {"title": "timeline", "path": "", "command": f"python -m faulttol timeline {run.root}"}
    yield {"title": "status", "path": "", "command": f"{PROGRAM} status {run.run_id}"}


def _rank_range(query: Query, world: int) -> range:
    """Ranks that are asked for alone; an empty range: all."""
    text = query.get("ranks", "")
    if not text:
        return range(0)
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or len(text) > 20:
        raise UserError(f"ranks='{text[:40]}' must be A-B, such as 8-15")
    ranks = range(int(first), int(last or first) + 1)
    if not ranks or ranks[-1] >= world or len(ranks) > _ROWS:
        raise UserError(f"ranks={text}: name 1 to {_ROWS} neighbouring ranks of 0 to {world - 1}")
    return ranks


def _select_ranks(made: HeatMap, ranks: range) -> HeatMap:
    """The rows of some ranks, with a scale of their own."""
    keep = [i for i, row in enumerate(made.rows) if row.ranks and row.ranks[0] in ranks]
    mean, most = made.mean[keep], made.most[keep]
    shown = most[~np.isnan(most)]
    low, high = np.percentile(shown, (1, 99)).tolist() if shown.size else (math.nan, math.nan)
    rows = tuple(made.rows[i] for i in keep)
    return replace(made, rows=rows, mean=mean, most=most, low=low, high=high)


def _compact_ranks(ranks: tuple[int, ...]) -> Any:
    """First and last where ranks follow each other, else all of them."""
    if ranks and ranks[-1] - ranks[0] + 1 == len(ranks):
        return [ranks[0], ranks[-1]]
    return {"list": list(ranks)}
