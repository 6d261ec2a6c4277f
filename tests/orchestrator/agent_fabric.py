"""The controller's own loop over a real node agent and real ranks, without Ray: one node, this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from configs.paths import HomePaths
from orchestrator.control.controller import Controller
from orchestrator.control.gang import GangSpec, GangStatus
from orchestrator.control.node_agent import NodeAgent
from orchestrator.decide.placement import Node
from orchestrator.record.reading import RunSummary, read_queue, summary
from orchestrator.record.run_log import RunView, fold, read

PATIENCE = 150.0
"""Seconds after which a wait is a failure; they end long before."""


@dataclass
class _Gang:
    agent: NodeAgent
    pids: dict[int, int] = field(default_factory=dict)
    offset: int = 0
    gone: bool = False


class AgentFabric:
    """`gang.Fabric` whose one agent lives in this process; it must be used by the main thread, which forks."""

    def __init__(self, slots: int) -> None:
        self._node = Node("n0", "127.0.0.1", "here", {"CPU": slots}, {"CPU": slots})
        self.gangs: dict[str, _Gang] = {}
        self.polls = True
        """False: agents' answers stop coming, and the ranks go on."""

    def nodes(self) -> list[Node]:
        return [self._node]

    def reserve(self, group: str, spec: GangSpec) -> None:
        self.gangs[group] = _Gang(NodeAgent(spec, spec.shares[0]))

    def reserved(self, group: str) -> bool:
        return True

    def launch(self, group: str) -> None:
        gang = self.gangs[group]
        address, port, refused = gang.agent.prepare()
        assert not refused, refused
        gang.pids = gang.agent.start(address, port)

    def status(self, group: str) -> GangStatus:
        gang = self.gangs[group]
        if not self.polls:
            return GangStatus(gang.pids, "here", (), {"n0": 0.0}, {}, "")
        report, gang.offset = gang.agent.poll(gang.offset)
        return GangStatus(gang.pids, "here", (report,), {"n0": 0.0}, {}, "")

    def stop(self, group: str, grace: float) -> None:
        self.gangs[group].gone = self.gangs[group].agent.stop(grace)

    def stopped(self, group: str) -> bool:
        return self.gangs[group].gone

    def release(self, group: str) -> None:
        self.gangs.pop(group, None)

    def adopt(self, group: str, spec: GangSpec) -> bool:
        return False

    def ensure_sinks(self, run_root: str) -> None:
        pass


class Driver:
    """A home, its controller, and turns of its loop until something holds."""

    def __init__(self, home: HomePaths, slots: int) -> None:
        self.home, self.fabric = home, AgentFabric(slots)
        self.controller = Controller(home, self.fabric, time.time)

    def view(self, run_id: str) -> RunView:
        return fold(read(self.home.run(run_id).events))

    def row(self, run_id: str) -> RunSummary:
        return summary(self.home.run(run_id), read_queue(self.home))

    def until(self, what: Callable[[], Any], why: str) -> Any:
        """Turn until `what` holds; its value."""
        deadline = time.monotonic() + PATIENCE
        while not (value := what()):
            assert time.monotonic() < deadline, f"still not: {why}"
            self.controller.tick()
            time.sleep(0.05)
        return value

    def close(self) -> None:
        """End every rank."""
        for gang in self.fabric.gangs.values():
            gang.agent.stop(0.0)
        self.controller._lock.close()
