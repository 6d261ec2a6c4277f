"""The node agent: one Ray actor per node of a gang, which starts that node's ranks as child processes.

Ray places the actor in its bundle, carries its messages and reports its death; it is never in the training
step. The ranks are separate processes in process groups of their own, so a rank that hangs, stops or holds
its interpreter lock can't silence the agent, and a dead agent takes its ranks along (`die_with_parent`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from configs.metrics import read_from
from configs.paths import RunPaths
from configs.rank import RankContext
from faulttol import recorder
from orchestrator.control.gang import AgentReport, GangSpec, RankReport
from orchestrator.record.events import NodeShare

_TAIL_BYTES = 4096


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    exit_time: float | None = None


class NodeAgent:
    """Owns one node's share of a gang. Its methods run one at a time on the actor's main thread.

    That thread must be the one that forks: the kernel's parent-death signal is tied to the forking thread.
    """

    def __init__(self, spec: GangSpec, share: NodeShare) -> None:
        self._spec = spec
        self._share = share
        self._run = RunPaths(Path(spec.run_root))
        self._paths = self._run.attempt(spec.attempt)
        self._children: list[_Child] = []

    def prepare(self) -> tuple[str, int, str]:
        """Address and a free port for the rendezvous, and why this node can't take ranks ('' if it can)."""
        refused = ""
        if not self._run.config.is_file():
            refused = (
                f"node {self._share.ip} doesn't see {self._run.config}; MEGARAY_HOME must be a folder "
                "that all nodes share (NFS, Lustre, …)"
            )
        with socket.socket() as probe:
            probe.bind(("", 0))
            return self._share.ip, probe.getsockname()[1], refused

    def start(self, master_addr: str, master_port: int) -> dict[int, int]:
        """Start the ranks of this node; process ids by rank."""
        self._paths.ranks.mkdir(parents=True, exist_ok=True)
        ranks = self._share.ranks
        for local_rank, rank in enumerate(ranks):
            context = RankContext(
                rank=rank,
                world=self._spec.world,
                local_rank=local_rank,
                local_world=len(ranks),
                master_addr=master_addr,
                master_port=master_port,
                run=self._run,
                attempt=self._spec.attempt,
            )
            self._children.append(_Child(rank, self._spawn(context)))
        return {child.rank: child.process.pid for child in self._children}

    def _spawn(self, context: RankContext) -> subprocess.Popen[bytes]:
        with self._paths.log(context.rank).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *self._spec.program],
                env=self._environment(context),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _environment(self, context: RankContext) -> dict[str, str]:
        env = os.environ | context.environment() | {"MEGARAY_PARENT": str(os.getpid())}
        # What this worker imports from (a laptop's working directory too), its ranks import from.
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        env["PYTHONUNBUFFERED"] = "1"
        env["MEGARAY_NODE"] = self._share.ip  # host names of containers change from start to start
        threads = max(1, (os.cpu_count() or 1) // len(self._share.ranks))
        env["OMP_NUM_THREADS"] = str(threads)  # Ray's own value is for the actor, not for a rank
        if len({share.ip for share in self._spec.shares}) > 1:
            # Gloo asks the host name for its address, which on many hosts answers with loopback.
            env.setdefault("GLOO_SOCKET_IFNAME", _interface_of(self._share.ip))
        return env

    def poll(self, offset: int) -> tuple[AgentReport, int]:
        """Ranks as they are now, and the metric lines from byte `offset` on where rank 0 is here."""
        now = time.time()
        reports = []
        for child in self._children:
            code = child.process.poll()
            if code is not None and child.exit_time is None:
                child.exit_time = now
            log = self._paths.log(child.rank)
            reports.append(
                RankReport(
                    rank=child.rank,
                    pid=child.process.pid,
                    exit_code=code,
                    exit_time=child.exit_time,
                    newest=recorder.newest(self._paths.record(child.rank)),
                    last_words=_last_line(log) if code else "",
                )
            )
        lines, end = read_from(self._paths.metrics, offset) if 0 in self._share.ranks else ([], offset)
        return AgentReport(self._share.node_id, now, tuple(reports), tuple(lines), end), end

    def stop(self, grace: float) -> bool:
        """End all ranks with their children: SIGTERM, and after `grace` seconds SIGKILL. True when gone."""
        if grace > 0:
            self._signal(signal.SIGTERM)
            self._wait(grace)
        self._signal(signal.SIGKILL)
        self._wait(5.0)
        return all(child.process.poll() is not None for child in self._children)

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children:
            # The rank leads a process group of its own; the group outlives it where it left children.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.process.pid, number)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(c.process.poll() is None for c in self._children):
            time.sleep(0.02)


def _interface_of(ip: str) -> str:
    """Name of the network interface that has address `ip`."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == ip for a in addresses):
            return name
    raise RuntimeError(f"no network interface of this node has address {ip}")


def _last_line(path: Path) -> str:
    """Last non-empty line of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = [row.strip() for row in file.read().decode(errors="replace").splitlines()]
    except FileNotFoundError:
        return ""
    return next((row for row in reversed(lines) if row), "")
