"""The plan: auto fields filled in with a reason each, and what the run will be, before anything starts. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from configs.compose import validated
from configs.errors import UserError
from configs.hugging_face.read import left_out
from configs.schema import HardwareConfig, RunConfig
from trainer.sizing.figures import Figure
from trainer.sizing.memory import estimate as memory
from trainer.sizing.memory.estimate import GIB
from trainer.sizing.model import flops, parameters
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout, spreads
from trainer.sizing.search import auto, defaults, runnable
from trainer.sizing.search.auto import AutoValue


@dataclass(frozen=True)
class Capacity:
    """Slots that exist."""

    slots: tuple[int, ...]
    """Of each node."""

    @classmethod
    def of_nodes(cls, slots: Sequence[int]) -> Capacity:
        """From the slots of each node.

        Raises:
            UserError: for a node without slots.
        """
        if not slots or min(slots) < 1:
            raise UserError(f"slots={','.join(map(str, slots))}: a node needs at least one slot")
        return cls(tuple(slots))

    @property
    def total(self) -> int:
        """Over all nodes."""
        return sum(self.slots)

    def __str__(self) -> str:
        widths = set(self.slots)
        each = f" x {self.slots[0]}" if len(widths) == 1 else f", {min(widths)} to {max(widths)} each"
        return f"{len(self.slots)} node{'s' * (len(self.slots) > 1)}{each}"


@dataclass(frozen=True)
class RunPlan:
    """A run as it will start."""

    config: RunConfig
    """Without auto fields."""
    layout: dict[str, int]
    ranks: int
    nodes: int
    slots_per_node: int
    parameters: dict[str, int]
    """By part, with `total` and `active`."""
    memory: dict[str, int]
    """Estimated bytes of the fullest rank, by component."""
    step_time: dict[str, Any]
    """Predicted seconds of a step: `seconds`, `low`, `high`; or `unknown`, with the reason."""
    tokens_per_step: int
    tokens: int
    """Over all steps."""
    flops_per_token: float
    mfu_basis: str
    choices: tuple[AutoValue, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """As a plain tree, without the configuration, which is saved beside it."""
        tree = {key: value for key, value in vars(self).items() if key not in ("config", "choices")}
        config = self.config
        return tree | {
            "model": config.model.name,
            "hardware": config.hardware.name,
            "device": _device(config.hardware),
            "cluster": config.cluster.name,
            "steps": config.train.steps,
            "choices": [asdict(choice) for choice in self.choices],
            "data": config.data.path or "source files of Python's standard library",
            "precision": config.train.precision,
            "engine": config.train.engine,
            "optimizer": config.optim.kind,
            "zero": config.parallel.zero,
            "schedule": config.parallel.schedule,
            "chunks": runnable.chunks_of(config.parallel),
            "context": config.parallel.context,
            "recompute": config.train.recompute,
            "measures": _measures(config) if config.workload == "collectives" else "",
        }


def _measures(config: RunConfig) -> str:
    """What a measurement goes through."""
    settings = config.collectives
    if settings.study != "sweep":
        return {
            "moe": "expert-parallel traffic under routing",
            "faults": "hosts, links and pairs that are slow",
        }[settings.study]
    return (
        f"{', '.join(settings.ops)} over {', '.join(settings.groups)}, {settings.min_size} to {settings.max_size} bytes of "
        f"{', '.join(settings.dtypes)}"
    )


def _device(hardware: HardwareConfig) -> str:
    """What is on record of a device, and where from."""
    known = [
        ("memory", hardware.memory_gib, "GiB"),
        ("memory bandwidth", hardware.memory_gbps, "GB/s"),
        ("links in a node", hardware.intra_node_gbps, "GB/s"),
        ("network", hardware.inter_node_gbps, "GB/s"),
    ]
    numbers = [f"{name} {value:g} {unit}" for name, value, unit in known if value is not None]
    return f"{', '.join(numbers) or 'nothing on record'} ({hardware.source})"


def plan(config: RunConfig, capacity: Capacity | None, strict: bool = False) -> RunPlan:
    """Fill in the auto fields and say what the run will be.

    Args:
        config: as the user gave it.
        capacity: slots of the cluster; None where none is up, so that it is whatever the run asks for.
        strict: whether what the trainer doesn't run is refused; otherwise a note of the plan says so.

    Raises:
        UserError: for more ranks than slots, a layout that doesn't fit, or open axes that no layout fills in.
    """
    choices: list[AutoValue] = []
    warnings: list[str] = []
    training = config.workload == "train"
    notes = list(left_out(config.model)) if training else []
    # With open axes the search keeps the rules, with chunks and batches that aren't set yet.
    if not config.parallel.open:
        _refuse(config, strict and training)
    config, job = _closed(config, capacity, choices, notes)
    dp = _data_parallel(config, capacity, choices)
    parallel = config.parallel
    layout = Layout(
        *(dp if axis == "dp" else parallel.size(axis) for axis in ("pp", "dp", "cp", "ep", "etp", "tp"))
    )
    nodes, each = _spread(config, layout, capacity, choices, warnings)
    of_training: list[AutoValue] = []
    trained, model = defaults.training(config, dp, of_training), defaults.balancing(config, of_training)
    choices += of_training if training else []
    # A gang that spreads unevenly is left to placement, which keeps its blocks whole.
    even = nodes * each == layout.ranks
    spread = {"nodes": nodes, "slots_per_node": each} if even else {}
    resolved = validated(
        config.model_dump()
        | {
            "parallel": parallel.model_dump() | {"dp": dp},
            "cluster": config.cluster.model_dump() | spread,
            "train": config.train.model_dump() | trained,
            "model": model,
        }
    )
    if not training and layout.ranks < 2:
        raise UserError("one rank has nobody to measure with; set parallel.dp=2 or more")
    size, step_time = (
        _sized(resolved, job or auto.job_of(resolved, layout, each), warnings) if training else ({}, {})
    )
    refusal = _refuse(resolved, strict and training) if training else None
    warnings += [wasteful] if training and (wasteful := runnable.advice(resolved)) else []
    tokens_per_step = trained["global_batch"] * config.data.sequence if training else 0
    return RunPlan(
        config=resolved,
        layout=layout.to_json(),
        ranks=layout.ranks,
        nodes=nodes,
        slots_per_node=each,
        parameters=parameters.count(config.model).to_json(),
        memory=size,
        step_time=step_time,
        tokens_per_step=tokens_per_step,
        tokens=tokens_per_step * config.train.steps,
        flops_per_token=flops.train_flops_per_token(config.model, config.data.sequence),
        mfu_basis=flops.basis(config.hardware, trained["precision"]),
        choices=tuple(choices),
        warnings=tuple(warnings),
        notes=(*notes, refusal) if refusal else tuple(notes),
    )


def _refuse(config: RunConfig, strict: bool) -> str | None:
    """Why the trainer doesn't run it; raised where `strict`."""
    refusal = runnable.refusal(config)
    if refusal and strict:
        raise UserError(refusal)
    return refusal


