"""What people ask a planner: what must change to fit, how many devices finish in time, what another device would do.

Each answer is plain data with its figures; `text` says it in lines. Pure: the time is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import combinations

from configs.errors import UserError
from configs.hardware import HardwareConfig
from trainer.sizing.figures import Figure
from trainer.sizing.memory import estimate as memory
from trainer.sizing.memory.estimate import GIB
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.search import auto, legal
from trainer.sizing.search.layouts import Candidate, label, search
from trainer.sizing.search.legal import Task
from trainer.sizing.time import estimate as time
from trainer.sizing.time import step
from trainer.sizing.time.rates import Rates

SHOWN = 6
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


# ---- what must change to fit ----


@dataclass(frozen=True)
class JobChange:
    """One change of a job, or several at once."""

    names: tuple[str, ...]
    """What to set, as `recompute=full`."""
    job: TrainingJob
    saves: float
    """Bytes of the fullest rank that it saves; negative where it takes more."""
    cost: float | None
    """Share of the step time that it costs; negative where it gains; None where no time can be predicted."""
    fits: bool


@dataclass(frozen=True)
class MemoryFit:
    """How a job can be made to fit."""

    needed: float
    have: float
    stage: int
    changes: tuple[JobChange, ...]
    """Those that fit first, the cheapest first; then those that save most."""
    other: TrainingJob | None = None
    """Where no change is enough: the fastest set-up that fits, on as few ranks, in doublings, as have one."""

    @property
    def fits(self) -> bool:
        """Whether it fits as it is."""
        return self.needed <= self.have

    def text(self) -> list[str]:
        """In lines."""
        over = (self.needed - self.have) / GIB
        if self.fits:
            return [f"fits: {self.needed / GIB:.1f} of {self.have / GIB:.0f} GiB, {-over:.1f} GiB to spare"]
        lines = [f"{self.needed / GIB:.1f} GiB on stage {self.stage}, {over:.1f} GiB more than there is"]
        for change in self.changes:
            cost = "step time unknown" if change.cost is None else f"step time {change.cost:+.1%}"
            end = "fits" if change.fits else "not enough"
            lines.append(f"{' and '.join(change.names)}: saves {change.saves / GIB:.1f} GiB, {cost}; {end}")
        if not any(change.fits for change in self.changes):
            other = (
                f"{self.other.layout.ranks} ranks fit with {label(self.other)}"
                if self.other
                else "take more ranks, or a smaller model"
            )
            lines.append(f"nothing of this is enough by itself: {other}")
        return lines


def fit(job: TrainingJob, hardware: HardwareConfig) -> MemoryFit:
    """What must change for `job` to fit: single changes, and combinations of up to three where none is enough.

    Raises:
        UserError: where the device's memory is unknown.
    """
    have = memory.capacity(hardware)
    if have is None:
        raise UserError(
            f"hardware={hardware.name} has no memory on record, so nothing can be said to fit; name a GPU"
        )
    stage, used = memory.worst(job, hardware.kind)
    if used.needed <= have:
        return MemoryFit(used.needed, have, stage, ())
    timed = _timed(job, hardware)
    steps = _steps()
    changes: list[JobChange] = []
    for many in (1, 2, 3):
        for names in combinations(steps, many):
            made = _changed(job, [steps[name] for name in names])
            if made is None:
                continue
            then = memory.worst(made, hardware.kind)[1].needed
            saves, fits = used.needed - then, then <= have
            if (fits or many == 1) and saves > 0:
                changes.append(JobChange(_differing(job, made), made, saves, timed(made), fits))
        if sum(change.fits for change in changes) >= 2:
            break
    order = sorted(changes, key=lambda c: (not c.fits, c.cost or 0.0 if c.fits else -c.saves))
    other = None if any(change.fits for change in changes) else _other(job, hardware)
    return MemoryFit(used.needed, have, stage, tuple(_different(order))[:SHOWN], other)


def _other(job: TrainingJob, hardware: HardwareConfig) -> TrainingJob | None:
    """The fastest set-up that fits, on the job's ranks or the fewest doublings of them."""
    if auto.unknown(hardware, job.precision, 2 * job.node, job.node):
        return None
    rates = auto.rates_of(hardware)
    for doubling in range(8):
        ranks = job.layout.ranks << doubling
        task = Task(job.model, ranks, job.sequence, job.global_batch, job.precision, job.node, job.software)
        if (best := search(task, hardware, rates, keep=1).best) is not None:
            return best.job
    return None


def _different(changes: Sequence[JobChange]) -> list[JobChange]:
    """Each set of settings once."""
    return list({change.names: change for change in reversed(changes)}.values())[::-1]


def _timed(job: TrainingJob, hardware: HardwareConfig) -> Callable[[TrainingJob], float | None]:
    """Relative time of other jobs against `job`; None for all where a rate is unknown."""
    if auto.unknown(hardware, job.precision, job.layout.ranks, job.node):
        return lambda _: None
    rates = auto.rates_of(hardware)
    before = time.parts(job, rates).step
    return lambda other: time.parts(other, rates).step / before - 1


