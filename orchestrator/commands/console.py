"""What a person sees: plain text in fixed columns, from the data of `orchestrator.record.reading`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from configs.metrics import (
    EndedLine,
    EvaluatedLine,
    MeasuredLine,
    MetricLine,
    ResumedLine,
    SavedLine,
    SaveFailedLine,
    StepLine,
)
from configs.paths import HomePaths, RunPaths
from orchestrator import PROGRAM
from orchestrator.commands.text import clock, count, indented, plural, short, size, span, table
from orchestrator.record import reading
from orchestrator.record.events import Decided, Event, FabricFinding, IncidentClosed, IncidentOpened, Moved
from orchestrator.record.reading import Follower, RunSummary
from orchestrator.record.states import State

_POLL_SECONDS = 0.5
_PLAIN_EVERY = 10.0
"""Seconds between progress lines where they can't be rewritten in place."""


def plan_table(plan: dict[str, Any]) -> str:
    """The plan before the start: what will run, what it takes, and why each automatic choice."""
    axes = " ".join(f"{axis}={n}" for axis, n in plan["layout"].items() if n > 1) or "one rank"
    parameters, memory = plan["parameters"], plan["memory"]
    nodes = f"{plural(plan['nodes'], 'node')} x {plan['slots_per_node']} slots"
    parts = ", ".join(f"{name} {size(n)}" for name, n in memory.items())
    layout = f"{axes}: {plural(plan['ranks'], 'rank')} on {nodes} of cluster {plan['cluster']}"
    if plan["measures"]:
        rows = [
            ("measure", plan["measures"]),
            ("hardware", plan["hardware"]),
            ("device", plan["device"]),
            ("layout", layout),
        ]
    else:
        of_them = f"{count(parameters['total'])} parameters, {count(parameters['active'])} active"
        steps = f"{count(plan['tokens_per_step'])} per step, {plan['steps']} steps, {count(plan['tokens'])} in all"
        rows = [
            ("model", f"{plan['model']}: {of_them}"),
            ("hardware", f"{plan['hardware']}, {plan['precision']}; MFU {plan['mfu_basis']}"),
            ("device", plan["device"]),
            ("layout", layout),
            ("engine", _engine(plan)),
            ("fullest rank", f"{size(sum(memory.values()))} (estimate: {parts})"),
            ("step time", step_time(plan["step_time"], plan["tokens_per_step"])),
            ("tokens", steps),
            ("data", str(plan["data"])),
        ]
    text = table(rows)
    if plan["choices"]:
        chosen = [(c["field"], "=", c["value"], c["reason"]) for c in plan["choices"]]
        text += "\nchosen for you\n" + indented(table(chosen))
    for warning in plan["warnings"]:
        text += f"\nwarning: {warning}"
    for note in plan["notes"]:
        text += f"\nnote: {note}"
    return text


def _engine(plan: dict[str, Any]) -> str:
    """What trains, and how."""
    again = "nothing recomputed" if plan["recompute"] == "none" else f"{plan['recompute']} recomputation"
    told = [plan["engine"], plan["optimizer"], f"ZeRO {plan['zero']}", again]
    if plan["layout"]["pp"] > 1:
        told.append(
            f"schedule {plan['schedule']}"
            + (f", {plan['chunks']} chunks a rank" if plan["chunks"] > 1 else "")
        )
    if plan["layout"]["cp"] > 1:
        told.append(f"context by {plan['context']}")
    return ", ".join(told)


def step_time(predicted: dict[str, Any], tokens: int) -> str:
    """The predicted time of a step with its interval, or why there is none."""
    if "unknown" in predicted:
        return f"unknown: {predicted['unknown']}"
    seconds, low, high = (predicted[name] for name in ("seconds", "low", "high"))
    return f"{seconds:.3g} s predicted ({low:.3g} to {high:.3g} s), {count(tokens / seconds)} tokens/s"


