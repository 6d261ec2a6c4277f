"""Memory of a rank: what a training step needs at its fullest moment, by part, for every pipeline stage.

Three sums are distinguished. `allocated` is what tensors take; `reserved` is what the allocator holds for them, with holes
and with buffers that wait for the device; the `framework` (driver, context, communicators) is outside of both. A job
fits where all of it, but for waiting buffers, which an allocator under pressure gets back, is within the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.hardware import HardwareConfig
from trainer.sizing.figures import Figure, summed
from trainer.sizing.memory import activations, backward_peak, states
from trainer.sizing.memory.backward_peak import UPDATE, MemoryPoint
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time import schedule

GIB = 1 << 30
#: What the allocator holds over what tensors take, as a share of all that comes and goes within a step: least, expected,
#: most. Calibrated on 31 runs of the published nanotron sweep (one tensor-parallel rank, before its pipeline fix): their
#: median is 0.17, their 10th and 95th percentiles -0.04 and 0.40.
SLACK = (0.0, 0.18, 0.40)
#: GiB that a GPU's driver holds back (H100 80 GB: nvidia-smi shows 81,559 of 81,920 MiB) and a process's context takes.
DRIVER, CONTEXT = 0.35, 0.5
#: GiB of a communicator: 24 channels with buffers of 4 MiB (Simple), 4.7 MiB (LL128) and 0.5 MiB (LL), for a ring and
#: part of a tree (NCCL's defaults). RCCL's are not on record and are taken to be equal.
COMMUNICATOR = 0.3
#: Launches that a CUDA stream queues before the host has to wait, and those from one tensor-parallel collective to the
#: next: a host that runs ahead has at most 60 of them outstanding. The latter is not a count but what the sweep's runs
#: without a pipeline show, 60 buffers whatever the number of layers; half of them is expected where nothing is known.
QUEUE, LAUNCHES = 1024, 17
#: Whole-sequence tensors in use at once: embedding, its gradient, a row-parallel output, a column-parallel gradient.
AT_WORK = 4


@dataclass(frozen=True)
class MemoryUsage:
    """Bytes of one rank of a stage at its fullest moment."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    """Reduction buckets, staging, and layers gathered under ZeRO-3."""
    activations: float
    imbalance: float
    """More rows than the mean, on the rank with the most."""
    routing: float
    """Rows on their way to the experts and back."""
    moment: str
    """Which moment is the fullest."""
    transient: float
    """What that moment takes for a while."""
    exchange: float
    """Whole-sequence buffers of tensor and context parallelism."""
    slack: float
    """What the allocator holds beyond it."""
    waiting: float
    """Buffers that wait for the device to be done with them."""
    framework: float
    least_slack: float
    most_slack: float
    most_waiting: float

    @property
    def allocated(self) -> float:
        """Bytes of tensors."""
        lasting = self.weights + self.gradients + self.optimizer + self.buckets
        return lasting + self.activations + self.imbalance + self.routing + self.transient + self.exchange

    @property
    def reserved(self) -> float:
        """Bytes that the allocator holds: what frameworks log as their peak."""
        return self.allocated + self.slack + self.waiting

    @property
    def needed(self) -> float:
        """Bytes of the device that the job can't do without."""
        return self.allocated + self.slack + self.framework

    @property
    def at_most(self) -> float:
        """`needed`, with the most slack that was seen."""
        return self.allocated + self.most_slack + self.framework

    @property
    def total(self) -> float:
        """Bytes of the device."""
        return self.reserved + self.framework


def usage(job: TrainingJob, kind: str, stage: int, what: schedule.StageLayers) -> MemoryUsage:
    """Bytes of stage number `stage`, which holds `what`, on a device driven by `kind`."""
    retention, layout = job.software.retention, job.layout
    held, in_flight = states.model_states(job, what), activations.in_flight(job, stage)
    exchange, waiting = _exchange(job, what, in_flight)
    # On a host, pages of a buffer that nothing is written to take no memory.
    staging = retention.staging if kind != "cpu" else 0.0
    spread = layout.ep * layout.etp > 1
    routing = 0.0  # rows that are sent and received, for one layer at a time
    if what.moe and not (job.software.fsdp and (job.gathers_experts or not spread)):
        routing = activations.rows(job) * job.model.hidden * job.element * (2 * job.fullest if spread else 1)
    if job.software.fsdp:
        moment = backward_peak.peak(job, what, in_flight)
        weights = backward_peak.lasting(job, what) + moment.gathered
    else:
        moment = _standing(job, what, in_flight, held.gradients, staging + routing + exchange)
        weights = held.weights
    if moment.name == UPDATE:  # nothing is exchanged
        staging = routing = exchange = 0.0
    moving = moment.activations + moment.transient + moment.imbalance + routing
    behind = retention.host_slow and layout.ranks > job.node and layout.pp <= 2
    holes = _holes(job, what, held.optimizer)
    return MemoryUsage(
        weights=weights, gradients=moment.gradients, optimizer=held.optimizer, buckets=held.buckets + staging,
        activations=moment.activations, imbalance=moment.imbalance, routing=routing,
        moment=moment.name, transient=moment.transient, exchange=exchange, framework=framework(job, kind),
        slack=SLACK[1] * moving + holes, least_slack=SLACK[0] * moving, most_slack=SLACK[2] * moving + holes,
        waiting=0.0 if behind else waiting / 2, most_waiting=waiting,
    )  # fmt: skip


