"""The plan: auto fields filled in with a reason each, and what the run will be, before anything starts. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from configs.compose import validated
from configs.errors import UserError
from configs.hugging_face.read import left_out
from configs.schema import HardwareConfig, RunConfig
from configs.section import MOST_DEVICES
from trainer.sizing.figures import Figure
from trainer.sizing.memory import estimate as memory
from trainer.sizing.memory.estimate import GIB
from trainer.sizing.model import flops, parameters
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout, spreads
from trainer.sizing.search import auto, runnable
from trainer.sizing.search.auto import AutoValue
from trainer.sizing.search.legal import AXES


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
            raise UserError(
                f"slots={','.join(map(str, slots))}: a node needs at least one slot; type e.g. --slots 8"
            )
        if max(slots) > MOST_DEVICES:
            raise UserError(f"slots={max(slots)} is above {MOST_DEVICES}; type e.g. --slots 8")
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
    nodes: int
    slots_per_node: int
    memory: dict[str, int]
    """Estimated bytes of the fullest rank, by component."""
    step_time: dict[str, Any]
    """Predicted seconds of a step: `seconds`, `low`, `high`; or `unknown`, with the reason."""
    choices: tuple[AutoValue, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ranks(self) -> int:
        """Ranks of the gang."""
        return Layout(**self.layout).ranks

    def to_json(self) -> dict[str, Any]:
        """As a plain tree, without the configuration, which is saved beside it."""
        config, model = self.config, self.config.model
        parallel, train = config.parallel, config.train
        tokens = (train.global_batch or 0) * config.data.sequence if config.workload == "train" else 0
        return {
            "layout": self.layout, "ranks": self.ranks, "nodes": self.nodes, "slots_per_node": self.slots_per_node,
            "parameters": parameters.count(model).to_json(), "memory": self.memory, "step_time": self.step_time,
            "tokens_per_step": tokens, "tokens": tokens * train.steps,
            "flops_per_token": flops.train_flops_per_token(model, config.data.sequence),
            "mfu_basis": flops.basis(config.hardware, auto.precision_of(config)),
            "warnings": self.warnings, "notes": self.notes, "model": model.name, "hardware": config.hardware.name,
            "device": _device(config.hardware), "cluster": config.cluster.name, "steps": train.steps,
            "choices": [asdict(choice) for choice in self.choices],
            "data": config.data.path or "source files of Python's standard library", "precision": train.precision,
            "engine": train.engine, "optimizer": config.optim.kind, "zero": parallel.zero, "schedule": parallel.schedule,
            "chunks": runnable.chunks_of(parallel), "context": parallel.context, "recompute": train.recompute,
            "measures": _measures(config) if config.workload == "collectives" else "",
        }  # fmt: skip


def _measures(config: RunConfig) -> str:
    """What a measurement goes through."""
    made = config.collectives
    groups, sizes = ", ".join(made.groups), f"{made.min_size} to {made.max_size} bytes"
    return {
        "moe": "expert-parallel traffic under routing",
        "faults": "which hosts, links and pairs are slow",
        "sweep": f"{', '.join(made.ops)} over {groups}, {sizes} of {', '.join(made.dtypes)}",
    }[made.study]


def _device(hardware: HardwareConfig) -> str:
    """What is on record of a device, and where from."""
    known = [
        ("memory", hardware.memory_gib, "GiB"), ("memory bandwidth", hardware.memory_gbps, "GB/s"),
        ("links in a node", hardware.intra_node_gbps, "GB/s"), ("network", hardware.inter_node_gbps, "GB/s"),
    ]  # fmt: skip
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
    training = config.workload == "train"
    # With open axes the search keeps the rules, with chunks and batches that aren't set yet.
    if strict and training and not config.parallel.open and (refusal := runnable.refusal(config)):
        raise UserError(refusal)
    nodes, each = config.cluster.nodes, config.cluster.slots_per_node
    if capacity is not None and nodes and each and nodes * each > capacity.total:
        raise UserError(
            f"cluster.nodes={nodes} x cluster.slots_per_node={each} are {nodes * each} slots, and the cluster has "
            f"{capacity.total} ({capacity}); lower one of the two, or start more"
        )
    draft = _Draft(config, capacity)
    job, dp = draft.close_axes(), draft.data_parallel()
    layout = Layout(**{axis: dp if axis == "dp" else draft.config.parallel.size(axis) for axis in AXES})
    nodes, each = draft.spread(layout)
    # A gang that spreads unevenly is left to placement, which keeps its blocks whole.
    spread = {"nodes": nodes, "slots_per_node": each} if nodes * each == layout.ranks else {}
    filled = {"parallel": {"dp": dp}, "cluster": spread, "train": draft.train(dp), "model": draft.router()}
    tree = draft.config.model_dump()
    resolved = validated(tree | {section: tree[section] | values for section, values in filled.items()})
    size, step_time = dict[str, int](), dict[str, Any]()
    if training:
        job = job or auto.job_of(resolved, layout, each)
        size, step_time = _estimate(resolved, job, draft.warnings)
        draft.notes += [note] if (note := auto.lending(config, job)) else []
        if refusal := runnable.refusal(resolved):
            if strict:
                raise UserError(refusal)
            draft.notes.append(refusal)
        if wasteful := runnable.advice(resolved):
            draft.warnings.append(wasteful)
        if idle := runnable.never_lends(resolved, each):
            draft.warnings.append(idle)
    elif layout.ranks < 2:
        raise UserError("a measurement needs at least two ranks; set parallel.dp=2 or more")
    said = tuple(draft.choices), tuple(draft.warnings), tuple(draft.notes)
    return RunPlan(resolved, layout.to_json(), nodes, each, size, step_time, *said)


def _requested_capacity(config: RunConfig) -> Capacity:
    """The slots that a run asks for by itself, where no cluster is up: on one node of its hardware, unless it says more."""
    cluster = config.cluster
    each = cluster.slots_per_node or config.hardware.devices_per_node or 1
    return Capacity((each,) * (cluster.nodes or 1))


class _Draft:
    """A configuration on its way to a plan: each step fills in what is open, and notes what it chose and why."""

    def __init__(self, config: RunConfig, capacity: Capacity | None) -> None:
        self.config, self.capacity, self.training = config, capacity, config.workload == "train"
        self.choices: list[AutoValue] = []
        self.warnings: list[str] = []
        self.notes = list(left_out(config.model)) if self.training else []

    def choose(self, field: str, value: object, reason: str) -> None:
        """Note a choice."""
        self.choices.append(AutoValue(field, str(value), reason))

    def close_axes(self) -> TrainingJob | None:
        """Set the open axes; the job that the search found for them, None where nothing was open or no time is known."""
        config = self.config
        parallel, train = config.parallel, config.train
        if not parallel.open:
            return None
        if not self.training:
            for axis in parallel.open:
                self.choose(f"parallel.{axis}", 1, "a measurement needs no other axis than dp")
            self.config = _with(config, parallel=dict.fromkeys(parallel.open, 1))
            return None
        chosen = auto.choose(config, (self.capacity or _requested_capacity(config)).slots)
        self.choices += chosen.choices
        self.notes += chosen.notes
        job = chosen.job
        settings: dict[str, dict[str, Any]] = {"parallel": {}, "train": {}}
        if job:
            settings = auto.settings(job)
            if train.global_batch is None:
                settings["train"]["global_batch"] = job.global_batch
                reason = f"train.micro_batch={train.micro_batch} for each of {job.layout.ranks} ranks, in any layout"
                self.choose("train.global_batch", job.global_batch, reason)
        sizes = chosen.layout.to_json()
        self.config = _with(config, parallel=sizes | settings["parallel"], train=settings["train"])
        return job

    def data_parallel(self) -> int:
        """Size of dp: as set, else the most that the slots hold and the batches divide over."""
        config, capacity = self.config, self.capacity
        parallel, train, cluster = config.parallel, config.train, config.cluster
        if parallel.dp is not None:
            return parallel.dp
        if capacity is None and (cluster.nodes or cluster.slots_per_node):
            capacity = _requested_capacity(config)
        unit = runnable.least_dp(parallel)
        others = parallel.size("pp") * parallel.size("cp") * parallel.size("tp")
        dp, reason = unit, f"smallest dp compatible with parallel.ep={parallel.size('ep')}"
        if capacity is not None:
            batch = math.gcd(train.global_batch or 0, train.ramp_batch or 0)

            def divides(dp: int) -> bool:
                """Whether all batches divide over so many replicas, and give their pipelines what they need."""
                filled = runnable.unfilled(_with(config, parallel={"dp": dp})) is None
                return filled and batch % (train.micro_batch * dp) == 0

            # Where no batch divides over the nodes that were asked for, it is the batch that is refused.
            held = [ranks // others for ranks in auto.sizes(config, capacity.slots, unit * others)]
            otherwise = held[0] if held and (cluster.nodes or cluster.slots_per_node) else unit
            dp = next((n for n in held if divides(n)), otherwise)
            if dp > unit:
                reason = f"the most that {capacity.total} slots ({capacity}) hold, in multiples of {unit}"
        elif not self.training and unit * others == 1:
            dp, reason = 2, "the fewest ranks that can measure a collective"
        self.choose("parallel.dp", dp, reason)
        return dp

    def spread(self, layout: Layout) -> tuple[int, int]:
        """Nodes, and ranks on each."""
        ranks, cluster, capacity = layout.ranks, self.config.cluster, self.capacity
        nodes, each = cluster.nodes, cluster.slots_per_node
        if nodes and each and nodes * each != ranks:
            raise UserError(
                f"cluster.nodes={nodes} x cluster.slots_per_node={each} are {nodes * each} slots, but the layout has "
                f"{ranks} ranks; leave one of the two out"
            )
        limits = {f"cluster.{name}": n for name, n in (("nodes", nodes), ("slots_per_node", each)) if n}
        for name, n in limits.items():
            if ranks % n:
                raise UserError(f"{name}={n} does not divide the layout's {ranks} ranks; choose a divisor")
        if capacity is None:
            width = min(self.config.hardware.devices_per_node or ranks, ranks)
            least = nodes or (ranks // each if each else 1)
            capacity = Capacity((width,) * max(least, -(-ranks // width)))
        elif ranks > capacity.total:
            # dp as small as its expert groups allow can't be lowered: then the widest other axis can.
            axis = max((a for a in AXES if a != "dp"), key=lambda a: getattr(layout, a))
            if layout.dp > runnable.least_dp(self.config.parallel):
                axis = "dp"
            raise UserError(
                f"the layout needs {ranks} slots, and the cluster has {capacity.total} ({capacity}); "
                f"lower parallel.{axis}={getattr(layout, axis)}, or start more: python -m orchestrator down, then up "
                f"--slots {ranks}"
            )
        slots = capacity.slots
        fitting = spreads(ranks, slots, nodes, each)
        if limits and not fitting:
            name, n = next(iter(limits.items()))
            raise UserError(
                f"{name}={n} does not fit the cluster ({capacity}) with {ranks} ranks; leave it out"
            )
        inside = [(n, per) for n, per in fitting if per % layout.inner == 0]
        if not inside and layout.inner > 1 and ranks > max(slots):
            self.warnings.append(
                f"groups of {layout.inner} neighbouring ranks (ep*etp, tp) cross nodes: their traffic takes the network"
            )
        n, per = (inside or fitting or [(len(slots), max(slots))])[0]
        if not limits:
            spread = f"{per} ranks on each" if n > 1 else f"one node holds all {ranks} ranks"
            self.choose("cluster.nodes", n, f"the fewest that hold the gang: {spread}")
        return n, per

    def train(self, dp: int) -> dict[str, Any]:
        """The auto fields of `train`.

        Raises:
            UserError: where the batch isn't a multiple of what all replicas take at once.
        """
        train, pp, device = self.config.train, self.config.parallel.size("pp"), self.config.hardware.name
        unit, count = train.micro_batch * dp, runnable.filling(pp)
        if train.global_batch is not None and train.global_batch % unit:
            raise UserError(
                f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch*dp={unit}; "
                f"set it to a multiple of {unit}"
            )
        how = f"{count} each for {pp} pipeline stages" if pp > 1 else "no accumulation"
        precision = auto.precision_of(self.config)
        peak = "a bf16 peak; master weights stay fp32" if precision == "bf16" else "no bf16 peak on record"
        values: dict[str, Any] = {}
        for field, value, reason in (
            ("global_batch", unit * count, f"train.micro_batch={train.micro_batch} on {dp} data-parallel ranks, {how}"),
            ("precision", precision, f"{device} has {peak}"),
            ("engine", "native",
             "it runs every layout; deepspeed (dp and ep at ZeRO 1 and 2) is used only if you set it"),
        ):  # fmt: skip
            values[field] = getattr(train, field)
            if values[field] is None:
                values[field] = value
                if self.training:
                    self.choose(f"train.{field}", value, reason)
        return values

    def router(self) -> dict[str, Any]:
        """The model's router, with its automatic bias step."""
        experts, router = self.config.model.experts, self.config.model.router
        if router.balance not in ("bias", "both") or router.bias_update_rate is not None:
            return {}
        rate = router.bias_rate(experts)
        reason = f"0.2 % of the mean softmax score, 1/{experts}"
        if router.bias_rule == "load_error":
            reason = "a step of AdamW on the load error, as ZAYA1"
        elif router.score == "sigmoid":
            reason = "0.2 % of a sigmoid score's mean of a half, as DeepSeek-V3"
        if self.training:
            self.choose("model.router.bias_update_rate", f"{rate:g}", reason)
        return {"router": router.model_dump() | {"bias_update_rate": rate}}