Step = Callable[[TrainingJob], TrainingJob | None]


def _steps() -> dict[str, Step]:
    """Single changes, mildest first; each gives None where it isn't possible."""
    return {
        "micro_batch": lambda j: (
            replace(j, micro_batch=j.micro_batch // 2) if j.micro_batch % 2 == 0 else None
        ),
        "micro_batch=1": lambda j: replace(j, micro_batch=1) if j.micro_batch > 2 else None,
        "zero": lambda j: replace(j, zero=j.zero + 1) if j.zero < (1 if j.layout.pp > 1 else 3) else None,
        "selective": lambda j: (
            replace(j, recompute="selective")
            if j.recompute == "none" and legal.selective_saves(j.software)
            else None
        ),
        "full": lambda j: replace(j, recompute="full") if j.recompute != "full" else None,
        "interleave": lambda j: replace(j, interleave=1) if j.interleave > 1 else None,
        "ep": lambda j: _axis(j, "ep", 2),
        "ep4": lambda j: _axis(j, "ep", 4),
        "tp": lambda j: _axis(j, "tp", 2),
        "pp": lambda j: _axis(j, "pp", 2),
        "cp": lambda j: _axis(j, "cp", 2),
    }


def _axis(job: TrainingJob, axis: str, factor: int) -> TrainingJob | None:
    """An axis grown by a factor; all but ep are taken out of dp, so that ranks and batch stay."""
    layout = job.layout
    sizes = {axis: getattr(layout, axis) * factor}
    if axis != "ep":
        if layout.dp % factor:
            return None
        sizes["dp"] = layout.dp // factor
    return replace(job, layout=replace(layout, **sizes))


def _changed(job: TrainingJob, steps: Sequence[Step]) -> TrainingJob | None:
    """The job after all changes; None where one isn't possible or the outcome isn't legal."""
    made: TrainingJob | None = job
    for change in steps:
        made = change(made) if made else None
    return made if made and legal.is_legal(made) else None


def _differing(before: TrainingJob, after: TrainingJob) -> tuple[str, ...]:
    """What differs, as it is typed."""
    old, new = _typed(before), _typed(after)
    return tuple(f"{field}={value}" for field, value in new.items() if value != old[field])


def _typed(job: TrainingJob) -> dict[str, object]:
    """The fields of the configuration that make a job what it is."""
    settings = auto.settings(job)
    parallel = job.layout.to_json() | settings["parallel"]
    train = {"micro_batch": job.micro_batch} | settings["train"]
    return {f"parallel.{k}": v for k, v in parallel.items()} | {f"train.{k}": v for k, v in train.items()}


# ---- how many devices ----


@dataclass(frozen=True)
class Enough:
    """How many devices finish in time."""

    seconds: float
    """Until the deadline."""
    tokens: float
    expected: Candidate | None
    """The fewest that finish by the expected step time; None where none does."""
    safe: int | None
    """The fewest that finish even by the slow end of its interval."""
    luck: int | None
    """The fewest that finish by the fast end."""
    most: int
    """The most that were looked at: the batch divides over no more, or 16,384."""
    duration: Figure | None
    """Of the expected one."""

    def text(self) -> list[str]:
        """In lines."""
        left = f"{self.tokens:.3g} tokens in {self.seconds / 86400:.1f} days"
        if self.expected is None or self.duration is None:
            return [
                f"{left}: not on up to {self.most} devices; train on fewer tokens, later, or with a larger batch"
            ]
        days = [value / 86400 for value in (self.duration.value, self.duration.low, self.duration.high)]
        lines = [
            f"{left}: {self.expected.job.layout.ranks} devices, {days[0]:.1f} days ({days[1]:.1f} to {days[2]:.1f})",
            f"layout {label(self.expected.job)}",
        ]
        lines.append(
            f"to be sure: {self.safe} devices" if self.safe else f"to be sure: more than {self.most} devices"
        )
        if self.luck is not None and self.luck < self.expected.job.layout.ranks:
            lines.append(f"with luck: {self.luck} devices")
        return [
            *lines,
            "without interruptions: divide the days by the share of time that trains (MegaScale: over 0.9)",
        ]


def enough(task: Task, hardware: HardwareConfig, tokens: float, seconds: float) -> Enough:
    """The fewest devices, in whole nodes, that train `tokens` tokens within `seconds` at the task's batch.

    `task.ranks` is not read. The interval of the number is that of the step time.

    Raises:
        UserError: where a rate of the device is unknown, or there is no time left.
    """
    if seconds <= 0:
        raise UserError("the deadline has passed; type a later one")
    node = hardware.devices_per_node or 1
    why = auto.unknown(hardware, task.precision, 2 * node, node)
    if why:
        raise UserError(f"how long it takes is unknown: {why}; type hardware= with a device that has rates")
    rates = auto.rates_of(hardware)
    steps = math.ceil(tokens / (task.global_batch * task.sequence))
    sizes = _sizes(task, node)
    made: dict[int, Candidate | None] = {}

    def first(factor: float) -> int | None:
        """By bisection: more devices are never slower where the batch still divides."""
        low, high = 0, len(sizes)
        while low < high:
            middle = (low + high) // 2
            one = _at(task, hardware, rates, sizes[middle], made)
            if one is not None and steps * one.seconds * factor <= seconds:
                high = middle
            else:
                low = middle + 1
        return sizes[low] if low < len(sizes) else None

    number = first(1.0)
    best = made[number] if number else None
    if best is None:
        return Enough(seconds, tokens, None, None, None, sizes[-1] if sizes else 0, None)
    one = step.figure(best.job, rates, best.parts)
    how = f"{steps} steps of {task.global_batch} samples x step"
    values = [steps * value for value in (one.value, one.low, one.high)]
    duration = Figure("time.run", values[0], "s", values[1], values[2], how, (one,))
    return Enough(
        seconds,
        tokens,
        best,
        first(one.high / one.value),
        first(one.low / one.value),
        sizes[-1],
        duration,
    )


def _sizes(task: Task, node: int) -> list[int]:
    """Numbers of devices to look at, in whole nodes: by a third or a half more, as far as the batch divides."""
    most = min(16_384, task.global_batch * 64)
    nodes = sorted({2**k for k in range(0, 15)} | {2**k * 3 for k in range(0, 14)})
    return [
        n * node
        for n in nodes
        if n * node <= most and next(legal.layouts(replace(task, ranks=n * node)), None)
    ]


def _at(
    task: Task, hardware: HardwareConfig, rates: Rates, ranks: int, made: dict[int, Candidate | None]
) -> Candidate | None:
    if ranks not in made:
        made[ranks] = search(replace(task, ranks=ranks), hardware, rates, keep=1).best
    return made[ranks]


def deadline(text: str, now: datetime) -> datetime:
    """The end of a date (`2026-12-24`), of the next such weekday (`friday`), or of so many days (`10d`).

    Raises:
        UserError: for anything else, and for a date that has passed.
    """
    word = text.strip().lower()
    day = now.replace(hour=23, minute=59, second=59, microsecond=0)
    if word in _DAYS:
        return day + timedelta(days=(_DAYS.index(word) - now.weekday()) % 7)
    if word.endswith("d") and word[:-1].isdigit():
        return now + timedelta(days=int(word[:-1]))
    try:
        when = datetime.fromisoformat(word).replace(tzinfo=now.tzinfo)
    except ValueError:
        raise UserError(
            f"'{text}' is not a date; type 2026-12-24, a weekday, or a number of days as 10d"
        ) from None
    when = when if "t" in word or ":" in word else when.replace(hour=23, minute=59, second=59)
    if when <= now:
        raise UserError(f"'{text}' has passed; type a later date")
    return when


# ---- another device ----


@dataclass(frozen=True)
class Side:
    """A job on one device."""

    hardware: str
    needed: float
    fits: bool | None
    step: Figure | str
    """Predicted seconds, or why there are none."""
    best: Candidate | None
    """The fastest layout that fits there, on as many devices."""


@dataclass(frozen=True)
class Other:
    """The same job on two devices."""

    job: TrainingJob
    here: Side
    there: Side

    def text(self) -> list[str]:
        """In lines."""
        lines = [f"{label(self.job)} on {self.job.layout.ranks} devices"]
        for side in (self.here, self.there):
            fits = {True: "fits", False: "does not fit", None: "memory unknown"}[side.fits]
            seconds = side.step if isinstance(side.step, str) else _span(side.step)
            lines.append(f"{side.hardware}: {side.needed / GIB:.1f} GiB, {fits}; step {seconds}")
            if side.best is not None:
                changes = _differing(self.job, side.best.job)
                what = "the same layout" if not changes else f"with {', '.join(changes)}"
                lines.append(
                    f"  best there: {what}, {side.best.seconds:.3g} s, {side.best.memory.needed / GIB:.0f} GiB"
                )
        here, there = self.here.best, self.there.best
        if here and there:
            ratio = here.seconds / there.seconds
            lines.append(
                f"{self.there.hardware} at its best is {ratio:.2f} times as fast as {self.here.hardware} at its best"
            )
        return lines


def other(job: TrainingJob, task: Task, here: HardwareConfig, there: HardwareConfig) -> Other:
    """The same job on another device: memory, time, and the layout that is best on each."""
    return Other(job, _side(job, task, here), _side(job, task, there))


def _side(job: TrainingJob, task: Task, hardware: HardwareConfig) -> Side:
    node = hardware.devices_per_node or job.node
    moved = replace(job, node=node, imbalance=task.uneven)
    needed = memory.worst(moved, hardware.kind)[1].needed
    why = auto.unknown(hardware, job.precision, job.layout.ranks, node)
    fits = memory.fits(moved, hardware)
    if why:
        return Side(hardware.name, needed, fits, f"unknown: {why}", None)
    rates = auto.rates_of(hardware)
    best = search(replace(task, node=node), hardware, rates, keep=1).best
    return Side(hardware.name, needed, fits, auto.predicted(moved, hardware), best)


def _span(figure: Figure) -> str:
    return f"{figure.value:.3g} s ({figure.low:.3g} to {figure.high:.3g})"
