"""Runs as the controller and rank 0 write them, by their own writers, on a clock that is told; and what they did."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.metrics import (
    EndedLine,
    EvaluatedLine,
    MetricLine,
    MetricWriter,
    ResumedLine,
    SavedLine,
    SaveFailedLine,
    StepLine,
)
from configs.paths import HomePaths, RunPaths
from orchestrator.record import log
from orchestrator.record.clock import Instant
from orchestrator.record.events import (
    AttemptPlaced,
    AttemptResumed,
    CheckpointCommitted,
    CheckpointFailed,
    Decided,
    EvidenceKept,
    Finished,
    GangShape,
    IncidentClosed,
    IncidentOpened,
    NodeShare,
    Payload,
    RanksStarted,
    StateMoved,
    StopBegan,
    Submitted,
    VerdictFound,
)
from orchestrator.record.history import RunHistory
from orchestrator.record.ledger import Ledger, ledger
from orchestrator.record.run_log import RunLog
from orchestrator.record.states import Reason, State
from orchestrator.web.columns import MetricColumns

BEGIN = 1_700_000_000.0
LAYOUT = {"pp": 1, "dp": 2, "cp": 1, "ep": 2, "etp": 1, "tp": 1}


@dataclass
class MadeRun:
    """One run that is being made. Each method lets time pass and adds it to `truth` by the ledger's parts."""

    home: HomePaths
    run_id: str = "demo-1126-120000-aaaa"
    now: float = BEGIN
    skew: float = 0.0
    """Of rank 0's clock."""
    steps: int = 100
    ranks: int = 2
    layout: dict[str, int] = field(default_factory=lambda: dict(LAYOUT))
    experts: tuple[int, int] = (2, 4)
    owner: str = "ann"
    model: str = "demo"
    truth: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self.run: RunPaths = self.home.run(self.run_id)
        self.run.root.mkdir(parents=True)
        self.jump = 0.0
        self.log = RunLog(self.run, 1, self._now())
        self.attempt = self.step = self.incident = self.saved = 0
        self.kept: list[tuple[int, float]] = []
        """Step and seconds of what was trained and isn't lost."""
        self.writer: MetricWriter | None = None

    def _now(self) -> Instant:
        return Instant(self.now + self.jump, self.now - BEGIN + 500.0)

    def tell(self, *payloads: Payload) -> None:
        self.log.append(payloads, self._now())

    def line(self, line: MetricLine) -> None:
        assert self.writer is not None
        self.writer.write(line)

    @property
    def rank_time(self) -> float:
        return self.now + self.jump + self.skew

    def spend(self, part: str, seconds: float) -> None:
        self.truth[part] += seconds
        self.now += seconds

    # ---- its life ----

    def submit(self, **more: Any) -> MadeRun:
        gang = GangShape(self.ranks, 1)
        self.run.plan.write_text(json.dumps({
            "mfu_basis": "none: cpu has no fp32 peak on record", "tokens_per_step": 64,
            "step_time": {"seconds": 1.1, "low": 0.9,
            "high": 1.3}, "memory": {"weights": 1000, "activations": 3000}, "parameters": {"total": 10}, "choices": [],
            "warnings": [], "notes": []}))  # fmt: skip
        self.run.source.write_text(json.dumps({"commit": "abc", "command": "submit model=demo"}))
        self.run.config.write_text("optim:\n  warmup_steps: 5\ncheckpoint:\n  every: 10\n")
        self.tell(Submitted(0, gang, self.steps, 3, 1.0, self.model, self.layout, owner=self.owner, **more))
        self.tell(StateMoved(State.QUEUED, Reason.SUBMITTED))
        return self

    def wait(self, seconds: float) -> MadeRun:
        self.spend("waiting", seconds)
        return self

    def start(
        self, placing: float = 1.0, starting: float = 4.0, step: int = 0, part: str = "startup"
    ) -> MadeRun:
        self.attempt += 1
        self.step = step
        half = self.ranks // 2
        shares = (
            NodeShare("n1", "10.0.0.1", "one", tuple(range(half))),
            NodeShare("n2", "10.0.0.2", "two", tuple(range(half, self.ranks))),
        )
        self.tell(
            StateMoved(State.PLACING, Reason.ADMITTED),
            AttemptPlaced(self.attempt, shares, f"g{self.attempt}"),
        )
        self.spend(part, placing)
        self.tell(StateMoved(State.STARTING, Reason.PLACED))
        pids = {str(rank): 1000 + rank for rank in range(self.ranks)}
        self.tell(RanksStarted(self.attempt, pids, "10.0.0.1:1"))
        self.spend(part, starting)
        paths = self.run.attempt(self.attempt)
        self.writer = MetricWriter(paths.metrics)
        paths.ranks.mkdir(exist_ok=True)
        for rank in range(min(self.ranks, 4)):
            paths.log(rank).write_text(f"rank {rank} begins\n")
        path = f"{self.run.checkpoints}/{step}" if step else None
        self.line(ResumedLine(self.rank_time, self.attempt, step, path, "none: cpu", {"torch": "2.13"}))
        self.tell(AttemptResumed(self.attempt, step, path))
        return self

    def train(self, steps: int, seconds: float = 1.0, overhead: float = 0.0, **more: Any) -> MadeRun:
        for _ in range(steps):
            first = self.log.view.state is State.STARTING
            # What passes between steps before the first line counts to the start-up.
            self.spend(("restart" if self.attempt > 1 else "startup") if first else "overhead", overhead)
            self.step += 1
            self.now += seconds
            self.kept.append((self.step, seconds))
            self.line(self.step_line(seconds, **more))
            if first:
                self.tell(StateMoved(State.RUNNING, Reason.FIRST_STEP))
                for number in self.log.view.open_incidents:
                    self.tell(IncidentClosed(number.number, "trained on", 0, 1.0))
        return self

    def step_line(self, seconds: float = 1.0, **more: Any) -> StepLine:
        layers, experts = self.experts
        load = [[16 + (i * 7 + layer + self.step) % 5 for i in range(experts)] for layer in range(layers)]
        values: dict[str, Any] = {
            "time": self.rank_time, "attempt": self.attempt, "step": self.step, "loss": 2.0 + 3.0 / (1 + self.step) ** 0.5,
            "aux_loss": 0.01, "lr": 1e-3, "grad_norm": 1.0, "tokens": 64 * self.step, "tokens_per_second": 64 / seconds,
            "step_seconds": seconds,
            "phase_seconds": {"data": 0.1 * seconds, "forward": 0.3 * seconds, "backward": 0.6 * seconds},
            "mfu": None, "expert_load": load, "balance_entropy": 0.99, "dropped": 0, "memory_bytes": 1 << 30,
        }  # fmt: skip
        return StepLine(**values | more)

    def save(
        self, held: float = 0.5, seconds: float = 0.5, tier: str = "store", differs: str = ""
    ) -> MadeRun:
        """A save that holds training for a while and is committed `seconds` after its call."""
        self.spend("checkpoint", held)
        self.saved = self.step
        path = f"{self.run.checkpoints}/{self.step}"
        self.line(
            SavedLine(
                self.rank_time - held + seconds,
                self.attempt,
                self.step,
                path,
                4096,
                seconds,
                held,
                tier,
                differs=differs,
            )
        )
        if tier == "store":
            self.tell(
                CheckpointCommitted(self.attempt, self.step, path, 4096, seconds, held, tier, differs=differs)
            )
        return self

    def save_failed(self, error: str = "rank 0: no space") -> MadeRun:
        self.line(SaveFailedLine(self.rank_time, self.attempt, self.step, error, 1))
        self.tell(CheckpointFailed(self.attempt, self.step, error, 1))
        return self

    def evaluate(self, seconds: float = 2.0) -> MadeRun:
        self.spend("evaluation", seconds)
        self.line(EvaluatedLine(self.rank_time, self.attempt, self.step, 2.5, 8, seconds))
        return self

    def fault(
        self, begun: float = 0.4, detect: float = 3.0, stop: float = 1.0, back_off: float = 0.0, rank: int = 1,
        kind: str = "rank_exit", detail: str = "rank 1 was killed by SIGKILL",
    ) -> MadeRun:  # fmt: skip
        """A fault `begun` seconds into a step, found `detect` seconds later; what came after the last save is lost."""
        self.spend("lost_work", begun)
        happened = self.rank_time
        self.spend("detection", detect)
        self.incident += 1
        verdict = {
            "kind": kind,
            "detail": detail,
            "rank": rank,
            "node": "10.0.0.2",
            "time": happened,
            "evidence": "",
        }
        log = str(self.run.attempt(self.attempt).log(rank))
        self.tell(
            VerdictFound(self.attempt, verdict),
            IncidentOpened(self.incident, self.attempt, kind, detail, rank, "10.0.0.2", self.step, log, 5.0),
            Decided(self.attempt, "restart", "rank_died", 1, 3, 0.0),
        )
        self.spend("restart", stop / 2)
        self.tell(
            EvidenceKept(self.attempt, self.incident, str(self.run.attempt(self.attempt).evidence)),
            StopBegan(self.attempt, State.RECOVERING, Reason.RANK_DIED, detail),
        )
        self.spend("restart", stop / 2)
        self.tell(StateMoved(State.RECOVERING, Reason.RANK_DIED, detail))
        self.spend("restart", back_off)
        self.tell(StateMoved(State.QUEUED, Reason.BACKOFF_OVER))
        self._lose()
        return self

    def _lose(self) -> None:
        for step, seconds in self.kept:
            if step > self.saved:
                self.truth["lost_work"] += seconds
        self.kept = [(step, seconds) for step, seconds in self.kept if step <= self.saved]

    def preempt(self, seconds: float = 2.0) -> MadeRun:
        self.tell(StopBegan(self.attempt, State.QUEUED, Reason.PREEMPTED, "", 30.0))
        self.spend("stopping", seconds)
        self.tell(StateMoved(State.RECOVERING, Reason.PREEMPTED), StateMoved(State.QUEUED, Reason.PREEMPTED))
        self._lose()
        return self

    def finish(self, closing: float = 1.0, stopping: float = 2.0) -> MadeRun:
        self.spend("overhead", closing)
        self.line(EndedLine(self.rank_time, self.attempt, self.step, 2.1, 64 * self.step))
        self.tell(Finished(self.step, 2.1, 64 * self.step))
        self.tell(StopBegan(self.attempt, State.SUCCEEDED, Reason.COMPLETE))
        self.spend("stopping", stopping)
        self.tell(StateMoved(State.SUCCEEDED, Reason.COMPLETE))
        return self

    def cancel(self, seconds: float = 1.0) -> MadeRun:
        self.tell(StateMoved(State.CANCELLING, Reason.CANCEL_ASKED))
        self.tell(StopBegan(self.attempt, State.CANCELLED, Reason.CANCEL_ASKED, "", 30.0))
        self.spend("stopping", seconds)
        self.tell(StateMoved(State.CANCELLED, Reason.CANCEL_ASKED))
        return self

    def idle(self, seconds: float) -> MadeRun:
        self.spend("idle", seconds)
        self.tell(StateMoved(State.QUEUED, Reason.RESUME_ASKED))
        self._lose()
        return self

    def seconds(self) -> dict[str, float]:
        """What the ledger should say."""
        return dict(self.truth) | {"productive": sum(seconds for _, seconds in self.kept)}


