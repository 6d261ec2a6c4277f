"""Tensors to bytes and back, and which of all replicas are written."""

from __future__ import annotations

import random

import pytest

from faulttol.checkpoint.boxes import Box, coverage_error
from faulttol.checkpoint.pieces import BLOCK, DTYPES, LoadTarget, TensorPiece, owned

torch = pytest.importorskip("torch")
from trainer.state import Slice  # noqa: E402

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]


def _round(tensor: torch.Tensor) -> torch.Tensor:
    data = b"".join(TensorPiece.from_slice("w", tensor).chunks())
    back = torch.empty(tensor.shape, dtype=tensor.dtype)
    if data:
        LoadTarget.from_slice("w", back).fill(memoryview(bytearray(data)), Box.full(tuple(tensor.shape)))
    return back


@pytest.mark.parametrize("kind", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0,), (2, 0, 3)])
def test_a_tensor_comes_back(kind: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 100).to(getattr(torch, kind))
    piece = TensorPiece.from_slice("w", tensor)
    assert (piece.dtype, piece.box) == (kind, Box.full(shape))
    assert piece.bytes == tensor.numel() * tensor.element_size() == sum(map(len, piece.chunks()))
    back = _round(tensor)
    assert back.view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()


def test_odd_values_keep_their_bits() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40], dtype=torch.bfloat16)
    assert torch.equal(_round(tensor).view(torch.int16), tensor.view(torch.int16))


def test_a_view_is_saved_and_filled_by_rows() -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(_round(tensor), tensor)
    target = torch.zeros(3, 4)
    LoadTarget.from_slice("w", target.t()).fill(
        memoryview(bytearray(tensor.contiguous().numpy())), Box.full((4, 3))
    )
    assert torch.equal(target, torch.arange(12.0).view(3, 4))


def test_on_a_host_the_bytes_are_the_live_ones() -> None:
    tensor = torch.zeros(4)
    (data,) = TensorPiece.from_slice("w", tensor.requires_grad_()).chunks()
    with torch.no_grad():
        tensor[0] = 1.0
    assert bytes(data[:4]) == b"\x00\x00\x80\x3f"


def test_large_tensors_come_in_whole_blocks() -> None:
    chunks = [
        len(chunk)
        for chunk in TensorPiece.from_slice("w", torch.zeros(40 * BLOCK + 3, dtype=torch.uint8)).chunks()
    ]
    assert (
        sum(chunks) == 40 * BLOCK + 3 and all(size % BLOCK == 0 for size in chunks[:-1]) and len(chunks) == 3
    )


def test_a_parameter_is_filled_in_place() -> None:
    target = torch.nn.Parameter(torch.zeros(2, 2))
    source = torch.arange(4.0)
    LoadTarget.from_slice("w", target, Box((6, 2), (3, 0), (2, 2))).fill(
        memoryview(bytearray(source.numpy())), Box((6, 2), (4, 0), (2, 2))
    )
    assert target.tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_what_does_not_match_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w: a tensor of \[2\] isn't the box \[0:3\] of \[3\]"):
        TensorPiece.from_slice("w", torch.zeros(2), Box.full((3,)))
    with pytest.raises(ValueError, match=r"w: a tensor of \[2\] isn't the box \[2:4\] of \[3\]"):
        LoadTarget.from_slice("w", torch.zeros(2), Box((3,), (2,), (2,)))
    with pytest.raises(ValueError, match="w is wanted as float32, and its tensor is torch.float64"):
        LoadTarget("w", "float32", Box.full((2,)), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="w is complex128, which can't be saved"):
        _ = TensorPiece.from_slice("w", torch.zeros(2, dtype=torch.complex128)).bytes


# ---- replicas ----


def test_of_replicas_each_element_is_written_once_and_the_bytes_spread() -> None:
    noise, world = random.Random(1), 4
    sizes = [(noise.randint(1, 40), noise.randint(1, 200)) for _ in range(200)] + [
        (2000, 1024),
        (3, 2_000_000),
    ]
    written: list[list[TensorPiece]] = []
    for rank in range(world):
        parts = [
            Slice(str(i), torch.zeros(shape), Box.full(shape), rank, world) for i, shape in enumerate(sizes)
        ]
        written.append(list(owned(parts)))
    for number, shape in enumerate(sizes):
        boxes = [piece.box for pieces in written for piece in pieces if piece.name == str(number)]
        assert coverage_error(Box.full(shape), boxes) is None
    assert [sum(p.name == "200" for p in pieces) for pieces in written] == [1] * world, (
        "a large one is shared"
    )
    small = [sum(p.bytes for p in pieces if int(p.name) < 200) for pieces in written]
    assert max(small) < 1.5 * sum(small) / world


def test_what_has_no_replica_is_written() -> None:
    part = Slice("w", torch.arange(3.0), Box((6,), (3,), (3,)))
    (piece,) = owned([part])
    assert (piece.name, piece.dtype, piece.box) == ("w", "float32", part.box)


def test_turns_hang_on_the_box_too() -> None:
    """A tensor that many ranks hold in parts with two replicas each isn't written by the first replicas alone."""
    boxes = [Box((64, 4), (row, 0), (1, 4)) for row in range(64)]
    firsts = sum(len(list(owned([Slice("w", torch.zeros(1, 4), box, 0, 2)]))) for box in boxes)
    assert 16 <= firsts <= 48
