"""What is shown of all runs, the queue and the nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from orchestrator.record.cluster_log import NodeRecord
from orchestrator.record.summaries import controller_silence
from orchestrator.web.cached_run import CachedRun
from orchestrator.web.read_model import HomeSnapshot

_DAMAGE = 200
_FAULTS = 8


def row(state: CachedRun, full: bool = False) -> dict[str, Any]:
    """A run's row."""
    known = dict(state.row or {})
    lines = [columns.newest for columns in state.columns.values()]
    line = max((one for one in lines if one is not None), key=lambda one: one.time, default=None)
    known["findings"] = len(known.get("findings") or ())
    known |= {
        "kind": "measure" if known.get("measured") or not known.get("steps") else "train",
        "last_progress": line.time if line else None,
        "finite": known.get("loss") is None or abs(float(known["loss"])) < float("inf"),
        "version": state.version,
    }
    if not full:
        for name in (
            "memory_held",
            "checkpoint_path",
            "checkpoint_seconds",
            "kept",
            "code",
            "folder",
            "causes",
            "unsaved",
            "differs",
        ):
            known.pop(name, None)
    return known


def runs(snapshot: HomeSnapshot, ended: int) -> dict[str, Any]:
    """All runs that haven't ended and the newest of the others."""
    newest = list(reversed(snapshot.runs.values()))
    over = [state for state in newest if state.terminal]
    shown = {id(state) for state in over[:ended]}
    return {
        "as_of": snapshot.as_of,
        "runs": [row(state) for state in newest if not state.terminal or id(state) in shown],
        "left_out": max(0, len(over) - ended),
        "damage": list(snapshot.damage[:_DAMAGE]),
    }


def controller(snapshot: HomeSnapshot, now: float) -> dict[str, Any]:
    """Whether the controller beats."""
    beat = snapshot.beat
    age = None if beat is None else max(0.0, now - beat)
    silent, queue = controller_silence(snapshot.queue, now), snapshot.queue
    return {
        "alive": not silent, "beat": beat, "beat_age": age, "epoch": queue.get("epoch"), "pid": queue.get("controller_pid"),
        "said": silent or "the controller answers",
    }  # fmt: skip


def queue(snapshot: HomeSnapshot, now: float) -> dict[str, Any]:
    """The controller, and who waits for what."""
    waiting = []
    for one in snapshot.queue.get("waiting", []):
        state = snapshot.runs.get(str(one.get("run")))
        known: Mapping[str, Any] = (state.row if state else None) or {}
        waiting.append(
            {
                "run": one.get("run"),
                "position": one.get("position"),
                "reason": one.get("reason", ""),
                "priority": known.get("priority"),
                "owner": known.get("owner"),
                "model": known.get("model"),
                "slots": known.get("asked_slots"),
                "queued_at": known.get("queued_at"),
            }
        )
    return {
        "as_of": snapshot.as_of,
        "controller": controller(snapshot, now),
        "waiting": waiting,
        "parked": list(snapshot.queue.get("parked", [])),
        "damage": [str(text) for text in snapshot.queue.get("damage", [])][:_DAMAGE],
    }


def nodes(snapshot: HomeSnapshot) -> dict[str, Any]:
    """Nodes that Ray lists, and those of the cluster's log that it doesn't."""
    rows, met = [], set()
    for one in snapshot.queue.get("nodes", []):
        met.add(one.get("ip"))
        rows.append(dict(one) | {"here": True} | _record(snapshot.nodes.nodes.get(one.get("ip"))))
    for ip, record in snapshot.nodes.nodes.items():
        if ip not in met:
            rows.append(
                {
                    "ip": ip, "hostname": record.hostname, "node_id": next(iter(record.node_ids), ""),
                    "slots": record.slots, "free": {}, "runs": [], "barred": "", "spare": record.spare is not None,
                    "suspicion": 0.0, "labels": record.labels, "here": False,
                }
                | _record(record)
            )  # fmt: skip
    return {"as_of": snapshot.as_of, "nodes": rows}


def _record(record: NodeRecord | None) -> dict[str, Any]:
    if record is None:
        return {"cordon": None, "drain": None, "check": "", "left": 0, "faults": []}
    return {
        "cordon": asdict(record.cordon) if record.cordon else None,
        "drain": asdict(record.drain) if record.drain else None,
        "check": record.check,
        "left": len(record.left),
        "faults": [
            {"run": f.run, "cause": f.cause, "amount": f.amount, "detail": f.detail}
            for f in record.faults[-_FAULTS:]
        ],
    }
