"""Where the text is: files, folders, globs and URLs of text, jsonl or parquet; by default real Python source."""

from __future__ import annotations

import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from configs.errors import UserError, nearest
from trainer.data import content

_README_NAMES = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|authors|contributing|code_of_conduct)([._-].*)?",
    re.I,
)
"""Files about the data, as they lie beside it in dataset folders; their kind is text."""
_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""Files that libraries keep beside the data; their kind would be rows."""
_VERSION_KEYS = (
    "mtime", "ETag", "LastModified", "etag", "last_modified", "Last-Modified", "updated", "modificationTime", "modify",
    "blob_id", "sha", "checksum", "Content-MD5", "Digest", "created",
)  # fmt: skip
"""Keys of fsspec's file systems for a version of a file's content; the first that is present counts. S3, Google's and
Azure's, plain HTTP, Hadoop's, FTP, Hugging Face's, GitHub's, lakeFS, memory."""


@dataclass(frozen=True)
class SourceFile:
    """One file."""

    fs: Any
    path: str
    stamp: str
    """Size and time or tag, so that a changed file is prepared again."""
    size: int
    """Bytes as stored; 0 where the file system doesn't say."""

    def open(self) -> IO[bytes]:
        """Its bytes as stored."""
        file: IO[bytes] = self.fs.open(self.path, "rb")
        return file

    def inspect(self) -> tuple[str | None, content.Kind]:
        """How it is packed and what is in it, by its first bytes.

        Raises:
            BinaryFile: for what holds no text in any form.
            UserError: for what is neither text nor rows of text, or can't be read.
        """
        try:
            with self.open() as file:
                return content.inspect(self.path, file)
        except content.READ_ERRORS as error:
            raise content.unreadable(self.path, error) from None


@dataclass(frozen=True)
class ResolvedPath:
    """The files of a path."""

    sources: list[SourceFile]
    notes: list[str]
    """What was left out, one line each."""


def resolve(path: str | None, field: str = "data.path") -> ResolvedPath:
    """The files of `path`, sorted by path. Links are followed; what is hidden is left out unless it is named.

    A folder gives files of one kind: parquet or jsonl where it holds some, else text. What lies beside them and
    isn't data (README, LICENSE, descriptions) is left out and noted, and so are binary files that hold no text, unless
    their name promises some. A PDF, an archive or any other form of text that isn't read here is refused.

    Args:
        path: file, folder, glob or fsspec URL; None for the standard library.
        field: the configuration's name for it.

    Raises:
        UserError: where nothing is there, with the nearest name that is; for a broken link; for a folder of
            several kinds.
    """
    if path is None:
        return ResolvedPath(_standard_library(), [])
    setting = f"{field}='{path}'"
    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{setting} can't be used: {error}; type a path or a URL") from None
    try:
        files, folder = _listed(fs, inner, setting)
    except UserError:
        raise
    except Exception as error:  # every file system has errors of its own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{setting} can't be read: {first}; type a file, folder, glob or URL") from None
    sources = sorted((s for s in files if not _hidden(s.path, inner)), key=lambda s: s.path)
    if not sources:
        raise UserError(f"{setting} holds no files; type a path with text, jsonl or parquet in it")
    return _one_kind(sources, inner, setting) if folder else ResolvedPath(sources, [])


def _listed(fs: Any, path: str, setting: str) -> tuple[list[SourceFile], bool]:
    """All files of a path, and whether it is a folder."""
    local = isinstance(fs, LocalFileSystem)
    if any(letter in path for letter in "*?[") and not (local and Path(path).exists()):
        names = fs.glob(path)
        return _files(fs, names, local), False
    if local and Path(path).is_symlink() and not Path(path).exists():
        raise _broken(path)
    if fs.isdir(path):
        if local:
            return list(_walk(fs, path)), True
        return [_source(fs, i) for i in fs.find(path, detail=True).values() if i["type"] == "file"], True
    if not fs.exists(path):
        raise UserError(f"{setting} does not exist{_nearby(fs, path)}; type a file, folder, glob or URL")
    return _files(fs, [path], local), False


def _files(fs: Any, names: Iterable[str], local: bool) -> list[SourceFile]:
    if local:
        return [source for name in names if (source := _local(fs, name))]
    return [_source(fs, info) for info in map(fs.info, names) if info["type"] == "file"]


def _walk(fs: Any, folder: str) -> Iterator[SourceFile]:
    """Files below a folder, through links; a link back to a folder above itself isn't gone down again."""
    for here, below, names in os.walk(folder, followlinks=True):
        real = Path(here).resolve()
        below[:] = sorted(
            name
            for name in below
            if not name.startswith(".")
            and not ((link := Path(here, name)).is_symlink() and real.is_relative_to(link.resolve()))
        )
        for name in names:
            if not name.startswith(".") and (source := _local(fs, f"{here}/{name}")):
                yield source


