"""Kill the controller at every append, act and publish of a run with two faults, and compare how it ends.

`python -m tests.orchestrator.crashpoints` generates the points by a run that is let alone, then plays the run again for
each of them, alone and with each hardship: a full disk, a wall clock that steps, a disk that is slow, a second
controller. The last line counts the points and those that ended otherwise. The controller's own code runs on real files;
ranks and time are numbers (`fake_runtime`). `python -m tests.cluster.crashes` does some of it on a real Ray.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from configs.compose import compose, dump
from configs.paths import HomePaths
from orchestrator.control.controller import Controller
from orchestrator.record import events as ev
from orchestrator.record import log as logs
from orchestrator.record.events import GangShape, Submitted
from orchestrator.record.log import EventLog, Fenced, read
from orchestrator.record.states import State
from orchestrator.record.view import RunView, apply
from tests.orchestrator.fake_runtime import FakeClock, FakeRuntime, World, make_world

STEPS = 40
HARDSHIPS = ("alone", "full disk", "stepped clock", "slow disk", "second controller")
LIMIT = 400.0
"""Seconds of the simulated clock after which a run that hasn't ended counts as hung."""


class Killed(BaseException):
    """The controller's process ends here; no `except Exception` sees it."""


@dataclass
class Play:
    """One run from its submission to its end."""

    folder: Path
    config: str
    kill_at: int = -1
    """Index of the point that the controller is killed at; -1 for none."""
    hardship: str = "alone"
    points: list[str] = field(default_factory=list)
    """Points that were passed."""
    full_until: float = -1.0
    second: Controller | None = None
    _in_hook: bool = False

    def __post_init__(self) -> None:
        self.home = HomePaths(self.folder)
        self.clock = FakeClock()
        self.world: World = make_world(self.clock, 3, 2, STEPS)
        self.runtime = self._runtime()
        self.done: set[str] = set()
        self._seen: Counter[str] = Counter()

    # ---- points ----

    def point(self, name: str) -> None:
        """The controller stands at a point where it may be killed."""
        if self._in_hook:
            return
        self._seen[name] += 1
        self.points.append(name)
        if len(self.points) - 1 == self.kill_at:
            self._strike()

    def _strike(self) -> None:
        if self.hardship == "stepped clock":
            self.clock.skew -= 3600.0
        if self.hardship == "full disk":
            self.full_until = self.clock.now + 8.0
        if self.hardship == "second controller":
            self._in_hook = True
            self.second = self._controller()
            self._in_hook = False
            return
        raise Killed

    def _runtime(self) -> FakeRuntime:
        runtime = FakeRuntime(self.world)
        told: set[tuple[Any, ...]] = set()

        def ensure(spec: Any, desired: Any, grace: float = 0.0) -> None:
            # What is said again and again is a point the first two times.
            key = (spec.key, desired)
            fresh = key not in told or (*key, 2) not in told
            told.add((*key, 2) if key in told else key)
            if fresh:
                self.point(f"before {desired} of {spec.attempt}")
            FakeRuntime.ensure(runtime, spec, desired, grace)
            if fresh:
                self.point(f"after {desired} of {spec.attempt}")

        runtime.ensure = ensure  # type: ignore[method-assign]
        return runtime

    def _controller(self) -> Controller:
        self.runtime = self._runtime()
        return Controller(self.home, self.runtime, self.clock)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Have each write of a log and each publication be a point."""
        write, replace, real = EventLog._write, Path.replace, os.write

        def log_write(log: EventLog, line: bytes) -> None:
            self.point("before an append")
            if len(self.points) == self.kill_at and self.hardship in ("alone", "full disk"):
                real(log._fd, line[: len(line) // 2])  # torn: the next index is the kill in the middle
            self.point("in an append")
            if self.hardship == "slow disk" and self.kill_at >= 0:
                self.clock.now += 4.0
            write(log, line)
            self.point("after an append")

        def published(path: Path, target: Any) -> Path:
            self.point(f"before {Path(target).name}")
            made = replace(path, target)
            self.point(f"after {Path(target).name}")
            return made

        def full(fd: int, data: bytes) -> int:
            if self.clock.now < self.full_until:
                half = real(fd, data[: len(data) // 2]) if len(data) > 1 else 0
                if half:
                    return half
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, data)

        with (
            mock.patch.object(EventLog, "_write", log_write),
            mock.patch.object(Path, "replace", published),
            mock.patch.object(logs.os, "write", full),
            mock.patch.object(logs.os, "fsync", lambda fd: None),
        ):
            yield

    # ---- the script ----

    def go(self) -> str:
        """Play to the end; what is wrong with how it ended, or nothing."""
        with self.watched():
            controller = self._living(self._controller)
            run = self.home.run("a")
            run.root.mkdir(parents=True)
            run.config.write_text(self.config)
            event = Submitted(0, GangShape(4, 2), STEPS, 3, 1.0, "smoke", {"dp": 4})
            start = self.clock.now
            while self.clock.now - start < LIMIT:
                controller = self._turned(
                    controller, lambda c: c.submit("a", event) if not self._submitted() else c.turn()
                )
                self._faults()
                if self.world.clash():
                    return self.world.clash()
                if (
                    self._state() is State.SUCCEEDED
                    and self.full_until < self.clock.now
                    and not self.world.held
                ):
                    return self._judge()
                self.clock.now += 0.5
        return f"it is {self._state()} after {LIMIT:.0f} s"

    def _living(self, make: Callable[[], Controller]) -> Controller:
        while True:
            try:
                return make()
            except (Killed, OSError):
                self.clock.now += 0.5

    def _turned(self, controller: Controller, act: Callable[[Controller], object]) -> Controller:
        try:
            act(controller)
        except Killed:
            return self._living(self._controller)
        except OSError:
            pass  # a call of the command line says so, and is made again
        except Fenced:
            assert self.second is not None, "nobody else was there"
            self.second, controller = None, self.second
        if self.second is not None:
            self.second.turn()
        return controller

    def _submitted(self) -> bool:
        return bool(read(self.home.run("a").events))

    def _state(self) -> State | None:
        return self._view().state

    def _view(self) -> RunView:
        view = RunView()
        for event in read(self.home.run("a").events):
            view = apply(view, event)  # raises where a move isn't in the table
        return view

    def _faults(self) -> None:
        """A rank is killed 12 s into the first attempt, a node is lost 12 s into the second."""
        for number, fault in ((1, "rank"), (2, "node")):
            gang = self.world.gangs.get((str(self.home.run("a").root), number))
            if gang is None or fault in self.done or self.clock.now < gang.started + 12.0:
                continue
            self.done.add(fault)
            if fault == "rank":
                gang.deaths[1] = -9
            else:
                self.world.alive = [n for n in self.world.alive if n.node_id != gang.spec.shares[1].node_id]

    def _judge(self) -> str:
        view, events = self._view(), read(self.home.run("a").events)
        twice = [key for key, count in Counter(map(once, events)).items() if key and count > 1]
        started = [key for key, count in self.world.starting.items() if count > 1]
        saved = [e.payload.step for e in events if isinstance(e.payload, ev.CheckpointCommitted)]
        causes = [i.event.cause for i in view.incidents]
        wrong = {
            "events twice": twice,
            "attempts started twice": started,
            "incidents": causes if causes != ["rank_exit", "agent_lost"] else [],
            "open incidents": view.open_incidents,
            "attempts": view.attempt if view.attempt != 3 else 0,
            "checkpoints": saved if saved != [10, 20, 30, 40] else [],
            "totals": view.finished if view.finished is None or view.finished.step != STEPS else None,
            "sinks": not self.world.sinks,
            "seq": [e.seq for e in events] != list(range(len(events))),
        }
        return "; ".join(f"{what}: {value}" for what, value in wrong.items() if value)


def once(event: ev.Event) -> tuple[Any, ...]:
    """What may stand in a log once; empty for what may be repeated."""
    p = event.payload
    match p:
        case ev.AttemptPlaced() | ev.RanksStarted() | ev.AttemptResumed() | ev.Decided():
            return p.kind, p.attempt
        case ev.CheckpointCommitted() | ev.CheckpointFailed():
            return p.kind, p.attempt, p.step
        case ev.IncidentOpened() | ev.IncidentClosed():
            return p.kind, p.incident
        case ev.Submitted() | ev.Finished():
            return (p.kind,)
    return ()


def configuration() -> str:
    """What the run is submitted with."""
    return dump(compose(["experiment=smoke", "checkpoint.every=10"]))


def play(config: str, kill_at: int, hardship: str) -> tuple[str, list[str]]:
    """One play in a folder of its own: what is wrong, and the points that it passed."""
    with tempfile.TemporaryDirectory(prefix="megaray-crash-") as folder:
        one = Play(Path(folder), config, kill_at, hardship)
        try:
            return one.go(), one.points
        except Exception as error:  # a defect of the controller: the point is counted as wrong
            return f"{type(error).__name__}: {error}", one.points


def main(words: list[str]) -> int:
    """Play all points, or every nth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--every", type=int, default=1, help="play each nth point only")
    parser.add_argument("--hardship", choices=HARDSHIPS, default=None, help="with this one alone")
    options = parser.parse_args(words)
    config = configuration()
    wrong, points = play(config, -1, "alone")
    if wrong:
        print(f"left alone: {wrong}")
        return 1
    total = bad = 0
    for hardship in [options.hardship] if options.hardship else HARDSHIPS:
        failed = 0
        chosen = range(0, len(points), options.every)
        for index in chosen:
            wrong, _ = play(config, index, hardship)
            if wrong:
                failed += 1
                print(f"{hardship}, point {index} ({points[index]}): {wrong}")
        total, bad = total + len(chosen), bad + failed
        print(f"{hardship}: {len(chosen)} points, {failed} wrong", flush=True)
    print(f"{total} crash points, {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
