"""The lint's rules as data (`configs/lint.yaml`), what a check looks at, and the efficiencies that rules rest on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from configs.hardware import HardwareConfig
from configs.section import Section
from trainer.sizing.figures import Figure, approximate
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.cost_model import CostModel, MicroBatchCost

FILE = Path(__file__).resolve().parents[3] / "configs" / "lint.yaml"
Fits = Callable[[TrainingJob], bool | None]
"""Whether a job fits into the device's memory; None where that is unknown."""


class LintRule(Section):
    """One rule."""

    name: str
    rule: str
    """What it asks for."""
    reason: str
    source: str
    kinds: tuple[Literal["cuda", "rocm"], ...] = ("cuda", "rocm")
    """Devices that it is for."""
    architectures: tuple[str, ...] = ()
    """Generations that it is for; empty for all."""
    check: str
    """Function that looks for it; `none` where a model's shape can't show it."""
    numbers: dict[str, int] = {}
    """What the check compares with."""

    def applies(self, hardware: HardwareConfig) -> bool:
        """Whether the rule is for this device."""
        ours = not self.architectures or hardware.architecture in self.architectures
        return hardware.kind in self.kinds and ours


@cache
def rules() -> tuple[LintRule, ...]:
    """All rules, in the order of the file."""
    return tuple(LintRule.model_validate(rule) for rule in yaml.safe_load(FILE.read_text()))


@dataclass(frozen=True)
class LintFinding:
    """One broken rule."""

    rule: LintRule
    field: str
    """What breaks it: a field of the configuration, or a matmul."""
    value: str
    better: str
    """What to set instead."""
    cost: float | None
    """Percent of the micro-batch's time; None where unknown."""
    basis: str
    """How the cost came about, or why it is unknown."""

    @property
    def figure(self) -> Figure | None:
        """The cost with its derivation."""
        if self.cost is None:
            return None
        name = f"lint.{self.rule.name}.{self.field.rpartition('.')[2].replace(' ', '_')}"
        how = f"{self.basis}; {self.rule.reason} ({self.rule.source})"
        return approximate(name, self.cost, "%", 0.5, how)


@dataclass(frozen=True)
class LintContext:
    """The input of a rule's check."""

    rule: LintRule
    job: TrainingJob
    costs: CostModel
    fits: Fits

    @property
    def hardware(self) -> HardwareConfig:
        """The device."""
        return self.costs.hardware

    @property
    def now(self) -> MicroBatchCost | None:
        """The job's price; None where the device's rates are unknown."""
        return self.costs.micro_batch(self.job)

    def finding(self, field: str, value: object, better: str, cost: float | None, basis: str) -> LintFinding:
        """A finding of this rule."""
        return LintFinding(self.rule, field, str(value), better, cost, basis)

    def cost(self, better: TrainingJob, padding: bool = False) -> tuple[float | None, str]:
        """Percent of the time that `better` saves at equal work, and how; of equal tokens where it only pads."""
        now, then = self.now, self.costs.micro_batch(better)
        if now is None or then is None:
            return None, self.costs.rates.kernels.why(self.job.precision)
        if padding:
            a, b, of = now.seconds / now.tokens, then.seconds / then.tokens, "a token"
        else:
            a, b, of = now.seconds / now.flops, then.seconds / then.flops, "a FLOP"
        times = f"micro-batch {now.seconds * 1e3:.4g} ms now, {then.seconds * 1e3:.4g} ms then"
        return 100 * (1 - b / a), f"{times}: {1 - b / a:.2%} less time {of}"

    def larger(self, factor: int) -> TrainingJob | None:
        """The job with micro-batches `factor` times as large, or by what part of it still fits; None where none does."""
        while factor > 1:
            job = batched(self.job, factor)
            if self.fits(job) is not False:
                return job
            factor //= 2
        return None

    def best(self, jobs: Sequence[TrainingJob]) -> TrainingJob:
        """The job that saves most; the first where nothing is known."""
        return max(jobs, key=lambda job: self.cost(job)[0] or 0.0)


def changed(job: TrainingJob, **fields: object) -> TrainingJob:
    """The job with other fields of its model."""
    return replace(job, model=job.model.model_copy(update=fields))


def batched(job: TrainingJob, factor: int) -> TrainingJob:
    """The job with larger micro-batches, and as many of them."""
    return replace(job, micro_batch=job.micro_batch * factor, global_batch=job.global_batch * factor)


REFERENCE_TILE = {"cuda": (128, 256), "rocm": (256, 256)}
"""Output tile that a device's best matmuls use; libraries choose smaller ones where these fit badly."""


def wave_efficiency(rows: int, columns: int, tile: tuple[int, int], units: int, experts: int = 1) -> float:
    """Share of the waves' places that useful tiles fill: tiles / (waves * units), in whole tiles, 0 to 1."""
    tiles = tile_count(rows, columns, tile, experts)
    return tiles / (-(-tiles // units) * units)


def tile_count(rows: int, columns: int, tile: tuple[int, int], experts: int = 1) -> int:
    """Tiles of the outputs of all experts, each with its share of the rows."""
    each = -(-rows // experts)
    return experts * -(-each // tile[0]) * -(-columns // tile[1])


def balance_width(peak_tflops: float, gbps: float) -> float:
    """Expert width at which compute takes as long as the exchange of tokens (R = 1).

    MegaScale-MoE (arXiv 2505.11432): R = 3/2 * width * bandwidth / peak, bf16, one direction, FLOP/s and bytes/s.
    """
    return peak_tflops * 1e12 / (1.5 * gbps * 1e9)
