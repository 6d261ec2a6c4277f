"""Homes with the runs that the page is looked at with, made by the project's own writers."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.paths import HomePaths
from faulttol.detect.snapshot import GroupStatus, RankObservation
from faulttol.recorder import PhaseMark, RankPhase, Record
from faulttol.timeline.step_file import STORED, StepFile, folder
from orchestrator.record import rank_status
from orchestrator.record.cluster_log import Cordoned, NodeJoined, NodeLeft
from orchestrator.record.events import IncidentOpened, VerdictFound
from orchestrator.record.log import EventLog
from tests.web.made import MadeRun, a_home, queue_file

LIVE, RECOVERED, HUNG = "live-1126-120000-aaaa", "killed-1126-110000-bbbb", "hung-1126-100000-cccc"
ENDED, HOSTILE = "old-1126-080000-eeee", "odd-1126-070000-ffff"
SCRIPT = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
MODEL = "olmoe_1b_7b"
BIG_LAYOUT = {"pp": 4, "dp": 8, "cp": 1, "ep": 8, "etp": 1, "tp": 2}
CULPRIT = 37


@dataclass
class Home:
    """A home and the runs in it that continue."""

    paths: HomePaths
    live: MadeRun
    hung: MadeRun
    waiting: list[dict[str, object]]
    """The queue, as the controller publishes it."""


def steps(run: MadeRun, attempt: int, first: int, count: int, slow: int | None = None) -> None:
    """Step files of an attempt's ranks, eight to a node; `slow` computes longer."""
    into = folder(run.run.attempt(attempt).root)
    into.mkdir(parents=True, exist_ok=True)
    each = min(8, max(1, run.ranks // 2))
    for node in range(run.ranks // each):
        ranks = list(range(node * each, (node + 1) * each))
        noise = np.random.default_rng(node)
        compute = 0.6 + 0.01 * noise.standard_normal((each, count))
        if slow in ranks:
            compute[ranks.index(slow), count // 2 :] += 0.25
        data = 0.02 * (1 + noise.random((each, count)))
        save = np.where((np.arange(count) + first) % 10 == 0, 0.3, 0.0) * np.ones((each, 1))
        wait = np.maximum(0.0, 1.0 - compute - data)
        values = {"compute": compute, "wait": wait, "data": data, "save": save, "lag": 0 * compute}
        values["step"] = compute + wait + data + save
        file = StepFile(into / f"10.0.0.{node + 1}.steps", f"10.0.0.{node + 1}", ranks)
        starts = ((time.time() - count + np.arange(count)) * 1e9).astype(np.int64)
        file.append(first, starts, np.stack([values[name] for name in STORED]))
        file.close()


def look(run: MadeRun, groups: dict[int, tuple[GroupStatus, ...]], **of: dict[int, str]) -> None:
    """What the ranks were last seen doing: `held`, `waits` and `state` by rank."""
    now = time.time()
    record = Record(9, now - 41, PhaseMark.BEGIN, RankPhase.BACKWARD, run.step + 1)
    rows = [
        RankObservation(
            rank, 1000 + rank, newest=record, groups=groups.get(rank, ()), waits=of.get("waits", {}).get(rank, ""),
            held=of.get("held", {}).get(rank, ""), state=of.get("state", {}).get(rank, "S"),
        )
        for rank in range(run.ranks)
    ]  # fmt: skip
    rank_status.write_statuses(run.run.attempt(run.attempt).seen, "n1", rows, now)


def live(home: HomePaths) -> MadeRun:
    run = (
        MadeRun(home, LIVE, now=time.time() - 68, steps=400)
        .submit()
        .wait(2)
        .start(1, 3)
        .train(20)
        .save(0.2, 0.5)
    )
    run.train(10).evaluate(1.0).train(10).save(0.2, 0.5).train(20)
    steps(run, 1, 1, 60)
    look(run, {})
    run.run.attempt(1).log(0).write_text(
        "".join(f"step {i} loss {2 + 3 / (1 + i) ** 0.5:.4f}\n" for i in range(1, 1001))
    )
    return run


def recovered(home: HomePaths) -> MadeRun:
    run = (
        MadeRun(home, RECOVERED, now=time.time() - 116)
        .submit()
        .wait(5)
        .start(1, 3)
        .train(10)
        .save()
        .train(6)
        .evaluate()
    )
    run.train(4).save(0.3, 0.6).train(16, grad_norm=1.4).save_failed().fault(detect=2, back_off=1)
    run.start(1, 3, step=20, part="restart").train(60)
    kept = run.run.attempt(1).evidence
    kept.mkdir()
    (kept / "00001.stack.txt").write_text(
        "process 1001, state T\nThread main\n    backward (trainer/loop.py:210)\n"
    )
    record = {"time": run.now - 60, "mark": "BEGIN", "phase": "FORWARD", "step": 3}
    (kept / "00001.ring.json").write_text(json.dumps([record | {"sequence": i} for i in range(5)]))
    steps(run, 1, 1, 36)
    steps(run, 2, 21, 60)
    return run


def hung(home: HomePaths) -> MadeRun:
    """64 ranks, one of which is stopped: those of its groups wait for it, and others for them."""
    run = MadeRun(
        home,
        HUNG,
        now=time.time() - 140,
        ranks=64,
        layout=BIG_LAYOUT,
        experts=(8, 16),
        model=MODEL,
        steps=4000,
    )
    run.submit().start(2, 8).train(60).save(0.4, 2.0).train(30)
    steps(run, 1, 1, 90, slow=CULPRIT)
    stage = range(CULPRIT // 16 * 16, CULPRIT // 16 * 16 + 16)
    data = tuple(r for r in stage if r % 2 == CULPRIT % 2)
    pair = (CULPRIT - 1, CULPRIT)
    groups: dict[int, tuple[GroupStatus, ...]] = {}
    for rank in data:
        groups[rank] = (GroupStatus("dp", data, 40 if rank != CULPRIT else 39, 39),)
    groups[pair[0]] = (GroupStatus("tp", pair, 71, 70),)
    groups[CULPRIT] = (*groups[CULPRIT], GroupStatus("tp", pair, 70, 70))
    waits = {rank: "all_reduce" for rank in groups if rank != CULPRIT}
    run.run.attempt(1).log(CULPRIT).write_text(f"rank {CULPRIT} begins\n")
    look(run, groups, waits=waits, held={CULPRIT: "stopped (state T)"}, state={CULPRIT: "T"})
    detail = f"rank {CULPRIT} stands still in backward of step 91 (stopped, state T)"
    verdict = {
        "kind": "rank_hang",
        "detail": detail,
        "rank": CULPRIT,
        "node": "10.0.0.5",
        "time": run.now,
        "evidence": "",
    }
    log = str(run.run.attempt(1).log(CULPRIT))
    run.tell(
        VerdictFound(1, verdict),
        IncidentOpened(1, 1, "rank_hang", detail, CULPRIT, "10.0.0.5", 91, log, 30.0),
    )
    return run


def hostile(home: HomePaths) -> None:
    """A run whose owner, model, log and errors hold HTML."""
    run = (
        MadeRun(home, HOSTILE, now=time.time() - 60, owner=SCRIPT, model=SCRIPT, steps=90)
        .submit()
        .start(1, 2)
        .train(12)
    )
    run.save_failed(SCRIPT).fault(detail=SCRIPT).start(1, 2, step=0, part="restart").train(5)
    run.run.attempt(2).log(0).write_text(SCRIPT + "\n")


def a_full_home(path: Path, odd: bool = True) -> Home:
    """All of them, with the hostile one where it is wanted, three nodes, and a queue of three."""
    home = a_home(path)
    if odd:
        hostile(home)
    MadeRun(home, ENDED, now=time.time() - 4000).submit().start().train(50).save().finish()
    stuck, _, going = hung(home), recovered(home), live(home)
    waiting: list[dict[str, object]] = []
    for i in range(3):
        run = MadeRun(
            home, f"next-1126-13000{i}-q00{i}", now=time.time() - 30, owner="bob", model=MODEL
        ).submit()
        waiting.append(
            {"run": run.run_id, "position": i + 1, "reason": "needs 2 CPU slots on 1 node, 1 is free"}
        )
    queue(home, waiting)
    now = going._now()
    log = EventLog(home.cluster_log, 1, now)
    log.append([NodeJoined("10.0.0.2", "two", ("n2",), {"CPU": 2}), Cordoned("10.0.0.2", "disk", "ann")], now)
    log.append([NodeJoined("10.0.0.9", "nine", ("n9",), {"CPU": 2}), NodeLeft("10.0.0.9")], now)
    return Home(home, going, stuck, waiting)


def queue(home: HomePaths, waiting: list[dict[str, object]], age: float = 0.0) -> None:
    """The controller's view, `age` seconds old."""
    queue_file(home, time.time() - age, waiting=waiting)


def many(path: Path, count: int = 200) -> HomePaths:
    """A home with one run that continues and `count` that wait."""
    home = a_home(path)
    waiting: list[dict[str, object]] = []
    for i in range(count):
        name, now = f"q{i:03d}-1126-120000-{i:04x}", time.time() - 600 + i
        MadeRun(home, name, now=now, owner=f"user{i % 7}", model=MODEL).submit()
        reason = f"position {i + 1}: needs 8 GPU slots, 0 are free"
        waiting.append({"run": name, "position": i + 1, "reason": reason})
    live(home)
    queue(home, waiting)
    return home
