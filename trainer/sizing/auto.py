"""Open axes set by the search: which ranks, which layout, and why. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from configs import profile
from configs.errors import UserError
from configs.hardware import HardwareConfig
from configs.profile import DeviceProfile, FabricProfile
from configs.schema import RunConfig
from trainer.sizing import flops, frameworks, legal, memory, step
from trainer.sizing.fabric import from_catalogue
from trainer.sizing.figures import Figure
from trainer.sizing.job import Job
from trainer.sizing.layout import Layout
from trainer.sizing.legal import Task
from trainer.sizing.rates import Rates
from trainer.sizing.search import Candidate, Found, compare, exhaustive, reason, search

RUNS = {"tp": 1, "pp": 1, "cp": 1, "etp": 1}
"""What this trainer's layouts have besides dp and ep."""
KEEP = 12


@dataclass(frozen=True)
class Choice:
    """An auto field's value, and why."""

    field: str
    value: str
    reason: str


@dataclass(frozen=True)
class Chosen:
    """A layout for the open axes."""

    layout: Layout
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()
    job: Job | None = None
    """With recomputation and model chunks, which the configuration has no fields for; None where no time is known."""


def rates_of(hardware: HardwareConfig) -> Rates:
    """Rates from the device's and the fabric's measured profiles where there are some, else from the catalogue."""
    fabric = from_catalogue(hardware, profile.known(FabricProfile, hardware.name))
    return Rates(hardware, fabric, profile.known(DeviceProfile, hardware.name))


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


def task(config: RunConfig, ranks: int, node: int, runnable: bool) -> Task:
    """The search's task for a configuration on `ranks` ranks; `runnable`: only what this trainer runs."""
    parallel, train = config.parallel, config.train
    precision = precision_of(config)
    axes = {
        "pp": parallel.pp,
        "dp": parallel.dp,
        "cp": parallel.cp,
        "ep": parallel.ep,
        "etp": parallel.etp,
        "tp": parallel.tp,
    }
    fixed = (RUNS if runnable else {}) | {axis: size for axis, size in axes.items() if size is not None}
    return Task(
        config.model, ranks, config.data.sequence, train.global_batch or train.micro_batch * ranks, precision,
        node, frameworks.own(precision, config.hardware.kind), fixed, train.micro_batch,
        recompute=("none",) if runnable else ("none", "selective", "full"),
        zero=(1,), interleaved=not runnable,
    )  # fmt: skip


def most_ranks(config: RunConfig, slots: Sequence[int], runnable: bool) -> Task | None:
    """The task with the most ranks within `slots` that has a legal layout; None where there is none.

    A number of nodes, or of slots on each, that the run asks for is kept to.
    """
    nodes, each = config.cluster.nodes, config.cluster.slots_per_node
    within = sorted((min(have, each or have) for have in slots), reverse=True)[:nodes]
    for ranks in range(sum(within), 0, -1):
        if (nodes and ranks % nodes) or (each and ranks % each):
            continue
        made = task(config, ranks, max(slots), runnable)
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
            config, (min(node, ranks),) * (nodes - 1) + (ranks - min(node, ranks) * (nodes - 1),), False
        ).layout
    return Layout(*(parallel.size(axis) for axis in legal.AXES))


def choose(config: RunConfig, slots: Sequence[int], runnable: bool) -> Chosen:
    """Set the open axes.

    Raises:
        UserError: where no layout is legal, or none fits the device's memory.
    """
    # Without rates other axes can't be weighed against dp and ep.
    blind = bool(unknown(config.hardware, precision_of(config), 1, 1))
    made = most_ranks(config, slots, runnable or blind)
    if made is None:
        raise UserError(
            f"no layout of up to {sum(slots)} ranks has train.global_batch={config.train.global_batch} and what is set of "
            f"parallel.*; set train.global_batch to a multiple of train.micro_batch={config.train.micro_batch} times dp"
        )
    why = unknown(config.hardware, made.precision, made.ranks, made.node)
    if why:
        return _without_rates(config, made, why)
    rates = rates_of(config.hardware)
    found = (exhaustive if runnable else search)(made, config.hardware, rates, KEEP)
    if found.best is None:
        raise UserError(
            f"parallel=auto: {found.reason}; lower train.micro_batch or data.sequence, or give it more slots"
        )
    return _chosen(config, found)


