"""Gangs in the controller's process: a thread that carries what is wanted to all nodes, and gathers their answers.

It never waits for a node: each has at most one call under way, which ends when the node has news. A call that doesn't
come back is given up and asked again, ever more rarely. What the thread holds it can find again from a `GangSpec` alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from faulttol import steady_clock
from orchestrator.agent.gang_state import Gang, Member
from orchestrator.agent.orders import AttemptOrder, AttemptPhase, AttemptReport, LaunchSpec, OrderSuperseded
from orchestrator.control.gang import DesiredState, GangSpec, GangStatus
from orchestrator.record.events import NodeShare

log = logging.getLogger("megaray.runtime")

_ANSWER_SECONDS = 10.0
"""A call that is so late is given up."""
_FIRST_BACKOFF, _LAST_BACKOFF = 0.2, 10.0
_IDLE_SECONDS = 0.2
_SWEEP_SHARE = 2e-4
"""Seconds between two looks at a node that has reported nothing, for each node that there is."""
_SLOTS_SECONDS = 0.2
"""Between two looks at slots that aren't held, or free, yet."""
_COLLECT_SECONDS = 12.0
"""Agents give up writing stacks after ten seconds."""
_GAP_SECONDS = 2.0
_ENDED_KEPT = 256
"""Gangs that are remembered after their end."""


class AgentGone(Exception):
    """A node's agent has ended, or was never there."""


class AgentTransport(Protocol):
    """Sends orders to agents and reserves slots. Each call returns a future at once."""

    def live_nodes(self) -> frozenset[str] | None:
        """Ids of the nodes that live; None where that isn't known now."""

    def send_order(
        self, spec: GangSpec, share: NodeShare, order: AttemptOrder, make: bool
    ) -> Future[AttemptReport]:
        """Carry an order to a node's agent, which is made where it is missing and `make` is set. Fails with `AgentGone`."""

    def find_witness(self, spec: GangSpec, path: str) -> Future[str]:
        """Address of a node outside the gang that sees `path`; empty where none does."""

    def reserve(self, spec: GangSpec) -> Future[dict[str, dict[str, str]] | None]:
        """Hold a gang's slots: variables of its devices by node id, once they are held; None: ask again."""

    def release(self, reservation: str) -> Future[bool]:
        """Give slots back; True once they are free."""


