"""What may be resumed; and the loop on one rank: rates, samples, resuming, skipped steps."""

from __future__ import annotations

import errno
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from configs.compose import compose
from configs.errors import UserError
from configs.metrics import (
    EndedLine,
    MetricLine,
    ResumedLine,
    SavedLine,
    SaveFailedLine,
    StepLine,
    read_from,
)
from configs.paths import RunPaths
from configs.rank import RankContext, free_port
from configs.schema import CheckpointConfig, RunConfig
from faulttol.checkpoint.interval import interval, mtbf
from faulttol.checkpoint.load import newest, stored
from faulttol.checkpoint.manifest import Incomplete
from faulttol.checkpoint.peers import SoloPeers
from faulttol.checkpoint.store import CheckpointStore
from faulttol.staged.saver import Saver
from faulttol.staged.writer import InlineWriter
from trainer import checkpoints, loop
from trainer.fingerprint import compare_fingerprints, fingerprint
from trainer.optim.schedule import consumed_samples, learning_rate
from trainer.save_schedule import SaveSchedule, SaveTimings

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
    assert compare_fingerprints(old, old) == ([], [])
    refused, said = compare_fingerprints(old, new)
    assert refused == [told] and said == []


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model.router.aux_coefficient=0.5", "model.router.aux_coefficient was"),
        ("model.router.bias_update_rate=0.5", "model.router.bias_update_rate was"),
    ],
)
def test_what_only_changes_what_is_learned_next_is_said(word: str, told: str) -> None:
    refused, said = compare_fingerprints(fingerprint(_config(), DATA), fingerprint(_config(word), DATA))
    assert refused == [] and len(said) == 1 and said[0].startswith(told)


def test_other_data_is_refused_and_an_older_checkpoint_taken() -> None:
    config = _config()
    for changes in ({"sequence": 32}, {"validation": 0.1}, {"document_mask": True}):
        refused, _ = compare_fingerprints(fingerprint(config, DATA), fingerprint(config, DATA | changes))
        assert len(refused) == 1 and next(iter(changes)) in refused[0]
    part: Any = DATA["parts"]
    other = {"parts": [part[0] | {"digest": "y", "tokens": 8}]}
    refused, _ = compare_fingerprints(fingerprint(config, DATA), fingerprint(config, DATA | other))
    assert len(refused) == 1 and "9 tokens in 1 documents then" in refused[0]
    older = fingerprint(config, DATA)
    del older["seed"], older["model"]["heads"]
    assert compare_fingerprints(older, fingerprint(config, DATA)) == ([], [])


def test_a_setting_that_an_older_checkpoint_lacks_had_its_default() -> None:
    older = fingerprint(_config(), DATA)
    del older["model"]["moe_every"], older["model"]["router.groups"], older["optim"]["moments"]
    assert compare_fingerprints(older, fingerprint(_config(), DATA)) == ([], [])
    words = ("model.moe_every=2", "model.dense_width=16", "model.layers=2")
    same = fingerprint(_config(*words[1:]), DATA)
    del same["model"]["moe_every"]
    refused, _ = compare_fingerprints(same, fingerprint(_config(*words), DATA))
    assert refused == ["model.moe_every was 1 and is 2"]
    assert compare_fingerprints(older | {"model": {}}, fingerprint(_config(*words), DATA)) == ([], [])


# ---- the loop ----


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Train]:
    """Trains on this process alone and gives the metric lines of the attempt."""
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    home = {"MEGARAY_HOME": str(tmp_path / "home")}
    made: list[Saver] = []

    def noted(*given: Any) -> Saver:
        made.append(Saver(*given))
        return made[-1]

    def run(*words: str, attempt: int = 1, folder: str = "run") -> list[MetricLine]:
        paths = RunPaths(tmp_path / folder)
        rank = RankContext(0, 1, 0, 1, "127.0.0.1", free_port(), paths, attempt)
        paths.attempt(attempt).metrics.parent.mkdir(parents=True, exist_ok=True)
        try:
            with mock.patch.dict(os.environ, home), mock.patch.object(checkpoints, "Saver", noted):
                loop.main(_config(f"data.path={text}", *words), rank)
        except BaseException:
            for saver in made[-1:]:  # a process would end now, and its servers with it
                saver._writer.close()
            raise
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
        assert line.tokens == consumed_samples(config.train, line.step) * 16
        pairs = (line.tokens - consumed_samples(config.train, line.step - 1) * 16) * config.model.top_k
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
    batch = loop.BatchLoader._read

    def noted(self: Any, step: int) -> Any:
        taken.append(consumed_samples(self._config.train, step) + self._sample_offset)
        return batch(self, step)

    with mock.patch.object(loop.BatchLoader, "_read", noted):
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


