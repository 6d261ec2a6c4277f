"""Interpreters that wait with a rank's program imported: taken, found as ranks, bounded, and off where they must be."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from configs.paths import RunPaths
from orchestrator.agent import attempt_processes, standby
from orchestrator.agent.agent import NodeAgent
from orchestrator.agent.orders import LaunchSpec, attempt_mark
from orchestrator.agent.spawner import ExitCallback, ProcessExit, Spawner
from orchestrator.agent.standby_pool import StandbyPool
from tests.orchestrator.agent.local_runtime import until

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]
ROOT = Path(__file__).resolve().parents[3]
RUN = f"/home/of/runs/a-run-{os.getpid()}"
AGENT = """
import json, os, sys, time
from orchestrator.agent.orders import LaunchSpec
from orchestrator.agent.spawner import Spawner
from orchestrator.agent.standby_pool import StandbyPool
launch, env, importing = json.loads(sys.argv[1])
launch |= {name: tuple(launch[name]) for name in ("ranks", "addresses", "program")}
standbys = StandbyPool(Spawner())
standbys.prewarm("a-run", LaunchSpec(**launch), env | {"MEGARAY_PARENT": str(os.getpid())})
while not (os.path.exists(importing) if importing else standbys.ready):
    time.sleep(0.01)
print(standbys._waiting[0].process.pid, flush=True)
time.sleep(600)
"""
"""An agent that is killed once its interpreter is ready, or once it has made the file `importing`."""


@pytest.fixture
def launch(tmp_path: Path) -> LaunchSpec:
    """A program by the name of the trainer, which says what it finds and waits."""
    package = tmp_path / "code" / "trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "loop.py").write_text("import os, time\nSEEN = dict(os.environ)\n")
    (package / "__main__.py").write_text(
        "import json, os, sys, time\n"
        "warm = 'trainer.loop' in sys.modules\n"
        "print(json.dumps([warm, sys.argv[1:], dict(os.environ), sys.path, sorted(sys.modules)]), flush=True)\n"
        "rank = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    while os.getppid() == rank:\n"  # also where this test is killed, so that nobody ends it by its mark
        "        time.sleep(0.1)\n"
        "    os._exit(0)\n"
        "time.sleep(600)\n"
    )
    program = ("-m", "trainer", "run", "a word")
    return LaunchSpec(2, (0, 1), "127.0.0.1", ("127.0.0.1",), program, str(tmp_path / "code"))


@pytest.fixture
def env(launch: LaunchSpec) -> dict[str, str]:
    path = os.pathsep.join([launch.code, *(p for p in sys.path if p)])
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return kept | {"PYTHONPATH": path, "MEGARAY_PARENT": str(os.getpid()), "FLAG": "1", "PYTHONSAFEPATH": "1"}


@pytest.fixture
def idle(env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Of a node without a gang; what stands for torch takes no time to import."""
    for name in standby.LIBRARIES:
        if name.startswith("torch"):
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                package = tmp_path.joinpath("libraries", *parts[:depth])
                package.mkdir(parents=True, exist_ok=True)
                (package / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path / "libraries"), *(p for p in sys.path if p)])
    return env | {"PYTHONPATH": path, "LOCAL_WORLD_SIZE": "8"}


@pytest.fixture
def spawner() -> Spawner:
    return Spawner()


@pytest.fixture
def standbys(spawner: Spawner) -> Iterator[StandbyPool]:
    made = StandbyPool(spawner)
    yield made
    made.close()
    attempt_processes.send_signal(
        attempt_processes.attempt_pids(attempt_mark(RUN, 3, "node"), {}), signal.SIGKILL
    )


def take(
    standbys: StandbyPool, launch: LaunchSpec, env: dict[str, str], log: Path, **own: str
) -> tuple[int, Future[ProcessExit]]:
    ended: Future[ProcessExit] = Future()
    with log.open("wb") as out:
        process = standbys.acquire(
            launch,
            env,
            {"MEGARAY_MARK": attempt_mark(RUN, 3, "node"), **own},
            out.fileno(),
            lambda _, how: ended.set_result(how),
        )
    return (process.pid if process else 0), ended


