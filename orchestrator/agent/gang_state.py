"""State of a gang in the controller's process: each node's newest answer, and what follows from them. Makes no calls."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from configs.metrics import MetricLine
from faulttol.detect.snapshot import RankObservation
from orchestrator.agent.orders import AttemptPhase, AttemptReport
from orchestrator.control.gang import AgentReport, DesiredState, GangSpec, GangStatus
from orchestrator.record.events import NodeShare

_ORDER = list(DesiredState)
_LINES_KEPT = 20_000
"""Metric lines that wait for a controller that doesn't look."""
_SLOW_SECONDS = 60.0
"""Shared storage that others have long read from."""
_UNREACHABLE_SECONDS = 30.0
"""A node that hasn't confirmed a stop so long after its grace can't be reached."""


@dataclass
class Member:
    """One node of a gang."""

    share: NodeShare
    call: Future[AttemptReport] | None = None
    called: float = 0.0
    since: float = 0.0
    """When it was first called; times here are monotonic seconds."""
    answered: float | None = None
    retry_at: float = 0.0
    failures: int = 0
    answer: AttemptReport | None = None
    lost: str = ""
    departed: bool = False
    """It was lost because its node is not part of the cluster."""
    confirmed_free: bool = False
    """It has answered that nothing is left after the slots were given up."""
    offset: int = 0
    ranks: dict[int, RankObservation] = field(default_factory=dict)
    lines: list[MetricLine] = field(default_factory=list)
    shifts: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """How far this clock was ahead of the node's, by each of the last answers, with their delay on top."""

    @property
    def phase(self) -> AttemptPhase:
        """As it was last heard of."""
        return self.answer.phase if self.answer else AttemptPhase.UNKNOWN

    def record_answer(self, answer: AttemptReport, now: float, wall: float) -> bool:
        """Keep an answer; whether it has news for the controller."""
        before, self.answer = self.answer, answer
        self.answered, self.failures = now, 0
        report = answer.report
        self.shifts.append(wall - report.time)
        self.ranks |= {rank.rank: rank for rank in report.ranks}
        if len(self.lines) < _LINES_KEPT:
            self.lines += report.lines
            self.offset = report.offset
        return before is None or answer.news != before.news or bool(report.lines)

    def reset_lost(self, desired: DesiredState) -> None:
        """To stop a gang, ask a node again whose agent had ended: a new agent there kills what the old one left."""
        if desired in (DesiredState.STOPPED, DesiredState.RELEASED) and self.lost and not self.departed:
            self.lost, self.answer, self.since, self.answered = "", None, 0.0, None

    def report(self, wall: float) -> AgentReport | None:
        """What came in since the last call, with the node's time as it is now."""
        if self.answer is None or not self.shifts:
            return None
        ranks, lines = tuple(self.ranks.values()), tuple(self.lines)
        self.ranks, self.lines = {}, []
        # Of several delays the least is nearest to none, so exits of different nodes keep their order.
        return AgentReport(self.share.node_id, wall - min(self.shifts), ranks, lines, self.offset)


