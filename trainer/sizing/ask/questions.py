"""What people ask a planner besides: how many devices finish in time, and what another device would do.

Each answer has a title, says itself in lines, and has figures to ask about. Pure: the time is an argument.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from configs.errors import UserError
from configs.hardware import HardwareConfig
from trainer.sizing.ask.answer import SizingAnswer
from trainer.sizing.ask.fit import MemoryFit, changed_settings
from trainer.sizing.figures import Figure
from trainer.sizing.memory import estimate as memory
from trainer.sizing.memory.estimate import GIB
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.search import auto, legal
from trainer.sizing.search.layouts import Candidate, label, search
from trainer.sizing.search.legal import Task
from trainer.sizing.time import step

DAY = 86400
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def task(answer: SizingAnswer) -> Task:
    """The job's task with its layout open."""
    made = auto.task(answer.config, answer.job.layout.ranks, answer.job.node)
    return replace(made, fixed={}, global_batch=answer.job.global_batch)


@dataclass(frozen=True)
class DeviceCount:
    """How many devices finish by a deadline."""

    seconds: float
    """Until the deadline."""
    tokens: float
    most: int
    """The most that were looked at: the batch divides over no more, or 16,384."""
    expected: Candidate | None = None
    """The fewest that finish by the expected step time; None where none does."""
    conservative: int | None = None
    """The fewest that finish even by the slow end of its interval."""
    optimistic: int | None = None
    """The fewest that finish by the fast end."""
    duration: Figure | None = None
    """Of the expected one."""
    title: str = ""

    @property
    def figures(self) -> tuple[Figure, ...]:
        """What can be asked about."""
        return (self.duration,) if self.duration else ()

    @property
    def ranks(self) -> int | None:
        """How many are expected to be enough."""
        return self.expected.job.layout.ranks if self.expected else None

    def text(self) -> list[str]:
        """In lines."""
        left = f"{self.tokens:.3g} tokens in {self.seconds / DAY:.1f} days"
        if self.expected is None or self.duration is None or self.ranks is None:
            return [
                f"{left}: not on up to {self.most} devices; train on fewer tokens, later, or with a larger batch"
            ]
        days = [value / DAY for value in (self.duration.value, self.duration.low, self.duration.high)]
        lines = [
            f"{left}: {self.ranks} devices, {days[0]:.1f} days ({days[1]:.1f} to {days[2]:.1f})",
            f"layout {label(self.expected.job)}",
            f"to be sure: {self.conservative or f'more than {self.most}'} devices",
            "without interruptions: divide the days by the share of time that trains (MegaScale: over 0.9)",
        ]
        if self.optimistic is not None and self.optimistic < self.ranks:
            lines.insert(3, f"with luck: {self.optimistic} devices")
        return lines

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        ranks = {"devices": self.ranks, "to_be_sure": self.conservative, "with_luck": self.optimistic}
        return {"by": {**ranks, "seconds": self.seconds, "tokens": self.tokens}}


def devices_by_deadline(answer: SizingAnswer, until: str, tokens: str, now: datetime) -> DeviceCount:
    """How many devices train so many tokens by a date.

    Raises:
        UserError: for no date, no number, or a device whose rates are unknown.
    """
    seconds = (parse_deadline(until, now) - now).total_seconds()
    made = fewest_devices(task(answer), answer.costs.hardware, parse_tokens(tokens), seconds)
    return replace(made, title=f"HOW MANY DEVICES BY {until}")


def fewest_devices(task: Task, hardware: HardwareConfig, tokens: float, seconds: float) -> DeviceCount:
    """The fewest devices, in whole nodes, that train `tokens` tokens within `seconds` at the task's batch.

    `task.ranks` is not read. The interval of the number is that of the step time.

    Raises:
        UserError: where a rate of the device is unknown, or there is no time left.
    """
    if seconds <= 0:
        raise UserError("the deadline has passed; type a later one")
    node = hardware.devices_per_node or 1
    rates = auto.rates_of(hardware)
    if why := rates.unknown(task.precision, 2 * node, node):
        raise UserError(f"how long it takes is unknown: {why}; type hardware= with a device that has rates")
    steps = math.ceil(tokens / (task.global_batch * task.sequence))
    # In whole nodes, by a third or a half more, as far as the batch divides.
    sizes = sorted(node * n << k for n in (1, 3) for k in range(15))
    most = min(16_384, task.global_batch * 64)
    sizes = [n for n in sizes if n <= most and next(legal.layouts(replace(task, ranks=n)), None)]

    @cache
    def best_on(ranks: int) -> Candidate | None:
        return search(replace(task, ranks=ranks), hardware, rates, keep=1).best

    def first(factor: float) -> int | None:
        """By bisection: more devices are never slower where the batch still divides."""

        def finishes(ranks: int) -> bool:
            one = best_on(ranks)
            return one is not None and steps * one.seconds * factor <= seconds

        at = bisect_left(sizes, True, key=finishes)
        return sizes[at] if at < len(sizes) else None

    number = first(1.0)
    best = best_on(number) if number else None
    if best is None:
        return DeviceCount(seconds, tokens, sizes[-1] if sizes else 0)
    one = step.figure(best.job, rates, best.parts)
    how = f"{steps} steps of {task.global_batch} samples x step"
    duration = Figure("time.run", steps * one.value, "s", steps * one.low, steps * one.high, how, (one,))
    conservative, optimistic = first(one.high / one.value), first(one.low / one.value)
    return DeviceCount(seconds, tokens, sizes[-1], best, conservative, optimistic, duration)


