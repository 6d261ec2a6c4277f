"""Gangs on Ray: a placement group holds their slots, and the agents of their nodes run their ranks.

Groups and agents are detached and named, so they outlive the controller that made them and a new one finds them again.
What asks Ray itself runs in threads that nobody waits for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnschedulableError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator import ray_agent
from orchestrator.agent.driver import AgentGone, GangDriver
from orchestrator.agent.orders import AttemptOrder, AttemptReport
from orchestrator.control.gang import GangSpec
from orchestrator.decide.placement import Node
from orchestrator.ray_cluster import NAMESPACE
from orchestrator.ray_nodes import RayNodes
from orchestrator.record.events import NodeShare
from orchestrator.sinks.lifecycle import SinkCheckSchedule

log = logging.getLogger("megaray.runtime")

_PIN = 0.001
"""Of a node's own `node:<ip>` resource, which ties a bundle to the node that placement chose."""
_THREADS = 8
_WITNESSES, _WITNESS_SECONDS = 3, 10.0
Devices = dict[str, dict[str, str]]


class RayRuntime(GangDriver):
    """`orchestrator.control.gang.GangRuntime` on the Ray cluster that this process is connected to."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ray-calls")
        self._nodes = RayNodes()
        self._sinks = SinkCheckSchedule()
        super().__init__(RayTransport(self._pool, self._nodes))

    def nodes(self, own: Collection[str]) -> list[Node]:
        """All live nodes, as they were reported lately; those whose check failed are barred.

        Args:
            own: reservations whose slots count as free; those that others hold don't.

        Raises:
            RuntimeError: where Ray hasn't reported them for long.
        """
        return self._nodes.nodes(own)

    def reservations(self) -> Collection[str]:
        """Names of all placement groups, as they were listed lately."""
        return self._nodes.groups()

    def ensure_sinks(self, run_root: str) -> None:
        """Start the run's W&B sink as a detached actor unless it is there; it ends by itself."""
        if self._sinks.due(run_root, time.monotonic()):
            self._pool.submit(self._start_sink, run_root)

    def _start_sink(self, run_root: str) -> None:
        from orchestrator.ray_sinks import ensure_sink  # its actor class must not load with the runtime

        try:
            ensure_sink(run_root)
        except Exception:  # looked for again, less and less often
            log.exception("the sink of %s", run_root)

    def close(self) -> None:
        """End the threads; agents, ranks and slots stay as they are."""
        super().close()
        self._nodes.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


