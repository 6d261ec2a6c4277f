"""The Ray cluster itself: start one on this machine, find one, connect, take ours down, and reach one by URL."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from configs.errors import UserError
from configs.paths import HomePaths
from configs.timeouts import Timeouts

NAMESPACE = "megaray"
"""Ray namespace of everything detached."""
_START_SECONDS = 90.0
_DIAL_SECONDS = 3.0
_STOP_SECONDS = 10.0
_EXCLUDED = [".git", ".venv", "**/__pycache__", "wandb", "outputs", ".*_cache"]


@dataclass(frozen=True)
class LocalCluster:
    """The Ray on this machine that `up` or `submit` started; `<home>/cluster.json`."""

    address: str
    """`host:port` of its GCS."""
    dashboard: str
    """URL of its dashboard and job submission."""
    pid: int
    """Of `ray start --block`, the leader of the cluster's process group."""
    created: float
    """Start time of that process, so that a reused id isn't taken for it."""
    slots: int
    temporary: str
    """Ray's session folder."""


def local(home: HomePaths) -> LocalCluster | None:
    """The local cluster that is recorded and alive."""
    try:
        record = LocalCluster(**json.loads(home.cluster.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record if _alive(record) else None


def _alive(record: LocalCluster) -> bool:
    try:
        return abs(psutil.Process(record.pid).create_time() - record.created) < 1.0
    except psutil.NoSuchProcess:
        return False


def up(home: HomePaths, slots: int, timeouts: Timeouts) -> LocalCluster:
    """Start Ray on this machine with `slots` slots, detached from this process.

    Raises:
        UserError: where one is running already, or Ray does not come up; with the path of its log.
    """
    running = local(home)
    if running:
        raise UserError(
            f"a local Ray with {running.slots} slots is up at {running.address}; "
            "`python -m orchestrator down` ends it"
        )
    home.runs.mkdir(parents=True, exist_ok=True)
    # Ray's socket paths must stay below 108 bytes, so its session can't live under a long home.
    temporary = tempfile.mkdtemp(prefix="megaray-")
    port, dashboard_port = _free_ports(2)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--num-cpus={slots}", f"--port={port}", f"--dashboard-port={dashboard_port}"),
        *("--dashboard-host=127.0.0.1", f"--temp-dir={temporary}", "--disable-usage-stats"),
        "--log-color=false",
    ]
    log = home.home / "ray-start.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=os.environ | health_environment(timeouts) | {"PATH": _path_with_this_python()},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    created = psutil.Process(process.pid).create_time()
    deadline = time.monotonic() + _START_SECONDS
    while not (address := _head_address(Path(temporary))) or "Ray runtime started" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            end_family(process.pid)
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"Ray did not start; see {log}")
        time.sleep(0.1)
    url = f"http://127.0.0.1:{dashboard_port}"
    record = LocalCluster(address, url, process.pid, created, slots, temporary)
    home.cluster.write_text(json.dumps(asdict(record)))
    return record


