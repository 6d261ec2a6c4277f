"""What must change to fit, how many devices finish in time, what another device would do."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest

from configs.compose import compose
from configs.errors import UserError
from trainer.sizing.ask import questions
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model import frameworks
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import legal
from trainer.sizing.search.legal import Task

pytestmark = pytest.mark.unit

NOW = datetime(2026, 11, 25, 18, 0)  # a Wednesday
DAY = 86400.0


def mixtral(dp: int, micro_batch: int = 2) -> TrainingJob:
    model = compose(["model=mixtral_8x7b"]).model
    layout = Layout(1, dp, 1, 8, 1, 1)
    return TrainingJob(model, layout, 4096, micro_batch, 1024, "bf16", zero=1, software=frameworks.own())


def task(ranks: int = 64) -> Task:
    return Task(
        compose(["model=mixtral_8x7b"]).model, ranks, 4096, 1024, software=frameworks.own(), zero=(1,)
    )


def test_changes_that_fit_come_first_and_do_fit() -> None:
    h100 = compose(["hardware=h100"]).hardware
    found = questions.fit(mixtral(64), h100)
    assert not found.fits and found.changes[0].fits
    assert [change.fits for change in found.changes] == sorted((c.fits for c in found.changes), reverse=True)
    for change in found.changes:
        needed = memory.worst(change.job, "cuda")[1].needed
        assert change.saves == pytest.approx(found.needed - needed) and change.fits == (needed <= found.have)
        assert legal.is_legal(change.job) and change.job.layout.ranks == 64 and change.names
    fitting = [change.cost for change in found.changes if change.fits]
    assert fitting == sorted(fitting, key=lambda cost: cost or 0.0)
    assert "saves" in found.text()[1] and "step time" in found.text()[1]


def test_a_job_that_fits_needs_no_change() -> None:
    found = questions.fit(mixtral(64, 1), compose(["hardware=mi355x"]).hardware)
    assert found.fits and found.changes == () and found.text()[0].startswith("fits")


def test_where_no_change_is_enough_the_ranks_are_told() -> None:
    found = questions.fit(mixtral(8), compose(["hardware=h100"]).hardware)
    assert found.other and found.other.layout.ranks in (8, 16, 32, 64)
    assert memory.worst(found.other, "cuda")[1].needed <= memory.capacity(compose(["hardware=h100"]).hardware)
    assert f"{found.other.layout.ranks} ranks fit with" in found.text()[-1]
    assert not any(change.fits for change in found.changes)


def test_without_a_size_nothing_can_be_said() -> None:
    with pytest.raises(UserError, match="hardware=cpu has no memory on record"):
        questions.fit(mixtral(8), compose(["hardware=cpu"]).hardware)


def test_the_fewest_devices_in_time() -> None:
    h100 = compose(["hardware=h100"]).hardware
    found = questions.enough(task(), h100, 2e11, 30 * DAY)
    assert found.expected and found.duration and found.duration.value <= 30 * DAY
    number = found.expected.job.layout.ranks
    assert found.luck is not None and found.luck <= number and (found.safe is None or found.safe >= number)
    half = questions.enough(task(), h100, 1e11, 30 * DAY)
    assert half.expected and half.expected.job.layout.ranks <= number
    assert str(number) in found.text()[0]


def test_what_no_number_of_devices_can_do() -> None:
    found = questions.enough(replace(task(), global_batch=8), compose(["hardware=h100"]).hardware, 1e13, DAY)
    assert found.expected is None and "not on up to" in found.text()[0]


@pytest.mark.parametrize(
    ("hardware", "seconds", "told"), [("cpu", DAY, "cpu has no bf16 rate"), ("h100", -1.0, "has passed")]
)
def test_refusals(hardware: str, seconds: float, told: str) -> None:
    with pytest.raises(UserError, match=told):
        questions.enough(task(), compose([f"hardware={hardware}"]).hardware, 1e9, seconds)


@pytest.mark.parametrize(("text", "day"), [("friday", 27), ("wednesday", 25), ("2026-11-30", 30), ("2d", 27)])
def test_dates(text: str, day: int) -> None:
    assert questions.deadline(text, NOW).day == day


@pytest.mark.parametrize(("text", "told"), [("soon", "is not a date"), ("2026-11-01", "has passed")])
def test_wrong_dates(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        questions.deadline(text, NOW)


def test_another_device() -> None:
    here, there = (compose([f"hardware={name}"]).hardware for name in ("h100", "mi300x"))
    found = questions.other(mixtral(64), task(), here, there)
    assert found.here.fits is False and found.there.fits is True
    assert found.here.best and found.there.best and memory.fits(found.there.best.job, there)
    told = "\n".join(found.text())
    assert "mi300x: " in told and "does not fit" in told and "times as fast" in told
    unknown = questions.other(mixtral(64), task(), here, compose(["hardware=cpu"]).hardware)
    assert isinstance(unknown.there.step, str) and "unknown: cpu" in "\n".join(unknown.text())
