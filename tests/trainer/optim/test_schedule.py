"""Learning rates against tables, and the growing batch against sums by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from configs.training import OptimConfig, TrainConfig
from trainer.optim.schedule import consumed_samples, global_batch_size, learning_rate

pytestmark = pytest.mark.unit

TABLES = {
    # lr 1, min_lr 0.1, 4 steps of warm-up, 12 steps.
    "constant": [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "linear": [0.25, 0.5, 0.75, 1, *(1 - 0.9 * i / 7 for i in range(8))],
    "wsd": [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1],
    # cos(pi i / 7) of i = 0 … 7
    "cosine": [
        0.25, 0.5, 0.75, 1,
        *(0.55 + 0.45 * c for c in (
            1, 0.9009688679, 0.6234898019, 0.2225209340, -0.2225209340, -0.6234898019, -0.9009688679, -1,
        )),
    ],
}  # fmt: skip


def optim(schedule: str, **fields: object) -> OptimConfig:
    decay = {"decay_steps": 3} if schedule == "wsd" else {}
    given = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4} | decay | fields
    return OptimConfig(schedule=schedule, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", TABLES)
def test_rates_follow_the_table(schedule: str) -> None:
    rates = [learning_rate(optim(schedule), step, 12) for step in range(12)]
    assert rates == pytest.approx(TABLES[schedule], abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "wsd", "cosine"])
def test_a_step_past_the_end_keeps_the_last_rate(schedule: str) -> None:
    assert learning_rate(optim(schedule), 40, 12) == pytest.approx(0.1)


def test_wsd_decays_over_a_tenth_where_nothing_is_said() -> None:
    rates = [learning_rate(optim("wsd", decay_steps=None), step, 40) for step in range(40)]
    assert rates[35] == 1 and rates[36:] == pytest.approx([0.775, 0.55, 0.325, 0.1])
    assert learning_rate(optim("wsd", decay_steps=None, warmup_steps=0), 4, 5) == pytest.approx(0.1)


def test_there_may_be_no_warm_up_or_only_one() -> None:
    assert learning_rate(optim("cosine", warmup_steps=0), 0, 12) == 1
    assert [learning_rate(optim("linear", warmup_steps=4), step, 4) for step in range(4)] == [
        0.25,
        0.5,
        0.75,
        1,
    ]


def test_the_batch_grows_as_the_table_says() -> None:
    train = TrainConfig(global_batch=32, ramp_batch=8, ramp_steps=6)
    assert [global_batch_size(train, step) for step in range(8)] == [8, 8, 16, 24, 24, 32, 32, 32]


def test_without_a_ramp_every_step_has_the_batch() -> None:
    train = TrainConfig(global_batch=32)
    assert global_batch_size(train, 0) == 32 and consumed_samples(train, 7) == 7 * 32


@pytest.mark.parametrize(
    ("batch", "first", "ramp"),
    [(32, 8, 6), (32, 8, 0), (32, 8, 1), (32, 32, 5), (96, 2, 7), (60, 4, 45), (40, 8, 3), (12, 1, 12)],
)
def test_samples_before_a_step_are_the_sum_of_the_steps(batch: int, first: int, ramp: int) -> None:
    train = TrainConfig(global_batch=batch, ramp_batch=first, ramp_steps=ramp)
    total = 0
    for step in range(70):
        assert consumed_samples(train, step) == total, step
        size = global_batch_size(train, step)
        assert size % first == 0 and first <= size <= batch and (size == batch or step < ramp)
        total += size


def test_a_long_run_is_summed_at_once() -> None:
    train = TrainConfig(global_batch=4096, ramp_batch=64, ramp_steps=10**9)
    # A million times as many steps at each of the 64 sizes as at the ramp of a thousandth of that.
    short = TrainConfig(global_batch=4096, ramp_batch=64, ramp_steps=64)
    assert consumed_samples(train, 10**9) == consumed_samples(short, 64) * 10**9 // 64


def test_the_schedule_loads_no_torch() -> None:
    code = "import sys, trainer.optim.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