def parse_deadline(text: str, now: datetime) -> datetime:
    """The end of a date (`2026-12-24`), of the next such weekday (`friday`), or of so many days (`10d`).

    Raises:
        UserError: for anything else, and for a date that has passed.
    """
    word = text.strip().lower()
    if word in _DAYS:
        day = now.replace(hour=23, minute=59, second=59, microsecond=0)
        return day + timedelta(days=(_DAYS.index(word) - now.weekday()) % 7)
    if word.endswith("d") and word[:-1].isdigit():
        return now + timedelta(days=int(word[:-1]))
    try:
        when = datetime.fromisoformat(word).replace(tzinfo=now.tzinfo)
    except ValueError:
        raise UserError(
            f"--by {text} is not a date; type 2026-12-24, a weekday, or a number of days as 10d"
        ) from None
    when = when if "t" in word or ":" in word else when.replace(hour=23, minute=59, second=59)
    if when <= now:
        raise UserError(f"--by {text} has passed; type a later date")
    return when


def parse_tokens(text: str) -> float:
    """`300B`, `1.5T` or `3e11` as a number.

    Raises:
        UserError: for anything else.
    """
    factor = _UNITS.get(text[-1:].upper())
    try:
        value = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e18:
        raise UserError(f"--tokens {text} is not a number of tokens; type e.g. 300B, 1.5T or 3e11")
    return value


@dataclass(frozen=True)
class DeviceForecast:
    """A job on one device."""

    hardware: str
    needed: float
    fits: bool | None
    step: Figure | str
    """Predicted seconds, or why there are none."""
    best: Candidate | None
    """The fastest layout that fits there, on as many devices."""


@dataclass(frozen=True)
class DeviceComparison:
    """The same job on two devices."""

    job: TrainingJob
    here: DeviceForecast
    there: DeviceForecast

    @property
    def title(self) -> str:
        """The question."""
        return f"WHAT {self.there.hardware} WOULD DO"

    @property
    def figures(self) -> tuple[Figure, ...]:
        """What can be asked about."""
        sides = (self.here, self.there)
        return tuple(
            replace(s.step, name=f"on.{s.hardware}.step") for s in sides if isinstance(s.step, Figure)
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"on": {
            side.hardware: {
                "needed_bytes": side.needed, "fits": side.fits,
                "step_seconds": side.step.value if isinstance(side.step, Figure) else None,
                "best_layout": side.best.job.layout.to_json() if side.best else None,
                "best_seconds": side.best.seconds if side.best else None,
            }
            for side in (self.here, self.there)
        }}  # fmt: skip

    def text(self) -> list[str]:
        """In lines."""
        lines = [f"{label(self.job)} on {self.job.layout.ranks} devices"]
        for side in (self.here, self.there):
            fits = {True: "fits", False: "does not fit", None: "memory unknown"}[side.fits]
            one, best = side.step, side.best
            took = one if isinstance(one, str) else f"{one.value:.3g} s ({one.low:.3g} to {one.high:.3g})"
            lines.append(f"{side.hardware}: {side.needed / GIB:.1f} GiB, {fits}; step {took}")
            if best is not None:
                changes = ", ".join(changed_settings(self.job, best.job))
                what = f"with {changes}" if changes else "the same layout"
                lines.append(
                    f"  best there: {what}, {best.seconds:.3g} s, {best.memory.needed / GIB:.0f} GiB"
                )
        if self.here.best and self.there.best:
            ratio = self.here.best.seconds / self.there.best.seconds
            names = self.there.hardware, self.here.hardware
            lines.append(f"{names[0]} at its best is {ratio:.2f} times as fast as {names[1]} at its best")
        return lines


def compare_devices(
    job: TrainingJob, task: Task, here: HardwareConfig, there: HardwareConfig
) -> DeviceComparison:
    """The same job on another device: memory, time, and the layout that is best on each."""
    return DeviceComparison(job, _device_forecast(job, task, here), _device_forecast(job, task, there))


def _device_forecast(job: TrainingJob, task: Task, hardware: HardwareConfig) -> DeviceForecast:
    node = hardware.devices_per_node or job.node
    moved = replace(job, node=node, imbalance=task.expert_imbalance)
    needed, fits = memory.worst(moved, hardware.kind)[1].needed, memory.fits(moved, hardware)
    rates = auto.rates_of(hardware)
    if why := rates.unknown(job.precision, job.layout.ranks, node):
        return DeviceForecast(hardware.name, needed, fits, f"unknown: {why}", None)
    best = search(replace(task, node=node), hardware, rates, keep=1).best
    return DeviceForecast(hardware.name, needed, fits, auto.predicted(moved, hardware), best)


AnsweredQuestion = MemoryFit | DeviceCount | DeviceComparison
