"""Kill the controller of a real Ray at records of a run with a fault: `python -m tests.cluster.crashes [--kills 20]`.

One run of two ranks on a local Ray; each time that its log has grown by what the controller decided, the controller's
process gets SIGKILL, and Ray starts another. A rank is killed on the way. At the end the run must have succeeded with one
incident, each event once, and the losses of each step alike.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from configs.paths import HomePaths
from orchestrator.record.events import ControllerStarted
from orchestrator.record.states import State
from tests.cluster.conftest import Shell, alive, losses
from tests.orchestrator.crashpoints import once

RUN = ("experiment=smoke", "parallel.dp=2", "parallel.ep=2", "checkpoint.every=10")
LIMIT = 600.0


def play(shell: Shell, kills: int) -> tuple[int, str]:
    """How often the controller was killed, and what is wrong with how the run ended."""
    run_id = shell.submit(*RUN, f"train.steps={60 + 60 * kills}")
    deadline, killed, seen, struck = time.monotonic() + LIMIT, 0, 0, False
    while (state := shell.view(run_id).state) is None or not state.terminal:
        if time.monotonic() > deadline:
            return killed, f"it is {state} after {LIMIT:.0f} s"
        if not struck and killed >= kills // 2 and shell.view(run_id).pids:
            os.kill(shell.view(run_id).pids["1"], signal.SIGKILL)
            struck = True
        told = [e for e in shell.events(run_id) if not isinstance(e.payload, ControllerStarted)]
        pid = _controller(shell)
        if killed < kills and len(told) > seen and pid and alive(pid):
            os.kill(pid, signal.SIGKILL)
            killed += 1
            seen = len(told)
            shell.until(lambda old=pid: _controller(shell) not in (0, old), "another controller turns")
        time.sleep(0.02)
    return killed, _wrong(shell, run_id, struck)


def _controller(shell: Shell) -> int:
    try:
        return int(json.loads(shell.home.queue.read_text())["controller_pid"])
    except (FileNotFoundError, ValueError, KeyError):
        return 0


def _wrong(shell: Shell, run_id: str, struck: bool) -> str:
    view, events = shell.view(run_id), shell.events(run_id)
    twice = [key for key, count in Counter(map(once, events)).items() if key and count > 1]
    steps = losses(shell, run_id)  # raises where a step was trained twice with another loss
    causes = [incident.event.cause for incident in view.incidents]
    if view.state is not State.SUCCEEDED:
        return f"it is {view.state}"
    if twice or causes != ["rank_exit"] * struck or view.open_incidents:
        return f"events twice: {twice}; incidents: {causes}; open: {len(view.open_incidents)}"
    return "" if sorted(steps) == list(range(1, max(steps) + 1)) else "steps are missing"


def main(words: list[str]) -> int:
    """Exit code 1 where the run ends otherwise."""
    parser = argparse.ArgumentParser(description="kill the controller of a real Ray at records of a run")
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args(words).kills
    with tempfile.TemporaryDirectory(prefix="megaray-crashes-") as folder:
        shell = Shell(HomePaths(Path(folder) / "home"))
        shell.run("up", "--slots", "2")
        try:
            killed, wrong = play(shell, kills)
        finally:
            shell.run("down", "--yes")
    print(f"{killed} kills, {wrong or '0 wrong'}")
    return int(bool(wrong) or killed < kills)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
