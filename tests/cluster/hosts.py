"""Real hosts on one machine, each with a Ray node of its own: network namespaces, as `tests.namespaces` makes them.

They share the machine's files, as the nodes of a cluster share a file system. Everything is made for one test
session and removed after it, by name and by process id.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from configs.timeouts import Timeouts
from orchestrator.ray_cluster import end_family, health_environment
from tests.namespaces import Host, Network, unavailable

__all__ = ["Hosts", "unavailable"]
_PORT = 6379


@dataclass
class Hosts:
    """Hosts `.1`, `.2`, … on one bridge; `.1` is the Ray head."""

    count: int
    slots: int
    network: Network = field(init=False)
    _ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)

    @property
    def hosts(self) -> list[Host]:
        """In the order of their addresses."""
        return self.network.hosts

    @property
    def address(self) -> str:
        """Of the head's GCS."""
        return f"{self.hosts[0].ip}:{_PORT}"

    def __enter__(self) -> Hosts:
        self.network = Network(self.count)
        with contextlib.ExitStack() as ends:
            ends.enter_context(self.network)
            for host in self.hosts:
                self._start_ray(host, ends)
            self._ends = ends.pop_all()  # only once all is up: what fails on the way ends what is there
        return self

    def _start_ray(self, host: Host, ends: contextlib.ExitStack) -> None:
        temporary = Path(tempfile.mkdtemp(prefix="mrh"))
        ends.callback(shutil.rmtree, temporary, ignore_errors=True)
        head = host is self.hosts[0]
        role = (
            ["--head", f"--port={_PORT}", "--include-dashboard=false"]
            if head
            else [f"--address={self.address}"]
        )
        words = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--block"),
            *(f"--node-ip-address={host.ip}", f"--num-cpus={self.slots}", "--disable-usage-stats"),
            *("--object-store-memory=100000000", f"--temp-dir={temporary}", "--log-color=false"),
        ]
        log = temporary / "start.log"
        with log.open("wb") as out:
            env = os.environ | health_environment(Timeouts())
            process = host.popen(*words, env=env, stdout=out, stderr=subprocess.STDOUT)
        ends.callback(end_family, process.pid)
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start on {host.name}:\n{log.read_text()}")
            time.sleep(0.1)

    def cut(self, index: int) -> None:
        """Take a host's link down: a partition that sends no refusal."""
        self.network.cut(index)

    def mend(self, index: int) -> None:
        """Bring a host's link up again."""
        self.network.mend(index)

    def __exit__(self, *_: object) -> None:
        self._ends.close()