# ---- saves ----


def _of(lines: list[MetricLine], kind: type) -> list[Any]:
    return [line for line in lines if isinstance(line, kind)]


@pytest.mark.parametrize("background", ["true", "false"])
def test_saves_are_told_when_they_are_durable(train: Train, tmp_path: Path, background: str) -> None:
    lines = train("train.steps=6", "checkpoint.every=2", f"checkpoint.background={background}")
    saved = _of(lines, SavedLine)
    assert [line.step for line in saved] == [2, 4, 6]
    assert all(line.bytes > 0 and line.held > 0 and line.seconds > 0 for line in saved)
    assert isinstance(lines[-1], EndedLine) and lines.index(saved[-1]) == len(lines) - 2
    assert [Path(saved[n].path).exists() for n in range(3)] == [False, True, True]


def test_a_save_beside_training_has_the_state_of_its_step(train: Train, tmp_path: Path) -> None:
    """Losses after it are those of a run that never stopped, though training continued while it was written."""
    whole = _steps(train("train.steps=6", "checkpoint.every=2"))
    for kept in (2, 4):
        folder = f"until-{kept}"
        train("train.steps=6", "checkpoint.every=2", "checkpoint.keep=9", folder=folder)
        for step in (2, 4, 6):
            if step > kept:
                os.rename(
                    tmp_path / folder / "checkpoints" / f"step-{step:010d}", tmp_path / f"{folder}-{step}"
                )
        again = _steps(train("train.steps=6", "checkpoint.every=2", attempt=2, folder=folder))
        assert [(line.step, line.loss) for line in again] == [(line.step, line.loss) for line in whole[kept:]]


def test_the_optimizer_waits_for_the_copy(train: Train) -> None:
    """Nothing that is being saved has changed when its copy is taken, however late that is."""
    order: list[str] = []
    settle = Saver.settle

    def settled(self: Saver) -> None:
        settle(self)
        order.append("settled")

    phase = loop.PhaseClock.phase

    def begun(self: Any, name: str) -> Any:
        order.append(name)
        return phase(self, name)

    with mock.patch.object(Saver, "settle", settled), mock.patch.object(loop.PhaseClock, "phase", begun):
        train("train.steps=3", "optim.warmup_steps=1", "checkpoint.every=1")
    for at, what in enumerate(order):
        if what == "optimizer":
            assert order[at - 1] == "settled"


def test_held_and_durable_are_two_things(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that is slow holds no step where a save has time until the next one."""
    write = CheckpointStore.write

    def slowly(self: CheckpointStore, name: str, chunks: Any) -> int:
        time.sleep(1.0)
        return write(self, name, chunks)

    monkeypatch.setattr(CheckpointStore, "write", slowly)
    monkeypatch.setattr("faulttol.staged.saver.WriterProcess", InlineWriter)
    lines = train("train.steps=3", "optim.warmup_steps=1", "checkpoint.every=2")
    first = _of(lines, SavedLine)[0]
    assert first.step == 2 and first.seconds > 1.0 and first.held < first.seconds


def _fails_from(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Storage refuses the files of some steps, as a full disk does."""
    write = CheckpointStore.write

    def refuse(self: CheckpointStore, name: str, chunks: Any) -> int:
        if any(f"step-{step:010d}/" in name for step in steps):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, name, chunks)

    monkeypatch.setattr(CheckpointStore, "write", refuse)


