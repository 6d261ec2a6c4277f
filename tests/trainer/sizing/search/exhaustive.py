"""The layout search without its bounds: what pruning is compared with."""

from __future__ import annotations

from collections.abc import Iterator

from configs.hardware import HardwareConfig
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import layouts, legal
from trainer.sizing.search.legal import Task
from trainer.sizing.time.rates import Rates


def set_ups(task: Task, layout: Layout) -> Iterator[TrainingJob]:
    """All set-ups of a layout."""
    for micro_batch in legal.micro_batches(task, layout.dp):
        for interleave in legal.interleaves(task, layout.pp, layout.dp * micro_batch):
            for zero in legal.zeros(task, layout):
                for recompute in legal.recomputes(task):
                    yield legal.job(task, layout, micro_batch, interleave, zero, recompute)


def exhaustive(
    task: Task, hardware: HardwareConfig, rates: Rates, keep: int = layouts.KEEP
) -> layouts.SearchResult:
    """The fastest set-ups that fit, `keep` different layouts of them, by pricing every legal one."""
    ranked: dict[Layout, layouts.Candidate] = {}
    count = 0
    for layout in legal.layouts(task):
        for job in set_ups(task, layout):
            count += 1
            made = layouts.candidate(job, hardware, rates)
            if made and (layout not in ranked or made.seconds < ranked[layout].seconds):
                ranked[layout] = made
    best = tuple(sorted(ranked.values(), key=lambda candidate: candidate.seconds)[:keep])
    return layouts.SearchResult(best, count, 0, count)
