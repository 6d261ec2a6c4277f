"""The faults of the test network hit what they name and nothing else. Rates are ratios against the same test's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.namespaces import Host, Network, cpu_unavailable, throttles_unavailable, unavailable

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(60),
    pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-"),
]
needs_throttles = pytest.mark.skipif(bool(throttles_unavailable()), reason=throttles_unavailable() or "-")
needs_cpu = pytest.mark.skipif(bool(cpu_unavailable()), reason=cpu_unavailable() or "-")

PORT = 7000
AGENT = f"""
import socket, sys, threading, time
MESSAGE = bytes(1 << 20)
server = socket.create_server((sys.argv[1], {PORT}))

def answer(peer):
    while True:
        left = len(MESSAGE)
        while left:
            got = len(peer.recv(min(left, 1 << 18)))
            if not got:
                return
            left -= got
        peer.sendall(b"k")

def serve():
    while True:
        threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

def send(address, seconds):
    peer = peers.get(address) or peers.setdefault(address, socket.create_connection((address, {PORT})))
    count, began = 0, time.monotonic()
    while count == 0 or time.monotonic() - began < seconds:
        peer.sendall(MESSAGE)
        peer.recv(1)
        count += 1
    return count * len(MESSAGE) * 8e-6 / (time.monotonic() - began)

def spin(seconds):
    count, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        count += 1
    return count / seconds

threading.Thread(target=serve, daemon=True).start()
peers = {{}}
print("ready", flush=True)
for line in sys.stdin:
    name, *words = line.split()
    print(send(words[0], float(words[1])) if name == "send" else spin(float(words[0])), flush=True)
"""
"""On each host: sends messages to another over one lasting connection, or keeps the CPU busy; says how fast."""

Rates = dict[tuple[int, int], float]


class Agents:
    """An agent on each host."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.agents = [self._start(host) for host in network.hosts]

    def _start(self, host: Host) -> subprocess.Popen[str]:
        agent = host.popen(
            sys.executable, "-c", AGENT, host.ip, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert agent.stdout is not None and agent.stdout.readline() == "ready\n"
        return agent

    def ask(self, index: int, *words: str | float) -> float:
        agent = self.agents[index]
        assert agent.stdin is not None and agent.stdout is not None
        agent.stdin.write(" ".join(map(str, words)) + "\n")
        agent.stdin.flush()
        return float(agent.stdout.readline())

    def rate(self, source: int, target: int, seconds: float = 0.2) -> float:
        """Mbit/s from one host to another, at best: a connection may still recover from what it lived through."""
        return max(self.ask(source, "send", self.network.hosts[target].ip, seconds) for _ in range(2))

    def rates(self) -> Rates:
        """Of all ordered pairs, one after the other."""
        every = range(len(self.agents))
        return {(a, b): self.rate(a, b) for a in every for b in every if a != b}


@pytest.fixture(scope="module")
def agents() -> Iterator[Agents]:
    with Network(3) as network:
        yield Agents(network)


@pytest.fixture(autouse=True)
def healed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "agents" in request.fixturenames:
        request.getfixturevalue("agents").network.heal()


def test_sound_hosts_reach_each_other(agents: Agents) -> None:
    rates = agents.rates()
    assert min(rates.values()) > max(rates.values()) / 20, "none is throttled, however busy the machine is"


@needs_throttles
def test_a_throttle_slows_what_goes_out_and_comes_in(agents: Agents) -> None:
    sound = agents.rate(0, 2)
    agents.network.throttle(1, 50)
    assert max(agents.rate(a, b) for a, b in ((1, 0), (1, 2), (0, 1), (2, 1))) < 55
    assert agents.rate(0, 2) > sound / 5
    agents.network.heal()
    assert agents.rate(1, 0) > 4 * 55


@needs_throttles
def test_a_throttle_on_the_way_out_leaves_the_way_in(agents: Agents) -> None:
    agents.network.throttle_out(1, 50)
    assert max(agents.rate(1, b) for b in (0, 2)) < 55
    assert min(agents.rate(a, 1) for a in (0, 2)) > 2 * 55


@needs_throttles
def test_a_slow_pair_and_a_slow_direction_slow_nothing_else(agents: Agents) -> None:
    agents.network.slow_pair(0, 1, 50)
    rates = agents.rates()
    assert {pair for pair, rate in rates.items() if rate < 55} == {(0, 1), (1, 0)}
    before = agents.network.sent_bytes(0, 1)
    agents.rate(0, 1)
    assert agents.network.sent_bytes(0, 1) - before >= 1 << 20
    agents.network.heal()
    agents.network.slow_direction(2, 1, 50)
    assert {pair for pair, rate in agents.rates().items() if rate < 55} == {(2, 1)}


@needs_cpu
def test_a_taken_cpu_slows_one_host(agents: Agents) -> None:
    free = agents.ask(0, "spin", 0.3)
    agents.network.take_cpu(0, 0.1)
    taken = agents.ask(0, "spin", 0.3)
    assert taken < free / 3 and agents.ask(1, "spin", 0.3) > 2 * taken
    agents.network.heal()
    assert agents.ask(0, "spin", 0.3) > 2 * taken


@needs_throttles
def test_sound_nics_have_the_rate_that_is_asked_for() -> None:
    with Network(3, nic_mbit=100) as network:
        agents = Agents(network)
        assert all(40 < rate < 110 for rate in agents.rates().values())
        network.throttle(0, 30)
        network.slow_direction(1, 2, 30)
        slow = {pair for pair, rate in agents.rates().items() if rate < 40}
        assert slow == {(0, 1), (0, 2), (1, 0), (2, 0), (1, 2)}
        network.heal()
        assert all(40 < rate < 110 for rate in agents.rates().values())


def test_hosts_end_with_the_network() -> None:
    with Network(2) as network:
        Agents(network)
        started = [process for host in network.hosts for process in host.started]
        names = [host.name for host in network.hosts]
    assert all(process.returncode is not None for process in started)
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout.split()
    assert not set(names) & set(left)
