"""What the page says when something is dead, and that it is whole again by itself; actions; an export."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from configs.paths import HomePaths
from orchestrator.web import export
from orchestrator.web.actions import Actions
from orchestrator.web.read_model import HomeReadModel
from tests.web.browser import homes
from tests.web.browser.driving import PHONE, BrowserPage, browsing, driving, needs_browser
from tests.web.browser.homes import HOSTILE, HUNG, LIVE, RECOVERED
from tests.web.made import MadeRun, a_home
from tests.web.serving import Client, serving

pytestmark = [pytest.mark.unit, pytest.mark.timeout(240), needs_browser]
ROOT = Path(__file__).parents[3]
SERVER = "import sys; from tests.web.browser.test_life import command; command(sys.argv[1], int(sys.argv[2]))"
ACTOR = """
import json, sys
order = json.loads(sys.stdin.readline())
said = "{action} of {target} by {by}: {reason}".format(**order)
print(json.dumps({"ok": order["target"] != "10.0.0.2", "said": said}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> homes.Home:
    return homes.a_full_home(tmp_path_factory.mktemp("home"))


@contextmanager
def a_server(home: HomePaths, port: int) -> Iterator[subprocess.Popen[str]]:
    """The dashboard as people start it, ready to answer."""
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(home.home), str(port)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert child.stdout is not None and child.stdout.readline().startswith("ready")
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait(20)


def command(home: str, port: int) -> None:
    """A server in a process of its own, which a test kills."""
    import asyncio

    from aiohttp import web

    from orchestrator.web import server
    from orchestrator.web.security import AccessTokens
    from tests.web.serving import TOKEN

    async def serve() -> None:
        app, _ = server.make(HomePaths(Path(home)), AccessTokens({TOKEN: "ann"}), "127.0.0.1", port, [])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        print("ready", flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


def test_the_dashboard_itself_is_killed(home: homes.Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    homes.queue(home.paths, [])
    with driving() as driver:
        page = BrowserPage(driver, Client(port, None))  # type: ignore[arg-type]
        with a_server(home.paths, port):
            page.login()
            page.until(lambda: page.js("return document.body.dataset.loaded"))
            page.go(f"run/{RECOVERED}")
            page.shows("80 of 100")
        page.shows("The dashboard's server doesn't answer since", "#banners", 40)
        assert "80 of 100" in page.text(), "what was known is still shown"
        with a_server(home.paths, port):
            homes.queue(home.paths, [])
            page.until(lambda: page.text("#banners") == "", 40, "the page isn't whole again")
            page.console()
            page.go("")
            page.shows("Active (7)")
            assert page.console() == []


def test_the_controller_falls_silent(home: homes.Home) -> None:
    homes.queue(home.paths, [])
    with serving(home.paths) as client, browsing(client) as page:
        page.go("")
        assert page.text("#banners") == ""
        homes.queue(home.paths, [], age=100)
        page.shows("no controller has been active for", "#banners", 30)
        homes.queue(home.paths, [])
        page.until(lambda: page.text("#banners") == "", 30, "it isn't told that the controller is back")
        page.go(f"run/{LIVE}")
        homes.queue(home.paths, [], age=100)
        page.shows("no controller has been active for", "#banners", 30)
        assert page.console() == []


def test_storage_hangs(home: homes.Home) -> None:
    """The server continues with what it has read, and the page says how old that is."""
    go_on = threading.Event()
    with serving(home.paths) as client, browsing(client) as page:
        live = client.shared.live
        turn = live.turn

        def hanging() -> None:
            # The page waits until what it shows is 20 s old: this is older from the start.
            live.snapshot = replace(live.snapshot, as_of=live.snapshot.as_of - 19)
            go_on.wait(120)
            turn()

        live.turn = hanging  # type: ignore[method-assign]
        try:
            page.shows("Storage is slow: what is shown was read", "#banners", 60)
            page.go(f"run/{LIVE}")
            page.shows("of 400")
        finally:
            go_on.set()
        page.until(lambda: "Storage" not in page.text("#banners"), 30)


def test_actions_are_asked_once_more(home: homes.Home) -> None:
    homes.queue(home.paths, [])
    with serving(home.paths) as client, browsing(client) as page:
        shared = client.shared
        shared.actions = Actions(shared.live, shared.redact, (sys.executable, "-c", ACTOR))
        page.go(f"run/{LIVE}")
        page.button("Cancel").click()
        page.shows(f"Cancel {LIVE} (running, step", "#dialog")
        assert page.js("return document.activeElement.innerText") == "No, leave it", (
            "the harmless answer has the focus"
        )
        page.keys("\ue00c")  # escape
        page.until(lambda: not page.js("return document.getElementById('dialog').open"))
        assert client.get("/api/actions")["actions"] == []
        page.button("Cancel").click()
        page.shows("Its ranks finish their step", "#dialog")
        page.button("Yes, cancel it").click()
        page.shows(f"cancel of {LIVE} by ann: ", "#said", 60)
        page.go("nodes")
        page.button("Cordon").click()
        page.keys("smells of smoke", "\ue007")
        page.shows("Keep runs from 10.0.0.1 (one)?", "#dialog")
        page.button("Yes, cordon it").click()
        page.shows("cordon of 10.0.0.1 by ann: smells of smoke", "#said", 60)
        page.button("Uncordon").click()
        page.shows("Let runs on 10.0.0.2", "#dialog")
        page.console()
        page.button("Yes, use it again").click()
        page.shows("uncordon of 10.0.0.2 by ann", "#dialog .note.bad", 60)
        page.keys("\ue00c")
        page.go("actions")
        page.shows("smells of smoke")
        assert [[row[2], row[5]] for row in page.rows("Actions")] == [
            ["uncordon", "no"],
            ["cordon", "yes"],
            ["cancel", "yes"],
        ]
        page.console()  # the browser writes down each question, an answer of 409, as an error


def test_two_hundred_queued_runs(tmp_path: Path) -> None:
    home = homes.many(tmp_path)
    with serving(home) as client, browsing(client) as page:
        page.go("")
        page.shows("Queue (200)")
        assert len(page.rows("Runs that wait")) == 200
        assert "position 200: needs 8 GPU slots, 0 are free" in page.text()
        page.size(*PHONE)
        assert page.js("return document.documentElement.scrollWidth <= innerWidth")
        assert page.console() == []


def test_of_a_run_that_waits_nothing_is_asked_that_the_server_refuses(tmp_path: Path) -> None:
    home = a_home(tmp_path)
    run = MadeRun(home, "next-1126-130000-aaaa", now=time.time() - 30).submit()
    homes.queue(home, [{"run": run.run_id, "position": 1, "reason": "needs 2 CPU slots, 1 is free"}])
    with serving(home) as client, browsing(client) as page:
        for tab in ("", "time", "checkpoints", "incidents", "experts", "ranks", "ranks?rank=0", "logs", "setup",
                    "layout?rank=0", "layout"):  # fmt: skip
            page.go(f"run/{run.run_id}/{tab}")
            page.shows("Position 1: needs 2 CPU slots")
            assert "Loading" not in page.text(), tab
        assert page.text().endswith("No attempt has been placed yet.")
        assert page.console() == [], "a refused question would be an error there"
        run.wait(1).start(1, 2)
        page.until(lambda: "2 ranks on " in page.text(), 30, "it isn't shown once it is placed")
        assert page.console() == []


def test_a_file_that_opens_anywhere(home: homes.Home, tmp_path: Path) -> None:
    live = HomeReadModel(home.paths)
    for run in (HUNG, HOSTILE):
        path = tmp_path / f"{run}.html"
        export.write(home.paths, run, path)
        assert live.home is home.paths
    with driving() as driver:
        page = BrowserPage(driver, Client(0, None))  # type: ignore[arg-type]
        page.driver.get((tmp_path / f"{HUNG}.html").as_uri())
        page.shows(f"A copy of run {HUNG}", "#banners")
        for tab in (
            "",
            "time",
            "checkpoints",
            "incidents",
            "experts",
            "ranks",
            "ranks?rank=0",
            "layout",
            "logs",
            "setup",
        ):
            page.go(f"run/{HUNG}/{tab}")
            assert "isn't in an exported file" not in page.text(), tab
        page.go(f"run/{HUNG}/layout?rank=37")
        page.shows("which is stopped (state T)")
        page.shows("rank 37 begins")
        page.go(f"run/{HUNG}/logs?rank=2")
        page.shows("rank 2 begins")
        page.go(f"run/{HUNG}/logs?rank=50")
        page.shows("this file holds the logs and stacks of the first ranks")
        page.go(f"run/{HUNG}/ranks?field=save")
        page.shows("Steps 1 to 90 are recorded")
        shown = [b.text for b in page.driver.find_elements("css selector", "button") if b.is_displayed()]
        assert not {"Cancel", "Write stacks", "Cordon"} & set(shown), "nothing can be done in a file"
        assert page.js("return performance.getEntriesByType('resource').length") == 0
        assert page.console() == []
        page.driver.get((tmp_path / f"{HOSTILE}.html").as_uri())
        page.go(f"run/{HOSTILE}/incidents")
        page.shows("Incident 1")
        assert page.js("return window.hacked") is None and page.console() == []
