"""The supervisor of a cluster's controller: a small process that brings back what Ray itself can't.

Ray restarts a controller whose process dies, but a Ray whose head was lost forgets it. So one process outside of Ray looks
at the beat that the controller publishes, and has it started where it doesn't beat. For the local Ray it keeps Ray too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import USER_ERROR_EXIT, from_json
from configs.paths import HomePaths
from orchestrator.decide import backoff
from orchestrator.local.cluster import LocalCluster, write_record
from orchestrator.local.head import RayHead

_CODE = Path(__file__).parents[2]
_TURN_SECONDS = 0.5
_PAGE_WAIT = 30.0
"""Longest between two starts of a dashboard that dies."""
_ANY_PORT = ("--port", "0")
_SILENT_SECONDS = 10.0
"""Without a beat before the controller is looked for; it beats every 5 s at least."""
_ATTACH_SECONDS = 150.0
_LONGEST_WAIT = 15.0
"""Between two looks for a controller that doesn't come."""
_HEAD_WAIT = 60.0
"""Longest between two starts of a Ray that dies."""
_HEAD_STARTS = 8
"""Starts in a row that fail, or die within a minute, before Ray is given up."""


@dataclass
class RestartPolicy:
    """Decides when to start a controller, from its heartbeats and the time. Pure."""

    beat: Any = None
    since: float | None = None
    """When `beat` was first seen."""
    tried: int = 0
    """Starts since it beat last."""
    next_try: float = 0.0

    def due(self, beat: Any, now: float) -> bool:
        """Whether to start a controller now.

        Args:
            beat: what the controller published last; anything that changes as it turns.
            now: seconds, monotonic.
        """
        if self.since is None or beat != self.beat:
            self.beat, self.since, self.tried, self.next_try = beat, now, 0, now + _SILENT_SECONDS
            return False
        if now < self.next_try:
            return False
        self.tried += 1
        self.next_try = now + backoff.exponential_backoff(1.0, self.tried, _LONGEST_WAIT)
        return True


class ControllerSupervisor:
    """Watches a home's controller at an address, and has it started by a child that loads Ray.

    Args:
        home: of the runs.
        address: HOST:PORT of the cluster.
        tell: takes a line for the log.
        lost: the controller is known to be gone, and isn't waited for.
    """

    def __init__(
        self, home: HomePaths, address: str, tell: Callable[[str], object], lost: bool = False
    ) -> None:
        self._home, self._address, self._tell = home, address, tell
        self._watch = RestartPolicy(self._beat(), 0.0) if lost else RestartPolicy()
        self._child: subprocess.Popen[bytes] | None = None
        self._began = 0.0

    def turn(self, now: float) -> None:
        """Look once; starts what is missing and never waits."""
        if self._child is not None:
            code = self._child.poll()
            if code is None and now - self._began > _ATTACH_SECONDS:
                self._child.kill()
            if code is not None:
                self._tell(
                    f"the controller {'is up' if code == 0 else 'could not be reached'} at {self._address}"
                )
                self._child = None
        elif self._watch.due(self._beat(), now):
            self._tell(f"the controller at {self._address} doesn't beat; starting it")
            command = [sys.executable, "-m", "orchestrator.ray_attach", str(self._home.home), self._address]
            self._child = subprocess.Popen(
                command, cwd=_CODE, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            self._began = now

    def _beat(self) -> Any:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            view = from_json(self._home.queue.read_text())
            return view.get("epoch"), view.get("controller_pid"), view.get("beat")
        return None

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()


def serve(home: HomePaths, address: str, tell: Callable[[str], object]) -> None:
    """Keep the controller of a cluster that somebody else keeps up, until SIGTERM or SIGINT."""
    supervisor = ControllerSupervisor(home, address, tell)
    with _until_terminated(), contextlib.closing(supervisor):
        while True:
            supervisor.turn(time.monotonic())
            time.sleep(_TURN_SECONDS)


class DashboardProcess:
    """The dashboard beside a local Ray, as a child that is started again; one that can't serve at all is left.

    Where its usual port is in use, say by the dashboard of another home on this machine, it takes any free one.

    Args:
        home: that it serves.
        log: where its complaints go.
    """

    def __init__(self, home: HomePaths, log: Path) -> None:
        self._home, self._log = home, log
        self._child: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._next_start = float("-inf")
        self._left = os.environ.get("MEGARAY_DASHBOARD") == "0"
        self._words: tuple[str, ...] = ()

    def turn(self, now: float) -> None:
        """Look once; `now` in seconds, monotonic."""
        if self._left or (self._child is not None and self._child.poll() is None) or now < self._next_start:
            return
        if self._child is not None and self._child.returncode == USER_ERROR_EXIT:
            if self._words == _ANY_PORT:
                self._left = True
                return
            self._words = _ANY_PORT
        environment = os.environ | {"MEGARAY_HOME": str(self._home.home)}
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", "dashboard", *self._words], env=environment, cwd=_CODE,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,  # what it prints has its token in it
            )  # fmt: skip
        self._starts += 1
        self._next_start = now + backoff.exponential_backoff(2.0, self._starts, _PAGE_WAIT)

    def close(self) -> None:
        """End it."""
        if self._child is not None:
            self._child.terminate()
            try:
                self._child.wait(timeout=2.0)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()


