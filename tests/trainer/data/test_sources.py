"""What a file is by its content, what a folder's data is, and every input that is refused, in one line each."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from configs.errors import UserError
from configs.schema import DataConfig
from trainer.data import blocks, sources
from trainer.data.prepare import check, prepare
from trainer.data.store import TokenStore

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

TEXTS = ["The first one.", "Zweitens: ä, ö, ü.", "And a third,\nof two lines."]
WANTED = b"".join(text.encode() + b"\0" for text in TEXTS)
ROWS = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def _zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".zst": _zstd, ".xz": lzma.compress, ".bz2": bz2.compress,
}  # fmt: skip


def _config(path: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(path=str(path), **{"sequence": 8, **settings})


def _prepare(path: Path | str, home: Path, **settings: Any) -> TokenStore:
    check(_config(path, **settings), 256)
    return prepare(_config(path, **settings), 256, home / "cache")


def _parquet(column: Any, **more: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column, **more}), file)
    return file.getvalue()


# ---- packed ----


@pytest.mark.parametrize("end", PACKERS)
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ROWS), ("a.txt", b"The first one.")])
def test_packed_files_are_read(tmp_path: Path, end: str, name: str, content: bytes) -> None:
    (tmp_path / f"{name}{end}").write_bytes(PACKERS[end](content))
    wanted = WANTED if content == ROWS else b"The first one.\0"
    assert _prepare(tmp_path / f"{name}{end}", tmp_path).tokens.tobytes() == wanted


@pytest.mark.parametrize("end", PACKERS)
def test_a_packed_file_is_known_by_its_content(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(PACKERS[end](ROWS))
    assert _prepare(tmp_path / "a.jsonl", tmp_path).tokens.tobytes() == WANTED


def test_packed_files_of_several_frames(tmp_path: Path) -> None:
    """As `cat a.zst b.zst` and parallel packers make them."""
    for end, pack in PACKERS.items():
        (tmp_path / f"a.jsonl{end}").write_bytes(b"".join(pack(line + b"\n") for line in ROWS.splitlines()))
        assert _prepare(tmp_path / f"a.jsonl{end}", tmp_path).tokens.tobytes() == WANTED


@pytest.mark.parametrize("end", PACKERS)
def test_a_packed_file_that_is_cut_short_is_refused(tmp_path: Path, end: str) -> None:
    noise = "".join(random.Random(1).choices("abcdefgh ", k=60_000))
    whole = PACKERS[end](json.dumps({"text": noise}).encode())
    (tmp_path / f"a.jsonl{end}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="a.jsonl.* can't be read: .*repair it or leave it out"):
        check(_config(tmp_path / f"a.jsonl{end}"), 256)


def test_bytes_order_marks_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello world")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + ROWS)
    assert _prepare(tmp_path / "a.txt", tmp_path).tokens.tobytes() == b"hello world\0"
    assert _prepare(tmp_path / "a.jsonl", tmp_path).tokens.tobytes() == WANTED


def test_rows_and_parquet_without_a_suffix(tmp_path: Path) -> None:
    """As in the blobs of a hub's cache, which are named by a hash."""
    (tmp_path / "0123").write_bytes(ROWS)
    (tmp_path / "4567").write_bytes(_parquet(TEXTS))
    for name in ("0123", "4567"):
        assert _prepare(tmp_path / name, tmp_path).tokens.tobytes() == WANTED


# ---- parquet ----


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(), pyarrow.large_binary(),
        pyarrow.binary_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
    ],
    ids=str,
)  # fmt: skip
def test_every_form_of_text_in_parquet_is_read(tmp_path: Path, kind: Any) -> None:
    values: list[Any] = [*TEXTS, None, ""]
    if "binary" in str(kind):
        values = [None if text is None else text.encode() for text in values]
    (tmp_path / "a.parquet").write_bytes(_parquet(pyarrow.array(values, type=kind), n=[1] * 5))
    store = _prepare(tmp_path / "a.parquet", tmp_path)
    assert store.tokens.tobytes() == WANTED
    assert store.notes == ["2 of the texts are empty or null and were left out"]


