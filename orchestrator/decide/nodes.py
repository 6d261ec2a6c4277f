"""The life of nodes: who came and went, whom to suspect, whom to bar. Pure.

All functions take the nodes as the cluster's log tells of them and answer with the events to write into it; `clock` is
that log's, in seconds (`EventLog.clock`). Told the same twice, they have nothing to write the second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from configs.errors import UserError, nearest
from faulttol.verdicts import Verdict
from orchestrator import PROGRAM
from orchestrator.decide.placement import Node
from orchestrator.decide.queue import RunningRun
from orchestrator.record.cluster_log import (
    Cordoned,
    Draining,
    NodeChecked,
    NodeJoined,
    NodeLeft,
    NodeMark,
    NodeRecord,
    NodesView,
    Payload,
    SpareMarked,
    SpareUnmarked,
    Suspected,
    Uncordoned,
)

QUARANTINE_SECONDS = 60.0
"""Seconds that a node whose agent fell silent is kept out; Ray's health checks have reported it by then."""
HALF_LIFE_SECONDS = 6 * 3600.0
"""Seconds in which a suspicion falls to half."""
WINDOW_SECONDS = 3600.0
"""Seconds in which a node's faults are counted."""
MAX_FAULTS = 3
"""Faults of the node itself, or departures, within `WINDOW_SECONDS` that cordon it."""
MAX_CORDONED_SHARE = 0.1
"""Of the live nodes, that the controller cordons by itself at most: beyond that it is rather something that they share,
or what judged them, that is broken. One it may always."""

SUSPICION_BY_VERDICT = {
    "node_lost": 1.0, "agent_lost": 1.0, "node_unfit": 1.0, "replicas_differ": 1.0,
    "hang": 0.5, "start_timeout": 0.5, "rank_exit": 0.25,
}  # fmt: skip
"""How far a kind of verdict points to the node that it names. What a rank does is mostly its program's."""
_SILENT = ("node_lost", "agent_lost")
_SOUND = 0.05
"""Suspicion below this counts as none, so that old faults don't scatter gangs."""


def observe(view: NodesView, nodes: Sequence[Node], clock: float) -> list[Payload]:
    """What to write about the nodes that are live now: who joined, left, changed, or failed its check.

    A node that has left `MAX_FAULTS` times in a `WINDOW_SECONDS` and is back once more is cordoned.

    Args:
        view: the nodes so far.
        nodes: all live ones, as the cluster lists them; `barred` is what a node's own check found.
        clock: the log's.
    """
    known = view.nodes
    left = {ip for ip, record in known.items() if record.live}
    news: dict[str, list[Node]] = {}
    for node in nodes:
        record = known.get(node.ip)
        left.discard(node.ip)
        # Almost always all is as it was, and a cluster has thousands of nodes.
        if record is None or not _as_known(node, record):
            news.setdefault(node.ip, [])
    for node in nodes:
        if node.ip in news:
            news[node.ip].append(node)
    payloads: list[Payload] = [NodeLeft(ip) for ip in sorted(left)]
    if not news:
        return payloads
    cordons = _CordonBudget(view, len({node.ip for node in nodes}))
    for ip, here in sorted(news.items()):
        payloads += _node_events(known.get(ip) or NodeRecord(ip), here, clock, cordons)
    return payloads


def _as_known(node: Node, record: NodeRecord) -> bool:
    return (
        record.live
        and record.node_ids == (node.node_id,)
        and record.check == node.barred
        and record.slots == node.slots
        and record.hostname == node.hostname
        and record.labels == node.labels
    )


def _node_events(
    record: NodeRecord, here: Sequence[Node], clock: float, cordons: _CordonBudget
) -> list[Payload]:
    """What to write about one address."""
    payloads: list[Payload] = []
    joined = _joined(record.ip, here)
    if not record.live or joined != NodeJoined(
        record.ip, record.hostname, record.node_ids, record.slots, record.labels
    ):
        payloads.append(joined)
    error = next((node.barred for node in here if node.barred), "")
    # The words may hold figures that change at every look.
    if bool(error) != bool(record.check) or (
        error != record.check and clock - record.checked >= WINDOW_SECONDS
    ):
        payloads.append(NodeChecked(record.ip, error))
    lately = sum(clock - at < WINDOW_SECONDS for at in record.left)
    if not record.live and lately >= MAX_FAULTS:
        payloads += cordons.cordon(
            record.ip, f"flapping: it left {lately} times in {WINDOW_SECONDS / 60:.0f} min"
        )
    return payloads


