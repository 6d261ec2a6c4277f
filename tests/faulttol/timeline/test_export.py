"""The timeline: detail kept, clocks aligned, messages joined, and a file that Perfetto can draw."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from configs.paths import RunPaths
from configs.rank import RankFiles
from faulttol import steady_clock
from faulttol.recorder import RankPhase, Recorder
from faulttol.timeline import command, detail, rings, store
from faulttol.timeline.clocks import CollectiveEnd, align
from faulttol.timeline.detail import DetailChunk, DetailLog
from faulttol.timeline.store import StepStore
from faulttol.timeline.trace import RECORD, CollectiveCall, OngoingWait, Op, TracedGroup, WaitLane
from tests.faulttol.timeline.made_rings import MS, Did, MadeRank, gang
from tests.faulttol.timeline.trace_events import problems

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


# ---- clocks ----


def _ends(
    offsets: dict[str, int], count: int, noise: int, seed: int = 0, groups: dict[int, list[str]] | None = None
) -> list[CollectiveEnd]:
    rng = np.random.default_rng(seed)
    found = []
    for number, nodes in (groups or {1: list(offsets)}).items():
        for at in range(count):
            done = 10**18 + number * 1000 + at * 10**8
            found += [
                CollectiveEnd((number, at), node, done + offsets[node] + int(rng.integers(0, noise + 1)))
                for node in nodes
            ]
    return found


def test_clocks_are_told_by_shared_ends() -> None:
    offsets = {"a": 0, "b": 3_000_000, "c": -70_000_000, "d": 5}
    found = align(list(offsets), _ends(offsets, 200, 20_000))
    assert {n: pytest.approx(o, abs=4000) for n, o in offsets.items()} == found.offsets
    assert found.apart == () and found.shared == 200 and 0 < found.residual < 20e-6


def test_a_few_ends_that_are_far_off_change_little() -> None:
    offsets = {"a": 0, "b": 1_000_000}
    ends = _ends(offsets, 100, 10_000)
    for index in range(0, 60, 6):
        ends[2 * index + 1] = CollectiveEnd(ends[2 * index + 1].key, "b", ends[2 * index + 1].ended + 10**9)
    assert align(["a", "b"], ends).offsets["b"] == pytest.approx(1_000_000, abs=6000)


def test_clocks_are_told_over_others_and_apart_where_nothing_is_shared() -> None:
    offsets = {"a": 0, "b": 500_000, "c": 900_000, "x": 77, "y": 78}
    groups = {1: ["a", "b"], 2: ["b", "c"], 3: ["x", "y"]}
    found = align(list(offsets), _ends(offsets, 50, 0, groups=groups))
    assert found.offsets == {"a": 0, "b": 500_000, "c": 900_000, "x": 0, "y": 0} and found.apart == ("x", "y")
    alone = align(["a"], [])
    assert alone.offsets == {"a": 0} and alone.shared == 0 and np.isnan(alone.residual)


# ---- detail ----


def _chunk(rank: int, first: int, count: int) -> DetailChunk:
    phases, calls = np.zeros(count, rings.ROW), np.zeros(2 * count, RECORD)
    rng = np.random.default_rng(rank * 1000 + first)
    for name in ("sequence", "ns", "step"):
        phases[name] = rng.integers(0, 1 << 40, count)
    for name in ("sequence", "issued", "began", "ended", "device_began", "device_ended", "bytes", "total"):
        calls[name] = rng.integers(0, 1 << 40, 2 * count)
    calls["group"], calls["peer"] = rng.integers(0, 1 << 32, 2 * count), rng.integers(-1, 9, 2 * count)
    waiting = OngoingWait(5, 1, 4_000_000_000, 3, -1) if first == 3 else None
    return DetailChunk(
        rank,
        "n0",
        12,
        first,
        first + 1,
        phases,
        calls,
        {4_000_000_000: TracedGroup("dp", range(0, 8, 2))},
        waiting,
    )


def _same(one: DetailChunk, other: DetailChunk) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) if name in ("phases", "calls")
        else getattr(one, name) == getattr(other, name)
        for name in vars(one)
    )  # fmt: skip


def test_detail_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made, log = (
        [_chunk(rank, step, 30) for step in range(5) for rank in range(2)],
        DetailLog(tmp_path / "s" / "d", 1 << 20),
    )
    assert log.append(made[:4]) > 0 and log.append([]) == 0
    log.append(made[4:])
    found = list(detail.read(tmp_path / "s" / "d"))
    assert len(found) == 10 and all(_same(*pair) for pair in zip(found, made, strict=True))


@pytest.mark.parametrize("where", ["end", "middle", "check"])
def test_a_chunk_cut_short_or_damaged_costs_itself_alone(tmp_path: Path, where: str) -> None:
    log = DetailLog(tmp_path / "d", 1 << 20)
    sizes = [log.append([_chunk(0, step, 30)]) for step in range(4)]
    data = bytearray((tmp_path / "d").read_bytes())
    if where == "end":
        data = data[: -sizes[-1] // 2]
    elif where == "middle":
        del data[sizes[0] + 40 : sizes[0] + 90]
    else:
        data[sizes[0] + 60] ^= 1
    (tmp_path / "d").write_bytes(data)
    assert [chunk.first for chunk in detail.read(tmp_path / "d")] == (
        [0, 1, 2] if where == "end" else [0, 2, 3]
    )


def test_detail_is_of_a_bounded_size_and_keeps_the_newest(tmp_path: Path) -> None:
    size = DetailLog(tmp_path / "one", 1 << 30).append([_chunk(0, 0, 30)])
    log = DetailLog(tmp_path / "d", 5 * size)
    for step in range(30):
        log.append([_chunk(0, step, 30)])
    assert sum(file.stat().st_size for file in tmp_path.glob("d*")) <= 10 * size * 1.2
    steps = [chunk.first for chunk in detail.read(tmp_path / "d")]
    assert steps == list(range(steps[0], 30)) and len(steps) >= 5


# ---- from rings to a file ----


def _run(tmp_path: Path) -> RunPaths:
    run = RunPaths(tmp_path / "run")
    run.attempts.mkdir(parents=True)
    return run


def _options(place: RunPaths, **given: Any) -> argparse.Namespace:
    words = {
        "run": str(place.root),
        "attempt": None,
        "steps": None,
        "ranks": None,
        "out": place.root / "timeline.json",
    }
    return argparse.Namespace(**(words | given))


def _drawn(run: RunPaths, **given: Any) -> list[dict[str, Any]]:
    answer = command.run(_options(run, **given))
    tree = json.loads((run.root / "timeline.json").read_text())
    assert problems(tree) == []
    assert answer.data["events"] == len(tree["traceEvents"])
    return tree["traceEvents"]


def _close(stores: list[StepStore]) -> None:
    for one in stores:
        one.close()


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """Two ranks on nodes whose clocks are 250 ms apart; rank 1 comes 8 ms late to everything."""
    run = _run(tmp_path)
    made = [
        MadeRank(tmp_path / "rings", rank, monkeypatch, start=50_000 * MS + 250 * MS * rank)
        for rank in (0, 1)
    ]
    for rank, one in enumerate(made):
        one.started()
        for number in range(30):
            one.step(number, Did(compute=20 + 8 * rank, wait=13 - 8 * rank, save=4 * (number == 15)))
    _close([StepStore(run.attempt(1).root, f"node{rank}", [rank], tmp_path / "rings", 2) for rank in (0, 1)])
    return run


def test_the_timeline_of_two_nodes(two_nodes: RunPaths) -> None:
    events = _drawn(two_nodes)
    steps = [e for e in events if e["name"].startswith("step ") and e["pid"] == 0]
    assert [e["name"] for e in steps] == [f"step {n}" for n in range(10, 30)]
    assert [e["dur"] for e in steps[:5]] == [35_000.0] * 5 and steps[5]["dur"] == 39_000.0
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"rank 0 on node0", "rank 1 on node1"}
    ends = [
        {
            e["args"]["count"]: e["ts"] + e["dur"]
            for e in events
            if e.get("cat") == "wait" and e["pid"] == rank and e["dur"] > 2000
        }
        for rank in (0, 1)
    ]
    assert len(ends[0]) >= 20 and all(abs(ends[0][count] - ends[1][count]) < 1 for count in ends[0])
    late = [e["args"] for e in events if e.get("cat") == "wait" and e["pid"] == 0 and e["dur"] > 10_000]
    assert len(late) == 20
    assert all(args["last"] == 1 and args["last_after_us"] == pytest.approx(8000, abs=1) for args in late)
    told = command.run(_options(two_nodes)).data
    assert told["clocks"]["offsets_seconds"] == {"node0": 0.0, "node1": pytest.approx(0.246)}
    assert told["clocks"]["residual_seconds"] < 1e-6


def test_steps_and_ranks_can_be_named(two_nodes: RunPaths) -> None:
    events = _drawn(two_nodes, steps="3:5")
    assert {e["name"] for e in events if e.get("cat") == "step"} == {"step 3", "step 4"}
    assert {e["args"]["step"] for e in events if e.get("cat") == "phase"} == {3, 4}
    assert {e["pid"] for e in _drawn(two_nodes, ranks="1:2")} == {1}
    assert len({e["name"] for e in _drawn(two_nodes, steps="28:") if e.get("cat") == "step"}) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": "40:50"}, "--steps 40:50: steps 0 to 29 are on record"),
        ({"steps": "5"}, "--steps 5 isn't a span; type e.g. --steps 100:120"),
        ({"steps": "7:7"}, "isn't a span"),
        ({"ranks": "5:9"}, "--ranks 5:9: there are records of ranks 0 to 1"),
        ({"attempt": 3}, "--attempt 3: run has attempts 1; name one"),
        ({"out": Path("/proc/no/file")}, "--out /proc/no/file"),
        ({"run": "/nowhere/at/all"}, "does not exist"),
    ],
)
def test_a_wrong_word_is_named(
    two_nodes: RunPaths, given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=message):
        command.run(_options(two_nodes, **given))


def test_an_attempt_without_records_is_named(tmp_path: Path) -> None:
    run = _run(tmp_path)
    with pytest.raises(UserError, match="has no attempt yet"):
        command.run(_options(run))
    run.attempt(1).root.mkdir()
    with pytest.raises(UserError, match="has no records"):
        command.run(_options(run))


def _message(made: MadeRank, op: Op, peer: int, count: int, wait: int) -> None:
    made.trace.write(
        CollectiveCall(op, made.now - MS, 7, count, peer, 64), made.now, made.now + wait * MS, WaitLane.MAIN
    )


def test_sends_are_joined_to_their_receives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    first, second = gang(tmp_path / "rings", [0, 1], monkeypatch)
    for number in range(3):
        for count in range(4):
            _message(first, Op.SEND, 1, 4 * number + count, 0)
            _message(second, Op.RECEIVE, 0, 4 * number + count, 2)
        _message(first, Op.RECEIVE, 1, number, 3)
        _message(first, Op.RECEIVE, 9, number, 1)  # of a rank that has no record
        _message(second, Op.SEND, 0, number, 0)
        first.step(number)
        second.step(number)
    _close([StepStore(run.attempt(1).root, "n", [0, 1], tmp_path / "rings")])
    events = _drawn(run)
    ends: dict[int, dict[str, dict[str, Any]]] = {}
    for event in events:
        if event["ph"] in "sf":
            ends.setdefault(event["id"], {})[event["ph"]] = event
    assert len(ends) == 15
    ways = [(both["s"]["pid"], both["f"]["pid"]) for both in ends.values()]
    assert ways.count((0, 1)) == 12 and ways.count((1, 0)) == 3


def test_what_is_read_at_the_start_is_of_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    (one,) = gang(tmp_path / "rings", [0], monkeypatch)
    one.started()
    for number in (1, 2, 3):
        one.step(number)
    _close([StepStore(run.attempt(1).root, "n", [0], tmp_path / "rings")])
    drawn = {e["name"] for e in _drawn(run) if e.get("cat") == "step"}
    assert drawn == {"step 1", "step 2", "step 3"}


def test_what_never_ended_is_drawn_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    first, second = gang(tmp_path / "rings", [0, 1], monkeypatch)
    for number in range(4):
        first.step(number)
        second.step(number)
    for one, phase in ((first, RankPhase.BACKWARD), (second, RankPhase.DATA)):
        one.ring.begin(RankPhase.DATA, 4)
        one.now += MS
        if phase is RankPhase.BACKWARD:
            one.ring.end(RankPhase.DATA, 4)
            one.ring.begin(phase, 4)
            one.trace.begin_wait(CollectiveCall(Op.ALL_REDUCE, one.now, 7, 50, -1, 0), one.now)
    _close([StepStore(run.attempt(1).root, "n", [0, 1], tmp_path / "rings")])
    events = _drawn(run)
    open_ones = {(e["pid"], e["name"]) for e in events if e.get("args", {}).get("unfinished")}
    assert open_ones == {(0, "backward"), (0, "all_reduce: never ended"), (1, "data")}
    assert {e["name"] for e in events if e.get("cat") == "step" and e["pid"] == 0} == {
        f"step {n}" for n in range(5)
    }


def test_only_some_steps_are_kept_where_all_would_be_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_DETAIL_RATE", (1, 1))  # bytes a second
    run = _run(tmp_path)
    stores = []
    for rank in (0, 1):
        one = MadeRank(tmp_path / "rings", rank, monkeypatch)
        one.started()
        own = StepStore(run.attempt(1).root, f"n{rank}", [rank], tmp_path / "rings", 2)
        stores.append(own)
        for number in range(60):
            one.step(number)
            if number % 10 == 9:
                own.gather()
                own.write(everything=True)
    _close(stores)
    kept = [
        {c.first for c in detail.read(run.attempt(1).root / "steps" / f"n{rank}.detail") if c.first >= 30}
        for rank in (0, 1)
    ]
    for chunk in detail.read(run.attempt(1).root / "steps" / "n0.detail"):
        assert chunk.first < 10 or set(chunk.phases["step"]) <= {chunk.first}
    assert kept[0] == kept[1] and kept[0] and all(step % 8 == 0 for step in kept[0])
    steps = [e for e in _drawn(run) if e.get("cat") == "step" and e["pid"] == 0]
    assert max(e["dur"] for e in steps) < 30_000  # none reaches over those that are left out


def test_rings_of_torchrun_and_evidence_are_drawn_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path)
    one = MadeRank(run.attempt(1).ranks, 0, monkeypatch)
    one.started()
    for number in range(5):
        one.step(number)
    evidence = run.attempt(1).evidence_of("incident-001")
    evidence.mkdir(parents=True)
    records = [
        {
            "sequence": n + 1,
            "time": steady_clock.from_monotonic_ns(one.now) + n / 1e3,
            "mark": mark,
            "phase": "DATA",
            "step": n // 2,
        }
        for n, mark in enumerate(["BEGIN", "END"] * 3)
    ]
    (evidence / "00003.ring.json").write_text(json.dumps(records))
    (evidence / "00004.ring.json").write_text("[{")
    found = _drawn(run)
    assert {e["pid"] for e in found} == {0, 3}
    assert sum(e.get("cat") == "wait" for e in found) >= 4


def test_saves_that_take_turns_with_waits_are_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    (one,) = gang(tmp_path / "rings", [0], monkeypatch)
    for number in range(3):
        one.step(number, Did(save=20 * (number == 1)))
    _close([StepStore(run.attempt(1).root, "n", [0], tmp_path / "rings")])
    saving = [e for e in _drawn(run) if e["name"] in ("checkpoint", "collective") and e["ph"] == "X"]
    assert sum(e["dur"] for e in saving) == pytest.approx(10_000, abs=1)  # from the last renewal on
    assert [e["args"]["step"] for e in saving] == [1] * len(saving)


def test_the_checker_finds_what_is_wrong() -> None:
    common = {"name": "a", "pid": 0, "tid": 1, "ts": 1.0}
    name = common | {"ph": "M", "name": "thread_name", "args": {"name": "t"}}
    good = {"displayTimeUnit": "ms", "traceEvents": [name, common | {"ph": "X", "dur": 2.0}]}
    assert problems(good) == []
    for wrong in (
        common | {"ph": "X"}, common | {"ph": "X", "dur": -1}, common | {"ph": "Q"},
        common | {"ph": "X", "dur": 1, "ts": -1},
        common | {"ph": "X", "dur": 5.0, "ts": 2.0}, common | {"ph": "b", "cat": "c", "id": "1"},
        common | {"ph": "f", "cat": "c", "id": 1, "bp": "e"}, common | {"ph": "X", "dur": 1.0, "tid": 9},
    ):  # fmt: skip
        assert problems(good | {"traceEvents": [*good["traceEvents"], wrong]}), wrong
    assert problems([]) and problems({"traceEvents": []})


def test_a_ring_of_another_version_is_no_source(tmp_path: Path) -> None:
    run = _run(tmp_path)
    Recorder(RankFiles(run.attempt(1).ranks, 0).ring, 0).close()
    with (RankFiles(run.attempt(1).ranks, 0).ring).open("r+b") as raw:
        raw.write(b"MEGARAY9")
    assert os.path.getsize(RankFiles(run.attempt(1).ranks, 0).ring) > 0
    command.run(_options(run))  # a rank without records


def test_ranks_that_began_no_step_are_drawn_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement has no training steps, and neither has a run that died while it started."""
    run = _run(tmp_path)
    MadeRank(tmp_path / "rings", 0, monkeypatch).started()
    _close([StepStore(run.attempt(1).root, "node0", [0], tmp_path / "rings", 1)])
    answer = command.run(_options(run))
    assert answer.data["steps"] == [0, 0] and "of 1 ranks, no steps of attempt 1" in answer.lines[0]
