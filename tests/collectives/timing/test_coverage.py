"""Intervals as wide as they say: the whole procedure on simulated times of known mean, as often as it takes to see it."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from collectives.ops.operations import OPERATIONS
from collectives.store.results import Timing
from collectives.timing.clock import Stamps
from collectives.timing.measure import MeasurementSetup, Raw
from collectives.timing.statistics import Array, enough, half_width
from configs.compose import compose

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

TRIALS = 400
TYPICAL = 20.0
"""Microseconds of a usual call: a thousand of them take no time that anybody minds."""
Draw = Callable[[np.random.Generator, int], Array]


def iid(rng: np.random.Generator, count: int) -> Array:
    """Independent times with a tail, as a shared host's are."""
    return TYPICAL * rng.lognormal(-0.045, 0.3, count)


def correlated(rng: np.random.Generator, count: int) -> Array:
    """Each time remembers the one before: slow moments last for some calls (lag-1 correlation 0.8)."""
    noise, times = rng.standard_normal(count) * 0.6, np.zeros(count)
    times[0] = rng.standard_normal()
    for i in range(1, count):
        times[i] = 0.8 * times[i - 1] + noise[i]
    return TYPICAL * (1 + 0.1 * times)


def hiccups(rng: np.random.Generator, count: int) -> Array:
    """One call in a hundred takes ten times as long: an interrupt, a retransmission."""
    return TYPICAL * np.where(rng.random(count) < 0.01, 10.0, 1.0) * rng.normal(1, 0.02, count)


MEANS = {iid: TYPICAL, correlated: TYPICAL, hiccups: 1.09 * TYPICAL}


class SimulatedClock:
    """Times drawn instead of taken; of one rank."""

    name = "simulated"

    def __init__(self, draw: Draw, rng: np.random.Generator, comparable: bool = True) -> None:
        self.comparable, self._draw, self._rng = comparable, draw, rng

    def run(self, call: Any, count: int, before: Any) -> Stamps:
        ends = (self._draw(self._rng, count) * 1e3).astype(np.int64)
        return np.stack([np.zeros_like(ends), ends], axis=1)


class LoneTeam:
    """One rank, which decides for itself."""

    @property
    def tree(self) -> Any:
        return self

    def gather(self, array: np.ndarray) -> np.ndarray:
        return array[None]

    def broadcast_int(self, number: int) -> int:
        return int(number)


def measured(draw: Draw, rng: np.random.Generator, *words: str) -> Timing:
    """A case as `MeasurementSetup` times it, on simulated times."""
    settings = compose(["workload=collectives", *words]).collectives
    return by(settings, draw, rng)


def by(settings: Any, draw: Draw, rng: np.random.Generator) -> Timing:
    setup = MeasurementSetup(
        cast(Any, LoneTeam()), cast(Any, SimulatedClock(draw, rng)), settings, lambda: None
    )
    raw = setup.time(lambda: None, cast(Any, None))
    assert raw is not None
    return raw.timing(OPERATIONS["all_reduce"], 8, 2, settings, False)