def run_list(rows: Sequence[RunSummary]) -> str:
    """The table of `list`."""
    if not rows:
        return f"no runs yet; `{PROGRAM} submit` starts one"
    head = ("RUN", "STATE", "PRIO", "SLOTS", "STEP", "LOSS", "TOK/S", "ETA", "INCIDENTS", "NOTE")
    body = [
        (
            row.run_id, row.state, str(row.priority), str(row.slots), f"{row.step}/{row.steps}",
            "-" if row.loss is None else f"{row.loss:.4f}",
            "-" if row.tokens_per_second is None else count(row.tokens_per_second),
            span(row.eta_seconds), str(row.incidents), _note(row),
        )
        for row in rows
    ]  # fmt: skip
    return table([head, *body], right=(2, 3, 4, 5, 6, 7, 8))


def source(tree: dict[str, Any]) -> str:
    """What a new run begins from."""
    counted = [f"{count(tree[name])} {name}" for name in ("samples", "tokens") if tree[name] is not None] + (
        [f"loss {tree['loss']:.4f}"] if tree["loss"] is not None else []
    )
    told = f" ({', '.join(counted)})" if counted else ""
    text = table([("resume", f"step {tree['step']} of {tree['run']}{told}: {short(tree['path'])}")])
    return text + ("\notherwise than there\n" + _changes(tree["differences"]) if tree["differences"] else "")


def amended(tree: dict[str, Any]) -> str:
    """What a resume changes, and what follows from it."""
    rows = [("resume", f"{tree['run']} from {tree['from']}")]
    text = table(rows) + "\nchanges\n" + _changes(tree["changes"])
    return "\n".join([text, *tree["consequences"]])


def _changes(rows: Sequence[Sequence[str]]) -> str:
    return indented(table([(name, before, "->", now) for name, before, now in rows]))


def _note(row: RunSummary) -> str:
    if row.position is not None:
        return f"position {row.position}: {row.waiting_for}"
    if row.saves:
        return row.saves
    return row.waiting_for or (row.detail if row.state in (State.FAILED, State.RECOVERING) else "")


def status(row: RunSummary, found: Sequence[dict[str, Any]]) -> str:
    """One run in full."""
    axes = " ".join(f"{axis}={n}" for axis, n in row.layout.items() if n > 1) or "one rank"
    why = f" ({row.reason})" + (f": {row.detail}" if row.detail else "")
    rows = [
        ("run", row.run_id),
        ("state", row.state + why),
        ("model", f"{row.model}, {axes}, {row.slots} slots, priority {row.priority}"),
        (
            "submitted",
            f"{clock(row.submitted_at)}, started {clock(row.started_at)}, ended {clock(row.ended_at)}",
        ),
    ]
    if row.position is not None:
        rows.append(("queue", f"position {row.position}: {row.waiting_for}"))
    if row.nodes:
        rows.append(("nodes", ", ".join(row.nodes)))
    if row.loss is not None:
        rows.append(("progress", _progress(row)))
    if row.measured:
        rows.append(("progress", row.measured))
    rows += _findings(row)
    if row.checkpoint_path:
        took = _took(row.checkpoint_seconds or 0.0, row.checkpoint_held or 0.0)
        rows.append(("checkpoint", f"step {row.checkpoint_step} ({took}): {row.checkpoint_path}"))
    if row.memory_step is not None:
        rows.append(("in memory", f"step {row.memory_step} (training held {row.memory_held or 0.0:.2f} s)"))
    if row.saves:
        rows.append(("saves", row.saves))
    rows.append(("attempts", f"{row.attempt}, {plural(len(found), 'incident')}"))
    rows.append(("folder", row.folder))
    if row.next_step:
        rows.append(("next", row.next_step))
    return table(rows)


def _took(seconds: float, held: float) -> str:
    return f"in {seconds:.2f} s, training held {held:.2f} s"


def _findings(row: RunSummary) -> list[tuple[str, str]]:
    """What a measurement found, a line each, and that it found nothing."""
    if not row.findings:
        return [("findings", "none")] if row.measured and row.terminal else []
    return [("finding", f"{f['severity']} {f['kind']}: {f['what']} ({f['action']})") for f in row.findings]


def _progress(row: RunSummary) -> str:
    assert row.loss is not None and row.tokens_per_second is not None and row.step_seconds is not None
    return progress(
        row.step, row.steps, row.loss, row.tokens_per_second, row.step_seconds, row.mfu, row.eta_seconds
    )


