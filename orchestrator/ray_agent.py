"""The node agent as a detached Ray actor: one per node, tied to it, found by its name."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from faulttol.preflight.host import versions
from faulttol.proc import ProcessRow
from orchestrator.agent import attempt_processes, orders
from orchestrator.agent.agent import NodeAgent
from orchestrator.agent.checks import NodeHealth, NodeHealthCheck, preflight
from orchestrator.agent.orders import AttemptOrder, AttemptReport
from orchestrator.ray_cluster import NAMESPACE

_PR_SET_CHILD_SUBREAPER = 36
_REAP_SECONDS = 2.0
_AT_ONCE = 64
"""Calls that may wait for news at the same time."""


class AgentActor:
    """Carries calls to the agent in this process. Orphans of its ranks become its children, so that none gets away."""

    def __init__(self, node_id: str) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._agent = NodeAgent(node_id, versions(), preflight, devices=_devices(node_id))
        self._check = NodeHealthCheck()
        threading.Thread(
            target=orders.remove_stale_rings,
            args=(attempt_processes.live_marks,),
            name="agent-sweep",
            daemon=True,
        ).start()
        threading.Thread(target=self._reap, name="agent-reap", daemon=True).start()

    def _reap(self) -> None:
        ended: set[ProcessRow] = set()
        while True:
            time.sleep(_REAP_SECONDS)
            ended = attempt_processes.reap_orphans(self._agent.pids, ended)

    def reconcile(self, order: AttemptOrder) -> AttemptReport:
        """As `NodeAgent.reconcile`."""
        return self._agent.reconcile(order)

    def sees(self, path: str) -> bool:
        """Whether a path is there on this node."""
        return Path(path).exists()

    def check(self, peers: tuple[str, ...]) -> NodeHealth:
        """As `NodeHealthCheck.poll`."""
        return self._check.poll(peers, not self._agent.pids)


def _devices(node_id: str) -> int:
    """GPUs that Ray counts on a node."""
    rows = [row for row in ray.nodes() if row["NodeID"] == node_id]
    return int(rows[0]["Resources"].get("GPU", 0)) if rows else 0


def name_of(node_id: str) -> str:
    """Name of a node's agent."""
    return f"agent-{node_id}"


def find(node_id: str) -> Any:
    """The agent of a node. Waits for Ray.

    Raises:
        ValueError: where it has none.
    """
    return ray.get_actor(name_of(node_id), namespace=NAMESPACE)


def get_or_create(node_id: str, runtime_env: dict[str, Any]) -> Any:
    """The agent of a node, begun where it isn't there. Waits for Ray, but not for the agent."""
    options: dict[str, Any] = {
        "name": name_of(node_id),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": 0,
        "num_cpus": 0,
        "max_concurrency": _AT_ONCE,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }
    if runtime_env:
        options["runtime_env"] = runtime_env
    return ray.remote(AgentActor).options(**options).remote(node_id)


class SlotHolder:
    """Sits in a gang's bundle of a node and says which devices Ray has given it."""

    def devices(self) -> dict[str, str]:
        """Variables that name them."""
        import os

        names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
        return {name: os.environ[name] for name in names if os.environ.get(name)}
