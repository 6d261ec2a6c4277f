"""What a micro-batch takes on one device, operator by operator: what lint and suggestions compare.

Matmuls are priced by `trainer.sizing.time.matmul`, the attention core and what only moves memory by
`trainer.sizing.time.operators`. Communication isn't in it: it depends on the layout, not on the shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.hardware import HardwareConfig
from configs.profile import DeviceProfile
from trainer.sizing.figures import Figure
from trainer.sizing.model import flops, shapes
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time import operators
from trainer.sizing.time.estimate import together
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.kernels import MatmulShape
from trainer.sizing.time.rates import Rates


@dataclass(frozen=True)
class Price:
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
        """Of device and host together."""
        return together(self.device, self.launches)


class Prices:
    """Prices on one kind of device."""

    def __init__(self, hardware: HardwareConfig, profile: DeviceProfile | None = None) -> None:
        self.hardware = hardware
        self.rates = Rates(hardware, from_catalogue(hardware), profile)
        self.kernels = self.rates.kernels
        self._known: dict[TrainingJob, Price | None] = {}

    def why_not(self, precision: str) -> str:
        """Why there are no prices; empty where there are."""
        return self.kernels.why(precision)

    def of(self, job: TrainingJob) -> Price | None:
        """The price of a micro-batch over all layers, one tensor-parallel rank's share; None where rates are unknown."""
        if job not in self._known:
            self._known[job] = self._price(job)
        return self._known[job]

    def _price(self, job: TrainingJob) -> Price | None:
        matmuls: dict[str, float] = {}
        for one in shapes.forward(job):
            seconds = self.matmul(one, job)
            if seconds is None:
                return None
            matmuls[one.name] = matmuls.get(one.name, 0.0) + seconds
        attention, memory = self._rest(job)
        if math.isnan(attention + memory):
            return None
        per_token = flops.train_flops_per_token(job.model, job.sequence)
        over = self.rates.overheads
        launches = 3 * over.pass_kernels * over.launch * job.model.layers
        return Price(matmuls, attention, memory, launches, per_token * job.tokens / job.layout.tp, job.tokens)

    def matmul(self, one: shapes.Matmul, job: TrainingJob) -> float | None:
        """Seconds of all calls of a matmul with their gradients, at the rate that a long run keeps; None where unknown."""
        seconds = one.seconds(self.kernels, job.precision, job.imbalance)
        return None if seconds is None else seconds / self.rates.kept

    def _rest(self, job: TrainingJob) -> tuple[float, float]:
        """Seconds of the attention core, and of what only moves memory."""
        model = job.model
        core = sum(operators.core(job, self.rates, backward)[0] for backward in (False, True))
        memory = sum(one.memory for one in operators.head(job, self.rates))
        with_experts = len(model.moe_layers)
        for moe, count in ((False, model.layers - with_experts), (True, with_experts)):
            if count:
                memory += count * sum(one.memory for one in operators.layer(job, self.rates, moe))
        return core * model.layers, memory

    def figure(self, job: TrainingJob) -> Figure | None:
        """The price with its derivation; None where rates are unknown."""
        price = self.of(job)
        if price is None:
            return None
        parts = []
        for one in shapes.forward(job):
            shape = MatmulShape(one.m, one.n, one.k, one.experts)
            forward = self.kernels.matmul_figure(f"time.{_slug(one.name)}.forward", shape, job.precision)
            seconds = self.matmul(one, job) or 0.0
            low, high = (forward.low / forward.value, forward.high / forward.value) if forward else (0.7, 1.4)
            how = f"{one.count} calls of [{one.m}, {one.k}] x [{one.k}, {one.n}], each with its two gradients"
            if self.rates.kept < 1:
                how += f", at {self.rates.kept:.0%} of a short benchmark's rate"
            parts.append(
                Figure(f"time.{_slug(one.name)}", seconds, "s", seconds * low, seconds * high, how,
                       (forward,) if forward else ())
            )  # fmt: skip
        head = operators.padded_head(job.model.head_dim)
        how = f"attention core of {job.model.layers} layers, {job.model.heads} heads computed {head} wide, both passes"
        parts.append(_loose("time.attention", price.attention, how, 0.35))
        how = "bytes of norms, residuals, activation functions, routing and loss over the memory bandwidth reached"
        parts.append(_loose("time.memory", price.memory, how, 0.35))
        over = self.rates.overheads
        kernels = f"{3 * over.pass_kernels} kernels a layer at {over.launch * 1e6:g} us, {price.launches * 1e3:.3g} ms"
        how = f"what launching ({kernels}) adds to the device's {price.device * 1e3:.4g} ms; {over.source}"
        parts.append(_loose("time.host", price.seconds - price.device, how, 0.5))
        return Figure(
            "time.micro_batch", price.seconds, "s", sum(p.low for p in parts), sum(p.high for p in parts),
            "sum of its operators, forward and backward, all layers, without communication", tuple(parts),
        )  # fmt: skip


def _loose(name: str, seconds: float, how: str, spread: float) -> Figure:
    return Figure(name, seconds, "s", seconds * (1 - spread), seconds * (1 + spread), how)


def _slug(name: str) -> str:
    """A name as `--explain` takes it."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.replace("'", "")).split())
