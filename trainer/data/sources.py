"""Where the text is: files, folders, globs and URLs of text, jsonl or parquet; by default real Python source."""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from configs.errors import UserError, nearest
from configs.schema import DataConfig

_JSONL = (".jsonl", ".ndjson", ".json")
_PARQUET = ".parquet"
_CHUNK = 1 << 24
"""Bytes of a text file that are read and tokenised at a time."""


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
        return cast("IO[bytes]", gzip.open(file)) if self.path.lower().endswith(".gz") else file


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
    files = [info for info in found if info["type"] == "file" and not _hidden(info["name"], path)]
    if not files:
        raise UserError(
            f"data.path='{data.path}' holds no files; type a path with text, jsonl or parquet in it"
        )
    return sorted((Source(fs, info["name"], _stamp(info)) for info in files), key=lambda s: s.path)


def _stamp(info: dict[str, Any]) -> str:
    return f"{info.get('size')}/{info.get('mtime') or info.get('ETag') or info.get('LastModified') or ''}"


def _hidden(name: str, below: str) -> bool:
    """Whether a part of `name` that `below` doesn't spell out begins with a dot, as in `.git`."""
    told = set(below.split("/"))
    return any(part.startswith(".") and part not in told for part in name.split("/"))


def _nearby(fs: Any, path: str) -> str:
    folder, _, name = path.rstrip("/").rpartition("/")
    try:
        names = [str(p).rstrip("/").rsplit("/", 1)[-1] for p in fs.ls(folder or "/", detail=False)]
    except Exception:  # the folder is missing too; then there is nothing to compare with
        return ""
    return nearest(name, names)


def _standard_library() -> list[Source]:
    """The running Python's own source files, its tests among them, without installed packages."""
    fs = fsspec.filesystem("file")
    found = []
    for folder, below, names in os.walk(sysconfig.get_path("stdlib")):
        below[:] = [name for name in below if name not in ("site-packages", "dist-packages")]
        for name in names:
            if name.endswith(".py"):
                path = f"{folder}/{name}"
                # No times: hosts with the same Python have the same text, whenever it was installed.
                found.append(Source(fs, path, str(Path(path).stat().st_size)))
    return sorted(found, key=lambda source: source.path)


def documents(source: Source, field: str) -> Iterator[tuple[bytes, bool]]:
    """The texts of one file as UTF-8: parts of bounded size, each with whether it ends a document.

    A text file is one document; in jsonl and parquet a row is one.

    Raises:
        UserError: for a file that can't be read, a malformed line or a missing field, with file and line.
    """
    name = source.path.lower().removesuffix(".gz")
    read = _parquet if name.endswith(_PARQUET) else _jsonl if name.endswith(_JSONL) else _text
    try:
        yield from read(source, field)
    except (
        OSError,
        EOFError,
        zlib.error,
    ) as error:  # also what gzip says of a file that isn't or is cut short
        raise UserError(
            f"{source.path} can't be read: {error}; mend it or leave it out of data.path"
        ) from None


def _text(source: Source, _field: str) -> Iterator[tuple[bytes, bool]]:
    """Parts end where a line does, so that a tokenizer sees whole words."""
    with source.open() as file:
        part = file.read(_CHUNK)
        while following := file.read(_CHUNK):
            cut = part.rfind(b"\n") + 1 or len(part)
            yield part[:cut], False
            part = part[cut:] + following
        yield part, True


def _jsonl(source: Source, field: str) -> Iterator[tuple[bytes, bool]]:
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
            text = tree.get(field) if isinstance(tree, dict) else None
            if not isinstance(text, str):
                raise _no_field(f"{source.path}:{number}", field, tree if isinstance(tree, dict) else ())
            yield text.encode(errors="replace"), True


def _parquet(source: Source, field: str) -> Iterator[tuple[bytes, bool]]:
    import pyarrow  # heavy, and for parquet only
    import pyarrow.parquet

    with source.open() as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise UserError(
                f"{source.path} is not parquet: {error}; mend it or leave it out of data.path"
            ) from None
        schema = table.schema_arrow
        if field not in schema.names:
            raise _no_field(source.path, field, schema.names)
        kind = schema.field(field).type
        if not any(kind.equals(t) for t in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary())):
            raise UserError(
                f"{source.path}: column data.text_field='{field}' is {kind}, not text; it has: "
                f"{', '.join(schema.names)}"
            )
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                if text:
                    yield text.encode() if isinstance(text, str) else text, True


def _no_field(place: str, field: str, names: Iterable[str]) -> UserError:
    names = [str(name) for name in names]
    return UserError(
        f"{place} has no text under data.text_field='{field}'{nearest(field, names)}; "
        f"it has: {', '.join(names) or 'no keys'}"
    )
