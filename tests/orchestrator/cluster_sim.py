"""A cluster of numbers: queue, placement and recovery on a clock that jumps from event to event.

Where `fake_fabric` runs the whole controller at a pace, this runs the pure deciders alone, at any size: a
day of 12,288 ranks takes as many turns of the loop as things happen in it. Runs are folded from events by
`orchestrator.record.run_log.apply`, so an illegal move raises here as it does in a log.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.decide import queue, recovery
from orchestrator.decide.placement import Node
from orchestrator.decide.queue import Admit, Hold, Waiting
from orchestrator.record import events as ev
from orchestrator.record import run_log
from orchestrator.record.events import Event, GangShape, Submitted
from orchestrator.record.run_log import RunView
from orchestrator.record.states import Reason, State

START = 1_000_000.0


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
    view: RunView = field(default_factory=RunView)
    events: list[Event] = field(default_factory=list)
    resumed_at: float = 0.0
    saved: int = 0

    @property
    def state(self) -> State | None:
        return self.view.state

    def append(self, payload: ev.Payload, now: float) -> None:
        event = Event(len(self.events), now, payload)
        self.view = run_log.apply(self.view, event)
        self.events.append(event)

    def step(self, now: float) -> int:
        """Newest finished step of the current attempt."""
        assert self.view.submitted is not None
        return min(self.view.submitted.steps, (self.view.resumed_step or 0) + int(now - self.resumed_at))


class ClusterSim:
    """Nodes, runs, and a heap of what happens when."""

    def __init__(self, nodes: list[Node], patience: float = 60.0, restart_seconds: float = 5.0) -> None:
        self.nodes = {node.node_id: node for node in nodes}
        self.patience = patience
        self.restart_seconds = restart_seconds
        """From admission to the first step."""
        self.now = START
        self.runs: dict[str, SimRun] = {}
        self.holds: dict[str, Hold] = {}
        self.busy_slot_seconds = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    # ---- the script ----

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Have something happen `time` seconds after the start."""
        heapq.heappush(self._heap, (START + time, next(self._order), act))

    def submit(
        self, run_id: str, gang: GangShape, steps: int, *, at: float = 0.0, priority: int = 0,
        every: int = 10, restarts: int = 3, backoff: float = 1.0,
    ) -> None:  # fmt: skip
        """Queue a run at a time."""

        def act() -> None:
            run = self.runs[run_id] = SimRun(run_id, every)
            run.append(
                Submitted(priority, gang, steps, restarts, backoff, "sim", {"dp": gang.ranks}), self.now
            )
            run.append(ev.Moved(State.QUEUED, Reason.SUBMITTED), self.now)

        self.at(at, act)

    def kill_node(self, node_id: str, at: float) -> None:
        """A node is gone, with every rank on it."""

        def act() -> None:
            node = self.nodes.pop(node_id)
            for run in self.runs.values():
                if run.view.placed and any(s.node_id == node_id for s in run.view.placed.shares):
                    self._fail(
                        run, Verdict(VerdictKind.NODE_LOST, "node is gone", node=node.ip, time=self.now)
                    )

        self.at(at, act)

    def revive_node(self, node: Node, at: float) -> None:
        """A node joins."""
        self.at(at, lambda: self.nodes.update({node.node_id: node}))

    def kill_rank(self, run_id: str, rank: int, at: float, code: int = -9) -> None:
        """A rank of a run ends; nothing happens where the run isn't training then."""

        def act() -> None:
            run = self.runs[run_id]
            if run.state in (State.STARTING, State.RUNNING):
                kind = VerdictKind.USER_ERROR if code == 2 else VerdictKind.RANK_EXIT
                self._fail(run, Verdict(kind, f"rank {rank} ended with {code}", rank=rank, time=self.now))

        self.at(at, act)

    # ---- the loop ----

    def go(self, until: float = float("inf")) -> None:
        """Play until nothing is left to happen, or `until` seconds after the start."""
        while self._heap and self._heap[0][0] <= START + until:
            time = self._heap[0][0]
            self.busy_slot_seconds += self.held() * (time - self.now)
            self.now = time
            while self._heap and self._heap[0][0] == time:
                heapq.heappop(self._heap)[2]()
            self._decide()

    def held(self) -> int:
        """Slots that runs hold."""
        return sum(
            len(s.ranks) for run in self.runs.values() if run.view.placed for s in run.view.placed.shares
        )

    def free_nodes(self) -> list[Node]:
        """Live nodes with what is free; raises where a slot is held twice."""
        left = {node_id: dict(node.slots) for node_id, node in self.nodes.items()}
        for run in self.runs.values():
            for share in run.view.placed.shares if run.view.placed else ():
                if share.node_id in left and run.view.submitted is not None:
                    left[share.node_id][run.view.submitted.gang.resource] -= len(share.ranks)
        assert all(slots >= 0 for free in left.values() for slots in free.values()), "oversubscribed"
        return [replace(node, free=left[node_id]) for node_id, node in self.nodes.items()]

    def _decide(self) -> None:
        waiting = [
            Waiting(run.run_id, run.view.submitted.priority, run.view.queued_at, run.view.submitted.gang)
            for run in self.runs.values()
            if run.state is State.QUEUED and run.view.submitted is not None
        ]
        self.holds = {}
        if not waiting:
            return
        for answer in queue.decide(waiting, self.free_nodes(), self.now, self.patience):
            if isinstance(answer, Admit):
                self._start(self.runs[answer.run_id], answer)
            else:
                self.holds[answer.run_id] = answer
        # A blocked gang's patience ends by itself, so the loop must turn then.
        due = [w.queued_at + self.patience for w in waiting if w.queued_at + self.patience > self.now]
        if self.holds and due:
            self.at(min(due) - START, lambda: None)

    def _start(self, run: SimRun, admit: Admit) -> None:
        attempt = run.view.attempt + 1
        run.append(ev.Moved(State.PLACING, Reason.ADMITTED), self.now)
        run.append(ev.Placed(attempt, admit.shares, f"{run.run_id}-{attempt}"), self.now)
        run.append(ev.Moved(State.STARTING, Reason.PLACED), self.now)
        run.append(ev.Resumed(attempt, run.saved, None), self.now)
        run.resumed_at = self.now + self.restart_seconds - 1.0

        def still(act: Callable[[], None]) -> Callable[[], None]:
            return lambda: act() if run.view.attempt == attempt and run.view.placed else None

        begin = self.now + self.restart_seconds - START
        assert run.view.submitted is not None
        steps = run.view.submitted.steps
        self.at(begin, still(lambda: run.append(ev.Moved(State.RUNNING, Reason.FIRST_STEP), self.now)))
        saves = [s for s in range(run.saved + 1, steps + 1) if s % run.every == 0 or s == steps]
        for step in saves:
            self.at(begin + step - run.saved - 1, still(lambda s=step: self._save(run, s)))  # type: ignore[misc]
        for incident in run.view.open_incidents:
            caught_up = min(incident.event.step + 1, steps) - run.saved - 1
            self.at(begin + max(0, caught_up), still(lambda: self._settle(run)))
        self.at(begin + steps - run.saved - 1, still(lambda: self._finish(run)))

    def _save(self, run: SimRun, step: int) -> None:
        run.saved = step
        run.append(ev.CheckpointCommitted(run.view.attempt, step, "memory", 1, 0.1), self.now)

    def _settle(self, run: SimRun, ended: str = "") -> None:
        for closed in recovery.closing(run.view, run.step(self.now), self.now, ended):
            run.append(closed, self.now)

    def _finish(self, run: SimRun) -> None:
        self._settle(run, "training is complete")
        run.append(ev.Finished(run.step(self.now), 2.0, 1), self.now)
        run.append(ev.Moved(State.SUCCEEDED, Reason.COMPLETE), self.now)

    def _fail(self, run: SimRun, verdict: Verdict) -> None:
        view = run.view
        decision = recovery.decide(view, [verdict])
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
        if decision.action == "fail":
            self._settle(run, "the run failed")
            run.append(ev.Moved(State.FAILED, decision.reason), self.now)
            return
        run.append(ev.Moved(State.RECOVERING, decision.reason), self.now)
        again = run.view.retry_at - START
        self.at(again, lambda: run.append(ev.Moved(State.QUEUED, Reason.BACKOFF_OVER), self.now))
