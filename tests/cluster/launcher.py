"""Ranks of a measurement on hosts in namespaces, one a host, started as torchrun would.

Importing torch takes seconds of two shared cores, so each host keeps a process that has done so and forks a rank from
it for each run. A rank goes through the command line of `python -m collectives run` with torchrun's variables set.

    python -m tests.cluster.launcher     # the process on each host: a line of JSON in, a line out for each rank
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.namespaces import Host, Network

_PORT = 29500


@dataclass(frozen=True)
class LaunchOutcome:
    """What a measurement left behind."""

    folder: Path
    codes: tuple[int, ...]
    """Exit code by rank."""

    @property
    def findings(self) -> list[dict[str, Any]]:
        """Of `findings.json`."""
        return list(json.loads((self.folder / "measurement" / "findings.json").read_text()))

    @property
    def named(self) -> list[tuple[str, tuple[str, ...]]]:
        """Kind and hosts of each finding."""
        return [(found["kind"], tuple(found["hosts"])) for found in self.findings]

    def log(self, rank: int) -> str:
        """What a rank printed."""
        return (self.folder / f"rank{rank}.log").read_text()


def torchrun_variables(network: Network, rank: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank, of one on each host, and what a user of gloo tells it."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(network.count), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": network.hosts[0].ip, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",  # gloo goes by the host's name, and namespaces share one
    }  # fmt: skip


@dataclass
class Launcher:
    """A process with torch on each host of a network, as a context manager."""

    network: Network
    _servers: list[subprocess.Popen[str]] = field(default_factory=list, init=False)
    _port: int = field(default=_PORT, init=False)

    def __enter__(self) -> Self:
        self._servers = [self._serve(host) for host in self.network.hosts]
        for server in self._servers:
            self._answer(server)
        return self

    def _serve(self, host: Host) -> subprocess.Popen[str]:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        words = (sys.executable, "-m", "tests.cluster.launcher")
        return host.popen(*words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, folder: Path, *overrides: str) -> None:
        """Start the measurement `collectives run OVERRIDES` into `folder`, on every host a rank."""
        folder.mkdir(parents=True)
        self._port += 1  # of its own for each run: the last one's may still be in use
        for rank, server in enumerate(self._servers):
            env = torchrun_variables(self.network, rank, self._port)
            words = ["run", "--out", str(folder), *overrides]
            assert server.stdin is not None
            log = str(folder / f"rank{rank}.log")
            server.stdin.write(json.dumps({"env": env, "words": words, "log": log}) + "\n")
            server.stdin.flush()

    def wait(self, folder: Path) -> LaunchOutcome:
        """Wait for the end of the measurement that was started into `folder`."""
        return LaunchOutcome(folder, tuple(int(self._answer(server)) for server in self._servers))

    def run(self, folder: Path, *overrides: str) -> LaunchOutcome:
        """Start and wait."""
        self.start(folder, *overrides)
        return self.wait(folder)

    @staticmethod
    def _answer(server: subprocess.Popen[str]) -> str:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise RuntimeError(f"the launcher on a host ended with exit code {server.wait()}")
        return line

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            assert server.stdin is not None
            server.stdin.close()  # it ends; what hangs is ended with the network
            server.wait(timeout=30)


def main() -> None:
    """Serve on one host, until the input ends."""
    import collectives.studies.program  # noqa: F401 (loads torch, which every rank then has)
    from configs.compose import compose

    compose(["workload=collectives", "collectives=faults"])
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _become_rank(order)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become_rank(order: dict[str, Any]) -> None:
    """Be one rank, to the end of this process."""
    code = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for old, new in ((0, nothing), (1, log), (2, log)):
            os.dup2(new, old)
        os.environ.update(order["env"])
        from collectives.cli import main as command_line

        code = command_line(order["words"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
