"""The cluster's nodes in the controller's hands: what is on record of them, and what placement may use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from configs.paths import HomePaths
from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.control.gang import GangRuntime
from orchestrator.decide import nodes as deciding
from orchestrator.decide.placement import Node
from orchestrator.record import cluster_log
from orchestrator.record.clock import Instant
from orchestrator.record.cluster_log import NodesView
from orchestrator.record.log import EventLog
from orchestrator.record.view import RunView

FRESH_SECONDS = 30.0
"""Seconds for which the last known nodes hold while Ray doesn't answer; after it none can be placed on."""


class NodeController:
    """Keeps the cluster's log, and the nodes as Ray and the log tell of them.

    Raises:
        Fenced: where a newer controller owns the log.
        OSError: where it can't be read or opened.
    """

    def __init__(
        self, home: HomePaths, runtime: GangRuntime, epoch: int, now: Instant, fence: Callable[[], None]
    ) -> None:
        self._runtime = runtime
        self._log = EventLog(home.cluster_log, epoch, now, fence, decode=cluster_log.decode)
        self.view: NodesView = cluster_log.fold(self._log.events)
        self.damage = self._log.cursor.damage
        self.nodes: list[Node] = []
        self._seen = now.mono

    def clock(self, now: Instant) -> float:
        """The cluster log's clock."""
        return self._log.clock(now)

    def write(self, payloads: Sequence[object], now: Instant) -> None:
        """Write events of nodes as one record."""
        self.view = cluster_log.apply(self.view, self._log.append(payloads, now))

    def turn(self, now: Instant, own: Collection[str]) -> None:
        """Look at the nodes, and put on record which joined, left, or were found unfit.

        Args:
            now: the present.
            own: reservations of the runs; slots that others hold are not free.

        Raises:
            Exception: what Ray raises; the nodes that were known hold for `FRESH_SECONDS` seconds.
        """
        try:
            live = self._runtime.nodes(own)
            self._seen = now.mono
        except Exception:
            if now.mono - self._seen > FRESH_SECONDS:
                self.nodes = []
            raise
        self.write(deciding.observe(self.view, live, self.clock(now)), now)
        self.nodes = deciding.with_marks(live, self.view, self.clock(now))

    def barred(self) -> frozenset[str]:
        """Addresses of nodes that get no work now."""
        return frozenset(node.ip for node in self.nodes if node.barred)

    def record_run_events(self, run_id: str, before: RunView, after: RunView, now: Instant) -> None:
        """Put on record what a run's turn tells of nodes: faults of their own, and what a measurement found."""
        # Each by itself: what the first one has led to is known to the next.
        for incident in after.incidents[len(before.incidents) :]:
            event = incident.event
            if event.node:
                verdict = Verdict(VerdictKind(event.cause), event.detail, event.rank, event.node)
                self.write(
                    deciding.suspicion_events(self.view, verdict, run_id, event.node, self.clock(now)), now
                )
        for finding in after.findings[len(before.findings) :]:
            self.write(deciding.cordon_events(self.view, finding.finding, run_id), now)

    def mark(self, node: str, mark: str, reason: str, by: str, now: Instant) -> None:
        """Cordon, uncordon, drain, or keep a node as a spare.

        Raises:
            UserError: where there is no such node, or the mark changes nothing.
        """
        self.write([deciding.mark_event(self.view, node, mark, reason, by)], now)

    def close(self) -> None:
        """Close the log."""
        self._log.close()