def progress(
    step: int, steps: int, loss: float, rate: float, seconds: float, mfu: float | None, eta: float | None
) -> str:
    """The one line of a running run."""
    share = f"{mfu:.1%}" if mfu is not None else "n/a"
    return (
        f"step {step}/{steps} ({step / steps:.1%}) | loss {loss:.4f} | {count(rate)} tok/s | "
        f"{seconds:.3f} s/step | mfu {share} | eta {span(eta)}"
    )


def nodes(queue: dict[str, Any]) -> str:
    """The table of `nodes`."""
    rows = [("NODE", "HOST", "SLOTS", "FREE", "RUNS")]
    for node in queue.get("nodes", []):
        kind = "GPU" if node["slots"].get("GPU") else "CPU"
        rows.append(
            (node["ip"], node["hostname"], f"{node['slots'][kind]} {kind}", str(node["free"][kind]),
             ", ".join(node["runs"]) or "-")
        )  # fmt: skip
    return table(rows, right=(3,)) if len(rows) > 1 else "no live nodes"


def incidents(found: Sequence[dict[str, Any]]) -> str:
    """What broke, where, when, what it cost."""
    if not found:
        return "no incidents"
    blocks = []
    for one in found:
        rank = "the gang" if one["rank"] is None else f"rank {one['rank']}"
        where = rank + (f" on {one['node']}" if one["node"] else "")
        predicted = one["predicted_steps"]
        expected = f"{predicted:.3g} steps predicted" if predicted is not None else ""
        cost = f"not known yet{', ' if expected else ''}{expected}"
        if one["stops_nothing"]:
            cost = "none: training goes on"
        elif one["downtime_seconds"] is not None:
            again = f"{one['lost_steps']} steps trained again" + (f" ({expected})" if expected else "")
            cost = f"{again}, {one['downtime_seconds']:.1f} s without training"
        rows = [
            ("what", f"{one['cause']}: {one['detail']}"),
            ("where", f"{where}, attempt {one['attempt']}, after step {one['step']}"),
            ("when", clock(one["opened"])),
            ("cost", cost),
            ("outcome", one["resolution"]),
            ("evidence", one["evidence"]),
        ]
        blocks.append(f"incident {one['incident']}\n" + indented(table(rows)))
    return "\n".join(blocks)


def submitted(run: RunPaths) -> str:
    """What to type next, after a submission."""
    rows = [
        ("watch it", f"{PROGRAM} watch {run.run_id}"),
        ("read a rank", f"{PROGRAM} logs {run.run_id} --rank 0"),
        ("stop it", f"{PROGRAM} cancel {run.run_id}"),
    ]
    return f"submitted {run.run_id}\n" + indented(table(rows))


def final_summary(row: RunSummary, run: RunPaths) -> str:
    """The end of a run: result, cost, where things are, what to type next."""
    wall = None if row.started_at is None or row.ended_at is None else row.ended_at - row.started_at
    rows = [("state", row.state + (f": {row.detail}" if row.detail else ""))]
    if row.loss is not None:
        rows.append(
            ("final loss" if row.step == row.steps else "last loss", f"{row.loss:.4f} at step {row.step}")
        )
    done = f"measured {plural(row.step, 'case')}" if row.measured else f"trained {count(row.tokens)} tokens"
    cost = f"{plural(row.attempt, 'attempt')}, {plural(row.incidents, 'incident')}"
    rows += [("done", f"{done} in {span(wall)}, {cost}"), *_findings(row), ("folder", short(row.folder))]
    if row.checkpoint_path:
        rows.append(("checkpoint", short(row.checkpoint_path)))
    if row.saves:
        rows.append(("saves", row.saves))
    if run.wandb.exists():
        rows.append(
            (
                "W&B",
                f"{short(str(run.wandb))} (offline: wandb sync {short(str(run.wandb))}/wandb/offline-run-*)",
            )
        )
    report = f"python -m collectives report {row.run_id}"
    following = row.next_step or (report if row.measured else f"{PROGRAM} status {row.run_id}")
    if row.incidents:
        following += f"; {PROGRAM} incidents {row.run_id}"
    rows.append(("next", following))
    return f"{row.run_id}\n" + indented(table(rows))


