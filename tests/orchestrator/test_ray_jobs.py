"""A command that is carried to a cluster by its dashboard's URL: against a server that answers as Ray's does."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.dashboard.modules.job.common import JobStatus
from ray.dashboard.modules.version import CURRENT_VERSION

from configs.errors import UserError
from orchestrator import ray_jobs
from orchestrator.ray_jobs import JobWorkingDir

JOB = {"type": "SUBMISSION", "submission_id": "job", "entrypoint": "python", "status": JobStatus.SUCCEEDED}


class RayDashboard:
    """What it was sent, and how it answers."""

    def __init__(self) -> None:
        self.limit = 1 << 20
        self.files: set[str] = set()
        self.jobs: list[dict[str, Any]] = []
        self.details: list[dict[str, Any]] = [JOB]
        """Of the job, one after the other; the last stays."""
        self.silent = self.silent_after_a_job = False
        self.refusals: list[str] = []
        """Of jobs, one after the other, before one is taken."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        dashboard = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def answer(self, status: int, body: object) -> None:
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                if dashboard.silent or (dashboard.silent_after_a_job and dashboard.jobs):
                    self.answer(503, "restarting")
                elif self.path == "/api/version":
                    versions = {
                        "version": CURRENT_VERSION,
                        "ray_version": "2",
                        "ray_commit": "",
                        "session_name": "",
                    }
                    self.answer(200, versions)
                elif self.path.startswith("/api/packages/"):
                    self.answer(404, "none")
                elif self.path.endswith("/logs"):
                    self.answer(200, {"logs": "Running entrypoint for job job\nsubmitted\n"})
                elif self.path == "/api/jobs/job":
                    several = dashboard.details
                    self.answer(200, several.pop(0) if len(several) > 1 else several[0])
                else:
                    self.answer(200, [])

            def do_PUT(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if len(data) > dashboard.limit:
                    self.answer(413, f"Maximum request body size {dashboard.limit} exceeded")
                    return
                dashboard.files = set(zipfile.ZipFile(io.BytesIO(data)).namelist())
                self.answer(200, "")

            def do_POST(self) -> None:
                job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if dashboard.refusals:
                    self.answer(500, dashboard.refusals.pop(0))
                    return
                dashboard.jobs.append(job)
                self.answer(200, {"job_id": "job", "submission_id": "job"})

        return Handler


@pytest.fixture
def dashboard() -> Iterator[RayDashboard]:
    """Answers while the test lasts."""
    made = RayDashboard()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()
        thread.join()


@pytest.fixture
def code(tmp_path: Path) -> JobWorkingDir:
    """A repository whose every kind of list ignores something."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name in (
        "trainer/run.py",
        "data/corpus.txt",
        "a [1]*/big",
        "kept 1/x",
        "tmp/scratch",
        ".venv/lib",
        "wandb/log",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(50_000))
    (tmp_path / ".gitignore").write_text("/data/\n")
    (tmp_path / ".git/info/exclude").write_text("/a \\[1]\\*/\n/tmp\n")
    (tmp_path / "pyproject.toml").touch()
    return JobWorkingDir(tmp_path, ("trainer",))


def code_or_line(dashboard: RayDashboard, code: JobWorkingDir) -> int | str:
    """The exit code of a command that is carried there, or what is said instead."""
    try:
        return ray_jobs.forward(dashboard.url, ["submit"], code, {}, lambda _: None)
    except UserError as error:
        return str(error)


def test_what_git_ignores_by_any_list_stays_at_home(dashboard: RayDashboard, code: JobWorkingDir) -> None:
    lines: list[str] = []
    assert ray_jobs.forward(dashboard.url, ["submit", "a b"], code, {"X": "1"}, lines.append) == 0
    travelled = {name for name in dashboard.files if not name.endswith("/")}
    assert travelled == {"trainer/run.py", "kept 1/x", ".gitignore", "pyproject.toml"}
    (job,) = dashboard.jobs
    assert job["entrypoint"] == "python -m orchestrator submit 'a b'"
    assert job["runtime_env"]["env_vars"] == {"X": "1"} and job["runtime_env"]["working_dir"].startswith(
        "gcs://"
    )
    assert "".join(lines) == "submitted\n", "and Ray's own lines are left out"


def test_code_that_is_too_large_is_named_with_its_largest_folders(
    dashboard: RayDashboard, code: JobWorkingDir
) -> None:
    dashboard.limit = 80_000
    with (code.folder / ".gitignore").open("a") as file:
        file.write("/large.log\n")
    for name, size in (
        ("large.log", 3_000_000),
        ("trainer/more", 30_000),
        ("weights.bin", 2_000_000),
        ("kept 1/y", 850_000),
    ):
        (code.folder / name).write_bytes(os.urandom(size))
    with pytest.raises(UserError) as told:
        ray_jobs.forward(dashboard.url, ["submit"], code, {}, print)
    assert f"{code.folder} holds 3 MB (weights.bin 2 MB, kept 1 1 MB, trainer 0 MB)" in str(told.value)
    assert ".gitignore" in str(told.value) and "answers" not in str(told.value)
    assert not dashboard.jobs


@pytest.mark.parametrize(("ended", "code_of_it"), [(3, 3), (None, 1)])
def test_a_command_that_fails_there_fails_here_with_its_code(
    dashboard: RayDashboard, code: JobWorkingDir, ended: int | None, code_of_it: int
) -> None:
    running, failed = JOB | {"status": JobStatus.RUNNING}, JOB | {"status": JobStatus.FAILED}
    dashboard.details = [running, failed | {"driver_exit_code": ended}]
    assert ray_jobs.forward(dashboard.url, ["submit"], code, {}, lambda _: None) == code_of_it


def test_a_dashboard_that_stops_answering_is_waited_for_and_then_said_in_one_line(
    dashboard: RayDashboard, code: JobWorkingDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(ray_jobs, "_SILENCE_SECONDS", 0.1)
    dashboard.silent_after_a_job = True
    with pytest.raises(UserError, match=r"stopped answering .*503.*may still run there: type `list`"):
        ray_jobs.forward(dashboard.url, ["submit"], code, {}, print)
    monkeypatch.setattr(ray_jobs, "_SILENCE_SECONDS", 60.0)
    dashboard.jobs.clear()
    threading.Timer(0.2, setattr, (dashboard, "silent_after_a_job", False)).start()
    assert code_or_line(dashboard, code) == 0


def test_a_cluster_that_comes_up_is_asked_again_for_half_a_minute(
    dashboard: RayDashboard, code: JobWorkingDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(ray_jobs, "time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    dashboard.refusals = ["No available agent to submit job, please try again later."] * 6
    assert code_or_line(dashboard, code) == 0 and len(dashboard.jobs) == 1
    assert waits == sorted(waits) and len(waits) == 6 and 20 < sum(waits) < 60
    dashboard.refusals = ["No available agent"] * 9
    assert "No available agent" in str(code_or_line(dashboard, code)) and len(dashboard.refusals) == 2
    waits.clear()
    dashboard.refusals = ["the entrypoint is wrong"]
    assert "the entrypoint is wrong" in str(code_or_line(dashboard, code)) and not waits


def test_no_dashboard_at_the_url_and_one_that_is_down(dashboard: RayDashboard, code: JobWorkingDir) -> None:
    dashboard.silent = True
    for url, why in (("http://127.0.0.1:9", "onnect"), (dashboard.url, "503")):
        with pytest.raises(UserError, match=rf"'{url}': no Ray dashboard answers there \(.*{why}"):
            ray_jobs.forward(url, ["list"], code, {}, print)


def test_a_disk_that_is_full_here_is_no_dashboard_that_is_silent(
    dashboard: RayDashboard, code: JobWorkingDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/package.zip")

    monkeypatch.setattr(ray_jobs.JobSubmissionClient, "submit_job", full)
    with pytest.raises((OSError, UserError)) as told:
        ray_jobs.forward(dashboard.url, ["list"], code, {}, print)
    assert isinstance(told.value, OSError), "the command's end names the disk"


@pytest.mark.parametrize("checkout", [True, False])
def test_code_outside_of_a_repository_travels_whole_and_installed_code_without_its_neighbours(
    dashboard: RayDashboard, tmp_path: Path, checkout: bool
) -> None:
    for name in ("trainer/run.py", "torch/run.py", "mine.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if checkout:
        (tmp_path / "pyproject.toml").touch()
    code = JobWorkingDir(tmp_path, ("trainer", "orchestrator"))
    assert ray_jobs.forward(dashboard.url, ["list"], code, {}, lambda _: None) == 0
    files = {name for name in dashboard.files if not name.endswith("/")}
    whole = {"trainer/run.py", "torch/run.py", "mine.py", "pyproject.toml"}
    assert files == (whole if checkout else {"trainer/run.py"})


def test_only_the_loopback_goes_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", lambda url, headers: asked.append(url))
    monkeypatch.setattr(
        ray_jobs.urllib.request, "urlopen", lambda *_, **__: SimpleNamespace(close=lambda: None)
    )
    for host in ("127.0.0.1", "localhost", "10.1.2.3"):
        monkeypatch.setenv("no_proxy", "example.org")
        ray_jobs._client(f"http://{host}:8265")
        assert (host in os.environ["no_proxy"].split(",")) is (host != "10.1.2.3")
        assert "example.org" in os.environ["no_proxy"]
