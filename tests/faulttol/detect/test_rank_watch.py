"""What is seen of a rank from outside: real processes that sleep, work, wait or are stopped."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.rank import RankFiles
from faulttol import exits, proc, steady_clock
from faulttol.detect import processes, rank_watch
from faulttol.detect.rank_watch import RankWatch
from faulttol.recorder import RankPhase, Recorder

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

_SLEEPS = "time.sleep(1e6)"
_WORKS = "while True: sum(range(1000))"
_PIPE = "sys.stdin.read()"
_LOCK = "import fcntl; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX)"
_THREADS = (
    "t = threading.Thread(target=lambda: fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX)); t.start(); t.join()"
)


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts Python processes that have reached a line, and ends them."""
    running: list[subprocess.Popen[bytes]] = []
    locked = tmp_path / "locked"
    with locked.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def begin(code: str) -> subprocess.Popen[bytes]:
            text = f"import fcntl, os, sys, threading, time\nprint('here', flush=True)\n{code}"
            command = [sys.executable, "-c", text, str(locked)]
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            running.append(child)
            assert child.stdout is not None and child.stdout.readline() == b"here\n"
            return child

        yield begin
        for child in running:
            for one in processes.tree(child.pid):
                os.kill(one.pid, signal.SIGKILL)
            child.communicate()


def _until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def _idle(pid: int) -> str:
    return processes.blocking_syscall(processes.tree(pid), frozenset())


@pytest.mark.parametrize(
    ("code", "call"),
    [
        (_SLEEPS, "clock_nanosleep"),
        (_PIPE, "read"),
        ("threading.Event().wait()", "futex"),
        ("import select; select.poll().poll()", "poll"),
        ("import select; select.select([sys.stdin], [], [])", "pselect6"),
        ("import select; select.epoll().poll()", "epoll_wait"),
        ("import signal; signal.pause()", "pause"),
        ("import signal; signal.sigwait([signal.SIGUSR1])", "rt_sigtimedwait"),
        ("import socket; socket.create_server(('127.0.0.1', 0)).accept()", "accept4"),
    ],
)
def test_a_process_that_waits_for_nothing_outside_is_idle(
    begun: Callable[[str], subprocess.Popen[bytes]], code: str, call: str
) -> None:
    child = begun(code)
    _until(lambda: _idle(child.pid) == call)


@pytest.mark.parametrize("code", [_LOCK, _THREADS], ids=["it", "a thread of it"])
def test_one_that_waits_for_a_file_is_not(begun: Callable[[str], subprocess.Popen[bytes]], code: str) -> None:
    child = begun(code)
    if code == _THREADS:
        _until(lambda: len(list(Path(f"/proc/{child.pid}/task").iterdir())) > 1)
    _until(lambda: proc.state(child.pid) == "S" and _idle(child.pid) == "")
    for _ in range(5):
        assert _idle(child.pid) == ""
        time.sleep(0.02)


def test_one_that_works_is_told_by_its_time(begun: Callable[[str], subprocess.Popen[bytes]]) -> None:
    child = begun(_WORKS)
    used = processes.tree(child.pid)[0].cpu_seconds
    _until(lambda: processes.tree(child.pid)[0].cpu_seconds > used + 0.1)
    _until(lambda: _idle(child.pid) == "running")


def test_a_child_counts_as_part_of_it(begun: Callable[[str], subprocess.Popen[bytes]]) -> None:
    child = begun(f"if os.fork(): time.sleep(1e6)\nelse:\n    {_LOCK}")
    _until(lambda: len(processes.tree(child.pid)) == 2)
    _until(lambda: processes.tree(child.pid)[1].state == "S" and _idle(child.pid) == "")
    inner = processes.tree(child.pid)[1]
    os.kill(inner.pid, signal.SIGSTOP)
    _until(lambda: [one.state for one in processes.tree(child.pid)] == ["S", "T"])
    os.kill(inner.pid, signal.SIGKILL)
    _until(lambda: [one.state for one in processes.tree(child.pid)] == ["S", "Z"])
    assert _idle(child.pid) == "clock_nanosleep", "a child that has ended holds nobody up"


