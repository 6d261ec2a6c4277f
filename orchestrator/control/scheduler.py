"""The queue's part of a turn: who waits, who runs, and what the pure decider's answers mean for the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from configs.compose import dump
from configs.errors import UserError
from configs.paths import HomePaths, write_whole
from orchestrator.control.gang import GangRuntime
from orchestrator.control.node_controller import NodeController
from orchestrator.control.run_controller import RunController
from orchestrator.decide import backoff, elastic, placement, queue, quotas, recovery
from orchestrator.decide import nodes as deciding
from orchestrator.decide.placement import Node
from orchestrator.decide.queue import Admit, Hold, Preempt, QueueDecision, QueuePolicy, RunningRun, WaitingRun
from orchestrator.record.clock import Instant
from orchestrator.record.states import Reason, State
from trainer.sizing.search.planner import Capacity

ErrorBoundary = Callable[[str], AbstractContextManager[None]]
UNGRANTED_SECONDS = 15.0
"""Wait after slots that Ray didn't grant; doubles with each placing in a row that failed so, up to `UNGRANTED_CAP`."""
UNGRANTED_CAP = 600.0
REGROW_SECONDS = 30.0
"""Least time that a run trains in a smaller layout before it grows back."""


class Scheduler:
    """Runs the queue's decider once a turn, and applies its decisions to the runs."""

    def __init__(self, home: HomePaths, runtime: GangRuntime) -> None:
        self._home, self._runtime = home, runtime
        self.held: list[dict[str, Any]] = []
        """Position and reason of each run that waits, as it is published."""
        self.quota_error = ""
        """What is wrong with the quotas; empty where nothing is."""
        self._known: dict[str, int] = {}
        self._searches: dict[str, elastic.SmallerLayoutSearch] = {}
        """For the smaller layout that each run which lost its place would take, a piece of it a turn."""

    def turn(
        self,
        ready: set[str],
        runs: Mapping[str, RunController],
        nodes: NodeController,
        now: Instant,
        apart: ErrorBoundary,
    ) -> None:
        """Admit, hold and preempt; move runs off nodes that drain; grow runs back.

        Args:
            ready: runs that may be looked at.
            runs: all that have not ended.
            nodes: of the cluster.
            now: the present.
            apart: takes what is raised at a run, so that the others are decided about.
        """
        running = [_running(name, control) for name, control in runs.items() if control.shares]
        held = [(r.gang.resource, r.shares) for r in running]
        free = placement.with_slots_taken(nodes.nodes, held)
        backing_off = {n for n, c in runs.items() if c.view.state is State.QUEUED and _is_backing_off(c, now)}
        queued = {name for name, control in runs.items() if control.view.state is State.QUEUED}
        self._searches = {name: search for name, search in self._searches.items() if name in queued}
        waiting: list[WaitingRun] = []
        for name, control in runs.items():
            if control.view.state is State.QUEUED and name in ready and name not in backing_off:
                with apart(name):
                    waiting.append(self._waiting(name, control, free, now))
        self.held = [
            {
                "run": name,
                "position": None,
                "reason": "waits before it asks again for slots that Ray did not grant",
            }
            for name in sorted(backing_off)
        ]
        policy = QueuePolicy(quotas=self._quotas())
        for answer in queue.decide(waiting, running, free, policy):
            with apart(answer.run_id):
                self._apply(answer, runs[answer.run_id], free, now)
        for name, reason in deciding.draining_runs(nodes.view, running):
            with apart(name):
                _stop(runs[name], Reason.DRAINED, reason, now)
        for name in sorted(ready & set(runs)):
            with apart(name):
                if _may_grow(runs[name], now) and elastic.regrow(
                    _at_full_size(name, runs[name], now), running, waiting, free, policy
                ):
                    _stop(runs[name], Reason.REGROWN, "the nodes that it asked for are back", now)

    def _apply(self, answer: QueueDecision, control: RunController, free: list[Node], now: Instant) -> None:
        match answer:
            case Admit():
                self._admit(control, answer, free, now)
            case Hold():
                self.held.append({"run": answer.run_id, "position": answer.position, "reason": answer.reason})
            case Preempt():
                _stop(control, Reason.PREEMPTED, answer.reason, now)

    def _waiting(self, name: str, control: RunController, free: list[Node], now: Instant) -> WaitingRun:
        """A run as it waits; one that lost its place may have a smaller layout once it has waited for long."""
        waiting = _at_full_size(name, control, now)
        after = control.config().resilience.shrink_after
        if not control.view.displaced or after is None or waiting.waited < after:
            self._searches.pop(name, None)
            return waiting
        resource = waiting.gang.resource
        slots = [n.free.get(resource, 0) for n in free if not n.barred and n.free.get(resource, 0)]
        if not slots:
            return waiting
        question = control.config(), Capacity.of_nodes(slots), waiting.gang
        search = self._searches.get(name)
        # One that is under way is finished, whatever has changed: where slots come and go, none would ever be otherwise.
        if search is None or (search.done and not search.matches(*question)):
            search = self._searches[name] = elastic.SmallerLayoutSearch(*question)
        search.step()
        return replace(waiting, smaller=(search.choice.gang,)) if search.choice else waiting

    def _admit(self, control: RunController, answer: Admit, nodes: list[Node], now: Instant) -> None:
        config, layout = None, None
        detail = ", ".join(f"{len(share.ranks)} on {share.ip}" for share in answer.shares)
        spares = {node.ip for node in nodes if node.spare}
        used = [share.ip for share in answer.shares if share.ip in spares]
        if used:
            detail += f"; spare {', '.join(used)} put to use"
        if answer.gang != control.view.request.gang:
            choice = self._searches[answer.run_id].choice
            assert choice is not None, "the queue has its shape from it"
            config = control.run.attempt(control.view.attempt + 1).config
            config.parent.mkdir(parents=True, exist_ok=True)
            write_whole(config, dump(choice.config))
            layout = choice.layout
            detail += f"; {choice.reason}"
        control.admit(control.next_attempt(answer.shares, answer.gang, config, layout), detail, now)

    def _quotas(self) -> dict[str, int]:
        """Slots by owner. Where the file can't be read, what it said last holds, and `quota_error` says why."""
        self.quota_error = ""
        try:
            self._known = quotas.parse(self._home.quotas.read_text(), str(self._home.quotas))
        except FileNotFoundError:
            self._known = {}
        except (OSError, UnicodeDecodeError, UserError) as error:
            self.quota_error = f"{self._home.quotas}: {error}; its last valid version applies"
        return self._known


