"""The run forecast on real logs of the demo's kind, and on losses whose law is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.metrics import MetricWriter, StepLine
from configs.paths import RunPaths
from tests.trainer.sizing.bench_forecast import diverging
from trainer.cli import main
from trainer.sizing.forecast import END, StepHistory, detect_alarm, fit, forecast, read_history, report

pytestmark = pytest.mark.unit

#: Losses of six runs of the demo's kind, 400 and 600 steps, each with its own seed.
RUNS = json.loads(Path(__file__).with_name("losses.json").read_text())


def real(name: str) -> tuple[StepHistory, int]:
    """A run's log, and its steps of warm-up."""
    run = RUNS[name]
    steps = np.arange(1, len(run["loss"]) + 1, dtype=float)
    return StepHistory(steps, steps * run["tokens_per_step"], np.array(run["loss"])), run["warmup"]


def lawful(seed: int, steps: int = 1000, exponent: float = 0.4, noise: float = 0.05) -> StepHistory:
    """A known law with noise that is alike from step to step."""
    rng = np.random.default_rng(seed)
    white = rng.normal(0, noise, steps)
    alike = np.zeros(steps)
    for i in range(steps):
        alike[i] = 0.7 * alike[i - 1] + math.sqrt(1 - 0.49) * white[i]
    at = np.arange(1, steps + 1, dtype=float)
    return StepHistory(at, 512 * at, 1.5 + 4 * at**-exponent + alike)


def final_loss(history: StepHistory) -> float:
    end = int(history.steps[-1])
    return float(history.after(end * (1 - END)).loss.mean())


@pytest.mark.parametrize("name", RUNS)
def test_the_end_of_a_real_run_is_forecast_from_two_fifths_of_it(name: str) -> None:
    history, warmup = real(name)
    end = int(history.steps[-1])
    at = history.until(0.4 * end)
    final = forecast(at, warmup, end).final
    now = float(at.after(0.35 * end).loss.mean())
    assert abs(final.value - final_loss(history)) < max(0.3, 0.9 * (now - final_loss(history)))
    assert final.low < final.value < final.high and final.value < now


def test_the_band_covers_the_real_ends_about_as_often_as_it_says() -> None:
    inside = 0
    for name in RUNS:
        history, warmup = real(name)
        end = int(history.steps[-1])
        for share in (0.4, 0.6, 0.8):
            final = forecast(history.until(share * end), warmup, end).final
            inside += final.low <= final_loss(history) <= final.high
    assert 14 <= inside <= 18  # of 18 at 90 %


def test_a_known_law_is_found_and_its_band_covers() -> None:
    inside, widths, misses = 0, [], []
    for seed in range(20):
        history = lawful(seed)
        final = forecast(history.until(500), 20, 1000).final
        truth = final_loss(history)
        inside += final.low <= truth <= final.high
        widths.append(final.high - final.low)
        misses.append(final.value - truth)
    assert inside >= 15
    assert float(np.median(widths)) < 0.15, "a band that covers everything says nothing"
    assert abs(float(np.mean(misses))) < 0.02


def test_the_forecast_is_the_laws_mean_over_the_last_twentieth() -> None:
    made = forecast(lawful(3).until(500), 20, 1000)
    laws = made.laws
    end = np.arange(951, 1001) * 512
    mean = (laws.floor[0] + laws.scale[0] * (end / laws.unit) ** -laws.exponent[0]).mean()
    assert made.final.value == pytest.approx(mean, rel=1e-12)


def test_the_band_narrows_as_the_run_goes_on() -> None:
    history = lawful(3)
    widths = [(f := forecast(history.until(share), 20, 1000).final).high - f.low for share in (200, 400, 800)]
    assert widths[0] > widths[1] > widths[2]


def test_alike_neighbours_widen_the_band() -> None:
    """Noise of the same size that isn't alike says more, so a bootstrap of single steps would be too sure."""
    rng = np.random.default_rng(5)
    at = np.arange(1, 1001, dtype=float)
    white = StepHistory(at, 512 * at, 1.5 + 4 * at**-0.4 + rng.normal(0, 0.05, 1000))
    assert fit(lawful(5), 20).noise > 1.4 * fit(white, 20).noise