class GangDriver:
    """The part of `GangRuntime` that drives gangs, over any transport.

    Args:
        transport: reaches agents and holds slots.
        wall: seconds since the epoch that never step, as the controller tells the time to `AgentReport.with_clock`.
    """

    def __init__(self, transport: AgentTransport, wall: Callable[[], float] = steady_clock.now) -> None:
        self._transport, self._wall = transport, wall
        self._gangs: dict[tuple[str, int], Gang] = {}
        self._lock = threading.RLock()
        self._done: deque[tuple[Gang, Member, Future[AttemptReport]]] = deque()
        self._wake, self._news = threading.Event(), threading.Event()
        self._closed = False
        self._turned = time.monotonic()
        self._swept = 0.0
        self._thread = threading.Thread(target=self._work, name="gangs", daemon=True)
        self._thread.start()

    # ---- what the controller calls; nothing here waits ----

    def ensure(self, spec: GangSpec, desired: DesiredState, grace: float = 0.0) -> None:
        """As `GangRuntime.ensure`."""
        now = time.monotonic()
        with self._lock:
            gang = self._gangs.get(spec.key)
            if gang is None:
                members = [Member(share) for share in spec.shares]
                gang = self._gangs[spec.key] = Gang(spec, desired, grace, now, members)
                self._forget_earlier(spec)
            elif not gang.set_desired(spec, desired, grace, now):
                return
            for member in gang.members:  # what is under way asks for what was wanted before
                member.call, member.retry_at = None, 0.0
            gang.slots_due = 0.0
            self._swept = 0.0
        self._wake.set()

    def status(self, spec: GangSpec) -> GangStatus:
        """As `GangRuntime.status`."""
        with self._lock:
            gang = self._gangs.get(spec.key)
            # A thread that didn't turn, as in a machine that was suspended, can't call others silent.
            return gang.status(self._turned, self._wall()) if gang else GangStatus()

    def collect(self, spec: GangSpec, request: str) -> None:
        """As `GangRuntime.collect`."""
        with self._lock:
            gang = self._gangs.get(spec.key)
            if gang is None or request in gang.collecting or request in gang.collected:
                return
            gang.collecting[request] = time.monotonic()
            for member in gang.members:
                member.call, member.retry_at = None, 0.0
            self._swept = 0.0
        self._wake.set()

    def wait(self, seconds: float) -> bool:
        """Sleep until an agent has reported something new; False where none has within `seconds`."""
        came = self._news.wait(seconds)
        self._news.clear()
        return came

    def close(self) -> None:
        """End the thread; agents and ranks continue."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _forget_earlier(self, spec: GangSpec) -> None:
        earlier = [key for key, gang in self._gangs.items()
                   if key[0] == spec.run_root and key[1] < spec.attempt
                   and (gang.released or (gang.stopped and gang.desired is DesiredState.STOPPED))]  # fmt: skip
        ended = [key for key, gang in self._gangs.items() if gang.released]
        for key in {*earlier, *ended[: max(0, len(ended) - _ENDED_KEPT)]}:
            del self._gangs[key]

    # ---- the thread ----

    def _work(self) -> None:
        while not self._closed:
            self._wake.wait(_IDLE_SECONDS)
            self._wake.clear()
            try:
                with self._lock:
                    self._turn(time.monotonic())
            except Exception:  # it must turn forever: nothing else carries orders
                log.exception("a turn of the runtime")
                time.sleep(_IDLE_SECONDS)

    def _turn(self, now: float) -> None:
        gap = now - self._turned
        self._turned = now
        if gap > _GAP_SECONDS:  # suspended, or starved: nobody could answer meanwhile
            for gang in self._gangs.values():
                for member in gang.members:
                    member.since += gap if member.since else 0.0
                    member.called += gap
                    member.answered = None if member.answered is None else member.answered + gap
        touched: dict[int, Gang] = {}
        while self._done:
            gang, member, call = self._done.popleft()
            if member.call is call:
                if self._handle_result(gang, member, call, now):
                    touched[id(gang)] = gang
                    self._news.set()
                else:
                    self._send_order(gang, member, now)
        members = sum(len(gang.members) for gang in self._gangs.values() if not gang.released)
        sweep = now - self._swept >= max(_IDLE_SECONDS, members * _SWEEP_SHARE)
        if sweep:
            self._swept = now
        for gang in list(self._gangs.values()) if sweep else touched.values():
            self._advance(gang, now)

    def _handle_result(self, gang: Gang, member: Member, call: Future[AttemptReport], now: float) -> bool:
        """Note how a call ended; whether something follows from it."""
        member.call = None
        try:
            fresh = member.record_answer(call.result(), now, self._wall())
            if gang.desired is DesiredState.RELEASED and member.phase is AttemptPhase.STOPPED:
                member.confirmed_free = fresh = True
            return fresh
        except AgentGone as error:
            # Before the ranks were started a new agent is as good.
            if gang.desired is DesiredState.WATCHED or (gang.desired is DesiredState.STARTED and gang.begun):
                member.lost = str(error)
                return True
        except OrderSuperseded as error:
            log.warning("run %s: %s", gang.spec.run_root, error)
        except Exception as error:  # any fault of the way there: asked again
            log.warning("node %s: %s", member.share.ip, error)
        self._back_off(member, now)
        return False

    def _back_off(self, member: Member, now: float) -> None:
        member.retry_at = now + min(_LAST_BACKOFF, _FIRST_BACKOFF * 2.0**member.failures)
        member.failures = min(member.failures + 1, 10)

    def _advance(self, gang: Gang, now: float) -> None:
        self._reserve(gang, now)
        if gang.desired is DesiredState.RESERVED or gang.released:
            return
        if gang.desired is DesiredState.STARTED and gang.path_missing_everywhere and gang.witness is None:
            self._find_witness(gang)
        before = gang.stopped
        gang.mark_lost_nodes(now, self._transport.live_nodes())
        for member in gang.members:
            self._send_order(gang, member, now)
        if gang.collect(now, _COLLECT_SECONDS):
            self._news.set()
        if gang.stopped and not before:
            self._news.set()
        if gang.desired is DesiredState.RELEASED and all(m.lost or m.confirmed_free for m in gang.members):
            self._release(gang, now)

    def _reserve(self, gang: Gang, now: float) -> None:
        if gang.desired not in (DesiredState.RESERVED, DesiredState.STARTED) or gang.devices is not None:
            return
        if gang.reserving is not None and gang.reserving.done():
            gang.devices = _result(gang.reserving)
            gang.reserving = None
            gang.slots_due = now + _SLOTS_SECONDS
            if gang.devices is not None:
                self._news.set()
                return
        if gang.reserving is None and now >= gang.slots_due:
            gang.reserving = self._transport.reserve(gang.spec)
            gang.reserving.add_done_callback(lambda _: self._retry_in())

    def _find_witness(self, gang: Gang) -> None:
        """Ask others, to tell a node's mount from a folder that isn't shared."""
        if gang.finding_witness is None:
            gang.finding_witness = self._transport.find_witness(
                gang.spec, gang.path_missing_everywhere.rpartition(" (")[0]
            )
            gang.finding_witness.add_done_callback(lambda _: self._retry_in())
        elif gang.finding_witness.done():
            gang.witness = _result(gang.finding_witness) or ""
            self._news.set()

    def _release(self, gang: Gang, now: float) -> None:
        if gang.reserving is not None and not gang.reserving.done():
            return  # a call to hold the slots is under way, and would hold them after they were let go
        if gang.releasing is not None and gang.releasing.done():
            gang.released = bool(_result(gang.releasing))
            gang.releasing = None
            gang.slots_due = now + _SLOTS_SECONDS
            if gang.released:
                self._news.set()
        elif gang.releasing is None and now >= gang.slots_due:
            gang.releasing = self._transport.release(gang.spec.reservation)
            gang.releasing.add_done_callback(lambda _: self._retry_in())

    def _retry_in(self) -> None:
        self._swept = 0.0
        self._wake.set()

    # ---- one node ----

    def _send_order(self, gang: Gang, member: Member, now: float) -> None:
        """Send the next order, where one is due."""
        if member.call is not None:
            if now - member.called < _ANSWER_SECONDS + gang.spec.heartbeat:
                return
            log.warning("node %s: no answer", member.share.ip)
            member.call = None
            self._back_off(member, now)
        if (
            member.lost
            or now < member.retry_at
            or (gang.desired is DesiredState.STARTED and gang.devices is None)
        ):
            return
        if (
            gang.desired is DesiredState.STOPPED
            and member.phase is AttemptPhase.STOPPED
            or member.confirmed_free
        ):
            return
        go = gang.desired is DesiredState.STARTED and gang.may_start
        if member.phase is AttemptPhase.READY and not go and now - (member.answered or 0.0) < 1.0:
            return  # a call that waits would keep the start from it
        order = self._order(gang, member, go)
        make = gang.desired is not DesiredState.WATCHED
        member.since = member.since or now
        member.called = now
        member.call = call = self._transport.send_order(gang.spec, member.share, order, make)
        call.add_done_callback(lambda done: self._arrived(gang, member, done))

    def _arrived(self, gang: Gang, member: Member, call: Future[AttemptReport]) -> None:
        self._done.append((gang, member, call))
        self._wake.set()

    def _order(self, gang: Gang, member: Member, go: bool) -> AttemptOrder:
        spec, answer = gang.spec, member.answer
        launch = None
        if gang.desired is DesiredState.STARTED and (answer is None or answer.started is None):
            launch = LaunchSpec(
                world=spec.world,
                ranks=member.share.ranks,
                ip=member.share.ip,
                addresses=tuple(share.ip for share in spec.shares),
                program=spec.program,
                code=spec.code,
                environment=spec.environment,
                devices=(gang.devices or {}).get(member.share.node_id, {}),
                uses_devices=spec.resource != "CPU",
                master=gang.master if go else "",
            )
        return AttemptOrder(
            epoch=spec.epoch,
            run_root=spec.run_root,
            attempt=spec.attempt,
            desired=gang.desired,
            launch=launch,
            grace=gang.grace,
            collect=tuple(gang.collecting),
            news=answer.news if answer and not (go and launch) else -1,
            serial=answer.serial if answer else 0,
            offset=member.offset,
            wait=spec.heartbeat,
        )


def _result(call: Future[Any]) -> Any:
    """Result of a call about slots; None where it failed, and the caller asks again."""
    try:
        return call.result()
    except Exception as error:
        log.warning("slots: %s", error)
        return None