def test_one_becomes_a_rank_that_anybody_can_find_and_that_is_watched(
    standbys: StandbyPool, launch: LaunchSpec, env: dict[str, str], tmp_path: Path
) -> None:
    standbys.prewarm(RUN, launch, env)
    until(lambda: standbys.ready == 2, "two for two ranks")
    pid, ended = take(standbys, launch, env, tmp_path / "log", RANK="1")
    standbys.pause(RUN)
    assert pid
    until(lambda: (tmp_path / "log").read_text(), "its first words")
    warm, words, seen, *_ = json.loads((tmp_path / "log").read_text())
    assert warm and words == ["run", "a word"], "it has imported before, and is called as typed"
    assert (
        seen["RANK"] == "1" and seen["FLAG"] == "1" and seen["MEGARAY_MARK"] == attempt_mark(RUN, 3, "node")
    )
    assert os.getsid(pid) == pid
    until(
        lambda: len(attempt_processes.attempt_pids(attempt_mark(RUN, 3, "node"), {})) == 2,
        "it and its child, by the mark alone",
    )
    assert (
        attempt_processes.attempt_pids(attempt_mark(RUN, 4, "node"), {})
        == []
        == attempt_processes.attempt_pids(attempt_mark(RUN, 3, "another"), {})
    )
    until(lambda: standbys.ready == 0, "no other stays while ranks start")
    for one in attempt_processes.attempt_pids(attempt_mark(RUN, 3, "node"), {}):
        os.kill(one, 9)
    assert ended.result(30).code == -9


def test_one_is_taken_only_for_the_same_program_code_and_environment(
    standbys: StandbyPool, launch: LaunchSpec, env: dict[str, str], tmp_path: Path
) -> None:
    standbys.prewarm(RUN, launch, env)
    until(lambda: standbys.ready == 2, "standbys")
    for other, under in (
        (replace(launch, code="/elsewhere"), env),
        (replace(launch, program=("-m", "faulttol", "run")), env),
        (launch, env | {"FLAG": "2"}),
        (launch, env | {"OMP_NUM_THREADS": "7"}),
        (launch, env | {"CUDA_VISIBLE_DEVICES": "3"}),  # the driver has read it
    ):
        assert not take(standbys, other, under, tmp_path / "log")[0]
    assert take(standbys, launch, env, tmp_path / "log")[0]


