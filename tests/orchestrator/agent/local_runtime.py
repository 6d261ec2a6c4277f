"""Real node agents and real ranks without Ray: agents live in this process, and their calls run in threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from configs.paths import HomePaths
from orchestrator.agent.agent import NodeAgent
from orchestrator.agent.driver import AgentGone, GangDriver
from orchestrator.agent.orders import AttemptOrder, AttemptReport
from orchestrator.control.controller import Controller
from orchestrator.control.gang import GangSpec
from orchestrator.decide.placement import Node
from orchestrator.record import clock
from orchestrator.record.events import NodeShare
from orchestrator.record.run_log import RunLogReader
from orchestrator.record.summaries import RunSummary, read_queue, summary
from orchestrator.record.view import RunView

PATIENCE = 150.0
"""Seconds after which a wait is a failure; they end long before."""


@dataclass
class LocalNodes:
    """The agents of a cluster whose nodes are all this machine; it outlives runtimes, as a cluster does controllers."""

    slots: int
    count: int = 1
    agents: dict[str, NodeAgent] = field(default_factory=dict)
    """By node id."""
    left: set[str] = field(default_factory=set)
    """Nodes that are not part of the cluster any more."""
    held: set[str] = field(default_factory=set)
    """Reservations."""
    witness: str = ""
    """Address of a node outside every gang that sees all paths."""
    asked_for: list[str] = field(default_factory=list)
    """Paths that others were asked for."""
    asked: int = 0
    """How often slots were asked for."""
    granted: bool = True
    """False: no slots are given."""
    deaf: set[str] = field(default_factory=set)
    """Nodes whose answers never arrive."""
    mute: bool = False
    """Agents obey, and tell nothing of their ranks."""
    orders: list[tuple[str, AttemptOrder]] = field(default_factory=list)
    """All that were sent: node id, order."""

    def nodes(self) -> list[Node]:
        """Those that live."""
        ids = [f"n{i}" for i in range(self.count) if f"n{i}" not in self.left]
        return [
            Node(i, f"127.0.0.{int(i[1:]) + 1}", i, {"CPU": self.slots}, {"CPU": self.slots}) for i in ids
        ]

    def lose_agent(self, node_id: str) -> None:
        """The node's agent dies, and its ranks with it; a new one may be made."""
        self.agents.pop(node_id).close()

    def close(self) -> None:
        """End all ranks."""
        for agent in self.agents.values():
            agent.close()


class LocalTransport:
    """`orchestrator.agent.driver.AgentTransport` that calls agents in threads."""

    def __init__(self, cluster: LocalNodes) -> None:
        self._cluster = cluster
        self._pool = ThreadPoolExecutor(32)

    def live_nodes(self) -> frozenset[str] | None:
        return frozenset(node.node_id for node in self._cluster.nodes())

    def send_order(
        self, spec: GangSpec, share: NodeShare, order: AttemptOrder, make: bool
    ) -> Future[AttemptReport]:
        node, cluster = share.node_id, self._cluster
        cluster.orders.append((node, order))
        if node in cluster.deaf or node in cluster.left:
            return Future()
        if node not in cluster.agents:
            if not make:
                failed: Future[AttemptReport] = Future()
                failed.set_exception(AgentGone("the node's agent is gone"))
                return failed
            cluster.agents[node] = NodeAgent(node)
        return self._pool.submit(self._reconcile, cluster.agents[node], order)

    def _reconcile(self, agent: NodeAgent, order: AttemptOrder) -> AttemptReport:
        answer = agent.reconcile(order)
        if self._cluster.mute:
            answer = replace(
                answer, report=replace(answer.report, ranks=(), lines=(), offset=order.offset), serial=-1
            )
        return answer

    def find_witness(self, spec: GangSpec, path: str) -> Future[str]:
        self._cluster.asked_for.append(path)
        done: Future[str] = Future()
        done.set_result(self._cluster.witness)
        return done

    def reserve(self, spec: GangSpec) -> Future[dict[str, dict[str, str]] | None]:
        done: Future[dict[str, dict[str, str]] | None] = Future()
        self._cluster.asked += 1
        if self._cluster.granted:
            self._cluster.held.add(spec.reservation)
        done.set_result({} if self._cluster.granted else None)
        return done

    def release(self, reservation: str) -> Future[bool]:
        self._cluster.held.discard(reservation)
        done: Future[bool] = Future()
        done.set_result(True)
        return done


class LocalRuntime(GangDriver):
    """`orchestrator.control.gang.GangRuntime` on real agents and ranks, without Ray.

    Args:
        slots: of each node.
        count: nodes `n0`, `n1`, …
        cluster: that of an earlier runtime, whose ranks continue; then `slots` and `count` count for nothing.
    """

    def __init__(self, slots: int = 1, count: int = 1, cluster: LocalNodes | None = None) -> None:
        self.cluster = cluster or LocalNodes(slots, count)
        super().__init__(LocalTransport(self.cluster))

    def nodes(self, own: Collection[str]) -> list[Node]:
        return self.cluster.nodes()

    def reservations(self) -> Collection[str]:
        return set(self.cluster.held)

    def ensure_sinks(self, run_root: str) -> None:
        pass

    def end(self) -> None:
        """End everything."""
        self.close()  # the runtime alone, as when a controller dies
        self.cluster.close()


@contextmanager
def local_runtime(slots: int = 1, count: int = 1) -> Iterator[LocalRuntime]:
    """A runtime whose ranks are ended afterwards."""
    runtime = LocalRuntime(slots, count)
    try:
        yield runtime
    finally:
        runtime.end()


class Driver:
    """A home, its controller, and turns of its loop until something holds."""

    def __init__(self, home: HomePaths, slots: int) -> None:
        self.home, self.runtime = home, LocalRuntime(slots)
        self.controller = Controller(home, self.runtime, clock.system_clock)

    def view(self, run_id: str) -> RunView:
        return RunLogReader.of(self.home.run(run_id)).view

    def row(self, run_id: str) -> RunSummary:
        return summary(self.home.run(run_id), read_queue(self.home))

    def until(self, what: Callable[[], object], why: str) -> None:
        """Turn until `what` holds."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, f"still not: {why}"
            self.controller.turn()
            self.runtime.wait(0.1)

    def close(self) -> None:
        """End every rank."""
        self.runtime.end()


def until(what: Callable[[], object], why: str, seconds: float = 60.0) -> None:
    """Wait for something to hold. The bound is half of the time limit of the tests that wait so: one that waits in vain
    says for what."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"still not: {why}"
        time.sleep(0.01)
