"""Real ranks over gloo, started by torchrun: layouts agree, and a resumed run is the same run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.metrics import EndedLine, MetricLine, ResumedLine, SavedLine, StepLine, read_from

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

SMALL = (
    "experiment=smoke", "train.steps=12", "optim.warmup_steps=3", "train.global_batch=8", "checkpoint.every=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared tokens are shared by the tests of this module; the corpus is a part of the standard library."""
    return tmp_path_factory.mktemp("home")


def train(home: Path, run: Path, ranks: int, *words: str, attempt: int = 1) -> list[MetricLine]:
    """Train under torchrun; rank 0's metric lines of this attempt."""
    env = os.environ | {
        "MEGARAY_HOME": str(home), "MEGARAY_RUN": str(run), "MEGARAY_ATTEMPT": str(attempt), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
         "-m", "trainer", "run", *SMALL, f"data.path={os.path.dirname(json.__file__)}", *words],
        env=env, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return read_from(run / "attempts" / f"{attempt:03d}" / "metrics.jsonl", 0)[0]


def steps(lines: list[MetricLine]) -> list[StepLine]:
    return [line for line in lines if isinstance(line, StepLine)]


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[StepLine]:
    return steps(train(home, tmp_path_factory.mktemp("alone"), 1, "train.micro_batch=8"))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ("train.micro_batch=2",)),
        (2, ("parallel.dp=2", "parallel.ep=1", "train.micro_batch=4")),
        (2, ("parallel.dp=2", "parallel.ep=2", "train.micro_batch=2")),
        (4, ("parallel.dp=4", "parallel.ep=2", "train.micro_batch=2")),
        (4, ("parallel.dp=4", "parallel.ep=4", "train.micro_batch=1")),
    ],
)
def test_every_layout_trains_the_same_model(
    ranks: int, words: tuple[str, ...], home: Path, tmp_path: Path, alone: list[StepLine]
) -> None:
    found = steps(train(home, tmp_path, ranks, *words))
    assert [line.loss for line in found] == pytest.approx([line.loss for line in alone], rel=2e-5)
    assert [line.grad_norm for line in found] == pytest.approx([line.grad_norm for line in alone], rel=1e-3)
    assert [line.expert_load for line in found[:3]] == [line.expert_load for line in alone[:3]]


@pytest.mark.parametrize(
    "words",
    [
        ("parallel.dp=2", "parallel.ep=2", "train.micro_batch=2"),
        ("parallel.dp=2", "parallel.ep=1", "train.micro_batch=4", "train.precision=bf16"),
        ("parallel.dp=2", "parallel.ep=2", "train.micro_batch=4", "model.router.balance=aux", "model.qk_norm=true",
         "model.shared_width=32", "model.dense_layers=1", "model.dense_width=64", "model.tie_embeddings=true",
         "model.router.score=sigmoid", "train.precision=bf16"),
    ],
    ids=["fp32", "bf16", "everything"],
)  # fmt: skip
def test_a_resumed_run_is_the_same_run(words: tuple[str, ...], home: Path, tmp_path: Path) -> None:
    whole = train(home, tmp_path, 2, *words)
    assert [line.step for line in whole if isinstance(line, SavedLine)] == [6, 12]
    shutil.rmtree(tmp_path / "checkpoints" / "step-0000000012")
    again = train(home, tmp_path, 2, *words, attempt=2)
    assert isinstance(again[0], ResumedLine) and again[0].step == 6
    before = {line.step: line for line in steps(whole)}
    assert [line.step for line in steps(again)] == [7, 8, 9, 10, 11, 12]
    for line in steps(again):
        twin = before[line.step]
        assert (line.loss, line.grad_norm, line.expert_load) == (twin.loss, twin.grad_norm, twin.expert_load)
    assert isinstance(again[-1], EndedLine)


def test_another_layout_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    train(home, tmp_path, 2, "parallel.dp=2", "parallel.ep=2", "train.micro_batch=2")
    env = os.environ | {"MEGARAY_HOME": str(home), "MEGARAY_RUN": str(tmp_path), "MEGARAY_ATTEMPT": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "run", *SMALL, f"data.path={os.path.dirname(json.__file__)}",
         "train.micro_batch=2"],
        env=env, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("megaray: ") and "ep=2" in last and "ep=1" in last
    assert "Traceback" not in done.stderr
