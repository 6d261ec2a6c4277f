"""Text to tokens: every source, every mistake, and once for all ranks."""

from __future__ import annotations

import gzip
import json
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

from configs.errors import UserError
from configs.schema import DataConfig
from trainer.data import prepare as preparing
from trainer.data import sources
from trainer.data.prepare import TokenStore, check, prepare

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

TEXTS = ["The first one.", "Zweitens: ä, ö, ü.", "And a third,\nof two lines."]
WANTED = b"".join(text.encode() + b"\0" for text in TEXTS)


def _config(path: Path | str | None, **settings: Any) -> DataConfig:
    return DataConfig(path=None if path is None else str(path), **{"sequence": 8, **settings})


def _prepare(path: Path | str | None, home: Path, vocab: int = 256, **settings: Any) -> TokenStore:
    check(_config(path, **settings), vocab)
    return prepare(_config(path, **settings), vocab, home / "cache")


def _rows(texts: list[str], field: str = "text") -> str:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))


# ---- sources ----


def test_the_standard_library_is_the_default(tmp_path: Path) -> None:
    store = _prepare(None, tmp_path)
    assert store.tokens.dtype == np.uint8 and len(store.tokens) > 5_000_000 and store.documents > 500
    assert int((store.tokens == 0).sum()) == store.documents, "a zero byte between documents and nowhere else"
    files = sources.find(_config(None))
    assert [f.path for f in files] == sorted(f.path for f in files)
    assert all(f.path.endswith(".py") and "-packages" not in f.path for f in files)
    first = Path(files[0].path).read_bytes()
    assert files[0].path.startswith(sysconfig.get_path("stdlib"))
    assert store.tokens[: len(first)].tobytes() == first.replace(b"\0", b"")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world, hello")
    store = _prepare(tmp_path / "a.txt", tmp_path)
    assert store.tokens.tobytes() == b"hello world, hello\0" and store.documents == 1


def test_zero_bytes_in_a_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"hello\0 world")
    assert _prepare(tmp_path / "a.txt", tmp_path).tokens.tobytes() == b"hello world\0"


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(_rows(TEXTS) + "\n")
    store = _prepare(tmp_path / name, tmp_path)
    assert store.tokens.tobytes() == WANTED and store.documents == 3


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_jsonl_gzipped(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(_rows(TEXTS).encode()))
    assert _prepare(tmp_path / name, tmp_path).tokens.tobytes() == WANTED


def test_text_gzipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello world"))
    assert _prepare(tmp_path / "a.txt.gz", tmp_path).tokens.tobytes() == b"hello world\0"


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_parquet(tmp_path: Path, kind: Any) -> None:
    values: list[Any] = [t.encode() for t in TEXTS] if kind == pyarrow.binary() else list(TEXTS)
    column = pyarrow.array([*values, None, values[0][:0]], type=kind)
    table = pyarrow.table({"id": list(range(5)), "body": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    store = _prepare(tmp_path / "a.parquet", tmp_path, text_field="body")
    assert store.tokens.tobytes() == WANTED and store.documents == 3


def test_a_folder_is_read_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "ab").write_text("not this")
    (folder / ".hidden").write_text("nor this")
    (folder / "b.md").write_text("beta beta")
    (folder / "sub" / "c.py").write_text("gamma")
    (folder / "a.jsonl").write_text(_rows(["alpha"]))
    assert _prepare(folder, tmp_path).tokens.tobytes() == b"alpha\0beta beta\0gamma\0"


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "a.txt").write_text("hello world")
    assert _prepare(tmp_path / ".data", tmp_path).documents == 1


