"""What a node tells of its ranks for people: how long their steps took, and what each was last seen doing.

Written to the run's folder by a thread of its own, which storage may hold for long. Nothing is decided by it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.paths import AttemptPaths
from faulttol import steady_clock
from faulttol.detect.snapshot import RankObservation
from faulttol.timeline.store import StepStore
from orchestrator.record import rank_status

_SECONDS = 1.0
_SEEN_EVERY = 2
"""Turns between two statuses that are written."""

log = logging.getLogger("megaray.agent")


class ActivityWriter:
    """Keeps one attempt's steps and statuses on one node.

    Args:
        attempt: paths of the attempt.
        node: id of the node; it names the files.
        ranks: those of the node.
        rings: folder of their rings.
        nodes: nodes of the gang, which share what may be written.
        statuses: the ranks as they are now.
    """

    def __init__(
        self, attempt: AttemptPaths, node: str, ranks: Sequence[int], rings: Path, nodes: int,
        statuses: Callable[[], Sequence[RankObservation]],
    ) -> None:  # fmt: skip
        self._folder, self._node, self._statuses = attempt.seen, node, statuses
        self._store = StepStore(attempt.root, node, ranks, rings, nodes)
        self._written: Sequence[RankObservation] = ()
        self._frozen = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="agent-activity", daemon=True)
        self._thread.start()

    def freeze(self) -> None:
        """Leave the statuses as they are: the ranks are being stopped, and what they did before is of interest."""
        self._frozen = True

    def close(self, seconds: float) -> None:
        """Write what is left and end, within so many seconds; what storage holds up is left to it."""
        self._ended.set()
        self._thread.join(seconds)

    def _work(self) -> None:
        turn = 0
        while not self._ended.wait(_SECONDS):
            turn += 1
            self._guarded(self._store.append)
            if turn % _SEEN_EVERY == 0 and not self._frozen:
                self._guarded(self._write_looks)
        self._guarded(self._store.close)

    def _write_looks(self) -> None:
        statuses = self._statuses()
        if statuses and statuses != self._written:
            rank_status.write_statuses(self._folder, self._node, statuses, steady_clock.now())
            self._written = statuses

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception:  # a picture for people: no rank may suffer from it
            log.exception("chronicle of %s", self._folder.parent)