def _joined(ip: str, here: Sequence[Node]) -> NodeJoined:
    slots: dict[str, int] = {}
    for node in here:
        for resource, count in node.slots.items():
            slots[resource] = slots.get(resource, 0) + count
    labels = {name: value for node in here for name, value in node.labels.items()}
    return NodeJoined(ip, here[0].hostname, tuple(sorted(node.node_id for node in here)), slots, labels)


def with_marks(nodes: Sequence[Node], view: NodesView, clock: float) -> list[Node]:
    """The nodes with `barred`, `spare` and `suspicion` filled in; its check, a cordon, a drain or silence bars a node."""
    return [_with_marks(node, view.nodes.get(node.ip), clock) for node in nodes]


def _with_marks(node: Node, record: NodeRecord | None, clock: float) -> Node:
    if record is None or not (record.cordon or record.drain or record.spare or record.faults):
        return node
    barred = node.barred
    if record.drain is not None:
        barred = f"draining: {record.drain.reason}"
    elif record.cordon is not None:
        barred = f"cordoned: {record.cordon.reason}"
    elif not barred:
        barred = _quarantine_reason(record, clock)
    doubt = suspicion(record, clock)
    if (barred, record.spare is not None, doubt) == (node.barred, node.spare, node.suspicion):
        return node
    return replace(node, barred=barred, spare=record.spare is not None, suspicion=doubt)


def _quarantine_reason(record: NodeRecord, clock: float) -> str:
    """Why a node is in quarantine; empty where it isn't. One that has joined since is not."""
    for fault in reversed(record.faults):
        if (
            fault.cause in _SILENT
            and clock - fault.clock < QUARANTINE_SECONDS
            and record.joined <= fault.clock
        ):
            return f"out for {QUARANTINE_SECONDS:.0f} s: {fault.detail}"
    return ""