def _chosen(config: RunConfig, found: Found) -> Chosen:
    best = found.best
    assert best is not None, "a search without a result is refused before"
    layout = best.job.layout
    open_ = [axis for axis in ("dp", *config.parallel.open) if getattr(config.parallel, axis) is None]
    choices, first = [], True
    for axis in open_:
        size = getattr(layout, axis)
        why = _other(axis, size, found.ranked)
        choices.append(Choice(f"parallel.{axis}", str(size), f"{reason(found)}; {why}" if first else why))
        first = False
    job, notes = best.job, []
    if job.recompute != "none" or job.interleave > 1:
        notes.append(
            f"memory and step time are with recompute={job.recompute} and {job.interleave} model chunk(s) on each stage, "
            "which the trainer doesn't have"
        )
    if len(found.ranked) > 1:
        notes.append(f"runner-up {compare(best, found.ranked[1])}")
    return Chosen(layout, tuple(choices), tuple(notes), job)


def _other(axis: str, size: int, ranked: Sequence[Candidate]) -> str:
    """What the best layout with another size of this axis lacks."""
    best = ranked[0]
    other = next((c for c in ranked[1:] if getattr(c.job.layout, axis) != size), None)
    if other is None:
        return (
            "no other size is among the fastest" if len(ranked) > 1 else "no other layout is legal and fits"
        )
    _, _, told = compare(best, other).partition(": ")
    return f"the best with {axis}={getattr(other.job.layout, axis)} takes {told}"


def _without_rates(config: RunConfig, made: Task, why: str) -> Chosen:
    """The least exchange that fits, where no time can be predicted."""
    layouts = sorted(legal.layouts(made), key=lambda one: (one.tp, one.pp, one.cp, one.etp, one.ep))
    fitting = [one for one in layouts if memory.fits(_job(made, one), config.hardware) is not False]
    layout = (fitting or layouts)[0]
    known = config.hardware.memory_gib is not None
    text = f"step time unknown, {why}: the least exchange" + (
        " that fits" if known else "; its memory is unknown too"
    )
    open_ = [axis for axis in ("dp", *config.parallel.open) if getattr(config.parallel, axis) is None]
    choices = []
    for axis in open_:
        size = getattr(layout, axis)
        choices.append(
            Choice(f"parallel.{axis}", str(size), text if axis != "dp" else f"the slots, {made.ranks} in all")
        )
    return Chosen(layout, tuple(choices))


def _job(made: Task, layout: Layout) -> Job:
    zero = legal.zeros(made, layout)[0]
    return legal.job(made, layout, made.micro_batch or 1, 1, zero, "none")


def job_of(config: RunConfig, layout: Layout, node: int) -> Job:
    """The job that this trainer runs for a configuration in a layout."""
    made = replace(task(config, layout.ranks, node, False), fixed={})
    batch = config.train.global_batch or config.train.micro_batch * layout.dp
    return _job(replace(made, global_batch=batch), layout)


def predicted(job: Job, hardware: HardwareConfig) -> Figure | str:
    """Seconds of a job's step on a device of the catalogue, or why there are none."""
    why = unknown(hardware, job.precision, job.layout.ranks, job.node)
    if why:
        return why
    rates = rates_of(hardware)
    return step.step_time(job, rates) or step.why_unknown(job, rates)


@dataclass(frozen=True)
class Replanned:
    """A layout for what is left of a cluster."""

    layout: Layout | None
    reason: str
    """Why this one, or why there is none."""


def replan(config: RunConfig, slots: Sequence[int]) -> Replanned:
    """A layout of a run's resolved configuration for the slots that are left, one number for each node.

    Batch, micro-batch and model stay, so that training goes on as it was: dp must divide the batch's micro-batches and
    ep the experts. The most ranks win; among their layouts the fastest by prediction that fits, and where no rates are
    on record, the ep next to the present one.
    """
    if not slots or sum(slots) < 1:
        return Replanned(None, "no slots are left")
    free = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={"dp": None, "ep": None}),
            "cluster": config.cluster.model_copy(update={"nodes": None, "slots_per_node": None}),
        }
    )
    made = most_ranks(free, slots, runnable=True)
    if made is None:
        return Replanned(
            None,
            f"no layout of up to {sum(slots)} ranks divides train.global_batch={config.train.global_batch}",
        )
    told = f"the most of {sum(slots)} slots that train.global_batch={config.train.global_batch} divides over"
    if not unknown(config.hardware, made.precision, made.ranks, made.node):
        found = exhaustive(made, config.hardware, rates_of(config.hardware))
        if found.best is None:
            return Replanned(None, found.reason)
        return Replanned(found.best.job.layout, f"{told}; {reason(found)}")
    before = config.parallel.size("ep")
    layout = min(legal.layouts(made), key=lambda one: (abs(math.log(one.ep / before)), one.ep))
    return Replanned(layout, f"{told}; ep={layout.ep} is next to the {before} before, no rates are on record")
