"""Held-out documents, mixtures of corpora, what a checkpoint keeps of its data, and reading ahead."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import DataConfig
from trainer.data import streams
from trainer.data.prefetch import Prefetch
from trainer.data.prepare import check, prepare
from trainer.data.sampler import document_ids
from trainer.data.store import TokenStore, differences, fingerprint

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def _rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _texts(count: int, word: str = "text") -> list[str]:
    return [f"{word} {i} of a corpus" for i in range(count)]


def _prepare(home: Path, path: Path | None = None, vocab: int = 256, **settings: Any) -> TokenStore:
    data = DataConfig(path=None if path is None else str(path), **{"sequence": 8, **settings})
    check(data, vocab)
    return prepare(data, vocab, home / "cache")


def _split(stream: Any) -> list[str]:
    return stream.read(0, len(stream)).tobytes().decode().split("\0")[:-1]


# ---- validation ----


def test_without_validation_all_is_trained_on(tmp_path: Path) -> None:
    store = _prepare(tmp_path, _rows(tmp_path / "a.jsonl", _texts(50)))
    (part,) = store.parts
    assert part.validation is None and store.held == 0 and len(part.train) == store.count
    assert store.validation_sampler(DataConfig(sequence=8)) is None


def test_held_out_documents_are_whole_and_on_one_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = _texts(400)
    path = _rows(tmp_path / "a.jsonl", texts)
    for rows in (1 << 20, 7):
        monkeypatch.setattr(streams, "_ROWS", rows)
        store = _prepare(tmp_path, path, validation=0.2)
        (part,) = store.parts
        assert part.validation is not None
        train, held = _split(part.train), _split(part.validation)
        assert sorted(train + held) == sorted(texts) and not set(train) & set(held)
        assert train == [text for text in texts if text in set(train)], "in their order"
        assert len(held) == store.held and 50 < len(held) < 110, "80 by chance"


def test_a_document_is_on_the_same_side_in_every_corpus(tmp_path: Path) -> None:
    texts = _texts(200)
    first = _prepare(tmp_path, _rows(tmp_path / "a.jsonl", texts), validation=0.2).parts[0]
    other = _rows(tmp_path / "b.jsonl", [*_texts(100, "more"), *texts[::-1], *texts[:50]])
    second = _prepare(tmp_path, other, validation=0.2).parts[0]
    assert first.validation is not None and second.validation is not None
    held = set(_split(first.validation))
    assert held == set(_split(second.validation)) & set(texts)
    wider = _prepare(tmp_path, tmp_path / "a.jsonl", validation=0.4).parts[0]
    assert wider.validation is not None and held < set(_split(wider.validation))


def test_evaluation_draws_held_out_samples_whatever_the_seed(tmp_path: Path) -> None:
    data = DataConfig(path=str(_rows(tmp_path / "a.jsonl", _texts(200))), sequence=32, validation=0.2)
    store = prepare(data, 256, tmp_path / "cache")
    held = store.parts[0].validation
    sampler = store.validation_sampler(data)
    assert sampler is not None and held is not None
    ring = held.read(0, len(held) + 33).tobytes()
    for position in range(2 * sampler.samples[0]):
        assert sampler.sample(position).tokens.tobytes() in ring
    train = store.train_sampler(data, 1)
    assert train.samples[0] + sampler.samples[0] in range(store.count // 32 - 1, store.count // 32 + 3)


@pytest.mark.parametrize(
    ("texts", "settings", "told"),
    [
        (["one text alone"], {}, "can't split the 1 document of data.path=.*give more files, or rows"),
        (_texts(9), {"validation": 1e-9}, "holds out none of the 9 documents of data.path=.*; set it to 0.[0-9]+ or more"),
        (_texts(9), {"validation": 0.999}, "would hold out all 9 documents .*; set it below 0.9"),
        (_texts(30), {"sequence": 256}, "the documents held out .* are [0-9]+ tokens, less than one sample of data.seq"),
    ],
)  # fmt: skip
def test_a_share_that_cannot_be_held_out(
    tmp_path: Path, texts: list[str], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told) as caught:
        _prepare(tmp_path, _rows(tmp_path / "a.jsonl", texts), **{"validation": 0.1, **settings})
    assert "\n" not in str(caught.value)


def test_the_share_that_is_proposed_holds_something_out(tmp_path: Path) -> None:
    path = _rows(tmp_path / "a.jsonl", _texts(9))
    with pytest.raises(UserError) as caught:
        _prepare(tmp_path, path, validation=1e-9)
    share = float(str(caught.value).rpartition("set it to ")[2].split()[0])
    assert _prepare(tmp_path, path, validation=share).held >= 1


# ---- mixtures ----


def test_a_mixture_of_corpora(tmp_path: Path) -> None:
    paths = [_rows(tmp_path / f"{name}.jsonl", _texts(60, name)) for name in ("b", "a")]
    weights = {str(paths[0]): 3.0, str(paths[1]): 1.0}
    store = _prepare(tmp_path, mixture=weights, validation=0.2)
    assert [(Path(str(part.path)).name, part.weight) for part in store.parts] == [
        ("a.jsonl", 1.0),
        ("b.jsonl", 3.0),
    ]
    assert store.documents == 120 and store.separator == 0
    assert store.count == sum(len(part.tokens) for part in store.parts)
    with pytest.raises(ValueError):
        _ = store.tokens
    data = DataConfig(mixture=weights, sequence=8)
    sampler = store.train_sampler(data, 1)
    drawn = [sampler.sample(i).part for i in range(400)]
    assert drawn.count(0) == 100 and sampler.counts(400) == [100, 300]
    evaluation = store.validation_sampler(data)
    assert evaluation is not None and evaluation.counts(8) == [2, 6]
    # Each corpus is prepared by itself, so alone or in another mixture it is found again.
    assert _prepare(tmp_path, paths[0]).folder == store.parts[1].folder
    swapped = _prepare(tmp_path, mixture=dict(reversed(weights.items())), validation=0.2)
    assert [part.path for part in swapped.parts] == [part.path for part in store.parts]


def test_a_mistake_in_a_mixture_names_it(tmp_path: Path) -> None:
    good = str(_rows(tmp_path / "a.jsonl", _texts(9)))
    with pytest.raises(UserError, match="data.mixture='.*/aa.jsonl' does not exist .did you mean 'a.jsonl'"):
        _prepare(tmp_path, mixture={good: 1.0, str(tmp_path / "aa.jsonl"): 1.0})
    (tmp_path / "b.txt").write_text("short")
    with pytest.raises(
        UserError, match="data.sequence=8 is longer than the data .6 tokens in data.mixture='.*b.txt'"
    ):
        _prepare(tmp_path, mixture={good: 1.0, str(tmp_path / "b.txt"): 1.0})


def test_a_mixture_of_other_separators(tmp_path: Path) -> None:
    from tests.trainer.data.test_indexed import made

    with pytest.raises(UserError, match="data.mixture: its corpora end documents with different ids"):
        _prepare(
            tmp_path, mixture={str(_rows(tmp_path / "a.jsonl", _texts(9))): 1.0, str(made(tmp_path)): 1.0}
        )


# ---- what a checkpoint keeps ----


@pytest.fixture
def same(tmp_path: Path) -> tuple[dict[str, Any], DataConfig]:
    data = DataConfig(path=str(_rows(tmp_path / "a.jsonl", _texts(60))), sequence=8)
    return fingerprint(prepare(data, 256, tmp_path / "cache"), data), data


def test_the_same_data_has_no_differences(tmp_path: Path, same: tuple[dict[str, Any], DataConfig]) -> None:
    kept, _ = same
    assert json.loads(json.dumps(kept)) == kept and differences(kept, kept) == []
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "a.jsonl").rename(moved)
    data = DataConfig(path=str(moved), sequence=8)
    assert differences(kept, fingerprint(prepare(data, 256, tmp_path / "cache"), data)) == [], "corpora move"


def _replaced(path: Path, data: DataConfig) -> DataConfig:
    _rows(path, _texts(70))
    return data


CHANGES: list[tuple[Callable[[Path, DataConfig], DataConfig], str]] = [
    (_replaced, "data.path='.*a.jsonl': 1190 tokens in 60 documents then, 1390 .* in 70 documents now, other content"),
    (lambda path, data: data.model_copy(update={"sequence": 16}), "data.sequence: 8 then, 16 now"),
    (lambda path, data: data.model_copy(update={"validation": 0.5}), "data.validation: 0.0 then, 0.5 now"),
    (lambda path, data: data.model_copy(update={"document_mask": False}), "data.document_mask: True then, False now"),
    (lambda path, data: data.model_copy(update={"tokenizer": "T"}), "data.tokenizer: tokenizer bytes then, .* now, for"),
    (
        lambda path, data: data.model_copy(update={"path": None, "mixture": {str(path): 1.0, str(path) + "*": 2.0}}),
        "data.mixture: 1 corpora then, 2 now",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=range(len(CHANGES)))
def test_a_difference_is_named(
    tmp_path: Path, same: tuple[dict[str, Any], DataConfig], change: Any, told: str
) -> None:
    import re

    from tests.trainer.data.test_tokenizer import bpe

    kept, data = same
    data = change(tmp_path / "a.jsonl", data)
    if data.tokenizer == "T":
        data = data.model_copy(update={"tokenizer": bpe(tmp_path)})
    now = fingerprint(prepare(data, 400, tmp_path / "cache"), data)
    found = differences(kept, now)
    assert len(found) == 1 and re.search(told, found[0]), found


def test_other_weights_are_named(tmp_path: Path) -> None:
    paths = [str(_rows(tmp_path / f"{name}.jsonl", _texts(60, name))) for name in "ab"]
    kept = []
    for weights in ((1.0, 1.0), (2.0, 2.0), (1.0, 3.0)):
        data = DataConfig(mixture=dict(zip(paths, weights, strict=True)), sequence=8)
        kept.append(fingerprint(prepare(data, 256, tmp_path / "cache"), data))
    assert differences(kept[0], kept[1]) == [], "the same shares"
    first, second = differences(kept[0], kept[2])
    assert (
        first.startswith("data.mixture: share 0.5 then, 0.25 now, for data.mixture=") and "0.75 now" in second
    )


def test_the_way_from_text_to_evaluation(tmp_path: Path) -> None:
    """As a trainer goes it."""
    data = DataConfig(path=str(_rows(tmp_path / "a.jsonl", _texts(300))), sequence=64, validation=0.1)
    check(data, 256)
    store = prepare(data, 256, tmp_path / "cache")
    sampler, evaluation = store.train_sampler(data, seed=7), store.validation_sampler(data)
    batch = sampler.batch(first=40, micro=1, micro_batch=2, dp_rank=1, dp=2)
    assert batch.shape == (2, 65) and batch.dtype == np.int64
    wanted = [sampler.sample(40 + (1 * 2 + 1) * 2 + i).tokens for i in range(2)]
    assert np.array_equal(batch, np.stack(wanted))
    found = document_ids(batch, store.separator)
    assert found is not None and found.shape == (2, 64) and found.max() >= 2
    assert evaluation is not None and evaluation.batch(0, 0, 2, 0, 1).shape == (2, 65)


def test_nothing_here_needs_torch() -> None:
    code = (
        "import sys, pathlib, importlib; import trainer.data as d;"
        "[importlib.import_module(f'trainer.data.{p.stem}') for p in pathlib.Path(d.__file__).parent.glob('*.py')];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- reading ahead ----


def test_reading_ahead_gives_what_a_loop_gives() -> None:
    for ahead in (1, 3):
        with Prefetch(lambda key: key * key, range(50), ahead) as found:
            assert list(found) == [key * key for key in range(50)]
            assert list(found) == []


def test_reading_ahead_is_bounded_and_overlaps() -> None:
    begun: list[int] = []
    read = threading.Semaphore(0)

    def note(key: int) -> int:
        begun.append(key)
        read.release()
        return key

    with Prefetch(note, range(100), 2) as found:
        results = iter(found)
        for _ in range(2):
            assert read.acquire(timeout=20)
        assert begun == [0, 1] and not read.acquire(timeout=0.05), "two wait, and no more"
        assert next(results) == 0
        assert read.acquire(timeout=20), "the next is read while this one is used"
        assert begun == [0, 1, 2]
    assert begun == [0, 1, 2] and not _threads()


def test_a_mistake_comes_up_where_its_result_would() -> None:
    def half(key: int) -> float:
        return 6 / (3 - key)

    seen = []
    with pytest.raises(ZeroDivisionError), Prefetch(half, range(9)) as found:
        for one in found:
            seen.append(one)
    assert seen == [2.0, 3.0, 6.0] and not _threads()


def test_leaving_ends_the_thread_though_keys_never_end() -> None:
    def forever() -> Iterator[int]:
        while True:
            yield 1

    with Prefetch(lambda key: key, forever()) as found:
        assert next(iter(found)) == 1
    assert not _threads()
    with Prefetch(lambda key: key, forever()):
        pass
    assert not _threads()


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data"]