class RayTransport:
    """`orchestrator.agent.driver.AgentTransport` by actor calls and placement groups."""

    def __init__(self, pool: ThreadPoolExecutor, nodes: RayNodes) -> None:
        self._pool, self._nodes = pool, nodes
        self._lock = threading.Lock()
        self._agents: dict[str, Any] = {}
        self._holders: dict[str, list[Any]] = {}
        """Reservation -> answers of its slot holders under way."""

    def live_nodes(self) -> frozenset[str] | None:
        """Ids of the nodes that live."""
        return self._nodes.live_nodes()

    def send_order(
        self, spec: GangSpec, share: NodeShare, order: AttemptOrder, make: bool
    ) -> Future[AttemptReport]:
        """Carry an order to a node's agent."""
        answer: Future[AttemptReport] = Future()
        with self._lock:
            agent = self._agents.get(share.node_id)
        if agent is not None:
            self._call(agent, share.node_id, order, answer)
        else:
            self._pool.submit(self._reach, spec, share, order, make, answer)
        return answer

    def _reach(
        self, spec: GangSpec, share: NodeShare, order: AttemptOrder, make: bool, answer: Future[AttemptReport]
    ) -> None:
        try:
            node = share.node_id
            agent = ray_agent.get_or_create(node, spec.runtime_env) if make else ray_agent.find(node)
        except ValueError:
            answer.set_exception(AgentGone("the node's agent is gone, and its ranks with it"))
            return
        except Exception as error:  # carried to whoever asked
            answer.set_exception(error)
            return
        with self._lock:
            self._agents[share.node_id] = agent
        self._call(agent, share.node_id, order, answer)

    def _call(self, agent: Any, node_id: str, order: AttemptOrder, answer: Future[AttemptReport]) -> None:
        try:
            call = agent.reconcile.remote(order).future()
        except Exception as error:  # carried to whoever asked
            answer.set_exception(error)
            return
        call.add_done_callback(lambda done: self._forward_answer(done, agent, node_id, answer))

    def _forward_answer(
        self, done: Future[AttemptReport], agent: Any, node_id: str, answer: Future[AttemptReport]
    ) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        elif isinstance(error, ActorDiedError | ActorUnschedulableError):
            with self._lock:
                if self._agents.get(node_id) is agent:
                    del self._agents[node_id]
            first = str(error).strip().splitlines()[0]
            answer.set_exception(AgentGone(f"the node's agent has ended: {first}"))
        else:
            answer.set_exception(error)

    def find_witness(self, spec: GangSpec, path: str) -> Future[str]:
        """Ask a few nodes outside the gang whether they see a path."""
        return self._pool.submit(self._find_witness, spec, path)

    def _find_witness(self, spec: GangSpec, path: str) -> str:
        others = sorted((self.live_nodes() or frozenset()) - {share.node_id for share in spec.shares})[
            :_WITNESSES
        ]
        calls = {ray_agent.get_or_create(node, spec.runtime_env).sees.remote(path): node for node in others}
        done, _ = (
            ray.wait(list(calls), num_returns=len(calls), timeout=_WITNESS_SECONDS) if calls else ([], [])
        )
        for call in done:
            with contextlib.suppress(Exception):  # an agent that fails has seen nothing
                if ray.get(call):
                    return next(n.ip for n in self._nodes.nodes(()) if n.node_id == calls[call])
        return ""

    def reserve(self, spec: GangSpec) -> Future[Devices | None]:
        """Hold a gang's slots; made where nobody has yet."""
        return self._pool.submit(self._reserve, spec)

    def _reserve(self, spec: GangSpec) -> Devices | None:
        group = _group(spec.reservation)
        if group is None:
            bundles = [{spec.resource: float(len(s.ranks)), f"node:{s.ip}": _PIN} for s in spec.shares]
            strategy = "STRICT_SPREAD" if len(bundles) > 1 else "STRICT_PACK"
            group = placement_group(bundles, strategy=strategy, name=spec.reservation, lifetime="detached")
        if placement_group_table(group)["state"] != "CREATED":
            return None
        return {} if spec.resource == "CPU" else self._devices(spec, group)

    def _devices(self, spec: GangSpec, group: PlacementGroup) -> Devices | None:
        """Which devices Ray has given to each bundle; None until all have reported."""
        with self._lock:
            calls = self._holders.get(spec.reservation)
        if calls is None:
            calls = []
            for index, share in enumerate(spec.shares):
                holder: Any = ray.remote(ray_agent.SlotHolder).options(
                    name=f"{spec.reservation}-slots{index:04d}", namespace=NAMESPACE, lifetime="detached",
                    get_if_exists=True, max_restarts=-1, num_cpus=0, num_gpus=float(len(share.ranks)),
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
                ).remote()  # fmt: skip
                calls.append(holder.devices.remote())
            with self._lock:
                self._holders[spec.reservation] = calls
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        if len(done) < len(calls):
            return None
        try:
            answers = ray.get(calls)
        except Exception:  # asked anew the next time
            with self._lock:
                self._holders.pop(spec.reservation, None)
            raise
        return {share.node_id: devices for share, devices in zip(spec.shares, answers, strict=True)}

    def release(self, reservation: str) -> Future[bool]:
        """Remove a placement group; what sits in it ends with it."""
        return self._pool.submit(self._release, reservation)

    def _release(self, reservation: str) -> bool:
        with self._lock:
            self._holders.pop(reservation, None)
        self._nodes.mark_released(reservation)
        group = _group(reservation)
        if group is not None:
            remove_placement_group(group)
        return _group(reservation) is None


def _group(name: str) -> PlacementGroup | None:
    """The placement group of that name, unless it was removed."""
    with contextlib.suppress(ValueError):
        group = get_placement_group(name)
        if placement_group_table(group)["state"] != "REMOVED":
            return group
    return None
