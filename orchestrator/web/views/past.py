"""What is shown of a run's past: its time axis, its ledger, its attempts, saves and incidents."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.metrics import SavedLine, SaveFailedLine
from configs.paths import RunPaths
from orchestrator.record.history import RunHistory
from orchestrator.record.ledger import Ledger
from orchestrator.record.partition import MEANINGS, TimePart
from orchestrator.record.view import RESTARTS
from orchestrator.web.cached_run import CachedRun

_SPANS = 600
_MARKS = 2000
_SAVES = 500
_EVIDENCE_FILES = 200


def history_of(state: CachedRun) -> RunHistory:
    """The run's past; an empty one where nothing is read of it yet."""
    return state.history or RunHistory()


def time_axis(state: CachedRun, now: float) -> dict[str, Any]:
    """What the run did, as intervals that cover all of it, and what happened when."""
    history, made = history_of(state), state.ledger(now)
    spans = made.partition.spans(_SPANS)
    rows = [
        {"from": begin + made.offset, "to": end + made.offset, "part": part.label, "attempt": attempt}
        for begin, end, part, attempt in spans
    ]
    marks = history.marks[-_MARKS:]
    return {
        "begin": rows[0]["from"] if rows else None,
        "end": rows[-1]["to"] if rows else None,
        "parts": [part.label for part in TimePart],
        "spans": rows,
        "marks": [asdict(mark) for mark in marks],
        "rewinds": list(_rewinds(state)),
        "left_out": history.left_out + len(history.marks) - len(marks),
    }


def _last_step(state: CachedRun, number: int) -> int | None:
    columns = state.columns.get(number)
    return int(columns.places["step"][columns.rows - 1]) if columns is not None and columns.rows else None


def _rewinds(state: CachedRun) -> Iterable[dict[str, Any]]:
    history = history_of(state)
    for before, own in itertools.pairwise(history.attempts.values()):
        last = _last_step(state, before.number)
        if own.resumed_step is not None and last is not None and own.resumed_step < last:
            yield {"time": own.resumed, "from_step": last, "to_step": own.resumed_step, "attempt": own.number}


def ledger(state: CachedRun, now: float) -> dict[str, Any]:
    """Where the run's time went."""
    made = state.ledger(now)
    wall = made.wall
    tokens = (state.row or {}).get("tokens") or 0
    held = wall - made.seconds[TimePart.IDLE] - made.seconds[TimePart.WAITING]
    return {
        "wall_seconds": wall,
        "running": not state.terminal,
        "ettr": made.ettr,
        "ettr_held": made.ettr_held,
        "goodput_tokens_per_second": tokens / held if held > 0 else None,
        "parts": [
            {"part": part.label, "seconds": seconds, "share": seconds / wall if wall > 0 else 0.0, "means": MEANINGS[part]}
            for part, seconds in made.seconds.items()
        ],
        "by_attempt": [
            {"attempt": n, "parts": {p.label: s for p, s in made.partition.totals(n).items() if s > 0}}
            for n in sorted(history_of(state).attempts)
        ],
        "incidents": [{"incident": n} | cost for n, cost in _costs(state, made).items()],
    }  # fmt: skip


def _costs(state: CachedRun, made: Ledger) -> dict[int, dict[str, float]]:
    """By incident that ended an attempt, what it cost. Of several of one attempt, the last one ended it."""
    ended = {
        opened.attempt: number
        for number, (_, opened) in history_of(state).incidents.items()
        if _stops(state, number)
    }
    return {number: made.incident(attempt) for attempt, number in ended.items()}


def _stops(state: CachedRun, number: int) -> bool:
    history = history_of(state)
    own = history.attempts.get(history.incidents[number][1].attempt)
    cause = history.incidents[number][1].cause
    return own is not None and own.decision is not None and cause != "checkpoint_overdue"


def attempts(state: CachedRun) -> list[dict[str, Any]]:
    """Each attempt: when, where, from which step to which, and how it ended."""
    history, rows = history_of(state), []
    begun = [(a.number, a.resumed_step) for a in history.attempts.values() if a.resumed_step is not None]
    for own in history.attempts.values():
        columns, last = state.columns.get(own.number), _last_step(state, own.number)
        later = min(
            (step for number, step in begun if number > own.number and step is not None), default=None
        )
        resumed = columns.resumed if columns else None
        rows.append(
            {
                "attempt": own.number, "placed": own.placed, "started": own.started, "resumed": own.resumed,
                "resumed_step": own.resumed_step, "first_step": own.first_step, "ended": own.ended, "last_step": last,
                "lost_from": later + 1 if later is not None and last is not None and later < last else None,
                "end": own.end, "reason": own.reason, "layout": own.layout, "ranks": own.ranks, "nodes": own.nodes,
                "saves": own.saves, "again": own.again, "facts": resumed.facts if resumed else {},
                "mfu_basis": resumed.mfu_basis if resumed else "",
            }
        )  # fmt: skip
    return rows


