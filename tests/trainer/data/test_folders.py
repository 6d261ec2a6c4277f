"""What the data of a folder is: links, dataset folders, what lies beside, and binary files among text."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import fsspec
import pytest

from configs.errors import UserError
from tests.trainer.data.test_sources import ROWS, TEXTS, WANTED, _config, _parquet, _prepare, _zstd
from trainer.data.prepare import check

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def _hub(folder: Path) -> Path:
    """A dataset as a hub lays it out."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-0.parquet").write_bytes(_parquet(TEXTS))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Card")
    (folder / "LICENSE").write_text("Permission is granted")
    (folder / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    (folder / ".gitattributes").write_text("*.parquet filter=lfs")
    return folder


def test_a_dataset_folder_gives_its_rows(tmp_path: Path) -> None:
    store = _prepare(_hub(tmp_path / "hub"), tmp_path)
    assert store.tokens.tobytes() == WANTED
    (note,) = store.notes
    assert "took 1 parquet file, left out what lies beside: LICENSE, README.md, dataset_infos.json" in note
    assert check(_config(tmp_path / "hub"), 256) == [note], "said before the queue too"


def test_a_folder_of_texts_leaves_out_what_is_about_it(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "README").write_text("about the texts")
    (folder / "a.txt").write_text("alpha alpha")
    (folder / "sub" / "README.md").write_text("a text as any other")
    store = _prepare(folder, tmp_path)
    assert store.tokens.tobytes() == b"alpha alpha\0a text as any other\0"
    assert "took 2 text files, left out what lies beside: README" in store.notes[0]


def test_a_folder_of_nothing_but_readmes_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("all there is")
    assert _prepare(tmp_path / "data", tmp_path).tokens.tobytes() == b"all there is\0"


def test_what_is_named_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    folder = _hub(tmp_path / "hub")
    assert _prepare(folder / "LICENSE", tmp_path).tokens.tobytes() == b"Permission is granted\0"
    assert _prepare(f"{folder}/*E", tmp_path).documents == 1


@pytest.mark.parametrize("other", ["b.jsonl", "b.txt"])
def test_a_folder_of_several_kinds_is_refused(tmp_path: Path, other: str) -> None:
    folder = _hub(tmp_path / "hub")
    (folder / other).write_text('{"text": "x"}\n' * 1000)
    kind = {"b.jsonl": "1 jsonl", "b.txt": "1 text"}[other]
    with pytest.raises(
        UserError, match=rf"several kinds: 1 parquet .* and {kind} .*such as '\*\*/\*.parquet'"
    ):
        check(_config(folder), 256)


def test_links_are_followed(tmp_path: Path) -> None:
    """As in a hub's cache, whose snapshots are links into its blobs; beside files, to folders, and in rings."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_bytes(ROWS)
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").symlink_to("../../blobs/0123")
    assert _prepare(folder, tmp_path).tokens.tobytes() == WANTED
    assert _prepare(folder / "a.jsonl", tmp_path).tokens.tobytes() == WANTED
    assert _prepare(f"{folder}/*.jsonl", tmp_path).tokens.tobytes() == WANTED
    (folder / "b.jsonl").write_bytes(ROWS)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c.jsonl").write_bytes(ROWS)
    (folder / "linked").symlink_to(tmp_path / "more")
    (folder / "ring").symlink_to(folder.parent)
    assert _prepare(folder, tmp_path).tokens.tobytes() == WANTED * 3


@pytest.mark.parametrize("path", ["", "gone.jsonl", "*.jsonl"])
def test_a_broken_link_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(ROWS)
    (tmp_path / "data" / "gone.jsonl").symlink_to("../blobs/0123")
    with pytest.raises(
        UserError, match=r"data/gone.jsonl is a broken link to ../blobs/0123; bring the file back"
    ):
        check(_config(tmp_path / "data" / path), 256)


def _tree(folder: Path) -> Path:
    """Source files as they lie after they were run, with a picture and a desktop's leavings."""
    (folder / "pkg" / "__pycache__").mkdir(parents=True)
    (folder / "pkg" / "a.py").write_text("x = 1\n")
    (folder / "pkg" / "notes").write_text("no suffix")
    for name in ("pkg/__pycache__/a.cpython-311.pyc", "pkg/Thumbs.db", "pkg/weights.bin"):
        (folder / name).write_bytes(b"\xa7\r\r\n" + bytes(40))
    (folder / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    return folder


def test_binary_files_of_a_folder_are_left_out_and_named(tmp_path: Path) -> None:
    store = _prepare(_tree(tmp_path / "src"), tmp_path)
    assert store.tokens.tobytes() == b"x = 1\n\0no suffix\0"
    (note,) = store.notes
    assert note == (
        f"data.path='{tmp_path / 'src'}': left out 4 binary files: logo.png, pkg/Thumbs.db, "
        "pkg/__pycache__/a.cpython-311.pyc, pkg/weights.bin"
    )


def test_many_binary_files_are_counted(tmp_path: Path) -> None:
    folder = _tree(tmp_path / "src")
    for i in range(4):
        (folder / f"{i}.o").write_bytes(b"\x7fELF" + bytes(60))
    (note,) = _prepare(folder, tmp_path).notes
    assert "left out 8 binary files: 0.o, 1.o, 2.o, 3.o, logo.png and 3 more" in note


def test_binary_files_beside_rows_are_no_second_kind(tmp_path: Path) -> None:
    folder = _tree(tmp_path / "src")
    (folder / "pkg" / "weights.bin").write_bytes(bytes(1 << 16))
    (folder / "paper.pdf").write_bytes(b"%PDF-1.7\n" + b"x" * 9999)
    for name in ("pkg/a.py", "pkg/notes"):
        (folder / name).unlink()
    (folder / "a.jsonl").write_bytes(ROWS)
    store = _prepare(folder, tmp_path)
    assert store.tokens.tobytes() == WANTED
    assert "took 1 jsonl file, left out what lies beside: paper.pdf" in store.notes[0]
    assert "left out 4 binary files: logo.png" in store.notes[1]


@pytest.mark.parametrize("path", ["pkg/Thumbs.db", "*.png", "pkg/__pycache__"])
def test_a_binary_file_that_is_named_or_all_there_is_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(
        UserError, match=r"(Thumbs.db|logo.png|a.cpython-311.pyc) is (a PNG|binary).*leave it out"
    ):
        check(_config(_tree(tmp_path / "src") / path), 256)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("paper.pdf", b"%PDF-1.7\n" + b"x" * 99, "paper.pdf is a PDF document"),
        ("thesis.docx", b"PK\x03\x04" + bytes(99), "thesis.docx is a zip archive"),
        ("thesis.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "thesis.doc is an old Office document"),
        ("wide.log", "hello".encode("utf-16-le"), "wide.log is UTF-16 text"),
        ("broken.txt", b"hello\0world", "broken.txt is binary"),
        ("cut.log.gz", gzip.compress(os.urandom(99))[:50], "cut.log.gz can't be read"),
    ],
)  # fmt: skip
def test_a_folder_does_not_lose_what_people_expect_to_be_read(
    tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (_tree(tmp_path / "src") / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        check(_config(tmp_path / "src"), 256)


def test_a_folder_on_another_file_system(tmp_path: Path) -> None:
    for name, content in (("a.jsonl.zst", _zstd(ROWS)), ("README.md", b"about")):
        with fsspec.open(f"memory://set/{name}", "wb") as file:
            file.write(content)
    try:
        store = _prepare("memory://set", tmp_path)
    finally:
        fsspec.filesystem("memory").store.clear()
    assert store.tokens.tobytes() == WANTED and "left out what lies beside: README.md" in store.notes[0]
