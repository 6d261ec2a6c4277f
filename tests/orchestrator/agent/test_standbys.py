"""Interpreters that wait with a rank's program imported: taken, found as ranks, bounded, and off where they must be."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.agent import family, standby
from orchestrator.agent.orders import Launch, mark
from orchestrator.agent.spawner import Ended, Exit, Spawner
from orchestrator.agent.standbys import Standbys
from tests.orchestrator.agent.local_runtime import until

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]
RUN = f"/home/of/runs/a-run-{os.getpid()}"


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """A program by the name of the trainer, which says what it finds and waits."""
    package = tmp_path / "code" / "trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "loop.py").write_text("import os, time\nSEEN = dict(os.environ)\n")
    (package / "__main__.py").write_text(
        "import json, os, sys, time\n"
        "warm = 'trainer.loop' in sys.modules\n"
        "print(json.dumps([warm, sys.argv[1:], dict(os.environ)]), flush=True)\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    time.sleep(600)\n"
        "time.sleep(600)\n"
    )
    program = ("-m", "trainer", "run", "a word")
    return Launch(2, (0, 1), "127.0.0.1", ("127.0.0.1",), program, str(tmp_path / "code"))


@pytest.fixture
def env(launch: Launch) -> dict[str, str]:
    path = os.pathsep.join([launch.code, *(p for p in sys.path if p)])
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return kept | {"PYTHONPATH": path, "MEGARAY_PARENT": str(os.getpid()), "FLAG": "1", "PYTHONSAFEPATH": "1"}


@pytest.fixture
def spawner() -> Spawner:
    return Spawner()


@pytest.fixture
def standbys(spawner: Spawner) -> Iterator[Standbys]:
    made = Standbys(spawner)
    yield made
    made.close()
    family.end(family.of_attempt(mark(RUN, 3, "node"), {}), signal.SIGKILL)


def take(
    standbys: Standbys, launch: Launch, env: dict[str, str], log: Path, **own: str
) -> tuple[int, Future[Exit]]:
    ended: Future[Exit] = Future()
    with log.open("wb") as out:
        process = standbys.take(
            launch,
            env,
            {"MEGARAY_MARK": mark(RUN, 3, "node"), **own},
            out.fileno(),
            lambda _, how: ended.set_result(how),
        )
    return (process.pid if process else 0), ended


def test_one_becomes_a_rank_that_anybody_can_find_and_that_is_watched(
    standbys: Standbys, launch: Launch, env: dict[str, str], tmp_path: Path
) -> None:
    standbys.keep(RUN, launch, env)
    until(lambda: standbys.ready == 2, "two for two ranks")
    pid, ended = take(standbys, launch, env, tmp_path / "log", RANK="1")
    standbys.rest(RUN)
    assert pid
    until(lambda: (tmp_path / "log").read_text(), "its first words")
    warm, words, seen = json.loads((tmp_path / "log").read_text())
    assert warm and words == ["run", "a word"], "it has imported before, and is called as typed"
    assert seen["RANK"] == "1" and seen["FLAG"] == "1" and seen["MEGARAY_MARK"] == mark(RUN, 3, "node")
    assert os.getsid(pid) == pid
    until(
        lambda: len(family.of_attempt(mark(RUN, 3, "node"), {})) == 2, "it and its child, by the mark alone"
    )
    assert family.of_attempt(mark(RUN, 4, "node"), {}) == [] == family.of_attempt(mark(RUN, 3, "another"), {})
    until(lambda: standbys.ready == 0, "no other stays while ranks start")
    for one in family.of_attempt(mark(RUN, 3, "node"), {}):
        os.kill(one, 9)
    assert ended.result(30).code == -9


def test_one_is_taken_only_for_the_same_program_code_and_environment(
    standbys: Standbys, launch: Launch, env: dict[str, str], tmp_path: Path
) -> None:
    standbys.keep(RUN, launch, env)
    until(lambda: standbys.ready == 2, "standbys")
    for other, under in (
        (replace(launch, code="/elsewhere"), env),
        (replace(launch, program=("-m", "faulttol", "run")), env),
        (launch, env | {"FLAG": "2"}),
        (launch, env | {"OMP_NUM_THREADS": "7"}),
    ):
        assert not take(standbys, other, under, tmp_path / "log")[0]
    assert take(standbys, launch, env | {"CUDA_VISIBLE_DEVICES": "3"}, tmp_path / "log")[0], (
        "devices come later"
    )


def test_one_that_still_imports_is_taken_and_gets_the_processor(
    standbys: Standbys, launch: Launch, env: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    loop = Path(launch.code) / "trainer" / "loop.py"
    loop.write_text(f"import os, time\nwhile not os.path.exists({str(go)!r}):\n    time.sleep(0.01)\n")
    standbys.keep(RUN, launch, env)
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


def test_one_that_has_died_is_passed_over_and_replaced(
    standbys: Standbys, launch: Launch, env: dict[str, str], tmp_path: Path
) -> None:
    standbys.keep(RUN, launch, env)
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
    standbys: Standbys, spawner: Spawner, launch: Launch, env: dict[str, str], tmp_path: Path
) -> None:
    loop = Path(launch.code) / "trainer" / "loop.py"
    tries = tmp_path / "tries"
    loop.write_text(f"open({str(tries)!r}, 'a').write('x')\nraise RuntimeError\n")
    standbys.keep(RUN, launch, env)
    until(lambda: tries.exists() and len(tries.read_text()) == 3 and not spawner.pids(), "three tries")
    standbys._wake.set()
    standbys._balance(0.0)
    assert not spawner.pids() and len(tries.read_text()) == 3
    assert take(standbys, launch, env, tmp_path / "log")[0] == 0


def test_one_that_ends_before_it_is_listed_holds_no_other_up(launch: Launch, env: dict[str, str]) -> None:
    class Process:
        pid = 2**31 - 1
        returncode = 1

    class Eager:
        """The thread that watches is faster than the one that waits for the start."""

        made = 0

        def start(self, words: object, env: object, ended: Ended, **_: object) -> Future[Process]:
            self.made += 1
            ended(Process.pid, Exit(1, 0.0))
            future: Future[Process] = Future()
            future.set_result(Process())
            return future

    eager = Eager()
    standbys = Standbys(eager)  # type: ignore[arg-type]
    standbys.keep(RUN, launch, env)
    until(lambda: eager.made == 3 and not standbys._waiting, "three tries")
    standbys._balance(0.0)
    assert eager.made == 3
    standbys.close()


def test_they_can_be_fewer_or_off_and_end_when_nobody_needs_them(
    standbys: Standbys, spawner: Spawner, launch: Launch, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    standbys.keep("off", launch, env | {"MEGARAY_STANDBYS": "0"})
    standbys.keep("measures", replace(launch, program=("-m", "faulttol", "run")), env)
    assert not standbys._needs
    standbys.keep(RUN, launch, env | {"MEGARAY_STANDBYS": "1"})
    until(lambda: standbys.ready == 1, "one")
    standbys._balance(0.0)
    assert len(spawner.pids()) == 1
    monkeypatch.setattr("orchestrator.agent.standbys._LINGER_SECONDS", 0.0)
    standbys.drop(RUN)
    until(lambda: not spawner.pids(), "its end")


def test_what_the_configuration_needs_is_imported_too(tmp_path: Path) -> None:
    from configs.compose import compose, dump

    path = tmp_path / "config.yaml"
    path.write_text(dump(compose(["experiment=smoke", "train.engine=deepspeed"])))
    assert standby._engine(("-m", "trainer", "run", "--config", str(path))) == ["trainer.engines.deepspeed"]
    path.write_text(
        dump(compose(["experiment=smoke", "train.engine=native", "parallel.pp=2", "parallel.cp=2"]))
    )
    assert standby._engine(("-m", "trainer", "run", "--config", str(path))) == [
        "trainer.engines.native", "torch._dynamo", "trainer.parallel.pipeline", "torch.nn.attention.bias",
    ]  # fmt: skip
    path.write_text("no: configuration")
    assert standby._engine(("-m", "trainer", "run", "--config", str(path))) == []
    assert standby._engine(("-m", "trainer", "run")) == []
