"""Where the text is: files, folders, globs and URLs of text, jsonl or parquet; by default real Python source."""

from __future__ import annotations

import gzip
import io
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from configs.errors import UserError, nearest
from configs.schema import DataConfig

_JSONL = (".jsonl", ".jsonl.gz", ".ndjson", ".json")
_PARQUET = (".parquet",)


@dataclass(frozen=True)
class Source:
    """One file."""

    fs: Any
    path: str
    stamp: str
    """Size and time or tag, so that a changed file is prepared again."""

    def open(self) -> IO[bytes]:
        """Its bytes, unpacked where it ends in `.gz`."""
        file = self.fs.open(self.path, "rb")
        return gzip.open(file) if self.path.endswith(".gz") else file  # type: ignore[return-value]  # a file


def find(data: DataConfig) -> list[Source]:
    """The files of `data.path`, sorted by path.

    Raises:
        UserError: where nothing is there, with the nearest name that is.
    """
    if data.path is None:
        return _standard_library()
    try:
        fs, path = fsspec.core.url_to_fs(data.path)
    except (ImportError, ValueError) as error:
        raise UserError(f"data.path='{data.path}' can't be used: {error}; type a path or a URL") from None
    try:
        if any(letter in path for letter in "*?["):
            found = fs.glob(path, detail=True).values()
        elif fs.isdir(path):
            found = fs.find(path, detail=True).values()
        elif fs.exists(path):
            found = [fs.info(path)]
        else:
            raise UserError(
                f"data.path='{data.path}' does not exist{_nearby(fs, path)}; type a file, folder, glob or URL"
            )
    except UserError:
        raise
    except Exception as error:  # every file system has errors of its own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.path='{data.path}' can't be read: {first}") from None
    files = [
        info
        for info in found
        if info["type"] == "file" and not info["name"].rsplit("/", 1)[-1].startswith(".")
    ]
    if not files:
        raise UserError(
            f"data.path='{data.path}' holds no files; type a path with text, jsonl or parquet in it"
        )
    return sorted((Source(fs, info["name"], _stamp(info)) for info in files), key=lambda s: s.path)


def _stamp(info: dict[str, Any]) -> str:
    return f"{info.get('size')}/{info.get('mtime') or info.get('ETag') or info.get('LastModified') or ''}"


def _nearby(fs: Any, path: str) -> str:
    try:
        names = [str(name) for name in fs.ls(path.rsplit("/", 1)[0] or "/", detail=False)]
    except Exception:  # the folder is missing too; then there is nothing to compare with
        return ""
    return nearest(path, names)


def _standard_library() -> list[Source]:
    """The running Python's own source files, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        p for p in root.rglob("*.py") if "site-packages" not in p.parts and "dist-packages" not in p.parts
    )
    fs = fsspec.filesystem("file")
    return [Source(fs, str(path), str(path.stat().st_size)) for path in files]


def documents(source: Source, field: str) -> Iterator[bytes]:
    """The texts of one file as UTF-8, one at a time.

    Raises:
        UserError: for a malformed line or a missing field, with file and line.
    """
    name = source.path.lower()
    if name.endswith(_PARQUET):
        yield from _parquet(source, field)
    elif name.endswith(_JSONL):
        yield from _jsonl(source, field)
    else:
        with source.open() as file:
            yield file.read()


def _jsonl(source: Source, field: str) -> Iterator[bytes]:
    with source.open() as file:
        for number, row in enumerate(file, 1):
            if not row.strip():
                continue
            try:
                tree = json.loads(row)
            except ValueError as error:
                raise UserError(
                    f"{source.path}:{number} is not JSON: {error}; each line must be one object"
                ) from None
            if not isinstance(tree, dict) or not isinstance(tree.get(field), str):
                keys = ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
                raise UserError(
                    f"{source.path}:{number} has no text under data.text_field='{field}'; it has: {keys}"
                )
            yield tree[field].encode()


def _parquet(source: Source, field: str) -> Iterator[bytes]:
    import pyarrow  # heavy, and for parquet only
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(source.fs.cat_file(source.path)))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{source.path} is not parquet: {error}") from None
    columns = table.schema_arrow.names
    if field not in columns:
        raise UserError(
            f"{source.path} has no column data.text_field='{field}'{nearest(field, columns)}; it has: "
            f"{', '.join(columns)}"
        )
    for batch in table.iter_batches(batch_size=1024, columns=[field]):
        for text in batch.column(0).to_pylist():
            if text:
                yield text.encode() if isinstance(text, str) else bytes(text)
