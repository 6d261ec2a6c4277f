"""What is wrong with data is found before the queue, and again by the ranks; each in one line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from configs.errors import UserError
from tests.trainer.data.corpora import data_config, jsonl, prepared
from trainer.data import blocks, sources
from trainer.data import prepare as preparing
from trainer.data.prepare import check, prepare

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def _refused(path: Path | str | None, tmp_path: Path, match: str, vocab: int = 256, **settings: Any) -> str:
    """The one line that `check` and `prepare` both say."""
    with pytest.raises(UserError, match=match) as caught:
        check(data_config(path, **settings), vocab)
    with pytest.raises(UserError, match=match):
        prepare(data_config(path, **settings), vocab, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("hello")
    told = _refused(tmp_path / "corpse.txt", tmp_path, "data.path='.*corpse.txt' does not exist")
    assert "(did you mean 'corpus.txt'?)" in told
    assert "did you mean" not in _refused(tmp_path / "zzz", tmp_path, "does not exist")
    _refused(tmp_path / "no" / "such" / "folder", tmp_path, "does not exist")


@pytest.mark.parametrize("name", ["empty-folder", "*.nothing"])
def test_a_path_without_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty-folder").mkdir()
    _refused(tmp_path / name, tmp_path, "holds no files")


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b""), ("a.jsonl", b"\n\n"), ("a.jsonl", b'{"text": ""}\n')]
)
def test_empty_data(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    _refused(tmp_path / name, tmp_path, "data.path='.*' is empty; type a path with text in it")


def test_a_sequence_longer_than_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 99)
    told = _refused(tmp_path / "a.txt", tmp_path, "data.sequence=100 is longer", sequence=100)
    assert "(100 tokens in data.path=" in told and "set data.sequence to at most 99" in told
    assert len(prepared(tmp_path / "a.txt", tmp_path, sequence=99).tokens) == 100


def test_the_standard_library_is_named_when_it_is_too_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    _refused(None, tmp_path, "7 tokens in the standard library")


def test_a_malformed_line_has_its_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(["x"]) + '{"text": "broken\n')
    _refused(tmp_path / "a.jsonl", tmp_path, r"a.jsonl:2 is not JSON: .*each line must be one object")


@pytest.mark.parametrize("row", ['{"Text": "x", "id": 1}', '{"Text": "x", "id": 1, "text": 5}'])
def test_a_missing_field_names_those_there_are(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(row + "\n")
    told = _refused(tmp_path / "a.jsonl", tmp_path, "a.jsonl:1 has no text under data.text_field='text'")
    assert "it has: Text, id" in told


def test_a_row_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1, 2]\n")
    _refused(tmp_path / "a.jsonl", tmp_path, "a.jsonl:1 is an array, not an object")


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"texts": ["a"], "id": [1]}), tmp_path / "a.parquet")
    told = _refused(tmp_path / "a.parquet", tmp_path, "has no text under data.text_field='text'")
    assert "(did you mean 'texts'?); it has: texts, id" in told


def test_a_column_that_is_no_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    _refused(tmp_path / "a.parquet", tmp_path, "column data.text_field='text' is int64, not text")


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"hello world, this isn't it")
    _refused(tmp_path / "a.parquet", tmp_path, "a.parquet is not parquet")


@pytest.mark.parametrize("content", [b"plain text", gzip.compress(os.urandom(5000))[:3000]])
def test_a_file_that_is_no_gzip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt.gz").write_bytes(content)
    _refused(tmp_path / "a.txt.gz", tmp_path, "a.txt.gz can't be read: .*repair it")


@pytest.mark.parametrize("path", ["s4://bucket/x", "nonsense://x"])
def test_an_unknown_protocol(tmp_path: Path, path: str) -> None:
    _refused(path, tmp_path, f"data.path='{path}' can't be used: ")


def test_bytes_need_a_vocabulary_of_256(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    _refused(
        tmp_path / "a.txt", tmp_path, "model.vocab=100 is below the 256 ids.*set model.vocab=256", vocab=100
    )


def test_a_tokenizer_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    _refused(tmp_path / "a.txt", tmp_path, "data.tokenizer='nope.json' is not a file", tokenizer="nope.json")


def test_a_tokenizer_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    name = str(tmp_path / "tokenizer.json")
    _refused(tmp_path / "a.txt", tmp_path, "needs the package tokenizers; type `pip install", tokenizer=name)


def test_an_id_outside_of_the_vocabulary(tmp_path: Path, tokenizer: str) -> None:
    """A tokenizer may skip ids, so that the number of its words says less than its largest id."""
    (tmp_path / "a.txt").write_text("hello world")
    tree = json.loads(Path(tokenizer).read_text())
    tree["model"]["vocab"]["world"] = 1190
    Path(tokenizer).write_text(json.dumps(tree))
    _refused(tmp_path / "a.txt", tmp_path, "below the 1191 ids .*set model.vocab=1191", tokenizer=tokenizer)
    assert not list((tmp_path / "cache").rglob("tokens.bin"))


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    with pytest.raises(UserError, match="data.cache: can't write .*set data.cache to a folder you may write"):
        prepare(data_config(tmp_path / "a.txt", cache=str(tmp_path / "a.txt" / "x")), 256, tmp_path)


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("hello world")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="data.cache: can't write .*No space left"):
            prepare(data_config(tmp_path / "a.txt"), 256, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("meta.json")) and not list(tmp_path.rglob("tokens.bin"))
    # With room again, what was written is resumed.
    assert (
        prepare(data_config(tmp_path / "a.txt"), 256, tmp_path / "cache").tokens.tobytes() == b"hello world\0"
    )


def test_checking_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitting must not wait for the whole of a corpus to be read."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(jsonl(["hello world"] * 5000))
    read: list[str] = []
    cut = blocks.blocks

    def noted(source: sources.SourceFile, fields: blocks.Fields) -> Any:
        for block in cut(source, fields):
            read.append(source.path[-7])
            yield block

    monkeypatch.setattr(preparing, "blocks", noted)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    check(data_config(tmp_path / "*.jsonl", sequence=30), 256)
    assert read == ["a", "b"], (
        "one block of each file: its first rows are looked at, whatever is known by then"
    )


def test_checking_imports_no_torch() -> None:
    code = (
        "import sys; from configs.schema import DataConfig; from trainer.data.prepare import check;"
        "check(DataConfig(), 256); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- a Hugging Face tokenizer ----


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A word-level tokenizer in a file."""
    tokenizers: Any = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", "hello", "world", "</s>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_a_tokenizer_json(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(["hello world", "world there"]))
    store = prepared(tmp_path / "a.jsonl", tmp_path, vocab=4, tokenizer=tokenizer, sequence=2)
    assert store.tokens.tolist() == [1, 2, 3, 2, 0, 3]


def test_a_vocabulary_below_the_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    _refused(
        tmp_path / "a.txt", tmp_path, "is below the 4 ids .*set model.vocab=4", vocab=3, tokenizer=tokenizer
    )


def test_a_file_that_is_no_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    Path(tokenizer).write_text("{}")
    (tmp_path / "a.txt").write_text("hello world")
    _refused(tmp_path / "a.txt", tmp_path, "is not a tokenizer.json", tokenizer=tokenizer)
