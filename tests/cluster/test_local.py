"""The whole loop on a real local Ray: real ranks, real DeepSpeed, real text, real faults."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from orchestrator.record.states import State
from tests.cluster.conftest import RUN, STEPS, Shell, losses
from tests.cluster.crashes import play
from tests.orchestrator.sinks.wandb_reading import read_offline

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


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
    assert play(shell, 3) == (3, "")
