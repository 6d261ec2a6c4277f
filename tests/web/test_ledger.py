"""The ledger: each second counted once, in the right part, whatever a run went through."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator.record.events import StateMoved, VerdictFound
from orchestrator.record.history import RunHistory
from orchestrator.record.ledger import AttemptLines, Ledger, _lost_from, _steps, ledger
from orchestrator.record.partition import MEANINGS, PartitionBuilder, TimePart
from orchestrator.record.states import Reason, State
from orchestrator.web.views.series import lost_after
from tests.orchestrator.record.life import LIFE, events_of
from tests.web.made import MadeRun, a_home, ledger_of

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def made_of(run: MadeRun, now: float | None = None, most: int = 100_000) -> Ledger:
    return ledger_of(run.run, run.now if now is None else now, most)


def check(run: MadeRun, tolerance: float = 0.01, **more: Any) -> Ledger:
    """Every part as the run was made, and all of wall time, by two ways of adding up that share nothing."""
    made = made_of(run, **more)
    wall = run.now - 1_700_000_000.0
    assert sum(made.seconds.values()) == pytest.approx(wall, rel=1e-9)
    edges = made.partition.edges
    assert np.all(np.diff(edges) >= 0), "an interval that goes back would count its seconds twice"
    assert edges[-1] - edges[0] == pytest.approx(wall)
    told = {part.label: seconds for part, seconds in made.seconds.items()}
    for part, seconds in run.seconds().items():
        assert told[part] == pytest.approx(seconds, abs=max(1e-6, tolerance * wall)), (
            part,
            told,
            run.seconds(),
        )
    for part in told.keys() - run.seconds().keys():
        assert told[part] == pytest.approx(0.0, abs=max(1e-6, tolerance * wall)), part
    return made


def test_a_run_without_faults(tmp_path: Path) -> None:
    run = (
        MadeRun(a_home(tmp_path))
        .submit()
        .wait(7)
        .start(2, 5)
        .train(20, 1.0, 0.05)
        .save(0.7, 0.7)
        .train(10)
        .evaluate(3)
        .train(10)
    )
    made = check(run.save().finish(), 1e-4)
    assert made.seconds[TimePart.WAITING] == pytest.approx(7)
    assert made.ettr == pytest.approx((40 + 3) / (run.now - 1_700_000_000.0), rel=1e-3)
    assert made.ettr_held is not None and made.ettr is not None and made.ettr_held > made.ettr


def test_a_fault_costs_detection_restart_and_what_was_trained_again(tmp_path: Path) -> None:
    run = (
        MadeRun(a_home(tmp_path))
        .submit()
        .wait(1)
        .start()
        .train(10)
        .save()
        .train(6)
        .fault(detect=4, back_off=2)
    )
    run.wait(3).start(1, 6, step=10, part="restart").train(20).finish()
    made = check(run, 1e-4)
    cost = made.incident(1)
    assert cost["detection"] == pytest.approx(4)
    assert cost["lost"] == pytest.approx(6.4)
    assert cost["restart"] == pytest.approx(1 + 2 + 1 + 6)


@pytest.mark.parametrize(("kind", "rank"), [("hang", 1), ("rank_exit", 0)])
def test_a_fault_happened_when_the_verdict_of_its_incident_says_not_another(
    tmp_path: Path, kind: str, rank: int
) -> None:
    run = MadeRun(a_home(tmp_path)).submit().start().train(10)
    run.tell(VerdictFound(1, {"kind": kind, "rank": rank, "time": run.rank_time - 8}))
    check(run.fault(detect=4).start(1, 6, step=0, part="restart").train(20).finish(), 1e-4)


def test_preemption_idle_time_and_a_resume(tmp_path: Path) -> None:
    run = MadeRun(a_home(tmp_path)).submit().start().train(8).save().preempt(2).wait(30)
    run.start(1, 4, step=8, part="restart").train(5).save().cancel(1).idle(500)
    run.wait(2).start(1, 3, step=13).train(9).finish()
    made = check(run, 1e-4)
    assert made.seconds[TimePart.IDLE] == pytest.approx(500)
    assert made.seconds[TimePart.STARTUP] == pytest.approx(1 + 4 + 1 + 3)
    useful, waiting = made.seconds[TimePart.PRODUCTIVE], made.seconds[TimePart.WAITING]
    assert made.ettr == pytest.approx(useful / (made.wall - 500))
    assert waiting > 30 and made.ettr_held == pytest.approx(useful / (made.wall - 500 - waiting))


def test_a_save_that_goes_on_in_the_background_counts_what_it_held(tmp_path: Path) -> None:
    run = MadeRun(a_home(tmp_path)).submit().start().train(4).save(held=0.25, seconds=3.0).train(10).finish()
    check(run, 1e-4)


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_a_host_whose_clock_is_off_by_an_hour(tmp_path: Path, skew: float) -> None:
    check(MadeRun(a_home(tmp_path), skew=skew).submit().start().train(30).save().train(5).finish(), 0.01)


def test_a_wall_clock_that_steps_counts_no_second_twice(tmp_path: Path) -> None:
    run = MadeRun(a_home(tmp_path)).submit().start().train(20).save()
    run.jump = 3600.0
    run.save().train(20).save().finish()
    made = made_of(run, now=run.now + run.jump)
    assert sum(made.seconds.values()) == pytest.approx(run.now - 1_700_000_000.0, rel=1e-6)
    assert made.seconds[TimePart.PRODUCTIVE] == pytest.approx(40, abs=2)


def test_an_attempt_that_never_trained(tmp_path: Path) -> None:
    run = MadeRun(a_home(tmp_path)).submit().start()
    run.truth["lost_work"] = 0.0
    run.fault(begun=0.0, detect=5)
    run.start(1, 4, step=0, part="restart").train(12).finish()
    check(run, 0.01)


def test_a_run_that_goes_on_is_told_up_to_now(tmp_path: Path) -> None:
    run = MadeRun(a_home(tmp_path)).submit().start().train(30)
    made = made_of(run, now=run.now + 5)
    assert made.seconds[TimePart.PRODUCTIVE] == pytest.approx(35)
    made = made_of(run, now=run.now + 100)
    assert made.seconds[TimePart.DETECTION] == pytest.approx(90, abs=1), (
        "nobody has found yet why nothing comes"
    )
    assert sum(made.seconds.values()) == pytest.approx(made.wall)


def test_lines_that_were_joined_change_nothing(tmp_path: Path) -> None:
    run = MadeRun(a_home(tmp_path)).submit().start().train(400, 0.5).save().train(200, 0.5).fault()
    run.start(1, 4, step=400, part="restart").train(300, 0.5).finish()
    full, few = made_of(run), made_of(run, most=64)
    for part in TimePart:
        assert few.seconds[part] == pytest.approx(full.seconds[part], abs=0.02 * full.wall), part
    assert few.seconds[TimePart.PRODUCTIVE] == pytest.approx(full.seconds[TimePart.PRODUCTIVE], rel=0.005)


@pytest.mark.parametrize("seed", range(25))
def test_any_life_adds_up(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    run = MadeRun(a_home(tmp_path), steps=10_000).submit().wait(draw.uniform(0, 20))
    part, step = "startup", 0
    for _ in range(draw.randint(1, 5)):
        run.start(draw.uniform(0.5, 3), draw.uniform(2, 9), step=step, part=part).train(draw.randint(3, 9))
        for _ in range(draw.randint(0, 6)):
            act = draw.choice(["train", "save", "evaluate", "slow", "memory"])
            if act == "train":
                run.train(draw.randint(1, 20))
            elif act == "save":
                run.save(held := draw.uniform(0.1, 1.5), held + draw.uniform(0, 2))
            elif act == "memory":
                run.save(0.05, 0.05, "memory")
                run.saved = step if not run.kept else run.saved
            elif act == "evaluate":
                run.evaluate(draw.uniform(0.5, 4))
            else:
                run.train(draw.randint(1, 5), 1.0, 0.5)
        run.train(2)
        end = draw.choice(["fault", "preempt", "resume", "finish"])
        if end == "fault":
            run.fault(draw.uniform(0, 0.9), draw.uniform(0.5, 9), 1.0, draw.uniform(0, 5))
            part = "restart"
        elif end == "preempt":
            run.save().preempt(draw.uniform(0.5, 4))
            part = "restart"
        elif end == "resume":
            run.save().cancel().idle(draw.uniform(10, 900))
            part = "startup"
        else:
            break
        step = run.saved
        run.wait(draw.uniform(0, 30))
    else:
        run.start(1, 5, step=step, part=part).train(5)
    run.finish()
    check(run, 0.01)


def test_a_tape_never_goes_back() -> None:
    tape = PartitionBuilder(10.0)
    tape.append(12.0, TimePart.WAITING, 0)
    tape.append(11.0, TimePart.IDLE, 0)
    tape.extend(np.array([13.0, 12.5, 15.0]), np.array([0, 1, 2], dtype=np.int8), 1)
    cut = tape.build()
    assert sum(cut.totals().values()) == pytest.approx(5.0)
    assert cut.totals()[TimePart.IDLE] == 0.0
    assert cut.totals()[TimePart.EVALUATION] == 0.0
    assert cut.totals(1)[TimePart.PRODUCTIVE] == pytest.approx(1.0)


def test_spans_cover_all_and_stay_few(tmp_path: Path) -> None:
    run = (
        MadeRun(a_home(tmp_path))
        .submit()
        .wait(5)
        .start()
        .train(300, 1.0, 0.2)
        .save(2, 2)
        .train(100, 1.0, 0.2)
        .finish()
    )
    made = made_of(run)
    spans = made.partition.spans(50)
    assert len(spans) <= 50
    assert spans[0][0] == made.partition.edges[0]
    assert spans[-1][1] == pytest.approx(float(made.partition.edges[-1]))
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert max(spans, key=lambda s: s[1] - s[0])[2] is TimePart.PRODUCTIVE


def test_a_log_without_anything() -> None:
    made = ledger(RunHistory(), {}, 5.0)
    assert (made.wall, made.ettr, made.ettr_held) == (0.0, None, None)
    assert set(MEANINGS) == set(TimePart)


def test_an_attempt_on_fewer_nodes_has_its_own_ranks_and_layout() -> None:
    history = RunHistory()
    history.apply(events_of(*LIFE))
    assert [(one.ranks, one.layout) for one in history.attempts.values()] == [
        (4, {"dp": 4, "ep": 2}),
        (2, {"dp": 2}),
    ]


def test_a_run_that_is_cancelled_while_it_waits_has_that_on_its_timeline() -> None:
    history = RunHistory()
    history.apply(events_of(*LIFE[:2], StateMoved(State.CANCELLED, Reason.CANCEL_ASKED, "by ann")))
    assert [(mark.kind, mark.text) for mark in history.marks][-1] == ("cancel", "by ann")


# ---- parts of it alone ----


def test_steps_are_lost_from_the_earliest_step_that_any_later_attempt_began_at() -> None:
    """The third attempt fell back to an older checkpoint than the second had begun at."""
    begun = {1: 0, 2: 40, 3: 10, 4: 30}
    own: Any = SimpleNamespace(attempts={n: SimpleNamespace(resumed_step=step) for n, step in begun.items()})
    assert _lost_from(own, {}) == {3: 30, 2: 10, 1: 10}
    state: Any = SimpleNamespace(
        columns={n: SimpleNamespace(resumed=SimpleNamespace(step=step)) for n, step in begun.items()}
    )
    assert lost_after(state) == {3: 30, 2: 10, 1: 10}, "the curves show the same"


def test_compilation_in_the_first_step_is_start_up() -> None:
    time = np.array([10.0, 11.0, 12.0, 13.0, 14.0])
    busy = np.array([9.0, 1.0, 1.0, 1.0, 1.0])
    lines = AttemptLines(time, np.arange(1, 6), busy, begin=0)
    none, tape = np.empty(0), PartitionBuilder(0.0)
    shift: Any = lambda clocks: clocks  # noqa: E731
    _steps(tape, 1, lines, time, (none, none, none, none), TimePart.STARTUP, None, shift)
    seconds = tape.build().totals()
    assert seconds[TimePart.STARTUP] == 8.5 and seconds[TimePart.PRODUCTIVE] == 5.5, (
        "half more than usual, at most"
    )
