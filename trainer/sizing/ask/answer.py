"""What `size` says of one model on one device: counts, time, lint, suggestions, each number a figure to ask about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.compose import choices, compose
from configs.errors import UserError
from configs.hugging_face.read import is_model_file
from configs.profile import DeviceProfile, known, load
from configs.schema import RunConfig
from trainer.sizing.ask import catalogue
from trainer.sizing.figures import Figure, exact
from trainer.sizing.lint.check import lint
from trainer.sizing.lint.rules import LintFinding
from trainer.sizing.lint.suggest import Suggestion, suggest
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model import flops, parameters
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import auto, runnable
from trainer.sizing.time import step
from trainer.sizing.time.cost_model import CostModel

ASSUMED = {"data.sequence": "4096", "train.micro_batch": "4"}
"""What pre-training usually has, where nothing else is typed: the demo's values would say little about a large model."""
RECORDED = {"memory_gib": "GiB", "memory_gbps": "GB/s", "intra_node_gbps": "GB/s", "inter_node_gbps": "GB/s"}
"""What the prices and the fit rest on, with its unit."""
CATALOGUE = "catalogue"
"""Asks for published rates where a measured profile is there."""
CONVENTION = (
    "matrices without biases, one weight a channel for norms; balancing biases and residual gates not counted"
)


def configured(
    overrides: Sequence[str], file: Path | None = None, gpus: int | None = None
) -> tuple[RunConfig, tuple[str, ...]]:
    """The configuration to size, and what was assumed. With `gpus`, and nothing said of the layout, it is searched.

    Raises:
        UserError: for what `compose` refuses, and where model or hardware isn't named.
    """
    if file is not None and is_model_file(file):  # the same as `model=FILE`: it says nothing but the model
        overrides, file = [f"model={file}", *overrides], None
    typed = {override.partition("=")[0] for override in overrides}
    if file is None:
        for group in ("model", "hardware"):
            if group not in typed:
                raise UserError(f"{group}= is missing; type {group}= one of {', '.join(choices(group))}")
    assumed = [] if file is not None else [f"{k}={v}" for k, v in ASSUMED.items() if k not in typed]
    if gpus and file is None and not any(name.partition(".")[0] == "parallel" for name in typed):
        assumed.append("parallel=auto")
    return compose([*assumed, *overrides], file), tuple(assumed)


