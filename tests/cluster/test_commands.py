"""What is typed, and what ends a command: on a real local Ray with real ranks."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from configs.paths import HomePaths
from orchestrator.record.events import StopBegan
from orchestrator.record.states import Reason, State
from tests.cluster.conftest import RUN, Shell, alive, losses, processes_with

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def laptop(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Commands typed on a machine that sees nothing of the home but the dashboard of its Ray."""
    return Shell(HomePaths(tmp_path_factory.mktemp("away") / "laptop"))


@pytest.fixture(scope="module")
def undisturbed(shell: Shell, laptop: Shell) -> str:
    """A run that nobody touched, submitted from the laptop; the others must equal it bit for bit."""
    row = json.loads(laptop.run("submit", *RUN, "--address", dashboard(shell), "--json", "--yes"))
    assert row["state"] == "succeeded"
    return str(row["run_id"])


def dashboard(shell: Shell) -> str:
    """Where a laptop reaches the Ray of a home."""
    return str(json.loads(shell.home.cluster.read_text())["dashboard"])


def in_a_terminal(shell: Shell, end: signal.Signals, *words: str) -> tuple[str, int]:
    """Submit a run and watch it to step 5; what ends the terminal then, and the run and the terminal's exit code."""
    before = set(shell.home.run_ids())
    terminal = shell.start("submit", *RUN, *words, "--yes")
    run_id = shell.until(lambda: next(iter(set(shell.home.run_ids()) - before), None), "the run exists")
    shell.until(lambda: shell.step(run_id) >= 5, "step 5")
    os.killpg(terminal.pid, end)
    return run_id, terminal.wait(timeout=30)


def test_a_terminal_that_is_killed_and_a_cancel_leave_no_process_and_resume_continues(
    shell: Shell, undisturbed: str
) -> None:
    run_id, code = in_a_terminal(shell, signal.SIGKILL, "resilience.timeouts.patience=120")
    assert code == -signal.SIGKILL
    shell.until(lambda: shell.step(run_id) >= 25, "step 25")
    pids = shell.view(run_id).pids.values()
    with shell.held(run_id):  # the run must not end before both commands have been answered
        began = time.time()
        terminals = [shell.start("cancel", run_id) for _ in range(2)]
        answers = [terminal.stdout.readline() for terminal in terminals if terminal.stdout is not None]
        assert any(isinstance(e.payload, StopBegan) for e in shell.events(run_id)), answers
    said = [a + t.communicate(timeout=60)[0] for a, t in zip(answers, terminals, strict=True)]
    assert [terminal.returncode for terminal in terminals] == [0, 0], said
    assert sum("already" in text for text in said) == 1, "one of them is told that the other came first"
    assert shell.view(run_id).moved_at - began < 20, "a save, and all is free"
    assert shell.view(run_id).checkpoint.step >= 25, "it has saved"  # type: ignore[union-attr]
    assert not [pid for pid in pids if alive(pid)]
    shell.until(lambda: not processes_with(run_id), "nothing of the run is left")
    assert "has ended already (cancelled)" in shell.run("cancel", run_id, expect=2)
    shell.run("resume", run_id, "--detach")
    view = shell.finish(run_id)
    assert view.state is State.SUCCEEDED and view.checkpoint is not None
    assert losses(shell, run_id) == losses(shell, undisturbed)
    assert "succeeded" in shell.run("resume", run_id, expect=2)


def test_a_laptop_submits_through_the_dashboard(shell: Shell, undisturbed: str, laptop: Shell) -> None:
    source = json.loads(shell.home.run(undisturbed).source.read_text())
    typed = next((run for run in shell.home.run_ids() if run != undisturbed), "") or shell.submit(*RUN)
    assert source["commit"] == json.loads(shell.home.run(typed).source.read_text())["commit"]
    address = dashboard(shell)
    assert "does not exist" in laptop.run("status", "nothing", "--address", address, expect=2)
    assert not laptop.home.home.exists(), "nothing is kept on the laptop"


def test_more_slots_than_exist(shell: Shell) -> None:
    text = shell.run("submit", *RUN, "parallel.dp=8", "--yes", expect=2)
    assert "8 slots" in text and len(text.strip().splitlines()) == 1


def test_ctrl_c_in_a_terminal_and_queue_position_reason_and_priority_and_down_leaves_nothing(
    shell: Shell,
) -> None:
    first, code = in_a_terminal(shell, signal.SIGINT, "train.steps=100000")
    assert code == 130
    left = shell.step(first)
    second = shell.submit(*RUN, "train.steps=100000")  # longer than any of this takes
    rows = {row["run_id"]: row for row in json.loads(shell.run("list", "--json"))}
    assert rows[second]["position"] == 1 and "2" in rows[second]["waiting_for"]
    third = shell.submit(*RUN, "train.steps=100000", "--priority", "5")
    rows = {row["run_id"]: row for row in json.loads(shell.run("list", "--json"))}
    assert (rows[third]["position"], rows[second]["position"]) == (1, 2)
    shell.until(lambda: shell.step(first) > left + 20, "the run trains on without its terminal")
    assert shell.view(first).attempt == 1 and not shell.view(first).incidents
    shell.run("cancel", first)
    shell.until(lambda: shell.view(third).state is State.RUNNING, "the higher priority runs")
    assert shell.view(second).state is State.QUEUED
    shell.until(lambda: shell.step(third) >= 1, "step 1")
    record = json.loads(shell.home.cluster.read_text())
    shell.run("down", "--yes")
    for run_id in (second, third):
        assert shell.view(run_id).reason in (Reason.CLUSTER_DOWN, Reason.STOPPED)
        assert shell.view(run_id).state is State.CANCELLED
    assert not Path(record["temporary"]).exists()
    assert not processes_with(record["temporary"]) and not processes_with(str(shell.home.home))
    assert "nothing to take down" in shell.run("down", "--yes", expect=2)
