"""The W&B sink: one W&B run per run id, fed from the run's files by a process that training never waits for.

The JSONL files are the truth; this reads them. What it relies on:

- `step` of W&B must never go back, and a resumed attempt does. So no `step` is passed; every row carries
  `train/step`, which is declared as the axis of all series.
- Rows of steps that a later attempt trained again are logged once more with `train/lost` 1 and a new
  `train/attempt`; in the summary, `lost_steps` counts them.
- A cursor file remembers what is logged. A sink that is killed and started again logs at most the rows of its
  last poll twice: those of a second, or of 1 MiB of an attempt's lines while it catches up. Offline, each start
  makes its own `offline-run-*` folder with the same run id, and `wandb sync` joins them.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from dataclasses import asdict
from netrc import NetrcParseError, netrc
from typing import Any

import wandb
import yaml

from configs.compose import dump
from configs.metrics import (
    EndedLine,
    EvaluatedLine,
    MeasuredLine,
    MetricLine,
    ResumedLine,
    SavedLine,
    SaveFailedLine,
    StepLine,
    read_all,
)
from configs.paths import RunPaths
from configs.schema import RunConfig
from orchestrator.record import reading
from orchestrator.record.events import Event, read
from orchestrator.record.reading import Follower
from orchestrator.record.run_log import RunView, fold

MAX_EXPERT_SERIES = 64
"""Experts per layer that get a series of their own; beyond it only the layer's spread is logged."""
_FAILURES = 5
_GIB = 1 << 30


class WandbSink:
    """Feeds one run to W&B. Failures are logged to `<run>/wandb/sink.log` and never raised."""

    def __init__(self, run: RunPaths, config: RunConfig) -> None:
        self._run, self._config = run, config
        self._mode = mode_of(config)
        run.wandb.mkdir(parents=True, exist_ok=True)
        self._cursor = run.wandb / "cursor.json"
        self._log = logging.getLogger(f"megaray.wandb.{run.run_id}")
        self._log.addHandler(logging.FileHandler(run.wandb / "sink.log"))
        self._wandb: Any = None
        self._failures = 0
        position = json.loads(self._cursor.read_text()) if self._cursor.exists() else {}
        # A run that ended and was resumed has events past those that were logged.
        ended = bool(position.pop("done", False))
        self._done = ended and run.events.stat().st_size <= position.get("events", 0)
        self._follower = Follower(run, position)
        self._pending: deque[Event | MetricLine] = deque()
        """Read and not logged yet, so that a retry begins at the item that failed."""

    def pump(self) -> bool:
        """Log what is new; True when the run has ended and everything is logged, or W&B was given up."""
        if self._done or self._mode == "disabled":
            return True
        try:
            # Whether the run has ended is asked first: what came before the end is then surely still to be read.
            ended = reading.summary(self._run, {}).terminal
            if not self._pending:
                self._pending.extend(self._follower.poll())
            ended = ended and not self._pending  # one poll reads a part of a long file
            if self._wandb is None and (self._pending or ended):
                self._wandb = self._start()
            while self._pending:
                self._one(self._pending[0])
                self._pending.popleft()
            if ended:
                self._finish()
            self._save_cursor(ended)
            self._failures = 0
        except Exception:  # W&B's errors are many, and none may matter
            self._log.exception("attempt %d of %d", self._failures + 1, _FAILURES)
            self._failures += 1
            time.sleep(min(60.0, 2.0**self._failures))
            if self._failures >= _FAILURES:
                self._log.error("given up; `wandb sync` or a new sink can log the run from its files")
                return True
            return False
        self._done = ended
        return ended

    def close(self) -> None:
        """End W&B's service process."""
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        wandb.teardown()

    def _start(self) -> Any:
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            save_code=False,
        )
        tracking = self._config.tracking
        logged = wandb.init(
            id=self._run.run_id, name=self._run.run_id, project=tracking.project, entity=tracking.entity,
            dir=str(self._run.wandb), resume="allow", settings=settings,
            mode=self._mode,  # type: ignore[arg-type]  # a plain string from the environment; W&B checks it
            config=self._facts(),
        )  # fmt: skip
        logged.define_metric("train/step")
        for family in ("train", "phase", "experts", "checkpoint", "memory"):
            logged.define_metric(f"{family}/*", step_metric="train/step")
        logged.define_metric("collectives/size")
        logged.define_metric("collectives/*", step_metric="collectives/size")
        return logged

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = yaml.safe_load(dump(self._config))
        for name, path in (("plan", self._run.plan), ("source", self._run.source)):
            if path.exists():
                facts[name] = json.loads(path.read_text())
        return facts

    def _one(self, item: Event | MetricLine) -> None:
        match item:
            case StepLine():
                self._wandb.log(row_of(item))
            case EvaluatedLine():
                self._wandb.log({"train/step": item.step, "validation/loss": item.loss})
            case SavedLine() | SaveFailedLine():
                self._wandb.log(save_row(item))
            case ResumedLine():
                self._wandb.config.update(
                    {"mfu_basis": item.mfu_basis, "facts": item.facts}, allow_val_change=True
                )
                if item.attempt > 1:
                    self._mark_lost(item.attempt)
            case EndedLine() if item.loss is not None:
                self._wandb.summary["final_loss"] = item.loss
            case MeasuredLine() if "time_us" in item.result:
                self._wandb.log(measured_row(item))

    def _mark_lost(self, attempt: int) -> None:
        """Log the steps that this attempt trains again, as lost, from the attempts that lost them."""
        known = reading.lost_steps(self._run, attempt - 1)
        lost = reading.lost_steps(self._run, attempt)
        for earlier, (first, last) in lost.items():
            end = known[earlier][0] - 1 if earlier in known else last
            for step in range(first, end + 1):
                self._wandb.log({"train/step": step, "train/attempt": earlier, "train/lost": 1})
        self._wandb.summary["lost_steps"] = sum(last - first + 1 for first, last in lost.values())

    def _finish(self) -> None:
        events = read(self._run.events)
        rows = [[e.seq, e.time, e.payload.kind, json.dumps(asdict(e.payload))] for e in events]
        self._wandb.log({"events": wandb.Table(columns=["seq", "time", "kind", "detail"], data=rows)})
        found = reading.incidents(self._run)
        columns = list(found[0]) if found else ["incident"]
        data = [[str(one[name]) for name in columns] for one in found]
        self._wandb.log({"incidents": wandb.Table(columns=columns, data=data)})
        view = fold(events)
        self._log_measurement(view)
        self._wandb.summary.update(
            {
                "state": str(view.state),
                "attempts": view.attempt,
                "incidents_total": len(found),
                "failed_saves": view.failing,
            }
        )
        self._wandb.finish(exit_code=0 if view.finished else 1)
        self._wandb = None

    def _log_measurement(self, view: RunView) -> None:
        """Every case and every finding as a table, and bus bandwidth over size as a chart; nothing where a run trained."""
        attempts = map(self._run.attempt, self._run.attempt_numbers())
        lines = [line for one in attempts for line in read_all(one.metrics) if isinstance(line, MeasuredLine)]
        if not lines:
            return
        columns = list(dict.fromkeys(key for line in lines for key in (*line.case, *line.result)))
        data = [[_cell((line.case | line.result).get(column)) for column in columns] for line in lines]
        self._wandb.log({"measurements": wandb.Table(columns=columns, data=data)})
        findings = [found.finding for found in view.findings]
        names = ["severity", "kind", "what", "where", "ratio", "action"]
        table = wandb.Table(columns=names, data=[[_cell(one[name]) for name in names] for one in findings])
        self._wandb.log({"findings": table})
        self._wandb.summary["findings_total"] = len(findings)
        series: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            if line.result.get("bus_bw"):
                series.setdefault(series_name(line), []).append((line.case["size"], line.result["bus_bw"]))
        if series:
            chart = wandb.plot.line_series(
                [[size for size, _ in points] for points in series.values()],
                [[rate for _, rate in points] for points in series.values()],
                keys=list(series), title="bus bandwidth (GB/s) over size", xname="bytes",
            )  # fmt: skip
            self._wandb.log({"busbw_over_size": chart})

    def _save_cursor(self, done: bool) -> None:
        temporary = self._cursor.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._follower.position | {"done": done}))
        temporary.replace(self._cursor)


