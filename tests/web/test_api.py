"""The endpoints over a real socket, on runs that went through what runs go through."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from configs.metrics import MeasuredLine, MetricWriter
from faulttol.detect.snapshot import GroupStatus, RankObservation
from faulttol.recorder import PhaseMark, RankPhase, Record
from faulttol.timeline.step_file import STORED, StepFile
from orchestrator.record import rank_status
from orchestrator.record.cluster_log import Cordoned, NodeJoined, NodeLeft
from orchestrator.record.log import EventLog
from tests.web.made import MadeRun, a_home, queue_file
from tests.web.serving import TOKEN, Client, serving

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

RECOVERED = "demo-1126-120000-aaaa"


def recovered(home: Any) -> MadeRun:
    """Killed after step 26 and recovered from step 20, at step 50 now."""
    run = (
        MadeRun(home, RECOVERED, now=time.time() - 200)
        .submit()
        .wait(2)
        .start(1, 3)
        .train(10)
        .save()
        .train(6)
        .evaluate()
    )
    run.train(4).save(0.3, 0.6).train(6).fault(detect=2, back_off=1).start(
        1, 3, step=20, part="restart"
    ).train(30)
    return run


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = a_home(tmp_path_factory.mktemp("home"))
    run = recovered(home)
    earlier = run.run.attempt(1).evidence_of("20261126-120000")
    earlier.mkdir(parents=True)
    (earlier / "00001.stack.txt").write_text("asked for by a person, long before")
    os.utime(earlier / "00001.stack.txt", (1.0, 1.0))
    kept = run.run.attempt(1).evidence_of("incident-001")
    kept.mkdir()
    (kept / "00001.stack.txt").write_text("process 1001, state T\n\x1b[31mThread main\x1b[0m")
    (kept / "00001.ring.json").write_text(
        json.dumps([{"sequence": 1, "time": 1.0, "mark": "BEGIN", "phase": "FORWARD", "step": 3}])
    )
    MadeRun(home, "big-1126-120001-bbbb", steps=50, now=time.time() - 9, owner="bob").submit()
    ended = MadeRun(home, "old-1126-110000-cccc", now=time.time() - 4000).submit().start().train(20).save()
    ended.finish()
    queue_file(
        home,
        time.time(),
        waiting=[{"run": "big-1126-120001-bbbb", "position": 1, "reason": "needs 2 CPU slots, 1 is free"}],
    )
    log = EventLog(home.cluster_log, 1, run._now())
    log.append(
        [NodeJoined("10.0.0.2", "two", ("n2",), {"CPU": 2}), Cordoned("10.0.0.2", "disk", "ann")], run._now()
    )
    log.append([NodeJoined("10.0.0.9", "nine", ("n9",), {"CPU": 2}), NodeLeft("10.0.0.9")], run._now())
    with serving(home) as client:
        yield client


def test_runs(client: Client) -> None:
    tree = client.get("/api/runs")
    rows = {row["run_id"]: row for row in tree["runs"]}
    assert list(rows) == ["big-1126-120001-bbbb", RECOVERED, "old-1126-110000-cccc"]
    row = rows[RECOVERED]
    assert (row["state"], row["step"], row["steps"], row["attempt"], row["incidents"]) == (
        "running",
        50,
        100,
        2,
        1,
    )
    assert row["open_incidents"] == 0
    assert row["kind"] == "train"
    assert row["loss"] == pytest.approx(2.0 + 3.0 / 51**0.5)
    assert rows["big-1126-120001-bbbb"]["position"] == 1
    assert "1 is free" in rows["big-1126-120001-bbbb"]["waiting_for"]
    assert client.get("/api/runs", ended=0)["left_out"] == 1
    assert "'-1' is not a whole number between 0 and 5000" in client.get("/api/runs", 400, ended=-1)["error"]


def test_queue_and_controller(client: Client) -> None:
    tree = client.get("/api/queue")
    assert tree["controller"]["alive"] and tree["controller"]["epoch"] == 3
    assert tree["waiting"][0] == {
        "run": "big-1126-120001-bbbb", "position": 1, "reason": "needs 2 CPU slots, 1 is free", "priority": 0,
        "owner": "bob", "model": "demo", "slots": 2, "queued_at": pytest.approx(time.time(), abs=90),
    }  # fmt: skip


def test_nodes_of_ray_and_of_the_log(client: Client) -> None:
    rows = {row["ip"]: row for row in client.get("/api/nodes")["nodes"]}
    assert rows["10.0.0.2"]["cordon"]["reason"] == "disk" and rows["10.0.0.2"]["here"]
    assert rows["10.0.0.9"]["here"] is False and rows["10.0.0.9"]["left"] == 1
    assert rows["10.0.0.1"]["cordon"] is None


def test_one_run(client: Client) -> None:
    tree = client.get(f"/api/run/{RECOVERED}")
    assert tree["indexed"] == 1.0
    first, second = tree["attempts"]
    assert (first["last_step"], first["lost_from"], first["end"], first["reason"]) == (
        26,
        21,
        "recovering",
        "rank_died",
    )
    assert second["resumed_step"] == 20 and second["ended"] is None and second["again"]
    assert second["nodes"][1] == {"ip": "10.0.0.2", "hostname": "two", "ranks": [1, 1]}
    assert second["facts"] == {"torch": "2.13"}
    assert tree["plan"]["step_time"]["low"] == 0.9
    assert tree["source"]["commit"] == "abc"
    assert any(link["title"] == "timeline" for link in tree["links"])
    assert client.get("/api/run/demo")["run"]["run_id"] == RECOVERED, "a beginning will do"
    assert "names no run of this home" in client.get("/api/run/nothing", 404)["error"]
    assert "is nothing of a run" in client.get(f"/api/run/{RECOVERED}/nothing", 404)["error"]


def test_series_keep_what_was_lost_apart(client: Client) -> None:
    tree = client.get(f"/api/run/{RECOVERED}/series", names="loss,phase.forward,tokens")
    told = [(s["attempt"], s["lost"], s["step"][0], s["step"][-1]) for s in tree["segments"]]
    assert told == [(1, False, 1, 20), (1, True, 21, 26), (2, False, 21, 50)]
    assert tree["segments"][2]["series"]["loss"]["mean"][-1] == pytest.approx(2.0 + 3.0 / 51**0.5, rel=1e-5)
    assert "min" not in tree["segments"][0]["series"]["loss"], "each point is one line"
    assert tree["segments"][0]["series"]["tokens"]["mean"][:2] == [64, 128]
    assert tree["validation"]["step"] == [16] and tree["validation"]["loss"] == [2.5]
    few = client.get(f"/api/run/{RECOVERED}/series", names="loss", points=10, from_=21, to=50)
    assert sum(len(s["step"]) for s in few["segments"]) <= 12
    last = few["segments"][-1]
    assert sum(last["rows"]) == 30 and last["step"][-1] == 50
    assert (
        last["series"]["loss"]["min"][0]
        < last["series"]["loss"]["mean"][0]
        < last["series"]["loss"]["max"][0]
    )
    by_time = client.get(f"/api/run/{RECOVERED}/series", names="lr", axis="time", from_=time.time() - 10)
    assert [s["attempt"] for s in by_time["segments"]] in ([], [2])
    assert "did you mean 'loss'" in client.get(f"/api/run/{RECOVERED}/series", 400, names="los")["error"]
    assert "axis='space'" in client.get(f"/api/run/{RECOVERED}/series", 400, axis="space")["error"]
    assert "points='x'" in client.get(f"/api/run/{RECOVERED}/series", 400, points="x")["error"]
    assert "from='nan'" in client.get(f"/api/run/{RECOVERED}/series", 400, from_="nan")["error"]


def test_expert_loads(client: Client) -> None:
    tree = client.get(f"/api/run/{RECOVERED}/experts")
    assert (tree["layers"], tree["experts"], tree["value"]) == (2, 4, "max_over_mean")
    assert len(tree["values"]) == 2 and len(tree["values"][0]) == len(tree["step"]) == 50
    load = [16 + (i * 7 + 0 + 50) % 5 for i in range(4)]
    assert tree["values"][0][-1] == pytest.approx(max(load) * 4 / sum(load), rel=1e-3)
    one = client.get(f"/api/run/{RECOVERED}/experts", layer=1, columns=7)
    assert one["sampled"] and len(one["step"]) == 7 and len(one["values"]) == 4
    assert one["step"][0] == 1 and one["step"][-1] == 50
    assert (
        "layer=2 is none of this run's 2"
        in client.get(f"/api/run/{RECOVERED}/experts", 400, layer=2)["error"]
    )


def test_checkpoints(client: Client) -> None:
    tree = client.get(f"/api/run/{RECOVERED}/checkpoints")
    assert [(s["step"], s["lost"]) for s in tree["saves"]] == [(20, False), (10, False)]
    assert tree["every"] == 10 and tree["due"] == 30
    assert tree["saves"][0]["held"] == 0.3 and tree["saves"][0]["error"] is None


def test_incidents_with_dossier_and_cost(client: Client) -> None:
    found = client.get(f"/api/run/{RECOVERED}/incidents")["incidents"]
    assert len(found) == 1
    one = found[0]
    assert (one["cause"], one["rank"], one["node"], one["step"]) == ("rank_exit", 1, "10.0.0.2", 26)
    assert one["decision"]["action"] == "restart" and one["verdicts"][0]["kind"] == "rank_exit"
    assert one["cost"]["detection"] == pytest.approx(2.0, abs=0.1)
    assert one["cost"]["lost"] == pytest.approx(6.4, abs=0.1)
    assert {f["what"] for f in one["dossier"]} == {"stack", "recorder"} and one["dossier"][0]["rank"] == 1
    assert [f["name"] for f in one["dossier"]][-1] == "incident-001/00001.stack.txt"
    assert one["resolution"] == "trained on"


def test_the_time_axis_covers_the_run(client: Client) -> None:
    tree = client.get(f"/api/run/{RECOVERED}/attempts")
    spans = tree["spans"]
    assert all(a["to"] == pytest.approx(b["from"], abs=1e-6) for a, b in zip(spans, spans[1:], strict=False))
    assert tree["end"] == pytest.approx(time.time(), abs=60)
    assert {s["part"] for s in spans} >= {
        "waiting",
        "startup",
        "productive",
        "lost_work",
        "detection",
        "restart",
    }
    assert tree["rewinds"] == [
        {"time": pytest.approx(time.time(), abs=300), "from_step": 26, "to_step": 20, "attempt": 2}
    ]
    kinds = [mark["kind"] for mark in tree["marks"]]
    assert kinds.count("save") == 2 and "incident" in kinds and "decision" in kinds


def test_the_ledger_adds_up(client: Client) -> None:
    tree = client.get(f"/api/run/{RECOVERED}/ledger")
    parts = {p["part"]: p["seconds"] for p in tree["parts"]}
    assert sum(parts.values()) == pytest.approx(tree["wall_seconds"], rel=1e-6)
    assert sum(p["share"] for p in tree["parts"]) == pytest.approx(1.0)
    assert parts["lost_work"] == pytest.approx(6.4, abs=0.2) and parts["evaluation"] == pytest.approx(
        2.0, abs=0.1
    )
    assert tree["running"] and 0 < tree["ettr"] <= tree["ettr_held"] <= 1
    assert all(p["means"] for p in tree["parts"])


def test_forecast_beside_measured(client: Client) -> None:
    tree = client.get(f"/api/run/{RECOVERED}/forecast")
    figures = {f["name"]: f for f in tree["figures"]}
    assert figures["step_seconds"]["measured"] == pytest.approx(1.0) and figures["step_seconds"]["inside"]
    assert figures["step_seconds"]["ratio"] == pytest.approx(1 / 1.1)
    assert figures["memory_bytes"]["forecast"] == 4000
    assert figures["mfu"]["forecast"] is None and figures["mfu"]["measured"] is None
    finish = tree["finish"]
    assert finish["low"] <= finish["time"] <= finish["high"]
    assert finish["low"] >= time.time() + 45
    loss = tree["loss"]
    assert loss["low"] <= loss["value"] <= loss["high"], loss["note"]
    assert loss["band"]["step"][-1] == 100 and 1.5 < loss["value"] < 2.6
    old = client.get("/api/run/old/forecast")
    assert old["loss"]["value"] is None and "40" in old["loss"]["note"]
    assert old["finish"]["time"] is None


def test_logs(client: Client) -> None:
    path = client.shared.live.home.run(RECOVERED).attempt(2).log(1)
    path.write_text(
        "".join(f"line {i} of many\n" for i in range(5000))
        + "\x1b[31mThe END\x1b[0m with <b>tags</b>\nwithout end"
    )
    url = f"/api/run/{RECOVERED}/log"
    tree = client.get(url, rank=1, lines=3)
    assert [line["text"] for line in tree["lines"]] == [
        "line 4999 of many",
        "The END with <b>tags</b>",
        "without end",
    ]
    before = client.get(url, rank=1, lines=2, before=tree["before"])
    assert [line["text"] for line in before["lines"]] == ["line 4997 of many", "line 4998 of many"]
    found = client.get(url, rank=1, search="LINE 4", lines=1000)
    assert len(found["lines"]) == 1000 and found["matches"] == 1000
    found = client.get(url, rank=1, search="line 12 ")
    assert [line["text"] for line in found["lines"]] == ["line 12 of many"] and found["complete"]
    assert path.read_bytes()[found["lines"][0]["at"] :].startswith(b"line 12 ")
    everywhere = client.get(url, rank="all", search="rank 0 begins")
    assert [line["rank"] for line in everywhere["lines"]] == [0] and everywhere["ranks"] == 2
    assert "rank=7 is none of attempt 2's 2 ranks" in client.get(url, 400, rank=7)["error"]
    assert "attempt=9" in client.get(url, 400, attempt=9)["error"]
    assert "search=TEXT" in client.get(url, 400, rank="all")["error"]
    path.write_bytes(b"x" * 700_000 + b"\nlast")
    assert client.get(url, rank=1)["lines"][-1]["text"] == "last"
    path.write_bytes(b"")
    assert client.get(url, rank=1)["lines"] == []


def test_stacks_and_records(client: Client) -> None:
    tree = client.get(f"/api/run/{RECOVERED}/stack", attempt=1, rank=1)
    assert tree["stack"] == "process 1001, state T\nThread main" and tree["recorder"][0]["phase"] == "FORWARD"
    assert "no stack of this rank" in client.get(f"/api/run/{RECOVERED}/stack", rank=0)["note"]


def test_layout_says_who_is_waited_for(client: Client) -> None:
    run = client.shared.live.home.run(RECOVERED)
    now = time.time()
    record = Record(9, now - 7, PhaseMark.BEGIN, RankPhase.BACKWARD, 50)
    groups = (GroupStatus("dp (3)", range(0, 2), 40, 39),)
    behind = (GroupStatus("dp (3)", range(0, 2), 39, 39),)
    folder = run.attempt(2).seen
    rank_status.write_statuses(
        folder,
        "n/1",
        [RankObservation(0, 1000, newest=record, groups=groups, waits="all_reduce", state="S")],
        now,
    )
    rank_status.write_statuses(
        folder,
        "n2",
        [RankObservation(1, 1001, newest=record, groups=behind, held="stopped (state T)", state="T")],
        now,
    )
    tree = client.get(f"/api/run/{RECOVERED}/layout")
    assert tree["live"] and tree["world"] == 2
    assert tree["waits"] == [
        {"from": [0], "to": [1], "group": tree["groups"][0]["name"], "call": "all_reduce"}
    ]
    assert tree["groups"][0]["entered"] == [40, 39] and tree["groups"][0]["missing"] == [1]
    assert tree["culprits"] == [1]
    assert tree["said"] == "rank 0 waits for rank 1, which is stopped (state T)"
    assert tree["ranks"]["phase"] == ["backward", "backward"] and tree["ranks"]["age"][0] == pytest.approx(
        7, abs=0.2
    )
    assert tree["coordinates"]["dp"] == [0, 1] and tree["node"] == [0, 1]
    (folder / "n2.seen.json").write_text("{torn")
    broken = client.until(f"/api/run/{RECOVERED}/layout", lambda tree: tree["ranks"]["state"][1] != "T")
    assert broken["ranks"]["state"] == ["S", ""], "a damaged file costs its own ranks alone"
    old = client.get(f"/api/run/{RECOVERED}/layout", attempt=1)
    assert not old["live"] and old["culprits"] == [1] and old["seen"] is None
    assert client.get(f"/api/run/{RECOVERED}/group", axis="dp", rank=1)["ranks"] == [0, 1]
    assert "axis='x'" in client.get(f"/api/run/{RECOVERED}/group", 400, axis="x")["error"]


def test_heat_of_recorded_steps(client: Client) -> None:
    run = client.shared.live.home.run(RECOVERED)
    made = run.attempt(2).root / "steps"
    made.mkdir(exist_ok=True)
    for node, ranks in (("10.0.0.1", [0]), ("10.0.0.2", [1])):
        file = StepFile(made / f"{node}.steps", node, ranks)
        seconds = np.full((len(STORED), 1, 30), 0.1 + ranks[0], dtype=np.float64)
        file.append(20, np.arange(30, dtype=np.int64) * 10**9, seconds)
        file.close()
    url = f"/api/run/{RECOVERED}/heat"
    tree = client.until(url, lambda tree: len(tree["rows"]) == 2)
    assert tree["recorded"] and tree["unit"] == "s" and tree["first"] == 20 and tree["last"] == 49
    assert [row["ranks"] for row in tree["rows"]] == [[0, 0], [1, 1]]
    assert tree["values"][1][0] == pytest.approx(1.1, rel=0.01) and tree["columns"][0][0] == 20
    nodes = client.get(url, group="node", mode="deviation", field="wait")
    assert [row["label"] for row in nodes["rows"]] == ["10.0.0.1", "10.0.0.2"] and nodes["unit"] == ""
    one = client.get(url, ranks="1-1", mode="deviation")
    assert [row["ranks"] for row in one["rows"]] == [[1, 1]]
    assert one["values"][0][0] == pytest.approx(1.1 / 0.6 - 1, rel=0.02), (
        "its peers are still those of its stage"
    )
    for wrong in ("1-9", "x", "1-0", "-1", "0-1-2"):
        assert f"ranks={wrong}" in client.get(url, 400, ranks=wrong)["error"].replace("'", "")


def test_heat_without_records(client: Client) -> None:
    tree = client.get(f"/api/run/{RECOVERED}/heat", attempt=1)
    assert tree["recorded"] is False and tree["values"] == []
    assert "field='x'" in client.get(f"/api/run/{RECOVERED}/heat", 400, field="x")["error"]


def test_a_measurement(client: Client) -> None:
    home = client.shared.live.home
    run = MadeRun(home, "net-1126-130000-dddd", steps=0).submit().start()
    writer = MetricWriter(run.run.attempt(1).metrics)
    for i in range(1, 4):
        case = {"op": "all_reduce", "size": 1 << i, "group": "world", "dtype": "float32"}
        writer.write(
            MeasuredLine(
                run.now + i, 1, i, 3, case, {"time_us": 5.0, "alg_bw": 1.0, "bus_bw": 2.0, "wrong": 0}
            )
        )
    client.fresh()
    tree = client.until("/api/run/net-1126-130000-dddd", lambda t: t["run"]["step"] == 3)
    assert tree["run"]["kind"] == "measure" and "all_reduce" in tree["run"]["measured"]
    assert client.get("/api/run/net/experts")["values"] == []


def test_numbers_that_are_none_are_null(client: Client) -> None:
    run = MadeRun(client.shared.live.home, "nan-1126-140000-eeee").submit().start().train(30)
    run.train(1, loss=float("nan"), grad_norm=float("inf"))
    client.fresh()
    row = next(
        r
        for r in client.until("/api/runs", lambda t: any(r["step"] == 31 for r in t["runs"]))["runs"]
        if "nan" in r["run_id"]
    )
    assert row["loss"] is None and row["finite"] is False
    tree = client.get("/api/run/nan/series", names="loss,grad_norm", points=10)
    assert tree["segments"][0]["series"]["loss"]["mean"][-1] is not None, "the mean of what is finite"
    assert {(n["step"], n["name"]) for n in tree["nonfinite"]} == {(31, "loss"), (31, "grad_norm")}
    one = client.get("/api/run/nan/series", names="loss", from_=31)
    assert one["segments"][0]["series"]["loss"]["mean"] == [None]


def test_answers_are_compressed_where_that_is_taken(client: Client) -> None:
    status, headers, body = client.raw(f"/api/run/{RECOVERED}/series", Accept_Encoding="gzip")
    assert status == 200 and headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(body))["segments"]
    assert "content-encoding" not in client.raw(f"/api/run/{RECOVERED}/series")[1]


def listen(client: Client, path: str = "/api/events") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
    return connection.getresponse()


def event(response: http.client.HTTPResponse) -> tuple[str, dict[str, Any]]:
    name = response.readline().decode().removeprefix("event: ").strip()
    data = json.loads(response.readline().decode().removeprefix("data: "))
    assert response.readline() == b"\n"
    return name, data


def test_events_tell_what_changed_and_beat(client: Client) -> None:
    run = MadeRun(client.shared.live.home, "sse-1126-150000-ffff").submit().start().train(1)
    client.fresh()
    response = listen(client, "/api/events?run=sse-1126-150000-ffff")
    assert response.headers["Content-Type"] == "text/event-stream"
    name, data = event(response)
    assert name == "changed" and list(data["runs"]) == ["sse-1126-150000-ffff"]
    before = data["runs"]["sse-1126-150000-ffff"]
    run.train(1)
    client.shared.live.refresh_now()
    while "sse-1126-150000-ffff" not in data["runs"] or data["runs"]["sse-1126-150000-ffff"] == before:
        name, data = event(response)
        assert name == "beat" or set(data["runs"]) <= {"sse-1126-150000-ffff"}
        data.setdefault("runs", {})
    while name != "beat":
        name, data = event(response)
    assert data["beat_age"] > 0
    response.close()


def test_a_page_that_is_closed_is_no_error(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    before = len(client.shared.listeners)
    run = MadeRun(client.shared.live.home, "closed-1126-150000-ffff").submit().start().train(1)
    response = listen(client)
    event(response)
    response.close()
    deadline = time.monotonic() + 30
    while len(client.shared.listeners) > before:  # it is noticed at the next write
        assert time.monotonic() < deadline
        run.train(1)
        client.shared.live.refresh_now()
        time.sleep(0.05)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_listeners_are_bounded(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.web.server._LISTENERS", len(client.shared.listeners) + 1)
    first = listen(client)
    event(first)
    assert "close some" in json.loads(listen(client).read())["error"]
    first.close()
