"""What may be resumed; and the loop on one rank: rates, samples, resuming, skipped steps."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from configs.compose import compose
from configs.errors import UserError
from configs.metrics import MetricLine, StepLine, read_from
from configs.paths import RunPaths
from configs.rank import RankContext
from configs.schema import RunConfig
from tests.collectives.ranks import free_port
from trainer import loop
from trainer.optim.schedule import learning_rate, samples_before
from trainer.resume import fingerprint, refusals

pytestmark = pytest.mark.dist

WORDS = (
    "experiment=smoke", "model.layers=1", "model.hidden=16", "model.heads=2", "model.kv_heads=2", "model.head_dim=8",
    "model.experts=4", "model.expert_width=8", "data.sequence=16", "train.micro_batch=2", "train.global_batch=8",
    "train.steps=6", "checkpoint.every=4", "optim.warmup_steps=3", "train.precision=fp32", "train.engine=native",
    "train.log_every=1", "parallel.dp=1", "parallel.pp=1",
)  # fmt: skip
DATA = {"parts": [{"path": "a", "weight": 1.0, "digest": "x", "tokens": 9, "documents": 1, "tokenizer": "bytes",
                   "separator": 0}], "sequence": 16, "validation": 0.0, "document_mask": False}  # fmt: skip
Train = Callable[..., list[MetricLine]]


def _config(*words: str) -> RunConfig:
    return compose([*WORDS, *words])


# ---- fingerprints ----


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model.heads=4", "model.heads was 2 and is 4"),
        ("model.router.score=sigmoid", "model.router.score was softmax and is sigmoid"),
        ("model.top_k=1", "model.top_k was 2 and is 1"),
        ("optim.kind=muon", "optim.kind was adamw and is muon"),
        ("train.seed=7", "train.seed was 1234 and is 7"),
    ],
)
def test_what_would_train_on_as_another_run_is_refused(word: str, told: str) -> None:
    old, new = fingerprint(_config(), DATA), fingerprint(_config(word), DATA)
    assert refusals(old, old) == ([], [])
    refused, said = refusals(old, new)
    assert refused == [told] and said == []


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model.router.aux_coefficient=0.5", "model.router.aux_coefficient was"),
        ("model.router.bias_update_rate=0.5", "model.router.bias_update_rate was"),
    ],
)
def test_what_only_changes_what_is_learned_next_is_said(word: str, told: str) -> None:
    refused, said = refusals(fingerprint(_config(), DATA), fingerprint(_config(word), DATA))
    assert refused == [] and len(said) == 1 and said[0].startswith(told)


def test_other_data_is_refused_and_an_older_checkpoint_taken() -> None:
    config = _config()
    for changes in ({"sequence": 32}, {"validation": 0.1}, {"document_mask": True}):
        refused, _ = refusals(fingerprint(config, DATA), fingerprint(config, DATA | changes))
        assert len(refused) == 1 and next(iter(changes)) in refused[0]
    part: Any = DATA["parts"]
    other = {"parts": [part[0] | {"digest": "y", "tokens": 8}]}
    refused, _ = refusals(fingerprint(config, DATA), fingerprint(config, DATA | other))
    assert len(refused) == 1 and "9 tokens in 1 documents then" in refused[0]
    older = fingerprint(config, DATA)
    del older["seed"], older["model"]["heads"]
    assert refusals(older, fingerprint(config, DATA)) == ([], [])


# ---- the loop ----


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Train]:
    """Trains on this process alone and gives the metric lines of the attempt."""
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    home = {"MEGARAY_HOME": str(tmp_path / "home")}

    def run(*words: str, attempt: int = 1, folder: str = "run") -> list[MetricLine]:
        paths = RunPaths(tmp_path / folder)
        rank = RankContext(0, 1, 0, 1, "127.0.0.1", free_port(), paths, attempt)
        paths.attempt(attempt).metrics.parent.mkdir(parents=True, exist_ok=True)
        try:
            with mock.patch.dict(os.environ, home):
                loop.main(_config(f"data.path={text}", *words), rank)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.unfreeze()
            gc.enable()
        return read_from(rank.paths.metrics, 0)[0]

    yield run


def _steps(lines: list[MetricLine]) -> list[StepLine]:
    return [line for line in lines if isinstance(line, StepLine)]


def test_every_step_has_its_rate_and_its_samples(train: Train) -> None:
    words = ("train.ramp_batch=4", "train.ramp_steps=4", "optim.schedule=cosine")
    config, lines = _config(*words), _steps(train(*words))
    assert [line.step for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line.lr == pytest.approx(learning_rate(config.optim, line.step - 1, 6), rel=1e-12)
        assert line.tokens == samples_before(config.train, line.step) * 16
        pairs = (line.tokens - samples_before(config.train, line.step - 1) * 16) * config.model.top_k
        assert sum(line.expert_load[0]) == pairs


def test_losses_of_a_growing_batch_are_means(train: Train) -> None:
    """The first step of a batch that grows is that of a batch as small."""
    grown = _steps(train("train.steps=5", "train.ramp_batch=4", "train.ramp_steps=4"))[0]
    small = _steps(train("train.steps=5", "train.global_batch=4", folder="small"))
    assert grown.loss == small[0].loss and grown.grad_norm == small[0].grad_norm


def test_a_resumed_run_goes_on_as_it_was(train: Train, tmp_path: Path) -> None:
    whole = _steps(train("train.steps=6"))
    os.rename(tmp_path / "run" / "checkpoints" / "step-0000000006", tmp_path / "gone")
    again = _steps(train("train.steps=6", attempt=2))
    assert [(line.step, line.loss, line.tokens) for line in again] == [
        (line.step, line.loss, line.tokens) for line in whole[4:]
    ]


def test_another_batch_goes_on_behind_the_samples_that_were_taken(train: Train, tmp_path: Path) -> None:
    train("train.steps=4")
    taken: list[int] = []
    batch = loop.Feed._read

    def noted(self: Any, step: int) -> Any:
        taken.append(samples_before(self._config.train, step) + self._ahead)
        return batch(self, step)

    with mock.patch.object(loop.Feed, "_read", noted):
        lines = _steps(train("train.steps=6", "train.global_batch=4", attempt=2))
    assert taken == [32, 36]
    assert [line.tokens for line in lines] == [36 * 16, 40 * 16]


def test_another_run_isnt_resumed(train: Train) -> None:
    train("train.steps=4")
    with pytest.raises(UserError, match="step 4 .* can't be resumed: train.seed was 1234 and is 7"):
        train("train.seed=7", attempt=2)


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run(train: Train, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="train.max_skipped=3: the gradients of the last 3 steps weren't finite"
    ):
        train("model.init_std=1e30", "train.max_skipped=3")
    found = _steps(read_from(RunPaths(tmp_path / "run").attempt(1).metrics, 0)[0])
    assert [line.skipped for line in found] == [1, 2, 3]
