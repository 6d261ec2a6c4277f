"""What a person sees: plain text in fixed columns, from the data of `orchestrator.record.summaries`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.paths import RunPaths
from orchestrator import PROGRAM
from orchestrator.commands.text import clean, clock, count, indented, plural, short, span, table
from orchestrator.record.states import State
from orchestrator.record.summaries import RunListing, RunSummary

_PLACES = ("rail", "rack", "nvlink")
"""Labels of a node that placement uses."""
_SAVES_FAIL = "fix the storage that `saves` names, such as its free space; the next save that is due tries again by itself"


def run_list(rows: Sequence[RunSummary], damage: Sequence[str] = (), silent: str = "") -> str:
    """The table of `list`, and below it what can't be read and whether no controller turns."""
    broken = "".join(f"\ndamaged: {clean(text)}" for text in damage) + (f"\n{silent}" if silent else "")
    if not rows:
        return f"no runs yet; `{PROGRAM} submit` starts one{broken}"
    head = ("RUN", "STATE", "OWNER", "PRIO", "SLOTS", "STEP", "LOSS", "TOK/S", "ETA", "INCIDENTS", "NOTE")
    body = [
        (
            row.run_id, row.state, row.owner or "-", str(row.priority), str(row.slots), f"{row.step}/{row.steps}",
            "-" if row.loss is None else f"{row.loss:.4f}",
            "-" if row.tokens_per_second is None else count(row.tokens_per_second),
            span(row.eta_seconds), str(row.incidents), _note(row),
        )
        for row in rows
    ]  # fmt: skip
    return table([head, *body], right=(3, 4, 5, 6, 7, 8, 9)) + broken


def list_notes(listing: RunListing) -> list[str]:
    """What `list --json` writes to standard error, a line each: its rows have no place for it."""
    notes = [f"megaray: {listing.silent}"] if listing.silent else []
    return notes + [f"megaray: damaged: {clean(text)}" for text in listing.damage]


def source(tree: dict[str, Any]) -> str:
    """What a new run begins from."""
    counted = [f"{count(tree[name])} {name}" for name in ("samples", "tokens") if tree[name] is not None] + (
        [f"loss {tree['loss']:.4f}"] if tree["loss"] is not None else []
    )
    counts = f" ({', '.join(counted)})" if counted else ""
    text = table([("resume", f"step {tree['step']} of {tree['run']}{counts}: {short(tree['path'])}")])
    return text + ("\nchanges from that run\n" + _changes(tree["differences"]) if tree["differences"] else "")


def amended(tree: dict[str, Any]) -> str:
    """What a resume changes, and what follows from it."""
    rows = [("resume", f"{tree['run']} from {tree['from']}")]
    text = table(rows) + "\nchanges\n" + _changes(tree["changes"])
    return "\n".join([text, *tree["consequences"]])


def _changes(rows: Sequence[Sequence[str]]) -> str:
    return indented(table([(name, before, "->", now) for name, before, now in rows]))


def continue_hint(row: RunSummary) -> str:
    """What continues a run that was stopped, from where, and why not from its last step."""
    if row.checkpoint_step is None:
        begins = f"{row.next_step} starts it over, since it has no checkpoint"
    else:
        begins = f"{row.next_step} continues it from step {row.checkpoint_step}"
    return f"{begins}: {row.saves}" if row.failed_saves else begins


def _note(row: RunSummary) -> str:
    if row.parked:
        return f"parked: {row.parked}"
    if row.stopping:
        return f"ending: {row.stopping}"
    if row.position is not None:
        return f"position {row.position}: {row.waiting_for}"
    if row.saves:
        return row.saves
    if row.slots != row.asked_slots:
        return f"smaller than asked for: {row.slots} of {row.asked_slots} slots"
    return row.waiting_for or (row.detail if row.state in (State.FAILED, State.RECOVERING) else "")


