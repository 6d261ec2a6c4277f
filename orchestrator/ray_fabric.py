"""Gangs on Ray: a placement group with one bundle per node, and a detached node agent in each bundle.

Groups and agents are detached and named, so they outlive the controller that made them and a new one finds
them again. Nothing here decides anything, and no call waits: answers are looked at when they have arrived.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.control.gang import AgentReport, GangSpec, GangStatus
from orchestrator.control.node_agent import NodeAgent
from orchestrator.decide.placement import Node
from orchestrator.ray_cluster import NAMESPACE
from orchestrator.record.events import NodeShare

_PIN = 0.001
"""Of a node's own `node:<ip>` resource, which ties a bundle to the node that placement chose."""


@dataclass
class _Agent:
    share: NodeShare
    actor: Any
    pending: Any = None
    """The call under way."""
    asked: float = 0.0
    answered: float = 0.0
    offset: int = 0
    """Byte in `metrics.jsonl` up to which lines have come in."""
    dead: str = ""


@dataclass
class _Gang:
    spec: GangSpec
    group: PlacementGroup | None
    ready: Any = None
    agents: list[_Agent] = field(default_factory=list)
    phase: str = "reserving"
    """`reserving`, `preparing`, `starting`, `running` or `stopping`."""
    status: GangStatus = field(default_factory=GangStatus)


