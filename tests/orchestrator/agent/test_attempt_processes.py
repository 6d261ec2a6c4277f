"""Which processes are an attempt's, and which ended children are nobody's."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from faulttol import proc, steady_clock
from faulttol.detect import processes
from orchestrator.agent import attempt_processes
from tests.orchestrator.agent.local_runtime import until

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]
NAMELESS = (
    "import ctypes, time; ctypes.CDLL(None).prctl(15, b'pr\\xc3\\xa9paration-a\\xc3'); "
    "print('here', flush=True); time.sleep(600)"
)
Begin = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Starts processes in sessions of their own, and ends them."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE))
        return running[-1]

    yield start
    for one in running:
        one.kill()
        one.communicate()


def test_an_id_that_another_process_was_given_is_not_a_ranks_any_more(begin: Begin) -> None:
    before = steady_clock.now() - 1.0
    child = begin("sleep", "600")
    assert attempt_processes.attempt_pids("of no process", {child.pid: math.inf}) == [child.pid]
    assert attempt_processes.attempt_pids("of no process", {child.pid: before}) == []


def test_what_an_ended_rank_has_left_in_its_session_is_its(begin: Begin) -> None:
    rank = begin("sh", "-c", "env -i sleep 600 >/dev/null & echo $!")
    assert rank.stdout is not None
    orphan = int(rank.stdout.readline())
    rank.wait()
    assert attempt_processes.attempt_pids("of no process", {rank.pid: steady_clock.now()}) == [orphan]
    attempt_processes.send_signal([orphan], signal.SIGKILL)


def test_a_process_whose_name_is_cut_within_a_letter_is_seen(begin: Begin) -> None:
    child = begin(sys.executable, "-c", NAMELESS)
    assert child.stdout is not None and child.stdout.readline() == b"here\n"
    assert attempt_processes.attempt_pids("of no process", {child.pid: math.inf}) == [child.pid]
    assert [one.name for one in processes.tree(child.pid)] == ["préparation-a\N{REPLACEMENT CHARACTER}"]
    until(lambda: proc.state(child.pid) == "S", "it sleeps")
    assert child.pid in processes._all_children(os.getpid())


def test_any_mark_can_be_read(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARAY_MARK", "\udcff")
    child = begin("sleep", "600")
    until(lambda: "\N{REPLACEMENT CHARACTER}" in attempt_processes.live_marks(), "its environment")
    assert child.poll() is None


def test_orphans_alone_are_reaped_and_after_a_second_look(begin: Begin) -> None:
    child = begin("false")
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    first = {row for row in attempt_processes.reap_orphans((), ()) if row.pid == child.pid}
    assert len(first) == 1, "it is left to whoever has started it"
    assert first <= attempt_processes.reap_orphans({child.pid}, first), "a watcher is left its own"
    attempt_processes.reap_orphans((), first)
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, os.WNOHANG)
    assert first.isdisjoint(attempt_processes.reap_orphans((), first))
