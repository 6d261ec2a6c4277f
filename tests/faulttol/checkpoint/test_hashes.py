"""Hashes of tensors are those of their values, whatever layout holds them; what is read for them is verified."""

from __future__ import annotations

import hashlib
import random
from math import prod
from pathlib import Path

import pytest

from faulttol.checkpoint import hashes
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder
from faulttol.checkpoint.hashes import CheckpointSource, coverage_error_in, parts_of, tensor_hashes
from faulttol.checkpoint.manifest import Incomplete
from faulttol.checkpoint.pieces import BLOCK
from faulttol.checkpoint.save import Saved
from faulttol.checkpoint.store import CheckpointStore
from faulttol.commands import verify

torch = pytest.importorskip("torch")
from tests.faulttol.tensors import KINDS, bits, cut, layout, save_layout, state  # noqa: E402

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]


def _newest(root: object) -> tuple[CheckpointStore, CheckpointCommit]:
    store = CheckpointStore(str(root))
    return store, CheckpointFolder(store).commits[-1]


def _save(root: Path, tensors: dict[str, torch.Tensor], world: int, kind: str, step: int = 1) -> None:
    answers = save_layout(root, step, layout(tensors, world, 7, kind))
    assert all(isinstance(a, Saved) for a in answers), answers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 4])
def test_a_hash_is_that_of_the_values_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, world: int
) -> None:
    """With stretches of one block, so that a tensor has several of them."""
    tensors = state(5)
    if kind != "boxes":  # thousands of them
        tensors["wide"] = torch.arange(3 * 500 * 401, dtype=torch.float32).view(3, 500, 401)
        tensors["flat"] = torch.arange(2 * BLOCK + 17, dtype=torch.int16)
    _save(tmp_path, tensors, world, kind)
    expected = {name: hashlib.sha256(bits(tensor)).hexdigest() for name, tensor in tensors.items()}
    assert tensor_hashes(*_newest(tmp_path)) == expected
    monkeypatch.setattr(hashes, "MAX_READ", BLOCK)
    told: list[tuple[int, int]] = []
    assert tensor_hashes(*_newest(tmp_path), lambda done, total: told.append((done, total))) == expected
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert told[-1] == (total, total) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_only_some_tensors_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(4 * BLOCK), "b": torch.ones(3)}
    _save(tmp_path, tensors, 2, "rows")
    found = tensor_hashes(*_newest(tmp_path), names=["b"])
    assert found == {"b": hashlib.sha256(bits(tensors["b"])).hexdigest()}


def test_a_piece_behind_others_in_its_file_is_verified_by_its_own_bytes(tmp_path: Path) -> None:
    _save(tmp_path, {"a": torch.ones(4 * BLOCK), "b": torch.arange(2 * BLOCK)}, 1, "rows")
    source = CheckpointSource(*_newest(tmp_path))
    (piece,) = source.pieces("b")
    assert piece.offset > 0
    source.check([(piece, 0, 1), (piece, 1, 2)])
    with open(tmp_path / piece.path, "r+b") as file:
        file.seek(piece.offset + BLOCK)
        file.write(b"\xff")
    source.check([(piece, 0, 1)])
    with pytest.raises(Incomplete, match=rf"in b.*bytes {piece.offset + piece.block} to"):
        source.check([(piece, 0, 1), (piece, 1, 2)])


def test_a_changed_element_changes_its_tensors_hash_alone(tmp_path: Path) -> None:
    tensors = state(5)
    _save(tmp_path, tensors, 3, "boxes")
    before = tensor_hashes(*_newest(tmp_path))
    name = next(name for name, t in tensors.items() if t.dtype == torch.float64 and t.numel() > 5)
    tensors[name].view(-1)[-1] += 1
    _save(tmp_path, tensors, 2, "flat", step=2)
    after = tensor_hashes(*_newest(tmp_path))
    assert [n for n in before if before[n] != after[n]] == [name]