class LiveLine:
    """The progress line: rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._now = now
        self._terminal = stream.isatty()
        self._shown = ""
        self._printed_at: float | None = None

    def update(self, text: str) -> None:
        """Show the newest state."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + text[:width].ljust(min(len(self._shown), width)))
            self._shown = text[:width]
        elif text != self._shown and (
            self._printed_at is None or self._now() - self._printed_at >= _PLAIN_EVERY
        ):
            self._stream.write(text + "\n")
            self._shown, self._printed_at = text, self._now()
        self._stream.flush()

    def end(self) -> None:
        """Leave the progress line standing."""
        if self._terminal and self._shown:
            self._stream.write("\n")
        self._shown = ""

    def above(self, text: str) -> None:
        """Print a line that stays, above the progress line."""
        if self._terminal and self._shown:
            self._stream.write("\r" + " " * len(self._shown) + "\r")
        self._stream.write(text + "\n")
        if self._terminal and self._shown:
            self._stream.write(self._shown)
        self._stream.flush()


def watch(
    run: RunPaths, home: HomePaths, stream: TextIO, sleep: Callable[[float], None] = time.sleep
) -> State:
    """Follow a run until it ends; its final state."""
    follower, line = Follower(run), LiveLine(stream)
    steps = reading.summary(run, {}).steps
    while True:
        newest: StepLine | MeasuredLine | None = None
        state: State | None = None
        for item in follower.poll():
            if isinstance(item, StepLine | MeasuredLine):
                newest = item
            elif (text := _told(item)) is not None:
                line.above(text)
            if isinstance(item, Event) and isinstance(item.payload, Moved):
                state = item.payload.to
        if isinstance(newest, MeasuredLine):
            line.update(newest.text)
        elif newest is not None:
            eta = (steps - newest.step) * newest.step_seconds
            line.update(
                progress(
                    newest.step,
                    steps,
                    newest.loss,
                    newest.tokens_per_second,
                    newest.step_seconds,
                    newest.mfu,
                    eta,
                )
            )
        if state is not None and state.terminal:
            line.end()
            return state
        row = reading.summary(run, reading.read_queue(home))
        if row.position is not None:
            line.update(f"queued, position {row.position}: {row.waiting_for}")
        sleep(_POLL_SECONDS)


def _told(item: Event | MetricLine) -> str | None:
    """A line for what is worth one; None for the rest."""
    at = time.strftime("%H:%M:%S", time.localtime(item.time))
    match item:
        case Event(payload=Moved() as move):
            return f"{at} {move.to}" + (f": {move.detail}" if move.detail else "")
        case Event(payload=IncidentOpened() as incident):
            return f"{at} incident {incident.incident}: {incident.detail}"
        case Event(payload=Decided(action="warn") as decided):
            return f"{at} warning: {decided.detail}"
        case Event(payload=Decided() as decided):
            used = f"{decided.restarts_used} of {decided.restarts_allowed} restarts without progress"
            return (
                f"{at} decision: {decided.action} ({decided.reason}; {used}; wait {decided.wait_seconds:g} s)"
            )
        case Event(payload=IncidentClosed() as closed):
            again = f", {closed.lost_steps} steps again" if closed.lost_steps else ""
            return f"{at} incident {closed.incident} is over: {closed.resolution}{again}"
        case ResumedLine(step=step) if step:
            return f"{at} resumed from step {step}"
        case EvaluatedLine():
            return f"{at} step {item.step}: loss {item.loss:.4f} on {item.samples} held-out samples"
        case SavedLine(tier="store"):
            return f"{at} saved step {item.step} ({size(item.bytes)} {_took(item.seconds, item.held)})"
        case SaveFailedLine(in_a_row=0):
            return f"{at} step {item.step} was not saved: {item.error}"
        case SaveFailedLine():
            return f"{at} the save of step {item.step} failed, {item.in_a_row} in a row: {item.error}"
        case Event(payload=FabricFinding(finding=found)):
            return f"{at} {found['severity']} {found['kind']}: {found['what']}"
        case EndedLine():
            return (
                f"{at} measured {item.step} cases" if item.loss is None else f"{at} trained {item.step} steps"
            )
    return None


def show_log(path: Any, stream: TextIO, follow: RunPaths | None) -> None:
    """Print a log; with `follow`, go on until that run has ended."""
    with path.open(errors="replace") as file:
        while True:
            stream.write(file.read())
            stream.flush()
            if follow is None or reading.summary(follow, {}).terminal:
                stream.write(file.read())
                return
            time.sleep(_POLL_SECONDS)
