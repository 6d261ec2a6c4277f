"""Text to tokens: every source, and once for all ranks."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.trainer.data.corpora import TEXTS, WANTED, WHOLE, jsonl, prepared
from trainer.data import blocks, indexed, sources
from trainer.data import prepare as preparing

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


# ---- sources ----


def test_the_standard_library_is_the_default(tmp_path: Path) -> None:
    store = prepared(None, tmp_path)
    assert store.tokens.dtype == np.uint8 and len(store.tokens) > 5_000_000 and store.documents > 500
    assert int((store.tokens == 0).sum()) == store.documents, "a zero byte between documents and nowhere else"
    files = sources.resolve(None).sources
    assert [f.path for f in files] == sorted(f.path for f in files)
    assert all(f.path.endswith(".py") and "-packages" not in f.path for f in files)
    first = Path(files[0].path).read_bytes()
    assert files[0].path.startswith(sysconfig.get_path("stdlib"))
    assert store.tokens[: len(first)].tobytes() == first.replace(b"\0", b"")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world, hello")
    store = prepared(tmp_path / "a.txt", tmp_path)
    assert store.tokens.tobytes() == b"hello world, hello\0" and store.documents == 1


def test_zero_bytes_that_jsonl_spells_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(["hello\0 world\0", "\0", "more"]))
    store = prepared(tmp_path / "a.jsonl", tmp_path)
    assert store.tokens.tobytes() == b"hello world\0more\0" and store.documents == 2
    assert any(note.startswith("3 zero bytes in texts were left out") for note in store.notes)
    assert any(note.startswith("1 of the texts are empty") for note in store.notes)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(jsonl(TEXTS) + "\n")
    store = prepared(tmp_path / name, tmp_path)
    assert store.tokens.tobytes() == WANTED and store.documents == 3


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_jsonl_gzipped(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(jsonl(TEXTS).encode()))
    assert prepared(tmp_path / name, tmp_path).tokens.tobytes() == WANTED


def test_text_gzipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello world"))
    assert prepared(tmp_path / "a.txt.gz", tmp_path).tokens.tobytes() == b"hello world\0"


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_parquet(tmp_path: Path, kind: Any) -> None:
    values: list[Any] = [t.encode() for t in TEXTS] if kind == pyarrow.binary() else list(TEXTS)
    column = pyarrow.array([*values, None, values[0][:0]], type=kind)
    table = pyarrow.table({"id": list(range(5)), "body": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    store = prepared(tmp_path / "a.parquet", tmp_path, text_field="body")
    assert store.tokens.tobytes() == WANTED and store.documents == 3


def test_a_folder_is_read_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "ab").write_text("not this")
    (folder / ".hidden").write_text("nor this")
    (folder / "b.md").write_text("beta beta")
    (folder / "sub" / "c.py").write_text("gamma")
    (folder / "a.txt").write_text("alpha")
    assert prepared(folder, tmp_path).tokens.tobytes() == b"alpha\0beta beta\0gamma\0"


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "a.txt").write_text("hello world")
    assert prepared(tmp_path / ".data", tmp_path).documents == 1


def test_a_glob(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt"):
        (tmp_path / name).write_text(f"this is {name}")
    assert prepared(tmp_path / "a*.txt", tmp_path).tokens.tobytes() == b"this is a1.txt\0this is a2.txt\0"


def test_a_url(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("hello world")
    assert prepared(f"file://{tmp_path}/a b.txt", tmp_path).documents == 1
    with fsspec.open("memory://corpus/a.txt", "wb") as file:
        file.write(b"hello memory")
    assert prepared("memory://corpus", tmp_path).tokens.tobytes() == b"hello memory\0"
    fsspec.filesystem("memory").store.clear()


def test_a_long_file_is_read_in_parts_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"".join(b"line %d of many\n" % i for i in range(200)) + b"x" * 300 + b"\nthe end"
    (tmp_path / "a.txt").write_bytes(text)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    (source,) = sources.resolve(str(tmp_path / "a.txt")).sources
    parts = list(blocks.blocks(source, blocks.Fields("text", None)))
    assert len(parts) > 20 and max(len(part.data) for part in parts) < 400
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(part.data.endswith(b"\n") for part in parts[:40])
    assert prepared(tmp_path / "a.txt", tmp_path).tokens.tobytes() == text + b"\0"


@pytest.mark.parametrize("start", ["", " "], ids=["no space", "one in front"])
def test_a_text_without_a_space_is_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    text = start + "漢字かなé𝄞" * 90
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    (source,) = sources.resolve(str(tmp_path / "a.txt")).sources
    parts = list(blocks.blocks(source, blocks.Fields("text", None)))
    assert len(parts) > 10 and all(part.data for part in parts)
    assert "".join(part.data.decode() for part in parts) == text


# ---- the cache ----


def test_tokens_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    first = prepared(tmp_path / "a.txt", tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(preparing, "build", never)
    again = prepared(tmp_path / "a.txt", tmp_path, sequence=4)
    assert again.folder == first.folder and again.tokens.tobytes() == first.tokens.tobytes()


def test_a_changed_file_is_prepared_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello world")
    first = prepared(path, tmp_path)
    path.write_text("jello world")
    os.utime(path, (1, 1))
    second = prepared(path, tmp_path)
    assert second.folder != first.folder and second.tokens.tobytes() == b"jello world\0"


def test_a_changed_file_of_as_many_bytes_is_prepared_again_behind_a_url(tmp_path: Path) -> None:
    found = []
    for text in (b"hello world", b"jello world"):
        with fsspec.open("memory://corpus/a.txt", "wb") as file:
            file.write(text)
        found += [
            prepared(url, tmp_path).tokens.tobytes() for url in ("memory://corpus/a.txt", "memory://corpus")
        ]
    fsspec.filesystem("memory").store.clear()
    assert found == [b"hello world\0"] * 2 + [b"jello world\0"] * 2


@pytest.mark.parametrize(
    "mark",
    [
        {"mtime": 1.5}, {"ETag": "x"}, {"LastModified": "x"}, {"etag": "x"}, {"last_modified": "x"},
        {"Last-Modified": "x"}, {"modificationTime": 3}, {"modify": "x"}, {"blob_id": "x"}, {"sha": "x"},
    ],
    ids=lambda mark: next(iter(mark)),
)  # fmt: skip
def test_what_a_file_system_says_of_a_change_is_in_the_stamp(mark: dict[str, Any]) -> None:
    info = {"name": "a", "size": 9, "type": "file"}
    assert sources._source(None, info | mark).stamp != sources._source(None, info).stamp


@pytest.mark.parametrize(
    "damage", ["short", "gone", "no meta", "bad meta", "left over", "no index", "short hashes"]
)
def test_a_cache_that_is_not_whole_is_prepared_again(tmp_path: Path, damage: str) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    folder = prepared(tmp_path / "a.txt", tmp_path).folder
    match damage:
        case "short":
            (folder / "tokens.bin").write_bytes(b"hell")
        case "gone":
            (folder / "tokens.bin").unlink()
        case "no meta":
            (folder / "meta.json").unlink()
        case "bad meta":
            (folder / "meta.json").write_text("{")
        case "no index":
            (folder / "tokens.idx").unlink()
        case "short hashes":
            (folder / "tokens.hash").write_bytes(b"1234")
        case "left over":
            (folder / "meta.json").unlink()
            (folder / ".tokens.bin.ab.tmp").write_bytes(b"x" * 99)
    assert prepared(tmp_path / "a.txt", tmp_path).tokens.tobytes() == b"hello world\0"
    assert sorted(p.name for p in folder.iterdir()) == WHOLE


_RANK = """
import sys, time
from pathlib import Path
from configs.schema import DataConfig
from trainer.data import prepare as p
notes, write = Path(sys.argv[2]), p.build
def note(word):
    with notes.open("a") as file:
        file.write(word)