def status(row: RunSummary, history: Sequence[dict[str, Any]], silent: str = "") -> str:
    """One run in full; `silent` says that no controller turns."""
    why = f" ({row.reason})" + (f": {row.detail}" if row.detail else "")
    rows = [
        ("run", row.run_id),
        ("state", row.state + why),
        *([("controller", silent)] if silent else []),
        ("model", f"{row.model}, {_axes(row.layout)}, {plural(row.slots, 'slot')}, priority {row.priority}"),
        (
            "submitted",
            f"{clock(row.submitted_at)}, started {clock(row.started_at)}, ended {clock(row.ended_at)}",
        ),
    ]
    if row.owner:
        rows.append(("owner", row.owner))
    if row.slots != row.asked_slots:
        rows.append(
            (
                "asked for",
                f"{_axes(row.asked_layout)}, {row.asked_slots} slots: it grows back when they are there",
            )
        )
    if row.stopping:
        rows.append(("ending", row.stopping))
    if row.parked:
        rows.append(
            (
                "parked",
                f"the controller failed on it and tries again later; its ranks continue: {row.parked}",
            )
        )
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
        cost = save_cost(row.checkpoint_seconds or 0.0, row.checkpoint_held or 0.0)
        rows.append(("checkpoint", f"step {row.checkpoint_step} ({cost}): {row.checkpoint_path}"))
    if row.memory_step is not None:
        rows.append(("in memory", f"step {row.memory_step} (training held {row.memory_held or 0.0:.2f} s)"))
    if row.saves:
        rows.append(("saves", row.saves))
    rows.append(("attempts", f"{row.attempt}, {plural(len(history), 'incident')}"))
    if row.kept:
        rows.append(("stacks", row.kept))
    rows += [("damaged", text) for text in row.damage]
    rows.append(("folder", row.folder))
    if row.next_step:
        rows.append(("next", row.next_step))
    elif row.failed_saves and not row.terminal:
        rows.append(("next", _SAVES_FAIL))
    return table(rows)


def _axes(layout: dict[str, int]) -> str:
    return " ".join(f"{axis}={n}" for axis, n in layout.items() if n > 1) or "one rank"


def save_cost(seconds: float, held: float) -> str:
    """What a save cost, in seconds."""
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
    rows = [("NODE", "HOST", "SLOTS", "FREE", "RUNS", "MARKS")]
    for node in queue.get("nodes", []):
        kind = "GPU" if node["slots"].get("GPU") else "CPU"
        rows.append(
            (node["ip"], node["hostname"], f"{node['slots'].get(kind, 0)} {kind}", str(node["free"].get(kind, 0)),
             ", ".join(node["runs"]) or "-", _marks(node))
        )  # fmt: skip
    return table(rows, right=(3,)) if len(rows) > 1 else "no live nodes"


def _marks(node: dict[str, Any]) -> str:
    """What keeps runs from a node, or makes it a later choice."""
    marks = [node["barred"]] if node.get("barred") else []
    marks += ["spare"] if node.get("spare") else []
    marks += [f"suspicion {node['suspicion']:.2g}"] if node.get("suspicion", 0.0) >= 0.05 else []
    labels = node.get("labels") or {}
    marks += [f"{name} {labels[name]}" for name in _PLACES if name in labels]
    return ", ".join(marks) or "-"


def incidents(listed: Sequence[dict[str, Any]]) -> str:
    """What broke, where, when, what it cost."""
    if not listed:
        return "no incidents"
    blocks = []
    for one in listed:
        rank = "the gang" if one["rank"] is None else f"rank {one['rank']}"
        where = rank + (f" on {one['node']}" if one["node"] else "")
        predicted = one["predicted_steps"]
        expected = f"{predicted:.3g} steps predicted" if predicted is not None else ""
        cost = f"not known yet{', ' if expected else ''}{expected}"
        if one["stops_nothing"]:
            cost = "none: training continues"
        elif one["downtime_seconds"] is not None:
            again = f"{plural(one['lost_steps'], 'step')} trained again" + (
                f" ({expected})" if expected else ""
            )
            cost = f"{again}, {one['downtime_seconds']:.1f} s without training"
            unnoticed = one["unnoticed_seconds"]
            cost += f", {unnoticed:.1f} s of them until it was found" if unnoticed >= 0.1 else ""
        # An attempt that ends in its start hasn't said which step it would begin at.
        after = f"after step {one['step']}" if one["step"] else "before its first step"
        rows = [
            ("what", f"{one['cause']}: {one['detail']}"),
            ("where", f"{where}, attempt {one['attempt']}, {after}"),
            ("when", clock(one["opened"])),
            ("cost", cost),
            ("outcome", one["resolution"]),
            ("evidence", one["evidence"]),
            *([("stacks", one["stacks"])] if one["stacks"] else []),
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