def test_failed_saves_are_told_and_counted_and_training_goes_on(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fails_from(monkeypatch, 1, 2, 4)
    try:
        lines = train("train.steps=6", "checkpoint.every=1", "checkpoint.background=false")
    except Incomplete as error:
        pytest.fail(f"a failed save ended the run: {error}")
    failed = [(line.step, line.in_a_row) for line in _of(lines, SaveFailedLine)]
    assert failed == [(1, 1), (2, 2), (4, 1)], "a commit begins the count anew"
    assert all(
        "rank 0: " in line.error and "No space left" in line.error for line in _of(lines, SaveFailedLine)
    )
    assert [line.step for line in _of(lines, SavedLine)] == [3, 5, 6] and len(_steps(lines)) == 6


def test_the_last_save_must_succeed(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loop, "_SAVE_RETRY_SECONDS", (0.0, 0.0))
    _fails_from(monkeypatch, 6)
    with pytest.raises(Incomplete, match="step 6 was not saved to .* No space left"):
        train("train.steps=6", "checkpoint.every=2", "checkpoint.background=false")
    lines = read_from(RunPaths(tmp_path / "run").attempt(1).metrics, 0)[0]
    assert isinstance(lines[-1], SaveFailedLine), "it is told, and the run has no end line"


def test_the_last_save_is_tried_again(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_SAVE_RETRY_SECONDS", (0.0, 0.0))
    write, refused = CheckpointStore.write, []

    def twice(self: CheckpointStore, name: str, chunks: Any) -> int:
        if "step-0000000006/" in name and len(refused) < 2:
            refused.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, name, chunks)

    monkeypatch.setattr(CheckpointStore, "write", twice)
    try:
        lines = train("train.steps=6", "checkpoint.every=6", "checkpoint.background=false")
    except Incomplete as error:
        pytest.fail(f"it was given up: {error}")
    assert [line.in_a_row for line in _of(lines, SaveFailedLine)] == [1, 2]
    assert [line.step for line in _of(lines, SavedLine)] == [6] and isinstance(lines[-1], EndedLine)


def test_a_run_begins_where_another_stands_and_only_reads_it(train: Train, tmp_path: Path) -> None:
    whole = _steps(train("train.steps=6", folder="whole"))
    train("train.steps=4", folder="one")
    one = tmp_path / "one" / "checkpoints"
    before = sorted(path.name for path in one.rglob("*"))
    lines = train("train.steps=6", f"resume={one}", "checkpoint.every=1", "checkpoint.keep=1", folder="two")
    assert [line.loss for line in _steps(lines)] == [line.loss for line in whole[4:]]
    assert [line.step for line in _of(lines, ResumedLine)] == [4]
    assert sorted(path.name for path in one.rglob("*")) == before
    saved = newest(stored(str(tmp_path / "two" / "checkpoints")), SoloPeers())
    assert saved is not None and saved.step == 6
    assert [(row["run"], row["step"]) for row in saved.facts["lineage"]] == [("one", 4)]
    again = train("train.steps=7", f"resume={one}", attempt=2, folder="two")
    assert [line.step for line in _of(again, ResumedLine)] == [6], "its own checkpoints come first"


def test_a_damaged_checkpoint_is_named_by_what_begins_with_an_older_one(train: Train, tmp_path: Path) -> None:
    train("train.steps=4", "checkpoint.every=2", "checkpoint.keep=9")
    (path,) = (tmp_path / "run" / "checkpoints" / "step-0000000004").glob("*.r00000.*")
    path.write_bytes(path.read_bytes()[:-9])
    (resumed,) = _of(train("train.steps=6", attempt=2), ResumedLine)
    assert resumed.step == 2 and path.name in resumed.passed and resumed.passed.startswith("step 4: ")


def test_one_step_of_another_run_is_where_a_run_begins(train: Train, tmp_path: Path) -> None:
    train("train.steps=6", "checkpoint.every=2", "checkpoint.keep=9", folder="one")
    path = tmp_path / "one" / "checkpoints" / "step-0000000002"
    lines = train("train.steps=6", f"resume={path}", folder="two")
    assert [line.step for line in _of(lines, ResumedLine)] == [2]
    with pytest.raises(UserError, match="resume='.*nowhere' holds no checkpoint"):
        train("train.steps=6", f"resume={tmp_path / 'nowhere'}", folder="three")
    with pytest.raises(UserError, match="can't be resumed: train.seed was 1234 and is 7"):
        train("train.steps=6", f"resume={path}", "train.seed=7", folder="four")


class _Killed(Exception):
    """Stands where SIGKILL would: nothing of the run is put in order."""


def _killed_at(step: int) -> Any:
    """Ends a run at the beginning of a step."""
    rate = loop.learning_rate

    def end(optim: Any, index: int, steps: int) -> float:
        if index == step:
            raise _Killed
        return rate(optim, index, steps)

    return mock.patch.object(loop, "learning_rate", end)


MEMORY = ("train.steps=6", "checkpoint.every=4", "checkpoint.memory_every=1", "checkpoint.background=false")


def test_the_newest_snapshot_in_memory_is_what_the_next_attempt_begins_with(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGARAY_MEMORY", str(tmp_path / "memory"))
    whole = _steps(train("train.steps=6", folder="whole"))
    with pytest.raises(_Killed), _killed_at(5):
        train(*MEMORY)
    lines = train(*MEMORY, attempt=2)
    (resumed,) = _of(lines, ResumedLine)
    assert (resumed.step, resumed.facts["tier"], resumed.path) == (
        5,
        "memory",
        "memory://all/step-0000000005",
    )
    assert [line.loss for line in _steps(lines)] == [line.loss for line in whole[5:]], (
        "one step was lost, none is wrong"
    )
    saved = read_from(RunPaths(tmp_path / "run").attempt(1).metrics, 0)[0]
    told = [(line.step, line.tier) for line in _of(saved, SavedLine)]
    assert told == [(1, "memory"), (2, "memory"), (3, "memory"), (4, "memory"), (4, "store"), (5, "memory")]
    assert not [path for path in (tmp_path / "memory").rglob("*") if path.is_file()], (
        "the end gives memory back"
    )


def test_a_damaged_snapshot_is_passed_over_and_the_store_is_taken(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGARAY_MEMORY", str(tmp_path / "memory"))
    with pytest.raises(_Killed), _killed_at(5):
        train(*MEMORY)
    (file,) = (tmp_path / "memory").rglob("step-0000000005/*.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (resumed,) = _of(train(*MEMORY, attempt=2), ResumedLine)
    assert (resumed.step, resumed.facts["tier"]) == (4, "store")


def test_memory_that_led_to_the_same_end_twice_is_passed_over(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGARAY_MEMORY", str(tmp_path / "memory"))
    begun = []
    for attempt in (1, 2, 3):
        with pytest.raises(_Killed), _killed_at(5):
            train(*MEMORY, attempt=attempt)
        lines = read_from(RunPaths(tmp_path / "run").attempt(attempt).metrics, 0)[0]
        begun += [(line.step, line.facts.get("tier")) for line in _of(lines, ResumedLine)]
    assert begun == [(0, None), (5, "memory"), (5, "memory")]
    (resumed,) = _of(train(*MEMORY, attempt=4), ResumedLine)
    assert (resumed.step, resumed.facts["tier"]) == (4, "store")


# ---- when a save is due ----


def test_what_became_of_an_attempt_is_known_from_its_first_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day's steps behind them would be read for seconds, by the one rank that all others wait for."""
    begun = ResumedLine(0.0, 1, 40, "memory", "none", {"tier": "memory"})
    saves = [SavedLine(0.0, 1, step, "p", 1, 0.1) for step in (40, 50)]

    def lines(_path: Path) -> Iterator[MetricLine]:
        yield from (begun, *saves)
        raise AssertionError("read on")

    seen: list[Any] = []
    monkeypatch.setattr(checkpoints, "read_all", lines)
    monkeypatch.setattr(checkpoints.memory, "reason_to_skip_memory", seen.append)
    checkpoints._snapshots_passed_over(RankContext(0, 1, 0, 1, "127.0.0.1", 1, RunPaths(tmp_path), 3))
    assert seen == [[("memory", 40, True)] * 2]


def _schedule(tmp_path: Path, attempt: int = 1, **changes: Any) -> SaveSchedule:
    rank = RankContext(0, 1, 0, 1, "127.0.0.1", 0, RunPaths(tmp_path / "run"), attempt)
    return SaveSchedule(
        CheckpointConfig(every=10, interval="young_daly", mtbf_hours=1.0, budget=0.5, **changes), rank
    )


def test_the_interval_follows_what_saves_cost_and_how_often_the_run_fails(tmp_path: Path) -> None:
    schedule = _schedule(tmp_path)
    schedule.start(3)
    assert [schedule.due(step) for step in (12, 13)] == [False, True], (
        "the first interval is the configured one"
    )
    assert schedule.update_interval(13, SaveTimings(1.0, 0.0, 0.0, 0.0)) is None
    assert not schedule.due(22) and schedule.due(23)
    worst = SaveTimings(1.0, 0.5, 2.0, 1.0)
    want = interval(1.0, 0.5, 2.0, mtbf(1.0, 0, 1.0) * 3600, 0.5, 1, 1_000_000)
    assert schedule.update_interval(23, worst) == want.reason
    assert not schedule.due(22 + want.steps) and schedule.due(23 + want.steps)
    assert schedule.update_interval(23 + want.steps, worst) is None, "the same again isn't told"
    often = _schedule(tmp_path, attempt=9)
    often.start(0)
    often.update_interval(10, worst)
    fewer = interval(1.0, 0.5, 2.0, mtbf(1.0, 8, 1.0) * 3600, 0.5, 1, 1_000_000)
    assert fewer.steps < want.steps and often.due(10 + fewer.steps) and not often.due(9 + fewer.steps)


def test_a_run_under_young_daly_saves_and_ends(train: Train) -> None:
    lines = train("train.steps=9", "checkpoint.every=2", "checkpoint.interval=young_daly")
    steps = [line.step for line in _of(lines, SavedLine)]
    assert steps[0] == 2 and steps[-1] == 9