def checkpoints(state: CachedRun, every: int | None) -> dict[str, Any]:
    """Saves, newest first."""
    history = history_of(state)
    begun = {a.number: a.resumed_step for a in history.attempts.values() if a.resumed_step is not None}
    rows: list[dict[str, Any]] = []
    seen = 0
    for number, columns in state.columns.items():
        later = min((step for other, step in begun.items() if other > number), default=None)
        seen += columns.saves_seen
        for line in columns.saves:
            good = isinstance(line, SavedLine)
            rows.append(
                {
                    "time": line.time, "attempt": line.attempt, "step": line.step,
                    "tier": line.tier if isinstance(line, SavedLine) else "store",
                    "path": line.path if isinstance(line, SavedLine) else None,
                    "bytes": line.bytes if isinstance(line, SavedLine) else None,
                    "seconds": line.seconds if isinstance(line, SavedLine) else None,
                    "held": line.held if isinstance(line, SavedLine) else None,
                    "due": line.due if isinstance(line, SavedLine) else None,
                    "differs": line.differs if isinstance(line, SavedLine) else "",
                    "error": line.error if isinstance(line, SaveFailedLine) else None,
                    "lost": good and later is not None and line.step > later,
                }
            )  # fmt: skip
    rows.sort(key=lambda one: -one["time"])
    stored = next((one for one in rows if one["error"] is None and one["tier"] == "store"), None)
    due = None
    if stored is not None and not state.terminal:
        due = stored["due"] if stored["due"] is not None else (stored["step"] + every if every else None)
    return {
        "every": every, "due": due, "overdue": (state.row or {}).get("saves", ""), "saves": rows[:_SAVES],
        "left_out": max(0, seen - min(len(rows), _SAVES)),
    }  # fmt: skip


def incidents(state: CachedRun, now: float) -> dict[str, Any]:
    """What broke, with its evidence, verdicts, decision and cost; newest first."""
    history = history_of(state)
    costs = _costs(state, state.ledger(now))
    rows = []
    for number, (opened, event) in sorted(history.incidents.items(), reverse=True):
        closed, outcome = history.closed.get(number, (None, None))
        own = history.attempts.get(event.attempt)
        decision = own.decision if own and number in costs else None
        rows.append(
            asdict(event)
            | {
                "opened": opened,
                "closed": closed,
                "resolution": outcome.resolution if outcome else "open",
                "stops_nothing": event.cause == "checkpoint_overdue",
                "lost_steps": outcome.lost_steps if outcome else None,
                "downtime_seconds": outcome.downtime_seconds if outcome else None,
                "dossier": evidence_files(state.run, event.attempt),
                "verdicts": [
                    {"time": v.get("time"), "kind": v.get("kind"), "rank": v.get("rank"), "node": v.get("node"),
                     "detail": v.get("detail", "")}
                    for v in (own.verdicts if own else [])
                ],
                "decision": None
                if decision is None
                else {
                    name: getattr(decision, name)
                    for name in ("action", "reason", "restarts_used", "restarts_allowed", "wait_seconds", "detail")
                },
                "restarts": decision is not None and decision.action in RESTARTS,
                "cost": costs.get(number),
            }
        )  # fmt: skip
    return {"incidents": rows, "findings": list((state.row or {}).get("findings") or [])}


def evidence_files(run: RunPaths, attempt: int) -> list[dict[str, Any]]:
    """Files that were kept of an attempt before its ranks were stopped."""
    folder = run.attempt(attempt).evidence
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
    except OSError:
        return []
    return [
        {
            "name": str(path.relative_to(folder)),
            "bytes": _size(path),
            "rank": _rank(path.name),
            "what": _what(path.name),
        }  # fmt: skip
        for path in paths[:_EVIDENCE_FILES]
    ]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _rank(name: str) -> int | None:
    first = name.split(".", 1)[0]
    return int(first) if first.isdigit() else None


def _what(name: str) -> str:
    return {"stack.txt": "stack", "ring.json": "recorder", "seen.json": "waits"}.get(
        name.split(".", 1)[-1], "file"
    )
