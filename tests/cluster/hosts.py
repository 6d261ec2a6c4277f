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

import psutil

from configs.timeouts import Timeouts
from orchestrator.local.cluster import kill_tree
from orchestrator.local.settings import health_environment
from tests.namespaces import Host, Network, unavailable

__all__ = ["Hosts", "unavailable"]
_PORT = 6379
UNGUARDED = {"RAY_AUTH_MODE": "disabled"}
"""An account that has a token has Ray guard its head with it by itself, and nodes that join have to be told of it."""


@dataclass
class Hosts:
    """Hosts `.1`, `.2`, … on one bridge; `.1` is the Ray head."""

    count: int
    slots: int
    patience: Timeouts = field(default_factory=Timeouts)
    """What Ray's health checks are set from."""
    network: Network = field(init=False)
    _ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)
    _rays: dict[int, int] = field(default_factory=dict, init=False)
    """Process id of `ray start --block` by host."""

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
            for index in range(self.count):
                self.start_ray(index, ends)
            self._ends = ends.pop_all()  # only once all is up: what fails on the way ends what is there
        return self

    def start_ray(self, index: int, ends: contextlib.ExitStack | None = None) -> None:
        """Start a host's Ray node and wait until it has joined."""
        host, ends = self.hosts[index], ends or self._ends
        temporary = Path(tempfile.mkdtemp(prefix="mrh"))
        ends.callback(shutil.rmtree, temporary, ignore_errors=True)
        role = (
            ["--head", f"--port={_PORT}", "--include-dashboard=false"]
            if not index
            else [f"--address={self.address}"]
        )
        words = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--block"),
            *(f"--node-ip-address={host.ip}", f"--num-cpus={self.slots}", "--disable-usage-stats"),
            *("--object-store-memory=100000000", f"--temp-dir={temporary}", "--log-color=false"),
        ]
        log = temporary / "start.log"
        with log.open("wb") as out:
            env = os.environ | health_environment(self.patience) | UNGUARDED | {"MEGARAY_STANDBYS": "0"}
            process = host.popen(*words, env=env, stdout=out, stderr=subprocess.STDOUT)
        ends.callback(kill_tree, process.pid)
        self._rays[index] = process.pid
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start on {host.name}:\n{log.read_text()}")
            time.sleep(0.1)

    def end_ray(self, index: int) -> None:
        """End a host's Ray node with all that it has started."""
        kill_tree(self._rays.pop(index))

    def rejoin(self, index: int) -> None:
        """Mend a host's link and start its Ray node again, as a service manager would: a node that was given up ends."""
        self.mend(index)
        if index in self._rays:
            self.end_ray(index)
        self.start_ray(index)

    def hide(self, index: int, folder: Path) -> None:
        """Lay an empty folder over one that all hosts share, as a mount that is missing on this host would."""
        self._mount(index, "mount", "-t", "tmpfs", "none", str(folder))

    def show(self, index: int, folder: Path) -> None:
        """Undo `hide`."""
        self._mount(index, "umount", "-l", str(folder))

    def _mount(self, index: int, *words: str) -> None:
        # `ip netns exec` gave Ray's processes mounts of their own.
        subprocess.run(["nsenter", "-t", str(self._inside(index)), "-m", *words], check=True)

    def _inside(self, index: int) -> int:
        """A process of the host's Ray node."""
        return psutil.Process(self._rays[index]).children(recursive=True)[-1].pid

    def cut(self, index: int) -> None:
        """Take a host's link down: a partition that sends no refusal."""
        self.network.cut(index)

    def mend(self, index: int) -> None:
        """Bring a host's link up again."""
        self.network.mend(index)

    def __exit__(self, *_: object) -> None:
        self._ends.close()
