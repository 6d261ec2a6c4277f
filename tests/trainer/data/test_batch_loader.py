"""What a rank is fed: its place's samples of each step, document masks, and held-out samples."""

from __future__ import annotations

from itertools import accumulate, groupby
from pathlib import Path

import pytest
import torch

from configs.compose import compose
from configs.schema import RunConfig
from trainer.batch_loader import BatchLoader
from trainer.engines.base import Batch, DataParallelRank
from trainer.optim.schedule import consumed_samples, global_batch_size

pytestmark = pytest.mark.dist

SEQUENCE = 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents shorter than a sample, each of a letter of its own."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(26):
        (folder / f"{number:02}.txt").write_text(chr(97 + number) * (5 + number))
    return folder


def _feed(text: Path, *words: str) -> tuple[RunConfig, BatchLoader]:
    config = compose([
        "experiment=smoke", f"data.path={text}", f"data.cache={text.parent / 'cache'}", f"data.sequence={SEQUENCE}",
        "train.micro_batch=2", "train.global_batch=8", "train.steps=6", "parallel.pp=1", *words,
    ])  # fmt: skip
    return config, BatchLoader.prepare(config, text.parent / "cache")


def _rows(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens_BS.tolist()]


@pytest.mark.parametrize("ahead", [0, 5])
@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_every_place_gets_its_samples_of_each_step(text: Path, begin: int, ahead: int, size: int) -> None:
    config, feed = _feed(text, "train.ramp_batch=4", "train.ramp_steps=3")
    for index in range(size):
        with feed.started(begin, ahead, DataParallelRank(index, size), CPU):
            for step in range(begin, 6):
                first = consumed_samples(config.train, step) + ahead
                passes = global_batch_size(config.train, step) // (2 * size)
                wanted = [
                    feed._sampler.sample(first + (micro * size + index) * 2 + row).tokens.tolist()
                    for micro in range(passes)
                    for row in range(2)
                ]
                assert _rows(feed.batches()) == wanted, (step, index)


def test_where_documents_lie_is_known_on_the_host(text: Path) -> None:
    """Counted token by token."""
    _, feed = _feed(text)
    seen = 0
    with feed.started(0, 0, DataParallelRank(0, 1), CPU):
        for batch in feed.batches():
            if batch.documents_BS is None:
                assert batch.packed is None
                continue
            lengths: list[int] = []
            for row in batch.documents_BS.tolist():
                lengths += [len(list(same)) for _, same in groupby(row)]
            assert batch.packed is not None and batch.packed.max_seqlen == max(lengths)
            assert batch.packed.cu_seqlens.tolist() == list(accumulate(lengths, initial=0))
            assert batch.packed.cu_seqlens.dtype == torch.int32
            seen += len(lengths) > len(batch.documents_BS)
    assert seen


def test_another_seed_gives_another_order(text: Path) -> None:
    orders = []
    for seed in (1, 1 + (1 << 40)):
        _, feed = _feed(text, f"train.seed={seed}")
        with feed.started(0, 0, DataParallelRank(0, 1), CPU):
            orders.append(_rows(feed.batches()))
    assert orders[0] != orders[1]


def test_batches_read_within_the_step_are_those_that_are_read_ahead(text: Path) -> None:
    """Nothing is read before it is asked for."""
    _, feed = _feed(text)
    with feed.started(1, 0, DataParallelRank(0, 1), CPU):
        wanted = [_rows(feed.batches()) for _ in range(3)]
    read, asked = feed._read, []
    feed._read = lambda step: asked.append(step) or read(step)  # type: ignore[method-assign, func-returns-value]
    with feed.started(1, 0, DataParallelRank(0, 1), CPU, ahead=False):
        for step in range(3):
            assert asked == list(range(1, step + 1))
            assert _rows(feed.batches()) == wanted[step]


@pytest.mark.parametrize("masked", [False, True])
def test_documents_are_told_where_they_are_masked(text: Path, masked: bool) -> None:
    _, feed = _feed(text, f"data.document_mask={str(masked).lower()}")
    with feed.started(0, 0, DataParallelRank(0, 1), CPU):
        batches = feed.batches()
    told = [batch for batch in batches if batch.documents_BS is not None]
    assert bool(told) == masked
    for batch in batches if masked else []:
        for row, tokens in enumerate(batch.tokens_BS.tolist()):
            found = [0] * SEQUENCE if batch.documents_BS is None else batch.documents_BS[row].tolist()
            assert found == [tokens[:place].count(0) for place in range(SEQUENCE)]


def test_validation_is_on_held_out_documents_and_always_the_same(text: Path) -> None:
    _, feed = _feed(text, "data.validation=0.4", "train.evaluate_every=2", "train.evaluate_samples=8")
    letters: dict[str, set[int]] = {}
    seen = []
    for index in range(2):
        with feed.started(0, 0, DataParallelRank(index, 2), CPU):
            letters.setdefault("train", set()).update(*_rows(feed.batches()))
            batches, samples = feed.validation()
            assert samples == 8 and len(_rows(batches)) == 4
            assert _rows(feed.validation()[0]) == _rows(batches)
            seen.append(_rows(batches))
            letters.setdefault("held", set()).update(*seen[-1])
    assert letters["held"] & letters["train"] == {0}
    assert seen[0] != seen[1]
    wanted = [feed._validation.sample(place).tokens.tolist() for place in range(8)]  # type: ignore[union-attr]
    assert sorted(seen[0] + seen[1]) == sorted(wanted)


def test_pipelines_get_validation_in_multiples_of_their_stages(text: Path) -> None:
    _, feed = _feed(text, "data.validation=0.4", "train.evaluate_every=2", "train.evaluate_samples=6",
                    "parallel.pp=4")  # fmt: skip
    batches, samples = feed.validation()
    assert len(batches) == 4 and samples == 8


def test_a_mixture_is_dealt_out_by_its_weights(text: Path, tmp_path: Path) -> None:
    config, _ = _feed(text)
    weights = {}
    for letter, weight in (("a", 0.75), ("z", 0.25)):
        (tmp_path / letter).write_text(letter * 400)
        weights[str(tmp_path / letter)] = weight
    data = config.data.model_copy(update={"path": None, "mixture": weights})
    feed = BatchLoader.prepare(config.model_copy(update={"data": data}), tmp_path / "cache")
    with feed.started(0, 0, DataParallelRank(0, 1), CPU):
        firsts = [row[0] if row[0] else row[1] for _ in range(5) for row in _rows(feed.batches())]
    assert firsts.count(ord("a")) == 30 and firsts.count(ord("z")) == 10
