"""What several ranks want is read by one of them, verified, and passed on."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from faulttol.checkpoint import pieces, reading, shards, sharing
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import folder_of
from faulttol.checkpoint.load import BUFFER, Restored
from faulttol.checkpoint.manifest import Incomplete
from faulttol.checkpoint.pieces import BLOCK
from tests.faulttol.checkpoint.counting import CountedBytes
from tests.faulttol.checkpoint.forgery import forge

torch = pytest.importorskip("torch")
from tests.faulttol.checkpoint.gloo_ranks import save_and_restore  # noqa: E402
from tests.faulttol.tensors import Layout, blank, equal, restore_layout, restored, save_layout  # noqa: E402
from tests.trainer.parallel.rank_pool import RankPool  # noqa: E402
from trainer.state import Slice  # noqa: E402

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


def _same(ranks: int, size: int = 1 << 18) -> Layout:
    """The same two tensors on all ranks, and one that each has alone."""
    torch.manual_seed(4)
    weight, norm = torch.randn(size // 64, 64), torch.randn(333)
    own = torch.randn(ranks * 7, 5)
    layout: Layout = []
    for rank in range(ranks):
        box = Box.full((ranks * 7, 5)).cut(0, 7 * rank, 7 * (rank + 1))
        layout.append(
            [
                Slice("weight", weight.clone(), Box.full(tuple(weight.shape)), rank, ranks),
                Slice("norm", norm.clone(), Box.full((333,)), rank, ranks),
                Slice("own", own[7 * rank : 7 * (rank + 1)].clone(), box),
            ]
        )
    return layout


def _seen_by(parts: Layout, world: int) -> Layout:
    """The same tensors on other ranks: `own` whole on the last."""
    rows = torch.cat([mine[2].tensor for mine in parts])
    kept = [
        [Slice(p.name, p.tensor.clone(), p.box, rank, world) for p in parts[0][:2]] for rank in range(world)
    ]
    kept[-1].append(Slice("own", rows, Box.full(tuple(rows.shape))))
    return kept


@pytest.mark.parametrize(("a", "b"), [(4, 4), (1, 4), (3, 4), (7, 2), (2, 5)])
def test_what_all_want_is_read_once(memory: str, monkeypatch: pytest.MonkeyPatch, a: int, b: int) -> None:
    monkeypatch.setattr(shards, "BLOCK", 1 << 12)
    monkeypatch.setattr(pieces, "BLOCK", 1 << 12)
    monkeypatch.setattr(sharing, "MAX_READ", 1 << 14)
    monkeypatch.setattr(sharing, "ROUND", 1 << 16)
    parts = _same(a)
    save_layout(memory, 1, parts)
    other = parts if a == b else _seen_by(parts, b)
    there, counted = blank(other), CountedBytes(monkeypatch)
    answers = restore_layout(memory, there)
    assert equal(there, other)
    data = (1 << 20) + 333 * 4 + a * 35 * 4
    found = [answer.bytes for answer in answers if isinstance(answer, Restored)]
    assert data <= counted.bytes < 1.1 * data + 40_000, "and not as often as there are ranks"
    assert max(found) < 2.2 * sum(found) / b, "all ranks read their part of it"


def test_real_ranks_pass_on_what_all_of_them_want(tmp_path: Path) -> None:
    pool, parts = RankPool(), _same(3, 3 << 20)
    try:
        answers = pool.run(3, save_and_restore, str(tmp_path), parts)
    finally:
        pool.end()
    assert all(found.step == 1 and alike for found, alike in answers)
    size = 4 * ((3 << 20) + 333 + 105)
    assert size <= sum(found.bytes for found, _ in answers) < 1.05 * size + 30_000
    assert max(found.bytes for found, _ in answers) < 0.4 * size


def test_boxes_that_a_rank_wants_twice_are_filled_twice(tmp_path: Path) -> None:
    parts = _same(2, 1 << 12)
    save_layout(tmp_path, 1, parts)
    there = blank(_seen_by(parts, 2))
    again = [Slice(p.name, torch.zeros_like(p.tensor), p.box) for p in there[0]]
    there[0] += again
    restored(tmp_path, there)
    assert equal([there[0][:2]], [parts[0][:2]]) and equal([again], [parts[0][:2]])


@pytest.mark.parametrize("bad", [0, 2])
def test_what_is_passed_on_is_verified_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    """A rank that reads a changed block passes nothing on; all go back to the checkpoint before, and none hangs."""
    monkeypatch.setattr(shards, "BLOCK", 1 << 12)
    monkeypatch.setattr(pieces, "BLOCK", 1 << 12)
    monkeypatch.setattr(sharing, "MAX_READ", 1 << 13)
    monkeypatch.setattr(sharing, "ROUND", 1 << 15)
    parts = _same(3)
    save_layout(tmp_path, 1, parts)
    save_layout(tmp_path, 2, parts)
    (path,) = (tmp_path / folder_of(2)).glob(f"*.r{bad:05d}.*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    there = blank(parts)
    found = restored(tmp_path, there)
    assert found.step == 1 and equal(there, parts)
    assert len(found.passed) == 1 and f"{path} differs from what was saved in weight[" in found.passed[0]


def test_a_rank_that_an_object_store_fails_keeps_nobody_waiting(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client library raises kinds of its own; the rank still takes its turn in each of its groups."""
    parts = _same(3)
    for rank in (0, 1):  # of two groups: ranks 0 and 1 want a tensor that rank 2 doesn't
        own = torch.ones(40, 3)
        parts[rank].append(Slice("pair", own, Box.full((40, 3)), rank, 2))
    save_layout(memory, 1, parts)
    cat = MemoryFileSystem.cat_file

    def fail(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if ".r00000." in path and start is not None:
            raise RuntimeError("EndpointConnectionError")
        return cat(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    answers = restore_layout(memory, blank(parts))
    assert {type(answer) for answer in answers} == {Incomplete}, "and nobody's patience ends"
    assert "can't be read: " in str(answers[2]) and "EndpointConnectionError" in str(answers[2])


def test_a_load_of_what_all_want_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "MAX_READ", BLOCK)
    monkeypatch.setattr(sharing, "ROUND", 2 * BLOCK)
    parts = _same(2, 6 << 20)
    save_layout(tmp_path, 1, parts)
    there = blank(parts)
    tracemalloc.start()
    try:
        restored(tmp_path, there)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert equal(there, parts)
    # Two ranks here: of each a round that goes around, one that is read ahead, and what it has put into a queue.
    assert BLOCK < most < 12 * BLOCK, "of 24 MiB that each has got"


def test_the_buffer_holds_what_a_load_has_at_once() -> None:
    """Twice what is read at once, which an object store holds twice; a round that goes around and the one read ahead."""
    assert 2 * reading._THREADS * reading._SPAN <= BUFFER
    assert sharing.ROUND + 2 * sharing.ROUND + 2 * sharing._THREADS * sharing.MAX_READ <= BUFFER


def _short(rows: list[Any]) -> None:
    next(row for row in rows if row[0] == "weight")[4][0] -= 1


def _again(rows: list[Any]) -> None:
    next(row for row in rows if row[0] == "weight")[3][0] -= 1


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("change", "why"),
    [(_short, "of [4096, 64] has no source: 262080 of 262144"), (_again, "] has two sources, the boxes [")],
)
def test_what_is_shared_has_one_source_or_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[Any]], None],
    why: str,
    world: int,
) -> None:
    monkeypatch.setattr(pieces, "BLOCK", 1 << 12)
    parts = _same(2)
    save_layout(tmp_path, 1, parts)
    forge(tmp_path, 1, 1, change)
    answers = restore_layout(tmp_path, blank(_seen_by(parts, world)))
    assert {type(answer) for answer in answers} == {Incomplete} and len(set(map(str, answers))) == 1
    assert f"{tmp_path}/{folder_of(1)}/run-1.a0001.manifest.json: weight[" in str(answers[0]) and why in str(
        answers[0]
    )