def suspicion(record: NodeRecord, clock: float) -> float:
    """How far a node was at fault lately: its faults, each half as much after every `HALF_LIFE_SECONDS`; to one decimal."""
    halves = [int(max(0.0, clock - fault.clock) // HALF_LIFE_SECONDS) for fault in record.faults]
    total = sum(fault.amount * math.ldexp(1.0, -h) for fault, h in zip(record.faults, halves, strict=True))
    return round(total, 1) if total >= _SOUND else 0.0


def suspicion_events(
    view: NodesView, verdict: Verdict, run_id: str, ip: str | None, clock: float
) -> list[Payload]:  # fmt: skip
    """What to write about the node of the verdict that ended an attempt; nothing where it points to none.

    `MAX_FAULTS` faults of the node itself within `WINDOW_SECONDS` cordon it. Written once for each incident, when it opens.

    Args:
        view: the nodes so far.
        verdict: the one that the incident is named after.
        run_id: the run that it ended.
        ip: address of the node; None where the verdict names none.
        clock: the log's.
    """
    kind = str(verdict.kind)
    amount = SUSPICION_BY_VERDICT.get(kind, 0.0)
    record = view.nodes.get(ip or "")
    if record is None or not amount:
        return []
    payloads: list[Payload] = [Suspected(record.ip, amount, run_id, kind, verdict.detail)]
    own = [f for f in record.faults if f.amount >= 1.0 and clock - f.clock < WINDOW_SECONDS]
    if amount >= 1.0 and len(own) + 1 >= MAX_FAULTS:
        causes = ", ".join(dict.fromkeys([*(fault.cause for fault in own), kind]))
        reason = f"flapping: at fault {len(own) + 1} times in {WINDOW_SECONDS / 60:.0f} min ({causes})"
        payloads += _CordonBudget(view).cordon(record.ip, reason)
    return payloads


def cordon_events(view: NodesView, finding: dict[str, Any], run_id: str) -> list[Payload]:
    """What to write about a measurement's finding: a cordon of each host that it says is slow or wrong.

    Args:
        view: the nodes so far.
        finding: as `FabricFinding.finding` has it, with `action`, `kind`, `what` and `hosts`.
        run_id: the measurement.
    """
    if finding.get("action") != "cordon":
        return []
    cordons, payloads = _CordonBudget(view), list[Payload]()
    for ip in dict.fromkeys(finding.get("hosts", ())):
        record = view.nodes.get(ip)
        if record is None or any(f.run == run_id and f.cause == finding["kind"] for f in record.faults):
            continue
        payloads.append(Suspected(ip, 1.0, run_id, str(finding["kind"]), str(finding["what"])))
        payloads += cordons.cordon(ip, f"{finding['kind']}: {finding['what']} ({run_id})")
    return payloads


class _CordonBudget:
    """Cordons by the controller itself, within `MAX_CORDONED_SHARE` of the live nodes."""

    def __init__(self, view: NodesView, live: int | None = None) -> None:
        self._view = view
        own = [n for n in view.nodes.values() if n.live and n.cordon is not None and not n.cordon.by]
        live = sum(n.live for n in view.nodes.values()) if live is None else live
        self._left = max(1, int(MAX_CORDONED_SHARE * live)) - len(own)

    def cordon(self, ip: str, reason: str) -> list[Payload]:
        """The cordon; nothing where the node has one, or too many have."""
        record = self._view.nodes[ip]
        if record.cordon is not None or record.drain is not None or self._left <= 0:
            return []
        self._left -= 1
        return [Cordoned(ip, reason, "")]


def draining_runs(view: NodesView, running: Iterable[RunningRun]) -> list[tuple[str, str]]:
    """Runs that hold slots on nodes that drain, each with the reason to tell: they save, stop and queue again."""
    moves = []
    for run in running:
        on = [
            r for share in run.shares if (r := view.nodes.get(share.ip)) is not None and r.drain is not None
        ]
        if on and not run.stopping:
            places = "; ".join(f"{r.hostname or r.ip} ({r.drain.reason})" for r in on if r.drain)
            moves.append((run.run_id, f"draining {places}"))
    return moves


MARKS = ("cordon", "uncordon", "drain", "spare", "unspare")
"""What can be said of a node."""


def mark_event(view: NodesView, name: str, what: str, reason: str, by: str) -> Payload:
    """The event of a person's word on a node.

    Args:
        view: the nodes so far.
        name: address or host name of a node that was ever there.
        what: one of `MARKS`.
        reason: why; needed to take a node out of service.
        by: who says it.

    Raises:
        UserError: for a node that isn't known, a missing reason, or a mark that it has, or hasn't, already.
    """
    node, reason = _known(view, name), " ".join(reason.split())
    said = (reason, by)  # said again by the same person, as after a lost answer, it is not a mistake
    if what in ("cordon", "drain") and not reason:
        raise UserError(
            f"{what} {name} needs a reason for whoever finds it later: --reason 'fan 3 is broken'"
        )
    if what == "cordon":
        if node.drain is not None:
            raise UserError(f"{name} is draining already ({node.drain.reason}), which keeps new runs out too")
        _refuse(node.cordon, said, f"{name} is cordoned already")
        return Cordoned(node.ip, reason, by)
    if what == "drain":
        _refuse(node.drain, said, f"{name} is draining already")
        return Draining(node.ip, reason, by)
    if what == "uncordon":
        if node.cordon is None and node.drain is None:
            raise UserError(_serves(node, name))
        return Uncordoned(node.ip, reason, by)
    if what == "spare":
        _refuse(node.spare, said, f"{name} is a spare already")
        return SpareMarked(node.ip, reason, by)
    if what == "unspare":
        if node.spare is None:
            raise UserError(f"{name} is not a spare; `{PROGRAM} nodes` shows which are")
        return SpareUnmarked(node.ip, reason, by)
    raise UserError(f"'{what}' is not a mark of a node{nearest(what, MARKS)}; use one of {', '.join(MARKS)}")


def _serves(node: NodeRecord, name: str) -> str:
    if node.check:
        return f"{name} is neither cordoned nor draining; its check failed: {node.check}; fix that, and it gets work again"
    return f"{name} is neither cordoned nor draining; `{PROGRAM} nodes` shows which are"


def _refuse(there: NodeMark | None, said: tuple[str, str], text: str) -> None:
    if there is not None and (there.reason, there.by) != said:
        raise UserError(f"{text}{f' ({there.reason})' if there.reason else ''}")


def _known(view: NodesView, name: str) -> NodeRecord:
    if name in view.nodes:
        return view.nodes[name]
    named = [node for node in view.nodes.values() if node.hostname == name]
    # A host that came back under another address leaves its old record behind.
    fitting = [node for node in named if node.live] or named
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        addresses = ", ".join(node.ip for node in fitting[:5])
        raise UserError(f"node '{name}': several have that host name; type an address: {addresses}")
    known = [n for node in view.nodes.values() for n in (node.ip, node.hostname) if n]
    raise UserError(f"node '{name}' isn't known{nearest(name, known)}; `{PROGRAM} nodes` shows the nodes")
