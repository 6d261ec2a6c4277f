"""What ranks tell, as it becomes events: each thing once, however often it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.metrics import (
    EndedLine,
    EvaluatedLine,
    FindingLine,
    MeasuredLine,
    MetricLine,
    ResumedLine,
    SavedLine,
    SaveFailedLine,
    StepLine,
    StoppedLine,
)
from faulttol.detect.snapshot import RankObservation
from faulttol.recorder import PhaseMark, RankPhase, Record
from orchestrator.control.gang import AgentReport
from orchestrator.control.progress import (
    Progress,
    commit_event,
    events_of_line,
    may_close_incident,
    merge_reports,
)
from orchestrator.record.events import (
    AttemptResumed,
    CheckpointCommitted,
    CheckpointFailed,
    FabricFinding,
    Finished,
    Payload,
    StateMoved,
)
from orchestrator.record.states import Reason, State
from orchestrator.record.view import RunView, fold
from tests.orchestrator.fake_runtime import step_line
from tests.orchestrator.record.life import LIFE, MENDED, events_of, until, view_of

pytestmark = [pytest.mark.unit, pytest.mark.timeout(30)]

STARTING, TRAINING = view_of(*until(State.STARTING)), view_of(*until(State.RUNNING))
KNOWN = Progress(attempt=1)


def rank(number: int, step: int | None = None, exit_code: int | None = None) -> RankObservation:
    newest = None if step is None else Record(7, 5.0, PhaseMark.END, RankPhase.BACKWARD, step)
    return RankObservation(number, 100 + number, exit_code, newest=newest)


def report(*ranks: RankObservation, offset: int = 0) -> AgentReport:
    return AgentReport("n1", 5.0, ranks, offset=offset)


def saved(step: int, tier: str = "store", attempt: int = 1, due: int | None = None) -> SavedLine:
    return SavedLine(9.0, attempt, step, f"p/{step}", 4096, 2.5, 0.25, tier, due)


def then(view: RunView, payloads: list[Payload]) -> RunView:
    return fold(events_of(*payloads), view)


# ---- ranks ----


def test_the_newest_report_of_a_rank_holds_and_the_others_stay() -> None:
    known = KNOWN.with_reports([report(rank(0, 3), rank(1, 3), offset=50), report(rank(1, 4), offset=90)])
    assert [known.ranks[r].newest.step for r in (0, 1)] == [3, 4] and known.lines_offset == 90  # type: ignore[union-attr]
    later = known.with_reports([report(rank(0, 5))])
    assert [later.ranks[r].newest.step for r in (0, 1)] == [5, 4]  # type: ignore[union-attr]
    assert later.lines_offset == 90, "an agent without rank 0 has read nothing"
    assert later.with_reports([]) is later and len(known.ranks) == 2


def test_reports_that_wait_are_merged_and_mean_the_same() -> None:
    """A log that can't be written for hours mustn't fill the memory with what each turn has heard."""
    waiting: AgentReport | None = None
    reports = []
    for step in range(1, 200):
        lines: list[MetricLine] = [step_line(1, step, 9.0), EvaluatedLine(9.0, 1, step, 1.0, 1, 1.0)]
        lines += [saved(step, "memory")] if step % 5 == 0 else []
        lines += [saved(step)] if step % 50 == 0 else []
        one = replace(report(rank(0, step), rank(1 + step % 3, step), offset=10 * step), lines=tuple(lines))
        reports.append(one)
        waiting = merge_reports(waiting, one) if waiting else one
    assert waiting is not None and len(waiting.ranks) == 4
    assert len(waiting.lines) == 3 + 3, "the saves, and the newest of what is passed over by a newer one"
    each, once = KNOWN.with_reports(reports), KNOWN.with_reports([waiting])
    assert (each.ranks, each.lines_offset) == (once.ranks, once.lines_offset)
    views = []
    for heard in (reports, [waiting]):
        view, known = STARTING, KNOWN.with_reports(heard)
        for line in (line for one in heard for line in one.lines):
            payloads, known = events_of_line(view, line, known)
            view = then(view, payloads)
        views.append((view, known))
    assert views[0] == views[1] and views[0][0].state is State.RUNNING and views[0][1].step == 199


def test_all_have_ended_well_where_each_of_them_has() -> None:
    for ranks, well in (
        ([rank(0, exit_code=0), rank(1, exit_code=0)], True),
        ([rank(0, exit_code=0), rank(1)], False),
        ([rank(0, exit_code=0), rank(1, exit_code=1)], False),
        ([rank(0, exit_code=0), rank(1, exit_code=-9)], False),
        ([rank(0, exit_code=0)], False),
        ([], False),
    ):
        assert KNOWN.with_reports([report(*ranks)]).all_succeeded(2) is well


def test_all_are_beyond_a_step_where_each_of_them_is() -> None:
    for ranks, beyond in (
        ([rank(0, 12), rank(1, 13)], True),
        ([rank(0, 12), rank(1, 11)], False),  # in the forward pass of step 11
        ([rank(0, 12), rank(1)], False),
        ([rank(0, 12)], False),
        ([], False),
    ):
        assert KNOWN.with_reports([report(*ranks)]).all_past(10, 2) is beyond


# ---- lines ----


def test_an_attempt_begins_once() -> None:
    line = ResumedLine(1.0, 1, 10, "p/10", "")
    assert events_of_line(STARTING, line, KNOWN) == ([AttemptResumed(1, 10, "p/10")], KNOWN)
    why = ["step 30: a differs from what was saved", "step 20: b is missing"]
    older = replace(line, facts={"passed": why})
    assert events_of_line(STARTING, older, KNOWN)[0] == [AttemptResumed(1, 10, "p/10", "; ".join(why))]
    begun = then(STARTING, [AttemptResumed(1, 0, None)])
    assert events_of_line(begun, line, KNOWN) == ([], KNOWN), "step 0 is a step too"
    following = view_of(*LIFE[: LIFE.index(MENDED) - 2])
    assert following.attempt == 2
    assert events_of_line(following, line, KNOWN)[0] == [AttemptResumed(2, 10, "p/10")], "each attempt does"


def test_the_first_step_starts_the_training() -> None:
    line = step_line(1, 1, 5.0)
    events, known = events_of_line(STARTING, line, KNOWN)
    assert events == [StateMoved(State.RUNNING, Reason.FIRST_STEP)] and known.step == 1
    assert known.step_seconds == line.step_seconds
    again, known = events_of_line(then(STARTING, events), step_line(1, 2, 6.0), known)
    assert again == [] and known.step == 2


def test_a_measured_case_counts_as_a_step_without_its_seconds() -> None:
    case = MeasuredLine(1.0, 1, 3, 9, {"op": "all_reduce"}, {})
    events, known = events_of_line(STARTING, case, replace(KNOWN, step_seconds=0.5))
    assert events == [StateMoved(State.RUNNING, Reason.FIRST_STEP)]
    assert known.step == 3 and known.step_seconds == 0.5


def test_steps_that_are_told_again_take_nothing_back() -> None:
    """An agent may tell what was read from the file already."""
    known = KNOWN
    for step in (1, 2, 3, 4, 2, 3):
        _, known = events_of_line(TRAINING, step_line(1, step, float(step)), known)
    assert known.step == 4
    _, known = events_of_line(TRAINING, step_line(1, 5, 9.0), known)
    assert known.step == 5


def test_a_commit_in_storage_is_told_once() -> None:
    line = saved(10, due=30)
    events, known = events_of_line(TRAINING, line, KNOWN)
    assert (
        events == [CheckpointCommitted(1, 10, "p/10", 4096, 2.5, 0.25, "store", 30)] == [commit_event(line)]
    )
    assert known is KNOWN
    assert commit_event(replace(line, differs="x isn't the same")).differs == "x isn't the same"
    view = then(TRAINING, events)
    assert events_of_line(view, line, KNOWN)[0] == [] == events_of_line(view, saved(9), KNOWN)[0]
    assert len(events_of_line(view, saved(11), KNOWN)[0]) == 1
    assert len(events_of_line(view, saved(5, attempt=2), KNOWN)[0]) == 1, (
        "a later attempt goes back, and saves anew"
    )
    assert (
        events_of_line(then(view, events_of_line(view, saved(5, attempt=2), KNOWN)[0]), line, KNOWN)[0] == []
    )


def test_a_snapshot_in_memory_is_kept_and_not_told() -> None:
    events, known = events_of_line(TRAINING, saved(10, "memory"), KNOWN)
    assert events == [] and known.snapshot == saved(10, "memory")
    events, known = events_of_line(TRAINING, saved(12, "memory"), known)
    assert events == [] and known.snapshot == saved(12, "memory")
    assert events_of_line(TRAINING, saved(10, "memory"), known) == ([], known), "told again"
    assert events_of_line(TRAINING, saved(14), known)[1].snapshot == saved(12, "memory"), "another tier's"


def test_a_failed_save_is_told_once() -> None:
    line = SaveFailedLine(1.0, 1, 20, "full", 2)
    events, _ = events_of_line(TRAINING, line, KNOWN)
    assert events == [CheckpointFailed(1, 20, "full", 2)]
    view = then(TRAINING, events)
    assert events_of_line(view, line, KNOWN)[0] == []
    assert events_of_line(view, replace(line, step=30, in_a_row=3), KNOWN)[0] == [
        CheckpointFailed(1, 30, "full", 3)
    ]


def test_a_finding_is_told_once_and_by_attempt() -> None:
    line = FindingLine(1.0, 1, {"kind": "slow_nic", "ratio": 0.25, "ranks": [1]})
    events, _ = events_of_line(TRAINING, line, KNOWN)
    assert events == [FabricFinding(1, line.finding)]
    view = then(TRAINING, events)
    assert events_of_line(view, line, KNOWN)[0] == []
    assert len(events_of_line(view, replace(line, finding=line.finding | {"ratio": 0.3}), KNOWN)[0]) == 1


def test_the_end_is_told_once() -> None:
    line = EndedLine(1.0, 1, 40, 1.5, 4096)
    events, _ = events_of_line(TRAINING, line, KNOWN)
    assert events == [Finished(40, 1.5, 4096)]
    assert events_of_line(then(TRAINING, events), line, KNOWN)[0] == []


@pytest.mark.parametrize(
    "line",
    [EvaluatedLine(1.0, 1, 10, 2.0, 8, 0.5), StoppedLine(1.0, 1, 12, saved=True)],
    ids=lambda line: line.kind,
)
def test_what_only_people_read_becomes_no_event(line: MetricLine) -> None:
    assert events_of_line(TRAINING, line, KNOWN) == ([], KNOWN) and not may_close_incident(line)


def test_what_may_settle_an_incident() -> None:
    lines: list[MetricLine] = [step_line(1, 3, 1.0), saved(3), MeasuredLine(1.0, 1, 1, 1, {}, {})]
    assert all(may_close_incident(line) for line in lines)
    others: list[MetricLine] = [
        EndedLine(1.0, 1, 40, 1.5, 1),
        SaveFailedLine(1.0, 1, 2, "", 1),
        ResumedLine(1.0, 1, 0, None, ""),
    ]
    assert not any(may_close_incident(line) for line in others)


def test_a_life_of_lines_read_twice_makes_each_event_once() -> None:
    """A new controller reads the file from its begin."""
    lines: list[MetricLine] = [
        ResumedLine(1.0, 1, 0, None, ""),
        *(step_line(1, step, float(step)) for step in range(1, 11)),
        saved(5), SaveFailedLine(9.0, 1, 8, "full", 1), saved(9, "memory"), saved(10),
        FindingLine(9.0, 1, {"kind": "slow_nic"}), EndedLine(10.0, 1, 10, 1.0, 100),
    ]  # fmt: skip
    view, events = STARTING, list[Payload]()
    for _ in range(2):
        known = KNOWN
        for line in lines:
            payloads, known = events_of_line(view, line, known)
            view, events = then(view, payloads), events + payloads
        assert known.step == 10 and known.snapshot == saved(9, "memory")
    kinds = ["resumed", "moved", "checkpoint", "checkpoint_failed", "checkpoint", "finding", "finished"]
    assert [event.kind for event in events] == kinds
    assert isinstance(lines[1], StepLine) and view.state is State.RUNNING and view.finished is not None
