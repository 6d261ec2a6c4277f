"""The layout search: every legal set-up, pruned by memory and by a bound on its time, ranked by its predicted time.

The bound is what all layers and the loss take of one micro-batch without pipeline, data parallelism and recomputation,
which depends on few of the axes and is computed once for each; spread evenly over the stages and filled up by the
schedule's bubble, it is the least that a set-up can take. Set-ups are looked at in the order of their bounds, until the
next bound is above what was found. So nothing that is legal is passed over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from configs.hardware import HardwareConfig
from trainer.sizing.memory import activations, states
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model import weights
from trainer.sizing.model.job import Recompute, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import legal, runnable
from trainer.sizing.search.legal import Task
from trainer.sizing.time import estimate as time
from trainer.sizing.time import schedule, step
from trainer.sizing.time.rates import Rates
from trainer.sizing.time.step import PARTS

KEEP = 3
"""Different layouts that are kept: the best and its runners-up."""


@dataclass(frozen=True)
class Candidate:
    """A set-up that fits."""

    job: TrainingJob
    seconds: float
    parts: time.StepParts
    memory: memory.MemoryUsage

    @property
    def label(self) -> str:
        """Its axes in words."""
        return label(self.job)


@dataclass(frozen=True)
class SearchResult:
    """What a search came to."""

    ranked: tuple[Candidate, ...]
    """Best first, each of another layout."""
    legal: int
    """Set-ups that are legal."""
    too_large: int
    """Of them, too large for the device, by the states and activations of their first stage alone."""
    priced: int
    """Set-ups whose memory and time were worked out in full."""
    reason: str = ""
    """Why the best was chosen, or why there is none."""

    @property
    def best(self) -> Candidate | None:
        """The fastest that fits."""
        return self.ranked[0] if self.ranked else None


def label(job: TrainingJob) -> str:
    """A set-up's axes and choices in words, those of size one left out."""
    axes = " ".join(f"{axis}={size}" for axis, size in job.layout.to_json().items() if size > 1) or "one rank"
    extra = [f"micro_batch={job.micro_batch}", f"zero={job.zero}"]
    extra += ["zbv"] * job.zero_bubble or [f"interleave={job.interleave}"] * (job.interleave > 1)
    extra += [f"recompute={job.recompute}"] * (job.recompute != "none")
    return f"{axes} ({', '.join(extra)})"


def search(task: Task, hardware: HardwareConfig, rates: Rates, keep: int = KEEP) -> SearchResult:
    """The fastest set-ups that fit, `keep` different layouts of them."""
    open_, count, too_large = _Bounds(task, hardware, rates).all()
    ranked: dict[Layout, Candidate] = {}
    priced = 0
    for bound, layout, choice in open_:
        worst = sorted(c.seconds for c in ranked.values())[keep - 1] if len(ranked) >= keep else math.inf
        if bound >= worst:
            break
        if layout in ranked and bound >= ranked[layout].seconds:
            continue
        made = candidate(legal.job(task, layout, *choice), hardware, rates)
        priced += 1
        if made and (layout not in ranked or made.seconds < ranked[layout].seconds):
            ranked[layout] = made
    best = tuple(sorted(ranked.values(), key=lambda c: c.seconds)[:keep])
    if best:
        reason = f"{_seconds(best[0].seconds)} a step, the fastest of {count} legal layouts that fits"
        reason += f" ({best[0].memory.needed / memory.GIB:.0f} GiB)"
    elif open_ and (why := step.why_unknown(legal.job(task, open_[0][1], *open_[0][2]), rates)):
        reason = why
    elif count:
        have = f"{hardware.memory_gib:g} GiB of {hardware.name}"
        reason = f"none of {count} legal layouts of {task.ranks} ranks fits {have}"
    else:
        reason = (
            f"no legal layout of {task.ranks} ranks: global_batch={task.global_batch} must be a multiple of dp, "
            f"dp*cp*tp of ep*etp, and each pipeline stage needs a micro-batch and a layer"
        )
    return SearchResult(best, count, too_large, priced, reason)


def candidate(job: TrainingJob, hardware: HardwareConfig, rates: Rates) -> Candidate | None:
    """A set-up with its memory and time; None where it doesn't fit, or a rate is unknown."""
    used, have = memory.worst(job, hardware.kind)[1], memory.capacity(hardware)
    if have is not None and used.needed > have:
        return None
    parts = time.parts(job, rates)
    return None if math.isnan(parts.step) else Candidate(job, parts.step, parts, used)


