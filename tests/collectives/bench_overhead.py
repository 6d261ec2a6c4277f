"""What the suite's timing costs: a case's time by the suite over that of a bare loop of the same call, in one run.

python -m tests.collectives.bench_overhead [--share S] [--handicap US]

Two gloo ranks time the same call on the same buffers in short blocks, in random order and there and back: by the suite
(`MeasurementSetup.time`), and by a plain loop between two readings of `perf_counter`. The ratio is the trimmed mean of
the blocks' ratios; at 1.00 the suite costs nothing. `--handicap` burns so many microseconds in each call that the suite
times: the ratio must rise by that over the time, else the benchmark sees nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from collectives.ops.groups import GroupPartition
from collectives.ops.transfers import Transfer, TransferCase
from collectives.timing import clock
from collectives.timing.measure import MeasurementSetup
from collectives.timing.statistics import student
from collectives.timing.team import Team
from configs.rank import RankContext
from tests.collectives.ranks import quick, together

CASES = (
    ("all_reduce", 8, 15), ("all_reduce", 1 << 20, 15), ("all_reduce", 4 << 20, 20), ("all_reduce", 16 << 20, 36),
    ("broadcast", 8, 8), ("broadcast", 1 << 20, 8), ("all_to_all", 8, 8), ("all_to_all", 1 << 20, 8),
)  # fmt: skip
"""Operation, bytes and seconds: the longer a call, the fewer pairs a second."""
LATENCY_BAR, BANDWIDTH_BAR = 0.05, 0.02
"""Overhead allowed below 1 MiB, and from there on."""
BLOCK_SECONDS = 0.01
"""Of one block. gloo's times wander, so that many short blocks say more than a few long ones."""
FEWEST = 5
"""Calls in a block at least."""
LEAD_IN = 2
"""Untimed calls before a block: the ranks come to it one after the other. The suite has as many."""
TRIM = 0.2
"""Share of the ratios that is left out at either end: blocks in which the machine did something else."""


def bare(op: str, transfer: Transfer) -> Callable[[int], float]:
    """A function that makes so many calls in a plain loop, on a case's buffers, and tells their mean in microseconds."""
    send, receive = transfer._send, transfer._receive

    def loop(count: int) -> float:
        begun = time.perf_counter()
        if op == "all_reduce":
            for _ in range(count):
                dist.all_reduce(receive)
        elif op == "broadcast":
            for _ in range(count):
                dist.broadcast(receive, 0)
        else:
            for _ in range(count):
                dist.all_to_all_single(receive, send)
        return (time.perf_counter() - begun) / count * 1e6

    return loop


def handicapped(call: Callable[[], object], micros: float) -> Callable[[], object]:
    """A call that takes so much longer."""

    def slow() -> None:
        until = time.perf_counter() + micros / 1e6
        while time.perf_counter() < until:
            pass
        call()

    return slow if micros else call


def measure(rank: RankContext, share: float, handicap: float) -> list[np.ndarray]:
    """Microseconds [pair, bare and suite] of each case; the suite's are rank 0's alone to know."""
    with contextlib.suppress(PermissionError):  # not root: what else runs is in the times of both
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    team = Team.join(quick(), rank)
    seat = team.membership(GroupPartition("world", (tuple(range(rank.world)),)))
    assert seat is not None
    rng, found = np.random.default_rng(1), []  # the same order on all ranks
    for op, size, seconds in CASES:
        count = size // 4 // (rank.world if op == "all_to_all" else 1)
        root, redop = 0 if op == "broadcast" else -1, "sum" if op == "all_reduce" else "none"
        transfer = Transfer(TransferCase(op, count, torch.float32, redop, root, op != "all_to_all"), seat)
        loop, call = bare(op, transfer), handicapped(transfer.call, handicap)
        loop(FEWEST)
        calls = team.tree.broadcast_int(max(FEWEST, int(BLOCK_SECONDS * 1e6 / loop(FEWEST))))
        words = [f"collectives.{end}_iterations={calls}" for end in ("max", "min")]
        bench = MeasurementSetup(
            team, clock.make_clock("host", team.device, lambda: team.control), quick(*words).collectives, idle
        )
        pairs, until = [], time.monotonic() + seconds * share
        while team.tree.broadcast_int(time.monotonic() < until):
            pairs.append(pair(bench, seat.group, loop, call, calls, bool(rng.integers(2))))
        found.append(np.array(pairs))
    return found


def pair(
    bench: MeasurementSetup, group: dist.ProcessGroup, loop: Callable[[int], float], call: Callable[[], object],
    calls: int, suite_first: bool,
) -> tuple[float, float]:  # fmt: skip
    """Microseconds of a call, bare and by the suite: two blocks of each, there and back, so that drift falls on both."""
    plain, suite = 0.0, 0.0
    for by_suite in (suite_first, not suite_first, not suite_first, suite_first):
        if by_suite:
            raw = bench.time(call, group)
            suite += float(raw.series().mean()) / 2 if raw is not None else 0.0
        else:
            bench.team.tree.wait()
            loop(LEAD_IN)
            plain += loop(calls) / 2
    return plain, suite


def idle() -> None:
    """Nobody watches whether these ranks are alive."""


def ratio(pairs: np.ndarray) -> tuple[float, float]:
    """Suite over bare, and the half-width of its 95 % interval: a trimmed mean of log ratios.

    Its variance is the winsorised one over the square of the share that is kept (Tukey and McLaughlin 1963).
    """
    logs = np.sort(np.log(pairs[:, 1] / pairs[:, 0]))
    cut = int(TRIM * len(logs))
    kept = logs[cut : len(logs) - cut]
    error = float(np.clip(logs, kept[0], kept[-1]).std(ddof=1)) / ((1 - 2 * TRIM) * math.sqrt(len(logs)))
    middle = math.exp(kept.mean())
    return middle, middle * student(0.95, len(kept) - 1) * error


def main(arguments: list[str]) -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=1, help="of the usual time, of two minutes")
    parser.add_argument("--handicap", type=float, default=0, help="microseconds that the suite's calls lose")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = together(2, Path(folder), measure, options.share, options.handicap)[0]
    head = f"{'2 gloo ranks':14}{'bytes':>10}{'pairs':>7}{'bare us':>11}{'suite us':>11}"
    print(f"{head}{'suite/bare':>12}{'95 %':>17}{'bar':>6}")
    for (op, size, _), pairs in zip(CASES, found, strict=True):
        middle, half = ratio(pairs)
        plain, suite = np.median(pairs, axis=0)
        bar = 1 + (BANDWIDTH_BAR if size >= 1 << 20 else LATENCY_BAR)
        line = f"{op:14}{size:10}{len(pairs):7}{plain:11.1f}{suite:11.1f}{middle:12.3f}"
        print(f"{line}{middle - half:9.3f} to {middle + half:.3f}{bar:6.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
