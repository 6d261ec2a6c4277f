"""Real gloo ranks on this machine, forked from a process that has loaded torch already."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from collectives.ops.groups import GroupPartition
from collectives.store import metadata
from collectives.store.results import ResultStore, SweepRow
from collectives.studies.journal import Journal
from collectives.studies.sweep import SweepRunner
from collectives.timing import clock
from collectives.timing.measure import MeasurementSetup
from collectives.timing.team import Team
from configs.compose import compose
from configs.paths import RunPaths
from configs.rank import RankContext, free_port
from configs.schema import RunConfig
from tests.forks import forks

T = TypeVar("T")
QUICK = (
    "workload=collectives", "hardware=cpu", "collectives.min_warmup=0", "collectives.max_warmup=0",
    "collectives.min_iterations=5", "collectives.max_iterations=5", "resilience.timeouts.patience=6",
)  # fmt: skip
"""A measurement of which only the check matters; who waits for a rank that failed gives up after a minute."""


def together(world: int, root: Path, act: Callable[..., T], *arguments: Any) -> list[T]:
    """`act(rank, *arguments)` on `world` ranks at once: what each returned."""
    port = free_port()
    ranks = [RankContext(r, world, r, world, "127.0.0.1", port, RunPaths(root), 1) for r in range(world)]
    with ProcessPoolExecutor(world, mp_context=forks()) as pool:
        return list(pool.map(partial(_one, act, arguments), ranks))


def _one(act: Callable[..., T], arguments: tuple[Any, ...], rank: RankContext) -> T:
    try:
        return act(rank, *arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def quick(*words: str) -> RunConfig:
    """A configuration of a measurement of few iterations."""
    return compose([*QUICK, *words])


def measure(team: Team, config: RunConfig, layout: dict[str, int], folder: Path) -> list[SweepRow]:
    """Sweep on a team that has met, into a folder of its own; its rows, on rank 0."""
    rank = RankContext(**vars(team.rank) | {"run": RunPaths(folder)})
    with contextlib.redirect_stdout(io.StringIO()):
        journal = Journal(rank)
    ticks = clock.make_clock("host", team.device, lambda: team.control)
    sweep = SweepRunner(MeasurementSetup(team, ticks, config.collectives, journal.alive), journal, layout)
    if team.rank.rank == 0:
        world = GroupPartition("world", (tuple(range(team.rank.world)),))
        journal.begin(metadata.collect(config, team, ticks, world, layout, []))
    sweep.run(frozenset())
    journal.end()
    team.tree.wait()
    return list(ResultStore(rank.run.measurement).read().rows) if team.rank.rank == 0 else []
