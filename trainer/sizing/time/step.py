"""The forecast of a training step as figures: seconds, tokens a second, MFU, each with its interval and derivation."""

from __future__ import annotations

import math

from configs.hardware import HardwareConfig
from trainer.sizing.figures import Figure, approximate, exact
from trainer.sizing.model import flops
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time import estimate as time
from trainer.sizing.time import schedule
from trainer.sizing.time.estimate import StepParts
from trainer.sizing.time.rates import Rates

#: Of each part of a step: its relative uncertainty, what a comparison calls it, and what is in it. The uncertainties, and
#: that of all together, are such that nine of ten published runs that calibrated nothing lie inside
#: (`python -m trainer validate`).
PARTS: dict[str, tuple[float, str, str]] = {
    "matmul": (0.12, "matmuls",
               "matmuls of the slowest stage's layers over all micro-batches, there and back; rates: {kernels}"),
    "attention": (0.30, "attention", "attention core of those layers"),
    "memory": (0.30, "memory-bound kernels",
               "norms, residuals, activation functions and routing of those layers, by bytes over memory bandwidth"),
    "head": (0.20, "output projection and loss", "output projection and loss"),
    "recompute": (0.15, "recomputation", "what the backward pass computes again ({recompute})"),
    "tp": (0.35, "tensor-parallel exchange", "exposed tensor-parallel collectives; {fabric}"),
    "ep": (0.50, "expert exchange", "dispatch to experts and combination; {fabric}"),
    "cp": (0.50, "context exchange", "exchange of keys and values that attention doesn't hide; {fabric}"),
    "weights": (0.40, "gathering weights",
                "gathers and scatters of weights under ZeRO-3 that computing doesn't hide; {fabric}"),
    "host": (0.30, "host", "what launching takes longer than computing; host overheads: {host}"),
    "p2p": (0.50, "transfers between stages", "messages between stages; {fabric}"),
    "bubble": (0.20, "pipeline bubble",
               "first and last micro-batches on their way through {pp} stages, {interleave} chunks each"),
    "dp": (0.50, "gradient reduction",
           "gradients reduced and weights gathered over {dp} replicas, as far as nothing hides it; {fabric}"),
    "optimizer": (0.40, "optimizer", "the optimizer's traffic over memory bandwidth"),
    "fixed": (0.50, "fixed costs", "the rest of a step: data, clipping, logging"),
}  # fmt: skip
TOGETHER = 0.20


def step_time(job: TrainingJob, rates: Rates) -> Figure | None:
    """Seconds of a step with an interval that nine of ten published runs lie in; None where a rate is unknown."""
    parts = time.parts(job, rates)
    return None if math.isnan(parts.step) else figure(job, rates, parts)


def figure(job: TrainingJob, rates: Rates, parts: StepParts) -> Figure:
    """The figure of a step whose parts are known."""
    words = {
        "kernels": f"{f'profile {rates.device.name}' if rates.device else f'catalogue of {rates.hardware.name}'}, "
        f"{rates.sustained_share:.0%} of a short benchmark's",
        "recompute": job.recompute,
        "fabric": rates.fabric.source,
        "host": rates.overheads.source,
        "pp": job.layout.pp,
        "interleave": job.interleave,
        "dp": job.layout.dp * job.layout.cp,
    }
    made = []
    for name, value in vars(parts).items():
        if value > 0:
            share, _, how = PARTS[name]
            made.append(approximate(f"step.{name}", value, "s", share, how.format(**words)))
    layers = [str(stage.layers) for stage in schedule.job_stages(job)]
    cut = f"{len(layers)} stages of {', '.join(layers)} layers" if len(layers) > 1 else "one stage"
    how = f"sum of its parts: {job.micro_batches} micro-batches of {job.micro_batch} on {cut}"
    return Figure("step", parts.step, "s", *interval(parts), how, tuple(made))


def interval(parts: StepParts) -> tuple[float, float]:
    """Least and most seconds: independent parts by the root of their squares, and what they have in common, as ratios."""
    own = math.sqrt(sum((PARTS[name][0] * value) ** 2 for name, value in vars(parts).items()))
    ratio = 1 + math.hypot(own / parts.step, TOGETHER)
    return parts.step / ratio, parts.step * ratio


def why_unknown(job: TrainingJob, rates: Rates) -> str:
    """Why there is no time, in one line; empty where there is one."""
    unknown = [PARTS[name][1] for name, value in vars(time.parts(job, rates)).items() if math.isnan(value)]
    if not unknown:
        return ""
    return rates.unknown(job.precision, job.layout.ranks, job.node) or (
        f"{rates.hardware.name} has no link or network bandwidth on record for this layout's {', '.join(unknown)}"
    )


def tokens_per_second(job: TrainingJob, step: Figure) -> Figure:
    """Tokens a second of the whole job."""
    tokens = job.global_batch * job.sequence
    low, high = tokens / step.high, tokens / step.low
    how = f"{job.global_batch} samples x {job.sequence} tokens / step"
    return Figure("tokens_per_second", tokens / step.value, "tokens/s", low, high, how, (step,))


def mfu(job: TrainingJob, hardware: HardwareConfig, step: Figure) -> Figure | None:
    """Model FLOP/s over the peak in percent, by this project's convention; None where the peak is unknown."""
    peak, tokens = flops.peak(hardware, job.precision), job.global_batch * job.sequence
    if peak is None:
        return None
    work = tokens * flops.train_flops_per_token(job.model, job.sequence)
    done = exact("flops.step", work, "FLOP", f"{flops.NUMERATOR}; {tokens} tokens")
    how = f"flops.step / (step x {job.layout.ranks} devices x {peak / 1e12:g} TFLOP/s {job.precision})"
    return done.over(step, "mfu", "%", how, 100 / (job.layout.ranks * peak))
