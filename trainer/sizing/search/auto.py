"""Open axes set by the search: which ranks, which layout, and why. Pure."""

from __future__ import annotations

from collections.abc import Sequence
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
from trainer.sizing.model import flops, frameworks
from trainer.sizing.model.job import Recompute, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import legal, runnable
from trainer.sizing.search.layouts import Candidate, SearchResult, compare, reason, search
from trainer.sizing.search.legal import Task
from trainer.sizing.time import estimate as time
from trainer.sizing.time import step
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.rates import OWN, OWN_SUSTAINED, Rates

PLAIN = {"tp": 1, "pp": 1, "cp": 1, "etp": 1}
"""A layout of dp and ep alone: what DeepSpeed runs, and all that is chosen where no time can be predicted."""
KEEP = 12


@dataclass(frozen=True)
class AutoValue:
    """An auto field's value, and why."""

    field: str
    value: str
    reason: str


@dataclass(frozen=True)
class Chosen:
    """A layout for the open axes."""

    layout: Layout
    choices: tuple[AutoValue, ...]
    notes: tuple[str, ...] = ()
    job: TrainingJob | None = None
    """With its batch, ZeRO stage, recomputation and schedule; None where no time is known."""


def rates_of(hardware: HardwareConfig) -> Rates:
    """Rates from the device's and the fabric's measured profiles where there are some, else from the catalogue."""
    fabric = from_catalogue(hardware, profile.known(FabricProfile, hardware.name))
    device = profile.known(DeviceProfile, hardware.name)
    family = hardware.architecture or ""
    matmuls, attention = OWN_SUSTAINED.get(family, (None, None)) if device is None else (None, None)
    return Rates(hardware, fabric, device, OWN, matmuls, attention)


def unknown(hardware: HardwareConfig, precision: str, ranks: int, node: int) -> str:
    """What must be on record for a prediction of time and isn't; empty where all is."""
    missing = []
    if not (hardware.peak_tflops.get(precision) or hardware.achieved_tflops.get(precision)):
        missing.append(f"{precision} rate")
    if hardware.memory_gbps is None:
        missing.append("memory bandwidth")
    if ranks > 1 and hardware.intra_node_gbps is None:
        missing.append("links in a node")
    if ranks > node and hardware.inter_node_gbps is None:
        missing.append("network")
    return f"{hardware.name} has no {', '.join(missing)} on record" if missing else ""


def precision_of(config: RunConfig) -> str:
    """Precision of the run; bf16 where the device has a bf16 peak."""
    if config.train.precision is not None:
        return config.train.precision
    return "bf16" if flops.peak(config.hardware, "bf16") is not None else "fp32"


def task(config: RunConfig, ranks: int, node: int) -> Task:
    """The search's task for a configuration on `ranks` ranks: all that the trainer runs, but for what the user has set."""
    parallel, train = config.parallel, config.train
    precision = precision_of(config)
    deepspeed = train.engine == "deepspeed"
    axes = {axis: size for axis in legal.AXES if (size := getattr(parallel, axis)) is not None}
    return Task(
        config.model, ranks, config.data.sequence, train.global_batch or train.micro_batch * ranks, precision, node,
        frameworks.own(
            kind=config.hardware.kind, engine=train.engine, optim=config.optim, precision=precision,
            context=parallel.context,
        ),
        (PLAIN if deepspeed else {}) | axes, train.micro_batch,
        recompute=(train.recompute,) if is_set(train, "recompute") else ("none", "selective", "full"),
        zero=(parallel.zero,) if is_set(parallel, "zero") else ((1, 2) if deepspeed else (1, 2, 3)),
        schedules=(parallel.schedule,) if is_set(parallel, "schedule") else ("1f1b", "interleaved"),
        chunks=parallel.chunks if is_set(parallel, "chunks") else None, ramp_batch=train.ramp_batch,
        evaluated=train.evaluate_samples if train.evaluate_every else None,
    )  # fmt: skip


def is_set(section: Section, field: str) -> bool:
    """Whether the user, a preset or a file has set a field, if only to its default."""
    return field in section.model_fields_set


