"""The interval between saves, against Daly's formula, a search for the optimum and failures played at random."""

from __future__ import annotations

import math
import random

import pytest

from faulttol.checkpoint.interval import interval, lost_seconds, mtbf, optimum

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

MOST = 1_000_000


def steps(step: float, held: float, durable: float, between: float, budget: float = 0.5) -> int:
    return interval(step, held, durable, between, budget, 1, MOST).steps


def wall(train: float, held: float, between: float) -> float:
    """Daly's equation 20: expected time over training time, for segments of `train` seconds and no restart time."""
    return between * math.expm1((train + held) / between) / train


@pytest.mark.parametrize("held", [0.02, 1.0, 33.0, 300.0])
@pytest.mark.parametrize("between", [1800.0, 86400.0])
def test_it_is_the_optimum_of_the_expected_time(held: float, between: float) -> None:
    best = optimum(held, between)
    least = min(wall(best * factor, held, between) for factor in (x / 1000 for x in range(300, 3000)))
    assert wall(best, held, between) <= least * 1.0005
    assert wall(best * 1.5, held, between) > wall(best, held, between) < wall(best / 1.5, held, between)


def test_short_saves_give_youngs_square_root() -> None:
    assert optimum(0.5, 1e6) == pytest.approx(math.sqrt(2 * 0.5 * 1e6), rel=1e-3)
    assert steps(0.1, 0.5, 0.5, 1e6) == pytest.approx(10 * math.sqrt(1e6), rel=1e-3)
    assert optimum(60.0, 3600.0) == pytest.approx(
        657.27 * (1 + math.sqrt(1 / 120) / 3 + 1 / 1080) - 60, rel=1e-4
    )


def test_a_save_that_holds_longer_than_runs_live_takes_the_time_between_failures() -> None:
    assert optimum(10.0, 5.0) == 5.0 == optimum(1e9, 5.0)
    assert optimum(0.0, 100.0) == 0.0 and steps(1.0, 0.0, 0.0, 100.0) == 1


def test_the_budget_bounds_what_saves_hold() -> None:
    made = interval(0.1, 3.0, 3.0, 600.0, 0.02, 1, MOST)
    assert 3.0 / (made.steps * 0.1 + 3.0) <= 0.02 < 3.0 / ((made.steps - 1) * 0.1 + 3.0)
    assert "checkpoint.budget=0.02" in made.reason and "raised to 1470" in made.reason
    free = interval(0.1, 3.0, 3.0, 600.0, 0.5, 1, MOST)
    assert free.steps == round(optimum(3.0, 600.0) / 0.1) and "raised" not in free.reason


def test_one_save_is_committed_before_the_next() -> None:
    made = interval(0.1, 5.0, 400.0, 900.0, 0.5, 1, MOST)
    assert made.steps * 0.1 + 5.0 >= 400.0 > (made.steps - 1) * 0.1 + 5.0
    assert "400 s to commit" in made.reason


def test_the_bounds_hold_and_the_most_wins() -> None:
    assert interval(1.0, 1.0, 1.0, 100.0, 0.5, 50, MOST).steps == 50
    made = interval(1.0, 1.0, 500.0, 1e6, 0.5, 1, 30)
    assert made.steps == 30 and "lowered to 30" in made.reason


def test_a_whole_quotient_is_not_rounded_up() -> None:
    assert interval(0.1, 0.0, 0.3, 1e-6, 0.5, 1, MOST).steps == 3


@pytest.mark.parametrize(
    "numbers", [(0.0, 1.0, 1.0, 1.0), (1.0, -1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 0.0), (math.nan, 1.0, 1.0, 1.0),
                (1.0, 1.0, math.inf, 1.0), (1.0, 1.0, -1.0, 1.0)],
)  # fmt: skip
def test_numbers_that_cannot_be(numbers: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="finite and positive"):
        interval(*numbers, 0.05, 1, MOST)


@pytest.mark.parametrize(("budget", "least", "most"), [(0.0, 1, 9), (1.0, 1, 9), (0.1, 0, 9), (0.1, 9, 8)])
def test_bounds_that_cannot_be(budget: float, least: int, most: int) -> None:
    with pytest.raises(ValueError, match="budget="):
        interval(1.0, 1.0, 1.0, 1.0, budget, least, most)


def test_the_reason_tells_the_numbers() -> None:
    reason = interval(0.5, 0.3, 12.0, 86400.0, 0.05, 1, MOST).reason
    for word in ("455 steps of 0.5 s", "0.3 s held", "24 h between failures", "costs 2.1 min"):
        assert word in reason


def test_what_was_met_corrects_what_was_assumed() -> None:
    assert mtbf(24.0, 0, 0.0) == 24.0
    assert mtbf(24.0, 0, 240.0) == 264.0, "luck is trusted as far as it goes"
    assert mtbf(24.0, 99, 76.0) == 1.0
    assert mtbf(24.0, 999, 9976.0) == 10.0, "much evidence outweighs the assumption"
    for wrong in ((0.0, 0, 1.0), (1.0, -1, 1.0), (1.0, 0, -1.0)):
        with pytest.raises(ValueError, match="prior_hours"):
            mtbf(*wrong)


# ---- played ----


def play(every: int, held: float, durable: float, between: float, failures: int) -> tuple[float, float]:
    """Steps of a second, saves beside them and failures at random: share of the time that was useful, and mean seconds
    of work lost by a failure."""
    dice = random.Random(7)
    now, useful, lost = 0.0, 0.0, 0.0
    for _ in range(failures):
        left = dice.expovariate(1 / between)
        now += left
        cycle = every + held
        # The state as of the call that begins cycle k's save lies at k * cycle and counts `durable` later.
        saves = int(max(0.0, left - every - durable) // cycle) + 1 if left >= every + durable else 0
        kept = saves * every
        useful += kept
        done, rest = divmod(left, cycle)
        trained = done * every + min(rest, every)
        lost += trained - kept
    return useful / now, lost / failures


def test_played_failures_lose_what_was_predicted() -> None:
    held, durable, between = 2.0, 11.0, 5000.0
    chosen = interval(1.0, held, durable, between, 0.5, 1, MOST).steps
    _, lost = play(chosen, held, durable, between, 40_000)
    assert lost == pytest.approx(lost_seconds(chosen, 1.0, held, durable), rel=0.05)


def test_played_failures_find_no_better_interval() -> None:
    held, durable, between = 4.0, 9.0, 2000.0
    chosen = interval(1.0, held, durable, between, 0.5, 1, MOST).steps
    best = play(chosen, held, durable, between, 40_000)[0]
    for factor in (0.5, 0.7, 1.4, 2.0):
        assert play(round(chosen * factor), held, durable, between, 40_000)[0] < best