@pytest.mark.parametrize("draw", [iid, correlated, hiccups], ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("confidence", [0.95, 0.9])
def test_a_95_percent_interval_covers_the_mean_95_times_of_100(draw: Draw, confidence: float) -> None:
    rng, settings = np.random.default_rng(5), compose(["workload=collectives"]).collectives
    settings = settings.model_copy(update={"confidence": confidence})
    timings = [by(settings, draw, rng) for _ in range(TRIALS)]
    covered = np.mean([abs(t.time_us - MEANS[draw]) <= t.ci_us for t in timings])
    assert confidence - 0.05 <= covered <= confidence + 0.03
    assert {t.calls for t in timings} == {1000}
    assert np.mean([t.ci_us / t.time_us for t in timings]) < 0.12  # and it says something


def bursts(draw: Draw, rng: np.random.Generator, settings: Any, size: int, count: int) -> Timing:
    """What a GPU gives: each value the mean of a burst of `size` calls, on each of four ranks that wait for each other."""
    means = draw(rng, size * count).reshape(count, size).mean(axis=1)
    ranks = means + rng.normal(0, 0.01 * TYPICAL, (4, count))
    single = np.zeros((4, 20, 2), dtype=np.int64)
    single[:, :, 1] = 25_000
    raw = Raw(single, False, 100.0, 5, np.ones(4, bool), ranks, size, True)
    return raw.timing(OPERATIONS["all_reduce"], 8, 4, settings, False)


@pytest.mark.parametrize("draw", [iid, correlated, hiccups], ids=lambda draw: draw.__name__)
def test_the_interval_of_replayed_graphs_counts_a_replay_once(draw: Draw) -> None:
    rng, settings = np.random.default_rng(6), compose(["workload=collectives"]).collectives
    timings = [bursts(draw, rng, settings, 20, 50) for _ in range(TRIALS)]
    covered = np.mean([abs(t.time_us - MEANS[draw]) <= t.ci_us for t in timings])
    assert 0.9 <= covered <= 0.98
    assert (timings[0].calls, timings[0].burst, timings[0].graph) == (1000, 20, True)


def test_few_replays_have_a_wide_interval_and_not_a_wrong_one() -> None:
    """`-n 20` and at most 20: five replays of four calls."""
    rng, settings = np.random.default_rng(7), compose(["workload=collectives"]).collectives
    timings = [bursts(iid, rng, settings, 4, 5) for _ in range(TRIALS)]
    assert 0.9 <= np.mean([abs(t.time_us - TYPICAL) <= t.ci_us for t in timings]) <= 0.98
    assert bursts(iid, rng, settings, 4, 4).ci_us == math.inf


# ---- what nccl-tests counts ----


def test_the_time_is_each_ranks_own_and_then_the_average_that_was_chosen() -> None:
    """By its `-a`: rank 0's, the mean, the least, the most; not the mean of the slowest ranks."""
    walls = np.array([[10.0, 14.0], [13.0, 13.0], [0.0, 0.0], [18.0, 10.0]])
    stamps = np.zeros((4, 3, 2), dtype=np.int64)
    stamps[:, :, 1] = [[20_000, 30_000, 40_000]] * 4
    raw = Raw(stamps, False, 1.0, 0, np.array([True, True, False, True]), walls, 7)
    means = {average: float(raw.series(average).mean()) for average in ("rank0", "mean", "min", "max")}
    assert means == {"rank0": 12, "mean": 13, "min": 12, "max": 14}
    timing = raw.timing(
        OPERATIONS["all_gather"], 1000, 3, compose(["workload=collectives"]).collectives, True
    )
    assert timing.time_us == pytest.approx(13)
    assert timing.alg_bw == pytest.approx(1000 / 1e9 / 13e-6)
    assert (timing.call_us, timing.p50_us, timing.calls, timing.burst) == (30, 30, 14, 7)


def test_back_to_back_calls_last_as_long_as_the_loop_over_them() -> None:
    """On comparable clocks: from the first call's begin to the last one's end, on each rank, by the number of calls."""
    edges = np.array([[0, 5_000, 9_000], [1_000, 4_000, 9_500]])
    stamps = np.stack([edges[:, :-1], edges[:, 1:]], axis=2)
    raw = Raw(stamps, True, 1.0, 0, np.ones(2, bool))
    walls = (edges[:, -1] - edges[:, 0]) / 2 / 1e3
    assert float(raw.series().mean()) == pytest.approx(walls.mean())
    assert raw.times().tolist() == [4.0, 4.5]


def test_idle_ranks_do_not_make_a_case_faster() -> None:
    stamps = np.array([[[0, 10_000]] * 6, [[0, 30]] * 6], dtype=np.int64)
    assert Raw(stamps, True, 1.0, 0, np.array([True, False])).series().mean() == 10.0


def test_a_barrier_is_left_early_within_its_group_alone() -> None:
    """Groups that run at once don't wait for each other, and an idle rank for nobody: each of them was counted as wrong."""
    ahead, behind, idle = [[0, 10], [10, 20]], [[50, 60], [60, 70]], [[0, 1], [1, 2]]
    raw = Raw(np.array([ahead, behind, ahead, behind, idle], dtype=np.int64), True, 1.0, 0, np.ones(5, bool))
    assert raw.left_early([(0, 2), (1, 3)]) == 0
    assert raw.left_early([(0, 1)]) == 2


def test_a_row_of_many_ranks_keeps_their_last_calls_alone() -> None:
    stamps = np.zeros((1024, 200, 2), dtype=np.int64)
    stamps[:, :, 1] = np.arange(200) * 1000
    raw = Raw(stamps, True, 1.0, 0, np.ones(1024, bool))
    timing = raw.timing(
        OPERATIONS["all_reduce"], 8, 1024, compose(["workload=collectives"]).collectives, False
    )
    assert {len(row) for row in timing.rank_times_us} == {9}
    assert timing.rank_times_us[0][-1] == 199.0
    assert len(timing.times_us) == timing.calls == 200


# ---- how many are enough ----


@pytest.mark.parametrize(
    ("pilot", "words", "count"),
    [
        ([20.0] * 6, {}, 1000),  # a second holds more than the most
        ([20.0] * 6, {"most": 300}, 300),
        ([20_000.0] * 6, {}, 50),  # a second
        ([500_000.0] * 6, {}, 20),  # the least
        ([20_000.0, 60_000.0] * 3, {}, 250),  # wide: as many as fit into the ten seconds
        ([20_000.0, 60_000.0] * 3, {"seconds": 2.0}, 50),
        ([], {}, 20),
        ([20.0] * 6, {"least": 5, "most": 5}, 5),
    ],
)
def test_how_many_calls_is_decided_before_they_are_timed(
    pilot: list[float], words: dict[str, Any], count: int
) -> None:
    settings = {"least": 20, "most": 1000, "seconds": 10.0, "precision": 0.02, "confidence": 0.95}
    assert enough(np.array(pilot), **(settings | words)) == count


def test_the_times_of_the_warm_up_are_not_those_of_the_mean() -> None:
    """They decide how many follow; were they in the mean, a narrow one would be chosen and believed."""
    seen: list[int] = []

    def draw(rng: np.random.Generator, count: int) -> Array:
        seen.append(count)
        return np.full(count, TYPICAL if sum(seen) > 40 else 90.0)

    timing = measured(
        draw, np.random.default_rng(0), "collectives.min_warmup=40", "collectives.max_warmup=40"
    )
    assert timing.warmup == 40
    assert timing.time_us == pytest.approx(TYPICAL)


def test_a_case_that_becomes_slow_is_cut_short() -> None:
    """A batch of a second at most, so that a rank shows that it is alive, and an end where far too much time is gone."""
    beats: list[float] = []
    now = SimpleNamespace(seconds=0.0)

    def draw(rng: np.random.Generator, count: int) -> Array:
        now.seconds += count * 0.5
        return np.full(count, 500_000.0 if now.seconds > 8 else 20.0)

    settings = compose(["workload=collectives", "collectives.seconds_per_size=2"]).collectives
    setup = MeasurementSetup(
        cast(Any, LoneTeam()), cast(Any, SimulatedClock(draw, np.random.default_rng(0))), settings,
        lambda: beats.append(now.seconds),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collectives.timing.measure.time", SimpleNamespace(monotonic=lambda: now.seconds))
        raw = setup.time(lambda: None, cast(Any, None))
    assert raw is not None
    assert 20 <= len(raw.times()) < 100
    assert max(after - before for before, after in zip(beats, beats[1:], strict=False)) <= 10.0


def test_an_interval_of_few_values_is_not_known() -> None:
    assert half_width(np.arange(4.0), 0.95) == math.inf
    assert half_width(np.arange(5.0), 0.95) == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=0.01)
    assert half_width(np.full(25, 3.0), 0.95) == 0.0
