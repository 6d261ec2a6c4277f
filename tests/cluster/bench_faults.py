"""`python -m tests.cluster.bench_faults`: faults in real hosts, found and named by the study, over seeded trials.

Hosts are network namespaces, alternately three and four of them, with NICs of `--nic` Mbit/s. In each trial a fault is
put on, drawn from the seed: the host or the pair, and how severe it is. Then real ranks measure into a folder of their
own. A trial is won where the fault's kind and hosts are the one thing named; on healthy hosts, where nothing is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from collectives.studies.faults import schedule
from tests.cluster.launcher import Launcher, LaunchOutcome
from tests.namespaces import Network, cpu_unavailable, throttles_unavailable, unavailable

FAULTS = ("throttled NIC", "slow pair", "taken CPU", "healthy")
KINDS = {"throttled NIC": "slow_nic", "slow pair": "slow_link", "taken CPU": "slow_host"}
HOSTS = (3, 4)
SEVERITIES = {"throttled NIC": (0.15, 0.45), "slow pair": (0.15, 0.45), "taken CPU": (0.15, 0.4)}
"""Share of a sound NIC's rate, or of one core, that is left."""
STUDY = ("collectives=faults", "collectives.probe_size=1M", "collectives.probe_repeats=5")
"""Messages of 20 ms at 400 Mbit/s: several slices of the scheduler, which the hosts share."""


@dataclass(frozen=True)
class FaultTrial:
    """A fault on its hosts."""

    fault: str
    victims: tuple[int, ...]
    """Indices of hosts: one, two for a pair, none where all are well."""
    severity: float
    """Share that is left."""

    @classmethod
    def draw(cls, fault: str, hosts: int, seed: str) -> FaultTrial:
        """The trial of a seed."""
        if fault == "healthy":
            return cls(fault, (), 1.0)
        draw = random.Random(seed)
        places = list(combinations(range(hosts), 2 if fault == "slow pair" else 1))
        return cls(fault, draw.choice(places), round(draw.uniform(*SEVERITIES[fault]), 2))

    def put_on(self, network: Network, nic: float) -> None:
        """Cause the fault."""
        match self.fault:
            case "throttled NIC":
                network.throttle(self.victims[0], self.severity * nic)
            case "slow pair":
                network.slow_pair(self.victims[0], self.victims[1], self.severity * nic)
            case "taken CPU":
                network.take_cpu(self.victims[0], self.severity)

    def wanted(self, network: Network) -> list[tuple[str, tuple[str, ...]]]:
        """Kind and hosts of all that should be named."""
        if self.fault == "healthy":
            return []
        return [(KINDS[self.fault], tuple(network.hosts[i].ip for i in self.victims))]


@dataclass(frozen=True)
class Played:
    """A trial that is over."""

    hosts: int
    won: bool
    seconds: float


def play(trial: FaultTrial, launcher: Launcher, nic: float, folder: Path) -> tuple[bool, LaunchOutcome]:
    """Put the fault on, measure for real and take it off; whether it alone was named, and what was."""
    network = launcher.network
    trial.put_on(network, nic)
    try:
        outcome = launcher.run(folder, *STUDY)
    finally:
        network.heal()
    done = all(code in (0, 3) for code in outcome.codes)
    return done and outcome.named == trial.wanted(network), outcome


def run(fault: str, options: argparse.Namespace, launchers: list[Launcher], folder: Path) -> list[Played]:
    """All trials of a fault; prints a line for each that is lost."""
    played = []
    for number in range(options.trials):
        launcher = launchers[number % len(launchers)]
        count = launcher.network.count
        trial = FaultTrial.draw(fault, count, f"{options.seed}/{fault}/{number}")
        into = folder / f"{fault.replace(' ', '-')}-{number}"
        begun = time.monotonic()
        won, outcome = play(trial, launcher, options.nic, into)
        played.append(Played(count, won, time.monotonic() - begun))
        if not won:
            wanted = trial.wanted(launcher.network)
            try:
                found = [f"{f['kind']} {f['hosts']}: {f['what']}" for f in outcome.findings]
            except FileNotFoundError:
                found = [outcome.log(0).strip().splitlines()[-1]]
            where = f"hosts {trial.victims} of {count}, {trial.severity} left"
            print(f"  missed: {fault} {number}, {where}: wanted {wanted}, found {found}; {into}", flush=True)
        elif sys.stderr.isatty():
            print(f"\r{fault} {number + 1}/{options.trials}", end="", file=sys.stderr)
    return played


def show(fault: str, played: list[Played]) -> None:
    """Rows of the table: one for each number of hosts."""
    for count in HOSTS:
        of_count = [one for one in played if one.hosts == count]
        won, mean = (
            sum(one.won for one in of_count),
            sum(one.seconds for one in of_count) / max(1, len(of_count)),
        )
        print(f"{fault:<14} {count:>5} {won:>7}/{len(of_count):<5} {mean:>9.1f}", flush=True)


def show_rounds() -> None:
    """How a pass grows: rounds of pairs that are probed at once, beside the number of pairs."""
    print(f"\n{'hosts':>5} {'rounds':>7} {'pairs':>6}")
    for count in (3, 4, 8, 16, 32, 63, 64):
        print(f"{count:>5} {len(schedule([list(range(count))])):>7} {count * (count - 1) // 2:>6}")


@contextlib.contextmanager
def made(nic: float) -> Iterator[list[Launcher]]:
    """Hosts with their processes, for each number of hosts."""
    with contextlib.ExitStack() as stack:
        networks = [stack.enter_context(Network(count, nic)) for count in HOSTS]
        yield [stack.enter_context(Launcher(network)) for network in networks]


def main() -> int:
    """Run the trials; the number of those that were missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.bench_faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=20, help="of each fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", default=",".join(FAULTS), help="which, with commas")
    parser.add_argument("--nic", type=float, default=400.0, help="what a sound NIC passes, in Mbit/s")
    options = parser.parse_args()
    lacking = unavailable() or throttles_unavailable() or cpu_unavailable()
    if lacking:
        print(f"skipped: {lacking}")
        return 0
    begun, missed = time.monotonic(), 0
    load = os.getloadavg()[0]
    print(
        f"NICs of {options.nic:g} Mbit/s, seed {options.seed}, load {load:.1f} on {os.cpu_count()} cores; left in a fault:"
    )
    print("  " + ", ".join(f"{fault} {low:g} to {high:g}" for fault, (low, high) in SEVERITIES.items()))
    print(f"{'fault':<14} {'hosts':>5} {'named alone':>13} {'s a trial':>9}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="mrfaults"))
    with made(options.nic) as launchers:
        for fault in options.faults.split(","):
            played = run(fault, options, launchers, folder)
            show(fault, played)
            missed += sum(not one.won for one in played)
    show_rounds()
    kept = f"; measurements in {folder}" if missed else ""
    print(f"\n{missed} missed, {time.monotonic() - begun:.0f} s, load {os.getloadavg()[0]:.1f}{kept}")
    if not missed:
        shutil.rmtree(folder)
    return min(missed, 100)


if __name__ == "__main__":
    sys.exit(main())
