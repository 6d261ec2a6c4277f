"""Any layout reads what any other saved, bit by bit, and reads no more than it needs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from faulttol.checkpoint import reading, shards
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import folder_of
from faulttol.checkpoint.load import Restored, restore, stored
from faulttol.checkpoint.peers import SoloPeers
from faulttol.checkpoint.pieces import BLOCK, LoadTarget, staging_buffer
from faulttol.checkpoint.save import Saved
from tests.faulttol.checkpoint.counting import CountedBytes
from tests.faulttol.ranks import identity, save_all

torch = pytest.importorskip("torch")
from tests.faulttol.tensors import (  # noqa: E402
    KINDS,
    Layout,
    bits,
    blank,
    equal,
    flat_bytes,
    layout,
    restore_layout,
    restored,
    save_layout,
    state,
)
from trainer.state import Slice  # noqa: E402

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


PAIRS = [(a, b) for a in range(1, 9) for b in (a % 8 + 1, 1, 9 - a)]
CASES = [(a, b, KINDS[i % 3], KINDS[i // 3 % 3]) for i, (a, b) in enumerate(PAIRS)]
# As many ranks as before, and other boxes on them: what a rank's own file lacks is found elsewhere.
CASES += [(3, 3, "rows", "flat"), (4, 4, "flat", "boxes"), (5, 5, "boxes", "rows"), (2, 2, "boxes", "boxes")]


@pytest.mark.parametrize(("a", "b", "kind", "then"), CASES)
def test_from_one_layout_to_another_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, a: int, b: int, kind: str, then: str
) -> None:
    """With blocks of 64 bytes and spans of 256, so that small tensors have many of both."""
    monkeypatch.setattr(shards, "BLOCK", 64)
    monkeypatch.setattr(reading, "_SPAN", 256)
    seed = 10 * a + b
    tensors = state(seed)
    one = layout(tensors, a, seed, kind)
    other = layout(tensors, b, seed + 1, then)
    assert all(isinstance(s, Saved) for s in save_layout(tmp_path / "a", 7, one))
    there = blank(other)
    assert not equal(there, other), "the slices aren't filled yet"
    found = restored(tmp_path / "a", there)
    assert (found.step, found.facts, found.passed) == (7, {"world": a}, ()) and equal(there, other)
    assert found.path == f"{tmp_path}/a/{folder_of(7)}"
    assert all(isinstance(s, Saved) for s in save_layout(tmp_path / "b", 8, there))
    back = blank(one)
    assert restored(tmp_path / "b", back).step == 8 and equal(back, one)


def test_every_pair_of_kinds_and_world_sizes_was_tried() -> None:
    assert {a for a, _ in PAIRS} == {b for _, b in PAIRS} == set(range(1, 9))
    assert len({(kind, then) for *_, kind, then in CASES}) == 9


def test_a_load_shows_that_it_gets_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK", 64)
    monkeypatch.setattr(reading, "_SPAN", 256)
    parts = layout(state(4), 1, 0, "rows")
    save_layout(tmp_path, 7, parts)
    signs: list[int] = []
    wanted = [LoadTarget.from_slice(p.name, p.tensor, p.box) for p in blank(parts)[0]]
    found = restore(stored(str(tmp_path)), wanted, SoloPeers(), identity(0, 1), lambda: signs.append(1))
    assert found is not None and found.step == 7 and len(signs) > 1


def test_nothing_was_saved_yet(tmp_path: Path) -> None:
    assert restore_layout(tmp_path / "none", layout(state(1), 2, 1, "rows")) == [None, None]


def test_a_file_is_safetensors(tmp_path: Path) -> None:
    reader: Any = pytest.importorskip("safetensors.torch")
    tensors = state(3)
    parts = layout(tensors, 3, 3, "boxes")
    save_layout(tmp_path, 1, parts)
    seen = 0
    for path in (tmp_path / folder_of(1)).glob("*.safetensors"):
        found = reader.load_file(path)
        index = json.loads(bytes(found.pop("__index__").numpy()))
        assert len(found) == len(index["pieces"])
        for name, dtype, whole, start, shape, _ in index["pieces"]:
            box = Box(tuple(whole), tuple(start), tuple(shape))
            told = found[name if whole == shape else f"{name}{box}"]
            assert str(told.dtype) == f"torch.{dtype}"
            assert bits(told) == bits(tensors[name][box.slices_within(Box.full(box.whole))])
            seen += 1
    assert seen >= len(tensors)


# ---- bytes and memory ----


def _experts(count: int, ranks: int, kind: str) -> Layout:
    """32 MiB of experts and some small tensors: experts by rows, or flat."""
    torch.manual_seed(1)
    tensors = {"experts": torch.randn(count, 2, 128, 32 * 1024 // count)}
    tensors |= {f"norm.{i}": torch.randn(300) for i in range(50)}
    return layout(tensors, ranks, 1, kind)


@pytest.mark.parametrize(("a", "b", "kinds"), [(4, 3, "rows flat"), (1, 8, "rows rows"), (3, 2, "flat rows")])
def test_each_rank_reads_what_it_needs(
    memory: str, monkeypatch: pytest.MonkeyPatch, a: int, b: int, kinds: str
) -> None:
    saved, wanted = kinds.split()
    save_layout(memory, 1, _experts(32, a, saved))
    other = _experts(32, b, wanted)
    there, counted = blank(other), CountedBytes(monkeypatch)
    answers = restore_layout(memory, there)
    assert equal(there, other)
    needed = sum(p.box.elements * 4 for mine in there for p in mine)
    edges = 2 * BLOCK * a * b  # at most two blocks of each pair of ranks are read for a part of them
    assert needed <= counted.bytes <= 1.05 * needed + edges
    indexes = sum(a.bytes for a in answers if isinstance(a, Restored))
    assert counted.bytes - indexes < 50_000, "all but the manifest is counted by the ranks themselves"


def test_one_expert_is_read_alone(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that wants a thirty-second part reads that, the small tensors and the index."""
    monkeypatch.setattr(shards, "BLOCK", 1 << 14)
    parts = _experts(32, 1, "rows")
    save_layout(memory, 1, parts)
    (experts, *small) = parts[0]
    one = Box(experts.box.whole, (7, 0, 0, 0), (1, *experts.box.shape[1:]))
    target = Slice("experts", torch.zeros(one.shape), one)
    counted = CountedBytes(monkeypatch)
    restored(memory, [[target, *blank([small])[0]]])
    assert torch.equal(target.tensor, experts.tensor[7:8])
    needed = (one.elements + 50 * 300) * 4
    index = 32 * (32 << 20) // (1 << 14) + 50 * 150
    assert needed < counted.bytes <= 1.05 * needed + index + 10_000


