"""What must change for a job to fit into a device's memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar

from configs.errors import UserError
from configs.hardware import HardwareConfig
from trainer.sizing.figures import Figure
from trainer.sizing.memory import estimate as memory
from trainer.sizing.memory.estimate import GIB
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.search import auto, legal
from trainer.sizing.search.layouts import label, search
from trainer.sizing.search.legal import Task
from trainer.sizing.time import estimate as time
from trainer.sizing.time.rates import Rates

SHOWN = 6
Step = Callable[[TrainingJob], dict[str, Any] | None]
"""One change of a job: the fields that change, or None where it isn't possible."""


@dataclass(frozen=True)
class JobChange:
    """One change of a job, or several at once."""

    names: tuple[str, ...]
    """What to set, as `train.recompute=full`."""
    job: TrainingJob
    saves: float
    """Bytes of the fullest rank."""
    cost: float | None
    """Share of the step time that it costs; negative where it gains; None where no time can be predicted."""
    fits: bool


@dataclass(frozen=True)
class MemoryFit:
    """How a job can be made to fit."""

    needed: float
    have: float
    stage: int
    changes: tuple[JobChange, ...] = ()
    """Those that fit first, the cheapest first; then those that save most."""
    other: TrainingJob | None = None
    """Where no change is enough: the fastest set-up that fits, on as few ranks, in doublings, as have one."""
    title: ClassVar = "WHAT MUST CHANGE TO FIT"
    figures: ClassVar[tuple[Figure, ...]] = ()

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
            instead = "take more ranks, or a smaller model"
            if self.other:
                instead = f"{self.other.layout.ranks} ranks fit with {label(self.other)}"
            lines.append(f"no single change is enough: {instead}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        changes = [
            {"set": list(one.names), "saves_bytes": one.saves, "step_time": one.cost, "fits": one.fits}
            for one in self.changes
        ]
        return {"fit": {
            "needed_bytes": self.needed, "have_bytes": self.have, "fits": self.fits, "changes": changes,
            "layout_that_fits": self.other.layout.to_json() if self.other else None,
        }}  # fmt: skip


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
        return MemoryFit(used.needed, have, stage)
    rates = auto.rates_of(hardware)
    blind = rates.unknown(job.precision, job.layout.ranks, job.node)
    before = math.nan if blind else time.parts(job, rates).step
    changes: list[JobChange] = []
    for many in (1, 2, 3):
        for steps in combinations(_STEPS, many):
            made = _changed(job, steps)
            if made is None:
                continue
            saves = used.needed - (then := memory.worst(made, hardware.kind)[1].needed)
            if saves > 0 and (then <= have or many == 1):
                cost = None if blind else time.parts(made, rates).step / before - 1
                changes.append(JobChange(changed_settings(job, made), made, saves, cost, then <= have))
        if sum(change.fits for change in changes) >= 2:
            break
    order = sorted(changes, key=lambda c: (not c.fits, c.cost or 0.0 if c.fits else -c.saves))
    once = list({change.names: change for change in reversed(order)}.values())[::-1]
    instead = None if any(change.fits for change in changes) else _more_ranks(job, rates)
    return MemoryFit(used.needed, have, stage, tuple(once[:SHOWN]), instead)


def _more_ranks(job: TrainingJob, rates: Rates) -> TrainingJob | None:
    """The fastest set-up that fits, on the job's ranks or the fewest doublings of them."""
    if rates.unknown(job.precision, 2 * job.node, job.node):
        return None
    for doubling in range(8):
        ranks = job.layout.ranks << doubling
        task = Task(job.model, ranks, job.sequence, job.global_batch, job.precision, job.node, job.software)
        if (best := search(task, rates.hardware, rates, keep=1).best) is not None:
            return best.job
    return None


def _axis(axis: str, factor: int = 2) -> Step:
    """An axis grown by a factor; all but ep are taken out of dp, so that ranks and batch stay."""
    out = 1 if axis == "ep" else factor

    def grow(job: TrainingJob) -> dict[str, Any] | None:
        sizes = {"dp": job.layout.dp // out, axis: getattr(job.layout, axis) * factor}
        return {"layout": replace(job.layout, **sizes)} if job.layout.dp % out == 0 else None

    return grow


_STEPS: tuple[Step, ...] = (
    lambda j: {"micro_batch": j.micro_batch // 2} if j.micro_batch % 2 == 0 else None,
    lambda j: {"micro_batch": 1} if j.micro_batch > 2 else None,
    lambda j: {"zero": j.zero + 1} if j.zero < (1 if j.layout.pp > 1 else 3) else None,
    lambda j: {"recompute": "selective"} if j.recompute == "none" and legal.selective_saves(j.software) else None,
    lambda j: {"recompute": "full"} if j.recompute != "full" else None,
    lambda j: {"interleave": 1} if j.interleave > 1 else None,
    _axis("ep"), _axis("ep", 4), _axis("tp"), _axis("pp"), _axis("cp"),
)  # fmt: skip
"""Mildest first."""


def _changed(job: TrainingJob, steps: Sequence[Step]) -> TrainingJob | None:
    """The job after all changes; None where one isn't possible or the outcome isn't legal."""
    for change in steps:
        if (fields := change(job)) is None:
            return None
        job = replace(job, **fields)
    return job if legal.is_legal(job) else None


def changed_settings(before: TrainingJob, after: TrainingJob) -> tuple[str, ...]:
    """What differs, as it is typed."""
    old, new = _typed(before), _typed(after)
    return tuple(f"{field}={value}" for field, value in new.items() if value != old[field])


def _typed(job: TrainingJob) -> dict[str, object]:
    """The fields of the configuration that make a job what it is."""
    sections = auto.settings(job)
    sections["parallel"] = job.layout.to_json() | sections["parallel"]
    sections["train"] = {"micro_batch": job.micro_batch} | sections["train"]
    return {f"{section}.{k}": v for section, values in sections.items() for k, v in values.items()}
