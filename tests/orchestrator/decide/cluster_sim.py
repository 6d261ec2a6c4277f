"""A cluster of numbers: queue, placement, nodes, recovery and elastic layouts on a clock that jumps from event to event.

Where `fake_runtime` runs the whole controller at a pace, this runs the pure deciders alone, at any size: a
day of 12,288 ranks takes as many turns of the loop as things happen in it. Runs are folded from events by
`orchestrator.record.view.apply`, so an illegal move raises here as it does in a log; nodes by `cluster_log.apply`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.decide import elastic, queue, recovery
from orchestrator.decide import nodes as deciding
from orchestrator.decide.placement import Node, with_slots_taken
from orchestrator.decide.queue import Admit, Hold, Preempt, QueuePolicy, RunningRun, WaitingRun
from orchestrator.decide.recovery import Action
from orchestrator.record import cluster_log
from orchestrator.record import events as ev
from orchestrator.record import view as run_view
from orchestrator.record.cluster_log import NodesView
from orchestrator.record.events import Event, GangShape, Submitted
from orchestrator.record.states import Reason, State
from orchestrator.record.view import RunView

START = 1_000_000.0
_DEFAULT = QueuePolicy()


def make_nodes(
    nodes: int, slots: int, resource: str = "CPU", free: Callable[[int], int] | None = None
) -> list[Node]:
    """Nodes n00000, n00001, … at ascending addresses; `free` gives the free slots of a node by its index."""
    return [
        Node(
            f"n{i:05d}",
            f"10.{i // 62500}.{i // 250 % 250}.{i % 250 + 1}",
            f"host{i}",
            {resource: slots},
            {resource: slots if free is None else free(i)},
        )
        for i in range(nodes)
    ]


@dataclass
class SimRun:
    """One run of the simulation: a step a second, a checkpoint every `every` steps."""

    run_id: str
    every: int
    smaller: tuple[GangShape, ...] = ()
    """What it continues with while nodes are missing, from `ClusterSim.shrink_after` on."""
    view: RunView = field(default_factory=RunView)
    events: list[Event] = field(default_factory=list)
    resumed_at: float = 0.0
    saved: int = 0
    faulty: bool = False
    """Its last attempt ended by a fault."""

    @property
    def state(self) -> State | None:
        return self.view.state

    def append(self, payload: ev.Payload, now: float) -> None:
        event = Event(len(self.events), now, payload, now - START)
        self.view = run_view.apply(self.view, event)
        self.events.append(event)

    def step(self, now: float) -> int:
        """Newest finished step of the current attempt."""
        return min(self.view.request.steps, (self.view.resumed_step or 0) + int(now - self.resumed_at))

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.payload.kind == kind]

    def placements(self) -> list[tuple[int, set[str]]]:
        """Ranks and nodes of each attempt."""
        found = []
        for event in self.of_kind("placed"):
            assert isinstance(event.payload, ev.AttemptPlaced)
            shares = event.payload.shares
            found.append((sum(len(s.ranks) for s in shares), {s.node_id for s in shares}))
        return found


class ClusterSim:
    """Nodes, runs, and a heap of what happens when."""

    def __init__(
        self, nodes: list[Node], policy: QueuePolicy = _DEFAULT, restart_seconds: float = 5.0,
        shrink_after: float = 60.0,
    ) -> None:  # fmt: skip
        self.nodes = {node.node_id: node for node in nodes}
        """Those that live."""
        self.policy = policy
        self.restart_seconds = restart_seconds
        """From admission to the first step."""
        self.shrink_after = shrink_after
        self.stop_seconds = 3.0
        """From asking a run to stop until its slots are free."""
        self.now = START
        self.runs: dict[str, SimRun] = {}
        self.holds: dict[str, Hold] = {}
        self.cluster = NodesView()
        self.cluster_events: list[Event] = []
        self.busy_slot_seconds = 0.0
        self._spoilt: dict[str, float] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    # ---- the script ----

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Have something happen `time` seconds after the start."""
        heapq.heappush(self._heap, (START + time, next(self._order), act))

    def submit(
        self, run_id: str, gang: GangShape, steps: int, *, at: float = 0.0, every: int = 10,
        smaller: tuple[GangShape, ...] = (), **asked: Any,
    ) -> None:  # fmt: skip
        """Queue a run at a time; `asked` are fields of `Submitted`."""
        known = {"priority": 0, "max_restarts": 3, "backoff_seconds": 1.0, "layout": {"dp": gang.ranks}}
        submitted = Submitted(gang=gang, steps=steps, model="sim", **(known | asked))

        def act() -> None:
            run = self.runs[run_id] = SimRun(run_id, every, smaller)
            run.append(submitted, self.now)
            run.append(ev.StateMoved(State.QUEUED, Reason.SUBMITTED), self.now)

        self.at(at, act)

    def kill_node(self, node_id: str, at: float) -> None:
        """A node is gone, with every rank on it."""

        def act() -> None:
            node = self.nodes.pop(node_id)
            for run in self.runs.values():
                if run.view.placed and any(s.node_id == node_id for s in run.view.placed.shares):
                    lost = Verdict(VerdictKind.NODE_LOST, "node is gone", node=node.ip, time=self.now)
                    self._fail(run, lost)

        self.at(at, act)

    def revive_node(self, node: Node, at: float) -> None:
        """A node joins."""
        self.at(at, lambda: self.nodes.update({node.node_id: node}))

    def spoil_node(self, node_id: str, at: float, after: float = 3.0) -> None:
        """From then on the node can't run ranks: whatever starts there ends `after` seconds later."""
        self.at(at, lambda: self._spoilt.update({node_id: after}))

    def kill_rank(self, run_id: str, rank: int, at: float, code: int = -9) -> None:
        """A rank of a run ends; nothing happens where the run isn't training then."""

        def act() -> None:
            run = self.runs[run_id]
            if run.state in (State.STARTING, State.RUNNING):
                kind = VerdictKind.USER_ERROR if code == 2 else VerdictKind.RANK_EXIT
                self._fail(run, Verdict(kind, f"rank {rank} ended with {code}", rank=rank, time=self.now))

        self.at(at, act)

    def mark(self, node: str, what: str, at: float, reason: str = "by hand") -> None:
        """Somebody cordons, drains, … a node."""
        self.at(at, lambda: self._write([deciding.mark_event(self.cluster, node, what, reason, "ann")]))

    # ---- the loop ----

    def go(self, until: float = float("inf")) -> None:
        """Play until nothing is left to happen, or `until` seconds after the start."""
        while self._heap and self._heap[0][0] <= START + until:
            time = self._heap[0][0]
            self.busy_slot_seconds += self.held() * (time - self.now)
            self.now = time
            self._write(deciding.observe(self.cluster, list(self.nodes.values()), self.clock))
            while self._heap and self._heap[0][0] == time:
                heapq.heappop(self._heap)[2]()
            self._write(deciding.observe(self.cluster, list(self.nodes.values()), self.clock))
            self._decide()

    @property
    def clock(self) -> float:
        """Seconds since the start."""
        return self.now - START

    def held(self) -> int:
        """Slots that runs hold."""
        return sum(
            len(s.ranks) for run in self.runs.values() if run.view.placed for s in run.view.placed.shares
        )

    def free_nodes(self) -> list[Node]:
        """Live nodes as placement sees them; raises where a slot is held twice."""
        marked = deciding.with_marks(list(self.nodes.values()), self.cluster, self.clock)
        held = [(run.gang.resource, run.shares) for run in self._running()]
        used: dict[str, int] = {}
        for _, shares in held:
            for share in shares:
                used[share.node_id] = used.get(share.node_id, 0) + len(share.ranks)
        for node in marked:
            assert used.get(node.node_id, 0) <= max(node.slots.values()), "oversubscribed"
        return with_slots_taken(marked, held)

    def _write(self, payloads: list[cluster_log.Payload]) -> None:
        first = len(self.cluster_events)
        events = [Event(first + i, self.now, p, self.clock) for i, p in enumerate(payloads)]  # type: ignore[arg-type]
        self.cluster = cluster_log.apply(self.cluster, events)
        self.cluster_events += events

    def _running(self) -> list[RunningRun]:
        return [
            RunningRun(
                run.run_id, run.view.request.priority, run.view.request.owner, run.view.gang, run.view.placed.shares,
                stopping=run.view.stopping is not None,
            )
            for run in self.runs.values()
            if run.view.placed
        ]  # fmt: skip

    def _waiting(self, run: SimRun, smaller: bool) -> WaitingRun:
        asked, clock = run.view.request, self.clock
        waited = clock - run.view.waiting_clock
        shapes = run.smaller if smaller and run.faulty and waited >= self.shrink_after else ()
        return WaitingRun(
            run.run_id, asked.priority, run.view.queued_at, waited, asked.gang, asked.owner,
            recovery.avoided_nodes(run.view, clock), run.faulty, shapes,
        )  # fmt: skip

    def _decide(self) -> None:
        waiting = [self._waiting(run, True) for run in self.runs.values() if run.state is State.QUEUED]
        running, nodes = self._running(), self.free_nodes()
        self.holds = {}
        for answer in queue.decide(waiting, running, nodes, self.policy):
            if isinstance(answer, Admit):
                self._start(self.runs[answer.run_id], answer)
            elif isinstance(answer, Preempt):
                self._stop(self.runs[answer.run_id], Reason.PREEMPTED, answer.reason)
            else:
                self.holds[answer.run_id] = answer
        for run_id, reason in deciding.draining_runs(self.cluster, running):
            self._stop(self.runs[run_id], Reason.DRAINED, reason)
        # What a waiting run waits for may be nothing but time.
        ends = (self.policy.patience, self.shrink_after, deciding.QUARANTINE_SECONDS)
        due = [self.now - w.waited + end for w in waiting for end in ends if w.waited < end]
        if self.holds and due:
            self.at(min(due) - START, lambda: None)

    def _start(self, run: SimRun, admit: Admit) -> None:
        attempt, asked = run.view.attempt + 1, run.view.request
        gang = None if admit.gang == asked.gang else admit.gang
        run.append(ev.StateMoved(State.PLACING, Reason.ADMITTED), self.now)
        run.append(ev.AttemptPlaced(attempt, admit.shares, f"{run.run_id}-{attempt}", gang), self.now)
        run.append(ev.StateMoved(State.STARTING, Reason.PLACED), self.now)
        run.append(ev.AttemptResumed(attempt, run.saved, None), self.now)
        run.resumed_at = self.now + self.restart_seconds - 1.0

        def still(act: Callable[[], None]) -> Callable[[], None]:
            return lambda: act() if run.view.attempt == attempt and run.view.placed else None

        for share in admit.shares:
            if share.node_id in self._spoilt:
                unfit = Verdict(VerdictKind.NODE_UNFIT, "its mount is gone", node=share.ip)
                self.at(self.clock + self._spoilt[share.node_id], still(lambda v=unfit: self._fail(run, v)))  # type: ignore[misc]
        begin, steps = self.clock + self.restart_seconds, asked.steps
        self.at(begin, still(lambda: run.append(ev.StateMoved(State.RUNNING, Reason.FIRST_STEP), self.now)))
        saves = [s for s in range(run.saved + 1, steps + 1) if s % run.every == 0 or s == steps]
        for step in saves:
            self.at(begin + step - run.saved - 1, still(lambda s=step: self._save(run, s)))  # type: ignore[misc]
        for incident in run.view.open_incidents:
            caught_up = min(incident.event.step + 1, steps) - run.saved - 1
            self.at(begin + max(0, caught_up), still(lambda: self._settle(run)))
        self.at(begin + steps - run.saved - 1, still(lambda: self._finish(run)))

    def _stop(self, run: SimRun, reason: Reason, detail: str) -> None:
        """Have a run save, stop and queue again."""
        attempt = run.view.attempt
        if run.view.stopping is not None or run.state not in (State.STARTING, State.RUNNING):
            return
        run.append(ev.StopBegan(attempt, State.QUEUED, reason, detail, 60.0), self.now)

        def act() -> None:
            if run.view.attempt != attempt or run.view.stopping is None:
                return
            if run.state is State.RUNNING:
                self._save(run, run.step(self.now))
            run.faulty = False
            run.append(ev.StateMoved(State.RECOVERING, reason, detail), self.now)
            run.append(ev.StateMoved(State.QUEUED, Reason.BACKOFF_OVER), self.now)

        self.at(self.clock + self.stop_seconds, act)

    def _save(self, run: SimRun, step: int) -> None:
        run.saved = step
        run.append(ev.CheckpointCommitted(run.view.attempt, step, "store", 1, 0.1), self.now)
        if run.view.smaller and run.view.stopping is None:
            waiting = [self._waiting(r, True) for r in self.runs.values() if r.state is State.QUEUED]
            asked = self._waiting(run, False)
            if elastic.regrow(asked, self._running(), waiting, self.free_nodes(), self.policy):
                self._stop(run, Reason.REGROWN, "the nodes that it asked for are back")

    def _settle(self, run: SimRun, ended: str = "") -> None:
        for closed in recovery.resolved_incidents(run.view, run.step(self.now), self.clock, ended):
            run.append(closed, self.now)

    def _finish(self, run: SimRun) -> None:
        self._settle(run, "training is complete")
        run.append(ev.Finished(run.step(self.now), 2.0, 1), self.now)
        run.append(ev.StateMoved(State.SUCCEEDED, Reason.COMPLETE), self.now)

    def _fail(self, run: SimRun, verdict: Verdict) -> None:
        view = run.view
        decision = recovery.decide(view, [verdict], self.clock)
        run.faulty = True
        self._write(deciding.suspicion_events(self.cluster, verdict, run.run_id, verdict.node, self.clock))
        run.append(ev.VerdictFound(view.attempt, verdict.to_json()), self.now)
        began = run.step(self.now) if view.state is State.RUNNING else view.resumed_step or 0
        opened = ev.IncidentOpened(
            len(view.incidents) + 1, view.attempt, str(verdict.kind), verdict.detail, verdict.rank,
            verdict.node, began, "",
        )  # fmt: skip
        run.append(opened, self.now)
        decided = ev.Decided(
            view.attempt, decision.action, str(decision.reason), decision.restarts_used,
            decision.restarts_allowed, decision.wait_seconds, decision.detail,
        )  # fmt: skip
        run.append(decided, self.now)
        if decision.action is Action.FAIL:
            self._settle(run, "the run failed")
            run.append(ev.StateMoved(State.FAILED, decision.reason), self.now)
            return
        run.append(ev.StateMoved(State.RECOVERING, decision.reason), self.now)
        attempt = view.attempt

        def again() -> None:
            if run.state is State.RECOVERING and run.view.attempt == attempt:
                run.append(ev.StateMoved(State.QUEUED, Reason.BACKOFF_OVER), self.now)

        self.at(run.view.retry_clock, again)