def test_a_load_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_SPAN", BLOCK)
    other = _experts(32, 1, "rows")
    save_layout(tmp_path, 1, _experts(32, 2, "flat"))
    there = blank(other)
    tracemalloc.start()
    try:
        restored(tmp_path, there)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert equal(there, other)
    assert BLOCK < most < 3 * reading._THREADS * BLOCK, "of 32 MiB that were read"


# ---- what a run may load ----


def _refusal(root: object, parts: Layout) -> str:
    answers = restore_layout(root, parts)
    assert all(isinstance(a, UserError) for a in answers), answers
    assert len({str(a) for a in answers}) == 1 and "\n" not in str(answers[0])
    return str(answers[0])


def _with(parts: Layout, name: str, tensor: torch.Tensor) -> Layout:
    """The layout with a tensor of rank 1's own added or put in another's place."""
    kept = [[p for p in mine if p.name != name] for mine in parts]
    kept[1].append(Slice(name, tensor, Box.full(tuple(tensor.shape))))
    return kept


def test_another_models_state_is_refused_by_name(tmp_path: Path) -> None:
    save_all(tmp_path, 10)
    save_all(tmp_path, 20)
    parts = flat_bytes(2, 20, 2)
    told = _refusal(tmp_path, _with(parts, "waight", torch.zeros(3)))
    assert (
        "step-0000000020 is the state of another model or optimizer (it has no waight (did you mean 'weight'?))"
        in told
    )
    assert "set model and optim as run run-1 had them, or type checkpoint.path= another folder" in told
    told = _refusal(tmp_path, _with(parts, "bias", torch.zeros(11, dtype=torch.uint8)))
    assert "bias is uint8[10] there, and uint8[11] here" in told
    told = _refusal(tmp_path, _with(parts, "bias", torch.zeros(10)))
    assert "bias is uint8[10] there, and float32[10] here" in told
    told = _refusal(tmp_path, [[p for p in mine if p.name != "own/0"] for mine in parts])
    assert "optimizer (nothing here wants own/0):" in told, "what is wanted isn't named"
    told = _refusal(tmp_path, [[], [Slice("x", torch.zeros(1), Box.full((1,)))]])
    assert "it has no x; nothing here wants bias; nothing here wants own/0; and 2 more" in told


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    save_all(tmp_path, 10, run="run-2")
    told = _refusal(tmp_path, flat_bytes(2, 10, 2))
    assert (
        "belongs to run run-2" in told and "this is run run-1: type checkpoint.path= another folder" in told
    )


