"""A gang of the trainer's own ranks on this machine, forked from one warm process, with a fault in one of them, and watched
as node agents and a controller watch it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.paths import RunPaths
from configs.rank import RankContext, RankFiles, free_port
from configs.schema import RunConfig
from faulttol import steady_clock
from faulttol.detect import processes
from faulttol.detect.base import judge_all
from faulttol.detect.rank_watch import RankWatch
from faulttol.detect.snapshot import RankObservation, Snapshot
from faulttol.verdicts import Verdict, VerdictKind

_SEVERITY = {kind: place for place, kind in enumerate(VerdictKind)}

_HOLDS = (
    "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(1, flush=True); time.sleep(20)"
)
"""A process that holds a file's lock for some seconds."""


@dataclass(frozen=True)
class RankFault:
    """What happens in one rank."""

    rank: int
    act: str
    """`kill`, `segv`, `abort`, `raise`, `memory`, `user`, `exit`, `leave` (code 0), `stop`, `sleep`, `term`, `stop_writer`;
    and, which are not faults, `busy` and `file` (waits for one)."""
    where: str
    """`step`, `middle` (of a step), `data`, `save`, `writing` (the save's own thread), `load`, `reading` (a thread of the
    load), `rendezvous`."""
    step: int = 0
    """Index of the step, for faults in one."""
    seconds: float = 1e6
    """For `sleep` and `busy`."""

    @property
    def hangs(self) -> bool:
        """Nobody ends by it."""
        return self.act in ("stop", "sleep", "stop_writer")