def _at_full_size(name: str, control: RunController, now: Instant) -> WaitingRun:
    """A run as it would wait for all that it asked for."""
    view, submitted, clock = control.view, control.view.request, control.clock(now)
    return WaitingRun(
        run_id=name,
        priority=submitted.priority,
        queued_at=view.queued_at,
        waited=clock - view.waiting_clock,
        gang=submitted.gang,
        owner=submitted.owner,
        avoid=recovery.avoided_nodes(view, clock),
        recovering=view.by_fault,
    )


def _may_grow(control: RunController, now: Instant) -> bool:
    """It trains in a smaller layout, and has done so for a while."""
    view = control.view
    settled = control.clock(now) - view.moved_clock >= REGROW_SECONDS
    return view.smaller and view.state is State.RUNNING and view.stopping is None and settled


def _running(name: str, control: RunController) -> RunningRun:
    view = control.view
    trains = view.state in (State.STARTING, State.RUNNING)
    return RunningRun(
        name,
        view.request.priority,
        view.request.owner,
        view.gang,
        control.shares,
        trains,
        view.stopping is not None,
    )


def _is_backing_off(control: RunController, now: Instant) -> bool:
    view = control.view
    if not view.ungranted:
        return False
    wait = backoff.exponential_backoff(UNGRANTED_SECONDS, view.ungranted, UNGRANTED_CAP)
    return control.clock(now) - view.waiting_clock < wait


def _stop(control: RunController, reason: Reason, detail: str, now: Instant) -> None:
    control.stop(reason, detail, now, control.config().resilience.timeouts.seconds("stop"))