def noted(job):
    note("wrote ")
    while notes.read_text().count("here") < 4:
        time.sleep(0.01)
    time.sleep(0.1)  # the others are past their note: at the lock, or in here too where it doesn't hold them
    write(job)
p.build = noted
note("here ")
print(len(p.prepare(DataConfig(path=sys.argv[1], sequence=8), 256, Path(sys.argv[3])).tokens))
"""


def test_many_ranks_at_once_prepare_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"hello world " * 100_000)
    words = [str(tmp_path / name) for name in ("a.txt", "notes", "cache")]
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, *words], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [rank.communicate()[0] for rank in ranks] == ["1200001\n"] * 4
    assert (tmp_path / "notes").read_text().split().count("wrote") == 1


def test_the_cache_setting_wins(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    store = prepared(tmp_path / "a.txt", tmp_path, cache=str(tmp_path / "mine"))
    assert store.folder.parent == tmp_path / "mine" and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("ids", "kind"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")]
)
def test_tokens_are_as_wide_as_the_tokenizer_asks(ids: int, kind: str) -> None:
    assert indexed.smallest_dtype(ids).name == kind


def test_models_with_other_vocabularies_share_the_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    first, second = (prepared(tmp_path / "a.txt", tmp_path, vocab=vocab) for vocab in (256, 70_000))
    assert first.folder == second.folder and second.tokens.tolist() == [*b"hello world", 0]