def test_parquet_in_blocks_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"row {i} of many" for i in range(2000)]
    (tmp_path / "a.parquet").write_bytes(_parquet(texts))
    (source,) = sources.resolve(str(tmp_path / "a.parquet")).sources
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    found = list(blocks.blocks(source, blocks.Fields("text", None)))
    assert len(found) > 20 and [b.first for b in found][:2] == [1, 1 + len(found[0].data[0])]
    assert [b.ends for b in found] == [False] * (len(found) - 1) + [True]
    assert [text.decode() for b in found for text in b.data[0]] == texts


# ---- what is refused ----


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "hello")
    return file.getvalue()


def _row(value: Any, **more: Any) -> bytes:
    return b'{"text": "fine"}\n' + json.dumps({"text": value, **more}).encode() + b"\n"


MESSAGES = [{"role": "user", "content": "hi"}]
REFUSED = [
    ("a.txt", b"%PDF-1.7\n" + b"x" * 99, "is a PDF document, not text"),
    ("a.txt", b"\x89PNG\r\n\x1a\n" + os.urandom(99), "is a PNG image, not text"),
    ("a.txt", _zip(), "is a zip archive, not text.*unpack it"),
    ("a.tar.gz", gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0")), "is a tar archive"),
    ("a.txt", b"\x7fELF\x02\x01\x01" + bytes(99), "is an ELF program"),
    ("a.txt", "hello".encode("utf-16"), "is UTF-16 text .little-endian, by its byte-order mark.*iconv -f UTF-16"),
    ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-be"), "is UTF-16 text .big-endian, without a byte-order mark"),
    ("a.txt", "hello".encode("utf-32"), "is UTF-32 text.*iconv -f UTF-32"),
    ("a.txt", b"hello\0world", "is binary .it holds zero bytes"),
    ("a.txt", b"x" * (1 << 21) + b"\0", "is binary .it holds zero bytes"),
    ("a.txt", bytes(range(1, 256)) * 9, "is binary .*control characters"),
    ("a.jsonl.gz", ROWS, "can't be read: its name says gzip, its content is not packed"),
    ("a.jsonl.zst", gzip.compress(ROWS), "can't be read: its name says zstd, its content gzip"),
    ("a.jsonl.gz", gzip.compress(gzip.compress(ROWS)), "is gzip inside gzip"),
    ("a.parquet.gz", gzip.compress(_parquet(TEXTS)), "is parquet inside gzip"),
    ("a.parquet", b"hello world", "is not parquet"),
    ("a.parquet", _parquet(TEXTS)[:-9], "is not parquet"),
    ("a.parquet", _parquet([1, 2]), "column data.text_field='text' is int64, not text"),
    ("a.parquet", _parquet([["a"], ["b"]]), r"column data.text_field='text' is list<.*>, not text"),
    ("a.json", b'[{"text": "x"}, {"text": "y"}]', "a.json:1 is an array, not an object; .*jq -c"),
    ("a.jsonl", b'{"text": "x"}\n["y"]\n', "a.jsonl:2 has no text: the row is a list, not an object"),
    ("a.jsonl", b'{"text": "x"}\n"y"\n', "a.jsonl:2 has no text: the row is a string, not an object"),
    ("a.jsonl", _row(None), "a.jsonl:2 has no text under data.text_field='text': it is null; give it a text"),
    ("a.jsonl", _row(["a", "b"]), "a.jsonl:2 has no text .*: it is a list; name the field"),
    ("a.jsonl", _row(MESSAGES), "a.jsonl:2 .*: it is a list of messages; write each conversation as one text"),
    ("a.jsonl", _row({"a": 1}, body="x"), "a.jsonl:2 .*: it is an object; .*it has: text, body"),
    ("a.jsonl", _row(5), "a.jsonl:2 .*: it is a number"),
    ("a.jsonl", _row(True), "a.jsonl:2 .*: it is a truth value"),
    ("a.jsonl", b'{"text": "x"}\n{"texts": "y"}\n', r"a.jsonl:2 has no text .*\(did you mean 'texts'\?\)"),
    ("a.json", b'{\n "text": "x"\n}\n', "a.json:1 is not JSON: .*each line must be one object"),
    ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1 is not JSON: not UTF-8"),
    ("a.jsonl", b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "a.jsonl:1 is not JSON: nested too deeply; each line"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "told"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_text_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        prepare(_config(path), 256, tmp_path / "cache")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if len(content) < 1 << 20:  # the rest is found where all is read
        with pytest.raises(UserError, match=told):
            check(_config(path), 256)