class RayFabric:
    """`orchestrator.control.gang.Fabric` on the Ray cluster that this process is connected to."""

    def __init__(self) -> None:
        self._gangs: dict[str, _Gang] = {}

    def nodes(self) -> list[Node]:
        """All live nodes; a slot is one unit of Ray's `CPU` or `GPU`."""
        found = []
        for node in ray.nodes():
            if node["Alive"]:
                slots = {kind: int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU")}
                ip, name = node["NodeManagerAddress"], node["NodeManagerHostname"]
                found.append(Node(node["NodeID"], ip, name, slots, dict(slots)))
        return found

    def reserve(self, group: str, spec: GangSpec) -> None:
        """Begin to reserve one bundle per node, each pinned to the node that was chosen."""
        bundles = [
            {spec.resource: float(len(share.ranks)), f"node:{share.ip}": _PIN} for share in spec.shares
        ]
        strategy = "STRICT_SPREAD" if len(bundles) > 1 else "STRICT_PACK"
        handle = placement_group(bundles, strategy=strategy, name=group, lifetime="detached")
        self._gangs[group] = _Gang(spec, handle, ready=handle.ready())

    def reserved(self, group: str) -> bool:
        """All bundles are held."""
        gang = self._gangs[group]
        return gang.ready is not None and _arrived(gang.ready)

    def launch(self, group: str) -> None:
        """Create the agents and have each prepare; `status` starts the ranks once all have."""
        gang = self._gangs[group]
        now = time.monotonic()
        for index, share in enumerate(gang.spec.shares):
            options: dict[str, Any] = {
                "name": _agent_name(group, index),
                "namespace": NAMESPACE,
                "lifetime": "detached",
                "max_restarts": 0,
                "num_cpus": 0,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    gang.group, placement_group_bundle_index=index
                ),
            }
            slots = float(len(share.ranks))
            options |= {"num_gpus" if gang.spec.resource == "GPU" else "num_cpus": slots}
            if gang.spec.runtime_env:
                options["runtime_env"] = gang.spec.runtime_env
            actor = ray.remote(NodeAgent).options(**options).remote(gang.spec, share)
            gang.agents.append(_Agent(share, actor, actor.prepare.remote(), now, now))
        gang.phase = "preparing"

    def status(self, group: str) -> GangStatus:
        """What has come in since the last call; also asks the agents again."""
        gang = self._gangs[group]
        now = time.monotonic()
        match gang.phase:
            case "preparing":
                self._advance_prepare(gang, now)
            case "starting":
                self._advance_start(gang, now)
            case "running":
                self._advance_poll(gang, now)
        silent = {a.share.node_id: now - a.answered for a in gang.agents}
        lost = {a.share.node_id: a.dead for a in gang.agents if a.dead}
        status = replace(gang.status, silent=silent, lost=lost)
        gang.status = replace(gang.status, reports=())
        return status

    def _advance_prepare(self, gang: _Gang, now: float) -> None:
        answers = [_collect(agent, now, keep=True) for agent in gang.agents]
        if any(answer is None for answer in answers):
            return
        refused = next((why for _, _, why in answers if why), "")
        gang.status = replace(gang.status, refused=refused)
        if refused:
            return
        address, port, _ = answers[0]
        for agent in gang.agents:
            _ask(agent, agent.actor.start.remote(address, port), now)
        gang.status = replace(gang.status, master=f"{address}:{port}")
        gang.phase = "starting"

    def _advance_start(self, gang: _Gang, now: float) -> None:
        answers = [_collect(agent, now, keep=True) for agent in gang.agents]
        if any(answer is None for answer in answers):
            return
        pids = {rank: pid for answer in answers for rank, pid in answer.items()}
        gang.status = replace(gang.status, pids=pids)
        gang.phase = "running"
        for agent in gang.agents:
            agent.pending = None

    def _advance_poll(self, gang: _Gang, now: float) -> None:
        reports: list[AgentReport] = []
        for agent in gang.agents:
            answer = _collect(agent, now)
            if answer is not None:
                report, agent.offset = answer
                reports.append(report)
            if agent.pending is None and not agent.dead:
                _ask(agent, agent.actor.poll.remote(agent.offset), now)
        pids = gang.status.pids or {r.rank: r.pid for report in reports for r in report.ranks}
        gang.status = replace(gang.status, reports=tuple(reports), pids=pids)

    def stop(self, group: str, grace: float) -> None:
        """Ask every agent to end its ranks."""
        gang = self._gangs[group]
        gang.phase = "stopping"
        for agent in gang.agents:
            if not agent.dead:
                _ask(agent, agent.actor.stop.remote(grace), time.monotonic())

    def stopped(self, group: str) -> bool:
        """Every agent has answered that its ranks are gone, or is gone itself."""
        gang = self._gangs[group]
        answers = [agent.dead or _collect(agent, time.monotonic(), keep=True) for agent in gang.agents]
        return all(answer is True or isinstance(answer, str) for answer in answers)

    def release(self, group: str) -> None:
        """End the agents (their ranks end with them), remove the placement group and forget both."""
        gang = self._gangs.pop(group, None)
        for index in range(len(gang.spec.shares) if gang else 0):
            with contextlib.suppress(ValueError, RayError):
                ray.kill(ray.get_actor(_agent_name(group, index), namespace=NAMESPACE))
        with contextlib.suppress(ValueError, RayError):
            remove_placement_group(gang.group if gang and gang.group else get_placement_group(group))

    def adopt(self, group: str, spec: GangSpec) -> bool:
        """Find the agents of a gang by name."""
        now = time.monotonic()
        gang = self._gangs[group] = _Gang(spec, None, phase="running")
        try:
            gang.group = get_placement_group(group)
            for index, share in enumerate(spec.shares):
                actor = ray.get_actor(_agent_name(group, index), namespace=NAMESPACE)
                gang.agents.append(_Agent(share, actor, None, now, now))
        except ValueError:
            return False
        return True

    def ensure_sinks(self, run_root: str) -> None:
        """Start the run's W&B sink as a detached actor unless it is there; it ends by itself."""
        from orchestrator.ray_sinks import ensure_sink  # its actor class must not load with the fabric

        ensure_sink(run_root)


def _agent_name(group: str, index: int) -> str:
    return f"{group}-node{index:04d}"


def _arrived(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])


def _ask(agent: _Agent, ref: Any, now: float) -> None:
    agent.pending, agent.asked = ref, now


def _collect(agent: _Agent, now: float, keep: bool = False) -> Any:
    """The answer to the call under way, or None. `keep` leaves it to be read again."""
    if agent.pending is None or agent.dead or not _arrived(agent.pending):
        return None
    try:
        answer = ray.get(agent.pending, timeout=0)
    except GetTimeoutError:
        return None
    except RayActorError as error:
        agent.dead = str(error).splitlines()[0]
        return None
    except RayError as error:
        agent.dead = f"agent failed: {str(error).strip().splitlines()[-1]}"
        return None
    agent.answered = now
    if not keep:
        agent.pending = None
    return answer
