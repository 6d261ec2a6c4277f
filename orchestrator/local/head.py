"""Ray's own processes on this machine, as a child of their supervisor."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from configs.paths import HomePaths
from configs.rank import are_free, free_port
from orchestrator.local.cluster import LocalCluster, boot_id, cluster_pids, kill_all, kill_tree
from orchestrator.local.lock import start_ticks
from orchestrator.local.settings import session_folder, socket_path_fits, token, token_file

_START_SECONDS = 120.0
_RAY_START = Path(__file__).parents[1] / "ray_head.py"


class RayHead:
    """Ray's own processes, as a child of the supervisor, started again at the same ports unless one was taken."""

    def __init__(self, home: HomePaths, slots: int, gpus: int) -> None:
        self._home, self._slots, self._gpus = home, slots, gpus
        self.temporary = session_folder()
        self._ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._token = token_file()

    def start(self) -> LocalCluster:
        """Start it; its record once it is up.

        Raises:
            RuntimeError: where it doesn't come up.
        """
        (self.temporary / "ray_current_cluster").unlink(missing_ok=True)
        port, dashboard, agent = self._ports = self._ports_now()
        command = [
            *(self._python(), "-P", str(_RAY_START), "start", "--head", "--block"),
            *(f"--num-cpus={self._slots}", f"--num-gpus={self._gpus}", f"--port={port}", f"--dashboard-port={dashboard}"),
            *("--dashboard-host=127.0.0.1", f"--temp-dir={self.temporary}", "--disable-usage-stats"),
            # Ray's default is one port for all Rays of a machine, and jobs of the second one would never start.
            *(f"--dashboard-agent-listen-port={agent}", "--log-color=false"),
        ]  # fmt: skip
        mode = os.environ.get("RAY_AUTH_MODE") or ("token" if token() else "disabled")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        # `python` of jobs that come by the dashboard is this interpreter.
        environment = os.environ | {"PATH": path, "RAY_AUTH_MODE": mode, "RAY_ADDRESS": ""}
        if not socket_path_fits(tempfile.gettempdir()):  # other sockets of Python's go there
            environment["TMPDIR"] = str(self.temporary)
        with self._home.ray_log.open("ab") as log:
            begins = log.tell()
            self._process = subprocess.Popen(
                command, env=environment, cwd=self.temporary, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while not (address := self._address()) or b"Ray runtime started" not in self._new_output(begins):
            if not self.alive or time.monotonic() > deadline:
                raise RuntimeError("Ray did not come up")
            time.sleep(0.1)
        url = f"http://127.0.0.1:{dashboard}"
        pid = os.getpid()
        return LocalCluster(
            address, url, pid, start_ticks(pid), boot_id(), socket.gethostname(), self._slots, self._gpus,
            str(self.temporary), self._token if mode == "token" else "",
        )  # fmt: skip

    def _ports_now(self) -> list[int]:
        """The ports of the last start where they are free, else others."""
        return self._ports if self._ports and are_free(self._ports) else [free_port() for _ in range(3)]

    @property
    def alive(self) -> bool:
        """`ray start` runs."""
        return self._process is not None and self._process.poll() is None

    def end(self) -> None:
        """End it and whatever of it is left; its folder goes too."""
        if self._process is not None:
            kill_tree(self._process.pid)
            self._process.wait()
        kill_all(cluster_pids(self._home), 0.0)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _python(self) -> str:
        """This interpreter by a path without spaces: Ray starts its workers through a shell that splits at them."""
        if not any(letter.isspace() for letter in sys.executable):
            return sys.executable
        link = self.temporary / "python"
        link.unlink(missing_ok=True)
        link.symlink_to(sys.prefix)
        return str(link / Path(sys.executable).relative_to(sys.prefix))

    def _address(self) -> str:
        try:
            return (self.temporary / "ray_current_cluster").read_text().strip()
        except FileNotFoundError:
            return ""

    def _new_output(self, begins: int) -> bytes:
        with self._home.ray_log.open("rb") as log:
            log.seek(begins)
            return log.read()