def _path_with_this_python() -> str:
    """`PATH` on which `python` is this interpreter: jobs that come by the dashboard start with that word."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def health_environment(timeouts: Timeouts) -> dict[str, str]:
    """Ray's node health checks, set so that a silent node is dead after `timeouts.node` seconds.

    Ray's own defaults take 15 s for a refused connection and 65 s for a black hole. Its head reads these
    variables, so a cluster that somebody else starts needs them in the head's environment.
    """
    period = timeouts.seconds("node") / 5
    return {
        "RAY_health_check_initial_delay_ms": "2000",
        "RAY_health_check_period_ms": str(int(period * 1000)),
        "RAY_health_check_timeout_ms": str(int(period * 1000)),
        "RAY_health_check_failure_threshold": "4",
    }


def down(home: HomePaths) -> bool:
    """End the local cluster with everything that it started; False where none is recorded.

    Only recorded process ids and their descendants are signalled; other Rays on the machine are left alone.
    """
    try:
        record = LocalCluster(**json.loads(home.cluster.read_text()))
    except FileNotFoundError:
        return False
    if _alive(record):
        end_family(record.pid)
    shutil.rmtree(record.temporary, ignore_errors=True)
    home.cluster.unlink(missing_ok=True)
    home.queue.unlink(missing_ok=True)
    return True


def end_family(pid: int) -> None:
    """End a process and all its descendants: SIGTERM to the first, then SIGKILL to what is left."""
    try:
        leader = psutil.Process(pid)
        family = [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        leader.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=_STOP_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_STOP_SECONDS)


def _head_address(temporary: Path) -> str:
    try:
        return (temporary / "ray_current_cluster").read_text().strip()
    except FileNotFoundError:
        return ""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def dial(address: str) -> None:
    """Refuse an address that nobody answers at, before Ray waits for it.

    Raises:
        UserError: naming the address and what an address looks like.
    """
    host, _, port = address.rpartition(":")
    forms = "type HOST:PORT of a Ray head (6379 by default) or http://HOST:8265 of its dashboard"
    if not host or not port.isdigit() or "/" in host:
        raise UserError(f"--address '{address}' is not an address of a Ray cluster; {forms}")
    try:
        socket.create_connection((host, int(port)), timeout=_DIAL_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--address '{address}': nobody answers there ({error}); {forms}") from None


def connect(address: str) -> None:
    """Connect this process to a Ray cluster.

    Raises:
        UserError: where there is none.
    """
    dial(address)
    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR,
            configure_logging=False,
        )  # fmt: skip
    except (ConnectionError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"--address '{address}' is no usable Ray cluster: {first}") from None


def disconnect() -> None:
    """Leave the cluster; what is detached goes on."""
    ray.shutdown()


def slots(resource: str) -> list[int]:
    """Units of `CPU` or `GPU` of each live node of the connected cluster."""
    return [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]


def runtime_environment() -> dict[str, Any]:
    """The working directory that this job was submitted with; empty where there is none."""
    env = dict(ray.get_runtime_context().runtime_env)
    return {"working_dir": env["working_dir"]} if env.get("working_dir") else {}


_CHATTER = (" -- Runtime env is setting up.", "Running entrypoint for job ")
"""What Ray itself puts into a job's log."""


def _submit_job(client: JobSubmissionClient, entrypoint: str, environment: dict[str, Any]) -> str:
    """Submit a job. A cluster that has just come up answers before its agents do, so that is asked again for a while."""
    for wait in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            time.sleep(wait)
    return client.submit_job(entrypoint=entrypoint, runtime_env=environment)


def forward(
    url: str, arguments: Sequence[str], code: Path, variables: dict[str, str], write: Callable[[str], object]
) -> int:
    """Run the same command on the head of a cluster that only its dashboard URL is known of.

    The code in `code` travels as Ray's working directory, and `variables` with it. What the command prints goes
    to `write`, and its exit code is returned. Ctrl-C leaves the command running.

    Raises:
        UserError: where nobody answers at the URL.
    """
    for name in ("ray._private", "ray.dashboard", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    entrypoint = " ".join(["python", "-m", "orchestrator", *map(shlex.quote, arguments)])
    environment = {"working_dir": str(code), "excludes": _EXCLUDED, "env_vars": variables}
    try:
        client = JobSubmissionClient(url)
        job = _submit_job(client, entrypoint, environment)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"--address '{url}': no Ray dashboard answers there ({first})") from None
    shown = 0
    while True:
        status = client.get_job_status(job)
        text = client.get_job_logs(job)
        # Whole lines only, but for the last text of a job that has ended.
        end = len(text) if status.is_terminal() else text.rfind("\n") + 1
        fresh = text[shown:end].splitlines(keepends=True)
        write("".join(line for line in fresh if not any(mark in line for mark in _CHATTER)))
        shown = max(shown, end)
        if status.is_terminal():
            info = client.get_job_info(job)
            if status is JobStatus.SUCCEEDED:
                return 0
            return info.driver_exit_code if info.driver_exit_code else 1
        time.sleep(0.5)
