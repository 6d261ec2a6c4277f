"""Whatever dies, the page says so and is whole again by itself."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.paths import HomePaths
from orchestrator.web import export, read_model, server
from orchestrator.web.columns import MetricColumns, expert_loads
from tests.source_tree import ROOT
from tests.web.made import MadeRun, a_home, queue_file
from tests.web.serving import Client, serving

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

_SERVE = (
    "import argparse, sys; from pathlib import Path; from configs.paths import HomePaths; "
    "from orchestrator.commands.calls import CommandCall; from orchestrator.web import cli;"
    "sys.exit(cli.run(CommandCall(argparse.Namespace(host='127.0.0.1', port=int(sys.argv[2]), allow_host=[], "
    "no_token=False, export=None, json=False, address=None), HomePaths(Path(sys.argv[1])), ())))"
)


@pytest.fixture
def home(tmp_path: Path) -> HomePaths:
    return a_home(tmp_path / "home")


def start(home: HomePaths, port: int = 0) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    child = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(home.home), str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    line = child.stdout.readline()
    assert "dashboard of" in line, child.stderr.read() if child.stderr else ""
    return child, json.loads((home.home / "dashboard.json").read_text())


def ask(told: dict[str, Any], path: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", told["port"], timeout=30)
    token = told["url"].partition("token=")[2]
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status == 200, body
    return dict(json.loads(body))


def test_a_dashboard_that_was_killed_comes_back_as_it_was(home: HomePaths) -> None:
    MadeRun(home, "one", now=time.time() - 60).submit().start().train(20).save()
    child, told = start(home)
    try:
        deadline = time.monotonic() + 30
        while not ask(told, "/api/runs")["runs"]:
            assert time.monotonic() < deadline
        before = ask(told, "/api/run/one/series?names=loss")
        listener = http.client.HTTPConnection("127.0.0.1", told["port"], timeout=30)
        listener.request(
            "GET", "/api/events", headers={"Authorization": f"Bearer {told['url'].partition('token=')[2]}"}
        )
        stream = listener.getresponse()
        assert stream.readline()
        child.kill()
        child.wait(20)
        child, again = start(home, told["port"])
        assert again["url"] == told["url"], "the link and the browser's cookie still hold"
        while not ask(again, "/api/runs")["runs"]:
            assert time.monotonic() < deadline + 30
        after = ask(again, "/api/run/one/series?names=loss")
        assert after["segments"] == before["segments"]
        listener.close()
        listener = http.client.HTTPConnection("127.0.0.1", told["port"], timeout=30)
        listener.request(
            "GET", "/api/events", headers={"Authorization": f"Bearer {told['url'].partition('token=')[2]}"}
        )
        assert listener.getresponse().readline(), "a page listens while it ends"
        same, other = (
            subprocess.run(
                [sys.executable, "-c", _SERVE, str(folder), str(told["port"])],
                cwd=ROOT, capture_output=True, text=True, timeout=60,
            )
            for folder in (home.home, home.home.with_name("another"))
        )  # fmt: skip
        assert same.returncode == 0 and f"is up already: {told['url']}" in same.stdout
        assert "Address already in use; choose another port" in other.stderr
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0, "it ends though pages listen"
    finally:
        child.kill()
        child.wait(20)


def test_a_controller_that_is_gone_is_told_and_missed_by_nobody(home: HomePaths) -> None:
    run = MadeRun(home, "one", now=time.time() - 60).submit().start().train(20)
    queue_file(home, time.time() - 45)
    with serving(home) as client:
        told = client.get("/api/queue")["controller"]
        assert told["alive"] is False and told["beat_age"] == pytest.approx(45, abs=10)
        assert re.fullmatch(
            r"no controller has been active for \d+ s: .* train on without it.*", told["said"]
        )
        run.now = time.time()
        run.train(1)
        client.until("/api/runs", lambda tree: tree["runs"][0]["step"] == 21)
        queue_file(home, time.time())
        assert (
            client.until("/api/queue", lambda tree: tree["controller"]["alive"])["controller"]["said"]
            == "the controller answers"
        )
        home.queue.unlink()
        gone = client.until("/api/queue", lambda tree: not tree["controller"]["alive"])
        assert "no controller has served this home yet" in gone["controller"]["said"]
        home.queue.write_text('{"beat": "soon", "waiting": [{"run": 5}], "nodes": [{}]}')
        client.fresh()
        assert client.get("/api/queue")["controller"]["alive"] is False
        assert client.get("/api/nodes")["nodes"] is not None
        assert client.raw("/metrics")[0] == 200


def test_a_line_that_rank_0_died_in(home: HomePaths) -> None:
    run = MadeRun(home, "one", now=time.time() - 60).submit().start().train(20)
    path = run.run.attempt(1).metrics
    with serving(home) as client:
        assert client.get("/api/run/one/series")["last"] == 20
        with path.open("ab") as file:
            file.write(b'{"kind": "step", "time": 17')
        client.fresh()
        assert client.get("/api/run/one/series")["last"] == 20
        with path.open("ab") as file:
            file.write(b"\n\xff\xfe{}\n[1]\n")
        run.train(2)
        tree = client.until("/api/run/one/series", lambda tree: tree["last"] == 22)
        assert tree["indexed"] == 1.0
        path.write_bytes(b"")
        run.step = 0
        client.until("/api/run/one/series", lambda tree: tree["last"] is None)
        run.train(3)
        client.until("/api/run/one/series", lambda tree: tree["last"] == 3)


def test_one_broken_run_stops_no_other(home: HomePaths) -> None:
    MadeRun(home, "good", now=time.time() - 60).submit().start().train(5)
    bad = MadeRun(home, "bad", now=time.time() - 60).submit().start().train(5)
    lines = bad.run.events.read_text().splitlines(keepends=True)
    bad.run.events.write_text("".join([lines[0], "garbage\n", *lines[1:]]))
    bad.run.view.unlink(missing_ok=True)
    worse = MadeRun(home, "worse", now=time.time() - 60).submit()
    worse.run.events.write_text("\x00\x01 not a log\n")
    (home.runs / "empty").mkdir()
    (home.runs / "empty" / "events.jsonl").mkdir()
    with serving(home) as client:
        tree = client.get("/api/runs")
        assert {row["run_id"] for row in tree["runs"]} >= {"good", "bad"}
        assert any("bad" in text and "at byte" in text for text in tree["damage"]), tree["damage"]
        assert any("worse" in text for text in tree["damage"]) and any(
            "empty" in text for text in tree["damage"]
        )
        assert client.get("/api/run/bad/ledger")["wall_seconds"] > 0
        shutil.rmtree(bad.run.root)
        client.until("/api/runs", lambda tree: {row["run_id"] for row in tree["runs"]} == {"good"})
        assert client.get("/api/run/bad", 404)["error"]


def test_storage_that_hangs_leaves_the_page_as_it_was(
    home: HomePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    MadeRun(home, "one", now=time.time() - 60).submit().start().train(5)
    queue_file(home, time.time())
    released, read, entered = threading.Event(), read_model.read_queue, threading.Event()
    try:
        with serving(home) as client:

            def hangs(home: HomePaths) -> dict[str, Any]:
                entered.set()
                assert released.wait(60)
                return read(home)

            monkeypatch.setattr(read_model, "read_queue", hangs)
            monkeypatch.setattr(server, "_OLD", 0.5)
            client.shared.live.refresh_now()
            assert entered.wait(20)
            time.sleep(0.6)
            assert client.get("/healthz", 503)["ok"] is False
            stale = client.get("/api/runs")
            assert stale["runs"][0]["run_id"] == "one" and time.time() - stale["as_of"] > 0.5
            monkeypatch.setattr(server, "_PATIENCE", 0.5)
            monkeypatch.setattr(client.shared.answers, "_live", _Hanging(released))
            for _ in range(server._THREADS + 1):
                status, _, body = client.raw("/api/run/one/series")
                assert status == 503 and b"storage took longer" in body
            assert client.get("/api/runs")["runs"], "what is in memory is still told"
            released.set()
            monkeypatch.undo()
            client.fresh()
            assert client.get("/healthz")["ok"] is True
            client.until("/api/run/one/series", lambda tree: tree["last"] == 5)
    finally:
        released.set()


class _Hanging:
    def __init__(self, released: threading.Event) -> None:
        self._released = released

    def open_run(self, run_id: str) -> Any:
        self._released.wait(60)
        raise FileNotFoundError("it was only held up")


def test_a_turn_that_fails_is_told_and_the_next_one_goes_on(
    home: HomePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    MadeRun(home, "one", now=time.time() - 60).submit().start().train(5)
    with serving(home) as client:
        reader = client.shared.live
        real = reader._read_nodes
        monkeypatch.setattr(
            reader, "_read_nodes", lambda: (_ for _ in ()).throw(OSError(5, "Input/output error"))
        )
        client.until("/api/me", lambda tree: "Input/output error" in tree["failed"])
        monkeypatch.setattr(reader, "_read_nodes", real)
        client.until("/api/me", lambda tree: tree["failed"] == "")


# ---- much of everything ----


def long_metrics(path: Path, steps: int, layers: int = 2, experts: int = 4) -> None:
    """Lines as rank 0 writes them, made from one."""
    load = json.dumps([[16] * experts for _ in range(layers)])
    with path.open("w") as file:
        for step in range(1, steps + 1):
            loss = 99.0 if step == steps // 3 else 2.0
            norm = 50.0 if step == steps // 3 else 1.0
            file.write(
                f'{{"kind": "step", "time": {1.7e9 + step}, "attempt": 1, "step": {step}, "loss": {loss}, '
                f'"aux_loss": 0.01, "lr": 0.001, "grad_norm": {norm}, "tokens": {64 * step}, "tokens_per_second": 64.0, '
                f'"step_seconds": 1.0, "phase_seconds": {{"data": 0.1, "forward": 0.3}}, "mfu": null, '
                f'"expert_load": {load}, "balance_entropy": 0.99, "dropped": 0, "memory_bytes": 1000, "skipped": 0}}\n'
            )


def test_memory_is_bounded_and_spikes_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    long_metrics(path, 20_000)
    columns = MetricColumns(path, 1000)
    assert columns.update()
    assert columns.rows <= 1000 and columns.joined and columns.lines == 20_000
    assert columns.column("busy").sum() == pytest.approx(20_000, rel=1e-6), "the ledger stays exact"
    assert columns.column("loss").max() == 99.0, "a spike is still seen"
    assert columns.column("step")[-1] == 20_000
    assert columns.bytes < 500_000
    assert expert_loads(columns.line_bytes(columns.rows - 1)) == [[16] * 4] * 2


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_loss_beyond_the_columns_numbers_is_infinite_and_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    long_metrics(path, 1)
    path.write_text(re.sub(r'"loss": [^,]+', '"loss": 1e300', path.read_text()))
    columns = MetricColumns(path)
    assert columns.update() and columns.column("loss").tolist() == [float("inf")]


def test_a_line_of_megabytes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    long_metrics(path, 3, layers=60, experts=20_000)
    assert path.stat().st_size > 12_000_000
    columns = MetricColumns(path)
    assert columns.update()
    assert columns.rows == 3 and len(expert_loads(columns.line_bytes(1))[59]) == 20_000


def test_reading_goes_on_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.web.columns._CHUNK", 1000)
    path = tmp_path / "metrics.jsonl"
    long_metrics(path, 50)
    whole = path.read_bytes()
    path.write_bytes(b"")
    columns, seen = MetricColumns(path), []
    for end in range(0, len(whole) + 700, 700):
        path.write_bytes(whole[:end])
        while not columns.update(0.0):
            pass
        seen.append(columns.rows)
    assert columns.rows == 50 and seen == sorted(seen)
    assert columns.column("step").tolist() == list(range(1, 51))


def test_runs_that_nobody_looks_at_cost_little(home: HomePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_model, "_MAX_VIEWED", 1)
    for name in ("one", "two", "three"):
        run = MadeRun(home, name, now=time.time() - 60).submit().start()
        long_metrics(run.run.attempt(1).metrics, 6000)
    with serving(home) as client:
        reader = client.shared.live
        client.until("/api/run/one", lambda tree: tree["indexed"] == 1.0)
        client.until("/api/run/two", lambda tree: tree["indexed"] == 1.0)
        client.until(
            "/api/run/two/series", lambda tree: sum(sum(s["rows"]) for s in tree["segments"]) == 6000
        )
        client.fresh()
        client.fresh()
        rows = {
            name: sum(c.rows for c in state.columns.values()) for name, state in reader.snapshot.runs.items()
        }
        assert rows["two"] == 6000 and rows["three"] <= 4000 and rows["one"] <= 4000
        client.until(
            "/api/run/one/series",
            lambda tree: sum(sum(s["rows"]) for s in tree["segments"]) == 6000,
            points=4000,
        )


def test_a_home_with_many_queued_runs(home: HomePaths) -> None:
    for i in range(120):
        MadeRun(home, f"run-{i:03d}", now=time.time() - i).submit()
    waiting = [{"run": f"run-{i:03d}", "position": i + 1, "reason": "needs 2 CPU slots"} for i in range(120)]
    queue_file(home, time.time(), waiting=waiting)
    with serving(home) as client:
        assert len(client.until("/api/runs", lambda tree: len(tree["runs"]) == 120)["runs"]) == 120
        assert client.get("/api/queue")["waiting"][119]["position"] == 120
        before = client.shared.live.snapshot.versions
        queue_file(home, time.time(), waiting=waiting[1:])
        client.until("/api/queue", lambda tree: len(tree["waiting"]) == 119)
        assert client.shared.live.snapshot.versions["run-000"] != before["run-000"], (
            "its row changed: it waits no more"
        )
        assert os.getpid()


def test_the_server_loads_no_heavy_library() -> None:
    code = (
        "import sys; import orchestrator.web.cli\n"
        "found = {'torch', 'ray', 'wandb', 'deepspeed', 'hydra'} & set(sys.modules)\nassert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def _no_children() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "dashboard-reader"]


def test_the_client_of_the_tests_can_fail(home: HomePaths) -> None:
    with serving(home) as client, pytest.raises(AssertionError):
        Client(client.port, client.shared).get("/api/run/none")


# ---- the page itself ----

_BROWSER = """
globalThis.document = { getElementById: () => null, hidden: false, addEventListener() {} };
globalThis.fetch = async () => ({ json: async () => ({ ok: true }) });
const waits = [], timers = [], sources = [];
globalThis.setTimeout = (act, wait) => (waits.push(wait), timers.push(act));
globalThis.EventSource = class {
  constructor() { this.on = {}; sources.push(this); }
  addEventListener(name, act) { this.on[name] = act; }
  close() {}
};
"""
_REFUSED = """
(async () => {
  const refuse = async () => { sources.at(-1).onerror(); await timers.pop()(); };
  for (let i = 0; i < 7; i++) await refuse();
  sources.at(-1).on.changed({ data: JSON.stringify({ as_of: 1, controller: true }) });
  await refuse();
  console.log(JSON.stringify([waits, sources.length]));
})();
"""


def test_a_page_that_the_server_refuses_asks_ever_less_often(tmp_path: Path) -> None:
    """Its cookie is gone, or too many listen: /healthz answers all the same."""
    program = shutil.which("node") or shutil.which("nodejs")
    if program is None:
        pytest.skip("node isn't installed")
    for name in ("api.js", "format.js"):
        shutil.copy(server.STATIC / name, tmp_path)
    (tmp_path / "page.js").write_text('import { listen } from "./api.js";\nlisten(() => {});\n')
    text = export.bundle(tmp_path, ["page.js"])
    done = subprocess.run(
        [program, "-e", _BROWSER + text + _REFUSED], capture_output=True, text=True, timeout=30
    )
    waits, opened = json.loads(done.stdout or "[[], 0]")
    assert opened == 9, done.stderr
    assert waits == [500, 1000, 2000, 3000, 5000, 5000, 5000, 500], (
        "from the beginning once an event has come"
    )
