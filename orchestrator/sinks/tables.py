"""A run's past and its plan as tables and pictures for a tracker, of the same read model as the dashboard. Plain data."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from configs.errors import from_json
from configs.paths import HomePaths, RunPaths
from orchestrator.sinks import lineage
from orchestrator.sinks.rows import cell
from orchestrator.web.cached_run import CachedRun
from orchestrator.web.redact import Redactor
from orchestrator.web.views import past
from orchestrator.web.views.forecast import Forecasts
from orchestrator.web.views.series import ExpertLoads

_PATIENCE = 20.0
"""Seconds for reading on before tables are made; a very long run has older tables meanwhile."""
_STEPS = 200
"""Columns of a heat map."""
_LAYERS = 64
_PIXELS = 6


@dataclass
class RunTables:
    """What there is to show."""

    tables: dict[str, tuple[list[str], list[list[Any]]]] = field(default_factory=dict)
    """Columns and rows by name."""
    pictures: list[tuple[NDArray[np.uint8], str]] = field(default_factory=list)
    """Heat maps [height, width, 3] with what they show."""
    figures: dict[str, float] = field(default_factory=dict)
    """Numbers for the summary."""


class TableBuilder:
    """Makes them; reads on each time from where it was."""

    def __init__(self, run: RunPaths, warmup: int) -> None:
        self._run, self._warmup = run, warmup
        self._state = CachedRun(run)
        self._experts, self._forecasts = ExpertLoads(), Forecasts()
        self._redactor = Redactor()

    def build(self, now: float | None = None) -> RunTables:
        """Everything as it is now; `now` in seconds since the epoch.

        Raises:
            OSError: where the run's files can't be read.
        """
        at = time.time() if now is None else now
        state, made = self._state, RunTables()
        state.refresh({}, None)
        if state.row is None:
            return made
        state.mark_viewed()
        state.load(time.monotonic() + _PATIENCE)
        incidents = past.incidents(state, at)["incidents"]
        made.tables["incidents"] = self._table(
            INCIDENTS, [self._incident(one) for one in reversed(incidents)]
        )
        attempts = past.attempts(state)
        made.tables["attempts"] = self._table(ATTEMPTS, attempts)
        made.tables["rewinds"] = self._table(REWINDS, past.time_axis(state, at)["rewinds"])
        ledger = past.ledger(state, at)
        made.tables["ledger"] = self._table(LEDGER, ledger["parts"])
        made.figures |= {f"ledger/{part['part']}": part["seconds"] for part in ledger["parts"]}
        made.figures["ettr"] = ledger["ettr"]
        plan = self._forecasts.of(state, self._warmup, at)["figures"]
        made.tables["plan"] = self._table(PLAN, plan)
        for one in plan:
            made.figures |= {
                f"plan/{one['name']}": one["forecast"],
                f"measured/{one['name']}": one["measured"],
            }
        made.pictures = self._maps()
        made.figures = {name: value for name, value in made.figures.items() if value is not None}
        return made

    def _incident(self, one: dict[str, Any]) -> dict[str, Any]:
        cost = one["cost"] or {}
        kept = lineage.evidence_name(self._run, one["incident"]) if one["dossier"] else ""
        return one | {
            "opened": _clock(one["opened"]), "closed": _clock(one["closed"]), "artifact": kept,
            "page": self._page("incidents"),
            "decision": (one["decision"] or {}).get("action"), "detection_seconds": cost.get("detection"),
            "restart_seconds": cost.get("restart"), "lost_seconds": cost.get("lost"),
        }  # fmt: skip

    def _page(self, view: str) -> str:
        """Link to the dashboard, where one serves this home; without its token."""
        try:
            served = from_json(HomePaths(self._run.root.parent.parent).dashboard.read_bytes())
            parts = urlsplit(served["url"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return f"{parts.scheme}://{parts.netloc}/#/run/{quote(self._run.run_id)}/{view}"

    def _table(self, columns: list[str], rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
        return columns, [[self._cell(row.get(name)) for name in columns] for row in rows]

    def _cell(self, value: Any) -> Any:
        return cell(self._redactor.tree(value))

    def _maps(self) -> list[tuple[NDArray[np.uint8], str]]:
        """All layers, and each one's experts."""
        whole = self._experts.map(self._state, None, -np.inf, np.inf, _STEPS)
        if not whole["values"]:
            return []
        steps = f"steps {whole['step'][0]} to {whole['step'][-1]} from left to right"
        scale = "white: the mean, blue: none, red: twice the mean or more"
        made = [
            (
                heat_map_image(whole["values"]),
                f"most loaded expert over the mean, a row per layer, {steps}; {scale}",
            )
        ]
        for layer in range(min(whole["layers"], _LAYERS)):
            one = self._experts.map(self._state, layer, -np.inf, np.inf, _STEPS)
            made.append(
                (
                    heat_map_image(one["values"]),
                    f"layer {layer}: load over the mean, a row per expert, {steps}; {scale}",
                )
            )
        return made


INCIDENTS = ["incident", "attempt", "cause", "detail", "rank", "node", "step", "opened", "closed", "resolution", "decision",
             "lost_steps", "downtime_seconds", "detection_seconds", "restart_seconds", "lost_seconds", "predicted_steps",
             "evidence", "artifact", "page"]  # fmt: skip
ATTEMPTS = ["attempt", "resumed_step", "last_step", "lost_from", "end", "reason", "ranks", "layout", "nodes", "placed",
            "started", "first_step", "ended"]  # fmt: skip
REWINDS = ["attempt", "from_step", "to_step", "time"]
LEDGER = ["part", "seconds", "share", "means"]
PLAN = [
    "name",
    "unit",
    "forecast",
    "low",
    "high",
    "measured",
    "measured_low",
    "measured_high",
    "ratio",
    "inside",
    "basis",
]


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) + " UTC"


def heat_map_image(values: list[list[float | None]]) -> NDArray[np.uint8]:
    """Ratios to 1 as colours, [rows, columns] to [height, width, 3]: blue 0, white 1, red 2; grey where unknown."""
    matrix = np.array([[np.nan if v is None else v for v in row] for row in values], np.float64)
    share = np.clip(matrix - 1.0, -1.0, 1.0)
    unknown = np.isnan(share)
    share = np.where(unknown, 0.0, share)
    low, high = np.array([33, 102, 172]), np.array([178, 24, 43])
    end = np.where(share[..., None] < 0, low, high)
    colours = 255.0 + (end - 255.0) * np.abs(share)[..., None]
    colours[unknown] = 200.0
    made = np.rint(colours).astype(np.uint8)
    return np.ascontiguousarray(made.repeat(_PIXELS, axis=0).repeat(_PIXELS, axis=1))