@dataclass
class Gang:
    """An attempt's nodes together."""

    spec: GangSpec
    desired: DesiredState
    grace: float
    desired_since: float
    """Monotonic time since which that state is desired."""
    members: list[Member]
    devices: dict[str, dict[str, str]] | None = None
    """Variables by node, once the slots are held."""
    reserving: Future[dict[str, dict[str, str]] | None] | None = None
    releasing: Future[bool] | None = None
    slots_due: float = 0.0
    """When the slots are asked about again."""
    released: bool = False
    collecting: dict[str, float] = field(default_factory=dict)
    """Requests that stacks are being written for, and since when."""
    collected: frozenset[str] = frozenset()
    """Requests whose stacks are there."""
    witness: str | None = None
    """Address of a node outside the gang that sees what all its nodes miss; empty: none does; None: nobody was asked."""
    finding_witness: Future[str] | None = None
    """The call that finds one."""

    def set_desired(self, spec: GangSpec, desired: DesiredState, grace: float, now: float) -> bool:
        """Set the desired state; whether it is new. An earlier state in the order is ignored."""
        self.spec = spec
        if _ORDER.index(desired) < _ORDER.index(self.desired) or (desired, grace) == (
            self.desired,
            self.grace,
        ):
            return False
        if desired is not self.desired:
            self.desired_since = now
            for member in self.members:
                member.reset_lost(desired)
        self.desired, self.grace = desired, grace
        return True

    def collect(self, now: float, limit: float) -> bool:
        """Note which requests for stacks are done, or over their `limit` of seconds; whether one is."""
        done = {
            request for request, since in self.collecting.items()
            if now - since > limit
            or all(m.lost or m.answer is None or request in m.answer.collected for m in self.members)
        }  # fmt: skip
        self.collected |= done
        for request in done:
            del self.collecting[request]
        return bool(done)

    @property
    def master(self) -> str:
        """Address and port of the rendezvous, once the first node has chosen."""
        first = self.members[0].answer
        return first.master if first else ""

    @property
    def begun(self) -> bool:
        """Some node has started its ranks."""
        return any(m.answer is not None and m.answer.started is not None for m in self.members)

    @property
    def may_start(self) -> bool:
        """All nodes are ready, or some have started already and the others are to follow."""
        return bool(self.master) and (
            self.begun
            or (all(m.phase is AttemptPhase.READY for m in self.members) and not self._version_mismatches())
        )

    @property
    def stopped(self) -> bool:
        """Nothing of it runs on any node that can be asked: the next attempt of its run may start."""
        return self.desired in (DesiredState.STOPPED, DesiredState.RELEASED) and all(
            m.lost or m.phase in (AttemptPhase.ENDING, AttemptPhase.STOPPED) for m in self.members
        )

    def mark_lost_nodes(self, now: float, alive: frozenset[str] | None) -> None:
        """Mark members as lost: their node left the cluster, its agent was started anew, or it doesn't confirm a stop."""
        youngest = min(
            (m.answer.started for m in self.members if m.answer and m.answer.started is not None),
            default=None,
        )
        for member in self.members:
            if member.lost:
                continue
            if alive is not None and member.share.node_id not in alive:
                member.lost, member.departed = "the node has left the cluster", True
            elif self.desired in (DesiredState.STARTED, DesiredState.WATCHED):
                member.lost = self._without_ranks(member, youngest)
            elif now - self.desired_since > self.grace + _UNREACHABLE_SECONDS and not _stop_confirmed_since(
                member, self.desired_since
            ):
                member.lost = "the node's agent doesn't answer"
            if member.lost:
                member.call = None

    @property
    def path_missing_everywhere(self) -> str:
        """Path that no node of the gang sees."""
        missing = [m.answer.missing for m in self.members if m.answer is not None and m.answer.missing]
        return missing[0] if len(missing) == len(self.members) else ""

    def _without_ranks(self, member: Member, youngest: float | None) -> str:
        answer = member.answer
        if answer is None:
            return ""
        if answer.phase is AttemptPhase.UNKNOWN:
            return "the node's agent was started anew; the ranks ended with the one before"
        if answer.started is None and youngest is not None and answer.age < youngest:
            return "the node's agent was started anew while the gang started"
        return ""

    def _version_mismatches(self) -> dict[str, str]:
        """Nodes whose versions aren't those of most, and what they are; under "" where there is no majority."""
        if len(self.members) < 2:
            return {}
        versions = {m.share.node_id: tuple(sorted(m.answer.facts.items())) for m in self.members if m.answer}
        if not versions:
            return {}
        common, count = Counter(versions.values()).most_common(1)[0]
        differing = {
            node: ", ".join(f"{name} {dict(facts).get(name, 'none')} (elsewhere {value})" for name, value in common
                            if dict(facts).get(name) != value)
            for node, facts in versions.items() if facts != common
        }  # fmt: skip
        if differing and count * 2 <= len(versions):
            node, text = next(iter(differing.items()))
            return {"": f"the gang's nodes differ: {text} on {node}; install the same everywhere"}
        return differing

    def status(self, now: float, wall: float) -> GangStatus:
        """As the controller asks for it; what came in is reported once."""
        members = self.members
        started = all(m.answer is not None and m.answer.pids for m in members)
        pids = (
            {rank: pid for m in members if m.answer for rank, pid in m.answer.pids.items()} if started else {}
        )
        refused, unfit = self._unfit()
        gone = ""
        if all(m.departed for m in members) and not any(m.answered for m in members):
            gone = "no node of the gang is in the cluster any more: it was restarted or lost"
        return GangStatus(
            reserved=self.devices is not None or self.begun,
            pids=dict(sorted(pids.items())),
            master=self.master if self.begun else "",
            reports=tuple(self._reports(wall)),
            silent={
                m.share.node_id: max(0.0, now - (m.since if m.answered is None else m.answered))
                for m in members
                if m.since and not m.lost
            },  # fmt: skip
            lost={m.share.node_id: m.lost for m in members if m.lost},
            unfit=unfit,
            refused=refused,
            gone=gone,
            stopped=self.stopped,
            released=self.released,
            collected=self.collected,
        )

    def _reports(self, wall: float) -> Iterator[AgentReport]:
        for member in self.members:
            if member.ranks or member.lines:
                report = member.report(wall)
                if report is not None:
                    yield report

    def _unfit(self) -> tuple[str, dict[str, str]]:
        """Why no node can start the ranks, and which nodes can't by a fault of their own."""
        answers = [(m.share, m.answer) for m in self.members if m.answer is not None]
        unfit = {share.node_id: answer.unfit for share, answer in answers if answer.unfit}
        if self.desired is not DesiredState.STARTED or self.begun:
            return "", unfit
        ready = [share.ip for share, answer in answers if answer.phase is AttemptPhase.READY]
        seeing = [*ready, *([self.witness] if self.witness else [])]
        missing = {share.node_id: (share, answer.missing) for share, answer in answers if answer.missing}
        refused = ""
        for node, (share, path) in missing.items():
            if seeing:
                why = "its mount, or a folder that isn't shared"
                unfit[node] = f"node {share.ip} doesn't see {path}, which {seeing[0]} sees: {why}"
            elif len(missing) == len(self.members) and self.witness is not None:
                refused = (
                    f"node {share.ip} doesn't see {path}; "
                    "MEGARAY_HOME must be a folder that all nodes share (NFS, Lustre, …)"
                )
        slow = {
            s.node_id: a.slow
            for s, a in answers
            if a.phase is AttemptPhase.PREPARING and a.slow > _SLOW_SECONDS
        }
        if ready:
            unfit |= {
                node: f"its shared storage hasn't answered for {seconds:.0f} s"
                for node, seconds in slow.items()
            }
        if len(ready) == len(self.members):
            odds = self._version_mismatches()
            refused = refused or odds.pop("", "")
            unfit |= odds
        return refused, unfit


def _stop_confirmed_since(member: Member, wanted: float) -> bool:
    return member.answered is not None and member.answered > wanted and member.phase.is_past_stop