def _closed(
    config: RunConfig, capacity: Capacity | None, choices: list[AutoValue], notes: list[str]
) -> tuple[RunConfig, TrainingJob | None]:
    """The configuration with its open axes set, and the job that the search found; as it is where none is open."""
    if not config.parallel.open:
        return config, None
    if config.workload != "train":
        for axis in config.parallel.open:
            choices.append(AutoValue(f"parallel.{axis}", "1", "a measurement needs no other axis than dp"))
        closed = dict.fromkeys(config.parallel.open, 1)
        return config.model_copy(update={"parallel": config.parallel.model_copy(update=closed)}), None
    chosen = auto.choose(config, _slots(config, capacity))
    choices += chosen.choices
    notes += chosen.notes
    job, train = chosen.job, config.train
    settings = auto.settings(job) if job else {"parallel": {}, "train": {}}
    if job and train.global_batch is None:
        settings["train"]["global_batch"] = job.global_batch
        reason = f"train.micro_batch={train.micro_batch} for each of {job.layout.ranks} ranks, however they are laid out"
        choices.append(AutoValue("train.global_batch", str(job.global_batch), reason))
    update = {
        "parallel": config.parallel.model_copy(update=chosen.layout.to_json() | settings["parallel"]),
        "train": train.model_copy(update=settings["train"]),
    }
    return config.model_copy(update=update), job


def _slots(config: RunConfig, capacity: Capacity | None) -> tuple[int, ...]:
    """Slots to lay out on: the cluster's, or what the run asks for, or one node."""
    if capacity is not None:
        return capacity.slots
    cluster, width = config.cluster, config.hardware.devices_per_node or 1
    return (cluster.slots_per_node or width,) * (cluster.nodes or 1)


def _sized(config: RunConfig, job: TrainingJob, warnings: list[str]) -> tuple[dict[str, int], dict[str, Any]]:
    """Memory of the fullest rank by component, and the predicted step time."""
    stage, used = memory.worst(job, config.hardware.kind)
    size = {name: round(value) for name, value in memory.summary(used).items() if round(value)}
    where = f" on stage {stage}" if job.layout.pp > 1 else ""
    _warn_memory(config, size, used, where, warnings)
    made = auto.predicted(job, config.hardware)
    if isinstance(made, Figure):
        return size, {"seconds": made.value, "low": made.low, "high": made.high}
    return size, {"unknown": made}


