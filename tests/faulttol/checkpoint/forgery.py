"""Checkpoints whose digests are all right and whose indexes are not, as a faulty writer would make them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from faulttol.checkpoint.folder import CheckpointFolder, folder_of
from faulttol.checkpoint.manifest import ShardFile, digest
from faulttol.checkpoint.store import CheckpointStore


def forge(root: Path, step: int, rank: int, change: Callable[[list[Any]], None]) -> None:
    """Change the index of a file, and the digests with it, as a faulty writer would."""
    store = CheckpointStore(str(root))
    (commit,) = [c for c in CheckpointFolder(store).commits if c.step == step]
    told = CheckpointFolder(store).manifest(commit)
    (path,) = (root / folder_of(step)).glob(f"*.r{rank:05d}.*")
    data, file = path.read_bytes(), told.files[rank]
    tree = json.loads(data[-file.index :])
    change(tree["pieces"])
    text = json.dumps(tree, separators=(",", ":")).encode()
    path.write_bytes(data[: -file.index] + text)
    files = list(told.files)
    files[rank] = ShardFile(file.bytes - file.index + len(text), len(text), digest(text))
    head, directory = replace(told, files=tuple(files)).split()
    (root / commit.manifest).write_bytes(head.dump())
    (root / commit.directory(told.token)).write_bytes(b"".join(directory))