Choice = tuple[int, int, int, Recompute]
"""Micro-batch, interleave, ZeRO stage, recomputation."""


class _Bounds:
    """Least seconds and least memory of set-ups, from few evaluations."""

    def __init__(self, task: Task, hardware: HardwareConfig, rates: Rates) -> None:
        self.task, self.rates = task, rates
        self.room = memory.capacity(hardware) or math.inf
        self._once: dict[tuple[int, ...], tuple[float, dict[Recompute, float]]] = {}

    def all(self) -> tuple[list[tuple[float, Layout, Choice]], int, int]:
        """Set-ups that may fit, by their least seconds; how many are legal; how many don't fit."""
        task, out, count = self.task, list[tuple[float, Layout, Choice]](), 0
        recomputes, folded = legal.recomputes(task), task.schedules == ("zbv",)
        for layout in legal.layouts(task):
            pp, zeros = layout.pp, legal.zeros(task, layout)
            first = schedule.stages(task.model, pp, task.software.balanced_stages, folded)[0]
            alone = {zero: legal.job(task, layout, 1, 1, zero, "none") for zero in zeros}
            least = {zero: states.model_states(job, first).all for zero, job in alone.items()}
            for micro_batch in legal.micro_batches(task, layout.dp):
                seconds, kept = self._layers(layout, micro_batch)
                unit = layout.dp * micro_batch
                steps = task.global_batch // unit
                for interleave in legal.interleaves(task, pp, unit):
                    bubble = 0.0 if folded else seconds * (1 - 1 / pp) / interleave
                    bound = steps * seconds / pp + bubble
                    bound = math.inf if math.isnan(bound) else bound  # without a time they come last
                    held = (
                        activations.in_flight_of_stage(pp, pp, 1 if folded else interleave, steps)
                        * first.layers
                    )
                    count += len(zeros) * len(recomputes)
                    out += (
                        (bound, layout, (micro_batch, interleave, zero, recompute))
                        for zero in zeros
                        for recompute in recomputes
                        if least[zero] + held * kept[recompute] * (1 + memory.SLACK[1]) <= self.room
                    )
        out.sort(key=lambda entry: entry[0])
        return out, count, count - len(out)

    def _layers(self, layout: Layout, micro_batch: int) -> tuple[float, dict[Recompute, float]]:
        """Seconds of one micro-batch through all layers and the loss, and bytes that its leanest layer keeps."""
        key = (layout.tp, layout.cp, layout.ep, layout.etp, micro_batch)
        if key not in self._once:
            # The fewest ranks that it has: expert groups that lie inside nodes among more do so here, and lend no less.
            dp = runnable.whole_groups(layout.ep * layout.etp, layout.cp * layout.tp)
            alone = replace(layout, pp=1, dp=dp)
            task = replace(self.task, global_batch=micro_batch * dp)
            parts = time.parts(legal.job(task, alone, micro_batch, 1, 0, "none"), self.rates)
            seconds = (
                parts.matmul + parts.attention + parts.memory + parts.head + parts.tp + parts.ep + parts.cp
            )
            kinds = [moe for _, moe in weights.kinds(task.model)]
            jobs = {r: legal.job(task, alone, micro_batch, 1, 0, r) for r in task.recompute}
            saved = {r: min(activations.saved_bytes(job, moe) for moe in kinds) for r, job in jobs.items()}
            self._once[key] = seconds, saved
        return self._once[key]


def compare(best: Candidate, other: Candidate) -> str:
    """What the runner-up lacks: the parts of its step that are larger, largest first."""
    start, gap = f"{other.label}: {_seconds(other.seconds)}", other.seconds - best.seconds
    if gap < 0.001 * best.seconds:
        return f"{start}, as fast"
    mine, theirs = vars(best.parts), vars(other.parts)
    extra = sorted(((theirs[name] - mine[name], name) for name in mine), reverse=True)
    larger = [f"{PARTS[name][1]} {_seconds(by)} more" for by, name in extra if by > 0.02 * gap]
    less = [f"{PARTS[name][1]} {_seconds(-by)} less" for by, name in extra[::-1] if by < -0.1 * gap]
    return f"{start}, {gap / best.seconds:.1%} slower: " + ", ".join(larger[:3] + less[:1])


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
