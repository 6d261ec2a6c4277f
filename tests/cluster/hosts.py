"""Real hosts on one machine: network namespaces on a bridge, each with an address and a Ray node of its own.

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
from orchestrator.ray_cluster import end_family, health_environment

_SUBNET = "10.213.7"
_PORT = 6379


def unavailable() -> str:
    """Why hosts can't be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the `ip` command (Debian: apt-get install iproute2)"
    name = f"mr{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are refused here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@dataclass
class Host:
    """One host: a namespace, an address and the Ray node in it."""

    name: str
    ip: str
    temporary: Path
    process: subprocess.Popen[bytes] | None = None

    def command(self, *words: str) -> list[str]:
        """`words` as a command that runs on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def run(self, *words: str, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Run `python WORDS` on this host to its end."""
        return subprocess.run(
            self.command(sys.executable, *words),
            env=os.environ | env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
        )  # fmt: skip


@dataclass
class Hosts:
    """Hosts `.1`, `.2`, … on one bridge; `.1` is the Ray head."""

    count: int
    slots: int
    hosts: list[Host] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Of the head's GCS."""
        return f"{self.hosts[0].ip}:{_PORT}"

    def __enter__(self) -> Hosts:
        self._prefix = f"mr{os.getpid()}"
        switch = f"{self._prefix}sw"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        try:
            for index in range(self.count):
                self._add_host(index, switch)
            for host in self.hosts:
                self._start_ray(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _add_host(self, index: int, switch: str) -> None:
        host = Host(f"{self._prefix}h{index}", f"{_SUBNET}.{index + 1}", Path(tempfile.mkdtemp(prefix="mrh")))
        self.hosts.append(host)
        _ip("netns", "add", host.name)
        near, far = f"v{os.getpid() % 10000}h{index}", f"v{os.getpid() % 10000}s{index}"
        _ip("link", "add", near, "netns", host.name, "type", "veth", "peer", "name", far, "netns", switch)
        _ip("-n", switch, "link", "set", far, "master", "br0", "up")
        _ip("-n", host.name, "link", "set", near, "name", "eth0")
        _ip("-n", host.name, "addr", "add", f"{host.ip}/24", "dev", "eth0")
        _ip("-n", host.name, "link", "set", "eth0", "up")
        _ip("-n", host.name, "link", "set", "lo", "up")

    def _start_ray(self, host: Host) -> None:
        head = host is self.hosts[0]
        role = (
            ["--head", f"--port={_PORT}", "--include-dashboard=false"]
            if head
            else [f"--address={self.address}"]
        )
        words = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--block"),
            *(f"--node-ip-address={host.ip}", f"--num-cpus={self.slots}", "--disable-usage-stats"),
            *("--object-store-memory=100000000", f"--temp-dir={host.temporary}", "--log-color=false"),
        ]
        log = host.temporary / "start.log"
        with log.open("wb") as out:
            host.process = subprocess.Popen(
                host.command(*words), env=os.environ | health_environment(Timeouts()),
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            if host.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start on {host.name}:\n{log.read_text()}")
            time.sleep(0.1)

    def cut(self, index: int) -> None:
        """Take a host's link down: a partition that sends no refusal."""
        _ip("-n", self.hosts[index].name, "link", "set", "eth0", "down")

    def mend(self, index: int) -> None:
        """Bring a host's link up again."""
        _ip("-n", self.hosts[index].name, "link", "set", "eth0", "up")

    def __exit__(self, *_: object) -> None:
        for host in reversed(self.hosts):
            if host.process is not None:
                end_family(host.process.pid)
            for pid in _pids_in(host.name):
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
            shutil.rmtree(host.temporary, ignore_errors=True)
        subprocess.run(["ip", "netns", "del", f"{self._prefix}sw"], capture_output=True)


def _pids_in(namespace: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