class _Terminated(Exception):
    """SIGTERM has come."""


@contextlib.contextmanager
def _until_terminated() -> Iterator[None]:
    """SIGTERM ends the block, as its normal end would."""

    def told(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, told)
    try:
        yield
    except _Terminated:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def supervise_local(home: HomePaths, slots: int, gpus: int, ready: Callable[[LocalCluster], object]) -> int:
    """Start a local Ray and keep it, and its controller, until SIGTERM.

    Args:
        home: of the runs.
        slots: ranks on processors that may run at once.
        gpus: that Ray gets.
        ready: is given the record, once Ray is up.

    Returns:
        0 after SIGTERM, 1 where Ray doesn't come up or dies again and again.
    """
    head = RayHead(home, slots, gpus)
    try:
        with _until_terminated():
            record = head.start()
            write_record(home, record)
            ready(record)
            with contextlib.closing(DashboardProcess(home, home.ray_log)) as page:
                _supervise(home, head, record, page)
            return 1
        return 0
    except RuntimeError as error:
        _tell(str(error))
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        head.end()
        home.cluster.unlink(missing_ok=True)


def _supervise(home: HomePaths, head: RayHead, record: LocalCluster, page: DashboardProcess) -> None:
    """Until Ray is given up."""
    began, failed = time.monotonic(), 0
    while failed < _HEAD_STARTS:
        with contextlib.closing(
            ControllerSupervisor(home, record.address, _tell, lost=failed > 0)
        ) as supervisor:
            while head.alive:
                supervisor.turn(time.monotonic())
                page.turn(time.monotonic())
                time.sleep(_TURN_SECONDS)
        failed = failed + 1 if time.monotonic() - began < _HEAD_WAIT else 1
        _tell(f"Ray has ended; starting it again ({failed} of {_HEAD_STARTS} in a row)")
        time.sleep(backoff.exponential_backoff(1.0, failed, _HEAD_WAIT))
        began = time.monotonic()
        with contextlib.suppress(RuntimeError):
            record = head.start()
            write_record(home, record)
    _tell("Ray ends again and again and is given up")


def _tell(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervisor: {text}\n")
    sys.stderr.flush()


def main(arguments: list[str]) -> int:
    """`local HOME SLOTS GPUS`, as `start_cluster` starts it; writes the record as a line once Ray is up."""
    _, home, slots, gpus = arguments

    def ready(record: LocalCluster) -> None:
        # Whoever typed the command may be gone; Ray stays, and `down` knows it.
        with contextlib.suppress(OSError):
            sys.stdout.write(json.dumps(asdict(record)) + "\n")
            sys.stdout.close()

    return supervise_local(HomePaths(Path(home)), int(slots), int(gpus), ready)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
