"""The whole loop on a real local Ray: real ranks, real DeepSpeed, real text, real faults."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from configs.metrics import StepLine, read_from
from configs.paths import HomePaths
from orchestrator.record.events import StopBegan
from orchestrator.record.states import Reason, State
from tests.cluster.conftest import Shell, alive, processes_with
from tests.orchestrator.sinks.wandb_reading import read_offline

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

STEPS = 90
RUN = ("experiment=smoke", "parallel.dp=2", "parallel.ep=2", f"train.steps={STEPS}", "checkpoint.every=20")


@pytest.fixture(scope="module")
def undisturbed(shell: Shell) -> str:
    """A run that nobody touched; the others must equal it bit for bit."""
    run_id = shell.submit(*RUN)
    assert shell.finish(run_id).state is State.SUCCEEDED
    return run_id


def losses(shell: Shell, run_id: str) -> dict[int, float]:
    """The loss of each step; where a step was trained twice, both must have been equal."""
    found: dict[int, float] = {}
    run = shell.home.run(run_id)
    for attempt in run.attempt_numbers():
        for line in read_from(run.attempt(attempt).metrics, 0)[0]:
            if isinstance(line, StepLine):
                assert found.setdefault(line.step, line.loss) == line.loss, f"step {line.step} differs"
    return found


def test_a_run_is_kept_with_all_that_is_needed_to_know_it(shell: Shell, undisturbed: str) -> None:
    run = shell.home.run(undisturbed)
    assert sorted(losses(shell, undisturbed)) == list(range(1, STEPS + 1))
    assert {"commit", "versions", "arguments"} <= json.loads(run.source.read_text()).keys()
    assert "global_batch: " in run.config.read_text() and run.plan.exists()
    assert run.attempt(1).log(1).exists()
    status = json.loads(shell.run("status", undisturbed, "--json"))
    assert (status["state"], status["step"]) == ("succeeded", STEPS)


def test_wandb_offline_holds_every_metric(shell: Shell, undisturbed: str) -> None:
    run = shell.home.run(undisturbed)
    found = shell.until(lambda: _wandb_rows(run.wandb), "the W&B file is complete")
    rows = found["history"]
    keys = {key for row in rows for key in row}
    for key in ("loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "balance_entropy", "dropped"):
        assert f"train/{key}" in keys, key
    assert any(key.startswith("phase/") for key in keys) and any(key.startswith("experts/") for key in keys)
    assert [row["train/step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    assert found["config"]["model"]["name"] and found["config"]["plan"]


def _wandb_rows(folder: Path) -> dict | None:
    found = read_offline(folder)
    return found if sum("train/loss" in row for row in found["history"]) == STEPS else None


def test_a_killed_rank_changes_nothing_but_the_time(shell: Shell, undisturbed: str) -> None:
    run_id = shell.submit(*RUN)
    shell.until(lambda: shell.step(run_id) >= 30, "step 30")
    os.kill(shell.view(run_id).pids["1"], signal.SIGKILL)
    view = shell.finish(run_id)
    assert view.state is State.SUCCEEDED and view.attempt == 2
    assert losses(shell, run_id) == losses(shell, undisturbed)
    (incident,) = json.loads(shell.run("incidents", run_id, "--json"))
    assert incident["rank"] == 1 and "SIGKILL" in incident["detail"]
    assert incident["lost_steps"] >= 0 and incident["downtime_seconds"] > 0
    assert Path(incident["evidence"]).exists()
    text = shell.run("incidents", run_id)
    assert "SIGKILL" in text and "rank 1" in text


def test_a_hung_rank_is_found_and_replaced(shell: Shell, undisturbed: str) -> None:
    run_id = shell.submit(*RUN, "resilience.timeouts.patience=6", "resilience.timeouts.start=90")
    shell.until(lambda: shell.step(run_id) >= 25, "step 25")
    os.kill(shell.view(run_id).pids["0"], signal.SIGSTOP)
    view = shell.finish(run_id)
    assert view.state is State.SUCCEEDED and view.incidents[0].event.cause == "hang"
    assert losses(shell, run_id) == losses(shell, undisturbed)


def test_a_killed_controller_is_not_noticed_by_the_ranks(shell: Shell, undisturbed: str) -> None:
    run_id = shell.submit(*RUN)
    shell.until(lambda: shell.step(run_id) >= 10, "step 10")
    before = json.loads(shell.home.queue.read_text())["controller_pid"]
    pids = shell.view(run_id).pids
    os.kill(before, signal.SIGKILL)
    shell.until(
        lambda: any(e.payload.kind == "controller_started" for e in shell.events(run_id)),
        "a new controller has the run",
    )
    view = shell.finish(run_id)
    assert view.state is State.SUCCEEDED and view.attempt == 1 and not view.incidents
    assert {
        e.payload.pids[r] for e in shell.events(run_id) if e.payload.kind == "ranks_started" for r in pids
    } == {*pids.values()}
    assert losses(shell, run_id) == losses(shell, undisturbed)


def test_a_controller_that_is_killed_again_and_again(shell: Shell) -> None:
    from tests.cluster.crashes import play  # it uses this module

    assert play(shell, 3) == (3, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_terminal_that_goes_leaves_the_run_alone(
    shell: Shell, undisturbed: str, number: signal.Signals
) -> None:
    before = set(shell.home.run_ids())
    terminal = shell.start("submit", *RUN, "--yes")
    run_id = shell.until(lambda: next(iter(set(shell.home.run_ids()) - before), None), "the run exists")
    shell.until(lambda: shell.step(run_id) >= 5, "step 5")
    os.killpg(terminal.pid, number)
    code = terminal.wait(timeout=30)
    assert code == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert shell.finish(run_id).state is State.SUCCEEDED
    assert losses(shell, run_id) == losses(shell, undisturbed)


def test_queue_position_reason_and_priority(shell: Shell) -> None:
    first = shell.submit(*RUN, "train.steps=100000")
    second = shell.submit(*RUN, "train.steps=100000")  # longer than any of this takes: it is cancelled
    rows = {row["run_id"]: row for row in json.loads(shell.run("list", "--json"))}
    assert rows[second]["position"] == 1 and "2" in rows[second]["waiting_for"]
    third = shell.submit(*RUN, "train.steps=100000", "--priority", "5")
    rows = {row["run_id"]: row for row in json.loads(shell.run("list", "--json"))}
    assert (rows[third]["position"], rows[second]["position"]) == (1, 2)
    shell.run("cancel", first)
    shell.until(lambda: shell.view(third).state is State.RUNNING, "the higher priority runs")
    assert shell.view(second).state is State.QUEUED
    for run_id in (second, third):
        shell.run("cancel", run_id)


def test_cancel_leaves_no_process_and_resume_continues(shell: Shell, undisturbed: str) -> None:
    run_id = shell.submit(*RUN, "resilience.timeouts.patience=120")
    shell.until(lambda: shell.step(run_id) >= 25, "step 25")
    pids = shell.view(run_id).pids.values()
    with shell.held(run_id):  # the run must not end before the commands have started
        began = time.time()
        terminals = [shell.start("cancel", run_id) for _ in range(2)]
        shell.until(
            lambda: any(isinstance(e.payload, StopBegan) for e in shell.events(run_id)), "it is stopping"
        )
    said = [terminal.communicate(timeout=60)[0] for terminal in terminals]
    assert [terminal.returncode for terminal in terminals] == [0, 0], said
    assert sum("already" in text for text in said) == 1, "one of them is told that the other came first"
    assert shell.view(run_id).moved_at - began < 20, "a save, and all is free"
    assert shell.view(run_id).checkpoint.step >= 25, "it has saved"  # type: ignore[union-attr]
    assert not [pid for pid in pids if alive(pid)]
    shell.until(lambda: not processes_with(run_id), "nothing of the run is left")
    assert "cancelled already" in shell.run("cancel", run_id, expect=2)
    shell.run("resume", run_id, "--detach")
    view = shell.finish(run_id)
    assert view.state is State.SUCCEEDED and view.checkpoint is not None
    assert losses(shell, run_id) == losses(shell, undisturbed)
    assert "succeeded" in shell.run("resume", run_id, expect=2)


def test_a_laptop_submits_through_the_dashboard(shell: Shell, undisturbed: str, tmp_path: Path) -> None:
    url = json.loads(shell.home.cluster.read_text())["dashboard"]
    laptop = Shell(HomePaths(tmp_path / "laptop"))
    told = laptop.run("submit", *RUN, "--address", url, "--json", "--yes")
    row = json.loads(told)
    assert row["state"] == "succeeded"
    assert losses(shell, row["run_id"]) == losses(shell, undisturbed)
    source = json.loads(shell.home.run(row["run_id"]).source.read_text())
    assert source["commit"] == json.loads(shell.home.run(undisturbed).source.read_text())["commit"]
    assert "does not exist" in laptop.run("status", "nothing", "--address", url, expect=2)
    assert not laptop.home.home.exists(), "nothing is kept on the laptop"


def test_more_slots_than_exist(shell: Shell) -> None:
    text = shell.run("submit", *RUN, "parallel.dp=8", "--yes", expect=2)
    assert "8 slots" in text and len(text.strip().splitlines()) == 1


def test_down_leaves_nothing(shell: Shell) -> None:
    run_id = shell.submit(*RUN, "train.steps=100000")
    shell.until(lambda: shell.step(run_id) >= 1, "step 1")
    record = json.loads(shell.home.cluster.read_text())
    shell.run("down", "--yes")
    assert shell.view(run_id).reason in (Reason.CLUSTER_DOWN, Reason.STOPPED)
    assert shell.view(run_id).state is State.CANCELLED
    assert not Path(record["temporary"]).exists()
    assert not processes_with(record["temporary"]) and not processes_with(str(shell.home.home))
    assert "nothing to take down" in shell.run("down", "--yes", expect=2)
