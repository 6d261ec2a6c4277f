"""`python -m tests.web.simulated HOME`: a run of 12,288 ranks and 100,000 steps as it would lie on storage.

The step files are written by the code that writes real ones, for a few dozen nodes that differ; the others' are copies
with other ranks in the header. One rank of a node is slow from step 60,000 on, one node waits for its data now and
then, and all save every 500 steps. Metric lines and events are those of a run that trains.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.metrics import MetricWriter, ResumedLine, SavedLine, StepLine
from configs.paths import HomePaths, RunPaths
from faulttol.timeline.heat import HeatRequest, heat_map
from faulttol.timeline.reader import AttemptSteps
from faulttol.timeline.step_file import STORED, StepFile, StepFileShape, folder
from orchestrator.record.clock import Instant
from orchestrator.record.events import (
    AttemptPlaced,
    AttemptResumed,
    CheckpointCommitted,
    GangShape,
    NodeShare,
    RanksStarted,
    StateMoved,
    Submitted,
)
from orchestrator.record.run_log import RunLog
from orchestrator.record.states import Reason, State

BEGAN = 1_760_000_000.0
LAYOUT = {"pp": 8, "dp": 192, "cp": 1, "tp": 8, "ep": 64, "etp": 1}
SAVE_EVERY = 500
SLOW_FROM = 0.6
"""Share of the steps after which a rank is slow."""
_VARIANTS = 3
"""Nodes of a stage that differ."""
_LOCAL = 8


@dataclass(frozen=True)
class Simulated:
    """What was written, and what is wrong in it."""

    run: RunPaths
    ranks: int
    steps: int
    slow_rank: int
    slow_from: int
    data_node: str


def write(
    home: Path, ranks: int = 12_288, steps: int = 100_000, run_id: str = "simulated", lines: bool = True
) -> Simulated:
    """Write the run into a home.

    Args:
        home: of runs.
        ranks: a multiple of 64: 8 stages of whole nodes.
        steps: all of them trained.
        run_id: of the run.
        lines: metric lines too, which take the longest.
    """
    run = HomePaths(home).run(run_id)
    attempt = run.attempt(1)
    nodes = ranks // _LOCAL
    slow_node, data_node = nodes // 2 + nodes // 16, nodes // 4 + 1
    result = Simulated(run, ranks, steps, slow_node * _LOCAL + 3, int(steps * SLOW_FROM), name(data_node))
    _write_steps(attempt.root, nodes, steps, slow_node, data_node)
    layout = LAYOUT | {"dp": ranks // 64, "ep": min(64, ranks // 8)}
    _write_events(run, nodes, steps, layout)
    run.config.write_text(json.dumps({"name": run_id}))
    if lines:
        _write_lines(attempt.metrics, steps, ranks)
    return result


def name(node: int) -> str:
    """Address of a node."""
    return f"10.{node >> 16}.{node >> 8 & 255}.{node & 255}"


def seconds_of(steps: int) -> np.ndarray:
    """[steps] that all ranks take, without the saves: they wait for the slowest."""
    shared = np.random.default_rng(7)
    number = np.arange(steps)
    return (
        1.0
        + 0.01 * shared.random(steps)
        + 0.12 * (number >= int(steps * SLOW_FROM))
        + 0.3 * (number % 977 == 500)
    )


def _columns(stage: int, variant: int, steps: int, slow: bool = False, late: bool = False) -> np.ndarray:
    """[fields, ranks of the node, steps] of a kind of node."""
    own = np.random.default_rng((stage, variant, slow, late))
    number, shape = np.arange(steps), (_LOCAL, steps)
    compute = (0.80 + 0.01 * stage) * (1 + 0.01 * own.standard_normal(shape))
    data = 0.002 * (1 + own.random(shape))
    if slow:
        compute[3, number >= int(steps * SLOW_FROM)] += 0.2
    if late:
        data[:, number % 977 == 500] += 0.3
    save = np.where(number % SAVE_EVERY == SAVE_EVERY - 1, 2.0 + 0.2 * own.random(shape), 0.0)
    together = seconds_of(steps)
    wait = np.maximum(0.0, together - compute - data)
    found = {
        "compute": compute,
        "wait": wait,
        "data": data,
        "save": save,
        "step": compute + wait + data + save,
    }
    found["lag"] = 0.0005 * own.random(shape)
    return np.stack([found[field] for field in STORED])


def _write_steps(attempt: Path, nodes: int, steps: int, slow_node: int, data_node: int) -> None:
    path = folder(attempt)
    path.mkdir(parents=True, exist_ok=True)
    starts = ((BEGAN + 60 + np.concatenate(([0], np.cumsum(seconds_of(steps))[:-1]))) * 1e9).astype(np.int64)
    patterns: dict[tuple[int, int, bool, bool], Path] = {}
    for node in range(nodes):
        stage, variant = node * 8 // nodes, node * 2654435761 % 65536 % _VARIANTS
        key = (stage, variant, node == slow_node, node == data_node)
        own = tuple(range(node * _LOCAL, (node + 1) * _LOCAL))
        into = path / f"{name(node)}.steps"
        if key in patterns:
            shutil.copyfile(patterns[key], into)
            with into.open("r+b") as file:
                file.write(StepFileShape(name(node), own).header)
            continue
        file = StepFile(into, name(node), own)
        file.append(0, starts, _columns(stage, variant, steps, node == slow_node, node == data_node))
        file.close()
        patterns[key] = into


def _write_events(run: RunPaths, nodes: int, steps: int, layout: dict[str, int]) -> None:
    run.root.mkdir(parents=True, exist_ok=True)
    gang = GangShape(nodes * _LOCAL, 8, nodes, "GPU")
    at = Instant(BEGAN, 0.0)
    log = RunLog(run, 1, at)
    log.append(
        [Submitted(0, gang, steps, 10, 1.0, "simulated", layout), StateMoved(State.QUEUED, Reason.SUBMITTED)],
        at,
    )
    shares = tuple(
        NodeShare(
            f"n{node:05d}", name(node), f"node{node:05d}", tuple(range(node * _LOCAL, (node + 1) * _LOCAL))
        )
        for node in range(nodes)
    )
    log.append(
        [StateMoved(State.PLACING, Reason.SUBMITTED), AttemptPlaced(1, shares, "simulated-1")],
        Instant(BEGAN + 5, 5),
    )
    pids = {str(rank): 1000 + rank for rank in range(nodes * _LOCAL)}
    log.append(
        [StateMoved(State.STARTING, Reason.SUBMITTED), RanksStarted(1, pids, "10.0.0.0:29500")],
        Instant(BEGAN + 20, 20),
    )
    log.append(
        [AttemptResumed(1, 0, None), StateMoved(State.RUNNING, Reason.SUBMITTED)], Instant(BEGAN + 60, 60)
    )
    ends = 60 + np.cumsum(seconds_of(steps))
    for step in range(SAVE_EVERY, steps + 1, SAVE_EVERY):
        seconds = float(ends[step - 1]) + 2
        saved = CheckpointCommitted(1, step, f"{run.checkpoints}/step-{step:010d}", 1 << 40, 20.0, 2.0)
        log.append([saved], Instant(BEGAN + seconds, seconds))
    log.close()


def _write_lines(path: Path, steps: int, ranks: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = MetricWriter(path)
    writer.write(ResumedLine(BEGAN + 60, 1, 0, None, "simulated", {}))
    spent = seconds_of(steps)
    ends = BEGAN + 60 + np.cumsum(spent)
    noise = np.random.default_rng(3).standard_normal(steps)
    load = [[1000 + 10 * expert for expert in range(8)] for _ in range(2)]
    for index in range(steps):
        step, seconds = index + 1, float(spent[index])
        loss = 1.8 + 9 * (step + 50) ** -0.35 + 0.02 * float(noise[index])
        tokens = 4096 * 2048
        writer.write(
            StepLine(
                time=float(ends[index]), attempt=1, step=step, loss=loss, aux_loss=0.01, lr=3e-4 * min(1.0, step / 2000),
                grad_norm=0.5 + 0.1 * abs(float(noise[index])), tokens=tokens * step, tokens_per_second=tokens / seconds,
                step_seconds=seconds, phase_seconds={"data": 0.003, "forward": 0.3, "backward": 0.5, "optimizer": 0.1},
                mfu=0.55 / seconds, expert_load=load, balance_entropy=0.98, dropped=0, memory_bytes=70 << 30,
            )
        )  # fmt: skip
        if step % SAVE_EVERY == 0:
            writer.write(SavedLine(float(ends[index]) + 2, 1, step, f"step-{step:010d}", 1 << 40, 20.0, 2.0))
    writer.close()


def _time(made: Simulated) -> None:
    """Print what windows and heat maps take, and the memory of a process that reads them."""
    steps = AttemptSteps(made.run.attempt(1).root)
    layout = LAYOUT | {"dp": made.ranks // 64}
    began = time.perf_counter()
    span = steps.span
    assert span is not None, "it was written"
    print(f"first look at {len(steps.nodes)} files: {(time.perf_counter() - began) * 1e3:.0f} ms")
    first, last = span
    for begin in (first, last - (last - first) // 10, last - 2000, last - 300):
        for asked in (
            HeatRequest(first=begin),
            HeatRequest(first=begin, mode="deviation"),
            HeatRequest("wait", begin, group="node"),
        ):
            spent = []
            for _ in range(5):
                began = time.perf_counter()
                drawn = heat_map(steps, asked, layout)
                spent.append((time.perf_counter() - began) * 1e3)
            print(
                f"steps {begin} to {last}, {asked.field} {asked.mode} by {asked.group}: {drawn.mean.shape[0]} rows, "
                f"{drawn.mean.shape[1]} columns; median {statistics.median(spent):.0f} ms, worst {max(spent):.0f} ms"
            )
    memory = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    print(f"memory of this process: {int(memory.split()[1]) // 1024} MiB")


def main() -> int:
    """Write it, and say how long that took and how large it is."""
    parser = argparse.ArgumentParser(prog="python -m tests.web.simulated", description=__doc__)
    parser.add_argument("home", type=Path, help="folder of runs (MEGARAY_HOME)")
    parser.add_argument("--ranks", type=int, default=12_288)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--run", default="simulated")
    parser.add_argument("--no-lines", action="store_true", help="leave the metric lines out")
    parser.add_argument("--time", action="store_true", help="also time windows and heat maps of it")
    options = parser.parse_args()
    began = time.perf_counter()
    made = write(options.home, options.ranks, options.steps, options.run, not options.no_lines)
    if options.time:
        _time(made)
    files = list(folder(made.run.attempt(1).root).iterdir())
    size = sum(file.stat().st_size for file in files)
    print(
        f"{made.run.root}: {len(files)} step files, {size / 2**20:.0f} MiB ({size / made.ranks / 1024:.0f} KiB a rank); "
        f"rank {made.slow_rank} is slow from step {made.slow_from}, {made.data_node} waits for data; "
        f"{time.perf_counter() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
