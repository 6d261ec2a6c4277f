"""What a checkpoint is made of: pieces of global tensors, and the shard of one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Json = Any


@dataclass(frozen=True)
class Piece:
    """A box of a tensor's global index space, row-major: `global_shape[start : start + shape]`."""

    name: str
    """Name of the global tensor."""
    dtype: str
    """As torch names it: `float32`, `bfloat16`, …"""
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    data: memoryview
    """Its bytes, contiguous."""

    @classmethod
    def from_tensor(
        cls,
        name: str,
        tensor: torch.Tensor,
        global_shape: tuple[int, ...] | None = None,
        start: tuple[int, ...] | None = None,
    ) -> Piece:
        """A piece of a tensor: the whole where no box is given. On a CPU the bytes aren't copied."""
        import torch  # only this edge of the room knows tensors

        host = tensor.detach().to("cpu").contiguous()
        data = memoryview(host.view(-1).view(torch.uint8).numpy())
        shape = tuple(host.shape)
        origin = start if start is not None else (0,) * len(shape)
        return cls(name, str(host.dtype).removeprefix("torch."), shape, global_shape or shape, origin, data)

    def tensor(self) -> torch.Tensor:
        """The piece as a tensor on the host."""
        import torch  # only this edge of the room knows tensors

        kind = getattr(torch, self.dtype)
        if not len(self.data):  # which `frombuffer` refuses
            return torch.empty(self.shape, dtype=kind)
        return torch.frombuffer(bytearray(self.data), dtype=torch.uint8).view(kind).view(self.shape)


@dataclass(frozen=True)
class Shard:
    """Everything that one rank saves or loads."""

    rank: int
    world: int
    layout: dict[str, int]
    """Size by axis."""
    pieces: list[Piece]
    scalars: dict[str, Json] = field(default_factory=dict)
    """Small facts that all ranks agree on, such as tokens seen; rank 0's are saved."""

    def by_name(self) -> Mapping[str, Piece]:
        """Pieces by the name of their tensor."""
        return {piece.name: piece for piece in self.pieces}
