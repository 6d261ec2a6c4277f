"""The planner's questions as `size` asks them: from what was typed to lines, figures and plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from configs.errors import UserError
from trainer.sizing.ask import catalogue, questions
from trainer.sizing.ask.answer import SizingAnswer
from trainer.sizing.figures import Figure
from trainer.sizing.search import auto
from trainer.sizing.search.legal import Task

_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question and its answer."""

    title: str
    lines: Sequence[str]
    figures: tuple[Figure, ...]
    data: dict[str, Any]


def to_fit(answer: SizingAnswer) -> AnsweredQuestion:
    """What must change for the job to fit.

    Raises:
        UserError: where the device's memory is unknown.
    """
    fit = questions.fit(answer.job, answer.prices.hardware)
    changes = [
        {"set": list(one.names), "saves_bytes": one.saves, "step_time": one.cost, "fits": one.fits}
        for one in fit.changes
    ]
    data = {"needed_bytes": fit.needed, "have_bytes": fit.have, "fits": fit.fits, "changes": changes,
            "layout_that_fits": fit.other.layout.to_json() if fit.other else None}  # fmt: skip
    return AnsweredQuestion("WHAT MUST CHANGE TO FIT", fit.text(), (), {"fit": data})


def in_time(answer: SizingAnswer, deadline: str, tokens: str, now: datetime) -> AnsweredQuestion:
    """How many devices train so many tokens by a date.

    Raises:
        UserError: for no date, no number, or a device whose rates are unknown.
    """
    seconds = (questions.deadline(deadline, now) - now).total_seconds()
    devices = questions.enough(_task(answer), answer.prices.hardware, amount(tokens), seconds)
    ranks = devices.expected.job.layout.ranks if devices.expected else None
    data = {
        "devices": ranks,
        "to_be_sure": devices.safe,
        "with_luck": devices.luck,
        "seconds": seconds,
        "tokens": devices.tokens,
    }
    figures = (devices.duration,) if devices.duration else ()
    return AnsweredQuestion(f"HOW MANY DEVICES BY {deadline}", devices.text(), figures, {"by": data})


def elsewhere(answer: SizingAnswer, name: str) -> AnsweredQuestion:
    """What the same job would be on another device.

    Raises:
        UserError: where there is no such device.
    """
    compared = questions.other(answer.job, _task(answer), answer.prices.hardware, catalogue.device(name))
    sides = (compared.here, compared.there)
    figures = tuple(
        replace(side.step, name=f"on.{side.hardware}.step") for side in sides if isinstance(side.step, Figure)
    )
    data = {
        side.hardware: {
            "needed_bytes": side.needed, "fits": side.fits,
            "step_seconds": side.step.value if isinstance(side.step, Figure) else None,
            "best_layout": side.best.job.layout.to_json() if side.best else None,
            "best_seconds": side.best.seconds if side.best else None,
        }
        for side in sides
    }  # fmt: skip
    return AnsweredQuestion(f"WHAT {name} WOULD DO", compared.text(), figures, {"on": data})


def _task(answer: SizingAnswer) -> Task:
    """The job's task with its layout open."""
    config, job = answer.config, answer.job
    made = auto.task(config, job.layout.ranks, job.node)
    return replace(made, fixed={}, global_batch=job.global_batch)


def amount(text: str) -> float:
    """`300B`, `1.5T` or `3e11` as a number.

    Raises:
        UserError: for anything else.
    """
    number, factor = (text[:-1], _UNITS[text[-1:].upper()]) if text[-1:].upper() in _UNITS else (text, 1.0)
    try:
        value = float(number) * factor
    except ValueError:
        value = 0.0
    if not 0 < value < 1e18:
        raise UserError(f"--tokens {text} is not a number of tokens; type e.g. 300B, 1.5T or 3e11")
    return value