def test_an_older_attempt_is_refused_and_a_newer_one_reads(tmp_path: Path) -> None:
    save_all(tmp_path, 10, attempt=2)
    parts = flat_bytes(2, 10, 3)
    told = _refusal(tmp_path, blank(parts))
    assert "attempt 2 of run run-1 has saved" in told and "needs a higher MEGARAY_ATTEMPT" in told
    there = blank(parts)
    assert restored(tmp_path, there, attempt=3).step == 10 and equal(there, parts)


# ---- kill -9 ----

_SAVER = """
import itertools, sys
from faulttol.checkpoint.peers import SoloPeers
from faulttol.checkpoint.save import Retention, save
from tests.faulttol.checkpoint.counting import CountedBytes
from tests.faulttol.ranks import identity, pieces
print("ready", flush=True)
for step in itertools.count(int(sys.argv[2])):
    save(sys.argv[1], step, pieces(0, 1, step, size=200_000), identity(0, 1), {}, SoloPeers(), Retention(2))
    print(step, flush=True)
"""


def _killed(root: Path, first: int, commits: int, after: float) -> int:
    """The last step that a saver told as committed; killed a while after so many commits."""
    child = subprocess.Popen(
        [sys.executable, "-c", _SAVER, str(root), str(first)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    heard = [child.stdout.readline() for _ in range(commits)]
    time.sleep(after)  # where in a save the kill lands, not how long a test waits
    child.kill()
    told = [int(row) for row in ["0", *heard, *child.stdout.read().split("\n")[:-1]]]
    child.wait()
    child.stdout.close()
    return max(told)


def test_a_saver_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Twelve processes that do nothing but save, each killed after a random time."""
    noise, first, committed = random.Random(5), 1, 0
    for turn in range(12):
        committed = max(committed, _killed(tmp_path, first, turn % 3, noise.uniform(0, 0.03)))
        there = blank(flat_bytes(1, 1, 1, size=200_000))
        (found,) = restore_layout(tmp_path, there)
        if found is None:
            assert committed == 0
            continue
        assert isinstance(found, Restored) and found.passed == () and found.step >= committed
        assert equal(there, flat_bytes(1, found.step, 1, size=200_000))
        first = found.step + 1
        left = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert len(left) < 13, "leftovers of earlier saves are removed"
    assert committed > 0


def test_spans_of_any_length_are_read_into_the_same_memory() -> None:
    """New memory for each is cleared, mapped and taken back for each."""
    reader = reading.CheckpointReader.__new__(reading.CheckpointReader)
    reader._memory, reader._all = threading.local(), []
    first = reader._thread_buffer(64)
    assert reader._thread_buffer(32) is first and len(reader._thread_buffer(128)) == 128
    others: list[memoryview] = []
    thread = threading.Thread(target=lambda: others.append(reader._thread_buffer(64)))
    thread.start()
    thread.join()
    others[0][:4] = b"mine"
    assert bytes(reader._thread_buffer(64)[:4]) == bytes(4), "each thread has its own"


def test_what_goes_to_a_device_is_read_into_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    empty = torch.empty

    def make(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        asked.append(pin_memory)
        if len(asked) > 1:
            raise RuntimeError("CUDA error: out of memory")
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", make)
    memory = [staging_buffer(64, on_device) for on_device in (True, True, False)]
    assert asked == [True, True], "other memory serves where none can be locked"
    assert all(isinstance(one, memoryview) and len(one) == 64 and not one.readonly for one in memory)