def _act(fault: RankFault, mark: Path) -> None:
    """Carry a fault out in this process, once."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    me = os.getpid()
    match fault.act:
        case "kill" | "segv" | "abort" | "stop" | "term":
            names = {"kill": "KILL", "segv": "SEGV", "abort": "ABRT", "stop": "STOP", "term": "TERM"}
            os.kill(me, signal.Signals[f"SIG{names[fault.act]}"])
        case "raise":
            raise ValueError("planted")
        case "memory":
            raise MemoryError("planted")
        case "user":
            raise UserError("planted=1 is wrong; type another")
        case "exit":
            os._exit(7)
        case "leave":
            os._exit(0)
        case "sleep":
            time.sleep(fault.seconds)
        case "busy":
            until = time.monotonic() + fault.seconds
            while time.monotonic() < until:
                sum(range(1000))
        case "file":
            with mark.open() as held:
                holder = subprocess.Popen([sys.executable, "-c", _HOLDS, str(mark)], stdout=subprocess.PIPE)
                assert holder.stdout is not None and holder.stdout.readline()
                fcntl.flock(held, fcntl.LOCK_EX)
        case "stop_writer":
            for child in processes.tree(me)[1:]:
                os.kill(child.pid, signal.SIGSTOP)


def _arm(fault: RankFault, mark: Path) -> None:
    """Plant a fault in the trainer of this process."""
    from faulttol.checkpoint import reading
    from faulttol.staged import saver
    from trainer import batch_loader, checkpoints, loop

    def before(owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
        real = getattr(owner, name)

        def act_first(*args: Any, **named: Any) -> Any:
            if when(*args):
                _act(fault, mark)
            return real(*args, **named)

        setattr(owner, name, act_first)

    steps = iter(range(1_000_000))
    match fault.where:
        case "step" | "middle":
            make = loop.make_engine

            def armed(*args: Any) -> Any:
                engine = make(*args)
                real = engine.step

                def step(batches: Any, samples: int, lr: float, phase: Any, asked: Any) -> Any:
                    mine = next(steps) == fault.step

                    def acting(name: str) -> Any:
                        if mine and name == "optimizer":
                            _act(fault, mark)
                        return phase(name)

                    if mine and fault.where == "step":
                        _act(fault, mark)
                    return real(batches, samples, lr, acting if fault.where == "middle" else phase, asked)

                engine.step = step
                return engine

            loop.make_engine = armed  # type: ignore[assignment]
        case "data":
            before(batch_loader.BatchLoader, "batches", lambda *_: next(steps) == fault.step)
        case "save":
            before(checkpoints.Checkpoints, "stage")
        case "writing":
            before(saver.Saver, "_write")
        case "load":
            before(checkpoints.Checkpoints, "restore")
        case "reading":
            before(reading.CheckpointReader, "verified")
        case "rendezvous":
            before(loop, "join")


def _rank(context: RankContext, config: Path, log: Path, fault: RankFault | None, mark: Path) -> None:
    """A forked rank; never returns."""
    code = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for fd in (1, 2):
            os.dup2(out, fd)
        os.environ.update(
            context.environment() | {"MEGARAY_PARENT": str(os.getppid()), "OMP_NUM_THREADS": "1"}
        )
        if fault is not None and fault.rank == context.rank:
            _arm(fault, mark)
        from trainer.cli import main

        code = main(["run", "--config", str(config)])
    finally:
        os._exit(code)


class WatchedGang:
    """Ranks of one attempt, started when it is made.

    Args:
        run: folder of the run; `config.yaml` is in it.
        config: the same, resolved.
        world: ranks; half of them count as one node's, half as another's.
        rings: folder in this machine's memory.
        fault: in one of them.
    """

    def __init__(
        self, run: Path, config: RunConfig, world: int, rings: Path, fault: RankFault | None, attempt: int = 1
    ) -> None:
        self.config, self.world, self._rings = config, world, rings
        self.mark = run / f"fault-{attempt}"
        self._exits: dict[int, tuple[int, float]] = {}
        self._known: dict[int, RankObservation] = {}
        rings.mkdir(parents=True, exist_ok=True)
        paths = RunPaths(run).attempt(attempt)
        paths.ranks.mkdir(parents=True, exist_ok=True)
        self.paths = paths
        port = free_port()
        self.pids: dict[int, int] = {}
        self.began = time.monotonic()
        for rank in range(world):
            context = RankContext(rank, world, rank, world, "127.0.0.1", port, RunPaths(run), attempt, rings)
            pid = os.fork()
            if pid == 0:
                _rank(context, run / "config.yaml", paths.log(rank), fault, self.mark)
            self.pids[rank] = pid
            threading.Thread(target=self._wait, args=(rank, pid), daemon=True).start()
        self._watches = {rank: RankWatch(RankFiles(rings, rank), pid) for rank, pid in self.pids.items()}

    def _wait(self, rank: int, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        self._exits[rank] = os.waitstatus_to_exitcode(status), steady_clock.now()

    def look(self, ranks: Iterator[int] | range) -> None:
        """Ask the agent of some ranks."""
        for rank in ranks:
            code, when = self._exits.get(rank, (None, None))
            self._known[rank] = self._watches[rank].observe(code, when, self._words(rank) if code else "")

    def _words(self, rank: int) -> str:
        rows = self.paths.log(rank).read_text(errors="replace").split("\n")
        return next((row.strip() for row in reversed(rows) if row.strip()), "")

    def snapshot(self) -> Snapshot:
        """What the controller judges."""
        begun = [seen.newest for seen in self._known.values()]
        stepped = len(begun) == self.world and all(r is not None and r.step > 0 for r in begun)
        return Snapshot(
            now=steady_clock.now(),
            since_start=time.monotonic() - self.began,
            world=self.world,
            ranks=dict(self._known),
            nodes={rank: f"10.0.0.{1 + 2 * rank // self.world}" for rank in range(self.world)},
            timeouts=self.config.resilience.timeouts,
            first_step_done=stepped,
            logs=str(self.paths.ranks),
        )

    def judged(
        self, seconds: float, first: int = 0, enough: Callable[[WatchedGang], bool] = lambda _: False
    ) -> list[Verdict]:
        """Verdicts, as soon as there are any; none after so many seconds, or once it is `enough`.

        Args:
            first: the node that is asked first; the other is asked half a heartbeat later.
        """
        halves = [range(self.world // 2), range(self.world // 2, self.world)]
        until, beat = time.monotonic() + seconds, self.config.resilience.timeouts.seconds("heartbeat")
        turn = first
        while time.monotonic() < until:
            over = enough(self)
            self.look(range(self.world) if over else halves[turn % 2])
            turn += 1
            problems: list[str] = []
            verdicts = judge_all(self.snapshot(), problems.append)
            assert not problems, problems
            if verdicts or over:
                return sorted(verdicts, key=lambda v: (_SEVERITY[v.kind], v.time or 1e18, v.rank or 0))
            time.sleep(beat / 2)
        return []

    def all_ended(self) -> bool:
        """No rank is left."""
        return len(self._exits) == self.world

    def settle(self, seconds: float) -> None:
        """Wait until no rank is left, at most so long."""
        until = time.monotonic() + seconds
        while not self.all_ended() and time.monotonic() < until:
            time.sleep(0.02)

    def codes(self) -> dict[int, int]:
        """Exit codes so far."""
        return {rank: code for rank, (code, _) in self._exits.items()}

    def since_fault(self) -> float:
        """Seconds since the fault."""
        return time.time() - self.mark.stat().st_mtime

    def kill(self) -> None:
        """End all ranks and wait for them."""
        for rank, pid in self.pids.items():
            if rank not in self._exits:
                for victim in processes.tree(pid):
                    _signal(victim.pid, signal.SIGKILL)
        while not self.all_ended():
            time.sleep(0.01)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