def _standing(
    job: TrainingJob, what: schedule.StageLayers, in_flight: float, gradients: float, beside: float
) -> MemoryPoint:
    """The fullest moment where gradients stay; `beside`: bytes that are there at each moment but the update."""
    once = sum(count * activations.saved_bytes(job, moe) for count, moe in what.kinds)
    once += activations.head_bytes(job) if what.head else 0.0
    extra = in_flight * what.moe * activations.imbalance_bytes(job) if what.moe else 0.0
    # Of a layer's backward pass: a gradient of all that it keeps, and what is made again.
    each = [
        sum(activations.layer_parts(job, moe).values()) + activations.recomputed_bytes(job, moe)
        for _, moe in what.kinds
    ]
    most, late = (
        max(each, default=0.0),
        job.software.retention.late_gradients * states.local_weights(job, what).all,
    )
    fullest = max(
        MemoryPoint(
            "the loss", gradients, in_flight * once, extra, activations.logit_bytes(job) if what.head else 0.0
        ),
        MemoryPoint("a layer's backward pass", gradients, in_flight * once, extra, most),
        MemoryPoint(
            "the end of a backward pass", gradients, max(0.0, in_flight - 1) * once, extra, late + most
        ),
        key=lambda moment: moment.all,
    )
    update = MemoryPoint(UPDATE, gradients, 0.0, 0.0, states.update_bytes(job, what))
    return update if update.all > fullest.all + beside else fullest


def _exchange(job: TrainingJob, stage: schedule.StageLayers, in_flight: float) -> tuple[float, float]:
    """Whole-sequence buffers at work, and those that may be outstanding beyond them."""
    layout, retention, token, buffers = job.layout, job.software.retention, job.element * job.tokens, 0.0
    if layout.cp > 1 and job.software.context == "ulysses":
        buffers += token * (activations.query_widths(job)[0] + activations.context_width(job))
    elif layout.cp > 1:
        buffers += activations.context_bytes(job)
    if job.split == 1:
        return buffers, 0.0
    whole = token * job.model.hidden
    buffers += whole * retention.whole_buffers
    if not retention.deferred_frees:
        return buffers + 2 * whole, 0.0
    buffers += AT_WORK * whole
    if retention.host_waits and layout.pp > 1:
        return buffers, 0.0
    # The host waits for the device where a gradient arrives from the next stage: until then two for each layer.
    ahead = 4 * stage.layers if layout.pp == 1 else 2 * stage.layers * max(0.0, in_flight - 1)
    return buffers, whole * max(0.0, min(QUEUE / LAUNCHES, ahead) - AT_WORK)


def _holes(job: TrainingJob, stage: schedule.StageLayers, optimizer: float) -> float:
    """The largest blocks of the first backward pass, copies of the logits, broken up by moments that are made after it."""
    if not (job.software.retention.late_moments and stage.head):
        return 0.0
    moments = job.software.moments[0]
    share = moments / (moments + states.MASTER)
    return min(4.0 * job.tokens * job.model.vocab / job.layout.tp, share * optimizer)


def framework(job: TrainingJob, kind: str) -> float:
    """Bytes outside of the allocator: driver, context and a communicator for all ranks and for each axis; none on a CPU."""
    if kind == "cpu":
        return 0.0
    layout = job.layout
    axes = (layout.pp, layout.dp * layout.cp, layout.tp, layout.ep, layout.etp, layout.ranks)
    return (DRIVER + CONTEXT + COMMUNICATOR * sum(size > 1 for size in axes)) * GIB