def _local(fs: Any, path: str) -> SourceFile | None:
    """A file, or what a link leads to; None for what is neither, such as a folder."""
    try:
        status = Path(path).stat()
    except OSError:
        if Path(path).is_symlink():
            raise _broken(path) from None
        raise
    if not stat.S_ISREG(status.st_mode):
        return None
    return SourceFile(fs, path, f"{status.st_size}/{status.st_mtime}", status.st_size)


def _broken(path: str) -> UserError:
    return UserError(
        f"{path} is a broken link to {Path(path).readlink()}; bring the file back, or leave the link out of data.path"
    )


def _source(fs: Any, info: dict[str, Any]) -> SourceFile:
    version = next((info[name] for name in _VERSION_KEYS if info.get(name)), "")
    return SourceFile(fs, info["name"], f"{info.get('size')}/{version}", int(info.get("size") or 0))


def _one_kind(sources: list[SourceFile], folder: str, setting: str) -> ResolvedPath:
    """The files of a folder that are data, by kind."""
    kinds: dict[str, list[SourceFile]] = {"parquet": [], "jsonl": [], "text": []}
    beside: list[SourceFile] = []
    binary: list[SourceFile] = []
    foreign: list[SourceFile] = []
    refused: list[UserError] = []
    for source in sources:
        name = source.path.rsplit("/", 1)[-1]
        kind = content.kind_by_name(source.path)
        if name in _DESCRIPTIONS or (kind in (None, "text") and _README_NAMES.fullmatch(name)):
            beside.append(source)
            continue
        if kind is None or (kind == "text" and not content.has_text_suffix(source.path)):
            try:
                kind = source.inspect()[1]
            except UserError as error:
                if isinstance(error, content.BinaryFile):
                    binary.append(source)
                else:
                    foreign.append(source)
                refused.append(error)
                continue
        kinds[kind].append(source)
    if len(refused) == len(sources):
        raise refused[0]
    count = f"{len(binary)} binary file{'s' * (len(binary) > 1)}"
    notes = [f"{setting}: left out {count}: {_names(binary, folder)}"] if binary else []
    rows = [kind for kind in ("parquet", "jsonl") if kinds[kind]]
    if len(rows) > 1:
        raise _mixed(setting, kinds, "parquet", "jsonl")
    if rows:
        taken = kinds[rows[0]]
        if sum(s.size for s in kinds["text"]) > sum(s.size for s in taken):
            raise _mixed(setting, kinds, rows[0], "text")
        left = kinds["text"] + beside + foreign
    else:
        if foreign:  # more text, for which a person has to do something
            raise next(error for error in refused if not isinstance(error, content.BinaryFile))
        # Of text, only what lies on top is about the data: below, a README is as much text as any other.
        top = [s for s in beside if s.path.rsplit("/", 1)[0].rstrip("/") == folder.rstrip("/")]
        taken = kinds["text"] + [s for s in beside if s not in top]
        left = top if taken else []
        taken = taken or beside
    if not left:
        return ResolvedPath(sorted(taken, key=lambda s: s.path), notes)
    count = f"{len(taken)} {rows[0] if rows else 'text'} file{'s' * (len(taken) > 1)}"
    notes = [f"{setting}: took {count}, left out what lies beside: {_names(left, folder)}", *notes]
    return ResolvedPath(sorted(taken, key=lambda s: s.path), notes)


def _names(some: list[SourceFile], folder: str) -> str:
    names = [s.path.removeprefix(folder).lstrip("/") for s in some]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _mixed(setting: str, kinds: dict[str, list[SourceFile]], one: str, other: str) -> UserError:
    counts = " and ".join(
        f"{len(kinds[kind])} {kind} ({kinds[kind][0].path.rsplit('/', 1)[-1]})" for kind in (one, other)
    )
    end = kinds[one][0].path.rsplit("/", 1)[-1].partition(".")[2]
    return UserError(
        f"{setting} holds files of several kinds: {counts}; name one kind with a glob such as '**/*.{end}'"
    )


def _hidden(name: str, below: str) -> bool:
    """Whether a part of `name` that `below` doesn't spell out begins with a dot, as in `.git`."""
    spelled = set(below.split("/"))
    return any(part.startswith(".") and part not in spelled for part in name.split("/"))


def _nearby(fs: Any, path: str) -> str:
    folder, _, name = path.rstrip("/").rpartition("/")
    try:
        names = [str(p).rstrip("/").rsplit("/", 1)[-1] for p in fs.ls(folder or "/", detail=False)]
    except Exception:  # the folder is missing too; then there is nothing to compare with
        return ""
    return nearest(name, names)


def _standard_library() -> list[SourceFile]:
    """The running Python's own source files, its tests among them, without installed packages."""
    fs = fsspec.filesystem("file")
    sources = []
    for folder, below, names in os.walk(sysconfig.get_path("stdlib")):
        below[:] = [name for name in below if name not in ("site-packages", "dist-packages")]
        for name in names:
            if name.endswith(".py"):
                path = f"{folder}/{name}"
                size = Path(path).stat().st_size
                # No times: hosts with the same Python have the same text, whenever it was installed.
                sources.append(SourceFile(fs, path, str(size), size))
    return sorted(sources, key=lambda source: source.path)
