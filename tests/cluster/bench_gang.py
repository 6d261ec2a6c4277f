"""A gang over Ray against torchrun on the same hosts, in one run: the same sweep, in turn, and the ratios of the times.

    python -m tests.cluster.bench_gang [--pairs 4]

The baseline is torchrun. What its own runs differ by from each other is printed beside each ratio: a gang that measures
the same differs by no more than that.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from statistics import fmean, median, stdev

from collectives.store.results import ResultStore, SweepRow
from collectives.timing.statistics import student
from configs.paths import HomePaths, RunPaths
from orchestrator.record.states import State
from tests.cluster.conftest import Shell
from tests.cluster.hosts import Hosts, unavailable
from tests.namespaces import Host

SWEEP = (
    "hardware=cpu", "collectives.ops=all_reduce,all_gather,all_to_all", "collectives.min_size=1K",
    "collectives.max_size=4M", "collectives.step_factor=16", "collectives.placements=out_of_place",
    "collectives.min_iterations=40", "collectives.max_iterations=120", "collectives.seconds_per_size=1.5",
)  # fmt: skip
"""Both run this; 12 cases of a second."""
HOSTS = 2
Case = tuple[str, int]


def gang(shell: Shell) -> dict[Case, float]:
    """Median microseconds of each case, measured by a submitted run."""
    run_id = shell.submit("workload=collectives", f"parallel.dp={HOSTS}", *SWEEP)
    view = shell.finish(run_id)
    if view.state is not State.SUCCEEDED:
        raise RuntimeError(f"{run_id} ended {view.state}: `python -m orchestrator incidents {run_id}`")
    return times(ResultStore(shell.home.run(run_id).measurement).finished())


def torchrun(hosts: Sequence[Host], folder: Path, port: int, sweep: Sequence[str] = SWEEP) -> ResultStore:
    """The same by torchrun, a rank on each host."""
    env = os.environ | {
        # As the agent of a gang sets them.
        "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": str(os.cpu_count() or 1), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    words = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}", "--nproc-per-node=1"),
        *(f"--master-addr={hosts[0].ip}", f"--master-port={port}"),
    ]
    program = ["-m", "collectives", "run", "--out", str(folder), *sweep]
    launchers = [
        subprocess.Popen(
            host.command(*words, f"--node-rank={rank}", *program),
            env=env,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip
    told = [launcher.communicate(timeout=150)[0] for launcher in launchers]
    if any(launcher.returncode for launcher in launchers):
        raise RuntimeError("torchrun failed:\n" + "\n".join(told))
    return ResultStore(RunPaths(folder).measurement)


def times(rows: Sequence[SweepRow]) -> dict[Case, float]:
    """Median microseconds by operation and size."""
    return {(row.op, row.size): row.best.p50_us for row in rows if row.best}


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of a mean."""
    return student(0.95, len(values) - 1) * stdev(values) / len(values) ** 0.5


def report(gangs: Sequence[dict[Case, float]], baselines: Sequence[dict[Case, float]]) -> None:
    """Print ratios by case, then over all."""
    print(
        f"{'operation':>12} {'bytes':>9} {'torchrun us':>12} {'gang us':>12} {'ratio':>7} {'torchrun varies by':>19}"
    )
    for case in baselines[0]:
        ours, theirs = [one[case] for one in gangs], [one[case] for one in baselines]
        ratio, noise = median(ours) / median(theirs), max(theirs) / min(theirs)
        print(
            f"{case[0]:>12} {case[1]:>9} {median(theirs):>12.1f} {median(ours):>12.1f} {ratio:>7.3f} {noise:>19.3f}"
        )
    # One value a pair: cases of one run are slow or fast together.
    pairs = [
        fmean(log(ours[case] / theirs[case]) for case in theirs)
        for ours, theirs in zip(gangs, baselines, strict=True)
    ]
    middle, reach = fmean(pairs), half_width(pairs)
    own = [fmean(log(b[c] / a[c]) for c in a) for a, b in zip(baselines, baselines[1:], strict=False)]
    print(
        f"all cases: gang over torchrun {exp(middle):.3f} (95 % interval {exp(middle - reach):.3f} to "
        f"{exp(middle + reach):.3f}, {len(pairs)} pairs); torchrun over torchrun from run to run "
        f"{exp(min(own)):.3f} to {exp(max(own)):.3f}"
    )


def main(arguments: list[str]) -> None:
    """Measure in turn, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=4, help="runs of each of the two, at least 2")
    options = parser.parse_args(arguments)
    if unavailable():
        print(f"left out: {unavailable()}")
        return
    gangs: list[dict[Case, float]] = []
    baselines: list[dict[Case, float]] = []
    with tempfile.TemporaryDirectory() as folder, Hosts(count=HOSTS, slots=1) as hosts:
        home = HomePaths(Path(folder) / "home")
        shell = Shell(home, {"RAY_ADDRESS": hosts.address}, prefix=tuple(hosts.hosts[0].command()))
        for number in range(max(2, options.pairs)):
            turns = ["gang", "torchrun"] if number % 2 == 0 else ["torchrun", "gang"]
            for turn in turns:
                if turn == "gang":
                    gangs.append(gang(shell))
                else:
                    made = torchrun(hosts.hosts, Path(folder) / f"torchrun{number}", 29500 + number)
                    baselines.append(times(made.finished()))
        report(gangs, baselines)


if __name__ == "__main__":
    main(sys.argv[1:])
