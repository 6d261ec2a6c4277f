"""Prometheus' metrics of a home: what the read model has, as gauges and counters with their units in their names.

Labels are bounded: active runs, and those that ended a few minutes ago so that a scrape sees how; nodes of the cluster;
phases, parts, causes and states, which are few. Nothing has a label per expert, step or rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from configs.errors import from_json
from configs.paths import RunPaths
from orchestrator.record.states import State
from orchestrator.web.cached_run import CachedRun
from orchestrator.web.columns import MetricColumns, expert_loads
from orchestrator.web.read_model import HomeReadModel, is_exported
from orchestrator.web.redact import Redactor

_RUNS = 500
"""Runs that are reported in full, at most; the newest."""
_NODES = 4096

Value = float | int | None

#: Name -> help, and labels beside `run`.
RUN_GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "megaray_run_info": ("1, with what the run is", ("model", "owner", "kind")),
    "megaray_run_state": ("1 for the state that the run is in", ("state",)),
    "megaray_run_queue_position": ("Place in the queue, from 1; absent where it doesn't wait", ()),
    "megaray_run_slots": ("Slots that the attempt takes", ()),
    "megaray_run_asked_slots": ("Slots that were asked for", ()),
    "megaray_run_step": ("Steps finished", ()),
    "megaray_run_planned_steps": ("Steps in all", ()),
    "megaray_run_progress_timestamp_seconds": ("When the newest step line was written", ()),
    "megaray_run_stalled_after_seconds": ("Seconds without a step after which the run counts as stalled", ()),
    "megaray_run_submitted_timestamp_seconds": ("When the run was submitted", ()),
    "megaray_run_ended_timestamp_seconds": ("When the run ended", ()),
    "megaray_run_expected_end_timestamp_seconds": ("When it will be done at the newest step time", ()),
    "megaray_run_loss_nats": ("Mean cross-entropy per token of the newest step", ()),
    "megaray_run_validation_loss_nats": ("Newest loss on held-out documents", ()),
    "megaray_run_auxiliary_loss": ("Auxiliary loss of the newest step", ()),
    "megaray_run_learning_rate": ("Learning rate", ()),
    "megaray_run_gradient_norm": ("Global norm before clipping", ()),
    "megaray_run_loss_finite": ("1 where loss and gradient norm of the newest step are finite, else 0", ()),
    "megaray_run_trained_tokens": ("Tokens trained on, counting each step once", ()),
    "megaray_run_tokens_per_second": ("Tokens per second over all ranks", ()),
    "megaray_run_step_seconds": ("Seconds per step", ()),
    "megaray_run_phase_seconds": ("Seconds per step and phase, the slowest rank's", ("phase",)),
    "megaray_run_mfu_ratio": ("Model FLOPs utilisation, 0 to 1", ()),
    "megaray_run_memory_bytes": ("Peak memory of any rank", ()),
    "megaray_run_expert_balance_entropy_ratio": ("Entropy of the expert load over its largest, 1 is even", ()),
    "megaray_run_expert_load_max_over_mean_ratio": ("Largest expert load over the mean, worst layer", ()),
    "megaray_run_dropped_pairs": ("Token-expert pairs dropped in the newest step", ()),
    "megaray_run_skipped_steps": ("Steps of this attempt in which nothing moved", ()),
    "megaray_run_checkpoint_step": ("Step of the newest checkpoint", ("tier",)),
    "megaray_run_checkpoint_timestamp_seconds": ("When the newest checkpoint was committed", ()),
    "megaray_run_checkpoint_held_seconds": ("Seconds that training stood still for it", ()),
    "megaray_run_checkpoint_write_seconds": ("Seconds from the call to the commit", ()),
    "megaray_run_checkpoint_due_step": ("Step at which the next checkpoint is due", ()),
    "megaray_run_checkpoint_failed_saves": ("Saves that failed since the last commit", ()),
    "megaray_run_checkpoint_copies_differ": ("1 where ranks' copies of the state in the newest checkpoint differed", ()),
    "megaray_run_checkpoint_overdue": ("1 while an incident says that the state isn't saved", ()),
    "megaray_run_open_incidents": ("Incidents that aren't resolved", ()),
    "megaray_run_parked": ("1 while the controller leaves the run alone after an error of its own", ()),
    "megaray_run_restarts": ("Restarts since the last new checkpoint", ()),
    "megaray_run_findings": ("What a measurement found slow or wrong", ()),
    "megaray_run_ledger_seconds": ("Wall time of the run by what it was", ("part",)),
    "megaray_run_wall_seconds": ("Wall time of the run", ()),
    "megaray_run_ettr_ratio": ("Effective training time ratio", ()),
    "megaray_run_wandb_behind_bytes": ("Bytes of events and metric lines that W&B hasn't got", ()),
}  # fmt: skip
RUN_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "megaray_run_trained_steps": ("Steps trained, those that were trained again too", ()),
    "megaray_run_attempts": ("Attempts begun", ()),
    "megaray_run_incidents": ("Incidents by cause", ("cause",)),
    "megaray_run_lost_steps": ("Steps trained again after incidents", ()),
    "megaray_run_checkpoints": ("Checkpoints committed in storage", ()),
    "megaray_run_checkpoints_differing": ("Those of them in which ranks' copies of the state differed", ()),
}  # fmt: skip
NODE_GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "megaray_node_up": ("1 while Ray lists the node, else 0", ()),
    "megaray_node_slots": ("Slots", ("resource",)),
    "megaray_node_free_slots": ("Slots that no run holds", ("resource",)),
    "megaray_node_barred": ("1 where nothing new is placed on the node", ()),
    "megaray_node_cordoned": ("1 where it was cordoned", ()),
    "megaray_node_spare": ("1 where it is kept for runs that recover", ()),
    "megaray_node_suspicion": ("How far it was at fault lately; 0 is sound", ()),
    "megaray_node_faults": ("Faults on record since it was last cleared", ()),
    "megaray_node_departures": ("Times that it left, on record since it was last cleared", ()),
}  # fmt: skip
PLAIN: dict[str, tuple[str, tuple[str, ...]]] = {
    "megaray_runs": ("Runs of the home by state", ("state",)),
    "megaray_queue_waiting_runs": ("Runs that wait for slots", ()),
    "megaray_controller_up": ("1 while the controller beats, else 0", ()),
    "megaray_controller_beat_timestamp_seconds": ("When the controller published last", ()),
    "megaray_controller_epoch": ("Controllers that this home has had", ()),
    "megaray_damaged_lines": ("Lines of logs that can't be read, and runs that can't", ()),
    "megaray_dashboard_read_timestamp_seconds": ("When this server read the files last", ()),
    "megaray_dashboard_turn_seconds": ("Seconds that this took", ()),
}  # fmt: skip


def names() -> set[str]:
    """Names of all series that may be exported, as Prometheus stores them."""
    counters = {f"{name}_total" for name in RUN_COUNTERS}
    return {*RUN_GAUGES, *NODE_GAUGES, *PLAIN, *counters}


class Exporter:
    """Makes the text of a scrape.

    Args:
        live: the home.
        redact: takes secrets out of labels that people have typed, which Prometheus keeps for long.
    """

    def __init__(self, live: HomeReadModel, redact: Redactor) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Home(live, redact))
        ProcessCollector(namespace="megaray_dashboard", registry=self._registry)

    def text(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type, as the scraper accepts it."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind


class _Home(Collector):
    def __init__(self, live: HomeReadModel, redact: Redactor) -> None:
        self._live, self._redact = live, redact
        self._loads: dict[str, tuple[int, float]] = {}

    def collect(self) -> Iterable[Metric]:
        """All families; those without a value too, so that their help is there."""
        gauges: dict[str, Any] = {}
        for table in (PLAIN, RUN_GAUGES, NODE_GAUGES):
            first = ["run"] if table is RUN_GAUGES else ["node"] if table is NODE_GAUGES else []
            for name, (text, others) in table.items():
                gauges[name] = GaugeMetricFamily(name, text, labels=[*first, *others])
        for name, (text, others) in RUN_COUNTERS.items():
            gauges[name] = CounterMetricFamily(name, text, labels=["run", *others])
        self._plain(gauges)
        now = self._live.clock()
        shown = [s for s in reversed(self._live.snapshot.runs.values()) if is_exported(s.row, now)][:_RUNS]
        for state in shown:
            for name, labels, value in self._run(state, now):
                if value is not None:
                    gauges[name].add_metric([state.run.run_id, *labels], float(value))
        self._nodes(gauges)
        return gauges.values()

    def _plain(self, into: Mapping[str, Any]) -> None:
        snapshot = self._live.snapshot
        counts = dict.fromkeys(State, 0)
        for state in snapshot.runs.values():
            row = state.row  # once: another thread reads it anew
            if row is not None:
                counts[State(row["state"])] += 1
        for known, count in counts.items():
            into["megaray_runs"].add_metric([str(known)], count)
        values: dict[str, Value] = {
            "megaray_queue_waiting_runs": len(snapshot.queue.get("waiting", [])),
            "megaray_controller_up": int(not self._live.silence()),
            "megaray_controller_beat_timestamp_seconds": snapshot.beat,
            "megaray_controller_epoch": snapshot.queue.get("epoch"),
            "megaray_damaged_lines": len(snapshot.damage),
            "megaray_dashboard_read_timestamp_seconds": snapshot.as_of,
            "megaray_dashboard_turn_seconds": self._live.turn_seconds,
        }
        for name, value in values.items():
            if value is not None:
                into[name].add_metric([], float(value))

    def _nodes(self, into: Mapping[str, Any]) -> None:
        snapshot = self._live.snapshot
        listed = {str(node.get("ip")): node for node in snapshot.queue.get("nodes", [])[:_NODES]}
        for ip in [*listed, *(ip for ip in snapshot.nodes.nodes if ip not in listed)][:_NODES]:
            node, record = listed.get(ip, {}), snapshot.nodes.nodes.get(ip)
            into["megaray_node_up"].add_metric([ip], int(ip in listed))
            for name, field in (("megaray_node_slots", "slots"), ("megaray_node_free_slots", "free")):
                for resource, count in dict(node.get(field) or {}).items():
                    if resource in ("CPU", "GPU"):
                        into[name].add_metric([ip, resource], float(count))
            values: dict[str, Value] = {
                "megaray_node_barred": int(bool(node.get("barred"))),
                "megaray_node_cordoned": int(record is not None and record.cordon is not None),
                "megaray_node_spare": int(bool(node.get("spare"))),
                "megaray_node_suspicion": node.get("suspicion"),
                "megaray_node_faults": len(record.faults) if record else 0,
                "megaray_node_departures": len(record.left) if record else 0,
            }
            for name, value in values.items():
                if value is not None:
                    into[name].add_metric([ip], float(value))

    def _run(self, state: CachedRun, now: float) -> Iterable[tuple[str, list[str], Value]]:
        row = state.row
        if row is None:
            return
        kind = "measure" if row.get("measured") else "train"
        yield "megaray_run_info", [*map(self._redact.text, (row["model"], row["owner"])), kind], 1
        for known in State:
            yield "megaray_run_state", [str(known)], int(known == row["state"])
        plain = {
            "queue_position": "position", "slots": "slots", "asked_slots": "asked_slots", "step": "step",
            "planned_steps": "steps", "submitted_timestamp_seconds": "submitted_at",
            "ended_timestamp_seconds": "ended_at", "trained_tokens": "tokens", "open_incidents": "open_incidents",
            "restarts": "restarts", "checkpoint_failed_saves": "failed_saves",
        }  # fmt: skip
        for name, field in plain.items():
            yield f"megaray_run_{name}", [], row.get(field)
        if row.get("eta_seconds") is not None:
            yield "megaray_run_expected_end_timestamp_seconds", [], now + float(row["eta_seconds"])
        yield "megaray_run_parked", [], int(bool(row.get("parked")))
        yield "megaray_run_findings", [], len(row.get("findings") or ())
        yield "megaray_run_checkpoint_overdue", [], int(bool(row.get("unsaved")))
        yield "megaray_run_checkpoint_copies_differ", [], int(bool(row.get("differs")))
        yield "megaray_run_checkpoint_step", ["store"], row.get("checkpoint_step")
        yield "megaray_run_checkpoint_step", ["memory"], row.get("memory_step")
        yield "megaray_run_attempts", [], row.get("attempt")
        yield "megaray_run_lost_steps", [], row.get("lost_steps")
        for cause, count in (row.get("causes") or {}).items():
            yield "megaray_run_incidents", [cause], count
        yield "megaray_run_wandb_behind_bytes", [], wandb_behind(state.run)
        with state.lock:
            if not state.loaded:  # a count of half the lines would look like a counter that began anew
                return
            yield from self._lines(state)
            if state.history is not None:
                yield from _ledger(state, now)

    def _lines(self, state: CachedRun) -> Iterable[tuple[str, list[str], Value]]:
        with_lines = [c for c in state.columns.values() if c.newest is not None]
        yield "megaray_run_trained_steps", [], sum(c.steps_done for c in state.columns.values())
        saves = [c for c in state.columns.values() if c.saved is not None]
        yield "megaray_run_checkpoints", [], sum(c.commits for c in state.columns.values())
        yield "megaray_run_checkpoints_differing", [], sum(c.differing for c in state.columns.values())
        if saves:
            last = saves[-1].saved
            assert last is not None, "just looked"
            yield "megaray_run_checkpoint_timestamp_seconds", [], last.time
            yield "megaray_run_checkpoint_held_seconds", [], last.held
            yield "megaray_run_checkpoint_write_seconds", [], last.seconds
            yield "megaray_run_checkpoint_due_step", [], last.due
        if not with_lines:
            return
        newest = with_lines[-1]
        line = newest.newest
        assert line is not None, "just looked"
        scalars = {
            "loss_nats": line.loss, "auxiliary_loss": line.aux_loss, "learning_rate": line.lr,
            "gradient_norm": line.grad_norm, "tokens_per_second": line.tokens_per_second,
            "step_seconds": line.step_seconds, "mfu_ratio": line.mfu, "memory_bytes": line.memory_bytes,
            "expert_balance_entropy_ratio": line.balance_entropy, "dropped_pairs": line.dropped,
            "skipped_steps": line.skipped, "progress_timestamp_seconds": line.time,
        }  # fmt: skip
        for name, value in scalars.items():
            yield f"megaray_run_{name}", [], value
        yield "megaray_run_loss_finite", [], int(math.isfinite(line.loss) and math.isfinite(line.grad_norm))
        for phase in newest.phases:
            yield "megaray_run_phase_seconds", [phase], line.phase_seconds.get(phase)
        yield "megaray_run_stalled_after_seconds", [], stalled_after(newest)
        evaluated = [line for c in state.columns.values() for line in c.evaluated[-1:]]
        if evaluated:
            yield "megaray_run_validation_loss_nats", [], evaluated[-1].loss
        yield "megaray_run_expert_load_max_over_mean_ratio", [], self._spread(state, newest)

    def _spread(self, state: CachedRun, newest: MetricColumns) -> float | None:
        """Of the newest line, read from the file at most once."""
        key, at = state.run.run_id, int(newest.places["at"][newest.rows - 1])
        known = self._loads.get(key)
        if known is None or known[0] != at:
            try:
                layers = expert_loads(newest.line_bytes(newest.rows - 1))
            except (OSError, ValueError, AttributeError, TypeError):
                layers = []
            spread = [max(layer) * len(layer) / total for layer in layers if (total := sum(layer))]
            known = self._loads[key] = at, max(spread, default=math.nan)
            if len(self._loads) > 2 * _RUNS:
                self._loads.clear()
        return known[1] if math.isfinite(known[1]) else None


def _ledger(state: CachedRun, now: float) -> Iterable[tuple[str, list[str], Value]]:
    made = state.ledger(now)
    for part, seconds in made.seconds.items():
        yield "megaray_run_ledger_seconds", [part.label], seconds
    yield "megaray_run_wall_seconds", [], made.wall
    yield "megaray_run_ettr_ratio", [], made.ettr


def stalled_after(columns: MetricColumns) -> float:
    """Seconds without a line after which something is wrong: many times what the lines before took, and half a minute."""
    times = columns.column("time")[-64:]
    gaps = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
    return max(30.0, 10.0 * float(max(gaps, default=0.0)))


def wandb_behind(run: RunPaths) -> int | None:
    """Bytes that the W&B sink hasn't logged; None where there is no sink."""
    try:
        position = from_json((run.wandb / "cursor.json").read_bytes())
    except (OSError, ValueError):
        return None
    behind = 0
    paths = {"events": run.events} | {str(n): run.attempt(n).metrics for n in run.attempt_numbers()}
    for name, path in paths.items():
        try:
            behind += max(0, path.stat().st_size - int(position.get(name, 0)))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return behind
