"""The Ray on this machine that `up` or `submit` started: its record, its processes, its start and its end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from configs.errors import UserError, from_json
from configs.paths import HomePaths, write_whole
from configs.timeouts import Timeouts
from orchestrator import PROGRAM
from orchestrator.local.lock import is_same_process, start_ticks
from orchestrator.local.settings import health_environment

MARK = "MEGARAY_LOCAL"
"""Variable that all processes of a local Ray inherit; its value is the home."""
_STOP_SECONDS = 3.0
"""Between SIGTERM and SIGKILL: Ray would drain its node for up to 30 s, and no run is left on it that had a use of that."""
_GONE_SECONDS = 10.0
"""Until processes that were killed are gone."""
_KEEPER_SECONDS = 30.0
_STARTS = 2
"""Tries of a start that Ray's own deadline ends."""
_CODE = Path(__file__).parents[2]


@dataclass(frozen=True)
class LocalCluster:
    """`<home>/cluster.json`."""

    address: str
    """`host:port` of its GCS."""
    dashboard: str
    """URL of its dashboard and job submission."""
    pid: int
    """Of its supervisor, which all its processes come from."""
    ticks: int
    """When that process started (`orchestrator.local.lock.start_ticks`), so that a reused id isn't taken for it."""
    boot: str
    """Which start of which machine it runs on."""
    host: str
    slots: int
    gpus: int
    temporary: str
    """Ray's session folder."""
    token: str = ""
    """File of the token that its clients show; empty where it wants none, or where a variable holds it."""

    @property
    def alive(self) -> bool:
        """Its supervisor runs on this machine."""
        return self.boot == boot_id() and is_same_process(self.pid, self.ticks)


def boot_id() -> str:
    """Names the present start of this machine."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def read_record(home: HomePaths) -> tuple[LocalCluster | None, str]:
    """The record, and why it can't be read; neither where there is none."""
    try:
        tree = from_json(home.cluster.read_text())
        return LocalCluster(**tree), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, TypeError) as error:
        return None, f"{home.cluster} can't be read ({str(error).splitlines()[0]})"


def live_cluster(home: HomePaths) -> LocalCluster | None:
    """The local cluster that is recorded and alive.

    Raises:
        UserError: where it runs on another machine that shares the home.
    """
    record, _ = read_record(home)
    if record is None or record.alive:
        return record
    if record.host != socket.gethostname() and record.boot != boot_id():
        raise UserError(
            f"{home.cluster} names a Ray on {record.host}, but this host is {socket.gethostname()}: type the command "
            f"there, name a cluster with --address HOST:PORT, or set MEGARAY_HOME to a folder of this machine (if "
            f"{record.host} is gone, remove the file)"
        )
    return None


def start_cluster(home: HomePaths, slots: int, gpus: int, timeouts: Timeouts) -> LocalCluster:
    """Start Ray on this machine, detached from this process, with a supervisor that starts it again when it dies.

    Whatever ends this before Ray is up, Ctrl-C too, leaves no process behind.

    Args:
        home: whose lock (`orchestrator.local.lock`) is held.
        slots: ranks on processors that may run at once.
        gpus: that it gets.
        timeouts: its health checks follow from them.

    Raises:
        UserError: where one is running already, or Ray does not come up; with the path of its log.
    """
    running = live_cluster(home)
    if running:
        raise UserError(
            f"a local Ray with {running.slots} slots is up at {running.address}; `{PROGRAM} down` ends it"
        )
    home.ensure()
    stop_cluster(home)  # what a crash has left
    command = [
        sys.executable,
        "-m",
        "orchestrator.local.supervisor",
        "local",
        str(home.home),
        str(slots),
        str(gpus),
    ]
    environment = os.environ | health_environment(timeouts) | {MARK: str(home.home)}
    for _ in range(_STARTS):
        written = home.ray_log.stat().st_size if home.ray_log.exists() else 0
        record = _start_supervisor(home, command, environment)
        if record is not None:
            return record
        if not _too_slow(home.ray_log, written):
            break
    raise UserError(f"Ray did not start{_error_in(home.ray_log)}; see {home.ray_log}")


