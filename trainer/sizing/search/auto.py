"""Open axes set by the search: which ranks, which layout, and why. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs import profile
from configs.errors import UserError
from configs.hardware import HardwareConfig
from configs.profile import DeviceProfile, FabricProfile
from configs.schema import RunConfig
from configs.section import Section
from trainer.sizing.figures import Figure
from trainer.sizing.memory import estimate as memory
from trainer.sizing.memory import states
from trainer.sizing.model import flops, frameworks, weights
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout, spreads
from trainer.sizing.search import legal, runnable
from trainer.sizing.search.layouts import Candidate, compare, search
from trainer.sizing.search.legal import Task
from trainer.sizing.time import estimate as time
from trainer.sizing.time import step
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.rates import MEGARAY_OVERHEADS, MEGARAY_SUSTAINED, Rates

PLAIN = {"tp": 1, "pp": 1, "cp": 1, "etp": 1}
"""A layout of dp and ep alone: what DeepSpeed runs, and all that is chosen where no time can be predicted."""
KEEP = 12
_WORTH = 0.01
"""Share of a step that is worth a note."""


@dataclass(frozen=True)
class AutoValue:
    """An auto field's value, and why."""

    field: str
    value: str
    reason: str


@dataclass(frozen=True)
class ChosenLayout:
    """A layout for the open axes."""

    layout: Layout
    choices: tuple[AutoValue, ...]
    notes: tuple[str, ...] = ()
    job: TrainingJob | None = None
    """With its batch, ZeRO stage, recomputation, schedule and lending; None where no time is known."""


def rates_of(hardware: HardwareConfig) -> Rates:
    """Rates from the device's and the fabric's measured profiles where there are some, else from the catalogue."""
    fabric = from_catalogue(hardware, profile.known(FabricProfile, hardware.name))
    device = profile.known(DeviceProfile, hardware.name)
    family = hardware.architecture or ""
    matmuls, attention = MEGARAY_SUSTAINED.get(family, (None, None)) if device is None else (None, None)
    return Rates(hardware, fabric, device, MEGARAY_OVERHEADS, matmuls, attention)


def predicted(job: TrainingJob, hardware: HardwareConfig) -> Figure | str:
    """Seconds of a job's step on a device of the catalogue, or why there are none."""
    rates = rates_of(hardware)
    why = rates.unknown(job.precision, job.layout.ranks, job.node)
    return why or step.step_time(job, rates) or step.why_unknown(job, rates)


def precision_of(config: RunConfig) -> str:
    """Precision of the run; bf16 where the device has a bf16 peak."""
    if config.train.precision is not None:
        return config.train.precision
    return "bf16" if flops.peak(config.hardware, "bf16") is not None else "fp32"


def task(config: RunConfig, ranks: int, node: int) -> Task:
    """The search's task for a configuration on `ranks` ranks: all that the trainer runs, but for what the user has set."""
    parallel, train, precision = config.parallel, config.train, precision_of(config)
    deepspeed = train.engine == "deepspeed"
    axes = {axis: size for axis in legal.AXES if (size := getattr(parallel, axis)) is not None}

    def configured_or(section: Section, field: str, *otherwise: Any) -> tuple[Any, ...]:
        """What the user, a preset or a file has set, if only to its default; else all to choose from."""
        return (getattr(section, field),) if field in section.model_fields_set else otherwise

    return Task(
        config.model, ranks, config.data.sequence, train.global_batch or train.micro_batch * ranks, precision, node,
        frameworks.megaray(
            kind=config.hardware.kind, engine=train.engine, optim=config.optim, precision=precision,
            context=parallel.context, lent_rows=parallel.lend_rows or 0,
        ),
        (PLAIN if deepspeed else {}) | axes, train.micro_batch,
        recompute=configured_or(train, "recompute", "none", "selective", "full"),
        zero=configured_or(parallel, "zero", *((1, 2) if deepspeed else (1, 2, 3))),
        schedules=configured_or(parallel, "schedule", "1f1b", "interleaved"),
        chunks=configured_or(parallel, "chunks", None)[0],
        ramp_batch=train.ramp_batch, evaluated=train.evaluate_samples if train.evaluate_every else None,
    )  # fmt: skip


def job_of(config: RunConfig, layout: Layout, node: int, batch: int | None = None) -> TrainingJob:
    """The job that this trainer runs for a configuration in a layout, by its ZeRO stage, schedule and recomputation.

    `batch` is a step's samples; None: as configured, or one micro-batch for each replica.
    """
    parallel, train = config.parallel, config.train
    batch = batch or train.global_batch or train.micro_batch * layout.dp
    schedule, chunks = (parallel.schedule, runnable.chunks_of(parallel)) if layout.pp > 1 else ("1f1b", 1)
    made = replace(task(config, layout.ranks, node), schedules=(schedule,), global_batch=batch)
    zero = parallel.zero if max(states.replicas(layout)) > 1 else 0
    return legal.job(made, layout, train.micro_batch, chunks, zero, train.recompute)