def _with(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The configuration with other values of some sections' fields."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def _estimate(
    config: RunConfig, job: TrainingJob, warnings: list[str]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Memory of the fullest rank by component, and the predicted step time."""
    stage, used = memory.worst(job, config.hardware.kind)
    size = {name: round(value) for name, value in memory.summary(used).items() if round(value)}
    where = f" on stage {stage}" if job.layout.pp > 1 else ""
    needed, most, have = used.needed / GIB, used.at_most / GIB, config.hardware.memory_gib
    if have is not None and needed > have:
        largest = max(size, key=lambda name: size[name])
        warnings.append(
            f"estimated {needed:.1f} GiB per rank{where}, {config.hardware.name} has {have:g}, most of it for "
            f"{largest} ({size[largest] / GIB:.1f} GiB); raise parallel.ep, dp, tp or zero, set train.recompute=full, or "
            "lower train.micro_batch; parallel=auto searches"
        )
    elif have is not None and most > have:
        warnings.append(
            f"it may not fit: {needed:.1f} GiB per rank{where} are expected and up to {most:.1f} possible, "
            f"{config.hardware.name} has {have:g}; lower train.micro_batch to be sure"
        )
    made = auto.predicted(job, config.hardware)
    if isinstance(made, Figure):
        return size, {"seconds": made.value, "low": made.low, "high": made.high}
    return size, {"unknown": made}
