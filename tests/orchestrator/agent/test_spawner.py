"""Ends of processes: told the moment they begin, once each, and by what the kernel says of them."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import pytest

from faulttol import proc
from orchestrator.agent import spawner as spawner_module
from orchestrator.agent.spawner import ProcessExit, Spawner
from tests.orchestrator.agent.local_runtime import until

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    ("code", "number", "told"),
    [("import sys; sys.exit(3)", 0, 3), ("input()", signal.SIGKILL, -9), ("import os; os.abort()", 0, -6), ("pass", 0, 0)],
)  # fmt: skip
def test_the_kernel_says_how_a_process_that_nobody_has_waited_for_ends(
    code: str, number: int, told: int
) -> None:
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        if number:
            assert proc.pending_exit_code(process.pid) == 0, "it lives"
            process.send_signal(number)
        until(lambda: proc.state(process.pid) == "Z", "its end")
        assert proc.pending_exit_code(process.pid) == told
    assert proc.pending_exit_code(process.pid) == 0, "it is gone"


def test_a_process_that_a_debugger_holds_is_not_ending() -> None:
    """The kernel keeps the signal that holds it in the place of its exit code."""
    libc, attach, detach = ctypes.CDLL(None, use_errno=True), 16, 17
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            if libc.ptrace(attach, process.pid, None, None):
                pytest.skip(f"no process may be traced here: {os.strerror(ctypes.get_errno())}")
            os.waitpid(process.pid, os.WUNTRACED)
            assert proc.state(process.pid) == "t" and proc.pending_exit_code(process.pid) == 0
            assert proc.runs(process.pid), "a process that a debugger holds may run on"
            libc.ptrace(detach, process.pid, None, None)
        finally:
            process.kill()  # `Popen` would wait for its end


class LatePoll:
    """The kernel's word, which comes when the process has given up all that it held."""

    def __init__(self) -> None:
        self._real = select.epoll()
        self.register, self.unregister = self._real.register, self._real.unregister
        self.open = False

    def poll(self, seconds: float) -> list[tuple[int, int]]:
        if not self.open:
            time.sleep(min(seconds, 0.05))
        return self._real.poll(seconds) if self.open else []


def test_a_failure_is_told_while_the_process_still_gives_up_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late, told = LatePoll(), list[ProcessExit]()
    monkeypatch.setattr(spawner_module.select, "epoll", lambda: late)
    spawner = Spawner()
    process = spawner.start(["sleep", "600"], dict(os.environ), lambda _, end: told.append(end)).result()
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: told, "its end")
    assert told[0].code == -9 and spawner.pids() == {process.pid} and process.returncode is None
    assert not spawner.set_exit_callback(process.pid, lambda *_: None), "nobody would be told any more"
    late.open = True
    until(lambda: not spawner.pids(), "that it is taken leave of")
    assert len(told) == 1 and process.returncode == -9
