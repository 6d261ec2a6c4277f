"""Real ranks over gloo: layouts agree, and a resumed run is the same run. `test_stopping` has ranks under torchrun."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from configs.metrics import EndedLine, EvaluatedLine, MetricLine, ResumedLine, SavedLine, StepLine, read_from
from configs.paths import RunPaths
from configs.rank import RankContext, free_port
from tests.forks import Ended, trainers

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

SMALL = (
    "experiment=smoke", "train.steps=12", "optim.warmup_steps=3", "train.global_batch=8", "checkpoint.every=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared tokens are shared by the tests of this module; the corpus is a part of the standard library."""
    return tmp_path_factory.mktemp("home")


TEXT = f"data.path={os.path.dirname(json.__file__)}/*.py"


def start(home: Path, run: Path, ranks: int, *words: str, attempt: int = 1) -> list[Ended]:
    """`python -m trainer run` on each rank, with what a launcher sets for several of them; how they ended."""
    own = {
        "MEGARAY_HOME": str(home), "MEGARAY_RUN": str(run), "MEGARAY_ATTEMPT": str(attempt), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    port, each = free_port(), [own]
    if ranks > 1:
        contexts = (
            RankContext(r, ranks, r, ranks, "127.0.0.1", port, RunPaths(run), attempt) for r in range(ranks)
        )
        each = [own | context.environment() for context in contexts]
    return trainers(["run", *SMALL, TEXT, *words], each)


def train(home: Path, run: Path, ranks: int, *words: str, attempt: int = 1) -> list[MetricLine]:
    """Train; rank 0's metric lines of this attempt."""
    done = start(home, run, ranks, *words, attempt=attempt)
    assert [one.returncode for one in done] == [0] * ranks, "".join(one.stdout + one.stderr for one in done)
    return read_from(run / "attempts" / f"{attempt:03d}" / "metrics.jsonl", 0)[0]


def refused(home: Path, run: Path, *words: str) -> str:
    """The one line that a second attempt is refused with."""
    (done,) = start(home, run, 1, *words, attempt=2)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("megaray: ")
    return last


def steps(lines: list[MetricLine]) -> list[StepLine]:
    return [line for line in lines if isinstance(line, StepLine)]


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StepLine]]:
    """A run on one rank, and its folder."""
    run = tmp_path_factory.mktemp("alone")
    return run, steps(train(home, run, 1, "train.micro_batch=8"))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, ("parallel.dp=2", "parallel.ep=2", "train.micro_batch=2", "parallel.zero=2")),
        (4, ("parallel.dp=1", "parallel.pp=2", "parallel.tp=2", "parallel.ep=2", "train.micro_batch=2",
             "model.kv_heads=2")),
    ],
    ids=["dp-ep", "pp-tp-ep"],
)  # fmt: skip
def test_a_layout_trains_the_same_model(
    ranks: int, words: tuple[str, ...], home: Path, tmp_path: Path
) -> None:
    model = [word for word in words if word.startswith("model.")]
    expected = steps(train(home, tmp_path / "one", 1, "train.micro_batch=8", *model))
    found = steps(train(home, tmp_path / "many", ranks, *words))
    assert [line.loss for line in found] == pytest.approx([line.loss for line in expected], rel=2e-5)
    assert [line.grad_norm for line in found] == pytest.approx(
        [line.grad_norm for line in expected], rel=1e-4
    )
    assert [line.expert_load for line in found[:3]] == [line.expert_load for line in expected[:3]]


@pytest.mark.parametrize(
    "words",
    [
        ("parallel.dp=2", "parallel.ep=2", "train.micro_batch=2"),
        ("parallel.dp=2", "parallel.ep=2", "train.micro_batch=4", "model.router.balance=aux", "model.qk_norm=head",
         "model.shared_width=32", "model.dense_layers=1", "model.dense_width=64", "model.tie_embeddings=true",
         "model.router.score=sigmoid", "train.precision=bf16", "optim.kind=muon", "parallel.zero=3"),
    ],
    ids=["fp32", "everything-bf16"],
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
    assert isinstance(again[-1], EndedLine) and again[-1].tokens == whole[-1].tokens


def test_a_run_goes_on_under_another_layout(
    home: Path, tmp_path: Path, alone: tuple[Path, list[StepLine]]
) -> None:
    """From one rank to pp=2 with experts over both dp ranks and back, with the losses of the run that never stopped."""
    folder, expected = alone
    shutil.copytree(folder, tmp_path / folder.name)
    run = tmp_path / folder.name
    shutil.rmtree(run / "checkpoints" / "step-0000000012")
    found = steps(
        train(
            home, run, 4, "parallel.dp=2", "parallel.pp=2", "parallel.ep=2", "train.micro_batch=2", attempt=2
        )
    )
    assert [line.step for line in found] == [7, 8, 9, 10, 11, 12]
    assert [line.loss for line in found] == pytest.approx([line.loss for line in expected[6:]], rel=2e-5)
    assert [line.tokens for line in found] == [line.tokens for line in expected[6:]]


def test_what_a_checkpoint_does_not_fit_is_refused_by_name(
    home: Path, tmp_path: Path, alone: tuple[Path, list[StepLine]]
) -> None:
    run = tmp_path / alone[0].name
    shutil.copytree(alone[0], run)
    for word, told in (
        (
            "model.heads=1 model.router.score=sigmoid train.seed=7 data.sequence=32",
            "model.heads was 2 and is 1",
        ),
        (f"data.path={os.path.dirname(json.__file__)}/decoder.py", "data.path"),
    ):
        line = refused(home, run, "train.micro_batch=8", *word.split())
        assert told in line and "can't be resumed" in line, line


def test_held_out_documents_are_evaluated(home: Path, tmp_path: Path) -> None:
    words = (
        "train.steps=4",
        "optim.warmup_steps=1",
        "data.validation=0.4",
        "train.evaluate_every=2",
        "train.evaluate_samples=8",
    )
    one = [
        x
        for x in train(home, tmp_path / "a", 1, *words, "train.micro_batch=8")
        if isinstance(x, EvaluatedLine)
    ]
    two = train(home, tmp_path / "b", 2, *words, "train.micro_batch=2", "parallel.dp=1", "parallel.pp=2")
    assert [line.step for line in one] == [2, 4] and one[0].samples == 8
    again = [x for x in two if isinstance(x, EvaluatedLine)]
    assert [x.loss for x in again] == pytest.approx([x.loss for x in one], rel=2e-5)
    assert one[0].loss != steps(two)[1].loss


def test_nothing_left_to_train_is_said(
    home: Path, tmp_path: Path, alone: tuple[Path, list[StepLine]]
) -> None:
    run = tmp_path / alone[0].name
    shutil.copytree(alone[0], run)
    (done,) = start(home, run, 1, "train.micro_batch=8", attempt=2)
    assert done.returncode == 0 and "nothing is left to train: step 12 of 12 is done" in done.stderr