def most_ranks(config: RunConfig, slots: Sequence[int], plain: bool = False) -> Task | None:
    """The task with the most ranks within `slots` that has a legal layout; None where there is none.

    A number of nodes, or of slots on each, that the run asks for is kept to. `plain`: open axes but dp and ep are 1.
    """
    nodes, each = config.cluster.nodes, config.cluster.slots_per_node
    within = sorted((min(have, each or have) for have in slots), reverse=True)[:nodes]
    for ranks in range(sum(within), 0, -1):
        if (nodes and ranks % nodes) or (each and ranks % each):
            continue
        made = task(config, ranks, max(slots))
        if plain:
            made = replace(made, fixed=PLAIN | made.fixed)
        if next(legal.layouts(made), None) is not None:
            return made
    return None


def closed(config: RunConfig, ranks: int | None) -> Layout:
    """The layout of a configuration; open axes are searched over all layouts of `ranks`, or are 1 where that is open too.

    Raises:
        UserError: where no layout is legal, or none fits.
    """
    parallel = config.parallel
    if parallel.open and ranks:
        node = config.hardware.devices_per_node or ranks
        nodes = -(-ranks // node)
        return choose(
            config, (min(node, ranks),) * (nodes - 1) + (ranks - min(node, ranks) * (nodes - 1),)
        ).layout
    return Layout(*(parallel.size(axis) for axis in legal.AXES))


def choose(config: RunConfig, slots: Sequence[int], imbalance: float | None = None) -> Chosen:
    """Set the open axes.

    Args:
        imbalance: rows of the most loaded expert rank over the mean; None: as a plan expects of real text.

    Raises:
        UserError: where no layout is legal, or none fits the device's memory.
    """
    # Without rates other axes can't be weighed against dp and ep.
    blind = bool(unknown(config.hardware, precision_of(config), 1, 1))
    made = most_ranks(config, slots, blind)
    if made is None:
        why = runnable.refusal(config)  # what is set is refused by itself, open axes being 1
        if why is not None:
            raise UserError(why)
        raise UserError(
            f"no layout of up to {sum(slots)} ranks has train.global_batch={config.train.global_batch} and what is set of "
            f"parallel.*; set train.global_batch to a multiple of train.micro_batch={config.train.micro_batch} times dp"
        )
    why = unknown(config.hardware, made.precision, made.ranks, made.node)
    if why:
        return _without_rates(config, made, why)
    rates = rates_of(config.hardware)
    result = search(replace(made, imbalance=imbalance), config.hardware, rates, KEEP)
    if result.best is None:
        raise UserError(
            f"parallel=auto: {result.reason}; lower train.micro_batch or data.sequence, or give it more slots"
        )
    return _chosen(config, result)


def _chosen(config: RunConfig, result: SearchResult) -> Chosen:
    best = result.best
    assert best is not None, "a search without a result is refused before"
    layout = best.job.layout
    whys = [_other(axis, getattr(layout, axis), result.ranked) for axis in _open(config)]
    whys[:1] = [f"{reason(result)}; {why}" for why in whys[:1]]
    choices = [_axis(layout, axis, why) for axis, why in zip(_open(config), whys, strict=True)]
    choices += _settings(config, best)
    notes = [f"runner-up {compare(best, result.ranked[1])}"] if len(result.ranked) > 1 else []
    return Chosen(layout, tuple(choices), tuple(notes), best.job)


def _open(config: RunConfig) -> list[str]:
    """Axes that the search sets, dp first."""
    return [axis for axis in ("dp", *config.parallel.open) if getattr(config.parallel, axis) is None]


def _axis(layout: Layout, axis: str, why: str) -> AutoValue:
    """The choice of an axis."""
    return AutoValue(f"parallel.{axis}", str(getattr(layout, axis)), why)


def settings(job: TrainingJob) -> dict[str, dict[str, Any]]:
    """What the configuration says for a job's ZeRO stage, schedule, chunks and recomputation, by section."""
    schedule = "zbv" if job.zero_bubble else "interleaved" if job.interleave > 1 else "1f1b"
    chunks = 1 if schedule == "zbv" else job.interleave
    return {
        "parallel": {"zero": job.zero or 1, "schedule": schedule, "chunks": chunks},
        "train": {"recompute": job.recompute},
    }


def _settings(config: RunConfig, best: Candidate) -> list[AutoValue]:
    """Choices of ZeRO stage, schedule and recomputation, each with what the next milder one would do."""
    job = best.job
    less: Recompute = "selective" if job.recompute == "full" else "none"
    one_chunk = ("schedule=1f1b", replace(job, interleave=1)) if job.interleave > 1 else None
    milder = {
        "zero": (f"zero={job.zero - 1}", replace(job, zero=job.zero - 1)) if job.zero > 1 else None,
        "schedule": one_chunk,
        "chunks": one_chunk,
        "recompute": (f"recompute={less}", replace(job, recompute=less)) if job.recompute != "none" else None,
    }
    choices = []
    for section, values in settings(job).items():
        for field, value in values.items():
            idle = (field == "schedule" and job.layout.pp == 1) or (field == "chunks" and job.interleave == 1)
            if idle or is_set(getattr(config, section), field):
                continue
            other = milder[field]
            why = _instead(config, best, *other) if other else "the mildest, and it fits"
            choices.append(AutoValue(f"{section}.{field}", str(value), why))
    return choices


def _instead(config: RunConfig, best: Candidate, name: str, other: TrainingJob) -> str:
    """What a milder setting would do: not fit, or take longer."""
    hardware = config.hardware
    used, have = memory.worst(other, hardware.kind)[1].needed, memory.capacity(hardware)
    if have is not None and used > have:
        return f"{name} needs {used / memory.GIB:.0f} GiB, {hardware.name} has {hardware.memory_gib:g}"
    slower = time.parts(other, rates_of(hardware)).step / best.seconds - 1
    return f"{name} takes {slower:.1%} more time"


def _other(axis: str, size: int, ranked: Sequence[Candidate]) -> str:
    """What the best layout with another size of this axis lacks."""
    best = ranked[0]
    other = next((c for c in ranked[1:] if getattr(c.job.layout, axis) != size), None)
    if other is None:
        return (
            "no other size is among the fastest" if len(ranked) > 1 else "no other layout is legal and fits"
        )
    _, _, lacks = compare(best, other).partition(": ")
    return f"the best with {axis}={getattr(other.job.layout, axis)} takes {lacks}"


def _without_rates(config: RunConfig, made: Task, why: str) -> Chosen:
    """The least exchange that fits, where no time can be predicted; ZeRO stage and recomputation are as configured."""
    layouts = sorted(legal.layouts(made), key=lambda one: (one.tp, one.pp, one.cp, one.etp, one.ep))
    fitting = (one for one in layouts if memory.fits(_job(config, made, one), config.hardware) is not False)
    layout = next(fitting, layouts[0])
    known = config.hardware.memory_gib is not None
    text = f"step time unknown, {why}: the least exchange" + (
        " that fits" if known else "; its memory is unknown too"
    )
    slots = f"the slots, {made.ranks} in all"
    return Chosen(layout, tuple(_axis(layout, a, slots if a == "dp" else text) for a in _open(config)))


def _job(config: RunConfig, made: Task, layout: Layout) -> TrainingJob:
    """The job of a configuration in a layout, by its ZeRO stage, schedule and recomputation."""
    parallel = config.parallel
    zero = parallel.zero if legal.zeros(made, layout) != (0,) else 0
    chunks = runnable.chunks_of(parallel) if layout.pp > 1 else 1
    job = legal.job(made, layout, made.micro_batch or 1, chunks, zero, config.train.recompute)
    return replace(job, zero_bubble=parallel.schedule == "zbv" and layout.pp > 1)


def job_of(config: RunConfig, layout: Layout, node: int) -> TrainingJob:
    """The job that this trainer runs for a configuration in a layout."""
    made = replace(task(config, layout.ranks, node), fixed={})
    batch = config.train.global_batch or config.train.micro_batch * layout.dp
    return _job(config, replace(made, global_batch=batch), layout)


def predicted(job: TrainingJob, hardware: HardwareConfig) -> Figure | str:
    """Seconds of a job's step on a device of the catalogue, or why there are none."""
    why = unknown(hardware, job.precision, job.layout.ranks, job.node)
    if why:
        return why
    rates = rates_of(hardware)
    return step.step_time(job, rates) or step.why_unknown(job, rates)
