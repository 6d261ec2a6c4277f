"""Stops that meet what they shouldn't: an end is reported all the same, and names what is wrong."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from configs.paths import RunPaths
from faulttol import proc
from orchestrator.agent import attempt as attempts
from orchestrator.agent import attempt_processes, devices
from orchestrator.agent.agent import NodeAgent
from orchestrator.agent.orders import AttemptOrder, AttemptPhase, AttemptReport
from orchestrator.control.gang import DesiredState
from tests.orchestrator.agent.local_runtime import until
from tests.orchestrator.agent.one_agent import SLEEP, alive, attend_until, order, started, text

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]
DEVICES = {"CUDA_VISIBLE_DEVICES": "0,GPU-bb"}
Tool = Callable[[str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Sets what `nvidia-smi` says of the memory of two devices."""
    program, level = tmp_path / "bin" / "nvidia-smi", tmp_path / "level"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho >> {tmp_path}/calls\nsed "s/^/0, GPU-aa, /" {level}\nsed "s/^/1, GPU-bb, /" {level}\n'
    )
    devices._newest.clear()
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return lambda text: level.write_bytes(text.encode("latin-1")) and None


@pytest.fixture
def hold(agent: NodeAgent, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Has a process look as one that runs no more and that the kernel hasn't taken everything back from."""
    held: set[int] = set()
    real = proc.runs
    # So it isn't killed either, and stays as it is.
    monkeypatch.setattr(proc, "runs", lambda pid: pid not in held and real(pid))
    yield held.add
    attempt_processes.send_signal(held, signal.SIGKILL)


def on_devices(agent: NodeAgent, run: RunPaths, attempt: int = 1, body: str = "pass") -> AttemptReport:
    """Start one rank that has both, of a program that is called as the trainer is."""
    begin = ready_on_devices(agent, run, attempt, body)
    code = run.root / "code"
    (code / "trainer").mkdir(parents=True, exist_ok=True)
    (code / "trainer" / "__init__.py").touch()
    (code / "trainer" / "__main__.py").write_text(f"{SLEEP} {body}; time.sleep(600)")
    assert begin.launch is not None
    begin = replace(begin, launch=replace(begin.launch, program=("-m", "trainer"), code=str(code)))
    answer = attend_until(agent, begin, lambda a: a.phase is AttemptPhase.RUNNING or bool(a.unfit))
    assert not answer.unfit
    return answer


def ready_on_devices(agent: NodeAgent, run: RunPaths, attempt: int, body: str = "pass") -> AttemptOrder:
    """The order that starts one rank of another program there."""
    base = order(run, body=body).launch
    assert base is not None
    launch = replace(base, devices=DEVICES, uses_devices=True)
    asked = order(run, launch=launch, attempt=attempt)
    answer = attend_until(agent, asked, lambda a: a.phase is AttemptPhase.READY)
    return replace(asked, launch=replace(launch, master=answer.master))


def test_device_memory_is_waited_for_and_what_stays_is_told(
    agent: NodeAgent, run: RunPaths, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "WAIT_SECONDS", 0.5)
    tool("100\n")
    on_devices(agent, run)
    tool("40000\n")
    stopping = attend_until(
        agent, order(run, DesiredState.STOPPED), lambda a: a.phase is AttemptPhase.STOPPED
    )
    assert "device 0 still holds 39.0 GiB" in stopping.unfit and "GPU-bb" in stopping.unfit


def test_the_tool_is_asked_once_between_two_attempts(
    agent: NodeAgent, run: RunPaths, tool: Tool, tmp_path: Path
) -> None:
    """It takes up to a second, in which nobody trains."""
    tool("100\n")
    on_devices(agent, run)
    attend_until(agent, order(run, DesiredState.STOPPED), lambda a: a.phase is AttemptPhase.STOPPED)
    on_devices(agent, run, attempt=2)
    assert (tmp_path / "calls").read_text() == "\n" * 2, "before the first, and for its end"


def ending_rank(agent: NodeAgent, run: RunPaths, hold: Callable[[int], None]) -> int:
    """One rank of an attempt on devices that runs no more and isn't gone."""
    pid = on_devices(agent, run).pids[0]
    hold(pid)
    attend_until(agent, order(run, DesiredState.STOPPED), lambda a: a.phase is AttemptPhase.ENDING)
    return pid


GATE = "print(os.environ.get('MEGARAY_GATE', 'none'), flush=True)"


def test_the_next_attempt_starts_while_the_kernel_takes_back_what_the_last_one_held(
    agent: NodeAgent, run: RunPaths, tool: Tool, tmp_path: Path, hold: Callable[[int], None]
) -> None:
    """A rank with tens of GB on a device has begun to end seconds before its memory is free."""
    tool("100\n")
    ending = on_devices(agent, run, body=GATE).pids[0]
    until(lambda: text(run, 0).split() == ["here", "none"], "that nothing is waited for at first")
    hold(ending)
    attend_until(agent, order(run, DesiredState.STOPPED), lambda a: a.phase is AttemptPhase.ENDING)
    tool("40000\n")
    on_devices(agent, run, attempt=2, body=GATE)
    until(lambda: len(text(run, 0, attempt=2).split()) == 2, "that it says what it waits for")
    gate = Path(text(run, 0, attempt=2).split()[1])
    assert gate.parent.is_dir() and not gate.exists() and alive(ending)
    assert agent.reconcile(order(run, DesiredState.STOPPED)).phase is AttemptPhase.ENDING, (
        "its slots aren't free yet"
    )
    os.kill(ending, signal.SIGKILL)
    until(gate.exists, "that the ranks may take the memory")
    last = attend_until(agent, order(run, DesiredState.STOPPED), lambda a: a.phase is AttemptPhase.STOPPED)
    assert not last.unfit, "what the next attempt holds isn't its own"
    assert (tmp_path / "calls").read_text() == "\n", "before the first, and no more"
    tool("100\n")
    last = attend_until(
        agent, order(run, DesiredState.STOPPED, attempt=2), lambda a: a.phase is AttemptPhase.STOPPED
    )
    assert not last.unfit, "it is compared with what was in use before the first"


def test_a_program_that_knows_of_no_gate_starts_once_the_last_one_is_gone(
    agent: NodeAgent, run: RunPaths, tool: Tool, hold: Callable[[int], None]
) -> None:
    tool("100\n")
    ending = ending_rank(agent, run, hold)
    begin = ready_on_devices(agent, run, attempt=2)
    agent.reconcile(begin)
    time.sleep(0.5)  # it would have started by then
    assert agent.reconcile(begin).phase is AttemptPhase.READY and not text(run, 0, attempt=2)
    os.kill(ending, signal.SIGKILL)
    attend_until(agent, begin, lambda a: a.phase is AttemptPhase.RUNNING)
    last = order(run, DesiredState.STOPPED, attempt=2)
    attend_until(agent, last, lambda a: a.phase is AttemptPhase.STOPPED)


def test_a_start_that_waits_for_the_last_one_can_be_stopped(
    agent: NodeAgent, run: RunPaths, tool: Tool, hold: Callable[[int], None]
) -> None:
    tool("100\n")
    ending_rank(agent, run, hold)
    agent.reconcile(ready_on_devices(agent, run, attempt=2))
    last = order(run, DesiredState.STOPPED, attempt=2)
    attend_until(agent, last, lambda a: a.phase is AttemptPhase.STOPPED)
    assert not text(run, 0, attempt=2)


def test_what_never_ends_is_the_fault_of_the_node_for_the_next_attempt_too(
    agent: NodeAgent, run: RunPaths, tool: Tool, monkeypatch: pytest.MonkeyPatch, hold: Callable[[int], None]
) -> None:
    tool("100\n")
    monkeypatch.setattr(attempt_processes, "KILL_SECONDS", 1.0)
    ending = ending_rank(agent, run, hold)
    on_devices(agent, run, attempt=2)
    following = attend_until(agent, order(run, DesiredState.WATCHED, attempt=2), lambda a: bool(a.unfit))
    assert following.unfit.startswith(f"processes that SIGKILL doesn't end: {ending} (")


def test_a_run_on_cores_waits_for_no_device(
    agent: NodeAgent, run: RunPaths, hold: Callable[[int], None]
) -> None:
    ending = started(agent, run).pids[0]
    hold(ending)
    attend_until(agent, order(run, DesiredState.STOPPED), lambda a: a.phase is AttemptPhase.ENDING)
    started(agent, run, body=GATE, attempt=2)
    until(lambda: text(run, 0, attempt=2).split() == ["here", "none"], "that it says so")


@pytest.mark.parametrize(
    "words",
    ["[N/A]", "[Unknown Error]", "[GPU requires reset]", "", "1, 2", "\xff", "7\nUnable to determine"],
)
def test_memory_that_the_tool_does_not_know_is_unknown_and_holds_nothing_up(tool: Tool, words: str) -> None:
    tool(f"{words}\n")
    usage = devices.memory_in_use(DEVICES)
    if words.startswith("7"):
        assert usage.used == {"0": 7 << 20, "GPU-bb": 7 << 20} and not usage.unknown
    else:
        assert usage.used == {} and usage.unknown == "nvidia-smi gives no memory in use of device 0, GPU-bb"
    assert devices.describe_excess(usage, {}) == ""


@pytest.mark.parametrize("texts", [("100", "[Unknown Error]"), ("[GPU requires reset]", "100")])
def test_a_device_with_a_fault_neither_bars_a_start_nor_holds_a_stop_up(
    agent: NodeAgent, run: RunPaths, tool: Tool, texts: tuple[str, str]
) -> None:
    tool(f"{texts[0]}\n")
    on_devices(agent, run)
    tool(f"{texts[1]}\n")
    attend_until(agent, order(run, DesiredState.STOPPED), lambda a: a.phase is AttemptPhase.STOPPED)


@pytest.mark.parametrize("step", ["_end_ranks", "_remaining_pids", "_close_activity", "_await_devices"])
def test_a_stop_ends_whatever_fails_in_it_and_says_what_did(
    agent: NodeAgent, run: RunPaths, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    pid = started(agent, run).pids[0]

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(attempts.Attempt, step, fail)
    stopped = attend_until(
        agent, order(run, DesiredState.RELEASED), lambda a: a.phase is AttemptPhase.STOPPED
    )
    assert stopped.unfit == "the ranks' end isn't certain: OSError: [Errno 24] Too many open files"
    if step != "_remaining_pids":  # a rank's end is known a moment before it is taken leave of
        until(lambda: proc.state(pid) == "", "that it is gone")
    assert (proc.state(pid) == "") is (step != "_remaining_pids"), "the other steps were taken"
    attempt_processes.send_signal([pid], signal.SIGKILL)


def test_a_rank_is_known_by_its_id_until_its_end_alone(
    agent: NodeAgent, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[Mapping[int, float]] = []
    real = attempt_processes.attempt_pids

    def look(mark: str, leaders: Mapping[int, float]) -> list[int]:
        ends.append(leaders)
        return real(mark, leaders)

    monkeypatch.setattr(attempt_processes, "attempt_pids", look)
    pid = started(agent, run).pids[0]
    os.kill(pid, signal.SIGKILL)
    answer = attend_until(
        agent, order(run, DesiredState.WATCHED), lambda a: any(one.exit_code == -9 for one in a.report.ranks)
    )
    attend_until(agent, order(run, DesiredState.STOPPED), lambda a: a.phase is AttemptPhase.STOPPED)
    ended = next(one.exit_time for one in answer.report.ranks)
    assert ends and all(one == {pid: ended} for one in ends)


def test_a_look_at_the_node_that_breaks_bars_nothing(run: RunPaths) -> None:
    def check() -> str:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    agent = NodeAgent("node-of-tests", check=check)
    attend_until(agent, order(run), lambda a: a.phase is AttemptPhase.READY)
    agent.close()
