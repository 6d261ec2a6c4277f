"""Faults in real hosts are found and named by real ranks: hosts are namespaces, the ranks start as torchrun's would."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import bench_faults
from tests.cluster.launcher import Launcher, LaunchOutcome, torchrun_variables
from tests.namespaces import Network, cpu_unavailable, throttles_unavailable, unavailable

LACKING = unavailable() or throttles_unavailable() or cpu_unavailable()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(LACKING), reason=LACKING or "-"),
]
STUDY = (*bench_faults.STUDY, "collectives.passes=2")
NIC = 400.0
"""Mbit/s of a sound NIC."""
SLOW = 0.3 * NIC
TRIES = 6
"""Measurements of a fault at most: it is there in each of them, and what else continues in the machine is not."""
Cause = Callable[[Network], None]
Named = list[tuple[str, tuple[str, ...]]]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Network(3, NIC) as network, Launcher(network) as made:
        yield made


@pytest.fixture(autouse=True)
def healed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "launcher" in request.fixturenames:
        request.getfixturevalue("launcher").network.heal()


def measured(outcome: LaunchOutcome) -> LaunchOutcome:
    """The outcome of a measurement that went through."""
    assert outcome.codes[0] in (0, 3) and not any(outcome.codes[1:]), outcome.log(0)
    assert (outcome.codes[0] == 3) == bool(outcome.findings), "the exit code says whether something was found"
    return outcome


def named(measure: Callable[[Path], LaunchOutcome], folder: Path, wanted: Named) -> LaunchOutcome:
    """Measure until `wanted` is named, and nothing else."""
    tried = []
    while len(tried) < TRIES:
        outcome = measured(measure(folder / f"run{len(tried)}"))
        if outcome.named == wanted:
            return outcome
        tried.append(outcome.named)
    raise AssertionError(f"wanted {wanted}, named were in turn {tried}")


@pytest.mark.parametrize(
    ("cause", "kind", "hosts", "action"),
    [
        (lambda network: network.throttle(1, SLOW), "slow_nic", (1,), "cordon"),
        (lambda network: network.slow_pair(0, 2, SLOW), "slow_link", (0, 2), "inspect"),
        (lambda network: network.slow_direction(2, 1, SLOW), "asymmetric_pair", (1, 2), "inspect"),
        (lambda network: network.take_cpu(2, 0.3), "slow_host", (2,), "cordon"),
    ],
    ids=["throttled NIC", "slow pair", "slow direction", "taken CPU"],
)
def test_a_fault_among_three_hosts_is_named(
    launcher: Launcher, tmp_path: Path, cause: Cause, kind: str, hosts: tuple[int, ...], action: str
) -> None:
    cause(launcher.network)
    wanted = [(kind, tuple(launcher.network.hosts[i].ip for i in hosts))]
    (found,) = named(lambda folder: launcher.run(folder, *STUDY), tmp_path, wanted).findings
    assert found["action"] == action and 0 < found["ratio"] < 0.6, "what the orchestrator goes by"


def test_an_adapter_that_only_sends_slowly_is_told_from_one_that_is_slow_both_ways(
    launcher: Launcher, tmp_path: Path
) -> None:
    launcher.network.throttle_out(0, SLOW)
    wanted = [("slow_nic", (launcher.network.hosts[0].ip,))]
    (found,) = named(lambda folder: launcher.run(folder, *STUDY), tmp_path, wanted).findings
    assert found["evidence"] == {"directions": ["sending"]}


def test_nothing_is_named_on_three_sound_hosts(launcher: Launcher, tmp_path: Path) -> None:
    named(lambda folder: launcher.run(folder, *STUDY), tmp_path, [])


def test_a_link_that_comes_and_goes_flaps(launcher: Launcher, tmp_path: Path) -> None:
    over = threading.Event()

    def flap() -> None:
        while not over.is_set():
            for mbit, seconds in ((SLOW, 0.9), (NIC, 0.3)):  # as many slow messages as fast ones
                launcher.network.slow_pair(0, 1, mbit)
                over.wait(seconds)

    launcher.network.slow_pair(0, 1, NIC)
    switching = threading.Thread(target=flap)
    switching.start()
    try:
        wanted = [("flapping", tuple(host.ip for host in launcher.network.hosts[:2]))]
        named(lambda folder: launcher.run(folder, *STUDY, "collectives.probe_repeats=20"), tmp_path, wanted)
    finally:
        over.set()
        switching.join()


def test_a_link_that_is_slow_once_starts_cold(launcher: Launcher, tmp_path: Path) -> None:
    network = launcher.network

    def measure(folder: Path) -> LaunchOutcome:
        network.slow_direction(0, 2, 2)
        begun = network.sent_bytes(0, 2)
        launcher.start(folder, *STUDY)
        deadline = time.monotonic() + 60
        # Half of the first message; all before is a few KiB.
        while network.sent_bytes(0, 2) - begun < 1 << 19:
            assert time.monotonic() < deadline, "no message came to the slow link"
            time.sleep(0.02)
        network.slow_direction(0, 2, NIC)
        return launcher.wait(folder)

    named(measure, tmp_path, [("cold_start", (network.hosts[0].ip, network.hosts[2].ip))])


def test_four_hosts_and_ranks_started_from_the_shell(tmp_path: Path) -> None:
    with Network(4, NIC) as network:
        network.slow_pair(1, 3, SLOW)

        def measure(folder: Path) -> LaunchOutcome:
            folder.mkdir()
            words = (sys.executable, "-m", "collectives", "run", "--out", str(folder), *STUDY)
            ranks = []
            with contextlib.ExitStack() as logs:
                for rank, host in enumerate(network.hosts):
                    log = logs.enter_context((folder / f"rank{rank}.log").open("wb"))
                    env = os.environ | torchrun_variables(network, rank, 29500)
                    ranks.append(host.popen(*words, env=env, stdout=log, stderr=subprocess.STDOUT))
                return LaunchOutcome(folder, tuple(rank.wait(timeout=120) for rank in ranks))

        named(measure, tmp_path, [("slow_link", (network.hosts[1].ip, network.hosts[3].ip))])
