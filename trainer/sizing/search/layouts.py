"""The layout search: every legal set-up, pruned by memory and by a bound on its time, ranked by its predicted time.

The bound is what all layers and the loss take of one micro-batch without pipeline, data parallelism and recomputation,
which depends on few of the axes and is computed once for each; spread evenly over the stages and filled up by the
schedule's bubble, it is the least that a set-up can take. Set-ups are looked at in the order of their bounds, until the
next bound is above what was found. So nothing that is legal is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from configs.hardware import HardwareConfig
from trainer.sizing.memory import activations, states
from trainer.sizing.memory import estimate as memory
from trainer.sizing.memory.estimate import MemoryUsage
from trainer.sizing.model.job import Recompute, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import legal
from trainer.sizing.search.legal import Task
from trainer.sizing.time import estimate as time
from trainer.sizing.time import schedule
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
    memory: MemoryUsage
    stage: int
    """Its fullest stage."""

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
    without_room: int
    """Of them, too large for the device, by the states and activations of their first stage alone."""
    priced: int
    """Set-ups whose memory and time were worked out in full."""
    reason: str = ""
    """Why there is none; empty where there is."""

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
    bounds = _Bounds(task, hardware, rates)
    open_, count, without_room = bounds.all()
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
    return SearchResult(best, count, without_room, priced, "" if best else _why_none(task, hardware, count))


def candidate(job: TrainingJob, hardware: HardwareConfig, rates: Rates) -> Candidate | None:
    """A set-up with its memory and time; None where it doesn't fit, or a rate is unknown."""
    stage, used = memory.worst(job, hardware.kind)
    have = memory.capacity(hardware)
    if have is not None and used.needed > have:
        return None
    parts = time.parts(job, rates)
    return None if math.isnan(parts.step) else Candidate(job, parts.step, parts, used, stage)


def _why_none(task: Task, hardware: HardwareConfig, count: int) -> str:
    if not count:
        return (
            f"no legal layout of {task.ranks} ranks: global_batch={task.global_batch} must be a multiple of dp, "
            f"dp*cp*tp of ep*etp, and each pipeline stage needs a micro-batch and a layer"
        )
    have = hardware.memory_gib
    return f"none of {count} legal set-ups of {task.ranks} ranks fits {have:g} GiB of {hardware.name}"


Choice = tuple[int, int, int, Recompute]
"""Micro-batch, interleave, ZeRO stage, recomputation."""


class _Bounds:
    """Least seconds and least memory of set-ups, from few evaluations."""

    def __init__(self, task: Task, hardware: HardwareConfig, rates: Rates) -> None:
        self.task, self.hardware, self.rates = task, hardware, rates
        self.room = memory.capacity(hardware) or math.inf
        self._once: dict[tuple[int, ...], tuple[float, dict[Recompute, float]]] = {}

    def all(self) -> tuple[list[tuple[float, Layout, Choice]], int, int]:
        """Set-ups that may fit, by their least seconds; how many are legal; how many don't fit."""
        out: list[tuple[float, Layout, Choice]] = []
        count = without_room = 0
        recomputes = legal.recomputes(self.task)
        folded = self.task.schedules == ("zbv",)
        for layout in legal.layouts(self.task):
            least, layers = _states(self.task, layout)
            for micro_batch in legal.micro_batches(self.task, layout):
                seconds, kept = self._layers(layout, micro_batch)
                steps = self.task.global_batch // (layout.dp * micro_batch)
                for interleave in legal.interleaves(self.task, layout, micro_batch):
                    bubble = 0.0 if folded else seconds * (1 - 1 / layout.pp) / interleave
                    bound = steps * seconds / layout.pp + bubble
                    chunks = 1 if folded else interleave
                    held = activations.at_once(layout.pp, layout.pp, chunks, steps) * layers
                    for zero in legal.zeros(self.task, layout):
                        for recompute in recomputes:
                            count += 1
                            if least(zero) + held * kept[recompute] * (1 + memory.SLACK[1]) > self.room:
                                without_room += 1
                            else:
                                out.append((bound, layout, (micro_batch, interleave, zero, recompute)))
        out.sort(key=lambda entry: entry[0])
        return out, count, without_room

    def _layers(self, layout: Layout, micro_batch: int) -> tuple[float, dict[Recompute, float]]:
        """Seconds of one micro-batch through all layers and the loss, and bytes that its leanest layer keeps."""
        key = (layout.tp, layout.cp, layout.ep, layout.etp, micro_batch)
        if key not in self._once:
            alone = replace(layout, pp=1, dp=layout.ep)
            task = replace(self.task, global_batch=micro_batch * layout.ep)
            job = legal.job(task, alone, micro_batch, 1, 0, "none")
            parts = time.parts(job, self.rates)
            seconds = (
                parts.matmul + parts.attention + parts.memory + parts.head + parts.tp + parts.ep + parts.cp
            )
            model, with_experts = task.model, len(task.model.moe_layers)
            kinds = [moe for moe, n in ((False, model.layers - with_experts), (True, with_experts)) if n]
            kept = {
                r: min(activations.kept(legal.job(task, alone, micro_batch, 1, 0, r), moe) for moe in kinds)
                for r in self.task.recompute
            }
            self._once[key] = seconds, kept
        return self._once[key]


def _states(task: Task, layout: Layout) -> tuple[Callable[[int], float], int]:
    """Bytes of states of the first stage by ZeRO stage, and its layers."""
    folded = task.schedules == ("zbv",)
    first = schedule.stages(task.model, layout.pp, task.software.balanced_stages, folded)[0]
    known: dict[int, float] = {}

    def least(zero: int) -> float:
        if zero not in known:
            job = legal.job(task, layout, 1, 1, zero, "none")
            known[zero] = states.states(job, first).all
        return known[zero]

    return least, first.layers


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


def reason(result: SearchResult) -> str:
    """Why the best was chosen, in one line."""
    best = result.best
    if best is None:
        return result.reason
    text = f"{_seconds(best.seconds)} a step, the fastest of {result.legal} legal set-ups that fits"
    return f"{text} ({best.memory.needed / memory.GIB:.0f} GiB)"