def _start_supervisor(
    home: HomePaths, command: list[str], environment: dict[str, str]
) -> LocalCluster | None:
    """Start the supervisor, which starts Ray; its record once Ray is up. None, and no process, where it doesn't come up."""
    with home.ray_log.open("ab") as log:
        supervisor = subprocess.Popen(
            command, env=environment, cwd=_CODE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            start_new_session=True, text=True,
        )  # fmt: skip
    assert supervisor.stdout is not None
    try:
        said = supervisor.stdout.readline()
        record = LocalCluster(**from_json(said)) if said.strip() else None
    except BaseException:
        with uninterrupted():
            stop_cluster(home, supervisor.pid)
        raise
    finally:
        supervisor.stdout.close()
    if record is None:
        stop_cluster(home, supervisor.pid)
    return record


def _too_slow(log: Path, written: int) -> bool:
    """Whether a start ended since Ray waits 30 s for its own processes, which a busy machine may not run in that time."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(written)
        return b"timed out during startup" in file.read()
    return False


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A second Ctrl-C doesn't interrupt the cleaning up after the first."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, which alone gets Ctrl-C
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _error_in(log: Path) -> str:
    """The last line of Ray's log that tells of an error, for the message."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace")[-8192:].splitlines()]
        errors = [line for line in lines if "Error" in line or "error:" in line.lower()]
        return f" ({errors[-1][:200]})" if errors else ""
    return ""


def stop_cluster(home: HomePaths, supervisor: int = 0) -> bool:
    """End the local Ray of a home with everything that it has started; whether there was anything.

    Only processes that it has started are signalled, which are known by the variable that they inherit; other Rays on the
    machine are left alone.

    Args:
        home: of the cluster; its record may be missing or damaged.
        supervisor: process id of the supervisor where it is known and may not have written the record yet.
    """
    record, _ = read_record(home)
    pid = supervisor or (record.pid if record and record.alive else 0)
    pids = cluster_pids(home)
    if pid and start_ticks(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _KEEPER_SECONDS
        while start_ticks(pid) and time.monotonic() < deadline:
            _reap(pid)
            time.sleep(0.05)
    for _ in range(5):  # what is being started while others are ended comes up in the next round
        left = cluster_pids(home)
        if not left:
            break
        kill_all(left, _STOP_SECONDS if not pid else 0.0)
    if record is not None:
        shutil.rmtree(record.temporary, ignore_errors=True)
        pids = pids or [record.pid]
    home.cluster.unlink(missing_ok=True)
    home.queue.unlink(missing_ok=True)
    return bool(pids)


def _reap(pid: int) -> None:
    """Take the exit code of a child, so that it doesn't stay a zombie; not ours: nothing."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def cluster_pids(home: HomePaths) -> list[int]:
    """Processes that the local Ray of a home has started, with their descendants; never this one nor those above it."""
    mark = f"{MARK}={home.home}".encode()
    above = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    pids: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in above:
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and start_ticks(int(entry.name)):
                    pids.add(int(entry.name))
    for pid in list(pids):
        with contextlib.suppress(psutil.Error):
            pids.update(child.pid for child in psutil.Process(pid).children(recursive=True))
    return sorted(pids - above)


def kill_tree(pid: int) -> None:
    """End a process and all its descendants: SIGTERM to the first, then SIGKILL to what is left."""
    try:
        leader = psutil.Process(pid)
        family = [leader.pid, *(child.pid for child in leader.children(recursive=True))]
    except psutil.NoSuchProcess:
        return
    kill_all(family, _STOP_SECONDS)


def kill_all(pids: list[int], grace: float) -> None:
    """SIGTERM to the first where there is a grace in seconds, then SIGKILL to what is left of them all."""
    family = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            family.append(psutil.Process(pid))
    if grace > 0 and family:
        with contextlib.suppress(psutil.NoSuchProcess):
            family[0].send_signal(signal.SIGTERM)
        _, family = psutil.wait_procs(family, timeout=grace)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=_GONE_SECONDS)


def write_record(home: HomePaths, record: LocalCluster) -> None:
    """Replace the record."""
    write_whole(home.cluster, json.dumps(asdict(record)))