def mode_of(config: RunConfig) -> str:
    """W&B's mode: `$WANDB_MODE`, else the configuration's, where `auto` is online if a key is found."""
    asked = os.environ.get("WANDB_MODE") or config.tracking.wandb
    if asked != "auto":
        return asked
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        known = netrc().authenticators("api.wandb.ai")
    except (OSError, NetrcParseError):
        known = None
    return "online" if known else "offline"


def series_name(line: MeasuredLine) -> str:
    """Operation, group and type of a case."""
    return ".".join(str(line.case[name]) for name in ("op", "group", "dtype"))


def measured_row(line: MeasuredLine) -> dict[str, Any]:
    """A case of a sweep as a W&B row, over its size."""
    name, result = f"collectives/{series_name(line)}", line.result
    figures = ("time_us", "p99_us", "alg_bw", "bus_bw", "wrong")
    row = {f"{name}/{figure}": result[figure] for figure in figures if result.get(figure) is not None}
    return row | {"collectives/size": line.case["size"], "collectives/case": line.step}


def _cell(value: Any) -> Any:
    """A value that a table takes: numbers and text as they are, the rest as JSON."""
    return value if value is None or isinstance(value, int | float | str) else json.dumps(value)


def save_row(line: SavedLine | SaveFailedLine) -> dict[str, Any]:
    """A save as a W&B row: `checkpoint/*` in storage, `memory/*` in the memory of nodes; `failed` counts those in a row."""
    if isinstance(line, SaveFailedLine):
        return {"train/step": line.step, "checkpoint/failed": line.in_a_row, "checkpoint/error": line.error}
    family = "checkpoint" if line.tier == "store" else line.tier
    row = {"train/step": line.step, f"{family}/held": line.held, f"{family}/seconds": line.seconds}
    return row | {f"{family}/bytes": line.bytes} | ({"checkpoint/failed": 0} if line.tier == "store" else {})


def row_of(line: StepLine) -> dict[str, Any]:
    """A step line as a W&B row."""
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
