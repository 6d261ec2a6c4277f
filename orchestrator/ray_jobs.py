"""A Ray cluster that only its dashboard's URL is known of: a command is carried there with the code, and followed."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.job_submission import JobStatus, JobSubmissionClient

from configs.errors import DISK_ERRORS, UserError
from orchestrator.local import settings
from orchestrator.ray_cluster import PROBE_SECONDS, WANTS_TOKEN

_EXCLUDED = [".git", ".venv", "**/__pycache__", "wandb", "outputs", ".*_cache"]
_TOO_LARGE = ("status code 413", "exceeds the maximum size")
"""What Ray's dashboard, and before it Ray's client, say of a folder that is more than they take."""
_LARGEST = 3
"""Entries of the folder that are named where it is too large."""
_CHATTER = (" -- Runtime env is setting up.", "Running entrypoint for job ")
"""What Ray itself puts into a job's log."""
_POLL_SECONDS = 0.5
_SILENCE_SECONDS = 30.0
"""That a dashboard may stop answering for while a command is followed."""


@dataclass(frozen=True)
class JobWorkingDir:
    """A folder that becomes Ray's working directory on a cluster, without what git ignores there."""

    folder: Path
    packages: Sequence[str]
    """All that travels where they were installed among others' packages."""

    def excluded(self) -> list[str]:
        """Patterns of what stays here, as of a `.gitignore`."""
        return [*_EXCLUDED, *(f"/{_literal(path)}" for path in self._ignored_paths())]

    def _ignored_paths(self) -> list[str]:
        """Paths below the folder that stay here: of a checkout those that git ignores, by whatever file says so.

        Ray itself leaves out what `.gitignore` names, and knows nothing of `.git/info/exclude` or the user's own list.
        """
        if not (self.folder / "pyproject.toml").exists():
            return [path.name for path in self.folder.iterdir() if path.name not in self.packages]
        if not (self.folder / ".git").exists():
            return []
        ask = ["git", "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"]
        try:
            done = subprocess.run(
                ask, cwd=self.folder, capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return []
        return [path for path in done.stdout.split("\0") if path] if done.returncode == 0 else []

    def too_large(self) -> str:
        """What is large in it, and what to do about it."""
        out = {self.folder / path.rstrip("/") for path in self._ignored_paths()}
        sizes: Counter[str] = Counter()
        for folder, folders, names in os.walk(self.folder):
            here = Path(folder)
            folders[:] = [n for n in folders if here / n not in out and not _is_excluded(n)]
            for name in names:
                path = here / name
                if path not in out and not _is_excluded(name) and path.is_file():
                    sizes[path.relative_to(self.folder).parts[0]] += path.stat().st_size
        largest = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.most_common(_LARGEST))
        return (
            f"the code is more than that dashboard takes: {self.folder} holds {sizes.total() / 1e6:.0f} MB ({largest}); "
            "move data out of that folder, or name it in .gitignore"
        )


def forward(
    url: str,
    arguments: Sequence[str],
    code: JobWorkingDir,
    variables: dict[str, str],
    write: Callable[[str], object],
) -> int:
    """Run the same command on the head of a cluster that only its dashboard URL is known of.

    The code travels, and `variables` with it. What the command prints goes to `write`, and its exit code is returned.
    Ctrl-C leaves the command running.

    Raises:
        UserError: where nobody answers at the URL, the code is too large for it, or it stops answering.
    """
    for name in ("ray._private", "ray.dashboard", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    entrypoint = " ".join(["python", "-m", "orchestrator", *map(shlex.quote, arguments)])
    environment = {"working_dir": str(code.folder), "excludes": code.excluded(), "env_vars": variables}
    try:
        client = _client(url)
        job = _submit_job(client, entrypoint, environment)
    except (OSError, RuntimeError, ValueError) as error:
        # What `requests` raises is an OSError; so is a full disk of this machine's, where the code is packed.
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        first = str(error).strip().splitlines()[0]
        if any(mark in first for mark in _TOO_LARGE):
            raise UserError(f"--address '{url}': {code.too_large()}") from None
        raise UserError(f"--address '{url}': no Ray dashboard answers there ({first})") from None
    return _followed(client, job, url, write)


def _followed(client: JobSubmissionClient, job: str, url: str, write: Callable[[str], object]) -> int:
    """The exit code of a command on a cluster; what it prints is written meanwhile."""
    shown, answered = 0, time.monotonic()
    while True:
        try:
            info = client.get_job_info(job)
            text = client.get_job_logs(job)
        except (OSError, RuntimeError) as error:
            if time.monotonic() - answered < _SILENCE_SECONDS:
                time.sleep(_POLL_SECONDS)
                continue
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"--address '{url}': the dashboard stopped answering ({first}); the command may still run there: type "
                "`list` with this --address once it answers again"
            ) from None
        answered = time.monotonic()
        # Whole lines only, but for the last text of a job that has ended.
        end = len(text) if info.status.is_terminal() else text.rfind("\n") + 1
        fresh = text[shown:end].splitlines(keepends=True)
        write("".join(line for line in fresh if not any(mark in line for mark in _CHATTER)))
        shown = max(shown, end)
        if info.status.is_terminal():
            return 0 if info.status is JobStatus.SUCCEEDED else info.driver_exit_code or 1
        time.sleep(_POLL_SECONDS)


def _literal(path: str) -> str:
    """A path as a pattern of git's that means this path alone."""
    return re.sub(r"([\\*?\[\] ])", r"\\\1", path)


def _is_excluded(name: str) -> bool:
    return any(fnmatch(name, pattern.removeprefix("**/")) for pattern in _EXCLUDED)


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


def _client(url: str) -> JobSubmissionClient:
    """A client of a dashboard, past any proxy where it is this machine's own, and with a token where it wants one."""
    host = urlsplit(url).hostname or ""
    if _is_loopback(host):
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))
    headers: dict[str, Any] = {}
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/api/jobs/", timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            if not (token := settings.token("")):
                raise UserError(
                    f"--address '{url}': this Ray needs a token, and none is set here; {WANTS_TOKEN}"
                ) from None
            headers = {"Authorization": f"Bearer {token}"}
    except (OSError, ValueError):
        pass  # the client says it
    return JobSubmissionClient(url, headers=headers)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
