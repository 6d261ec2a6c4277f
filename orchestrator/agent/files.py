"""An attempt's files on shared storage, touched by one thread of their own: storage that hangs stops nothing else."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from configs.metrics import MetricLine, read_from
from configs.paths import RunPaths

log = logging.getLogger("megaray.agent")

LOG_BYTES = 64 << 20
"""A rank's log above this is rotated."""
LOGS_KEPT = 2
_TAIL_BYTES = 4096
_LINES_SECONDS = 0.25
_ROTATE_SECONDS = 10.0
_BUFFERED = 4
"""Portions of metric lines that wait to be fetched."""
_VISIBLE_SECONDS = 3.0
"""A file that another node has just written may take so long to be seen over NFS."""


@dataclass(frozen=True)
class StorageProblem:
    """Why the files can't be used."""

    missing: str = ""
    """A path that isn't there; whether that is this node's fault, others' answers tell."""
    unfit: str = ""
    """A fault of this node or of its storage."""


@dataclass
class _Lines:
    """Metric lines on their way."""

    position: int = 0
    """Byte behind what was read."""
    parts: list[tuple[int, tuple[MetricLine, ...], int]] = field(default_factory=list)
    """First byte, lines and end of what was read and not fetched."""


class LogFiles:
    """Opens logs, reads metric lines and the ends of logs, and keeps logs short.

    Args:
        run: the run.
        attempt: its attempt.
        ranks: those of this node.
        needs: paths that must be there before anything starts.
        news: called from this thread when something came in.
    """

    def __init__(
        self,
        run: RunPaths,
        attempt: int,
        ranks: Sequence[int],
        needs: Sequence[Path],
        news: Callable[[], None],
    ) -> None:
        self._paths, self._ranks, self._needs, self._news = run.attempt(attempt), tuple(ranks), needs, news
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._asked: list[int] = []
        """Ranks whose last words are wanted."""
        self._seek: int | None = None
        self._lines = _Lines()
        self.logs: dict[int, int] = {}
        """Rank -> file descriptor of its log, once opened."""
        self.problem: StorageProblem | None = None
        self.ready = False
        self.last_words: dict[int, str] = {}
        self._busy: float | None = time.monotonic()
        threading.Thread(
            target=self._work, name=f"agent-files-{run.run_id[-8:]}-{attempt}", daemon=True
        ).start()

    @property
    def stalled_seconds(self) -> float:
        """Seconds that the storage has not answered; 0 while it does."""
        since = self._busy
        return time.monotonic() - since if since is not None else 0.0

    def request_last_line(self, rank: int) -> None:
        """Read the last line of a rank's log soon."""
        with self._lock:
            self._asked.append(rank)
        self._wake.set()

    def fetch(self, offset: int) -> tuple[tuple[MetricLine, ...], int]:
        """Lines from byte `offset` on as far as they have been read, and the offset behind them; never waits."""
        with self._lock:
            parts = self._lines.parts
            while parts and parts[0][2] <= offset:
                parts.pop(0)
            if parts and parts[0][0] == offset:
                return parts[0][1], parts[0][2]
            if parts or self._lines.position != offset:  # somebody new reads from elsewhere
                self._seek = offset
        return (), offset

    def close(self) -> None:
        """End the thread, after a last look, once the storage lets it."""
        self._closed = True
        if self.ready:
            self._close_logs()
        self._wake.set()

    def _work(self) -> None:
        self.problem = self._prepare()
        self.ready = self.problem is None
        self._busy = None
        self._news()
        rotate = time.monotonic() + _ROTATE_SECONDS
        while self.ready:
            self._wake.wait(_LINES_SECONDS)
            self._wake.clear()
            last = self._closed
            self._busy = time.monotonic()
            acts: list[Callable[[], object]] = [self._publish_last_lines]
            if 0 in self._ranks:
                acts.append(self._read_lines)
            if self._busy > rotate:
                rotate = self._busy + _ROTATE_SECONDS
                acts += [partial(rotate_log, self._paths.log(rank)) for rank in self._ranks]
            failed = [act for act in acts if not self._succeeds(act)]
            self._busy = None
            if last:
                return
            if failed:
                self._wake.wait(1.0)

    def _succeeds(self, act: Callable[[], object]) -> bool:
        """Whether it could be done; what fails keeps nothing else from it."""
        try:
            act()
        except (OSError, ValueError):
            log.exception("files of %s", self._paths.root)
            return False
        return True

    def _prepare(self) -> StorageProblem | None:
        until = time.monotonic() + _VISIBLE_SECONDS
        while True:
            try:
                for path in self._needs:
                    path.stat()
                self._paths.ranks.mkdir(parents=True, exist_ok=True)
                for rank in self._ranks:
                    self.logs[rank] = os.open(
                        self._paths.log(rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
                    )
                return None
            except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
                self._close_logs()
                if time.monotonic() > until or isinstance(error, PermissionError):
                    return StorageProblem(missing=f"{error.filename} ({error.strerror})")
                time.sleep(0.2)
            except OSError as error:
                self._close_logs()
                name = errno.errorcode.get(error.errno or 0, "?")
                return StorageProblem(unfit=f"{name} on {error.filename} ({error.strerror})")

    def _close_logs(self) -> None:
        for fd in self.logs.values():
            os.close(fd)
        self.logs.clear()

    def detach_logs(self) -> dict[int, int]:
        """File descriptors of the logs by rank; the caller closes them."""
        taken, self.logs = self.logs, {}
        return taken

    def _publish_last_lines(self) -> None:
        with self._lock:
            ranks, self._asked = self._asked, []
        for rank in ranks:
            self._succeeds(partial(self._read_last_line, rank))
        if ranks:
            self._news()

    def _read_last_line(self, rank: int) -> None:
        self.last_words[rank] = last_line(self._paths.log(rank))

    def _read_lines(self) -> None:
        with self._lock:
            if self._seek is not None:
                self._lines, self._seek = _Lines(self._seek), None
            start = self._lines.position
            if len(self._lines.parts) >= _BUFFERED:
                return
        lines, end = read_from(self._paths.metrics, start)
        if end > start:
            with self._lock:
                if self._seek is None:
                    self._lines.parts.append((start, tuple(lines), end))
                    self._lines.position = end
            self._news()


def last_line(path: Path) -> str:
    """Last line of a file that isn't empty; an empty string where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = [row.strip() for row in file.read().decode(errors="replace").splitlines()]
    except FileNotFoundError:
        return ""
    return next((row for row in reversed(lines) if row), "")


def rotate_log(path: Path, limit: int = LOG_BYTES) -> bool:
    """Move what a log above `limit` bytes holds to `.1`, what was there to `.2`; whether it was.

    Its writer keeps the file open to append, so the text is copied and the file cut to nothing. What is written
    between the two is lost: at most a few lines of 64 MiB. Where no space is left for the copy, all of it is lost.

    Raises:
        OSError: where the file can't be copied for another reason; what was there is as it was.
    """
    try:
        if path.stat().st_size <= limit:
            return False
    except FileNotFoundError:
        return False
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        shutil.copyfile(path, temporary)
        with path.open("r+b") as file:
            with temporary.open("ab") as out:  # what came while it was copied
                file.seek(out.tell())
                shutil.copyfileobj(file, out)
            file.truncate(0)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        log.warning("%s is cut without a copy: %s", path, error.strerror)
        os.truncate(path, 0)  # its space is all that there is to be had
        return True
    for number in range(LOGS_KEPT, 0, -1):
        older = path.with_name(f"{path.name}.{number - 1}") if number > 1 else temporary
        if older.exists():
            older.replace(path.with_name(f"{path.name}.{number}"))
    return True