def sizes(config: RunConfig, slots: Sequence[int], unit: int = 1) -> Iterator[int]:
    """Ranks that slots hold, most first, in multiples of `unit`, on the nodes and slots of each that the run asks for."""
    nodes, each = config.cluster.nodes, config.cluster.slots_per_node
    for ranks in range(sum(slots) // unit * unit, 0, -unit):
        if not (nodes or each) or spreads(ranks, slots, nodes, each):
            yield ranks


def most_ranks(config: RunConfig, slots: Sequence[int], fixed: Mapping[str, int]) -> Task | None:
    """The task with the most ranks within `slots` that has a legal layout, open axes being as `fixed`; None without any."""
    for ranks in sizes(config, slots):
        made = task(config, ranks, max(slots))
        made = replace(made, fixed={**fixed, **made.fixed})
        if next(legal.layouts(made), None) is not None:
            return made
    return None


def _no_layout(config: RunConfig, slots: int) -> str:
    """Why none of the sizes that the slots hold has a layout, though each setting is right by itself."""
    parallel, train = config.parallel, config.train
    if parallel.ranks > slots:
        sizes_of = ((axis, parallel.size(axis)) for axis in ("pp", "dp", "cp", "tp"))
        what = " ".join(f"parallel.{axis}={size}" for axis, size in sizes_of if size > 1)
        return f"{what} takes {parallel.ranks} ranks, and there are {slots} slots; lower it, or give it more slots"
    if train.global_batch is None:
        return (
            f"no layout of up to {slots} ranks has the parallel.* and cluster.* that are set; "
            "leave one of them out to have it chosen"
        )
    return (
        f"no layout of up to {slots} ranks has train.global_batch={train.global_batch} and the parallel.* "
        f"that are set; set train.global_batch to a multiple of train.micro_batch={train.micro_batch} times dp"
    )


def choose(config: RunConfig, slots: Sequence[int], imbalance: float | None = None) -> ChosenLayout:
    """Set the open axes.

    Args:
        imbalance: rows of the most loaded expert rank over the mean; None: as a plan expects of real text.

    Raises:
        UserError: where no layout is legal, or none fits the device's memory.
    """
    # Without rates other axes can't be weighed against dp and ep.
    rates = rates_of(config.hardware)
    made = most_ranks(config, slots, PLAIN if rates.unknown(precision_of(config)) else {})
    if made is None:
        # What is set is refused by itself, open axes being 1.
        raise UserError(runnable.refusal(config) or _no_layout(config, sum(slots)))
    axes = [axis for axis in ("dp", *config.parallel.open) if getattr(config.parallel, axis) is None]
    if why := rates.unknown(made.precision, made.ranks, made.node):
        return _without_rates(config, made, axes, why)
    made = replace(made, imbalance=imbalance)
    if "lend_rows" not in config.parallel.model_fields_set and (least := rows_to_lend(config, rates)):
        made = made.lending_from(least)
    result = search(made, config.hardware, rates, KEEP)
    best, ranked = result.best, result.ranked
    if best is None:
        raise UserError(
            f"parallel=auto: {result.reason}; lower train.micro_batch or data.sequence, or give it more slots"
        )
    whys = [_why_axis(axis, ranked) for axis in axes]
    whys[0] = f"{result.reason}; {whys[0]}"
    choices = (*_axes(best.job.layout, dict(zip(axes, whys, strict=True))), *_settings(config, best))
    notes = (f"runner-up {compare(best, ranked[1])}",) if len(ranked) > 1 else ()
    return ChosenLayout(best.job.layout, choices, notes, best.job)


def _axes(layout: Layout, whys: Mapping[str, str]) -> list[AutoValue]:
    """The choices of axes."""
    return [AutoValue(f"parallel.{axis}", str(getattr(layout, axis)), why) for axis, why in whys.items()]


def _without_rates(config: RunConfig, made: Task, axes: Sequence[str], why: str) -> ChosenLayout:
    """The least exchange that fits, where no time can be predicted; ZeRO stage and recomputation are as configured."""
    layouts = sorted(legal.layouts(made), key=lambda one: (one.tp, one.pp, one.cp, one.etp, one.ep))
    jobs = (job_of(config, one, made.node, made.global_batch) for one in layouts)
    layout = next((job.layout for job in jobs if memory.fits(job, config.hardware) is not False), layouts[0])
    least = " that fits" if config.hardware.memory_gib is not None else "; its memory is unknown too"
    text = f"step time unknown, {why}: the least exchange{least}"
    whys = {axis: f"the slots, {made.ranks} in all" if axis == "dp" else text for axis in axes}
    return ChosenLayout(layout, tuple(_axes(layout, whys)))


def _why_axis(axis: str, ranked: Sequence[Candidate]) -> str:
    """What the best layout with another size of this axis lacks."""
    best, *others = ranked
    size = getattr(best.job.layout, axis)
    other = next((c for c in others if getattr(c.job.layout, axis) != size), None)
    if other is None:
        return "no other size is among the fastest" if others else "no other layout is legal and fits"
    lacks = compare(best, other).partition(": ")[2]
    return f"the best with {axis}={getattr(other.job.layout, axis)} takes {lacks}"


def rows_to_lend(config: RunConfig, rates: Rates) -> int:
    """Rows of an expert whose matmuls take as long as its weights' way to another rank of the node and their gradients' way
    back, as a power of two; 0 where nothing is lent, or no rate is known."""
    model, precision = config.model, precision_of(config)
    if config.train.engine == "deepspeed" or model.experts < 2:
        return 0
    numbers = weights.total(model, True, "experts") / model.experts
    way = rates.fabric.send((4 if precision == "fp32" else 2) * numbers, across=False)
    rows = 2 * way * rates.flops(precision) / (6 * numbers)
    return 0 if math.isnan(rows) else 1 << round(math.log2(max(1.0, rows)))


def lending(config: RunConfig, job: TrainingJob) -> str:
    """What lending hot experts would gain a job, where nobody has set it and it is worth it; empty elsewhere."""
    decided = "lend_rows" in config.parallel.model_fields_set
    if decided or job.software.lent_rows or job.layout.ep < legal.LENDERS:
        return ""
    rates = rates_of(config.hardware)
    lent = replace(job, software=replace(job.software, lent_rows=rows_to_lend(config, rates)))
    if rates.unknown(job.precision, job.layout.ranks, job.node):
        return ""
    less = 1 - time.parts(lent, rates).step / time.parts(job, rates).step
    return "" if less < _WORTH else (
        f"parallel.lend_rows={lent.software.lent_rows} would save {less:.1%} of a step at a load imbalance of "
        f"{job.imbalance:g}, and more at a higher one; parallel=auto sets it"
    )  # fmt: skip


def settings(job: TrainingJob) -> dict[str, dict[str, Any]]:
    """What the configuration says for a job's ZeRO stage, schedule, chunks, lending and recomputation, by section."""
    chunks = 1 if job.zero_bubble else job.interleave
    lends = {"lend_rows": job.software.lent_rows} if job.lends else {}
    return {
        "parallel": {"zero": job.zero or 1, "schedule": legal.schedule_of(job), "chunks": chunks, **lends},
        "train": {"recompute": job.recompute},
    }


def _settings(config: RunConfig, best: Candidate) -> list[AutoValue]:
    """Choices of ZeRO stage, schedule, lending and recomputation, each with what the next milder one would do."""
    job, less = best.job, {"none": None, "selective": "none", "full": "selective"}[best.job.recompute]
    one_chunk = ("schedule=1f1b", {"interleave": 1}) if job.interleave > 1 else None
    milder: dict[str, tuple[str, dict[str, Any]] | None] = {
        "zero": (f"zero={job.zero - 1}", {"zero": job.zero - 1}) if job.zero > 1 else None,
        "schedule": one_chunk, "chunks": one_chunk,
        "lend_rows": ("lend_rows=null", {"software": replace(job.software, lent_rows=0)}),
        "recompute": (f"recompute={less}", {"recompute": less}) if less else None,
    }  # fmt: skip
    idle = {"schedule": job.layout.pp == 1, "chunks": job.interleave == 1}
    choices = []
    for section, values in settings(job).items():
        for field, value in values.items():
            if not idle.get(field) and field not in getattr(config, section).model_fields_set:
                other = milder[field]
                why = (
                    _why_setting(config.hardware, best, *other)
                    if other
                    else "the least recomputation, and it fits"
                )
                choices.append(AutoValue(f"{section}.{field}", str(value), why))
    return choices


def _why_setting(hardware: HardwareConfig, best: Candidate, name: str, changes: Mapping[str, Any]) -> str:
    """What a milder setting would do: not fit, or take longer."""
    other = replace(best.job, **changes)
    if memory.fits(other, hardware) is False:
        needed = memory.worst(other, hardware.kind)[1].needed / memory.GIB
        return f"{name} needs {needed:.0f} GiB, {hardware.name} has {hardware.memory_gib:g}"
    return f"{name} takes {time.parts(other, rates_of(hardware)).step / best.seconds - 1:.1%} more time"
