"""The whole loop on a real local Ray: real ranks, real text, real faults; and the dashboard of it in a real browser."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from configs.paths import HomePaths
from orchestrator.record.events import RanksStarted
from orchestrator.record.states import State
from tests.cluster.conftest import RUN, STEPS, Shell, alive, losses
from tests.cluster.crashes import play
from tests.orchestrator.sinks.wandb_reading import read_offline
from tests.web.browser.driving import BrowserPage, driving, needs_browser
from tests.web.browser.test_views import TABS
from tests.web.made import ledger_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
ENDLESS = ("experiment=smoke", "parallel.dp=2", "parallel.ep=2", "train.steps=1000000", "train.log_every=1",
       "checkpoint.every=20", "resilience.timeouts.patience=8")  # fmt: skip
_ANOTHER = """
import sys
import ray
from orchestrator import ray_cluster
ray_cluster.connect(sys.argv[1], sys.argv[2])
holder = ray.remote(type("Holder", (), {"ready": lambda self: 1})).options(num_cpus=1).remote()
assert ray.get(holder.ready.remote()) == 1
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def undisturbed(shell: Shell) -> str:
    """A run that waited for a slot that another user of Ray held, and that nobody touched then.

    The others must equal it bit for bit.
    """
    record = json.loads(shell.home.cluster.read_text())
    other = subprocess.Popen(
        [sys.executable, "-c", _ANOTHER, record["address"], record["token"]], env=shell._environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout is not None and other.stdout.readline() == "holds\n"
        shell.until(
            lambda: json.loads(shell.run("nodes", "--json"))["nodes"][0]["free"]["CPU"] == 1,
            "one of two slots is free",
        )
        run_id = shell.submit(*RUN)
        waiting = shell.until(
            lambda: json.loads(shell.home.queue.read_text())["waiting"], "the run waits with its reason"
        )
        assert "needs 2 slots, 1 of 2 is free" in waiting[0]["reason"]
        assert shell.view(run_id).attempt == 0, "it was placed nowhere"
    finally:
        other.communicate()
    view = shell.finish(run_id)
    assert view.state is State.SUCCEEDED and view.attempt == 1
    return run_id


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


def test_a_controller_that_is_killed_again_and_again(shell: Shell) -> None:
    assert play(shell, 3) == (3, "")


@pytest.mark.long  # `make test` has the one below, which nobody compares with a run that was left alone
def test_a_hung_rank_is_found_and_replaced(shell: Shell, undisturbed: str) -> None:
    run_id = shell.submit(*RUN, "resilience.timeouts.patience=6", "resilience.timeouts.start=90")
    shell.until(lambda: shell.step(run_id) >= 25, "step 25")
    os.kill(shell.view(run_id).pids["0"], signal.SIGSTOP)
    view = shell.finish(run_id)
    assert view.state is State.SUCCEEDED and view.incidents[0].event.cause == "hang"
    assert losses(shell, run_id) == losses(shell, undisturbed)


# ---- one run that trains until somebody ends it, and the page that `up` serves ----


@pytest.fixture(scope="module")
def page(shell: Shell) -> Iterator[BrowserPage]:
    """Logged in by the link that `up` leaves."""
    home = HomePaths(shell.home.home)
    shell.until(home.dashboard.exists, "the dashboard is served")
    url = json.loads(home.dashboard.read_text())["url"]
    with driving() as driver:
        page = BrowserPage(driver, None)  # type: ignore[arg-type]
        assert urlsplit(url).hostname == "127.0.0.1" and "token=" in url
        driver.get(url)
        page.until(lambda: page.js("return document.body.dataset.loaded"), 60, "the page doesn't begin")
        yield page


@pytest.fixture(scope="module")
def run(shell: Shell) -> str:
    """Two ranks that train until somebody ends them."""
    run_id = shell.submit(*ENDLESS)
    shell.until(lambda: shell.step(run_id) >= 30, "step 30")
    return run_id


def pids(shell: Shell, run_id: str) -> dict[str, int]:
    """Process ids of the present attempt's ranks."""
    return [e.payload for e in shell.events(run_id) if isinstance(e.payload, RanksStarted)][-1].pids


def look_at_all(page: BrowserPage, run_id: str) -> None:
    """Each view comes and the console stays silent. (Contrast, names and keyboard: `tests/web/browser/test_views.py`.)"""
    for where in ("", "nodes", "actions", *(f"run/{run_id}/{tab}".rstrip("/") for tab in TABS)):
        page.go(where, 60)
        assert page.console() == [], where


def step_shown(page: BrowserPage) -> int:
    """The step that the first view of a run says it has reached."""
    return int(page.text().split(" of 1,000,000")[0].split()[-1].replace(",", ""))


@needs_browser
def test_a_live_run(shell: Shell, page: BrowserPage, run: str) -> None:
    page.go(f"run/{run}")
    page.shows(" of 1,000,000", seconds=60)
    first = step_shown(page)
    page.until(lambda: step_shown(page) > first, 60, "the page stands still")
    look_at_all(page, run)
    page.go(f"run/{run}/logs")
    page.shows("run folder: ")
    page.go(f"run/{run}/ranks")
    page.until(lambda: page.js("return document.querySelector('.heat .plot canvas') !== null"), 60)


def test_a_killed_controller_is_not_noticed_by_the_ranks(shell: Shell, run: str) -> None:
    ranks = pids(shell, run)
    os.kill(json.loads(shell.home.queue.read_text())["controller_pid"], signal.SIGKILL)
    shell.until(
        lambda: any(e.payload.kind == "controller_started" for e in shell.events(run)),
        "a new controller has the run",
    )
    seen = shell.step(run)
    shell.until(lambda: shell.step(run) > seen + 20, "it trains on")
    view = shell.view(run)
    assert view.state is State.RUNNING and view.attempt == 1 and not view.incidents
    started = [e.payload.pids for e in shell.events(run) if isinstance(e.payload, RanksStarted)]
    assert all(one == ranks for one in started) and all(alive(pid) for pid in ranks.values())


@needs_browser
def test_a_rank_is_killed(shell: Shell, page: BrowserPage, run: str) -> None:
    page.go(f"run/{run}/incidents")
    killed = pids(shell, run)["1"]
    os.kill(killed, signal.SIGKILL)
    page.shows("rank 1 was killed by SIGKILL", seconds=60)
    shell.until(lambda: pids(shell, run)["1"] != killed, "the next attempt")
    shell.until(lambda: shell.view(run).state is State.RUNNING, "it trains again")
    page.go(f"run/{run}/time")
    page.until(
        lambda: page.js("return document.querySelectorAll('.timeline .sign.incident').length") == 1, 60
    )
    page.until(
        lambda: {"productive", "restart"} <= {row[0] for row in page.rows("Parts of the wall time")}, 60
    )
    look_at_all(page, run)


@needs_browser
def test_a_rank_hangs(shell: Shell, page: BrowserPage, run: str) -> None:
    seen = shell.step(run)
    shell.until(lambda: shell.step(run) > seen + 5, "steps of the next attempt")
    page.go(f"run/{run}/incidents")
    stopped = pids(shell, run)["0"]
    os.kill(stopped, signal.SIGSTOP)
    page.shows("Incident 2: hang", seconds=90)
    assert "rank 0 is stopped" in page.text()
    shell.until(lambda: pids(shell, run)["0"] != stopped, "the next attempt")
    shell.until(lambda: shell.view(run).state is State.RUNNING, "it trains again")
    assert [incident.event.cause for incident in shell.view(run).incidents] == ["rank_exit", "hang"]
    page.go(f"run/{run}/layout?attempt=2")
    page.shows("rank 0, which is stopped (state T)", ".note.bad", seconds=30)
    look_at_all(page, run)


@needs_browser
def test_it_is_cancelled_from_the_page(shell: Shell, page: BrowserPage, run: str) -> None:
    page.go(f"run/{run}")
    page.button("Cancel").click()
    page.shows(f"Cancel {run}", "#dialog")
    page.console()
    page.button("Yes, cancel it").click()
    assert shell.finish(run).state is State.CANCELLED
    page.go("actions")
    page.until(lambda: [row[2] for row in page.rows("Actions")] == ["cancel"], 60, "the action is on record")
    page.console()  # the browser writes down the question, an answer of 409, as an error
    look_at_all(page, run)
    seconds = ledger_of(shell.home.run(run), time.time()).seconds
    assert min(seconds.values()) >= 0
    steps = losses(shell, run)  # those that were trained twice, after the kill and after the hang, are equal
    assert sorted(steps) == list(range(1, max(steps) + 1)), "no step is left out"
