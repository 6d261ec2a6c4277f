"""The W&B sink: one W&B run per run id, fed from the run's files by a process that training never waits for.

The JSONL files are the truth; this reads them. What it relies on:

- `step` of W&B must never go back, and a resumed attempt does. So no `step` is passed; every row carries
  `train/step`, which is declared as the axis of all series.
- Rows of steps that a later attempt trained again are logged once more with `train/lost` 1 and a new
  `train/attempt`; in the summary, `lost_steps` counts them.
- Tables (incidents, attempts, rewinds, ledger, plan against measured) and the experts' heat maps are logged as they stand
  after an incident or a new attempt, now and then, and at the end.
- Checkpoints, profiles, measurements and evidence are artifacts (`orchestrator.sinks.lineage`); what they need to be synced
  later lies in `<run>/wandb` too, not in an account's home.
- System metrics come from all nodes of the run into this one W&B run (`orchestrator.sinks.node_metrics`).
- W&B's service writes what it was given some 15 s later. A cursor file remembers what is logged, and what was logged a
  minute ago and is surely written: a sink that is killed with its service and started again continues from there, so that
  nothing is missing and rows of about a minute may be there twice. Offline, each start makes its own `offline-run-*`
  folder with the same run id, and `wandb sync` joins them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import wandb
import yaml

from configs.compose import dump
from configs.errors import from_json
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
from configs.paths import RunPaths, write_whole
from configs.schema import RunConfig
from orchestrator.decide import backoff
from orchestrator.record import log
from orchestrator.record.events import AttemptResumed, Event, EvidenceKept, IncidentClosed, IncidentOpened
from orchestrator.record.following import Follower, lost_steps
from orchestrator.record.summaries import RunReader
from orchestrator.record.view import RunView
from orchestrator.sinks import lineage, node_metrics
from orchestrator.sinks.lineage import Artifact
from orchestrator.sinks.mode import mode_of
from orchestrator.sinks.rows import cell, histograms, measured_row, rewind_row, row_of, save_row, series_name
from orchestrator.sinks.tables import TableBuilder
from orchestrator.web.redact import Redactor

_LONGEST_WAIT = 300.0
"""Seconds between two tries at a W&B that doesn't answer."""
_AFTER_THE_END = 24 * 3600.0
"""Seconds that it is tried on after the run has ended; then the run's files are all that there is."""
_WRITTEN_AFTER = 60.0
"""Seconds after which W&B's service has surely written what it was given."""
_TABLES_SOON = 60.0
"""Seconds between tables where incidents come one after the other."""
_TABLES_EVERY = 600.0
"""Seconds between tables where nothing happens; ever more of them in a long run, a twentieth of its time."""


