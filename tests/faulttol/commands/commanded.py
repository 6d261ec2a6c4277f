"""Commands of `python -m faulttol` run in this process, and checkpoints for them to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faulttol import cli
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder
from faulttol.checkpoint.hashes import CheckpointSource
from faulttol.checkpoint.save import Saved
from faulttol.checkpoint.store import CheckpointStore
from tests.faulttol.tensors import layout, save_layout, state

Ask = Callable[..., tuple[int, str, str]]


def asker(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path) -> Ask:
    """Runs a command: exit code, output, errors. Runs are those of `home`."""
    monkeypatch.setenv("MEGARAY_HOME", str(home))

    def run(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def tensors() -> dict[str, Any]:
    """Two layers with experts, an embedding, and a few small ones of many dtypes."""
    found = state(4)
    for layer in range(2):
        name = f"blocks.{layer}.feed.experts.up"
        found[name] = torch.arange(8 * 64 * 1100, dtype=torch.float32).view(8, 64, 1100) + layer
        found[f"{name}/exp_avg"] = found[name] / 3
        found[f"blocks.{layer}.norm"] = torch.ones(64) + layer
    found["embedding"] = (torch.arange(700 * 999) % 251).view(700, 999).to(torch.bfloat16)
    return found


def save(root: Path, step: int, values: dict[str, Any], world: int = 2, kind: str = "rows") -> None:
    """Save on all ranks."""
    answers = save_layout(root, step, layout(values, world, 3, kind), keep=9)
    assert all(isinstance(a, Saved) for a in answers), answers


def save_pair(root: Path) -> Path:
    """The same state at step 10 of two ranks and at step 20 of three, cut otherwise."""
    save(root, 10, tensors(), 2, "rows")
    save(root, 20, tensors(), 3, "flat")
    return root


def newest(root: Path) -> tuple[CheckpointStore, CheckpointCommit]:
    """The newest checkpoint of a folder."""
    store = CheckpointStore(str(root))
    return store, CheckpointFolder(store).commits[-1]


def flip(path: Path, at: int) -> None:
    """Flip a bit of a byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def damage_two(root: Path) -> None:
    """Flip a bit in the embedding's part in the files of two ranks of the newest step."""
    source = CheckpointSource(*newest(root))
    for rank in (0, 1):
        piece = next(p for p in source.file(rank) if p.entry.name == "embedding" and p.entry.bytes > 1000)
        flip(root / piece.path, piece.offset + 500)


def files(root: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
