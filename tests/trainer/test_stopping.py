"""SIGTERM: every rank finishes the same step, saves it and exits with 143, and the next attempt continues from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import STOPPED_EXIT
from configs.metrics import MetricWriter, SavedLine, StepLine, StoppedLine, last_step, read_all
from configs.paths import RunPaths
from configs.rank import GATE, RankContext
from faulttol.recorder import RankPhase, Recorder, read
from faulttol.verdicts import VerdictKind
from tests.trainer.stopping_ranks import CASES, STEP
from trainer import device_memory
from trainer.startup import Startup
from trainer.stopping import StopRequest

ROOT = Path(__file__).parents[2]
PHASES = {"imports", "data", "rendezvous", "build", "load"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What became of all cases."""
    folder = tmp_path_factory.mktemp("stopping")
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.stopping_ranks", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    answers: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.dist
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_one_rank_is_asked_and_all_stop_at_the_same_step(
    outcomes: dict[str, list[dict[str, Any]]], case: str
) -> None:
    first, second = outcomes[case]
    world = CASES[case][0]
    assert first["codes"] == [STOPPED_EXIT] * world
    assert first["stopped"] == [[STEP + 1, True]] and first["saved"] == [STEP + 1]
    assert first["steps"] == list(range(1, STEP + 2)), "the step in which it was asked is the last"
    assert first["blames"] == [True] * (world - 1) + [False], "only the rank that was asked says so"
    (verdict,) = [v for v in first["verdicts"] if v["rank"] == world - 1]
    assert verdict["kind"] == VerdictKind.RANK_EXIT and "asked to stop by SIGTERM" in verdict["detail"]
    assert second["codes"] == [0] * world and second["resumed"][0][0] == STEP + 1
    assert second["steps"] == [STEP + 2, STEP + 3] and not second["verdicts"]


