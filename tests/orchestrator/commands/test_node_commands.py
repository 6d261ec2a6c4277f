"""The commands about nodes, from what is typed to what is printed; the controller is its decider alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.commands import cluster_target, console
from orchestrator.decide import nodes as deciding
from orchestrator.record import cluster_log
from orchestrator.record.cluster_log import (
    Cordoned,
    Draining,
    NodesView,
    SpareMarked,
    SpareUnmarked,
    Uncordoned,
)
from orchestrator.record.events import Event
from tests.orchestrator.decide.cluster_sim import make_nodes

pytestmark = [pytest.mark.sim, pytest.mark.timeout(60)]


class FakeController:
    """Answers `mark_node` as the controller does, and keeps what it wrote."""

    def __init__(self) -> None:
        self.view = NodesView()
        self.written: list[cluster_log.Payload] = []
        self._write(deciding.observe(self.view, make_nodes(3, 8), 0.0))

    def mark_node(self, node: str, mark: str, reason: str, by: str) -> None:
        self._write([deciding.mark_event(self.view, node, mark, reason, by)])

    def _write(self, payloads: list[cluster_log.Payload]) -> None:
        self.view = cluster_log.apply(self.view, [Event(0, 1e9, p) for p in payloads])  # type: ignore[arg-type]
        self.written += payloads


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeController:
    made = FakeController()

    @contextmanager
    def client(call: object) -> Iterator[FakeController]:
        yield made

    monkeypatch.setattr(cluster_target, "client", client)
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path))
    rows = [
        {"ip": n.ip, "hostname": n.hostname, "slots": n.slots, "free": n.free, "runs": runs}
        for n, runs in zip(make_nodes(3, 8), (["a", "b"], ["a"], []), strict=True)
    ]
    (tmp_path / "queue.json").write_text(json.dumps({"nodes": rows}))
    return made


@pytest.mark.parametrize(
    ("words", "said", "written"),
    [
        (["cordon", "host0", "--reason", "a fan"], "no run starts on host0 from now on; a continues; b continues",
         Cordoned("10.0.0.1", "a fan", "ann")),
        (["drain", "10.0.0.2", "--reason", "smoke"],
         "no run starts on 10.0.0.2 from now on; a saves and moves to other nodes", Draining("10.0.0.2", "smoke", "ann")),
        (["spare", "host2"], "host2 is kept for runs that recover from a fault", SpareMarked("10.0.0.3", "", "ann")),
    ],
)  # fmt: skip
def test_a_mark_reaches_the_controller_and_says_what_becomes_of_the_runs(
    words: list[str],
    said: str,
    written: object,
    controller: FakeController,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(words) == 0
    assert controller.written[-1] == written
    assert capsys.readouterr().out == f"{said}\nnext: python -m orchestrator nodes\n"


def test_marks_are_taken_back(controller: FakeController, capsys: pytest.CaptureFixture[str]) -> None:
    for words, written in (
        (["cordon", "host0", "--reason", "a fan"], Cordoned("10.0.0.1", "a fan", "ann")),
        (["uncordon", "host0"], Uncordoned("10.0.0.1", "", "ann")),
        (["spare", "host0"], SpareMarked("10.0.0.1", "", "ann")),
        (["unspare", "host0"], SpareUnmarked("10.0.0.1", "", "ann")),
    ):
        assert cli.main(words) == 0
        assert controller.written[-1] == written
    assert "host0 is used like the others\n" in capsys.readouterr().out


def test_json_is_json_and_nothing_else(
    controller: FakeController, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["drain", "host0", "--reason", "smoke", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree == {"node": "host0", "mark": "drain", "reason": "smoke", "runs": ["a", "b"]}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cordon", "host9", "--reason", "x"], "node 'host9' isn't known (did you mean 'host"),
        (["uncordon", "host0"], "host0 is neither cordoned nor draining"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], told: str, controller: FakeController, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("megaray: ") and told in error and error.count("\n") == 1


def test_the_table_of_nodes_shows_the_marks() -> None:
    rows = [
        {"ip": "10.0.0.1", "hostname": "h0", "slots": {"GPU": 8}, "free": {"GPU": 0}, "runs": ["a"],
         "barred": "cordoned: a fan", "spare": False, "suspicion": 1.0, "labels": {}},
        {"ip": "10.0.0.2", "hostname": "h1", "slots": {"GPU": 8}, "free": {"GPU": 8}, "runs": [], "barred": "",
         "spare": True, "suspicion": 0.0, "labels": {"rack": "r2"}},
    ]  # fmt: skip
    lines = console.nodes({"nodes": rows}).splitlines()
    assert "cordoned: a fan" in lines[1] and "suspicion 1" in lines[1]
    assert "spare" in lines[2] and "rack r2" in lines[2] and "suspicion" not in lines[2]
