"""Files that are either whole or absent, on any fsspec file system.

On a local (or mounted) file system: written under a temporary name, fsynced, renamed, and the folder fsynced.
An object store has neither rename nor fsync, but a PUT is atomic; there the size is read back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from configs.errors import UserError


class StoreLike(Protocol):
    """What a checkpoint can be kept on: anything with these is a tier."""

    @property
    def url(self) -> str:
        """Of the folder, as messages name it."""

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """Write a file that appears whole or not at all; its size in bytes."""

    def create(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """`write` that raises FileExistsError where the name exists, and then changes nothing."""

    def read(self, name: str) -> bytes:
        """A whole file; raises FileNotFoundError where it isn't there."""

    def read_range(self, name: str, start: int, end: int) -> bytearray:
        """Bytes `[start, end)` of a file, fewer where it ends before; by several threads at once."""

    def read_into(self, name: str, start: int, into: memoryview) -> int:
        """Fill memory with the bytes of a file from `start` on; how many there were."""

    def names(self, folder: str = "") -> list[str]:
        """Names in a folder, sorted; none where it isn't there."""

    def remove(self, name: str) -> None:
        """Remove a file or folder; it may be gone already."""


def copy_into(into: memoryview, data: bytearray) -> int:
    """What `StoreLike.read_into` gives, of a store whose client has memory of its own."""
    into[: len(data)] = data
    return len(data)


_BEHIND = 32 << 20
"""Bytes after which the kernel is asked to begin to write them."""


