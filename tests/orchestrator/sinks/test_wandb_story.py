"""What the W&B sink shows beside the curves: tables, heat maps, artifacts and nodes; by W&B itself, offline, read back."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from configs.compose import compose, dump
from configs.metrics import ResumedLine, SavedLine
from configs.paths import RunPaths
from orchestrator.record.events import EvidenceKept
from orchestrator.sinks import lineage, node_metrics, rows, tables
from orchestrator.sinks.wandb import WandbSink
from tests.orchestrator.fake_runtime import step_line
from tests.orchestrator.sinks.wandb_reading import read_offline, table, value
from tests.web.made import BEGIN, MadeRun, a_home

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

TOKEN = "token-of-the-dashboard"
KEY = "hf_" + "abcdefghij" * 4
#: As a node of Ray 2.60 serves it, shortened.
RAY = """# HELP ray_node_cpu_utilization Total CPU usage on a ray node
# TYPE ray_node_cpu_utilization gauge
ray_node_cpu_utilization{SessionName="s",ip="10.0.0.1",instance="a{b}"} 87.5
ray_node_mem_used{ip="10.0.0.1"} 2.5e+10
ray_node_mem_total{ip="10.0.0.1"} 1e+11
ray_node_gpus_utilization{ip="10.0.0.1",GpuIndex="0"} 90.0
ray_node_gpus_utilization{ip="10.0.0.1",GpuIndex="1"} 70.0
ray_node_gram_used{ip="10.0.0.1",GpuIndex="0"} 1024.0
ray_node_gram_used{ip="10.0.0.1",GpuIndex="1"} 3072.0
ray_node_gpu_temperature_celsius{GpuIndex="0"} 60
ray_node_gpu_temperature_celsius{GpuIndex="1"} 71
ray_node_network_send_speed{ip="10.0.0.1"} 2500000.0
ray_node_network_receive_speed{ip="10.0.0.1"} 7500000.0
ray_node_disk_io_write_speed{ip="10.0.0.1"} 500000.0
ray_node_disk_io_read_speed{ip="10.0.0.1"} NaN
ray_component_cpu_percentage{Component="raylet"} 1.0
"""


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A run of two ranks that lost one at step 15, continued from step 10 and finished; its evidence holds a secret."""
    home = a_home(tmp_path / "a home")
    (home.home / "dashboard.json").write_text(
        json.dumps({"url": f"http://127.0.0.1:8260/?token={TOKEN}", "pid": 1, "port": 8260})
    )
    run = MadeRun(home, steps=40).submit().wait(2)
    run.run.config.write_text(dump(compose(["experiment=smoke"])))
    run.start(1, 3).train(10).save().train(5)
    kept = run.run.attempt(1).evidence
    kept.mkdir(parents=True)
    (kept / "00001.stack.txt").write_text(f"process 4711\nHF_TOKEN={KEY}\n")
    (kept / "00001.ring.json").write_text("[]")
    run.fault(detect=2, detail=f"rank 1 was killed by SIGKILL, with {KEY}")
    return run.start(1, 3, step=10, part="restart").train(30).save().finish()


PUMP = (
    "import json, sys, time\nfrom pathlib import Path\nfrom configs.compose import load\n"
    "from configs.paths import RunPaths\n"
    "from orchestrator.sinks import node_metrics\nfrom orchestrator.sinks.wandb import WandbSink\n"
    "node_metrics.EVERY = 0.2\nrun, known = RunPaths(Path(sys.argv[1])), json.loads(sys.argv[2])\n"
    "sink = WandbSink(run, load(run.config), endpoints=(lambda: known) if known else None)\n"
    "while not sink.pump():\n    time.sleep(0.05)\nsink.close()\n"
)


def pump(run: RunPaths, endpoints: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A sink in a process of its own, as in production."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.Popen(
        [sys.executable, "-c", PUMP, str(run.root), json.dumps(endpoints or {})], env=known | {"WANDB_MODE": "offline"},
        start_new_session=True,
    )  # fmt: skip