def queue_file(home: HomePaths, now: float, **more: Any) -> None:
    """The controller's published view."""
    tree: dict[str, Any] = {
        "time": now, "beat": now, "epoch": 3, "controller_pid": 4711, "waiting": [], "parked": [], "damage": [],
        "nodes": [
            {"node_id": "n1", "ip": "10.0.0.1", "hostname": "one", "slots": {"CPU": 2}, "free": {"CPU": 0}, "labels": {},
             "barred": "", "spare": False, "suspicion": 0.0, "runs": []},
            {"node_id": "n2", "ip": "10.0.0.2", "hostname": "two", "slots": {"CPU": 2}, "free": {"CPU": 1},
             "labels": {"rack": "r1"}, "barred": "cordoned: disk", "spare": False, "suspicion": 0.5, "runs": []},
        ],
    }  # fmt: skip
    temporary = home.queue.with_suffix(".tmp2")
    temporary.write_text(json.dumps(tree | more))
    temporary.replace(home.queue)


def a_home(folder: Path) -> HomePaths:
    home = HomePaths(folder)
    home.ensure()
    return home


def ledger_of(run: RunPaths, now: float, most: int = 1_000_000) -> Ledger:
    """Where the seconds of a run went, from its log and its ranks' lines.

    Args:
        run: its folder.
        now: seconds since the epoch.
        most: metric lines of an attempt that are kept apart; above that, neighbours are joined.
    """
    history = RunHistory()
    history.apply(log.read(run.events))
    traces = {}
    for number in run.attempt_numbers():
        columns = MetricColumns(run.attempt(number).metrics, most)
        assert columns.update(), "all that is there is read"
        traces[number] = columns.trace()
    return ledger(history, traces, now)