@pytest.mark.parametrize("name", RUNS)
def test_a_divergence_alarms_and_the_healthy_run_does_not(name: str) -> None:
    history, warmup = real(name)
    end = int(history.steps[-1])
    assert detect_alarm(history, warmup, end) is None
    alarm = detect_alarm(diverging(history), warmup, end)
    assert alarm is not None and 0.7 * end - end / 20 < alarm.step < 0.7 * end + end / 6
    assert alarm.loss > alarm.limit > alarm.expected and f"step {alarm.step}" in str(alarm)


def test_a_loss_that_is_no_number_alarms_at_its_step() -> None:
    history = lawful(1)
    history.loss[599] = float("nan")
    alarm = detect_alarm(history, 20, 1000)
    assert alarm is not None and alarm.step == 600


def test_an_alarm_comes_with_the_last_step_that_it_needs() -> None:
    """The second window outside, whole; a loss that isn't a number needs none."""
    history = lawful(1, steps=400)
    history.loss[150:] += 2.0
    alarm = detect_alarm(history, 20, 400)
    assert alarm is not None
    whole = alarm.step - 1 + 2 * 10  # a window is a fortieth of the run
    assert (
        detect_alarm(history.until(whole), 20, 400) == alarm
        and detect_alarm(history.until(whole - 1), 20, 400) is None
    )
    history.loss[150:] = float("nan")
    broken = detect_alarm(history.until(151), 20, 400)
    assert broken is not None and broken.step == 151


def test_one_spike_that_passes_does_not_alarm() -> None:
    history = lawful(1)
    history.loss[600:606] += 2.0
    assert detect_alarm(history, 20, 1000) is None


def test_a_flat_loss_is_forecast_flat() -> None:
    rng = np.random.default_rng(2)
    at = np.arange(1, 401, dtype=float)
    made = forecast(StepHistory(at, at * 512, 3 + rng.normal(0, 0.02, 400)), 20, 800)
    assert abs(made.final.value - 3) < 0.02 and np.isfinite(made.final.high)


def test_too_little_is_refused_with_what_to_wait_for() -> None:
    with pytest.raises(UserError, match=r"needs 40: wait for more"):
        forecast(lawful(0).until(50), 20, 1000)


def written(folder: Path, attempts: list[tuple[int, int, float]]) -> RunPaths:
    """A run's folder with step lines of a law: (first step, last step, what is added to the loss) of each attempt."""
    run = RunPaths(folder)
    base = lawful(0)
    for number, (first, last, extra) in enumerate(attempts, start=1):
        writer = MetricWriter(run.attempt(number).metrics)
        for step in range(first, last + 1):
            loss = float(base.loss[step - 1]) + extra
            writer.write(
                StepLine(
                    0.0, number, step, loss, 0.0, 1e-3, 1.0, 512 * step, 1.0, 1.0, {}, None, [], 1.0, 0, 0
                )
            )
        writer.close()
    return run


def test_an_attempt_that_resumes_replaces_what_was_lost(tmp_path: Path) -> None:
    history = read_history(written(tmp_path, [(1, 120, 9.0), (81, 200, 0.0)]))
    assert list(history.steps) == list(range(1, 201))
    assert history.loss[79] > 9 > history.loss[80]


def test_the_command_prints_forecast_law_and_alarm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path, [(1, 500, 0.0)])
    assert main(["forecast", str(run.root), "--steps", "1000", "--warmup", "20"]) == 0
    out = capsys.readouterr().out
    assert "step 500 of 1000 (50%)" in out and "90% between" in out and "no alarm" in out
    assert "fitted to steps 26 to 500" in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "config.yaml is not there; type --steps N --warmup N"),
        (["--steps", "0"], "not a whole number above 0"),
        (["--steps", "100", "--warmup", "5"], "has no training steps on record"),
        (["--steps", "100", "--warmup", "5", "more"], "one word too many"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    assert main(["forecast", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_the_report_says_what_a_figure_was_made_from(tmp_path: Path) -> None:
    lines = report(written(tmp_path, [(1, 400, 0.0)]).root, 1000, 20)
    assert any("200 draws of blocks of residuals" in line for line in lines)