def _data_parallel(config: RunConfig, capacity: Capacity | None, choices: list[AutoValue]) -> int:
    parallel = config.parallel
    if parallel.dp is not None:
        return parallel.dp
    ep, experts = parallel.size("ep"), parallel.size("ep") * parallel.size("etp")
    inner = parallel.size("cp") * parallel.size("tp")
    unit = experts // math.gcd(experts, inner)  # the least dp with dp * cp * tp a multiple of ep * etp
    others = parallel.size("pp") * inner
    if capacity is None and config.workload == "collectives" and unit * others == 1:
        choices.append(AutoValue("parallel.dp", "2", "the least that has somebody to measure with"))
        return 2
    if capacity is None:
        choices.append(AutoValue("parallel.dp", str(unit), f"smallest dp compatible with parallel.ep={ep}"))
        return unit
    nodes, each = config.cluster.nodes, config.cluster.slots_per_node
    within = sorted((min(have, each or have) for have in capacity.slots), reverse=True)[:nodes]
    dp = max(unit, sum(within) // others // unit * unit)
    while dp > unit and ((nodes and dp * others % nodes) or (each and dp * others % each)):
        dp -= unit
    while dp > unit and not _divides(config, dp):
        dp -= unit
    if dp == unit:
        reason = f"smallest dp compatible with parallel.ep={ep}"
    else:
        reason = f"the most that {capacity.total} slots ({capacity}) hold in multiples of {unit}"
    choices.append(AutoValue("parallel.dp", str(dp), reason))
    return dp


def _divides(config: RunConfig, dp: int) -> bool:
    """Whether all batches divide over so many replicas, and give their pipelines what they need."""
    train = config.train
    laid = config.model_copy(update={"parallel": config.parallel.model_copy(update={"dp": dp})})
    whole = all(
        (batch or 0) % (train.micro_batch * dp) == 0 for batch in (train.global_batch, train.ramp_batch)
    )
    return whole and runnable.unfilled(laid) is None


def _spread(
    config: RunConfig,
    layout: Layout,
    capacity: Capacity | None,
    choices: list[AutoValue],
    warnings: list[str],
) -> tuple[int, int]:
    """Nodes, and ranks on each."""
    ranks = layout.ranks
    nodes, each = config.cluster.nodes, config.cluster.slots_per_node
    if nodes and each and nodes * each != ranks:
        raise UserError(
            f"cluster.nodes={nodes} x cluster.slots_per_node={each} are {nodes * each} slots, but the layout has "
            f"{ranks} ranks; leave one of the two out"
        )
    if (nodes and ranks % nodes) or (each and ranks % each):
        name, value = ("nodes", nodes) if nodes and ranks % nodes else ("slots_per_node", each)
        raise UserError(
            f"cluster.{name}={value} does not divide the layout's {ranks} ranks; choose a divisor"
        )
    if capacity is None:
        width = config.hardware.devices_per_node or ranks
        slots = (min(width, ranks),) * -(-ranks // min(width, ranks))
    else:
        slots = capacity.slots
        if ranks > capacity.total:
            raise UserError(
                f"the layout needs {ranks} slots, and the cluster has {capacity.total} ({capacity}); lower "
                f"parallel.dp, or start more: python -m orchestrator down, then up --slots {ranks}"
            )
    fitting = [
        pair
        for pair in spreads(ranks, slots)
        if (not nodes or pair[0] == nodes) and (not each or pair[1] == each)
    ]
    if (nodes or each) and not fitting:
        setting = f"cluster.nodes={nodes}" if nodes else f"cluster.slots_per_node={each}"
        raise UserError(
            f"{setting} does not fit the cluster ({Capacity(slots)}) with {ranks} ranks; leave it out"
        )
    inside = [pair for pair in fitting if pair[1] % layout.inner == 0]
    if not inside and layout.inner > 1 and ranks > max(slots):
        warnings.append(
            f"groups of {layout.inner} neighbouring ranks (ep*etp, tp) cross nodes: their traffic takes the network"
        )
    best = (inside or fitting or [(len(slots), max(slots))])[0]
    if not nodes and not each:
        spread = f"{best[1]} ranks on each" if best[0] > 1 else f"one node holds all {ranks} ranks"
        choices.append(AutoValue("cluster.nodes", str(best[0]), f"as few as hold the gang: {spread}"))
    return best


def _warn_memory(
    config: RunConfig, size: dict[str, int], used: memory.MemoryUsage, where: str, warnings: list[str]
) -> None:
    have = config.hardware.memory_gib
    if have is None:
        return
    needed, most = used.needed / GIB, used.at_most / GIB
    device = f"{config.hardware.name} has {have:g}"
    if needed > have:
        largest = max(size, key=lambda name: size[name])
        warnings.append(
            f"estimated {needed:.1f} GiB per rank{where}, {device}: {largest} takes {size[largest] / GIB:.1f} GiB; raise "
            "parallel.ep, dp, tp or zero, set train.recompute=full, or lower train.micro_batch; parallel=auto searches"
        )
    elif most > have:
        warnings.append(
            f"it may not fit: {needed:.1f} GiB per rank{where} are expected and up to {most:.1f} possible, {device}; "
            "lower train.micro_batch to be sure"
        )