def test_a_glob(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt"):
        (tmp_path / name).write_text(f"this is {name}")
    assert _prepare(tmp_path / "a*.txt", tmp_path).tokens.tobytes() == b"this is a1.txt\0this is a2.txt\0"


def test_a_url(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("hello world")
    assert _prepare(f"file://{tmp_path}/a b.txt", tmp_path).documents == 1
    with fsspec.open("memory://corpus/a.txt", "wb") as file:
        file.write(b"hello memory")
    assert _prepare("memory://corpus", tmp_path).tokens.tobytes() == b"hello memory\0"
    fsspec.filesystem("memory").store.clear()


def test_a_long_file_is_read_in_parts_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"".join(b"line %d of many\n" % i for i in range(200)) + b"x" * 300 + b"\nthe end"
    (tmp_path / "a.txt").write_bytes(text)
    monkeypatch.setattr(sources, "_CHUNK", 64)
    (source,) = sources.find(_config(tmp_path / "a.txt"))
    parts = list(sources.documents(source, "text"))
    assert len(parts) > 20 and max(len(part) for part, _ in parts) < 400
    assert [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]
    assert all(part.endswith(b"\n") for part, _ in parts[:40])
    assert _prepare(tmp_path / "a.txt", tmp_path).tokens.tobytes() == text + b"\0"


# ---- the cache ----


def test_tokens_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    first = _prepare(tmp_path / "a.txt", tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(preparing, "_write", never)
    again = _prepare(tmp_path / "a.txt", tmp_path, sequence=4)
    assert again.folder == first.folder and again.tokens.tobytes() == first.tokens.tobytes()


def test_a_changed_file_is_prepared_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello world")
    first = _prepare(path, tmp_path)
    path.write_text("jello world")
    os.utime(path, (1, 1))
    second = _prepare(path, tmp_path)
    assert second.folder != first.folder and second.tokens.tobytes() == b"jello world\0"


@pytest.mark.parametrize("damage", ["short", "gone", "no meta", "bad meta", "left over"])
def test_a_cache_that_is_not_whole_is_prepared_again(tmp_path: Path, damage: str) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    folder = _prepare(tmp_path / "a.txt", tmp_path).folder
    match damage:
        case "short":
            (folder / "tokens.bin").write_bytes(b"hell")
        case "gone":
            (folder / "tokens.bin").unlink()
        case "no meta":
            (folder / "meta.json").unlink()
        case "bad meta":
            (folder / "meta.json").write_text("{")
        case "left over":
            (folder / "meta.json").unlink()
            (folder / ".tokens.bin.ab.tmp").write_bytes(b"x" * 99)
    assert _prepare(tmp_path / "a.txt", tmp_path).tokens.tobytes() == b"hello world\0"
    assert sorted(p.name for p in folder.iterdir()) == ["lock", "meta.json", "tokens.bin"]


_RANK = """
import sys, time
from pathlib import Path
from configs.schema import DataConfig
from trainer.data import prepare as p
notes, write = Path(sys.argv[2]), p._write
def note(word):
    with notes.open("a") as file:
        file.write(word)
def noted(folder, *rest):
    note("wrote ")
    while notes.read_text().count("here") < 4:
        time.sleep(0.01)
    time.sleep(0.1)  # the others are past their note: at the lock, or in here too where it doesn't hold them
    write(folder, *rest)
p._write = noted
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
    store = _prepare(tmp_path / "a.txt", tmp_path, cache=str(tmp_path / "mine"))
    assert store.folder.parent == tmp_path / "mine" and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("vocab", "kind"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_tokens_are_as_wide_as_the_vocabulary_asks(tmp_path: Path, vocab: int, kind: str) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    store = _prepare(tmp_path / "a.txt", tmp_path, vocab=vocab)
    assert store.tokens.dtype.name == kind and store.tokens.tolist() == [*b"hello world", 0]


# ---- mistakes ----


def _refused(path: Path | str | None, tmp_path: Path, match: str, vocab: int = 256, **settings: Any) -> str:
    """The one line that `check` and `prepare` both say."""
    with pytest.raises(UserError, match=match) as caught:
        check(_config(path, **settings), vocab)
    with pytest.raises(UserError, match=match):
        prepare(_config(path, **settings), vocab, tmp_path / "cache")
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
    assert len(_prepare(tmp_path / "a.txt", tmp_path, sequence=99).tokens) == 100


def test_the_standard_library_is_named_when_it_is_too_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    _refused(None, tmp_path, "7 tokens in the standard library")


def test_a_malformed_line_has_its_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(_rows(["x"]) + '{"text": "broken\n')
    _refused(tmp_path / "a.jsonl", tmp_path, r"a.jsonl:2 is not JSON: .*each line must be one object")


@pytest.mark.parametrize("row", ['{"Text": "x", "id": 1}', '{"Text": "x", "id": 1, "text": 5}'])
def test_a_missing_field_names_those_there_are(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(row + "\n")
    told = _refused(tmp_path / "a.jsonl", tmp_path, "a.jsonl:1 has no text under data.text_field='text'")
    assert "it has: Text, id" in told


def test_a_row_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1, 2]\n")
    _refused(tmp_path / "a.jsonl", tmp_path, "a.jsonl:1 has no text .*it has: no keys")


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
    _refused(tmp_path / "a.txt.gz", tmp_path, "a.txt.gz can't be read: .*mend it")


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
    _refused(tmp_path / "a.txt", tmp_path, "data.tokenizer='nope.json' is no file", tokenizer="nope.json")


def test_a_tokenizer_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    name = str(tmp_path / "tokenizer.json")
    _refused(tmp_path / "a.txt", tmp_path, "needs the package tokenizers; type `pip install", tokenizer=name)


def test_an_id_outside_of_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer may skip ids, so that its size says less than its largest."""
    (tmp_path / "a.txt").write_text("hello world")

    def sparse(name: str, vocab: int) -> tuple[preparing.Encode, int]:
        return lambda text: np.frombuffer(text, dtype=np.uint8).astype(np.int64) * 10, 0

    monkeypatch.setattr(preparing, "_tokenizer", sparse)
    with pytest.raises(
        UserError, match="model.vocab=256 is too small .* gives the id 1190; set model.vocab=1191"
    ):
        prepare(_config(tmp_path / "a.txt"), 256, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("tokens.bin"))


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    with pytest.raises(UserError, match="data.cache: can't write .*set data.cache to a folder you may write"):
        prepare(_config(tmp_path / "a.txt", cache=str(tmp_path / "a.txt" / "x")), 256, tmp_path)


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("hello world")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="data.cache: can't write .*No space left"):
        prepare(_config(tmp_path / "a.txt"), 256, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()] == ["lock"]


def test_checking_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitting must not wait for the whole of a corpus to be read."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(_rows(["hello world"] * 50))
    read: list[str] = []
    documents = sources.documents

    def noted(source: sources.Source, field: str) -> Any:
        for part in documents(source, field):
            read.append(source.path)
            yield part

    monkeypatch.setattr(preparing, "documents", noted)
    check(_config(tmp_path / "*.jsonl", sequence=30), 256)
    assert len(read) == 3


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
    (tmp_path / "a.jsonl").write_text(_rows(["hello world", "world there"]))
    store = _prepare(tmp_path / "a.jsonl", tmp_path, vocab=4, tokenizer=tokenizer, sequence=2)
    assert store.tokens.tolist() == [1, 2, 3, 2, 0, 3]


def test_a_vocabulary_below_the_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    _refused(
        tmp_path / "a.txt", tmp_path, "is below the 4 ids .*set model.vocab=4", vocab=3, tokenizer=tokenizer
    )


def test_a_file_that_is_no_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    Path(tokenizer).write_text("{}")
    (tmp_path / "a.txt").write_text("hello world")
    _refused(tmp_path / "a.txt", tmp_path, "is no tokenizer.json", tokenizer=tokenizer)
