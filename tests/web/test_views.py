"""What views of the page are made of, without a server: who waits for whom, rows that are joined, spans, loads, names."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client.core import GaugeMetricFamily

from configs.errors import UserError
from faulttol.detect.snapshot import GroupStatus
from orchestrator.record.history import AttemptHistory
from orchestrator.record.partition import PartitionBuilder, TimePart
from orchestrator.record.rank_status import RankStatus
from orchestrator.web import export
from orchestrator.web.cached_run import CachedRun
from orchestrator.web.columns import MetricColumns
from orchestrator.web.metrics import NODE_GAUGES, _Home, stalled_after
from orchestrator.web.read_model import HomeReadModel
from orchestrator.web.redact import REDACTED, Redactor
from orchestrator.web.run_api import RunApi
from orchestrator.web.security import AccessTokens, Guard, cookie_of
from orchestrator.web.views import home, logs, series
from orchestrator.web.views import layout as layouts
from tests.web.made import MadeRun, a_home

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


# ---- who waits for whom ----


def look(rank: int, *groups: GroupStatus, held: str = "") -> RankStatus:
    return RankStatus(
        rank, "n1", 100.0, 5, "backward", 99.0, "S", "all_reduce" if groups else "", held, None, groups
    )


def history(ranks: int, layout: dict[str, int]) -> AttemptHistory:
    nodes = [{"ip": "10.0.0.1", "hostname": "n1", "ranks": [0, ranks - 1]}]
    return AttemptHistory(1, 50.0, False, ranks=ranks, layout=layout, nodes=nodes)


FOUR = history(4, {"pp": 2, "dp": 2, "cp": 1, "ep": 1, "etp": 1, "tp": 1})


def test_a_rank_that_waits_itself_is_not_where_it_begins() -> None:
    """Rank 0 waits for 1, which waits for 3."""
    first, second = (0, 1), (1, 3)
    looks = [
        look(0, GroupStatus("dp", first, 5, 4)),
        look(1, GroupStatus("dp", first, 4, 4), GroupStatus("pp", second, 9, 8)),
        look(3, GroupStatus("pp", second, 8, 8), held="stopped (state T)"),
    ]
    made = layouts.layout(FOUR, looks, [])
    assert made["said"] == "ranks 0, 1 wait for rank 3, which is stopped (state T)"
    assert made["culprits"] == [1, 3]


def test_a_rank_that_nobody_has_seen_is_waited_for() -> None:
    made = layouts.layout(FOUR, [look(0, GroupStatus("dp", (0, 1), 5, 4))], [])
    assert [(one["from"], one["to"]) for one in made["waits"]] == [([0], [1])]
    assert made["groups"][0]["missing"] == [1] and made["groups"][0]["entered"] == [5, None]


def test_a_rank_that_has_left_a_call_waits_for_nobody() -> None:
    looks = [look(0, GroupStatus("dp", (0, 1), 5, 5)), look(1, GroupStatus("dp", (0, 1), 4, 4))]
    made = layouts.layout(FOUR, looks, [])
    assert made["waits"] == [] and made["said"] == ""


def test_ranks_that_incidents_name_are_named_beside_those_that_are_waited_for() -> None:
    made = layouts.layout(FOUR, [look(0, GroupStatus("dp", (0, 1), 5, 4))], [3])
    assert made["culprits"] == [1, 3]
    alone = layouts.layout(FOUR, [], [3])
    assert alone["culprits"] == [3] and alone["said"] == "An incident names rank 3"


@pytest.mark.parametrize(
    ("seen", "ended", "live"),
    [(100.0, None, True), (84.0, None, False), (100.0, 100.0, False), (None, None, False)],
)
def test_what_is_old_or_of_an_ended_attempt_is_not_live(
    seen: float | None, ended: float | None, live: bool
) -> None:
    own = history(4, FOUR.layout)
    own.ended = ended
    assert layouts.is_live(own, {"seen": seen}, 100.0) is live


# ---- rows ----


def step_row(step: int, norm: float = 1.0, time: float | None = None, loss: float = 2.0) -> str:
    line: dict[str, Any] = {
        "kind": "step", "time": 1000.0 + step if time is None else time, "attempt": 1, "step": step, "loss": loss,
        "aux_loss": 0.0, "lr": 1e-3, "grad_norm": norm, "tokens": step * 64, "tokens_per_second": 64.0,
        "step_seconds": 1.0, "phase_seconds": {"forward": 0.5}, "mfu": None, "expert_load": [[3, 1], [2, 2]],
        "balance_entropy": 1.0, "dropped": 0, "memory_bytes": 1 << 20,
    }  # fmt: skip
    return json.dumps(line)


def columns_of(tmp_path: Path, rows: list[str], most: int = 1000) -> MetricColumns:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{row}\n" for row in rows))
    columns = MetricColumns(path, most)
    columns.update()
    return columns


def test_joined_rows_have_the_newer_ones_place_and_keep_what_is_not_finite(tmp_path: Path) -> None:
    rows = [step_row(n, norm=math.nan if n in (20, 31) else 1.0 + n / 1000) for n in range(1, 129)]
    columns = columns_of(tmp_path, rows, 64)
    assert columns.joined and columns.rows <= 64
    steps, norms = columns.column("step"), columns.column("grad_norm")
    assert steps[-1] == 128 and sum(columns.column("busy")) == 128.0
    older = steps[: columns.rows // 4].tolist()
    assert all(step % 2 == 0 for step in older), "a row stands for the steps up to its own"
    assert int(np.isnan(norms).sum()) == 2, "nothing that isn't finite is lost among its neighbours"


def test_a_line_that_goes_back_is_left_out_until_it_is_passed(tmp_path: Path) -> None:
    """A torn file may repeat steps: their seconds count once."""
    columns = columns_of(tmp_path, [step_row(n, time=1000.0 + i) for i, n in enumerate([1, 2, 9, 3, 4, 10])])
    assert columns.trace().step.tolist() == [1, 2, 9, 10]


@pytest.mark.parametrize(
    ("times", "seconds"),
    [([], 30.0), ([0.0], 30.0), ([0.0, 1.0, 2.0], 30.0), ([0.0, 1.0, 21.0, 22.0], 200.0)],
)
def test_a_run_counts_as_stalled_after_ten_times_its_longest_gap(
    tmp_path: Path, times: list[float], seconds: float
) -> None:
    rows = [step_row(n, time=1000.0 + time) for n, time in enumerate(times, 1)]
    assert stalled_after(columns_of(tmp_path, rows)) == seconds


@pytest.mark.parametrize(
    ("norm", "loss", "finite"), [(1.0, 2.0, 1), (math.nan, 2.0, 0), (math.inf, 2.0, 0), (1.0, math.nan, 0)]
)
def test_a_loss_or_a_gradient_that_is_not_finite_is_a_metric(
    tmp_path: Path, norm: float, loss: float, finite: int
) -> None:
    columns = columns_of(tmp_path, [step_row(1), step_row(2, norm=norm, loss=loss)])
    state: Any = SimpleNamespace(columns={1: columns}, run=SimpleNamespace(run_id="a"))
    nobody: Any = None
    values = {name: value for name, _, value in _Home(nobody, Redactor())._lines(state)}
    assert values["megaray_run_loss_finite"] == finite
    assert values["megaray_run_expert_load_max_over_mean_ratio"] == 1.5


# ---- expert loads ----


def test_loads_are_over_the_mean_of_their_own_layer() -> None:
    matrix = np.array([[3, 1], [60, 20], [5, 5]], dtype=np.uint32)
    assert series._column(matrix, 0, 3).tolist() == [1.5, 0.5]
    assert series._column(matrix, 2, 3).tolist() == [1.0, 1.0]
    assert series._column(matrix, None, 3).tolist() == [1.5, 1.5, 1.0]


# ---- spans of time ----


def test_neighbours_of_another_attempt_are_not_joined() -> None:
    tape = PartitionBuilder(0.0)
    tape.append(2.0, TimePart.PRODUCTIVE, 1)
    tape.append(3.0, TimePart.PRODUCTIVE, 1)
    tape.append(5.0, TimePart.PRODUCTIVE, 2)
    assert tape.build().spans(10) == [
        (0.0, 3.0, TimePart.PRODUCTIVE, 1),
        (3.0, 5.0, TimePart.PRODUCTIVE, 2),
    ]


def test_a_piece_of_many_spans_shows_what_fills_most_of_it() -> None:
    tape = PartitionBuilder(0.0)
    for hour in range(100):
        tape.append(hour + 0.8, TimePart.PRODUCTIVE, 1)
        tape.append(hour + 1.0, TimePart.CHECKPOINT, 1)
    assert tape.build().spans(10) == [(0.0, 100.0, TimePart.PRODUCTIVE, 1)]


# ---- secrets, and names ----

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "tree",
    [
        {"password": "short"},
        {"api_key": ["a", "b"]},
        {"api_key": [f"part {n}" for n in range(40)]},
        {f"key of {SECRET}": 1},
        {"words": [f"word {n} {SECRET}" for n in range(40)]},
        {"words": (f"one {SECRET}", 5)},
        [{"deep": {"authorization": "Basic x"}}],
        "hf_abcdefghijklmnopqrstuvwxyz",
        "https://ada:pw12@host/path",
    ],
)
def test_a_secret_is_taken_out_wherever_it_stands(tree: Any) -> None:
    text = json.dumps(Redactor({}, (SECRET,)).tree(tree))
    assert REDACTED in text
    for secret in (SECRET, "short", '"a"', "part 7", "Basic x", "hf_abc", "pw12"):
        assert secret not in text


def test_names_of_hosts_are_compared_without_capitals() -> None:
    guard = Guard.of(None, "Box.Example", ["Dash.Example.ORG"])
    assert {"box.example", "dash.example.org", "localhost"} <= guard.names
    assert "0.0.0.0" not in Guard.of(None, "0.0.0.0", []).names, "an address of all is the name of none"


TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    ("headers", "cookies", "who"),
    [
        ({}, {}, None),
        ({}, {"c": cookie_of(TOKEN)}, "ada"),
        ({}, {"c": cookie_of(TOKEN + "x")}, None),
        ({}, {"c": TOKEN}, None),
        ({}, {"other": cookie_of(TOKEN)}, None),
        ({"Authorization": f"Bearer {TOKEN}"}, {}, "ada"),
        ({"Authorization": f"Bearer {cookie_of(TOKEN)}"}, {}, None),
        ({"Authorization": f"Bearer {TOKEN[:-1]}"}, {"c": cookie_of(TOKEN)}, None),
        ({"Authorization": "Bearer "}, {}, None),
        ({"Authorization": f"Basic {TOKEN}"}, {}, None),
    ],
)
def test_a_cookie_and_a_token_are_each_their_own(
    headers: dict[str, str], cookies: dict[str, str], who: str | None
) -> None:
    request: Any = SimpleNamespace(headers=headers, cookies=cookies)
    assert Guard.of(AccessTokens({TOKEN: "ada"}), "127.0.0.1", []).who(request, "c") == who


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_token_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "dashboard.token"
    path.write_text(f"{TOKEN} ada\n")
    path.chmod(mode)
    with pytest.raises(UserError, match="others may read it; type: chmod 600"):
        AccessTokens.of(path)
    path.chmod(0o600)
    assert AccessTokens.of(path).names == {TOKEN: "ada"}


def test_free_slots_of_a_node_are_what_no_run_holds() -> None:
    node = {"ip": "10.0.0.1", "slots": {"CPU": 8, "GPU": 4}, "free": {"CPU": 8, "GPU": 1}}
    seen = SimpleNamespace(queue={"nodes": [node]}, nodes=SimpleNamespace(nodes={}))
    live: Any = SimpleNamespace(snapshot=seen)
    kept: dict[str, Any] = {
        name: GaugeMetricFamily(name, "", labels=["node", *more]) for name, (_, more) in NODE_GAUGES.items()
    }
    _Home(live, Redactor())._nodes(kept)
    for name, count in (("megaray_node_slots", 4.0), ("megaray_node_free_slots", 1.0)):
        values = {sample.labels["resource"]: sample.value for sample in kept[name].samples}
        assert values == {"CPU": 8.0, "GPU": count}


def test_no_text_of_a_run_ends_the_script_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "</script><!-- \u2028 \u2029 & <script>"
    monkeypatch.setattr(export, "_answers", lambda live, run_id: {"text": evil})
    monkeypatch.setattr(export, "joined", lambda folder, data, title: data)
    live: Any = SimpleNamespace(clock=lambda: 1.0)
    data = export.page(live, "run", tmp_path)
    assert not set("<>&\u2028\u2029") & set(data)
    assert json.loads(data)["answers"]["text"] == evil, "and it is read back as it was"


# ---- what changes while it is read ----


def test_a_log_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MadeRun(a_home(tmp_path), "one").submit().start().run
    path = run.attempt(1).log(0)
    path.write_text("")
    assert list(logs._backwards(path, 64 << 20)) == []
    path.write_text("a\nb\n")
    assert list(logs._backwards(path, 64 << 20)) == [(2, b"b"), (0, b"a")]
    monkeypatch.setattr(logs.os, "fstat", lambda _: SimpleNamespace(st_size=64 << 20))
    assert list(logs._backwards(path, 64 << 20)) == [], "cut between the look and the read"
    monkeypatch.undo()
    monkeypatch.setattr(logs, "_BLOCK", 8)
    path.write_text("".join(f"line {i}\n" for i in range(9)))
    rows = logs._backwards(path, 1 << 20)
    assert [next(rows)[1], next(rows)[1]] == [b"line 8", b"line 7"]
    path.write_text("")
    assert len(list(rows)) <= 1, "no line is made up of what isn't there"


def test_a_log_that_is_gone_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MadeRun(a_home(tmp_path), "one").submit().start().run
    for rank in (0, 1, 2):
        run.attempt(1).log(rank).write_text(f"rank {rank} of three\n")
    real = logs._backwards

    def removed(path: Path, end: int) -> Iterator[tuple[int, bytes]]:
        run.attempt(1).log(1).unlink(missing_ok=True)
        yield from real(path, end)

    monkeypatch.setattr(logs, "_backwards", removed)
    lines = logs.search_all(run, 1, "three", 10)["lines"]
    assert [line["text"] for line in lines] == ["rank 0 of three", "rank 2 of three"]


class _Meanwhile:
    """Columns of an attempt during whose reading another attempt begins."""

    def __init__(self, act: Any) -> None:
        self.rows = self.bytes = 0
        self._act = act

    @property
    def newest(self) -> None:
        self._act()


def test_an_attempt_that_begins_while_rows_are_made(tmp_path: Path) -> None:
    made = MadeRun(a_home(tmp_path), "one").submit().start().train(5)
    state = CachedRun(made.run)
    state.refresh({}, None)
    state.mark_viewed()
    assert state.load(time.monotonic() + 20) and list(state.columns) == [1]

    def begun() -> None:
        if made.attempt == 1:
            made.fault(detect=1)
            made.start(step=0, part="restart").train(3)
            state.load(time.monotonic() + 20)

    state.columns = {0: _Meanwhile(begun), **state.columns}  # type: ignore[dict-item]  # stands for one
    assert home.row(state)["last_progress"] is not None
    assert sorted(state.columns) == [0, 1, 2]


def test_an_incident_that_opens_while_the_layout_is_made(tmp_path: Path) -> None:
    made = MadeRun(a_home(tmp_path), "one").submit().start().train(5)
    state = CachedRun(made.run)
    state.refresh({}, None)
    state.mark_viewed()
    assert state.load(time.monotonic() + 20) and state.history is not None

    class Opens:
        rank = None

        @property
        def attempt(self) -> int:
            assert state.history is not None
            state.history.incidents[len(state.history.incidents) + 1] = 0.0, self  # type: ignore[assignment]
            return 1

    state.history.incidents[1] = 0.0, Opens()  # type: ignore[assignment]  # stands for one
    assert RunApi(HomeReadModel(made.home)).layout(state, {})["attempt"] == 1
    assert len(state.history.incidents) == 2


def test_a_file_that_is_made_anew_while_expert_loads_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows that were chosen, those that are left are shown."""
    made = MadeRun(a_home(tmp_path), "one").submit().start().train(30)
    state = CachedRun(made.run)
    state.refresh({}, None)
    state.mark_viewed()
    assert state.load(time.monotonic() + 20)
    experts, real, calls = series.ExpertLoads(), series.ExpertLoads._of, list[int]()

    def read(self: series.ExpertLoads, run: str, number: int, columns: MetricColumns, row: int) -> Any:
        calls.append(row)
        matrix = real(self, run, number, columns, row)
        if len(calls) == 20:
            columns._reset()
        return matrix

    monkeypatch.setattr(series.ExpertLoads, "_of", read)
    assert experts.map(state, None, 0, 100, 100)["step"] == list(range(1, 21))