def job_of(config: RunConfig, gpus: int | None = None) -> tuple[TrainingJob, tuple[str, ...]]:
    """The job that a configuration describes, and why its layout is as it is where the planner chose it.

    `gpus` are what open axes are searched on; where all but dp are set, they set dp.

    Raises:
        UserError: where the GPUs don't divide into the layout, or no layout fits.
    """
    p, train = config.parallel, config.train
    node = config.hardware.devices_per_node or gpus or 1
    if p.open and gpus:
        full, rest = divmod(gpus, node)
        chosen = auto.choose(config, (node,) * full + ((rest,) if rest else ()))
        why = [f"{c.field}={c.value}: {c.reason}" for c in chosen.choices]
        return chosen.job or auto.job_of(config, chosen.layout, node), (*why, *chosen.notes)
    pp, cp, ep, etp, tp = (p.size(axis) for axis in ("pp", "cp", "ep", "etp", "tp"))
    others, groups = tp * pp * cp, ep * etp
    if gpus is not None and gpus % others:
        near = max(1, gpus // others) * others
        raise UserError(f"--gpus {gpus} is not a multiple of tp*pp*cp={others}; type --gpus {near}")
    dp = p.dp or (gpus // others if gpus else runnable.least_dp(p))
    if gpus is not None and dp * others != gpus:
        raise UserError(f"--gpus {gpus} is not dp*tp*pp*cp={dp * others}; leave out --gpus or parallel.dp")
    if (stage := dp * cp * tp) % groups:
        raise UserError(
            f"parallel.ep*etp={groups} does not divide dp*cp*tp={stage}; type another --gpus or parallel.ep"
        )
    # With a pipeline, one micro-batch would leave all stages but one idle.
    batch = train.global_batch or train.micro_batch * dp * runnable.filling(pp)
    return auto.job_of(config, Layout(pp, dp, cp, ep, etp, tp), node, batch), ()


@dataclass(frozen=True)
class SizingAnswer:
    """One model on one device."""

    config: RunConfig
    job: TrainingJob
    costs: CostModel
    assumed: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    """Why the layout is as it is, where the planner chose it."""
    suggestions_requested: bool = False
    """Whether suggestions are asked for."""

    def fits(self, job: TrainingJob) -> bool | None:
        """Whether a job fits into the device's memory; None where that is unknown."""
        return memory.fits(job, self.costs.hardware)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Why the trainer doesn't run what is sized, and which setting does nothing in it."""
        parallel = self.config.parallel.model_copy(update=self.job.layout.to_json())
        config = self.config.model_copy(update={"parallel": parallel})
        # With open axes the search keeps the rules, with chunks and batches that aren't set in the configuration.
        refused = None if self.chosen else runnable.refusal(config)
        node = min(self.config.hardware.devices_per_node or parallel.ranks, parallel.ranks)
        idle = None if refused else runnable.never_lends(config, node)
        return tuple(filter(None, (refused and f"the trainer doesn't run this: {refused}", idle)))

    @cached_property
    def why_not(self) -> str:
        """Why a micro-batch has no price; empty where it has one."""
        return self.costs.rates.kernels.why(self.job.precision)

    @property
    def basis(self) -> str:
        """What the rates are from."""
        profile = self.costs.rates.device
        if profile is None:
            return "catalogue (published peaks and best matmuls)"
        device, started = profile.conditions.get("device", "a device"), profile.conditions.get("started", "")
        return f"profile {profile.name}, measured on {device} {started}"

    @cached_property
    def findings(self) -> list[LintFinding]:
        """Broken rules, the costliest first."""
        return lint(self.job, self.costs, self.fits)

    @cached_property
    def suggestions(self) -> list[Suggestion]:
        """Better shapes, where they are asked for."""
        return suggest(self.job, self.costs) if self.suggestions_requested else []

    @cached_property
    def counts(self) -> dict[str, Figure]:
        """Parameters by part, and FLOPs of a token."""
        job = self.job
        figures = {
            name: exact(f"parameters.{name}", value, "1", f"{_counted(name)}; {CONVENTION}")
            for name, value in parameters.count(job.model).to_json().items()
        }
        how = f"{flops.NUMERATOR}, at {job.sequence} tokens a sample"
        per_token = flops.train_flops_per_token(job.model, job.sequence)
        return figures | {"flops_per_token": exact("flops.token", per_token, "FLOP", how)}

    @cached_property
    def speed(self) -> dict[str, Figure]:
        """Time of a micro-batch, rate and MFU; empty where rates are unknown."""
        price, time = self.costs.micro_batch(self.job), self.costs.figure(self.job)
        if time is None or price is None:
            return {}
        how = f"flops.token x {price.tokens} tokens / tp"
        work = exact("flops.micro_batch", price.flops, "FLOP", how, (self.counts["flops_per_token"],))
        rate = work.over(time, "speed.rate", "TFLOP/s", "model FLOPs over the micro-batch's time", 1e-12)
        figures = {"time": time, "rate": rate}
        if peak := self.costs.hardware.peak_tflops.get(self.job.precision):
            top = self._recorded(f"peak_tflops.{self.job.precision}", peak, "TFLOP/s")
            how = "rate over the dense peak, compute of one device alone: no communication, bubble or optimizer in it"
            figures["mfu"] = rate.over(top, "speed.mfu", "%", how, 100)
        return figures

    @cached_property
    def step(self) -> dict[str, Figure]:
        """Time of a whole step, throughput and MFU; empty where a rate is unknown, and `step_unknown` says which."""
        whole = None if self.step_unknown else step.step_time(self.job, self.costs.rates)
        if whole is None:
            return {}
        figures = {"step": whole, "rate": step.tokens_per_second(self.job, whole)}
        mfu = step.mfu(self.job, self.costs.hardware, whole)
        return figures | {"mfu": mfu} if mfu else figures

    @cached_property
    def step_unknown(self) -> str:
        """Which rate a step's time lacks; empty where none."""
        return self.why_not or step.why_unknown(self.job, self.costs.rates)

    @cached_property
    def memory(self) -> Figure:
        """Of the fullest rank."""
        return memory.peak(self.job, self.costs.hardware)

    def figures(self) -> dict[str, Figure]:
        """Every figure on the screen and what it is made from, by name."""
        tops = [*self.counts.values(), *self.speed.values(), *self.step.values(), self.memory]
        tops += [f for finding in self.findings if (f := finding.figure)]
        tops += [one.figure(i) for i, one in enumerate(self.suggestions, 1)]
        hardware = self.costs.hardware
        fields = {name: (getattr(hardware, name), unit) for name, unit in RECORDED.items()}
        fields |= {f"achieved_tflops.{p}": (rate, "TFLOP/s") for p, rate in hardware.achieved_tflops.items()}
        tops += [self._recorded(name, *value) for name, value in fields.items() if value[0] is not None]
        return {figure.name: figure for top in tops for figure in top.walk()}

    def _recorded(self, field: str, value: float, unit: str) -> Figure:
        """A number of the catalogue."""
        return exact(f"hardware.{field}", value, unit, catalogue.provenance(self.costs.hardware, field))

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        job = self.job
        return {
            "model": job.model.name, "hardware": self.costs.hardware.name, "layout": job.layout.to_json(),
            "sequence": job.sequence, "micro_batch": job.micro_batch, "precision": job.precision,
            "assumed": list(self.assumed), "rates": self.basis, "unpriced": self.why_not or None,
            "notes": list(self.notes),
            "figures": {
                name: {"value": one.value, "unit": one.unit, "low": one.low, "high": one.high}
                for name, one in self.figures().items()
            },
            "lint": [
                {"rule": f.rule.name, "field": f.field, "value": f.value, "better": f.better, "cost_percent": f.cost,
                 "basis": f.basis, "reason": f.rule.reason, "source": f.rule.source}
                for f in self.findings
            ],
            "suggestions": [
                {"changes": list(s.changes), "saves_percent": s.saves, "total": s.total, "active": s.active,
                 "granularity": s.granularity}
                for s in self.suggestions
            ],
        }  # fmt: skip


def answer(
    overrides: Sequence[str],
    file: Path | None = None,
    gpus: int | None = None,
    rates: str | None = None,
    suggestions_requested: bool = False,
) -> SizingAnswer:
    """The answer for what was typed. `rates` names a profile, or `catalogue` for none; None: the device's own, if there is.

    Raises:
        UserError: for anything wrong or missing in it.
    """
    config, assumed = configured(overrides, file, gpus)
    profile = None if rates else known(DeviceProfile, config.hardware.name)
    if rates and rates != CATALOGUE:
        profile = load(DeviceProfile, rates)
    job, why = job_of(config, gpus)
    return SizingAnswer(config, job, CostModel(config.hardware, profile), assumed, why, suggestions_requested)


def _counted(name: str) -> str:
    return {
        "total": "all weights, each counted once, with embedding and output projection",
        "active": "weights that one token uses, with the whole embedding table and output projection",
        "total_without_embeddings": "all but embedding table and output projection",
        "active_without_embeddings": "weights of the layers that one token uses",
    }.get(name, f"weights of the part '{name}', all layers")