class WandbSink:
    """Feeds one run to W&B. Failures are logged to `<run>/wandb/sink.log` and never raised.

    A W&B that fails is tried again, less and less often, as long as the run is active and a day beyond; what is to be
    logged waits in the run's files meanwhile, not in memory.
    """

    def __init__(
        self,
        run: RunPaths,
        config: RunConfig,
        clock: Callable[[], float] = time.monotonic,
        endpoints: Callable[[], dict[str, str]] | None = None,
    ) -> None:
        """Make a sink.

        Args:
            run: what is logged.
            config: of the run.
            clock: seconds of a clock that only goes forward.
            endpoints: where the cluster's nodes serve Ray's metrics, by address; None: system metrics aren't logged.
        """
        self._run, self._config, self._clock = run, config, clock
        self._reader = RunReader(run)
        self._mode = mode_of(config)
        run.wandb.mkdir(parents=True, exist_ok=True)
        self._cursor = run.wandb / "cursor.json"
        self._log = logging.getLogger(f"megaray.wandb.{run.run_id}")
        self._log.addHandler(logging.FileHandler(run.wandb / "sink.log"))
        self._wandb: Any = None
        self._failures = self._unkept = 0
        """Failures of W&B in a row, and of the disk that the cursor is on."""
        self._finished = False
        """W&B has finished, and nothing has come since."""
        self._next_try = float("-inf")
        self._ended_at: float | None = None
        position = from_json(self._cursor.read_text()) if self._cursor.exists() else {}
        # A run that ended and was resumed has events past those that were logged.
        ended = bool(position.pop("done", False))
        self._done = ended and run.events.stat().st_size <= position.get("events", 0)
        self._written: deque[tuple[float, dict[str, int]]] = deque(
            [(float("-inf"), position.pop("written", position))]
        )
        """When something was logged, and up to where; the first one is surely written."""
        self._follower = Follower(run, self._written[0][1])
        self._pending: deque[Event | MetricLine] = deque()
        """Read and not logged yet, so that a retry begins at the item that failed."""
        self._tables = TableBuilder(run, config.optim.warmup_steps)
        self._began = self._tables_at = clock()
        self._news = False
        """Something happened since the tables were logged."""
        self._redactor = Redactor()
        self._samples = run.wandb / "nodes.jsonl"
        self._sampler: node_metrics.NodeSampler | None = None
        if endpoints is not None and self._mode != "disabled" and not self._done:
            self._sampler = node_metrics.NodeSampler(self._samples, self._nodes, endpoints)
            self._sampler.start()

    def _nodes(self) -> list[str]:
        """Addresses of the nodes that hold the run now."""
        view = self._reader.view
        held = view.placed is not None and view.state is not None and not view.state.terminal
        return [share.ip for share in view.placed.shares] if held and view.placed else []

    def pump(self) -> bool:
        """Log what is new; True when the run has ended and everything is logged, or W&B was given up."""
        if self._done or self._mode == "disabled":
            return True
        if self._clock() < self._next_try:
            return False
        try:
            # Whether the run has ended is asked first: what came before the end is then surely still to be read.
            ended = self._ended()
            if not self._pending:  # so that what waits is never more than one poll reads
                self._pending.extend(self._follower.poll())
            ended = ended and not self._pending  # one poll reads a part of a long file
            self._finished = self._finished and not self._pending  # it was resumed
            if self._wandb is None and (self._pending or (ended and not self._finished)):
                self._wandb = self._start()
            while self._pending:
                self._one(self._pending[0])
                self._pending.popleft()
            if self._wandb is not None:
                self._log_samples()
                self._log_tables_now_and_then()
            if ended and not self._finished:
                self._finish()
            self._failures = 0
        except Exception:  # W&B's errors are many, and none may matter
            return self._failed()
        self._done = self._keep(ended)
        return self._done

    def _ended(self) -> bool:
        state = self._reader.update().state
        if state is None or not state.terminal:
            self._ended_at = None
            return False
        self._ended_at = self._clock() if self._ended_at is None else self._ended_at
        return True

    def _failed(self) -> bool:
        """Note a failure, and when it is tried again; True where it isn't any more."""
        self._failures += 1
        wait = backoff.exponential_backoff(2.0, self._failures, _LONGEST_WAIT)
        self._log.exception("try %d failed; the next one is in %.0f s", self._failures, wait)
        self._next_try = self._clock() + wait
        if self._failures > 1:  # its service may be what is broken
            with contextlib.suppress(Exception):
                wandb.teardown()
            if self._wandb is not None:  # what it hadn't written is gone
                self._pending.clear()
                self._follower = Follower(self._run, self._surely_written())
            self._wandb = None
        return self._given_up()

    def _keep(self, ended: bool) -> bool:
        """Write the cursor; whether there is nothing left to do. That a disk takes none isn't W&B's failure, after
        which rows of the last minute would be logged again."""
        try:
            self._save_cursor(ended)
        except OSError:
            self._unkept += 1
            if self._unkept == 1:
                self._log.exception("the cursor can't be written; it is tried again")
            if not ended:  # with the next rows
                return False
            self._next_try = self._clock() + backoff.exponential_backoff(2.0, self._unkept, _LONGEST_WAIT)
            return self._given_up()
        self._unkept = 0
        return ended

    def _given_up(self) -> bool:
        """Whether the run ended so long ago that nothing is tried any more."""
        over = self._ended_at is not None and self._clock() - self._ended_at > _AFTER_THE_END
        if over:
            self._log.error("given up; a new sink logs the run from its files from where this one stopped")
        return over

    def close(self) -> None:
        """End W&B's service process."""
        if self._sampler is not None:
            self._sampler.stop()
        with contextlib.suppress(Exception):
            if self._wandb is not None:
                self._wandb.finish()
                self._wandb = None
            wandb.teardown()

    def _start(self) -> Any:
        # Files of artifacts that wait for `wandb sync` belong to the run, which may be synced by another machine.
        os.environ.setdefault("WANDB_DATA_DIR", str(self._run.wandb / "data"))
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
        for family, axis in (
            ("collectives/*", "collectives/size"),
            ("node/*", "node/seconds"),
            ("nodes/*", "node/seconds"),
        ):
            logged.define_metric(axis)
            logged.define_metric(family, step_metric=axis)
        for piece in lineage.profiles(self._config.hardware.name):
            self._log_piece(piece, logged)
        return logged

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = yaml.safe_load(dump(self._config))
        for name, path in (("plan", self._run.plan), ("source", self._run.source)):
            try:
                facts[name] = from_json(path.read_bytes())
            except FileNotFoundError:
                continue
            except ValueError as error:
                self._log.warning("%s is left out: %s", path, error)
        return dict(self._redactor.tree(facts))

    def _one(self, item: Event | MetricLine) -> None:
        match item:
            case StepLine():
                loads = histograms(
                    item, self._reader.view.request.steps if self._reader.view.submitted else 1
                )
                shown = {
                    name: wandb.Histogram(np_histogram=(np.asarray(bins), np.asarray(edges)))
                    for name, (bins, edges) in loads.items()
                }
                self._wandb.log(row_of(item) | shown)  # numbers alone
            case EvaluatedLine():
                self._wandb.log({"train/step": item.step, "validation/loss": item.loss})
            case SavedLine() | SaveFailedLine():
                self._wandb.log(self._redactor.tree(save_row(item)))
                if isinstance(item, SavedLine):
                    self._log_pieces(lineage.saved(self._run, item))
            case ResumedLine():
                self._wandb.config.update(
                    self._redactor.tree({"mfu_basis": item.mfu_basis, "facts": item.facts}),
                    allow_val_change=True,
                )
                self._log_pieces(lineage.resumed(item))
                if item.attempt > 1:
                    self._wandb.log(rewind_row(item))
                    self._mark_lost(item.attempt)
            case EndedLine() if item.loss is not None:
                self._wandb.summary["final_loss"] = item.loss
            case MeasuredLine() if "time_us" in item.result:
                self._wandb.log(measured_row(item))
            case Event(payload=EvidenceKept() as kept):
                self._log_pieces(lineage.evidence(self._run, kept))
            case Event(payload=IncidentOpened() | IncidentClosed() | AttemptResumed()):
                self._news = True

    def _log_pieces(self, *pieces: Artifact | None) -> None:
        for piece in pieces:
            if piece is not None:
                self._log_piece(piece, self._wandb)

    def _log_piece(self, piece: Artifact, logged: Any) -> None:
        """Log an artifact. One that can't be made is named in the log and left out, so that it holds up nothing."""
        try:
            made = wandb.Artifact(piece.name, piece.kind, metadata=self._redactor.tree(piece.facts))
            for name, data in piece.files.items():
                with made.new_file(name, mode="wb") as file:
                    file.write(self._clean(data, piece.kind))
        except (OSError, ValueError, TypeError):
            self._log.exception("artifact %s is left out", piece.name)
            return
        if not piece.used:
            logged.log_artifact(made, aliases=list(piece.aliases))
        elif self._mode == "online":
            logged.use_artifact(made)
        else:
            self._use_later(made, logged)

    def _clean(self, data: bytes, kind: str) -> bytes:
        if b"\0" in data and kind != "incident":  # no text; a log that was cut may have such bytes too
            return data
        return self._redactor.text(data.decode(errors="replace")).encode(errors="replace")

    def _use_later(self, made: Any, logged: Any) -> None:
        """Write down, for `wandb sync`, that the run began from an artifact: `use_artifact` itself asks the server."""
        try:
            logged._log_artifact(made, is_user_created=True, use_after_commit=True)
        except (AttributeError, TypeError):  # another version of W&B
            self._log.warning("%s is logged without its use", made.name)
            logged.log_artifact(made)

    def _log_samples(self) -> None:
        """System metrics that were kept since."""
        view = self._reader.view
        began = view.submitted_at or 0.0
        while True:
            samples, end = node_metrics.read_from(self._samples, self._follower.position.get("nodes", 0))
            for at, sample in samples:
                self._wandb.log(node_metrics.row(at - began, sample))
            if end == self._follower.position.get("nodes", 0):
                return
            self._follower.position["nodes"] = end

    def _log_tables_now_and_then(self) -> None:
        now = self._clock()
        soon = self._news and now - self._tables_at >= _TABLES_SOON
        if soon or now - self._tables_at >= max(_TABLES_EVERY, (now - self._began) / 20):
            self._log_tables()

    def _log_tables(self) -> None:
        self._news, self._tables_at = False, self._clock()
        try:
            tables = self._tables.build()
        except Exception:  # of the run's own files, and not of W&B: the rows continue without
            self._log.exception("no tables this time")
            return
        for name, (columns, rows) in tables.tables.items():
            self._table(name, columns, rows)
        images = [wandb.Image(pixels, caption=text) for pixels, text in tables.pictures]
        if images:  # W&B shows those of one name at one size
            self._wandb.log({"experts/heat": images[0], "experts/heat_by_layer": images[1:]})
        self._wandb.summary.update(tables.figures)

    def _table(self, name: str, columns: list[str], rows: Iterable[list[Any]]) -> None:
        cells = [[cell(self._redactor.tree(value)) for value in row] for row in rows]
        # A column may have numbers, text and nothing.
        self._wandb.log({name: wandb.Table(columns=[*columns], data=cells, allow_mixed_types=True)})

    def _mark_lost(self, attempt: int) -> None:
        """Log the steps that this attempt trains again, as lost, from the attempts that lost them."""
        known = lost_steps(self._run, attempt - 1)
        lost = lost_steps(self._run, attempt)
        for earlier, (first, last) in lost.items():
            end = known[earlier][0] - 1 if earlier in known else last
            for step in range(first, end + 1):
                self._wandb.log({"train/step": step, "train/attempt": earlier, "train/lost": 1})
        self._wandb.summary["lost_steps"] = sum(last - first + 1 for first, last in lost.values())

    def _finish(self) -> None:
        events = log.read(self._run.events)
        rows = [[e.seq, e.time, e.payload.kind, asdict(e.payload)] for e in events]
        self._table("events", ["seq", "time", "kind", "detail"], rows)
        self._log_tables()
        view = self._reader.view
        self._log_measurement(view)
        self._wandb.summary.update(
            {
                "state": str(view.state),
                "attempts": view.attempt,
                "incidents_total": len(view.incidents),
                "failed_saves": view.failing,
            }
        )
        self._wandb.finish(exit_code=0 if view.finished else 1)
        self._wandb, self._finished = None, True

    def _log_measurement(self, view: RunView) -> None:
        """Every case and every finding as a table, and bus bandwidth over size as a chart; nothing where a run trained."""
        attempts = map(self._run.attempt, self._run.attempt_numbers())
        lines = [line for one in attempts for line in read_all(one.metrics) if isinstance(line, MeasuredLine)]
        if not lines:
            return
        columns = list(dict.fromkeys(key for line in lines for key in (*line.case, *line.result)))
        rows = ([(line.case | line.result).get(column) for column in columns] for line in lines)
        self._table("measurements", columns, rows)
        findings = [event.finding for event in view.findings]
        names = ["severity", "kind", "what", "where", "ratio", "action"]
        self._table("findings", names, ([one[name] for name in names] for one in findings))
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
        self._log_pieces(*lineage.measurement(self._run, self._config.hardware.name))

    def _surely_written(self) -> dict[str, int]:
        now = self._clock()
        while len(self._written) > 1 and now - self._written[1][0] >= _WRITTEN_AFTER:
            self._written.popleft()
        return self._written[0][1]

    def _save_cursor(self, done: bool) -> None:
        position = dict(self._follower.position)
        if position != self._written[-1][1]:
            self._written.append((self._clock(), position))
        if done:  # W&B has finished
            self._written = deque([(float("-inf"), position)])
        tree: dict[str, Any] = position | {"done": done, "written": self._surely_written()}
        write_whole(self._cursor, json.dumps(tree))
