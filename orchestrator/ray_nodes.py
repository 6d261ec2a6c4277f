"""The nodes of the Ray cluster, looked at by a thread of its own, each with an agent that says whether it is fit."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import ray

from orchestrator import ray_agent
from orchestrator.agent.checks import Looked
from orchestrator.decide.placement import Node

log = logging.getLogger("megaray.runtime")

_REFRESH_SECONDS = 1.0
_STALE_SECONDS = 60.0
"""Nodes that Ray hasn't reported for so long may not be there."""
_FIRST_SECONDS = 20.0
_CHECK_SECONDS = 30.0
_ANSWER_SECONDS = 20.0
_PENDING_SECONDS = 180.0
_PEERS = 2
"""Nodes whose agents a node must reach."""


@dataclass
class _Check:
    """What a node's agent said of it."""

    asked: float
    call: Any = None
    looked: Looked | None = None
    """The newest answer."""
    since: float = 0.0
    """When it was first asked."""


class RayNodes:
    """All nodes as they were reported lately. No call waits for Ray but the first, which waits for the first list."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nodes: list[Node] = []
        self._told: float | None = None
        self._first = threading.Event()
        self._closed = threading.Event()
        self._checks: dict[str, _Check] = {}
        threading.Thread(target=self._work, name="ray-nodes", daemon=True).start()
        self._first.wait(_FIRST_SECONDS)

    def nodes(self) -> list[Node]:
        """Live nodes; a slot is one unit of Ray's `CPU` or `GPU`.

        Raises:
            RuntimeError: where Ray hasn't reported them for long.
        """
        with self._lock:
            if self._told is None or time.monotonic() - self._told > _STALE_SECONDS:
                raise RuntimeError("Ray doesn't tell of its nodes")
            return [replace(node, barred=self._barred(node)) for node in self._nodes]

    def alive(self) -> frozenset[str] | None:
        """Ids of the live nodes; None where Ray hasn't reported them lately."""
        with self._lock:
            if self._told is None or time.monotonic() - self._told > _STALE_SECONDS / 2:
                return None
            return frozenset(node.node_id for node in self._nodes)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                found = [_node(row) for row in ray.nodes() if row["Alive"]]
                with self._lock:
                    self._nodes, self._told = found, time.monotonic()
                self._first.set()
                self._look(found)
            except Exception:  # the next look may go well; a list that gets too old is refused
                log.exception("the list of nodes")
            self._closed.wait(_REFRESH_SECONDS)

    # ---- checks ----

    def _barred(self, node: Node) -> str:
        check = self._checks.get(node.node_id)
        if check is not None and check.looked is not None and check.looked.done:
            return check.looked.why
        # A node with devices proves them first. One of cores serves at once; what is wrong with it shows soon.
        if not node.slots.get("GPU"):
            return ""
        if check is not None and time.monotonic() - check.since > _PENDING_SECONDS:
            return f"its check has not ended for {_PENDING_SECONDS:.0f} s"
        return "is being checked"

    def _look(self, nodes: list[Node]) -> None:
        """Ask each node's agent, which is made where it is missing, whether the node is fit; collect what has come."""
        now = time.monotonic()
        for gone in set(self._checks) - {node.node_id for node in nodes}:
            with self._lock:
                del self._checks[gone]
        for index, node in enumerate(nodes):
            check = self._checks.get(node.node_id)
            if check is not None and check.call is not None:
                self._collect(node, check, now)
            wait = _CHECK_SECONDS if check and check.looked and check.looked.done else 1.0
            if check is None or (check.call is None and now - check.asked > wait):
                self._ask(node, self._peers(nodes, index), now)

    def _peers(self, nodes: list[Node], index: int) -> tuple[str, ...]:
        """The next nodes in the row that can be reached, as far as is known."""
        others = [nodes[(index + i) % len(nodes)] for i in range(1, min(_PEERS + 1, len(nodes)))]
        known = [(node.ip, self._checks.get(node.node_id)) for node in others]
        return tuple(f"{ip}:{check.looked.port}" for ip, check in known if check and check.looked)

    def _ask(self, node: Node, peers: tuple[str, ...], now: float) -> None:
        before = self._checks.get(node.node_id)
        since = before.since if before else now
        try:
            agent = ray_agent.make(node.node_id, {})
            call = agent.check.remote(peers)
        except Exception as error:  # asked again
            log.warning("the agent of node %s: %s", node.ip, error)
            call = None
        with self._lock:
            self._checks[node.node_id] = _Check(now, call, before.looked if before else None, since)

    def _collect(self, node: Node, check: _Check, now: float) -> None:
        ready, _ = ray.wait([check.call], timeout=0)
        if not ready:
            if now - check.asked > _ANSWER_SECONDS:
                check.call = None
            return
        try:
            looked = ray.get(check.call)
        except Exception as error:  # an agent that has died is made anew
            log.warning("the check of node %s: %s", node.ip, error)
            looked = check.looked
        with self._lock:
            check.call, check.looked = None, looked


def _node(row: dict[str, Any]) -> Node:
    slots = {kind: int(row["Resources"].get(kind, 0)) for kind in ("CPU", "GPU")}
    labels = {str(name): str(value) for name, value in (row.get("Labels") or {}).items()}
    return Node(
        row["NodeID"], row["NodeManagerAddress"], row["NodeManagerHostname"], slots, dict(slots), labels
    )