def test_the_story_of_a_run_is_in_one_offline_run(made: MadeRun) -> None:
    run = made.run
    assert pump(run).wait(timeout=100) == 0
    assert "Traceback" not in (run.wandb / "sink.log").read_text()
    found = read_offline(run.wandb)

    (incident,) = table(found, "incidents")
    assert (incident["cause"], incident["rank"], incident["node"], incident["decision"]) == (
        "rank_exit",
        1,
        "10.0.0.2",
        "restart",
    )
    assert incident["page"] == f"http://127.0.0.1:8260/#/run/{run.run_id}/incidents", (
        "a link without the token"
    )
    assert incident["artifact"] == f"evidence-{run.run_id}-1" and incident["evidence"].endswith("00001.log")
    assert incident["detection_seconds"] == pytest.approx(2.0, abs=0.2) and incident["opened"].endswith("UTC")
    attempts = table(found, "attempts")
    assert [(a["attempt"], a["resumed_step"], a["last_step"], a["lost_from"]) for a in attempts] == [
        (1, 0, 15, 11),
        (2, 10, 40, None),
    ]
    (rewind,) = table(found, "rewinds")
    assert (rewind["attempt"], rewind["from_step"], rewind["to_step"]) == (2, 15, 10)
    assert [row["train/step"] for row in found["history"] if row.get("train/rewind_to") == 10] == [10]
    parts = {row["part"]: row["seconds"] for row in table(found, "ledger")}
    assert (
        parts["lost_work"] == pytest.approx(made.truth["lost_work"], abs=0.2)
        and found["summary"]["ledger/productive"] > 30
    )
    plan = {row["name"]: row for row in table(found, "plan")}
    assert plan["step_seconds"]["forecast"] == 1.1 and plan["step_seconds"]["measured"] == pytest.approx(1.0)
    assert plan["step_seconds"]["inside"] is True
    assert found["summary"]["plan/step_seconds"] == 1.1 and found["summary"][
        "measured/step_seconds"
    ] == pytest.approx(1.0)
    assert found["summary"]["incidents_total"] == 1 and 0 < found["summary"]["ettr"] < 1

    row = next(row for row in found["history"] if row.get("train/step") == 7 and "train/loss" in row)
    load = [16 + (i * 7 + 1 + 7) % 5 for i in range(4)]  # as `MadeRun` writes layer 1 of step 7
    assert value(row, "experts/layer01/load") == {
        "_type": "histogram",
        "values": load,
        "bins": [0, 1, 2, 3, 4],
    }
    heat = [row for row in found["history"] if value(row, "experts/heat")][-1]
    layers, whole = value(heat, "experts/heat_by_layer"), value(heat, "experts/heat")
    names = [whole["path"], *layers["filenames"]]
    assert whole["caption"].startswith("most loaded expert over the mean") and layers["captions"][
        1
    ].startswith("layer 1:")
    assert len(names) == 3 and (whole["width"], whole["height"]) == (40 * tables._PIXELS, 2 * tables._PIXELS)
    assert all(found["media"][name].read_bytes()[:4] == b"\x89PNG" for name in names)
    files = [path for path in run.wandb.rglob("*") if path.is_file()]
    assert any(b"[redacted]" in path.read_bytes() for path in files)
    for secret in (KEY.encode(), TOKEN.encode()):
        assert not [path for path in files if secret in path.read_bytes()]


def test_checkpoints_are_joined_to_what_began_from_them(made: MadeRun) -> None:
    run = made.run
    assert pump(run).wait(timeout=100) == 0
    found = read_offline(run.wandb)["artifacts"]
    checkpoints = [one for one in found if one["kind"] == "checkpoint"]
    assert [(one["facts"]["step"], one["used"], sorted(one["aliases"])) for one in checkpoints] == [
        (10, False, ["latest", "step-10"]), (10, True, ["latest"]), (40, False, ["latest", "step-40"]),
    ]  # fmt: skip
    first, again, last = checkpoints
    assert first["name"] == again["name"] == last["name"] == f"checkpoints-{run.run_id}"
    assert first["digest"] == again["digest"] != last["digest"], (
        "what was loaded is the version that was saved"
    )
    assert json.loads(first["files"]["checkpoint.json"].read_text()) == {"path": f"{run.checkpoints}/10"}
    (evidence,) = [one for one in found if one["kind"] == "incident"]
    assert (
        set(evidence["files"]) == {"00001.stack.txt", "00001.ring.json"}
        and evidence["facts"]["incident"] == 1
    )
    assert evidence["files"]["00001.stack.txt"].read_text() == "process 4711\nHF_TOKEN=[redacted]\n"
    for one in found:
        assert all(run.wandb in path.parents for path in one["files"].values()), (
            "all that a later sync needs is in the run's folder"
        )


@contextmanager
def ray_node(text: str = RAY) -> Iterator[tuple[str, list[str]]]:
    """A node that serves Ray's metrics; its address, and who asked."""
    asked: list[str] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/metrics", asked
    finally:
        server.shutdown()


