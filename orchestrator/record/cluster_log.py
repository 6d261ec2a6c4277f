"""The life of nodes: events of the cluster's log, and the nodes as they fold from it.

Nodes are known by address, since Ray gives a node a new id each time that it starts; several Ray nodes at one address
(a cluster on one machine) count as one here. Timers go by `Event.clock`, which never steps. `orchestrator.record.log`
writes and reads the log with `decode` from here, `orchestrator.decide.nodes` decides what is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast, get_args

from orchestrator.record.events import ControllerStarted, Event


@dataclass(frozen=True)
class NodeJoined:
    """A node is there: new, back, or with other slots or labels than before."""

    kind: ClassVar[str] = "node_joined"
    ip: str
    hostname: str
    node_ids: tuple[str, ...]
    """Ray's ids; more than one where several Ray nodes share the address."""
    slots: dict[str, int]
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeLeft:
    """Ray doesn't list the node any more."""

    kind: ClassVar[str] = "node_left"
    ip: str


@dataclass(frozen=True)
class NodeChecked:
    """The result of a node's own check has changed."""

    kind: ClassVar[str] = "node_checked"
    ip: str
    error: str
    """What it found; empty where the node is sound."""


@dataclass(frozen=True)
class Suspected:
    """A run ended, and the node is what it points to."""

    kind: ClassVar[str] = "suspected"
    ip: str
    amount: float
    """1 where the verdict is about the node itself; less where it is about a rank on it."""
    run: str
    cause: str
    """Kind of the verdict or finding."""
    detail: str


@dataclass(frozen=True)
class Cordoned:
    """The node gets nothing new, until somebody says otherwise; what runs on it continues."""

    kind: ClassVar[str] = "cordoned"
    ip: str
    reason: str
    by: str
    """Who did it; empty: the controller."""


@dataclass(frozen=True)
class Uncordoned:
    """The node serves again, without a stain."""

    kind: ClassVar[str] = "uncordoned"
    ip: str
    reason: str
    by: str


@dataclass(frozen=True)
class Draining:
    """The node gets nothing new, and what runs on it saves and moves away."""

    kind: ClassVar[str] = "draining"
    ip: str
    reason: str
    by: str


@dataclass(frozen=True)
class SpareMarked:
    """The node is kept for runs that recover."""

    kind: ClassVar[str] = "spare_marked"
    ip: str
    reason: str
    by: str


@dataclass(frozen=True)
class SpareUnmarked:
    """The node is open to all runs again."""

    kind: ClassVar[str] = "spare_unmarked"
    ip: str
    reason: str
    by: str


Payload = (
    NodeJoined | NodeLeft | NodeChecked | Suspected | Cordoned | Uncordoned | Draining | SpareMarked | SpareUnmarked
    | ControllerStarted
)  # fmt: skip
_KINDS: dict[str, type[Payload]] = {c.kind: c for c in get_args(Payload)}

KEPT_FAULTS = 16
"""Newest faults and departures that a node's record holds."""


def decode(tree: dict[str, Any]) -> Payload:
    """A payload from its plain tree with `kind`.

    Raises:
        ValueError: where it isn't one.
    """
    try:
        values = dict(tree)
        made = _KINDS[values.pop("kind")]
        if made is NodeJoined:
            values["node_ids"] = tuple(values["node_ids"])
        return made(**values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not an event of the cluster: {error}") from error


@dataclass(frozen=True)
class NodeFault:
    """Something that a node is suspected for."""

    clock: float
    run: str
    cause: str
    amount: float
    detail: str


@dataclass(frozen=True)
class NodeMark:
    """A person's or the controller's word on a node."""

    reason: str
    by: str
    """Empty: the controller."""
    time: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class NodeRecord:
    """A node as the log tells of it."""

    ip: str
    hostname: str = ""
    node_ids: tuple[str, ...] = ()
    slots: dict[str, int] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    live: bool = False
    joined: float = 0.0
    """Clock of the newest `NodeJoined`."""
    check: str = ""
    """What its check found; empty: nothing."""
    checked: float = 0.0
    """Clock of the newest `NodeChecked`."""
    cordon: NodeMark | None = None
    drain: NodeMark | None = None
    spare: NodeMark | None = None
    faults: tuple[NodeFault, ...] = ()
    """Since it was last uncordoned, the newest `KEPT_FAULTS`."""
    left: tuple[float, ...] = ()
    """Clocks at which it left, likewise."""


@dataclass(frozen=True)
class NodesView:
    """All nodes that were ever there, by address."""

    nodes: dict[str, NodeRecord] = field(default_factory=dict)


def fold(events: Iterable[Event]) -> NodesView:
    """The nodes that a log tells of."""
    return apply(NodesView(), events)


def apply(view: NodesView, events: Iterable[Event]) -> NodesView:
    """The nodes after some more events."""
    nodes = dict(view.nodes)
    for event in events:
        payload = cast(Payload, event.payload)  # the cluster's log holds what `decode` makes
        if not isinstance(payload, ControllerStarted):
            record = nodes.get(payload.ip) or NodeRecord(payload.ip)
            nodes[payload.ip] = _changed(record, payload, event)
    return NodesView(nodes)


def _changed(node: NodeRecord, p: Payload, event: Event) -> NodeRecord:
    match p:
        case NodeJoined():
            return replace(
                node, hostname=p.hostname, node_ids=p.node_ids, slots=p.slots, labels=p.labels, live=True,
                joined=event.clock,
            )  # fmt: skip
        case NodeLeft():
            return replace(node, live=False, left=(*node.left, event.clock)[-KEPT_FAULTS:])
        case NodeChecked():
            return replace(node, check=p.error, checked=event.clock)
        case Suspected():
            fault = NodeFault(event.clock, p.run, p.cause, p.amount, p.detail)
            return replace(node, faults=(*node.faults, fault)[-KEPT_FAULTS:])
        case Cordoned():
            return replace(node, cordon=NodeMark(p.reason, p.by, event.time))
        case Uncordoned():
            return replace(node, cordon=None, drain=None, faults=(), left=())
        case Draining():
            return replace(node, drain=NodeMark(p.reason, p.by, event.time))
        case SpareMarked():
            return replace(node, spare=NodeMark(p.reason, p.by, event.time))
        case SpareUnmarked():
            return replace(node, spare=None)
        case ControllerStarted():
            return node