class CheckpointStore:
    """A folder or URL that checkpoints are kept under. What its file system raises is an OSError, whatever its client
    library calls it: callers read another copy or tell their peers where they meet one.

    Args:
        root: the folder or URL.
        field: what it was typed as.

    Raises:
        UserError: where the URL's protocol isn't known or its package isn't installed.
    """

    def __init__(self, root: str, field: str = "checkpoint.path") -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{field}='{root}' can't be used: {error}; type a folder or a URL such as s3://bucket/path"
            ) from None
        self._local = isinstance(self._fs, LocalFileSystem)
        self.url = root

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """Write a file that appears whole or not at all; its size in bytes.

        Raises:
            OSError: where it can't be written; nothing is left under its name.
        """
        path = f"{self._root}/{name}"
        return self._write_local(Path(path), chunks) if self._local else self._put(path, chunks)

    def create(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """Write a new file that appears whole or not at all, by one writer of several at most; its size in bytes.

        On a local file system by a hard link, on S3 by a conditional PUT (`If-None-Match`); held in memory until then.
        Where the file system knows neither, by a look before the write.

        Raises:
            FileExistsError: where the name exists; it stays as it is. A request whose answer was lost is repeated, and
                then meets its own file: only what is in it tells.
            OSError: where it can't be written.
        """
        path = f"{self._root}/{name}"
        if self._local:
            return self._write_local(Path(path), chunks, new=True)
        data = b"".join(chunks)
        with _os_errors(path):
            try:
                self._fs.pipe_file(path, data, mode="create")
            except FileNotFoundError:  # a remote file system with real folders
                self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                self._fs.pipe_file(path, data, mode="create")
            self._fs.invalidate_cache()
            return self._same_size(path, len(data))

    def _write_local(self, path: Path, chunks: Iterable[bytes | memoryview], new: bool = False) -> int:
        _make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("wb") as file:
                begun = 0
                for chunk in chunks:
                    file.write(chunk)
                    if file.tell() - begun >= _BEHIND:
                        # Or the kernel gathers up to a tenth of the memory, and the disk idles until the fsync.
                        os.posix_fadvise(file.fileno(), begun, file.tell() - begun, os.POSIX_FADV_DONTNEED)
                        begun = file.tell()
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            if new:
                _link_if_absent(temporary, path)
            else:
                temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
        return size

    def _put(self, path: str, chunks: Iterable[bytes | memoryview]) -> int:
        size = 0
        with _os_errors(path):
            file = self._create(path)
        try:
            for chunk in chunks:
                with _os_errors(path):
                    size += file.write(chunk)
            with _os_errors(path):
                file.close()
        except BaseException:
            self._abandon(file, path)
            raise
        with _os_errors(path):
            self._fs.invalidate_cache()
            return self._same_size(path, size)

    def _abandon(self, file: IO[bytes], path: str) -> None:
        """Give up a file that isn't whole: its end, also that by the garbage collector, would put it under its name."""
        with contextlib.suppress(Exception):  # the error that is being raised matters more
            if isinstance(file, AbstractBufferedFile):
                file.closed = True
                file.discard()
            else:
                file.close()
                self._fs.rm_file(path)

    def _size(self, path: str) -> int:
        with _os_errors(path):
            return int(self._fs.info(path)["size"])

    def _same_size(self, path: str, size: int) -> int:
        there = self._size(path)
        if there != size:
            raise OSError(f"{path}: {size} bytes were written, {there} are there")
        return size

    def _create(self, path: str) -> IO[bytes]:
        try:
            return self._fs.open(path, "wb")
        except FileNotFoundError:  # a remote file system with real folders
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            return self._fs.open(path, "wb")

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: where it isn't there.
        """
        path = f"{self._root}/{name}"
        with _os_errors(path):
            return bytes(self._fs.cat_file(path))

    def read_range(self, name: str, start: int, end: int) -> bytearray:
        """Bytes `[start, end)` of a file; fewer where it ends before. May be called by several threads at once.

        Raises:
            FileNotFoundError: where it isn't there.
        """
        path = f"{self._root}/{name}"
        if not self._local:
            try:
                with _os_errors(path):
                    return bytearray(self._fs.cat_file(path, start=start, end=end))
            except OSError as error:
                # S3 refuses a range that begins behind the end (416), as of a file that was cut short.
                if error.errno != errno.EINVAL or self._size(path) > start:
                    raise
                return bytearray()
        data = bytearray(end - start)
        with memoryview(data) as view:
            count = self.read_into(name, start, view)
        return data[:count] if count < len(data) else data

    def read_into(self, name: str, start: int, into: memoryview) -> int:
        """Fill memory with the bytes of a file from `start` on; how many there were. Likewise.

        Raises:
            FileNotFoundError: where the file isn't there.
        """
        if not self._local:
            return copy_into(into, self.read_range(name, start, start + len(into)))
        count = 0
        with Path(f"{self._root}/{name}").open("rb", buffering=0) as file:
            file.seek(start)
            while count < len(into):
                got = file.readinto(into[count:])
                if not got:
                    break
                count += got
        return count

    def names(self, folder: str = "") -> list[str]:
        """Names in a folder; none where it isn't there."""
        path = f"{self._root}/{folder}".rstrip("/")
        try:
            with _os_errors(path):
                self._fs.invalidate_cache()
                paths = self._fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def remove(self, name: str) -> None:
        """Remove a file or folder; it may be gone already."""
        path = f"{self._root}/{name}"
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), _os_errors(path):
            self._fs.rm(path, recursive=True)


@contextlib.contextmanager
def _os_errors(path: str) -> Iterator[None]:
    """Errors that only a client library knows (`botocore`'s, `aiohttp`'s, …) as OSErrors."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", path) from error


def check_writable(root: str) -> None:
    """Write and remove a small file.

    Raises:
        UserError: where that fails, naming `checkpoint.path`.
    """
    store = CheckpointStore(root)
    probe = f".writable-{secrets.token_hex(4)}"
    try:
        store.write(probe, [b"x"])
        store.remove(probe)
    except Exception as error:  # every file system has errors of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"checkpoint.path='{root}' can't be written: {lines[0]}; name a folder or URL that you may write"
        ) from None


def _link_if_absent(temporary: Path, path: Path) -> None:
    """Give a file its name unless that exists."""
    try:
        os.link(temporary, path)
    except OSError as error:
        # Mounts of object stores have no links; what is left is to look first.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.replace(path)
    else:
        temporary.unlink()


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that their names survive a crash of the machine."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Mounts of object stores refuse this for folders, and have none that could be lost.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)