def test_one_that_still_imports_is_taken_and_gets_the_processor(
    standbys: StandbyPool, launch: LaunchSpec, env: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    loop = Path(launch.code) / "trainer" / "loop.py"
    loop.write_text(f"import os, time\nwhile not os.path.exists({str(go)!r}):\n    time.sleep(0.01)\n")
    standbys.prewarm(RUN, launch, env)
    until(lambda: standbys._waiting, "one that imports")
    group = Path(f"/proc/{standbys._waiting[0].process.pid}/autogroup")
    if group.exists():
        until(lambda: group.read_text().endswith("nice 5\n"), "that it yields")
    pid, _ = take(standbys, launch, env, tmp_path / "log")
    assert pid and standbys.ready == 0
    if group.exists():
        until(lambda: group.read_text().endswith("nice 0\n"), "that it yields no more")
    go.touch()
    until(lambda: (tmp_path / "log").read_text(), "its first words")


def test_one_that_is_taken_before_anybody_has_read_that_it_is_ready_becomes_a_rank(
    standbys: StandbyPool,
    launch: LaunchSpec,
    env: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is left unread in a socket that closes is an error on its other end, which must not end a rank in silence."""
    monkeypatch.setattr("orchestrator.agent.standby_pool._has_imported", lambda line: False)
    standbys.prewarm(RUN, launch, env)
    until(lambda: standbys._waiting, "one that imports")
    (one,) = standbys._waiting

    def told() -> bool:
        try:
            return one.channel.recv(1, socket.MSG_PEEK) == standby.READY
        except BlockingIOError:
            return False

    until(told, "that it is ready")
    pid, ended = take(standbys, launch, env, tmp_path / "log")
    until(lambda: (tmp_path / "log").read_text() or ended.done(), "its first words")
    assert pid and not ended.done()


def test_one_whose_imports_fail_after_it_was_taken_says_why_in_the_log_of_its_rank(
    standbys: StandbyPool, launch: LaunchSpec, env: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    package = Path(launch.code) / "trainer"
    (package / "loop.py").write_text(
        f"import os, time\nwhile not os.path.exists({str(go)!r}):\n    time.sleep(0.01)\nraise RuntimeError('no driver')\n"
    )
    (package / "__main__.py").write_text("import trainer.loop\n")
    standbys.prewarm(RUN, launch, env)
    until(lambda: standbys._waiting, "one that imports")
    pid, ended = take(standbys, launch, env, tmp_path / "log")
    go.touch()
    assert pid and ended.result(30).code == 1
    assert "RuntimeError: no driver" in (tmp_path / "log").read_text()


def test_one_that_has_died_is_passed_over_and_replaced(
    standbys: StandbyPool, launch: LaunchSpec, env: dict[str, str], tmp_path: Path
) -> None:
    standbys.prewarm(RUN, launch, env)
    until(lambda: standbys.ready == 2, "standbys")
    dead = [one.process.pid for one in standbys._waiting]
    for pid in dead:
        os.kill(pid, 9)
    until(
        lambda: standbys.ready == 2 and not {one.process.pid for one in standbys._waiting} & set(dead),
        "new ones",
    )
    assert take(standbys, launch, env, tmp_path / "log")[0] not in (0, *dead)


def test_a_program_that_cannot_be_imported_is_left_alone(
    standbys: StandbyPool, spawner: Spawner, launch: LaunchSpec, env: dict[str, str], tmp_path: Path
) -> None:
    loop = Path(launch.code) / "trainer" / "loop.py"
    tries = tmp_path / "tries"
    loop.write_text(f"open({str(tries)!r}, 'a').write('x')\nraise RuntimeError\n")
    standbys.prewarm(RUN, launch, env)
    until(lambda: tries.exists() and len(tries.read_text()) == 3 and not spawner.pids(), "three tries")
    standbys._wake.set()
    standbys._balance(0.0)
    assert not spawner.pids() and len(tries.read_text()) == 3
    assert take(standbys, launch, env, tmp_path / "log")[0] == 0


def test_one_that_ends_before_it_is_listed_holds_no_other_up(launch: LaunchSpec, env: dict[str, str]) -> None:
    class Process:
        pid = 2**31 - 1
        returncode = 1

    class Eager:
        """The thread that watches is faster than the one that waits for the start."""

        made = 0

        def start(self, words: object, env: object, ended: ExitCallback, **_: object) -> Future[Process]:
            self.made += 1
            ended(Process.pid, ProcessExit(1, 0.0))
            future: Future[Process] = Future()
            future.set_result(Process())
            return future

    eager = Eager()
    standbys = StandbyPool(eager)  # type: ignore[arg-type]
    standbys.prewarm(RUN, launch, env)
    until(lambda: eager.made == 3 and not standbys._waiting, "three tries")
    standbys._balance(0.0)
    assert eager.made == 3
    standbys.close()


def test_they_can_be_fewer_or_off_and_end_when_nobody_needs_them(
    standbys: StandbyPool,
    spawner: Spawner,
    launch: LaunchSpec,
    env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standbys.prewarm("off", launch, env | {"MEGARAY_STANDBYS": "0"})
    standbys.prewarm("measures", replace(launch, program=("-m", "faulttol", "run")), env)
    assert not standbys._demands
    standbys.prewarm(RUN, launch, env | {"MEGARAY_STANDBYS": "1"})
    until(lambda: standbys.ready == 1, "one")
    standbys._balance(0.0)
    assert len(spawner.pids()) == 1
    monkeypatch.setattr("orchestrator.agent.standby_pool._LINGER_SECONDS", 0.0)
    standbys.release(RUN)
    until(lambda: not spawner.pids(), "its end")


def test_one_that_is_being_started_while_the_agent_closes_ends_too(
    launch: LaunchSpec, env: dict[str, str]
) -> None:
    began, closed = threading.Event(), threading.Event()

    class SlowSpawner(Spawner):
        pid = 0

        def start(self, *words: Any, **more: Any) -> Future[subprocess.Popen[bytes]]:
            began.set()
            assert closed.wait(60)
            future = super().start(*words, **more)
            self.pid = future.result().pid
            return future

    slow = SlowSpawner()
    standbys = StandbyPool(slow)
    standbys.prewarm(RUN, launch, env)
    assert began.wait(60)
    standbys.close()
    closed.set()
    until(lambda: slow.pid and not slow.pids(), "its end")


@pytest.mark.parametrize("when", ["imports", "waits"])
def test_one_ends_by_itself_where_its_agent_is_killed(
    launch: LaunchSpec, env: dict[str, str], when: str
) -> None:
    importing = str(Path(launch.code) / "importing") if when == "imports" else ""
    if importing:
        slow = f"import time\nopen({importing!r}, 'w').close()\ntime.sleep(600)\n"
        (Path(launch.code) / "trainer" / "loop.py").write_text(slow)
    given = json.dumps([asdict(replace(launch, world=1, ranks=(0,))), env, importing])
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, given], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert agent.stdout is not None
    pid = int(agent.stdout.readline())
    try:
        assert pid in attempt_processes.process_table()
        agent.kill()
        agent.wait()
        until(lambda: pid not in attempt_processes.process_table(), "its end")
    finally:
        agent.kill()
        agent.wait()
        attempt_processes.send_signal([pid], signal.SIGKILL)


def test_libraries_alone_serve_the_first_gang_of_whichever_run_comes(
    standbys: StandbyPool, launch: LaunchSpec, env: dict[str, str], idle: dict[str, str], tmp_path: Path
) -> None:
    standbys.set_idle_target(2, idle)
    until(lambda: standbys.ready == 2, "two for two devices")
    assert not take(standbys, launch, env | {"OMP_NUM_THREADS": "7"}, tmp_path / "log")[0], "read too early"
    assert not take(standbys, replace(launch, program=("-m", "faulttol", "run")), env, tmp_path / "log")[0]
    late = {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "1"}
    assert take(standbys, launch, env | late, tmp_path / "log", RANK="1")[0]
    until(lambda: (tmp_path / "log").read_text(), "its first words")
    warm, words, seen, path, modules = json.loads((tmp_path / "log").read_text())
    assert not warm and words == ["run", "a word"] and (seen["RANK"], seen["LOCAL_WORLD_SIZE"]) == ("1", "2")
    assert path[0] == launch.code and path.count(launch.code) == 1, "its run's own code, before the node's"
    assert str(tmp_path / "libraries") not in path
    assert "torch._dynamo" in modules and "trainer" in modules
    assert not {"configs.rank", "orchestrator.agent", "trainer.loop"}.intersection(modules), "the node's own"


def test_libraries_give_way_to_a_gang_and_come_back_after_it(
    standbys: StandbyPool, spawner: Spawner, launch: LaunchSpec, env: dict[str, str], idle: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def kinds() -> set[str]:
        return {one.kind.module for one in list(standbys._waiting)}

    monkeypatch.setattr("orchestrator.agent.standby_pool._LINGER_SECONDS", 0.0)
    standbys.set_idle_target(1, idle)
    until(lambda: kinds() == {""}, "the node's own")
    standbys.pause(RUN)
    until(lambda: not spawner.pids(), "room for ranks that start")
    standbys.prewarm(RUN, launch, env)
    until(lambda: kinds() == {"trainer"}, "its program")
    standbys.release(RUN)
    until(lambda: kinds() == {""}, "the node's own again")
    standbys.set_idle_target(1, idle | {"MEGARAY_STANDBYS": "0"})
    until(lambda: not spawner.pids(), "none where none are wanted")


def test_a_gang_that_never_trains_bars_no_other(standbys: StandbyPool, idle: dict[str, str]) -> None:
    standbys.set_idle_target(1, idle)
    standbys.pause(RUN)
    standbys.release(RUN)
    until(lambda: standbys._waiting, "the node's own")


def test_an_agent_of_devices_has_interpreters_waiting(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[tuple[int, str, bool]] = []
    monkeypatch.setattr(
        StandbyPool, "set_idle_target",
        lambda _, ranks, env: expected.append((ranks, env["LOCAL_WORLD_SIZE"], "CUDA_VISIBLE_DEVICES" in env)),
    )  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    NodeAgent("cores").close()
    NodeAgent("gpus", devices=4).close()
    assert expected == [(4, "4", False)]


def test_libraries_are_all_that_a_rank_takes_from_others() -> None:
    """What comes after them is ours, or takes no time."""
    code = (
        "import importlib, sys; from orchestrator.agent import standby\n"
        "for name in standby.LIBRARIES: importlib.import_module(name)\n"
        "before = set(sys.modules); import trainer.loop, trainer.engines.native\n"
        "ours = {p for p in {name.split('.')[0] for name in sys.modules} if p in standby._OURS}\n"
        "later = [name for name in set(sys.modules) - before if name.split('.')[0] in ('torch', 'triton', 'scipy')]\n"
        "print(sorted(ours), later)"
    )
    words = [sys.executable, "-c", code]
    told = subprocess.run(
        words, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert told.stdout.split() == [
        "['collectives',",
        "'configs',",
        "'faulttol',",
        "'orchestrator',",
        "'trainer']",
        "[]",
    ]


def test_what_the_configuration_needs_is_imported_too(tmp_path: Path) -> None:
    from configs.compose import compose, dump

    path = tmp_path / "config.yaml"
    words = ("-m", "trainer", "run", "--config", str(path))
    path.write_text(dump(compose(["experiment=smoke", "train.engine=deepspeed"])))
    assert standby._engine(standby._config(words)) == ["trainer.engines.deepspeed"]
    path.write_text(
        dump(compose(["experiment=smoke", "train.engine=native", "parallel.pp=2", "parallel.cp=2"]))
    )
    assert standby._engine(standby._config(words)) == [
        "trainer.engines.native", "torch._dynamo", "trainer.parallel.pipeline", "torch.nn.attention.bias",
    ]  # fmt: skip
    path.write_text(dump(compose(["hardware=h100", "model=zaya1_base", "train.engine=native"])))
    kernels = [name for name in standby._engine(standby._config(words)) if "kernels" in name]
    assert "trainer.kernels.rows" in kernels and "trainer.kernels.compressed" in kernels
    assert all(importlib.util.find_spec(name) for name in kernels)
    assert standby._on_devices(standby._config(words))
    path.write_text(dump(compose(["experiment=smoke"])))
    assert not standby._on_devices(standby._config(words))
    path.write_text("no: configuration")
    assert standby._engine(standby._config(words)) == []
    assert standby._engine(standby._config(words[:3])) == []
