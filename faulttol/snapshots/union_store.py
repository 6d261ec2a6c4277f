"""Several stores as one."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from faulttol.checkpoint.store import StoreLike

T = TypeVar("T")


class UnionStore:
    """Files of several nodes as one `StoreLike` that is only read: from the own node where it has one, else from another.

    A node that fails is asked last from then on.

    Args:
        holders: stores by number.
        files: numbers of the holders of each file.
        own: number of the own node's; None: it has none of the files.
        turn: of this rank, so that ranks begin with different holders.
    """

    def __init__(
        self, holders: Sequence[StoreLike], files: dict[str, list[int]], own: int | None = None, turn: int = 0
    ) -> None:
        self.holders, self._files, self._own, self._turn = holders, files, own, turn
        self._failed: set[int] = set()
        self._folders: dict[str, list[str]] = {"": []}
        for place, name in sorted(path.rsplit("/", 1) for path in files):
            self._folders.setdefault(place, []).append(name)
        self._folders[""] = sorted(self._folders.keys() - {""})
        self.url = "memory://all"

    def names(self, folder: str = "") -> list[str]:
        """Names in a folder; none where no node has it."""
        return list(self._folders.get(folder, ()))

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: where no node has it.
            OSError: where none that has it answers.
        """
        return self._with_fallback(name, lambda holder: holder.read(name))

    def read_range(self, name: str, start: int, end: int) -> bytearray:
        """Bytes `[start, end)` of a file; fewer where it ends before. Raises as `read` does."""
        return self._with_fallback(name, lambda holder: holder.read_range(name, start, end))

    def read_into(self, name: str, start: int, into: memoryview) -> int:
        """Fill memory with the bytes of a file from `start` on; how many there were. Raises as `read` does."""
        return self._with_fallback(name, lambda holder: holder.read_into(name, start, into))

    def _with_fallback(self, name: str, act: Callable[[StoreLike], T]) -> T:
        failure = FileNotFoundError(errno.ENOENT, "no node has it", f"{self.url}/{name}")
        problem: OSError = failure
        for at in sorted(self._files.get(name, ()), key=self._place):
            try:
                return act(self.holders[at])
            except OSError as error:
                self._failed.add(at)
                problem = error
        raise problem

    def _place(self, at: int) -> tuple[bool, bool, int]:
        return at in self._failed, at != self._own, (at - self._turn) % len(self.holders)

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """Refuse with OSError."""
        del chunks  # nobody takes them
        raise io.UnsupportedOperation(f"{self.url}/{name}: what nodes have kept is only read")

    def create(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """Refuse with OSError."""
        return self.write(name, chunks)

    def remove(self, name: str) -> None:
        """Refuse with OSError."""
        self.write(name, ())
