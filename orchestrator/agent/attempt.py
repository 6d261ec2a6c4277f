"""One attempt on one node: its ranks from the first look at its files to the end of the last process."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from configs.paths import RunPaths
from configs.rank import GATE, RankFiles
from faulttol import proc
from faulttol.detect.rank_watch import RankWatch
from faulttol.detect.snapshot import RankObservation
from orchestrator.agent import attempt_processes, devices, environment
from orchestrator.agent.activity_writer import ActivityWriter
from orchestrator.agent.evidence import EvidenceCollector
from orchestrator.agent.files import LogFiles
from orchestrator.agent.orders import AttemptOrder, AttemptPhase, LaunchSpec, attempt_mark, rings_folder
from orchestrator.agent.spawner import ProcessExit, Spawner
from orchestrator.agent.standby_pool import StandbyPool

log = logging.getLogger("megaray.agent")

_LAST_LINE_SECONDS = 0.5
"""An exit is reported without the last line of its log where that takes longer."""
_ACTIVITY_SECONDS = 1.0
"""Longest time that a stop waits for what is written for people."""
_BASELINE_AGE_SECONDS = 5.0
"""Age of what is known of the devices' memory before ranks start."""


@dataclass
class _Rank:
    rank: int
    pid: int
    watch: RankWatch
    exit: ProcessExit | None = None
    seen: RankObservation | None = None
    """By the newest look at it."""
    problem: str = ""
    """Why looks at it fail."""

    def observe(self, last_words: str) -> RankObservation:
        """The rank now; as it was last seen, where the look fails: its node must answer for the others all the same."""
        ended = self.exit
        known = (None, None, "") if ended is None else (ended.code, ended.time, last_words)
        try:
            self.seen = self.watch.observe(*known)
        except Exception as error:
            if str(error) != self.problem:
                self.problem = str(error)
                log.exception("a look at rank %d", self.rank)
            last = self.seen or RankObservation(self.rank, self.pid)
            self.seen = replace(last, exit_code=known[0], exit_time=known[1], last_words=known[2])
        return self.seen


@dataclass
class _Stop:
    """How the ranks are being stopped."""

    deadline: float
    """Monotonic time of SIGKILL."""
    begun: float = field(default_factory=time.monotonic)


