"""The dashboard that `up` starts, in a real browser, on a real run: live, killed and recovered, hung, cancelled."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from configs.paths import HomePaths
from orchestrator.record.events import RanksStarted
from orchestrator.record.states import State
from tests.cluster.conftest import Shell
from tests.web.browser.driving import BrowserPage, driving, needs_browser
from tests.web.browser.test_views import TABS
from tests.web.made import ledger_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400), needs_browser]

RUN = ("experiment=smoke", "parallel.dp=2", "parallel.ep=2", "train.steps=1000000", "train.log_every=1",
       "checkpoint.every=20", "resilience.timeouts.patience=8")  # fmt: skip


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
    run_id = shell.submit(*RUN)
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
    page.go(f"run/{run}/layout?attempt=2")
    page.shows("rank 0, which is stopped (state T)", ".note.bad", seconds=30)
    look_at_all(page, run)


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
