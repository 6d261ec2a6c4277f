"""The nodes of the Ray cluster and what others hold of them, looked at by a thread of its own.

Each node has an agent that says whether it is fit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import placement_group_table

from orchestrator import ray_agent
from orchestrator.agent.checks import NodeHealth
from orchestrator.decide.foreign_usage import SAMPLES, UsageSample, free_slots
from orchestrator.decide.placement import Node

log = logging.getLogger("megaray.runtime")

_REFRESH_SECONDS = 1.0
_STALE_SECONDS = 60.0
"""Nodes that Ray hasn't reported for so long may not be there."""
_LOOK_SHARE = 0.05
"""Of the time that looks may take: on a large cluster they are made less often, up to `_LONGEST_REFRESH`."""
_LONGEST_REFRESH = 10.0
_SETTLING_SECONDS = 5.0
"""Time in which a group that was let go still counts as ours."""
_FIRST_SECONDS = 20.0
_CHECK_SECONDS = 30.0
_ANSWER_SECONDS = 20.0
_PENDING_SECONDS = 180.0
_PEERS = 2
"""Nodes whose agents a node must reach."""


@dataclass
class _Check:
    """What a node's agent said of it."""

    called: float
    call: Any = None
    health: NodeHealth | None = None
    """The newest answer."""
    since: float = 0.0
    """When it was first called."""


