"""What the lint's checks look at, what they find, and the register that they are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from trainer.sizing.figures import Figure
from trainer.sizing.lint.rules import LintRule
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.price import Prices

Fits = Callable[[TrainingJob], bool | None]
"""Whether a job fits into the device's memory; None where that is unknown."""


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
        return Figure(name, self.cost, "%", self.cost * 0.5, self.cost * 1.5, how)


@dataclass(frozen=True)
class View:
    """What a check looks at."""

    job: TrainingJob
    prices: Prices
    fits: Fits

    def cost(self, better: TrainingJob, padding: bool = False) -> tuple[float | None, str]:
        """Percent of the time that `better` saves at equal work, and how; of equal tokens where it only pads."""
        now, then = self.prices.of(self.job), self.prices.of(better)
        if now is None or then is None:
            return None, self.prices.why_not(self.job.precision)
        if padding:
            a, b, of = now.seconds / now.tokens, then.seconds / then.tokens, "a token"
        else:
            a, b, of = now.seconds / now.flops, then.seconds / then.flops, "a FLOP"
        times = f"micro-batch {now.seconds * 1e3:.4g} ms now, {then.seconds * 1e3:.4g} ms then"
        how = f"{times}: {1 - b / a:.2%} less time {of}"
        return 100 * (1 - b / a), how

    def of_total(self, seconds: float) -> float | None:
        """Percent that `seconds` are of the micro-batch's time."""
        now = self.prices.of(self.job)
        return None if now is None else 100 * seconds / now.seconds

    def best(self, jobs: list[TrainingJob], padding: bool = False) -> TrainingJob:
        """The job that saves most; the first where nothing is known."""
        return max(jobs, key=lambda job: self.cost(job, padding)[0] or 0.0)


Check = Callable[[LintRule, View], Iterator[LintFinding]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


def changed(job: TrainingJob, **fields: object) -> TrainingJob:
    """The job with other fields of its model."""
    return replace(job, model=job.model.model_copy(update=fields))


def batched(job: TrainingJob, factor: int) -> TrainingJob:
    """The job with larger micro-batches, and as many of them."""
    return replace(job, micro_batch=job.micro_batch * factor, global_batch=job.global_batch * factor)


def around(value: int, multiple: int) -> list[int]:
    """The multiples below and above."""
    low = value // multiple * multiple
    return [v for v in (low, low + multiple) if v > 0]