def worst(job: TrainingJob, kind: str) -> tuple[int, MemoryUsage]:
    """The fullest stage and its memory. Of equal stages only the first is looked at: it has the most in flight."""
    seen: dict[schedule.StageLayers, int] = {}
    for index, stage in enumerate(schedule.job_stages(job)):
        seen.setdefault(stage, index)
    usages = [(index, usage(job, kind, index, stage)) for stage, index in seen.items()]
    return max(usages, key=lambda pair: pair[1].needed)


def capacity(hardware: HardwareConfig) -> float | None:
    """Bytes of a device; None where it is unknown."""
    return None if hardware.memory_gib is None else hardware.memory_gib * GIB


def fits(job: TrainingJob, hardware: HardwareConfig) -> bool | None:
    """Whether every stage fits; None where the device's memory is unknown."""
    have = capacity(hardware)
    return None if have is None else worst(job, hardware.kind)[1].needed <= have


def peak(job: TrainingJob, hardware: HardwareConfig) -> Figure:
    """The fullest rank's memory with its interval, made from a figure for each stage, each made from its parts."""
    at, _ = worst(job, hardware.kind)
    made = [_figure(job, hardware.kind, index, stage) for index, stage in enumerate(schedule.job_stages(job))]
    top, have = made[at], capacity(hardware)
    against = "the device's memory is unknown" if have is None else f"the device has {have / GIB:g} GiB"
    how = f"stage {at} of {len(made)} is the fullest; {against}"
    return Figure("memory", top.value, "bytes", top.low, top.high, how, tuple(made))


def summary(used: MemoryUsage) -> dict[str, float]:
    """Bytes by few components, adding up to the total."""
    return {
        "weights": used.weights,
        "gradients": used.gradients,
        "optimizer": used.optimizer,
        "activations": used.activations + used.imbalance,
        used.moment.removeprefix("a ").removeprefix("the "): used.transient,
        "communication": used.routing + used.exchange + used.buckets,
        "allocator": used.slack + used.waiting,
        "framework": used.framework,
    }


def _figure(job: TrainingJob, kind: str, index: int, stage: schedule.StageLayers) -> Figure:
    """A stage's memory, made from its parts."""
    name, used, parts = f"memory.stage{index}", usage(job, kind, index, stage), []
    spread = {
        "slack": (used.least_slack, used.most_slack),
        "waiting": (0.0, used.most_waiting),
        "framework": (0.6 * used.framework, 1.8 * used.framework),
    }
    for part, how in _derivations(stage, used, job).items():
        value = getattr(used, part)
        low, high = spread.get(part, (value, value))
        parts.append(Figure(f"{name}.{part}", value, "bytes", low, high, how))
    return summed(name, used.total, "bytes", f"sum of its parts; fullest at {used.moment}", parts)


def _derivations(stage: schedule.StageLayers, used: MemoryUsage, job: TrainingJob) -> dict[str, str]:
    """How each part of a stage's memory came about."""
    mine, software, over = states.local_weights(job, stage), job.software, states.replicas(job.layout)
    held = f"B x ({mine.plain:,.0f} weights + {mine.routed:,.0f} of routed experts), ZeRO stage {job.zero}"
    layers = (
        f"{stage.dense} dense and {stage.moe} MoE layers x {job.tokens} tokens, recompute={job.recompute}"
    )
    return {
        "weights": f"bytes of an element x weights of the stage on one rank: {job.element} {held}",
        "gradients": f"bytes of an accumulated gradient x weights: {software.gradient_bytes} {held}",
        "optimizer": "master weights and moments, split over replicas under ZeRO: "
        f"{states.MASTER}+{software.moments[0]} {held} over {over[0]} replicas, of experts {over[1]}",
        "buckets": "reduction buckets and staging of the framework, layers gathered under ZeRO-3",
        "activations": f"what layers keep of each micro-batch in flight: {layers}",
        "imbalance": "rows beyond the mean on the fullest expert rank",
        "routing": "rows sent to experts and received, one layer at a time",
        "transient": f"what the fullest moment takes for a while: {used.moment}",
        "exchange": "buffers of the whole sequence for tensor and context parallelism",
        "slack": f"allocator's holes: a share of what comes and goes: {SLACK[1]:.0%} of what comes and goes within a step "
        f"({SLACK[0]:.0%} to {SLACK[2]:.0%})",
        "waiting": "buffers that wait for the device: half of what a host that runs ahead can have outstanding",
        "framework": "driver, context and communicators",
    }