class RayNodes:
    """All nodes as they were reported lately. No call waits for Ray but the first, which waits for the first list."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nodes: list[Node] = []
        self._listed: float | None = None
        """When Ray last gave the list."""
        self._groups: frozenset[str] = frozenset()
        """Names of the placement groups that there were at the newest look."""
        self._usage: list[UsageSample] = []
        """Of the newest looks, the newest first."""
        self._let_go: dict[str, float] = {}
        """Group -> when it was let go."""
        self._mute = False
        """It is in the log that Ray doesn't say who holds slots."""
        self._first = threading.Event()
        self._closed = threading.Event()
        self._checks: dict[str, _Check] = {}
        threading.Thread(target=self._work, name="ray-nodes", daemon=True).start()
        self._first.wait(_FIRST_SECONDS)

    def nodes(self, own: Collection[str]) -> list[Node]:
        """Live nodes; a slot is one unit of Ray's `CPU` or `GPU`.

        Args:
            own: names of placement groups whose slots count as free.

        Raises:
            RuntimeError: where Ray hasn't reported them for long.
        """
        with self._lock:
            now = time.monotonic()
            if self._listed is None or now - self._listed > _STALE_SECONDS:
                raise RuntimeError("Ray doesn't tell of its nodes")
            self._let_go = {name: at for name, at in self._let_go.items() if now - at < _SETTLING_SECONDS}
            ours = {*own, *self._let_go}
            return [
                replace(node, barred=self._barred(node), free=free_slots(node, self._usage, ours))
                for node in self._nodes
            ]

    def groups(self) -> frozenset[str]:
        """Names of the placement groups that there were lately."""
        with self._lock:
            return self._groups

    def mark_released(self, group: str) -> None:
        """Take down that a placement group is being removed."""
        with self._lock:
            self._let_go[group] = time.monotonic()

    def live_nodes(self) -> frozenset[str] | None:
        """Ids of the live nodes; None where Ray hasn't reported them lately."""
        with self._lock:
            if self._listed is None or time.monotonic() - self._listed > _STALE_SECONDS / 2:
                return None
            return frozenset(node.node_id for node in self._nodes)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _work(self) -> None:
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                live = [_node(row) for row in ray.nodes() if row["Alive"]]
                seen = self._sample_usage()
                with self._lock:
                    self._nodes, self._listed = live, time.monotonic()
                    self._usage = [seen, *self._usage][:SAMPLES] if seen else []
                self._first.set()
                self._poll_agents(live)
            except Exception:  # the next look may go well; a list that gets too old is refused
                log.exception("the list of nodes")
            wait = (time.monotonic() - began) / _LOOK_SHARE
            self._closed.wait(min(max(_REFRESH_SECONDS, wait), _LONGEST_REFRESH))

    def _sample_usage(self) -> UsageSample | None:
        """Who holds slots now; None where Ray doesn't say, and placement meets it when slots aren't granted."""
        try:
            groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
            with self._lock:
                self._groups = frozenset(group["name"] for group in groups)
            return _usage_of(groups)
        except Exception as error:  # the nodes themselves are known
            if not self._mute:
                log.warning("what other users of Ray hold is not known: %s", error)
            self._mute = True
            return None

    # ---- checks ----

    def _barred(self, node: Node) -> str:
        check = self._checks.get(node.node_id)
        if check is not None and check.health is not None and check.health.checked:
            return check.health.problem
        # A node with devices proves them first. One of cores serves at once; what is wrong with it shows soon.
        if not node.slots.get("GPU"):
            return ""
        if check is not None and time.monotonic() - check.since > _PENDING_SECONDS:
            return f"its check has not ended for {_PENDING_SECONDS:.0f} s"
        return "is being checked"

    def _poll_agents(self, nodes: list[Node]) -> None:
        """Ask each node's agent, which is made where it is missing, whether the node is fit; collect what has come."""
        now = time.monotonic()
        for gone in set(self._checks) - {node.node_id for node in nodes}:
            with self._lock:
                del self._checks[gone]
        for index, node in enumerate(nodes):
            check = self._checks.get(node.node_id)
            if check is not None and check.call is not None:
                self._collect(node, check, now)
            wait = _CHECK_SECONDS if check and check.health and check.health.checked else 1.0
            if check is None or (check.call is None and now - check.called > wait):
                self._ask(node, self._peers(nodes, index), now)

    def _peers(self, nodes: list[Node], index: int) -> tuple[str, ...]:
        """The next nodes in the row that can be reached, as far as is known."""
        others = [nodes[(index + i) % len(nodes)] for i in range(1, min(_PEERS + 1, len(nodes)))]
        known = [(node.ip, self._checks.get(node.node_id)) for node in others]
        return tuple(f"{ip}:{check.health.port}" for ip, check in known if check and check.health)

    def _ask(self, node: Node, peers: tuple[str, ...], now: float) -> None:
        before = self._checks.get(node.node_id)
        since = before.since if before else now
        try:
            agent = ray_agent.get_or_create(node.node_id, {})
            call = agent.check.remote(peers)
        except Exception as error:  # asked again
            log.warning("the agent of node %s: %s", node.ip, error)
            call = None
        with self._lock:
            self._checks[node.node_id] = _Check(now, call, before.health if before else None, since)

    def _collect(self, node: Node, check: _Check, now: float) -> None:
        ready, _ = ray.wait([check.call], timeout=0)
        if not ready:
            if now - check.called > _ANSWER_SECONDS:
                check.call = None
            return
        try:
            looked = ray.get(check.call)
        except Exception as error:  # an agent that has died is made anew
            log.warning("the check of node %s: %s", node.ip, error)
            looked = check.health
        with self._lock:
            check.call, check.health = None, looked


def _usage_of(listed: list[dict[str, Any]]) -> UsageSample:
    # Loaded here: Ray marks it for developers and keeps it private. Its public calls give sums over all nodes alone.
    from ray._private.state import available_resources_per_node

    groups: dict[str, dict[str, dict[str, float]]] = {}
    for group in listed:
        for index, node_id in group["bundles_to_node_id"].items():
            held = groups.setdefault(node_id, {}).setdefault(group["name"], {})
            for resource, amount in group["bundles"][index].items():
                held[resource] = held.get(resource, 0.0) + amount
    return UsageSample(available_resources_per_node(), groups)


def _node(row: dict[str, Any]) -> Node:
    slots = {kind: int(row["Resources"].get(kind, 0)) for kind in ("CPU", "GPU")}
    labels = {str(name): str(value) for name, value in (row.get("Labels") or {}).items()}
    return Node(
        row["NodeID"], row["NodeManagerAddress"], row["NodeManagerHostname"], slots, dict(slots), labels
    )
