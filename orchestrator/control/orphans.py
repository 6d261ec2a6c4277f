"""Slots that are held for an attempt which no run has any more: nobody acknowledged their release in time.

The controller that asked for it has moved on, and a new one knows of no such attempt. So slots that are held under the
name of a run's earlier attempt are given back, in the usual order: its ranks are ended first. Such a name never comes
back, since attempts are counted, so nothing here can meet a gang that is just being placed.
"""

from __future__ import annotations

from collections.abc import Mapping

from configs.paths import HomePaths, RunPaths
from orchestrator.control.gang import DesiredState, GangRuntime, GangSpec, run_of
from orchestrator.record.clock import Instant
from orchestrator.record.events import AttemptPlaced
from orchestrator.record.log import read
from orchestrator.record.view import fold

EVERY_SECONDS = 30.0


class OrphanCollector:
    """Releases reservations of this home that no run has any more."""

    def __init__(self, home: HomePaths, runtime: GangRuntime, epoch: int) -> None:
        self._home, self._runtime, self._epoch = home, runtime, epoch
        self._last_scan = float("-inf")
        self._specs: dict[str, GangSpec | None] = {}
        """Of the attempts whose slots are being given back, by name; None for a name that the log doesn't have."""

    def turn(self, groups: Mapping[str, str], now: Instant) -> None:
        """Scan the reservations every `EVERY_SECONDS`, and release those that no run has.

        Args:
            groups: name under which a run holds slots now, by run; empty where it holds none. The runs that are left out
                aren't known well enough to touch anything of theirs.
            now: the present.

        Raises:
            OSError: where a run's log can't be read.
        """
        if now.mono - self._last_scan < EVERY_SECONDS:
            return
        self._last_scan = now.mono
        left = {name for name in self._runtime.reservations() if _is_orphan(name, groups)}
        self._specs = {name: spec for name, spec in self._specs.items() if name in left}
        for name in sorted(left):
            if name not in self._specs:
                self._specs[name] = _spec(self._home.run(run_of(name)), name, self._epoch)
            if (spec := self._specs[name]) is not None:
                self._runtime.ensure(spec, DesiredState.STOPPED)
                self._runtime.ensure(spec, DesiredState.RELEASED)


def _is_orphan(name: str, groups: Mapping[str, str]) -> bool:
    return groups.get(run_of(name), name) != name


def _spec(run: RunPaths, name: str, epoch: int) -> GangSpec | None:
    """The newest attempt that held slots under a name, as far as it takes to end it; None where there was none."""
    events = read(run.events)
    placed = [e.payload for e in events if isinstance(e.payload, AttemptPlaced) and e.payload.group == name]
    if not placed:
        return None
    last = placed[-1]
    return GangSpec(
        reservation=name,
        run_root=str(run.root),
        attempt=last.attempt,
        shares=last.shares,
        resource=(last.gang or fold(events).gang).resource,
        world=sum(len(share.ranks) for share in last.shares),
        program=(),
        code=last.code,
        epoch=epoch,
    )
