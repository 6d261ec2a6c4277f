"""The cost of a micro-batch on one device, operator by operator, by which lint and suggestions compare shapes.

Matmuls are priced by `trainer.sizing.time.matmul`, the attention core and what only moves memory by
`trainer.sizing.time.operators`. Communication isn't in it: it depends on the layout, not on the shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.hardware import HardwareConfig
from configs.profile import DeviceProfile
from trainer.sizing.figures import Figure, approximate, summed
from trainer.sizing.model import flops, shapes, weights
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time import operators
from trainer.sizing.time.estimate import overlapped
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.kernels import MatmulShape
from trainer.sizing.time.rates import Rates


@dataclass(frozen=True)
class MicroBatchCost:
    """Seconds of forward and backward of one micro-batch, and the work that is in them."""

    matmuls: dict[str, float]
    """By name, over all layers."""
    attention: float
    memory: float
    """Norms, residuals, activation functions, routing, loss: bound by memory bandwidth."""
    launches: float
    """What the host takes to launch all of it."""
    flops: float
    """Model FLOPs, as MFU counts them."""
    tokens: int

    @property
    def device(self) -> float:
        """Seconds of the device alone."""
        return sum(self.matmuls.values()) + self.attention + self.memory

    @property
    def seconds(self) -> float:
        """Of device and host overlapped."""
        return overlapped(self.device, self.launches)


class CostModel:
    """Costs of micro-batches on one kind of device."""

    def __init__(self, hardware: HardwareConfig, profile: DeviceProfile | None = None) -> None:
        self.hardware = hardware
        self.rates = Rates(hardware, from_catalogue(hardware), profile)
        self._known: dict[TrainingJob, MicroBatchCost | None] = {}

    def micro_batch(self, job: TrainingJob) -> MicroBatchCost | None:
        """The price of a micro-batch over all layers, one tensor-parallel rank's share; None where rates are unknown."""
        if job not in self._known:
            self._known[job] = self._price(job)
        return self._known[job]

    def _price(self, job: TrainingJob) -> MicroBatchCost | None:
        model, rates, over = job.model, self.rates, self.rates.overheads
        matmuls: dict[str, float] = {}
        layers = model.layers + model.mtp_layers
        for one in shapes.forward(job):
            matmuls[one.name] = matmuls.get(one.name, 0.0) + self.matmul(one, job)
        attention = (
            sum(operators.attention_core(job, rates, backward)[0] for backward in (False, True)) * layers
        )
        memory = sum(one.memory for one in operators.head(job, rates))
        for count, moe in weights.kinds(model):
            memory += count * sum(one.memory for one in operators.layer(job, rates, moe))
        if math.isnan(attention + memory + sum(matmuls.values())):
            return None
        launches = 3 * over.pass_kernels * over.launch * layers
        work = flops.train_flops_per_token(model, job.sequence) * job.tokens / job.layout.tp
        return MicroBatchCost(matmuls, attention, memory, launches, work, job.tokens)

    def matmul(self, one: shapes.Matmul, job: TrainingJob) -> float:
        """Seconds of all calls of a matmul with their gradients, at the rate that a long run keeps; NaN where unknown."""
        kernels = self.rates.kernels
        both = sum(one.once(kernels, job.precision, back, job.imbalance) for back in (False, True))
        return one.count * both / self.rates.sustained_share

    def figure(self, job: TrainingJob) -> Figure | None:
        """The price with its derivation; None where rates are unknown."""
        price, over, kept = self.micro_batch(job), self.rates.overheads, self.rates.sustained_share
        if price is None:
            return None
        parts = []
        slower = f", at {kept:.0%} of a short benchmark's rate" if kept < 1 else ""
        for one in shapes.forward(job):
            name, shape = f"time.{_slug(one.name)}", MatmulShape(one.m, one.n, one.k, one.experts)
            forward = self.rates.kernels.matmul_figure(f"{name}.forward", shape, job.precision)
            seconds = self.matmul(one, job)
            assert forward is not None, "it has a price"
            low, high = seconds * (forward.low / forward.value), seconds * (forward.high / forward.value)
            how = f"{one.count} calls of [{one.m}, {one.k}] x [{one.k}, {one.n}], each with its two gradients{slower}"
            parts.append(Figure(name, seconds, "s", low, high, how, (forward,)))
        head = operators.padded_head(job.model.head_dim)
        kernels = f"{3 * over.pass_kernels} kernels a layer at {over.launch * 1e6:g} us, {price.launches * 1e3:.3g} ms"
        layers = job.model.layers + job.model.mtp_layers
        for name, seconds, spread, how in (
            ("attention", price.attention, 0.35, f"attention core of {layers} layers, {job.model.heads} heads "
             f"computed {head} wide, both passes"),
            ("memory", price.memory, 0.35, "bytes of norms, residuals, activation functions, routing and loss over the "
             "memory bandwidth reached"),
            ("host", price.seconds - price.device, 0.5, f"what launching ({kernels}) adds to the device's "
             f"{price.device * 1e3:.4g} ms; {over.source}"),
        ):  # fmt: skip
            parts.append(approximate(f"time.{name}", seconds, "s", spread, how))
        how = "sum of its operators, forward and backward, all layers, without communication"
        return summed("time.micro_batch", price.seconds, "s", how, parts)


def _slug(name: str) -> str:
    """A name as `--explain` takes it."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.replace("'", "")).split())