class Attempt:
    """Moves one way, from `preparing` to `stopped`; every order may come again and again.

    Args:
        order: the first that was heard of it.
        node_id: of this node.
        spawner: starts processes.
        standbys: interpreters that wait for a program.
        changed: the agent's condition; it is notified of news, and its lock guards what is here.
    """

    def __init__(
        self,
        order: AttemptOrder,
        node_id: str,
        spawner: Spawner,
        standbys: StandbyPool,
        changed: threading.Condition,
    ) -> None:
        self.run = RunPaths(Path(order.run_root))
        self.number = order.attempt
        self.phase = AttemptPhase.UNKNOWN
        self.news = 0
        self.unfit = ""
        self.master = ""
        self.started: float | None = None
        self._evidence: dict[str, EvidenceCollector] = {}
        self.touched = time.monotonic()
        self.files: LogFiles | None = None
        self._spawner, self._standbys, self._changed = spawner, standbys, changed
        self._mark = attempt_mark(order.run_root, order.attempt, node_id)
        self._rings = rings_folder(order.run_root, order.attempt, node_id)
        self._launch: LaunchSpec | None = None
        self._order = order
        self._ranks: dict[int, _Rank] = {}
        self._stop: _Stop | None = None
        self._port: socket.socket | None = None
        self._baseline_bytes: dict[str, int] = {}
        """Bytes in use on each device before the ranks started."""
        self._gate: Path | None = None
        """A file that the ranks wait for, while the attempt before still gives up the devices' memory."""
        self._processes_gone = False
        """No process is left, not even in the kernel."""
        self._stuck = ""
        """Why that takes so long."""
        self._has_successor = False
        """The next attempt has these devices."""
        self._unclaimed_exits: dict[int, ProcessExit] = {}
        """Ends of processes that came before it was noted which rank they were."""
        self._check: Callable[[], str] = str
        self._standbys_requested = False
        """Standbys for the next attempt were asked for."""
        self._observe_lock = threading.Lock()
        self._released = False
        self._starting: threading.Thread | None = None
        self._activity: ActivityWriter | None = None

    # ---- what the agent asks ----

    def prepare(self, launch: LaunchSpec, check: Callable[[], str]) -> None:
        """Open the files, look at the node and choose a port; idempotent."""
        if self.phase is not AttemptPhase.UNKNOWN:
            return
        self._launch, self._check, self.phase = launch, check, AttemptPhase.PREPARING
        needs = [_configuration(launch, self.run), *([Path(launch.code)] if launch.code else [])]
        self.files = LogFiles(self.run, self.number, launch.ranks, needs, self._files_news)
        # Bound until the attempt is forgotten, so that nobody else is given the port before rank 0 listens on it.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("", 0))
        self.master = f"{launch.ip}:{self._port.getsockname()[1]}"

    def start(self, launch: LaunchSpec, ending: Sequence[Attempt] = ()) -> None:
        """Start the ranks with the rendezvous that `launch` tells; once only.

        Args:
            ending: attempts of this run that still hold memory of the devices. The ranks load and meet meanwhile.
        """
        if self.phase is not AttemptPhase.READY or self.started is not None:
            return
        self._launch, self.started = launch, time.monotonic()
        if ending and launch.uses_devices:
            self._wait_behind_gate(ending)
        self._starting = threading.Thread(target=self._start, args=(launch,), name="agent-start", daemon=True)
        self._starting.start()

    def stop(self, grace: float) -> None:
        """End all processes: SIGTERM to the ranks, and after `grace` seconds SIGKILL to everything."""
        if self.phase.is_past_stop:
            if self._stop is not None and self._stop.begun + grace < self._stop.deadline:
                self._stop.deadline = self._stop.begun + grace
                self._changed.notify_all()
            return
        if self._activity is not None:
            self._activity.freeze()
        self._stop = _Stop(time.monotonic() + grace)
        self._set_phase(AttemptPhase.STOPPING)
        threading.Thread(target=self._stop_all, name="agent-stop", daemon=True).start()

    def collect(self, requests: Collection[str]) -> None:
        """Write stacks and rings of the living ranks, once for each request."""
        if self.phase is not AttemptPhase.RUNNING:
            return
        living = {rank: one.pid for rank, one in self._ranks.items() if one.exit is None}
        for request in set(requests).difference(self._evidence):
            folder = self.run.attempt(self.number).evidence_of(request)
            self._evidence[request] = EvidenceCollector(folder, living, self._rings, self.notify)

    def collected(self, requests: Collection[str]) -> tuple[str, ...]:
        """Those that nothing more will be written for."""
        begun = self._evidence
        return tuple(one for one in requests if one not in begun or begun[one].done)

    def release(self) -> None:
        """Forget it once nothing of it is left."""
        self._released = True
        self._standbys.release(str(self.run.root))
        if self.phase is AttemptPhase.STOPPED:
            self.free_resources()

    def free_resources(self) -> None:
        """Give up what the node's memory holds of it."""
        for end in (self._port, self.files):
            if end is not None:
                end.close()
        shutil.rmtree(self._rings, ignore_errors=True)

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by rank, once all are started."""
        return (
            {rank: one.pid for rank, one in self._ranks.items()}
            if self.phase is not AttemptPhase.READY
            else {}
        )

    def rank_states(self) -> tuple[RankObservation, ...]:
        """All ranks as they are now; reads node memory, and is called without the lock."""
        with self._changed:
            ranks = [one for _, one in sorted(self._ranks.items())]
        words = self.files.last_words if self.files else {}
        with self._observe_lock:  # a watch compares with its last look
            seen = tuple(one.observe(words.get(one.rank, "")) for one in ranks)
        if not self._standbys_requested and _trains(seen):
            with self._changed:  # once its slots are given back, nothing may be kept for it any more
                self._keep_standbys()
        return seen

    def _keep_standbys(self) -> None:
        launch = self._launch
        if launch is None or self._standbys_requested or self.phase is not AttemptPhase.RUNNING:
            return
        self._standbys_requested = True
        try:
            self._standbys.prewarm(
                str(self.run.root), launch, environment.gang_environment(launch, os.environ)
            )
        except Exception:  # a convenience: nothing else may fail by it
            log.exception("standbys for %s", self.run.run_id)

    def notify(self) -> None:
        """There is news."""
        with self._changed:
            self.news += 1
            self._changed.notify_all()

    # ---- threads of the attempt ----

    def _set_phase(self, phase: AttemptPhase) -> None:
        self.phase = phase
        self.news += 1
        self._changed.notify_all()

    def _files_news(self) -> None:
        with self._changed:
            files = self.files
            if files is not None and self.phase is AttemptPhase.PREPARING and files.problem:
                self.unfit = files.problem.unfit
            elif files is not None and self.phase is AttemptPhase.PREPARING and files.ready:
                self.unfit = self._run_check() or self._make_rings()
                if not self.unfit:
                    self.phase = AttemptPhase.READY
            self.news += 1
            self._changed.notify_all()

    def _run_check(self) -> str:
        try:
            return self._check()
        except Exception:  # an instrument that breaks must not bar a node
            log.exception("the look at this node for %s", self.run.run_id)
            return ""

    def _make_rings(self) -> str:
        try:
            self._rings.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"can't make {self._rings} ({error.strerror})"
        return ""

    def _start(self, launch: LaunchSpec) -> None:
        files = self.files
        assert files is not None, "it was prepared"
        logs = files.detach_logs()
        try:
            if self._gate is not None and not launch.trains:
                self._await_gate(self._gate)  # as the trainer does itself
            if launch.uses_devices and self._gate is None:
                # The attempt before it on these slots has just looked.
                self._baseline_bytes = devices.memory_in_use(launch.devices, _BASELINE_AGE_SECONDS).used
            env = environment.gang_environment(launch, os.environ)
            for local_rank, rank in enumerate(launch.ranks):
                if self._stop is not None:
                    return
                own = environment.rank_environment(self._order, launch, local_rank, self._rings, self._mark)
                if self._gate is not None:
                    own[GATE] = str(self._gate)
                process = self._standbys.acquire(launch, env, own, logs[rank], self._ended)
                if process is None:
                    words = [sys.executable, *launch.program]
                    process = self._spawner.start(words, env | own, self._ended, logs[rank]).result()
                with self._changed:
                    early = self._unclaimed_exits.pop(process.pid, None)
                    watch = RankWatch(RankFiles(self._rings, rank), process.pid, frozenset(launch.addresses))
                    self._ranks[rank] = _Rank(rank, process.pid, watch, early)
            self._standbys.pause(str(self.run.root))
            self._activity = ActivityWriter(
                self.run.attempt(self.number),
                launch.ip,
                launch.ranks,
                self._rings,
                len(launch.addresses),
                self.rank_states,
            )
            with self._changed:
                if self.phase is AttemptPhase.READY:
                    self._set_phase(AttemptPhase.RUNNING)
        except Exception as error:  # reported as the node's fault: nothing else can be wrong here
            log.exception("the ranks of %s can't start", self.run.run_id)
            with self._changed:
                self._report_unfit(f"the ranks can't start: {type(error).__name__}: {error}")
        finally:
            for fd in logs.values():
                os.close(fd)

    def _ended(self, pid: int, ended: ProcessExit) -> None:
        """A rank's process has ended; called by the thread that the kernel tells."""
        with self._changed:
            rank = next((rank for rank, one in self._ranks.items() if one.pid == pid), None)
            if rank is None:
                self._unclaimed_exits[pid] = ended
                return
            self._ranks[rank].exit = ended
            files = self.files
            if files is None or ended.code == 0:
                self.news += 1
                self._changed.notify_all()
                return
        files.request_last_line(rank)  # its news wakes whoever waits
        threading.Timer(_LAST_LINE_SECONDS, self.notify).start()

    def _stop_all(self) -> None:
        # Whatever fails, the end comes: the slots of an attempt that stops forever would never be free again.
        for step in (
            self._end_ranks,
            self._kill,
            self._close_activity,
            self._report_ending,
            self._await_processes,
            self._await_devices,
        ):
            try:
                step()
            except Exception as error:
                log.exception("the stop of %s", self.run.run_id)
                with self._changed:
                    self.unfit = (
                        self.unfit or f"the ranks' end isn't certain: {type(error).__name__}: {error}"
                    )
        with self._changed:
            self._set_phase(AttemptPhase.STOPPED)
            if self._released:
                self.free_resources()

    def _end_ranks(self) -> None:
        """SIGTERM, and the time until SIGKILL."""
        stop = self._stop
        assert stop is not None, "the caller has said how"
        if self._starting is not None:
            self._starting.join()
        with self._changed:
            living = [one.pid for one in self._ranks.values() if one.exit is None]
        if stop.deadline > time.monotonic():
            # The ranks alone: their children must live for as long as a save needs them.
            self._spawner.send_signal(living, signal.SIGTERM)
        with self._changed:
            while any(one.exit is None for one in self._ranks.values()):
                left = stop.deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)

    def _remaining_pids(self) -> list[int]:
        with self._changed:
            ends = {one.pid: math.inf if one.exit is None else one.exit.time for one in self._ranks.values()}
        return attempt_processes.attempt_pids(self._mark, ends)

    def _close_activity(self) -> None:
        if self._activity is not None:
            self._activity.close(_ACTIVITY_SECONDS)

    def _kill(self) -> None:
        """SIGKILL until nothing runs any more."""
        attempt_processes.wait_until_gone(
            lambda: [pid for pid in self._remaining_pids() if proc.runs(pid)], self._unending, signal.SIGKILL
        )

    def _report_ending(self) -> None:
        with self._changed:
            self._set_phase(AttemptPhase.ENDING)

    def _await_processes(self) -> None:
        """Wait until nothing is left: its slots aren't free before."""
        attempt_processes.wait_until_gone(self._remaining_pids, self._unending)
        with self._changed:
            self._processes_gone = True
            self._changed.notify_all()

    def _unending(self, states: str) -> None:
        with self._changed:
            self._stuck = f"processes that SIGKILL doesn't end: {states}"
            if not self.unfit:
                self._report_unfit(self._stuck)
            self._changed.notify_all()

    def _report_unfit(self, why: str) -> None:
        self.unfit = why
        self.news += 1
        self._changed.notify_all()

    def _await_devices(self) -> None:
        """Wait until the devices' memory is as free as it was before the ranks started, within bounds."""
        launch = self._launch
        if launch is not None and launch.uses_devices and self.started is not None:
            held = devices.wait_until_free(launch.devices, self._baseline_bytes, lambda: self._has_successor)
            with self._changed:
                self.unfit = held or self.unfit

    # ---- the attempt before, on the same devices ----

    def _wait_behind_gate(self, ending: Sequence[Attempt]) -> None:
        self._gate = self._rings / "gate"
        for one in ending:
            self._baseline_bytes |= one._baseline_bytes
            one._has_successor = True  # what these ranks hold from now on isn't that one's
        threading.Thread(target=self._open_gate, args=(ending,), name="agent-gate", daemon=True).start()

    def _await_gate(self, gate: Path) -> None:
        with self._changed:
            while self._stop is None and not gate.exists():
                self._changed.wait()

    def _open_gate(self, ending: Sequence[Attempt]) -> None:
        gate = self._gate
        assert gate is not None, "it was chosen before this thread began"
        with self._changed:
            while any(not (one._processes_gone or one.phase is AttemptPhase.STOPPED) for one in ending):
                stuck = next((one._stuck for one in ending if one._stuck), "")
                if stuck and not self.unfit:
                    self._report_unfit(stuck)
                self._changed.wait()
        with contextlib.suppress(OSError):  # the attempt is over already, and its folder gone
            gate.touch()
        with self._changed:
            self._changed.notify_all()


def _trains(seen: Sequence[RankObservation]) -> bool:
    """All ranks are past their start, so that other work on the node delays nothing that is waited for."""
    return bool(seen) and all(one.newest is not None and one.newest.finished > 0 for one in seen)


def _configuration(launch: LaunchSpec, run: RunPaths) -> Path:
    """The configuration that the ranks read: it must be there on every node."""
    words = launch.program
    if "--config" in words[:-1]:
        return Path(words[words.index("--config") + 1])
    return run.config
