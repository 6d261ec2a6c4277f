"""What must change to fit, how many devices finish in time, what another device would do."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest

from configs.compose import compose
from configs.errors import UserError
from trainer.sizing.ask import questions
from trainer.sizing.ask.fit import fit
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
    return TrainingJob(model, layout, 4096, micro_batch, 1024, "bf16", zero=1, software=frameworks.megaray())


def task(ranks: int = 64) -> Task:
    return Task(
        compose(["model=mixtral_8x7b"]).model, ranks, 4096, 1024, software=frameworks.megaray(), zero=(1,)
    )


def test_changes_that_fit_come_first_and_do_fit() -> None:
    h100 = compose(["hardware=h100"]).hardware
    answer = fit(mixtral(64), h100)
    assert not answer.fits and answer.changes[0].fits
    assert [change.fits for change in answer.changes] == sorted(
        (c.fits for c in answer.changes), reverse=True
    )
    for change in answer.changes:
        needed = memory.worst(change.job, "cuda")[1].needed
        assert change.saves == pytest.approx(answer.needed - needed) and change.fits == (
            needed <= answer.have
        )
        assert legal.is_legal(change.job) and change.job.layout.ranks == 64 and change.names
    fitting = [change.cost for change in answer.changes if change.fits]
    assert fitting == sorted(fitting, key=lambda cost: cost or 0.0)
    assert "saves" in answer.text()[1] and "step time" in answer.text()[1]


def test_a_job_that_fits_needs_no_change() -> None:
    answer = fit(mixtral(64, 1), compose(["hardware=mi355x"]).hardware)
    assert answer.fits and answer.changes == () and answer.text()[0].startswith("fits")


def test_where_no_change_is_enough_the_ranks_are_told() -> None:
    answer = fit(mixtral(8), compose(["hardware=h100"]).hardware)
    assert answer.other and answer.other.layout.ranks in (8, 16, 32, 64)
    assert memory.worst(answer.other, "cuda")[1].needed <= memory.capacity(
        compose(["hardware=h100"]).hardware
    )
    assert f"{answer.other.layout.ranks} ranks fit with" in answer.text()[-1]
    assert not any(change.fits for change in answer.changes)


def test_without_a_size_nothing_can_be_said() -> None:
    with pytest.raises(UserError, match="hardware=cpu has no memory on record"):
        fit(mixtral(8), compose(["hardware=cpu"]).hardware)


def test_the_fewest_devices_in_time() -> None:
    h100 = compose(["hardware=h100"]).hardware
    answer = questions.fewest_devices(task(), h100, 2e11, 30 * DAY)
    assert answer.expected and answer.duration and answer.duration.value <= 30 * DAY
    number = answer.expected.job.layout.ranks
    assert (
        answer.optimistic is not None
        and answer.optimistic <= number
        and (answer.conservative is None or answer.conservative >= number)
    )
    half = questions.fewest_devices(task(), h100, 1e11, 30 * DAY)
    assert half.expected and half.expected.job.layout.ranks <= number
    assert str(number) in answer.text()[0]


def test_what_no_number_of_devices_can_do() -> None:
    answer = questions.fewest_devices(
        replace(task(), global_batch=8), compose(["hardware=h100"]).hardware, 1e13, DAY
    )
    assert answer.expected is None and "not on up to" in answer.text()[0]


@pytest.mark.parametrize(
    ("hardware", "seconds", "reason"), [("cpu", DAY, "cpu has no bf16 rate"), ("h100", -1.0, "has passed")]
)
def test_refusals(hardware: str, seconds: float, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        questions.fewest_devices(task(), compose([f"hardware={hardware}"]).hardware, 1e9, seconds)


@pytest.mark.parametrize(("text", "day"), [("friday", 27), ("wednesday", 25), ("2026-11-30", 30), ("2d", 27)])
def test_dates(text: str, day: int) -> None:
    assert questions.parse_deadline(text, NOW).day == day


@pytest.mark.parametrize(
    ("text", "reason"), [("soon", "--by soon is not a date"), ("2026-11-01", "--by 2026-11-01 has passed")]
)
def test_wrong_dates(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        questions.parse_deadline(text, NOW)


def test_another_device() -> None:
    here, there = (compose([f"hardware={name}"]).hardware for name in ("h100", "mi300x"))
    answer = questions.compare_devices(mixtral(64), task(), here, there)
    assert answer.here.fits is False and answer.there.fits is True
    assert answer.here.best and answer.there.best and memory.fits(answer.there.best.job, there)
    text = "\n".join(answer.text())
    assert "mi300x: " in text and "does not fit" in text and "times as fast" in text
    unknown = questions.compare_devices(mixtral(64), task(), here, compose(["hardware=cpu"]).hardware)
    assert isinstance(unknown.there.step, str) and "unknown: cpu" in "\n".join(unknown.text())


def test_selective_recomputation_is_among_the_changes() -> None:
    """This trainer's makes MLP and experts again, which saves memory with fused attention too."""
    h100, made = compose(["hardware=h100"]).hardware, mixtral(64)
    selective = replace(made, recompute="selective")
    saves = memory.worst(made, "cuda")[1].needed - memory.worst(selective, "cuda")[1].needed
    changes = {change.names: change for change in fit(made, h100).changes}
    assert changes["train.recompute=selective",].saves == pytest.approx(saves) and saves > 0
    older = replace(made, software=replace(made.software, selective="attention"))
    names = {name for change in fit(older, h100).changes for name in change.names}
    assert "train.recompute=selective" not in names


def test_changes_are_what_is_typed() -> None:
    chunked = replace(mixtral(8), layout=Layout(2, 8, 1, 8, 1, 1), interleave=4)
    changes = fit(chunked, compose(["hardware=h100"]).hardware).changes
    typed = [name for change in changes for name in change.names]
    assert "parallel.schedule=1f1b" in typed and "parallel.chunks=1" in typed
    compose(["model=mixtral_8x7b", *typed])
