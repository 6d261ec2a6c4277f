"""Bytes that are read."""

from __future__ import annotations

from typing import Any

import pytest


class CountedBytes:
    """Bytes that a file system was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memory: Any = pytest.importorskip("fsspec.implementations.memory")
        plain, self.bytes = memory.MemoryFileSystem.cat_file, 0

        def counting(fs: Any, path: str, start: Any = None, end: Any = None, **rest: Any) -> bytes:
            data = plain(fs, path, start=start, end=end, **rest)
            self.bytes += len(data)
            return data

        monkeypatch.setattr(memory.MemoryFileSystem, "cat_file", counting)