@pytest.mark.dist
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_records_of_a_step_have_its_number_in_the_metric_lines(
    outcomes: dict[str, list[dict[str, Any]]], case: str
) -> None:
    """Or an incident would name another step than `status`, and the ranks' view another than the loss beside it."""
    for attempt in outcomes[case]:
        for records in attempt["records"]:
            steps = [step for mark, _, step in records if mark == "STEP"]
            assert steps == attempt["steps"]
            begun = [step for mark, phase, step in records if mark == "BEGIN" and phase == "FORWARD"]
            assert list(dict.fromkeys(begun)) == steps
            ended = records[[mark for mark, *_ in records].index("STEP") :]
            assert {step for _, phase, step in ended if phase == "CHECKPOINT"} <= set(steps)
            assert {step for mark, phase, step in records if phase == "LOAD"} == {0}, "a start is of no step"


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_start_says_where_its_seconds_went(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    for _, second in outcomes.values():
        seconds = second["resumed"][0][1]
        assert set(seconds) == PHASES and all(value >= 0 for value in seconds.values())
        assert seconds["build"] > 0 and seconds["load"] > 0


@pytest.mark.dist
@pytest.mark.timeout(200)
def test_under_torchrun_the_state_is_saved_too(tmp_path: Path) -> None:
    env = os.environ | {
        "MEGARAY_HOME": str(tmp_path),
        "MEGARAY_RUN": str(tmp_path / "run"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "trainer", "run",
        "experiment=smoke", "train.steps=100000", "train.global_batch=8", "train.micro_batch=2", "parallel.dp=2",
        "checkpoint.every=100000", "train.log_every=1", f"data.path={os.path.dirname(json.__file__)}/*.py",
    ]  # fmt: skip
    metrics = RunPaths(tmp_path / "run").attempt(1).metrics
    job = subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 150
        while (line := last_step(metrics)) is None or line.step < 3:
            assert job.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        job.wait(60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    lines = list(read_all(metrics))
    (stopped,) = [one for one in lines if isinstance(one, StoppedLine)]
    (saved,) = [one for one in lines if isinstance(one, SavedLine)]
    assert (
        stopped.saved and stopped.step == saved.step == [x for x in lines if isinstance(x, StepLine)][-1].step
    )


# ---- one process ----

_ASKED = """
import os, signal, torch
from trainer.stopping import StopRequest
stop = StopRequest(torch.device("cpu"))
with stop.handle_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signalled
    print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never", flush=True)
"""


@pytest.mark.dist
@pytest.mark.timeout(60)
def test_a_second_sigterm_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", _ASKED], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "asked\n"), done.stderr


@pytest.mark.dist
@pytest.mark.timeout(60)
def test_outside_sigterm_is_as_it_was() -> None:
    before, stop = signal.getsignal(signal.SIGTERM), StopRequest(torch.device("cpu"))
    with stop.handle_sigterm():
        assert signal.getsignal(signal.SIGTERM) != before
        assert not stop.signalled
    assert signal.getsignal(signal.SIGTERM) == before
    assert not stop.agreed_by_all(torch.zeros(())) and stop.agreed_by_all(torch.tensor(2.0))


@pytest.mark.dist
@pytest.mark.timeout(60)
def test_the_phases_of_a_start_are_recorded_and_add_up(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "ring", 0)
    before = time.monotonic()
    startup = Startup(recorder, {"MEGARAY_STARTED": "not a number"})
    for phase in (RankPhase.DATA, RankPhase.RENDEZVOUS, RankPhase.BUILD, RankPhase.LOAD):
        startup.enter(phase)
    startup.end()
    assert (
        set(startup.seconds) == PHASES and sum(startup.seconds.values()) <= time.monotonic() - before + 0.01
    )
    phases = [record.phase for record in read(tmp_path / "ring")]
    assert phases == [
        RankPhase.IMPORTS,
        RankPhase.DATA,
        RankPhase.RENDEZVOUS,
        RankPhase.BUILD,
        RankPhase.LOAD,
    ]
    from faulttol import steady_clock

    asked = Startup(recorder, {"MEGARAY_STARTED": repr(steady_clock.now() - 5.0)})
    asked.end()
    assert 5.0 <= asked.seconds["imports"] < 60
    own = Startup(recorder, {})
    own.end()
    assert own.seconds["imports"] > 0.1, "since this process was made"


# ---- device memory that the attempt before still holds ----

GIB = 1 << 30


class _Following:
    """Attempt 2 of a run whose attempt 1 had 10 GiB of a device at its peak, and that device."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.gate = RunPaths(folder), folder / "gate"
        self.rank = RankContext(0, 1, 0, 1, "127.0.0.1", 1, self.run, 2)
        self.looks: list[float] = []
        """GiB that are free, look by look; the last one stays."""
        self.at: dict[int, Callable[[], object]] = {}
        """What happens before a look."""
        self._count = 0
        line = StepLine(
            0.0, 1, 5, 2.0, 0.0, 0.0, 1.0, 1, 1.0, 1.0, {}, None, [], 1.0, dropped=0, memory_bytes=10 * GIB
        )
        writer = MetricWriter(self.run.attempt(1).metrics)
        writer.write(line)
        writer.close()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (self._free(), 80 * GIB))

    def _free(self) -> int:
        self._count += 1
        self.at.get(self._count, lambda: None)()
        return int(self.looks[min(self._count, len(self.looks)) - 1] * GIB)

    def wait(self) -> int:
        """Waits as the trainer does."""
        device_memory.wait_for_memory(self.rank, torch.device("cuda"), {GATE: str(self.gate)})
        return self._count


@pytest.fixture
def following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Following:
    monkeypatch.setattr(device_memory, "_TIMEOUT_SECONDS", 0.3)
    return _Following(tmp_path, monkeypatch)


@pytest.mark.unit
def test_an_attempt_goes_on_beside_the_last_one_where_there_is_room_for_both(following: _Following) -> None:
    following.looks = [9.0, 14.4, 14.6]
    assert following.wait() == 3, "a quarter and 2 GiB more than it had allocated"


@pytest.mark.unit
def test_where_there_is_not_it_waits_for_the_end_of_the_last_one(following: _Following) -> None:
    following.looks, following.at = [3.0, 3.0, 3.0, 9.9, 10.1], {3: following.gate.touch}
    assert following.wait() == 5, "for its memory too, which a driver gives up a moment later"


@pytest.mark.unit
@pytest.mark.parametrize("attempt", [1, 2])
def test_with_another_layout_room_says_nothing(following: _Following, attempt: int) -> None:
    following.run.attempt(attempt).root.mkdir(parents=True, exist_ok=True)
    following.run.attempt(attempt).config.write_text("x: 1\n")
    following.looks, following.at = [70.0], {4: following.gate.touch}
    assert following.wait() == 4


@pytest.mark.unit
def test_memory_that_nobody_of_the_run_holds_is_an_error(following: _Following) -> None:
    following.looks, following.at = [3.0], {1: following.gate.touch}
    with pytest.raises(
        device_memory.DeviceMemoryHeld,
        match=r"cuda has 3.0 of 80.0 GiB free, and attempt 1 took 10.0",
    ):
        following.wait()


@pytest.mark.unit
def test_a_context_that_finds_no_room_is_made_again_after_the_end_of_the_last_one(tmp_path: Path) -> None:
    gate, calls = tmp_path / "gate", list[bool]()

    def make(words: str = "CUDA error: out of memory") -> str:
        calls.append(gate.exists())
        if len(calls) == 1:
            threading.Timer(0.1, gate.touch).start()
            raise RuntimeError(words)
        return "made"

    assert device_memory.retry_out_of_memory(make, {GATE: str(gate)}) == "made" and calls == [False, True]
    for words, env in (("out of memory", {}), ("no kernel image", {GATE: str(gate)})):
        calls.clear()
        with pytest.raises(RuntimeError, match=words):
            device_memory.retry_out_of_memory(lambda words=words: make(words), env)  # type: ignore[misc]