def test_all_nodes_of_a_run_are_in_it_and_a_killed_sink_loses_none(tmp_path: Path) -> None:
    run = MadeRun(a_home(tmp_path), steps=40, now=BEGIN).submit().wait(2).start(1, 3).train(5)
    run.run.config.write_text(dump(compose(["experiment=smoke"])))
    with ray_node() as (url, _), ray_node(RAY.replace("87.5", "12.5")) as (other, _):
        sink = pump(run.run, {"10.0.0.1": url, "10.0.0.2": other, "10.0.0.9": "http://127.0.0.1:1/metrics"})
        kept = run.run.wandb / "nodes.jsonl"
        deadline = time.monotonic() + 60
        while not kept.exists() or kept.read_bytes().count(b"\n") < 3:
            assert time.monotonic() < deadline and sink.poll() is None
            time.sleep(0.05)
        os.killpg(sink.pid, signal.SIGKILL)
        sink.wait()
    with kept.open("ab") as file:
        file.write(b'{"time": 1, "nod\n')  # torn
    count = len(node_metrics.read_from(kept, 0)[0])
    run.train(5).finish()
    assert pump(run.run).wait(timeout=100) == 0
    found = read_offline(run.run.wandb)
    told = [row for row in found["history"] if "node/seconds" in row]
    assert count <= len(told) <= 2 * count, (
        "each at least once; those of the killed one's last poll may be twice"
    )
    trained = [row["train/step"] for row in found["history"] if "train/loss" in row]
    assert set(trained) == set(range(1, 11)), "what the killed one's service hadn't written is logged again"
    row = told[-1]
    assert row["node/10-0-0-1/cpu_percent"] == 87.5 and row["node/10-0-0-2/cpu_percent"] == 12.5
    assert (row["nodes/cpu_percent/least"], row["nodes/cpu_percent/mean"], row["nodes/cpu_percent/most"]) == (
        12.5,
        50.0,
        87.5,
    )
    assert row["node/10-0-0-1/memory_percent"] == 25.0 and not any("10-0-0-9" in key for key in row)
    assert found["axes"]["node/*"] and found["axes"]["nodes/*"]
    assert found["ids"] == {run.run_id}


