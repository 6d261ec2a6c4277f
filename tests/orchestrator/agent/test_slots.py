"""Slots that are held and let go by calls that take their time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.agent.driver import AgentGone, GangDriver
from orchestrator.agent.orders import AttemptOrder, AttemptPhase, AttemptReport
from orchestrator.control.gang import AgentReport, DesiredState, GangSpec
from orchestrator.record.events import NodeShare
from tests.orchestrator.agent.local_runtime import until

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]


class SlowTransport:
    """Ray as it is when it takes its time: a test says when a call about slots is done. No node has an agent."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.holding: list[Future[Any]] = []
        self.letting: list[Future[Any]] = []

    def live_nodes(self) -> frozenset[str]:
        return frozenset()  # so that all nodes are lost, and no stop has to be waited for

    def send_order(
        self, spec: GangSpec, share: NodeShare, order: AttemptOrder, make: bool
    ) -> Future[AttemptReport]:
        gone: Future[AttemptReport] = Future()
        gone.set_exception(AgentGone("the node is gone"))
        return gone

    def find_witness(self, spec: GangSpec, path: str) -> Future[str]:
        return Future()

    def reserve(self, spec: GangSpec) -> Future[dict[str, dict[str, str]] | None]:
        self.holding.append(Future())
        return self.holding[-1]

    def release(self, reservation: str) -> Future[bool]:
        self.held.discard(reservation)
        self.letting.append(Future())
        return self.letting[-1]


class AnsweringTransport(SlowTransport):
    """Its node has an agent, which says where an attempt is."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = AttemptPhase.ENDING
        self.wanted: list[DesiredState] = []

    def live_nodes(self) -> frozenset[str]:
        return frozenset({"n0"})

    def send_order(
        self, spec: GangSpec, share: NodeShare, order: AttemptOrder, make: bool
    ) -> Future[AttemptReport]:
        self.wanted.append(order.desired)
        answer: Future[AttemptReport] = Future()
        report = AttemptReport(self.phase, 1.0, None, AgentReport("n0", 0.0, ()), len(self.wanted), 0)
        threading.Timer(0.02, answer.set_result, (report,)).start()
        return answer


def spec(root: Path, attempt: int) -> GangSpec:
    share = NodeShare("n0", "10.0.0.1", "host0", (0,))
    return GangSpec(f"a-a{attempt:03d}", str(root), attempt, (share,), "CPU", 1, (), "", 1)


@pytest.fixture
def transport() -> SlowTransport:
    return SlowTransport()


@pytest.fixture
def gangs(transport: SlowTransport) -> Iterator[GangDriver]:
    gangs = GangDriver(transport)
    yield gangs
    gangs.close()


def test_slots_are_let_go_after_the_call_that_holds_them(
    gangs: GangDriver, transport: SlowTransport, tmp_path: Path
) -> None:
    """The other way round the call would hold them for a run that has ended."""
    one = spec(tmp_path, 1)
    gangs.ensure(one, DesiredState.RESERVED)
    until(lambda: transport.holding, "it is asked for slots")
    gangs.ensure(one, DesiredState.RELEASED)
    turned = gangs._turned
    until(lambda: gangs._turned > turned + 0.5, "a few turns pass")
    assert not transport.letting and not gangs.status(one).released
    transport.held.add(one.reservation)
    transport.holding[0].set_result(None)
    until(lambda: transport.letting, "they are let go")
    transport.letting[0].set_result(True)
    until(lambda: gangs.status(one).released, "they are free")
    assert not transport.held and len(transport.holding) == 1


def test_the_next_attempt_need_not_wait_for_the_kernel_and_another_run_must(tmp_path: Path) -> None:
    """Another run's ranks know nothing of memory that is being taken back."""
    transport = AnsweringTransport()
    one = spec(tmp_path, 1)
    with closing(GangDriver(transport)) as gangs:
        gangs.ensure(one, DesiredState.STOPPED)
        until(lambda: gangs.status(one).stopped, "that nothing runs any more")
        gangs.ensure(one, DesiredState.RELEASED)
        # Once its slots are let go, no more answers are asked for.
        until(lambda: transport.letting or transport.wanted.count(DesiredState.RELEASED) > 5, "answers")
        assert not transport.letting, "its slots aren't free"
        transport.phase = AttemptPhase.STOPPED
        until(lambda: transport.letting, "they are let go")
        transport.letting[0].set_result(True)
        until(lambda: gangs.status(one).released, "they are free")


def test_slots_that_are_being_let_go_are_not_forgotten_for_the_next_attempt(
    gangs: GangDriver, transport: SlowTransport, tmp_path: Path
) -> None:
    one = spec(tmp_path, 1)
    gangs.ensure(one, DesiredState.RELEASED)
    until(lambda: transport.letting, "they are let go")
    gangs.ensure(spec(tmp_path, 2), DesiredState.RESERVED)
    transport.letting[0].set_result(False)  # Ray hasn't done it yet
    until(lambda: len(transport.letting) == 2, "it is asked again")
    transport.letting[1].set_result(True)
    until(lambda: gangs.status(one).released, "they are free")
