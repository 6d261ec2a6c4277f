"""Grafana's boards: as the generator makes them, of what is exported, and with data in a real Prometheus."""

from __future__ import annotations

import json
import re
import time
import urllib.parse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.web import metrics
from tests.web import boards
from tests.web.made import MadeRun, a_home, queue_file
from tests.web.serving import serving
from tests.web.test_monitoring import FOLDER, asked, awaited, prometheus, promtool, rules

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

RUN, NODE = ("run", "instance", "job"), ("node", "instance", "job")
RAY = ("ip", "GpuIndex", "GpuDeviceName", "instance", "job", "SessionName")
#: What each function, operator or word of PromQL in a board or a rule may be.
WORDS = {
    "time", "rate", "increase", "sum", "avg", "min", "max", "count", "vector", "quantile_over_time", "and", "or", "unless",
    "on", "by", "ignoring", "without", "group_left", "bool",
}  # fmt: skip


def exported() -> dict[str, set[str]]:
    """Metric -> its labels: megaray's own, recording rules, Prometheus' own and Ray's."""
    known = {name: {*RUN, *more} for name, (_, more) in metrics.RUN_GAUGES.items()}
    known |= {f"{name}_total": {*RUN, *more} for name, (_, more) in metrics.RUN_COUNTERS.items()}
    known |= {name: {*NODE, *more} for name, (_, more) in metrics.NODE_GAUGES.items()}
    known |= {name: {"instance", "job", *more} for name, (_, more) in metrics.PLAIN.items()}
    known |= {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate", "severity", "run", "node"}}
    known |= {rule["record"]: {*RUN, "part", "resource"} for rule in rules() if "record" in rule}
    return known | {name: set(RAY) for name in rays()}


def rays() -> set[str]:
    """Metrics of Ray's nodes, from the installed Ray."""
    spec = find_spec("ray")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "dashboard/modules/reporter/reporter_agent.py").read_text()
    found = {f"ray_{name}" for name in re.findall(r'"(node_\w+)": Gauge\(', text)}
    assert "ray_node_cpu_utilization" in found, "Ray has moved its metrics"
    return found


def strangers(expression: str, known: dict[str, set[str]]) -> set[str]:
    """Metrics, functions and labels in an expression that nothing exports."""
    found = set()
    for name, inside in re.findall(r"([A-Za-z_:][\w:]*)\s*\{([^}]*)\}", expression):
        labels = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', inside)
        found |= {f"{name}{{{label}}}" for label in labels if label not in known.get(name, {label})}
    every = {label for labels in known.values() for label in labels}
    for inside in re.findall(r"\b(?:by|on|ignoring|without|group_left)\s*\(([^)]*)\)", expression):
        found |= {label for label in re.findall(r"\w+", inside) if label not in every}
    plain = re.sub(
        r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(by|on|ignoring|without|group_left)\s*\([^)]*\)', " ", expression
    )
    return found | {
        word
        for word in re.findall(r"(?<![\w.])[A-Za-z_:][\w:]*", plain)
        if word not in known and word not in WORDS
    }


def asked_of(board: boards.Board) -> list[tuple[boards.Panel, str]]:
    """Panels and their expressions."""
    return [
        (panel, text) for _, panels in board.rows for panel in panels for text in boards.expressions(panel)
    ]


def test_the_check_finds_what_is_wrong() -> None:
    known = exported()
    assert strangers("megaray_run_stp > 1", known) == {"megaray_run_stp"}
    assert strangers('megaray_run_step{node="n"}', known) == {"megaray_run_step{node}"}
    assert strangers("sum by (rnu) (megaray_run_step)", known) == {"rnu"}
    assert strangers("summ(megaray_run_step)", known) == {"summ"}
    assert strangers("megaray_run_trained_steps", known) == {"megaray_run_trained_steps"}, (
        "a counter is stored with _total"
    )
    assert strangers("ray_node_warmth", known) == {"ray_node_warmth"}
    assert not strangers('sum by (run) (rate(megaray_run_trained_steps_total{run="a"}[5m])) > 1e-3', known)


@pytest.mark.parametrize("board", boards.BOARDS, ids=lambda board: board.name)
def test_a_board_asks_for_what_is_exported(board: boards.Board) -> None:
    known = exported()
    for panel in (panel for _, panels in board.rows for panel in panels):
        for text, (_, legend) in zip(boards.expressions(panel), panel.queries, strict=True):
            assert not strangers(text, known), (panel.title, text)
            names = set(re.findall(r"[A-Za-z_:][\w:]*", text)) & set(known)
            labels = re.findall(r"\{\{(\w+)\}\}", legend)
            labels += [name for name, _, _ in panel.columns[:1]]  # by which a table's queries are joined
            assert all(any(label in known[name] for name in names) for label in labels), (panel.title, legend)
    for _, metric, label in board.variables:
        assert label in known[metric]