def test_tables_that_can_not_be_made_hold_up_nothing(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    made.run.wandb.mkdir()
    found: list[dict[str, Any]] = []

    class Logged:
        summary: ClassVar[dict[str, Any]] = {}
        config = SimpleNamespace(update=lambda *_, **__: None)

        def log(self, row: dict[str, Any]) -> None:
            found.append(row)

        def __getattr__(self, _: str) -> Any:
            return lambda *_, **__: None

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("wandb.init", lambda **_: Logged())
    monkeypatch.setattr(tables.TableBuilder, "build", lambda _: 1 / 0)
    sink = WandbSink(made.run, compose(["experiment=smoke"]))
    for _ in range(20):
        if sink.pump():
            break
    assert "no tables this time" in (made.run.wandb / "sink.log").read_text()
    assert {row["train/step"] for row in found if "train/loss" in row} == set(
        range(1, 41)
    ) and Logged.summary["state"] == "succeeded"


# ---- plain data ----


def test_metrics_of_rays_nodes() -> None:
    assert node_metrics.parse(RAY) == {
        "cpu_percent": 87.5, "memory_percent": 25.0, "gpu_percent": 80.0, "gpu_memory_gib": 4.0, "gpu_celsius": 71.0,
        "sent_mb_per_second": 2.5, "received_mb_per_second": 7.5, "written_mb_per_second": 0.5,
    }  # fmt: skip
    assert node_metrics.parse("ray_node_disk_io_read_speed 2e6\n") == {"read_mb_per_second": 2.0}
    assert node_metrics.parse("") == {} and node_metrics.parse("ray_node_cpu_utilization what\n") == {}
    assert node_metrics.fetch("http://127.0.0.1:1/metrics") == {} and node_metrics.fetch("nonsense") == {}


def test_a_sample_asks_the_nodes_of_the_run_alone_and_is_kept(tmp_path: Path) -> None:
    known = {f"10.0.0.{i}": f"u{i}" for i in range(9)}
    sampler = node_metrics.NodeSampler(
        tmp_path / "n.jsonl", lambda: ["10.0.0.3", "10.0.0.4", "10.0.1.1"], lambda: known
    )
    asked: list[str] = []
    sampler.fetch = lambda url: asked.append(url) or ({"cpu_percent": 5.0} if url == "u3" else {})  # type: ignore[func-returns-value]
    assert sampler.sample(7.0) == 2 and sorted(asked) == ["u3", "u4"]
    assert node_metrics.read_from(tmp_path / "n.jsonl", 0)[0] == [(7.0, {"10.0.0.3": {"cpu_percent": 5.0}})]
    with (tmp_path / "n.jsonl").open("ab") as file:
        file.write(b'{"time": 8.0, "nodes": {"a": {"cpu_per')
    size = (tmp_path / "n.jsonl").read_bytes().rfind(b"\n") + 1
    assert node_metrics.read_from(tmp_path / "n.jsonl", 0)[1] == size, (
        "what is being written stays for the next time"
    )
    assert node_metrics.read_from(tmp_path / "none.jsonl", 5) == ([], 5)


def test_of_many_nodes_only_what_they_have_together_is_told() -> None:
    sample = {f"10.0.{i // 250}.{i % 250}": {"cpu_percent": float(i)} for i in range(1536)}
    row = node_metrics.row(60.0, sample)
    spread = {"mean": 767.5, "least": 0.0, "most": 1535.0}
    assert row == {"node/seconds": 60.0} | {
        f"nodes/cpu_percent/{name}": value for name, value in spread.items()
    }


def test_histograms_are_bounded_in_bins_and_in_number() -> None:
    line = step_line(1, 1, 1.0)
    wide = type(line)(**{**vars(line), "expert_load": [[1] * 1100]})
    ((name, (bins, edges)),) = rows.histograms(wide, 10).items()
    assert name == "experts/layer00/load" and len(bins) <= rows.MAX_BINS and sum(bins) == 1100
    assert len(edges) == len(bins) + 1 and edges[-1] == 1100.0 and edges[1] == 3.0
    kept = sum(
        bool(rows.histograms(type(line)(**{**vars(line), "step": step}), 50_000)) for step in range(1, 50_001)
    )
    assert kept == rows.HISTOGRAMS


def test_a_picture_has_its_colours_where_they_belong() -> None:
    made = tables.heat_map_image([[0.0, 1.0], [3.0, None]])
    size = tables._PIXELS
    assert made.shape == (2 * size, 2 * size, 3) and made.dtype == np.uint8
    assert made[0, 0].tolist() == [33, 102, 172] and made[0, -1].tolist() == [255, 255, 255]
    assert made[-1, 0].tolist() == [178, 24, 43] and made[-1, -1].tolist() == [200, 200, 200]


def test_a_checkpoint_of_another_run_is_named_by_its_own(tmp_path: Path) -> None:
    path = "/data/runs/other-1126-aaaa/checkpoints/step-20"
    used = lineage.resumed(ResumedLine(1.0, 1, 20, path, ""))
    saved = lineage.saved(
        RunPaths(tmp_path / "runs" / "other-1126-aaaa"), SavedLine(1.0, 1, 20, path, 10, 0.5)
    )
    assert used is not None and saved is not None
    assert used.name == saved.name == "checkpoints-other-1126-aaaa" and used.files == saved.files
    assert used.used and not saved.used and saved.aliases == ("step-20",)
    shared = [
        lineage.resumed(ResumedLine(1.0, 1, 1, f"s3://bucket/{name}/step-{n}", ""))
        for name, n in (("a", 1), ("a", 2), ("b", 1))
    ]
    names = [one.name for one in shared if one is not None]
    assert names[0] == names[1] != names[2] and names[0].startswith("checkpoints-")
    assert lineage.resumed(ResumedLine(1.0, 1, 0, None, "")) is None
    assert lineage.saved(RunPaths(tmp_path), SavedLine(1.0, 1, 20, path, 10, 0.5, tier="memory")) is None


def test_a_measurement_and_its_profile_lead_to_the_plans_that_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunPaths(tmp_path / "runs" / "sweep 1")
    assert lineage.measurement(run, "h100") == []
    run.measurement.mkdir(parents=True)
    (run.measurement / "rows.jsonl").write_text("{}\n")
    (run.measurement / "fabric.yaml").write_text("name: h100\n")
    (run.measurement / "huge.bin").write_bytes(bytes(lineage._FILE + 1))
    sweep, fitted = lineage.measurement(run, "h100")
    assert sweep.name == "measurement-sweep-1" and set(sweep.files) == {"rows.jsonl", "fabric.yaml"}
    assert sweep.facts["left_out"] == ["huge.bin"]
    monkeypatch.setattr("configs.profile.FOLDER", tmp_path / "profiles")
    (tmp_path / "profiles" / "fabric").mkdir(parents=True)
    (tmp_path / "profiles" / "fabric" / "h100.yaml").write_text("name: h100\n")
    (used,) = lineage.profiles("h100")
    assert (used.name, used.files, used.used) == (fitted.name, fitted.files, True) and not fitted.used


def test_evidence_is_bounded(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    folder = run.attempt(1).evidence
    assert lineage.evidence(run, EvidenceKept(1, 1, str(folder))) is None
    folder.mkdir(parents=True)
    for rank in range(lineage._FILES + 5):
        (folder / f"{rank:05d}.stack.txt").write_text("x")
    (folder / "link").symlink_to("/etc/passwd")
    made = lineage.evidence(run, EvidenceKept(1, 1, str(folder)))
    assert (
        made is not None
        and len(made.files) == lineage._FILES
        and len(made.facts["left_out"]) == 5
        and "link" not in made.files
    )