def test_a_connection_elsewhere_may_bring_it_back(
    begun: Callable[[str], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        child = begun(f"import socket; socket.create_connection(('127.0.0.1', {port})).recv(1)")
        _until(lambda: _idle(child.pid) == "recvfrom")
        monkeypatch.setattr(processes, "_HERE", ("nowhere",))
        assert _idle(child.pid) == ""
        assert processes.blocking_syscall(processes.tree(child.pid), frozenset({"127.0.0.1"})) == "recvfrom"


def test_addresses_are_read_as_the_kernel_writes_them() -> None:
    assert processes._address("0100007F") == "127.0.0.1" and processes._address("0102000A") == "10.0.2.1"
    assert processes._address("0000000000000000FFFF00000102000A") == "10.0.2.1"
    assert processes._address("000080FE00000000FF02A8C0010000FE") == "fe80:0:0:0:c0a8:2ff:fe00:1"
    assert processes._address("00000000000000000000000001000000") == "0:0:0:0:0:0:0:1"


def test_children_are_found_where_the_kernel_keeps_no_list(
    begun: Callable[[str], subprocess.Popen[bytes]],
) -> None:
    child = begun(f"if os.fork(): time.sleep(1e6)\nelse: {_SLEEPS}")
    _until(lambda: len(processes.tree(child.pid)) == 2)
    assert processes._all_children(child.pid) == processes._children(child.pid) != []


def test_what_is_gone_is_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert processes.tree(child.pid) == [] and proc.state(child.pid) == "" and _idle(child.pid) == ""


def test_without_system_calls_nobody_is_idle(
    begun: Callable[[str], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = begun(_SLEEPS)
    _until(lambda: _idle(child.pid) not in ("", processes.RUNNING))
    monkeypatch.setattr(processes, "_SLEEPS", {})
    _until(lambda: _idle(child.pid) == "")


# ---- the watch ----


class _Seen:
    """A rank whose ring this process writes, and whose process is another one."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.files = RankFiles(folder, 3)
        self.ring = Recorder(self.files.ring, 3)
        self.watch = RankWatch(self.files, pid)


def test_a_stopped_rank_is_seen_at_once(
    tmp_path: Path, begun: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    child = begun(_SLEEPS)
    seen = _Seen(tmp_path, child.pid)
    seen.ring.begin(RankPhase.FORWARD, 7)
    first = seen.watch.observe()
    assert (
        first.newest is not None
        and first.newest.step == 7
        and abs(first.newest.time - steady_clock.now()) < 5
    )
    assert (first.rank, first.pid, first.held, first.held_since, first.asleep_since) == (
        3,
        child.pid,
        "",
        None,
        None,
    )
    assert seen.watch.observe() == first, "nothing has changed"
    child.send_signal(signal.SIGSTOP)
    _until(lambda: proc.state(child.pid) == "T")
    stopped = seen.watch.observe()
    assert stopped.state == "T" and stopped.held == "stopped (state T)"
    assert stopped.held_since is not None and abs(stopped.held_since - steady_clock.now()) < 5
    assert seen.watch.observe() == stopped
    child.send_signal(signal.SIGCONT)
    _until(lambda: proc.state(child.pid) == "S")
    assert seen.watch.observe().held_since is None


def test_a_silent_rank_is_looked_at_closely(
    tmp_path: Path, begun: Callable[[str], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_watch, "_SILENT", 0.0)
    child = begun(f"pid = os.fork()\nif pid == 0: time.sleep(1e6)\n{_SLEEPS}")
    seen = _Seen(tmp_path, child.pid)
    seen.ring.begin(RankPhase.FORWARD, 7)
    _until(lambda: seen.watch.observe().held)
    first = seen.watch.observe()
    assert (
        first.held == "asleep in clock_nanosleep"
        and first.held_since is None
        and first.asleep_since is not None
    )
    assert seen.watch.observe().asleep_since == first.asleep_since
    seen.ring.touch()
    assert seen.watch.observe().asleep_since is None
    _until(lambda: seen.watch.observe().asleep_since)
    again = seen.watch.observe().asleep_since
    assert again is not None and again > first.asleep_since
    writer = processes.tree(child.pid)[1].pid
    os.kill(writer, signal.SIGSTOP)
    _until(lambda: seen.watch.observe().held_since is not None)
    assert seen.watch.observe().held.startswith(f"held up: its process {writer} (")


def test_a_rank_that_works_is_not_asleep_between_two_looks(
    tmp_path: Path, begun: Callable[[str], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen asleep each time by chance: its CPU time tells."""
    monkeypatch.setattr(rank_watch, "_SILENT", 0.0)
    monkeypatch.setattr(processes, "blocking_syscall", lambda *_: "futex")
    child = begun(_WORKS)
    seen = _Seen(tmp_path, child.pid)
    for _ in range(3):
        seen.watch.observe()
        used = processes.tree(child.pid)[0].cpu_seconds
        _until(lambda: processes.tree(child.pid)[0].cpu_seconds > used + 0.3)  # noqa: B023  (called at once)
        assert seen.watch.observe().asleep_since is None


def test_a_rank_that_gets_no_processor_is_not_asleep(
    tmp_path: Path, begun: Callable[[str], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It uses no CPU time, and would."""
    monkeypatch.setattr(rank_watch, "_SILENT", 0.0)
    told = iter(["futex", "futex", "running", "futex", "running", "running", "futex", "futex"])
    monkeypatch.setattr(processes, "blocking_syscall", lambda *_: next(told))
    child = begun(_SLEEPS)
    seen = _Seen(tmp_path, child.pid)
    seen.ring.begin(RankPhase.FORWARD, 7)
    since = [seen.watch.observe().asleep_since for _ in range(8)]
    assert [one is not None for one in since] == [False, True, False, True, False, False, False, True]
    first, again, last = since[1], since[3], since[7]
    assert first is not None and last is not None and again == first < last, "once is not a work, twice is"


@pytest.mark.parametrize(
    ("phase", "asleep"), [(RankPhase.CHECKPOINT, False), (RankPhase.LOAD, False), (RankPhase.BACKWARD, True)]
)
def test_beside_an_object_store_only_computing_ranks_are_idle(
    tmp_path: Path,
    begun: Callable[[str], subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    phase: RankPhase,
    asleep: bool,
) -> None:
    monkeypatch.setattr(rank_watch, "_SILENT", 0.0)
    child = begun(_SLEEPS)
    _until(lambda: _idle(child.pid))
    seen = _Seen(tmp_path, child.pid)
    seen.ring.begin(phase, 7)
    tree = '{"time_ns": 1, "waits": "recv", "remote": true, "groups": [["g", ["range", 0, 4, 2], 7, 6]]}'
    seen.files.signs.write_text(tree)
    seen.watch.observe()
    if asleep:
        _until(lambda: seen.watch.observe().held)
    found = seen.watch.observe()
    assert (found.asleep_since is not None) is asleep and found.waits == "recv"
    assert found.groups[0].ranks == range(0, 4, 2) and (found.groups[0].entered, found.groups[0].left) == (
        7,
        6,
    )


def test_the_end_of_a_rank_carries_what_it_wrote(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    seen = _Seen(tmp_path, child.pid)
    exits.write(seen.files.raised, ValueError("mine"))
    ended = seen.watch.observe(1, 123.0, "words")
    assert (ended.exit_code, ended.exit_time, ended.last_words, ended.ended) == (1, 123.0, "words", True)
    assert ended.raised is not None and ended.raised.error == "ValueError: mine"
    shifted = ended.shifted(10.0)
    assert shifted.exit_time == 133.0 and shifted.raised is not None
    assert shifted.raised.time == pytest.approx(ended.raised.time + 10.0)


def test_a_rank_that_has_told_nothing_is_seen_all_the_same(tmp_path: Path) -> None:
    seen = RankWatch(RankFiles(tmp_path, 0), os.getpid()).observe()
    assert seen.newest is None and seen.raised is None and not seen.ended and seen.groups == ()