def test_rules_ask_for_what_is_exported() -> None:
    known = exported()
    for rule in rules():
        assert not strangers(rule["expr"], known), rule


def test_the_boards_on_disk_are_what_the_generator_makes() -> None:
    for board in boards.BOARDS:
        path = boards.FOLDER / f"{board.name}.json"
        assert path.read_text() == boards.text(board), f"{path} is old: type `python -m tests.web.boards`"
    assert {path.stem for path in boards.FOLDER.iterdir()} == {board.name for board in boards.BOARDS}


@pytest.mark.parametrize("board", boards.BOARDS, ids=lambda board: board.name)
def test_a_board_is_whole(board: boards.Board) -> None:
    tree: dict[str, Any] = json.loads(boards.text(board))
    panels = tree["panels"]
    assert tree["uid"] == f"megaray-{board.name}" and tree["title"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= boards.WIDTH and not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or (
            panel["targets"] and all(t["datasource"] == panel["datasource"] for t in panel["targets"])
        )
    shown = [title for title, _ in board.rows]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == shown


def test_promtool_takes_every_expression(tmp_path: Path) -> None:
    texts = [text for board in boards.BOARDS for _, text in asked_of(board)]
    file = tmp_path / "boards.yml"
    made = [{"record": f"board:{i}", "expr": text.replace("$run", "a")} for i, text in enumerate(texts)]
    file.write_text(yaml.safe_dump({"groups": [{"name": "boards", "rules": made}]}))
    done = promtool("check", "rules", "--lint=none", str(file))
    assert done.returncode == 0, done.stderr.decode()
    made[0]["expr"] += ")"
    file.write_text(yaml.safe_dump({"groups": [{"name": "boards", "rules": made}]}))
    assert promtool("check", "rules", "--lint=none", str(file)).returncode != 0


def test_provisioning_names_the_boards_and_the_rules_their_alerts() -> None:
    folder = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "megaray.yml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"]
    providers = yaml.safe_load((folder / "dashboards" / "megaray.yml").read_text())["providers"]
    paths = {one["name"]: one["options"]["path"] for one in providers}
    assert paths == {"megaray": "$MEGARAY_MONITORING/grafana/boards", "Ray": "$MEGARAY_RAY_BOARDS"}
    readme = (FOLDER / "README.md").read_text()
    for name in (
        "MEGARAY_MONITORING",
        "MEGARAY_RAY_BOARDS",
        "megaray.token",
        *(board.name for board in boards.BOARDS),
    ):
        assert name in readme, name
    alerts = [rule["alert"] for rule in rules() if "alert" in rule]
    assert all(re.fullmatch("Megaray.+", name) for name in alerts), (
        "boards and annotations ask for alerts of this name"
    )


EMPTY = (
    "ray_node",
    "ALERTS",
    "megaray_run_queue_position",
    "megaray_run_mfu_ratio",
    "megaray_run_checkpoint_due_step",
)
"""Of which a cluster without Ray's metrics, alerts, a queue, a device that is known and saves out of turn has nothing."""


def test_a_real_prometheus_has_data_for_every_panel(tmp_path: Path) -> None:
    home = a_home(tmp_path)
    run = (
        MadeRun(home, "one", now=time.time() - 100)
        .submit()
        .wait(2)
        .start(1, 3)
        .train(10)
        .evaluate()
        .save()
        .train(5)
        .fault(detect=2)
    )
    run.start(1, 3, step=10, part="restart").train(20).save(tier="memory")
    run.run.wandb.mkdir()
    (run.run.wandb / "cursor.json").write_text("{}")
    (tmp_path / "prometheus").mkdir()
    with serving(home) as client, prometheus(tmp_path / "prometheus", client.port) as url:
        queue_file(home, time.time())

        def rows(text: str) -> int:
            found = asked(url, "/api/v1/query?query=" + urllib.parse.quote(text.replace("$run", "one")))
            return len(found["result"]) if found else 0

        awaited(
            lambda: (
                rows('megaray:run:part_ratio{run="one",part="lost_work"} > 0')
                and rows("megaray:run:step_slowdown_ratio")
            )
        )
        awaited(lambda: rows("megaray:run:steps_per_second"))
        empty = {
            text for board in boards.BOARDS for panel, text in asked_of(board)
            if not any(name in text for name in EMPTY) and not text.endswith("> 0") and not rows(text)
        }  # fmt: skip
        assert not empty
