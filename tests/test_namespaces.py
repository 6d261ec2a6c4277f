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

    def rate(self, source: int, target: int, seconds: float = 0.25) -> float:
        """Mbit/s from one host to another."""
        return self.ask(source, "send", self.network.hosts[target].ip, seconds)

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
