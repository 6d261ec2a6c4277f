"""The node agent: it lives as long as its node, and moves each attempt there to where the controller wants it.

Its one call is level-triggered: an order says what should be, the answer what is, and it comes the moment there is news.
Nothing that answers touches shared storage, so the heartbeat continues while that is slow. Ranks are processes in sessions
of their own: one that hangs, stops or holds its interpreter lock can't silence the agent, and a controller that is gone
doesn't end them. A dead agent takes its ranks along (`configs.rank.die_with_parent`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faulttol import steady_clock
from faulttol.detect.snapshot import RankObservation
from orchestrator.agent import environment
from orchestrator.agent.attempt import Attempt
from orchestrator.agent.orders import AttemptOrder, AttemptPhase, AttemptReport, OrderSuperseded
from orchestrator.agent.spawner import Spawner
from orchestrator.agent.standby_pool import StandbyPool
from orchestrator.control.gang import AgentReport, DesiredState

_MAX_REMEMBERED = 64
"""Attempts that are remembered after they were stopped, so that a late order doesn't start them again."""

Key = tuple[str, int]


@dataclass
class _LastAnswer:
    """What the newest answer about an attempt reported, so that the next one has only what changed."""

    serial: int = 0
    ranks: tuple[RankObservation, ...] = ()


class NodeAgent:
    """Owns the ranks of one node. Thread-safe: every call may come at any time from any thread.

    Args:
        node_id: of the node.
        facts: versions that must be alike on all nodes of a gang.
        check: why the node can't take ranks now; asked before each gang.
        clock: seconds since the epoch.
        devices: of the node; so many interpreters wait for the ranks of its first gang. A node of cores has none to spare.
    """

    def __init__(
        self,
        node_id: str,
        facts: dict[str, str] | None = None,
        check: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = steady_clock.now,
        devices: int = 0,
    ) -> None:
        self._node_id, self._facts, self._check, self._clock = node_id, facts or {}, check, clock
        self._born = time.monotonic()
        self._changed = threading.Condition(threading.RLock())
        self._spawner = Spawner()
        self._standbys = StandbyPool(self._spawner)
        if devices:
            self._standbys.set_idle_target(devices, environment.generic_environment(devices))
        self._attempts: dict[Key, Attempt] = {}
        self._last_answers: dict[Key, _LastAnswer] = {}
        self._epochs: dict[str, int] = {}
        """Folder of runs -> highest epoch of a controller that was heard of; two homes may share a node."""

    def reconcile(self, order: AttemptOrder) -> AttemptReport:
        """Bring an attempt towards its desired state, and report it: at once where it changed, else after `order.wait`.

        Raises:
            OrderSuperseded: where a later controller has given orders.
        """
        key = (order.run_root, order.attempt)
        with self._changed:
            self._fence(order)
            attempt = self._attempts.get(key)
            if attempt is None and order.desired is not DesiredState.WATCHED:
                attempt = Attempt(order, self._node_id, self._spawner, self._standbys, self._changed)
                self._attempts[key] = attempt
                self._last_answers[key] = _LastAnswer()
            if attempt is None:
                report = AgentReport(self._node_id, self._clock(), ())
                return AttemptReport(AttemptPhase.UNKNOWN, self._age(), None, report, 0, 0)
            attempt.touched = time.monotonic()
            self._apply(attempt, order)
            until = time.monotonic() + order.wait
            while attempt.news <= order.news and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
        return self._answer(key, attempt, order)

    @property
    def pids(self) -> set[int]:
        """Processes that it has started and that live."""
        return self._spawner.pids()

    def _fence(self, order: AttemptOrder) -> None:
        home = str(Path(order.run_root).parent)
        highest = self._epochs.get(home, 0)
        if order.epoch < highest:
            raise OrderSuperseded(f"epoch {order.epoch} was followed by {highest}")
        self._epochs[home] = order.epoch

    def _apply(self, attempt: Attempt, order: AttemptOrder) -> None:
        if order.desired is DesiredState.STARTED and order.launch is not None:
            attempt.prepare(order.launch, self._check)
            if order.launch.master:
                attempt.start(order.launch, self._earlier_attempts(order))
        elif order.desired is DesiredState.STOPPED:
            attempt.stop(order.grace)
        elif order.desired is DesiredState.RELEASED:
            attempt.stop(0.0)
            attempt.release()
        attempt.collect(order.collect)
        self._prune()

    def _earlier_attempts(self, order: AttemptOrder) -> list[Attempt]:
        """Attempts of the same run that something is left of here."""
        earlier = [
            one
            for (root, number), one in self._attempts.items()
            if root == order.run_root and number < order.attempt
        ]
        return [one for one in earlier if one.phase.is_past_stop and one.phase is not AttemptPhase.STOPPED]

    def _answer(self, key: Key, attempt: Attempt, order: AttemptOrder) -> AttemptReport:
        ranks = attempt.rank_states()
        lines, offset = attempt.files.fetch(order.offset) if attempt.files else ((), order.offset)
        now = time.monotonic()
        with self._changed:
            newest = self._last_answers.setdefault(key, _LastAnswer())
            # The asker has what the newest answer held only if that answer reached it.
            known = set(newest.ranks) if order.serial == newest.serial else set()
            newest.serial, newest.ranks = newest.serial + 1, ranks
            fresh = tuple(rank for rank in ranks if rank not in known)
            files = attempt.files
            return AttemptReport(
                phase=attempt.phase,
                age=self._age(),
                started=None if attempt.started is None else now - attempt.started,
                report=AgentReport(self._node_id, self._clock(), fresh, lines, offset),
                news=attempt.news,
                serial=newest.serial,
                master=attempt.master,
                pids=attempt.pids,
                missing=files.problem.missing if files and files.problem else "",
                unfit=attempt.unfit,
                slow=files.stalled_seconds if files else 0.0,
                facts=self._facts,
                collected=attempt.collected(order.collect),
            )

    def _age(self) -> float:
        return time.monotonic() - self._born

    def _prune(self) -> None:
        """Forget attempts that stopped long ago, and free node memory of those that a newer attempt has replaced."""
        newest = {root: max(n for r, n in self._attempts if r == root) for root, _ in self._attempts}
        for (root, number), attempt in self._attempts.items():
            if attempt.phase is AttemptPhase.STOPPED and number < newest[root]:
                attempt.free_resources()
        stopped = [key for key, a in self._attempts.items() if a.phase is AttemptPhase.STOPPED]
        for key in sorted(stopped, key=lambda k: self._attempts[k].touched)[
            : max(0, len(stopped) - _MAX_REMEMBERED)
        ]:
            self._attempts.pop(key).free_resources()
            self._last_answers.pop(key, None)

    def close(self) -> None:
        """End all ranks of all attempts; for an agent that isn't a process of its own."""
        self._standbys.close()
        with self._changed:
            for attempt in self._attempts.values():
                attempt.stop(0.0)
            while any(a.phase is not AttemptPhase.STOPPED for a in self._attempts.values()):
                if not self._changed.wait(30.0):
                    break
            for attempt in self._attempts.values():
                attempt.free_resources()