@pytest.mark.parametrize("seed", range(6))
def test_any_box_reads_as_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """And `cost` tells the bytes that are read for it."""
    monkeypatch.setattr(hashes, "MAX_READ", BLOCK)
    noise = random.Random(seed)
    shape = (noise.randint(1, 6), noise.randint(100, 300), noise.randint(300, 900))
    tensor = torch.randint(-100, 100, shape, dtype=torch.int32)
    _save(tmp_path, {"t": tensor}, 3, ("rows", "flat")[seed % 2])
    whole = Box.full(shape)
    for box in cut(whole, noise)[:4]:
        source = CheckpointSource(*_newest(tmp_path))
        pieces = source.pieces("t")
        before = source.bytes
        data = b"".join(bytes(chunk) for chunk in source.chunks("t", box))
        assert data == bits(tensor[box.slices_within(whole)].contiguous())
        assert source.bytes - before == source.cost("t", box)
        assert source.cost("t", box) >= box.elements * 4 and len(pieces) > 0


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    _save(tmp_path, {"t": torch.arange(600_000, dtype=torch.float32)}, 1, "rows")
    (path,) = tmp_path.glob("*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[4096 + BLOCK + 5] ^= 1
    path.write_bytes(data)
    first = BLOCK // 4
    with pytest.raises(Incomplete, match=rf"differs from what was saved in t\[{first}:{2 * first}\]"):
        tensor_hashes(*_newest(tmp_path))
    source = CheckpointSource(*_newest(tmp_path))
    source.read("t", Box((600_000,), (0,), (first,)))  # another block
    path.write_bytes(data[:-1])
    with pytest.raises(Incomplete, match="truncated"):
        tensor_hashes(*_newest(tmp_path))


def test_an_element_without_a_source_or_with_two_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, {"t": torch.arange(600.0).view(60, 10)}, 3, "rows")
    source, whole = CheckpointSource(*_newest(tmp_path)), Box.full((60, 10))
    pieces = source.pieces("t")
    with pytest.raises(Incomplete, match=r"manifest.json: t\[20:40, 0:10\] of .* has no source"):
        source.read("t", whole, [pieces[0], pieces[2]])
    with pytest.raises(Incomplete, match=r"t\[0:20, 0:10\] has two sources"):
        source.read("t", whole, [*pieces, pieces[0]])


class Counting(CheckpointStore):
    """Remembers the bytes of its largest read."""

    largest = 0

    def read_range(self, name: str, start: int, end: int) -> bytearray:
        self.largest = max(self.largest, end - start)
        return super().read_range(name, start, end)


def test_no_more_than_a_stretch_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound of the memory; `verify` keeps it too, of large pieces and of many small ones."""
    monkeypatch.setattr(hashes, "MAX_READ", BLOCK)
    monkeypatch.setattr(verify, "MAX_READ", BLOCK)
    tensors = {"large": torch.zeros(3, 400_000), **{f"small.{i}": torch.ones(90_000) for i in range(9)}}
    _save(tmp_path, tensors, 1, "rows")
    store = Counting(str(tmp_path))
    tensor_hashes(store, CheckpointFolder(store).commits[-1])
    assert 0 < store.largest <= BLOCK
    store.largest = 0
    assert verify.verify(store, CheckpointFolder(store).commits[-1]).whole
    assert 0 < store.largest <= BLOCK


def test_an_index_that_was_changed_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, {"t": torch.ones(10)}, 1, "rows")
    (path,) = tmp_path.glob("*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(Incomplete, match="its index differs"):
        tensor_hashes(*_newest(tmp_path))


def test_indexes_are_forgotten_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_INDEXES", 1)
    tensors = state(5)
    _save(tmp_path, tensors, 4, "rows")
    source = CheckpointSource(*_newest(tmp_path))
    first = source.file(0)
    once = source.bytes
    assert source.file(0) is first and source.bytes == once
    source.file(1)
    assert source.file(0) == first and source.bytes > 2 * once - 100


@pytest.mark.parametrize("most", [1, 7, 64, 10_000])
def test_parts_of_a_box_follow_each_other_in_memory(most: int) -> None:
    box = Box((9, 8, 7, 6), (2, 1, 3, 0), (5, 6, 4, 6))
    at = 0
    for part in parts_of(box, most):
        assert part.elements <= most
        inside = [s.start for s in part.slices_within(box)]
        assert sum(i * prod(box.shape[d + 1 :]) for d, i in enumerate(inside)) == at
        flat = box.flat(at, at + part.elements)
        assert sum(b.elements for b in flat) == part.elements and flat[0].start == part.start
        at += part.elements
    assert at == box.elements


@pytest.mark.parametrize("count", [4, 40])
def test_what_many_boxes_leave_out_or_double_is_told(count: int) -> None:
    target = Box((2 * count, 3), (count, 1), (count, 2))
    rows = [target.cut(0, at, at + 1) for at in range(count)]
    assert coverage_error_in(target, rows) is None
    assert "no source" in (coverage_error_in(target, rows[1:]) or "")
    assert "two sources" in (coverage_error_in(target, [*rows[1:], rows[1]]) or "")
    assert "outside" in (coverage_error_in(target, [*rows[1:], Box((9, 9), (0, 0), (1, 2))]) or "")
