"""Tensors to bytes and back."""

from __future__ import annotations

import pytest

from faulttol.checkpoint.pieces import Piece, Shard

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]


@pytest.mark.parametrize(
    "kind", ["float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool"]
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0,), (2, 0, 3)])
def test_a_tensor_comes_back(kind: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 100).to(getattr(torch, kind))
    piece = Piece.from_tensor("w", tensor)
    assert (piece.dtype, piece.shape, piece.global_shape) == (kind, shape, shape)
    assert piece.start == (0,) * len(shape) and len(piece.data) == tensor.numel() * tensor.element_size()
    back = piece.tensor()
    assert back.dtype == tensor.dtype and back.shape == tensor.shape and torch.equal(back, tensor)


def test_odd_values_keep_their_bits() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40], dtype=torch.bfloat16)
    assert torch.equal(Piece.from_tensor("w", tensor).tensor().view(torch.int16), tensor.view(torch.int16))


def test_a_view_is_made_contiguous() -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(Piece.from_tensor("w", tensor).tensor(), tensor)


def test_on_a_host_the_bytes_are_not_copied() -> None:
    tensor = torch.zeros(4)
    piece = Piece.from_tensor("w", tensor.requires_grad_())
    with torch.no_grad():
        tensor[0] = 1.0
    assert bytes(piece.data[:4]) == b"\x00\x00\x80\x3f"


def test_a_loaded_tensor_is_its_own() -> None:
    piece = Piece.from_tensor("w", torch.zeros(4))
    piece.tensor().fill_(9.0)
    assert torch.equal(piece.tensor(), torch.zeros(4))


def test_a_box_keeps_its_place() -> None:
    piece = Piece.from_tensor("w", torch.zeros(2, 3), (8, 3), (4, 0))
    assert (piece.shape, piece.global_shape, piece.start) == ((2, 3), (8, 3), (4, 0))
    assert Shard(0, 1, {}, [piece]).by_name() == {"w": piece}
