"""Prometheus' metrics, rules and configuration, by Prometheus itself where it is installed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.record.events import CheckpointCommitted, CheckpointFailed, IncidentClosed, IncidentOpened
from orchestrator.web import metrics, read_model
from orchestrator.web.redact import Redactor
from tests.source_tree import ROOT
from tests.web.made import MadeRun, a_home, queue_file
from tests.web.serving import TOKEN, Client, serving

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

FOLDER = ROOT / "deploy" / "monitoring"
_WORDS = {
    "time", "rate", "sum", "by", "on", "and", "or", "ignoring", "group_left", "quantile_over_time", "increase",
    "abs", "clamp_min", "without", "up", "unless", "job", "run", "part", "resource", "state",
    "node", "m", "h",
}  # fmt: skip


def promtool(*words: str, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool isn't installed (Debian's prometheus has it)")
    return subprocess.run([program, *words], input=given, capture_output=True, timeout=60)


def rules() -> list[dict[str, Any]]:
    found = []
    for path in sorted((FOLDER / "rules").glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            found += group["rules"]
    return found


def foreign(expression: str, known: set[str]) -> set[str]:
    """Names in an expression that nothing exports."""
    plain = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', " ", expression)
    return {
        word
        for word in re.findall(r"(?<![\w.])[A-Za-z_:][\w:]*", plain)
        if word not in known and word not in _WORDS
    }


def test_every_rule_names_metrics_that_are_exported() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = metrics.names() | recorded
    assert foreign("megaray_run_stp > 1", known) == {"megaray_run_stp"}, "the check finds a wrong name"
    for rule in rules():
        assert not foreign(rule["expr"], known), rule
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 10
    assert all(
        rule["labels"]["severity"] and set(rule["annotations"]) == {"summary", "action"} for rule in alerts
    )


def test_promtool_takes_rules_and_configuration(tmp_path: Path) -> None:
    for path in (FOLDER / "rules").glob("*.yml"):
        done = promtool("check", "rules", str(path))
        assert done.returncode == 0, done.stderr
    shutil.copytree(FOLDER / "rules", tmp_path / "rules")
    (tmp_path / "megaray.token").write_text("x")
    shutil.copy(FOLDER / "prometheus.yml", tmp_path)
    done = promtool("check", "config", str(tmp_path / "prometheus.yml"))
    assert done.returncode == 0, done.stderr
    done = promtool("test", "rules", str(ROOT / "tests" / "web" / "rules_test.yml"))
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


def scraped(client: Client) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Series of a scrape by name."""
    status, headers, body = client.raw("/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in body.decode().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            assert match, line
            labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
            found.setdefault(match[1], []).append((labels, float(match[3])))
    return found


def of(found: dict[str, list[tuple[dict[str, str], float]]], name: str, **labels: str) -> float | None:
    fitting = [value for own, value in found.get(name, []) if labels.items() <= own.items()]
    assert len(fitting) <= 1, (name, fitting)
    return fitting[0] if fitting else None


def test_labels_that_people_type_hold_no_secrets(tmp_path: Path) -> None:
    home = a_home(tmp_path)
    run = MadeRun(home, "one", now=time.time() - 10)
    run.model = run.owner = "password=hunter2hunter2"
    run.submit()
    queue_file(home, time.time())
    with serving(home) as client:
        labels, _ = scraped(client)["megaray_run_info"][0]
    assert labels["model"] == labels["owner"] == "password=[redacted]"


def test_metrics_of_a_run_with_a_fault(tmp_path: Path) -> None:
    home = a_home(tmp_path)
    begin = time.time() - 100
    run = (
        MadeRun(home, "one", now=begin).submit().wait(2).start(1, 3).train(10).save().train(5).fault(detect=2)
    )
    run.start(1, 3, step=10, part="restart").train(20).save_failed()
    (run.run.wandb).mkdir()
    (run.run.wandb / "cursor.json").write_text(json.dumps({"events": 10, "1": 5}))
    queue_file(home, time.time())
    with serving(home) as client:
        client.get("/api/run/one")
        client.until("/api/run/one", lambda tree: tree["indexed"] == 1.0)
        found = scraped(client)
        assert promtool("check", "metrics", given=client.raw("/metrics")[2]).returncode == 0
    assert of(found, "megaray_run_step", run="one") == 30
    assert of(found, "megaray_run_trained_steps_total", run="one") == 35
    assert of(found, "megaray_run_state", run="one", state="running") == 1
    assert of(found, "megaray_run_state", run="one", state="failed") == 0
    assert of(found, "megaray_run_incidents_total", run="one", cause="rank_exit") == 1
    assert of(found, "megaray_run_loss_finite", run="one") == 1
    assert of(found, "megaray_run_loss_nats", run="one") == pytest.approx(2 + 3 / 31**0.5)
    assert of(found, "megaray_run_phase_seconds", run="one", phase="forward") == pytest.approx(0.3)
    assert of(found, "megaray_run_checkpoint_step", run="one", tier="store") == 10
    assert of(found, "megaray_run_checkpoint_failed_saves", run="one") == 1
    assert of(found, "megaray_run_stalled_after_seconds", run="one") == 30
    assert of(found, "megaray_run_ledger_seconds", run="one", part="lost_work") == pytest.approx(5.4, abs=0.2)
    parts = [value for labels, value in found["megaray_run_ledger_seconds"] if labels["run"] == "one"]
    assert sum(parts) == pytest.approx(of(found, "megaray_run_wall_seconds", run="one") or 0, rel=1e-6)
    behind = (
        run.run.events.stat().st_size + sum(run.run.attempt(n).metrics.stat().st_size for n in (1, 2)) - 15
    )
    assert of(found, "megaray_run_wandb_behind_bytes", run="one") == behind
    spread = of(found, "megaray_run_expert_load_max_over_mean_ratio", run="one")
    assert spread is not None and 1.0 < spread < 2.0
    assert of(found, "megaray_controller_up") == 1 and of(found, "megaray_runs", state="running") == 1
    assert (
        of(found, "megaray_node_barred", node="10.0.0.2") == 1
        and of(found, "megaray_node_up", node="10.0.0.1") == 1
    )
    exported = {
        name
        for name in found
        if name.startswith("megaray_") and not name.startswith("megaray_dashboard_process")
    }
    assert exported - {name for name in exported if name.startswith("megaray_dashboard_")} <= metrics.names()


def test_unsaved_is_what_an_open_incident_says(tmp_path: Path) -> None:
    """A save that fails long after such an incident was closed is one failed save."""
    home = a_home(tmp_path)
    run = MadeRun(home, "one", now=time.time() - 60).submit().start().train(5)
    opened = IncidentOpened(1, 1, "checkpoint_overdue", "3 saves failed", None, None, 5, "")
    with serving(home) as client:
        for payloads, overdue in (
            ([CheckpointFailed(1, 5, "no space", 1)], 0),
            ([opened], 1),
            ([IncidentClosed(1, "saved", 0, 0.0), CheckpointCommitted(1, 5, "path", 1, 0.1)], 0),
            ([CheckpointFailed(1, 6, "no space", 1)], 0),
        ):
            run.tell(*payloads)
            client.fresh()
            series = scraped(client)
            assert of(series, "megaray_run_checkpoint_overdue", run="one") == overdue, payloads
            assert of(series, "megaray_run_open_incidents", run="one") == overdue
        assert of(series, "megaray_run_incidents_total", run="one", cause="checkpoint_overdue") == 1


def test_copies_that_differed_are_seen_until_a_checkpoint_has_equal_ones(tmp_path: Path) -> None:
    home = a_home(tmp_path)
    run = MadeRun(home, "one", now=time.time() - 60).submit().start().train(5)
    with serving(home) as client:
        for text, newest, ever in (("", 0, 0), ("x isn't the same on rank 1", 1, 1), ("", 0, 1)):
            run.train(1).save(differs=text)
            client.until("/api/run/one", lambda tree: tree["run"]["checkpoint_step"] == run.step)
            client.fresh()
            series = scraped(client)
            assert of(series, "megaray_run_checkpoint_copies_differ", run="one") == newest
            assert of(series, "megaray_run_checkpoints_differing_total", run="one") == ever


def test_nothing_is_counted_before_all_lines_are_read(tmp_path: Path) -> None:
    """Prometheus takes a counter that is smaller than before for one that began anew, and adds all of it again."""
    home = a_home(tmp_path)
    MadeRun(home, "one", now=time.time() - 400).submit().start().train(300).save()
    with serving(home) as client:
        client.until("/api/run/one", lambda tree: tree["indexed"] == 1.0)
        assert of(scraped(client), "megaray_run_trained_steps_total", run="one") == 300
    reader = read_model.HomeReadModel(home)
    reader.turn()
    # As a reader that has just begun leaves it where the files are long.
    reader.snapshot.runs["one"].loaded = False
    families = {family.name: family for family in metrics._Home(reader, Redactor()).collect()}
    for name in ("megaray_run_trained_steps", "megaray_run_checkpoints", "megaray_run_loss_nats"):
        assert not families[name].samples, name
    assert families["megaray_run_step"].samples


def test_labels_are_bounded_and_runs_that_ended_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = a_home(tmp_path)
    run = (
        MadeRun(home, "wide", now=time.time() - 400, experts=(24, 64), steps=300)
        .submit()
        .start()
        .train(300, 0.5)
        .save()
    )
    MadeRun(home, "past", now=time.time() - 900).submit().start().train(5).save().finish()
    MadeRun(home, "fresh", now=time.time() - 30).submit().start().train(5).save().finish()
    queue_file(home, time.time() - 60)
    with serving(home) as client:
        client.until("/api/run/wide", lambda tree: tree["indexed"] == 1.0)
        found = scraped(client)
        names = {labels["run"] for series in found.values() for labels, _ in series if "run" in labels}
        assert names == {"wide", "fresh"}, "what ended lately is still seen once, what ended long ago isn't"
        assert sum(1 for series in found.values() for labels, _ in series if labels.get("run") == "wide") < 90
        assert of(found, "megaray_controller_up") == 0, "its beat is a minute old"
        assert of(found, "megaray_run_state", run="fresh", state="succeeded") == 1
        assert of(found, "megaray_run_loss_nats", run="fresh") is not None, "its last lines too"
        assert of(found, "megaray_run_checkpoints_total", run="fresh") == 1
        assert of(found, "megaray_run_trained_steps_total", run="fresh") == 5
        monkeypatch.setattr(read_model, "EXPORT_SECONDS", 1.0)
        run.finish()
        time.sleep(0.01)
        client.until("/api/runs", lambda tree: all(row["ended_at"] for row in tree["runs"]))
        left = {
            labels["run"] for series in scraped(client).values() for labels, _ in series if "run" in labels
        }
        assert "fresh" not in left


def test_names_in_labels_are_escaped(tmp_path: Path) -> None:
    home = a_home(tmp_path)
    MadeRun(home, 'evil"} 1\n#x', owner='a"b\\c\nd').submit()
    with serving(home) as client:
        found = scraped(client)
        assert [labels["owner"] for labels, _ in found["megaray_run_info"]] == ['a\\"b\\\\c\\nd']


@contextmanager
def prometheus(folder: Path, port: int) -> Iterator[str]:
    """Debian's Prometheus with the configuration of the tree, at a pace for tests."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus isn't installed")
    shutil.copytree(FOLDER / "rules", folder / "rules")
    text = (FOLDER / "prometheus.yml").read_text()
    text = text.replace("127.0.0.1:8260", f"127.0.0.1:{port}").replace("_interval: 10s", "_interval: 1s")
    (folder / "prometheus.yml").write_text(text)
    (folder / "megaray.token").write_text(TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = free.getsockname()[1]
    child = subprocess.Popen(
        [
            program,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{own}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "prometheus.log").open("w"),
    )
    try:
        yield f"http://127.0.0.1:{own}"
    finally:
        child.terminate()
        child.wait(20)


def asked(url: str, path: str) -> Any:
    try:
        with urllib.request.urlopen(url + path, timeout=10) as answer:
            return json.loads(answer.read())["data"]
    except OSError:
        return None


def firing(url: str) -> set[tuple[str, str]]:
    found = asked(url, "/api/v1/alerts") or {"alerts": []}
    return {
        (a["labels"]["alertname"], a["labels"].get("run", ""))
        for a in found["alerts"]
        if a["state"] == "firing"
    }


def awaited(what: Any, seconds: float = 40.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.3)
    return found


def test_prometheus_scrapes_a_run_with_a_kill_and_its_alerts_fire(tmp_path: Path) -> None:
    home = a_home(tmp_path / "home")
    healthy = MadeRun(home, "healthy", now=time.time() - 40).submit().start().train(30).save()
    hung = MadeRun(home, "hung", now=time.time() - 200).submit().start().train(30).save()
    killed = MadeRun(home, "killed", now=time.time() - 40).submit().start().train(20).save().train(5)
    (tmp_path / "prometheus").mkdir()
    with serving(home) as client, prometheus(tmp_path / "prometheus", client.port) as url:
        queue_file(home, time.time())

        def value(query: str) -> float | None:
            found = asked(url, f"/api/v1/query?query={query}")
            return float(found["result"][0]["value"][1]) if found and found["result"] else None

        awaited(lambda: value("megaray_run_step%7Brun=%22killed%22%7D") == 25)
        awaited(lambda: ("MegarayRunStalled", "hung") in firing(url))
        assert not {name for name, run in firing(url) if run in ("healthy", "killed")}, (
            "nothing has happened to them"
        )
        killed.now = time.time()
        killed.fault(detect=0.0, stop=0.0, begun=0.0)
        awaited(lambda: ("MegarayRunFaulted", "killed") in firing(url))
        healthy.now = time.time()
        healthy.train(1, 0.1)
        killed.now = time.time()
        killed.start(0.1, 0.1, step=20, part="restart").train(8, 0.1)
        killed.train(1, 0.1, loss=float("nan"))
        awaited(lambda: ("MegarayLossNotFinite", "killed") in firing(url))
        awaited(lambda: ("MegarayRunFaulted", "killed") not in firing(url))
        assert value("megaray_run_trained_steps_total%7Brun=%22killed%22%7D") == 34
        assert not {name for name, run in firing(url) if run == "healthy"}
        hung.now = time.time()
        hung.train(1, 0.1)
        awaited(lambda: ("MegarayRunStalled", "hung") not in firing(url))
        assert value("up%7Bjob=%22megaray%22%7D") == 1
