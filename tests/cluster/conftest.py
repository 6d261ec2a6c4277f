"""A real local Ray, started and ended by the command line itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from configs.metrics import ResumedLine, SavedLine, StepLine, read_from
from configs.paths import HomePaths, RunPaths
from orchestrator.record.events import Event
from orchestrator.record.log import read
from orchestrator.record.partition import TimePart
from orchestrator.record.summaries import summary
from orchestrator.record.view import RunView, fold
from tests.web.made import ledger_of

PATIENCE = 150.0
"""Seconds after which a wait in these tests is a failure; they end long before."""
STEPS = 90
RUN = ("experiment=smoke", "parallel.dp=2", "parallel.ep=2", f"train.steps={STEPS}", "checkpoint.every=20")


@dataclass
class Shell:
    """Types commands of megaray against one home."""

    home: HomePaths
    env: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    """Words before the command, such as `ip netns exec HOST`."""

    def _environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "WANDB_API_KEY")}
        return (
            clean
            | {"MEGARAY_HOME": str(self.home.home), "WANDB_MODE": "offline", "MEGARAY_STANDBYS": "0"}
            | self.env
        )

    def run(self, *words: str, expect: int = 0) -> str:
        """Run a command to its end; its standard output."""
        done = subprocess.run(
            [*self.prefix, sys.executable, "-m", "orchestrator", *words], env=self._environment(), capture_output=True,
            text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == expect, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout if expect == 0 else done.stdout + done.stderr

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command and leave it running."""
        return subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "orchestrator", *words],
            env=self._environment() | {"PYTHONUNBUFFERED": "1"}, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            # A terminal's foreground job heeds Ctrl-C, also where this test runs in a shell's background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def submit(self, *words: str) -> str:
        """Submit detached; the run id."""
        return str(json.loads(self.run("submit", *words, "--yes", "--detach", "--json"))["run"])

    def events(self, run_id: str) -> list[Event]:
        return read(self.home.run(run_id).events)

    def view(self, run_id: str) -> RunView:
        return fold(self.events(run_id))

    def ended(self, run_id: str) -> bool:
        state = self.view(run_id).state
        return state is not None and state.terminal

    def step(self, run_id: str) -> int:
        if self.view(run_id).submitted is None:  # the controller hasn't written it yet
            return 0
        return summary(self.home.run(run_id), {}).step or 0

    def until(self, what: Callable[[], Any], why: str) -> Any:
        """Wait until `what` holds; its value."""
        deadline = time.monotonic() + PATIENCE
        while not (value := what()):
            assert time.monotonic() < deadline, f"still not: {why}"
            time.sleep(0.1)
        return value

    @contextmanager
    def held(self, run_id: str) -> Iterator[None]:
        """Stop a run's ranks, as a debugger would, and let them continue after the block."""
        pids = self.view(run_id).pids.values()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def finish(self, run_id: str) -> RunView:
        """Wait for the run's end."""
        self.until(lambda: self.ended(run_id), f"{run_id} ended")
        check_ledger(self.home.run(run_id))
        return self.view(run_id)


def check_ledger(run: RunPaths) -> None:
    """Whatever a run went through: its parts add up to its wall time, no second counts twice, and steps get what they took.

    What steps took is bounded here from the metric lines alone: at least from an attempt's first step line to its last, at
    most from when its ranks were ready, each less what saves held.
    """
    ledger, events = ledger_of(run, time.time()), read(run.events)
    wall = events[-1].time - events[0].time
    assert sum(ledger.seconds.values()) == pytest.approx(wall, rel=0.01, abs=0.05), ledger.seconds
    edges = ledger.partition.edges
    assert (edges[1:] >= edges[:-1]).all(), "an interval that goes back would count its seconds twice"
    least = most = 0.0
    for number in run.attempt_numbers():
        lines = read_from(run.attempt(number).metrics, 0)[0]
        steps = [line.time for line in lines if isinstance(line, StepLine)]
        ready = [line.time for line in lines if isinstance(line, ResumedLine)]
        held = sum(line.held for line in lines if isinstance(line, SavedLine))
        if steps:
            least += steps[-1] - steps[0] - held
            most += steps[-1] - ready[0] + 1.0  # and a step that a fault cut off
    parts = (TimePart.PRODUCTIVE, TimePart.LOST_WORK, TimePart.EVALUATION, TimePart.OVERHEAD)
    booked = sum(ledger.seconds[part] for part in parts)
    slack = 0.01 * wall + 0.05
    assert not most or least - slack <= booked <= most + slack, (least, most, ledger.seconds)


def alive(pid: int) -> bool:
    """The process exists and is not a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_with(text: str) -> list[int]:
    """Ids of processes whose command line or environment holds `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
            if text.encode() in told and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def losses(shell: Shell, run_id: str) -> dict[int, float]:
    """The loss of each step; where a step was trained twice, both must have been equal."""
    by_step: dict[int, float] = {}
    run = shell.home.run(run_id)
    for attempt in run.attempt_numbers():
        for line in read_from(run.attempt(attempt).metrics, 0)[0]:
            if isinstance(line, StepLine):
                assert by_step.setdefault(line.step, line.loss) == line.loss, f"step {line.step} differs"
    return by_step


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A home with a space in its path and a local Ray of two slots, taken down afterwards."""
    shell = Shell(HomePaths(tmp_path_factory.mktemp("home of") / "a run"))
    shell.run("up", "--slots", "2")
    try:
        yield shell
    finally:
        subprocess.run(
            [sys.executable, "-m", "orchestrator", "down", "--yes"], env=shell._environment(),
            capture_output=True, timeout=PATIENCE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        for pid in processes_with(str(shell.home.home)):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A run that a test has submitted and not seen to its end, because it failed, takes no slot from the next test."""
    if "shell" not in request.fixturenames:
        yield
        return
    shell: Shell = request.getfixturevalue("shell")
    before = {*shell.home.run_ids()}
    yield
    end_since(shell, before)


def end_since(shell: Shell, before: set[str]) -> None:
    """Cancel the runs of a home that weren't there before and haven't ended."""
    for run_id in sorted({*shell.home.run_ids()} - before):
        if shell.view(run_id).submitted is not None and not shell.ended(run_id):
            shell.run("cancel", run_id, "--now")
