"""The state that measurements save and load: names and shapes of a model of experts with AdamW's slots, cut by rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from faulttol.checkpoint.boxes import Box

if TYPE_CHECKING:
    import torch

SLOTS = ("", "/exp_avg", "/exp_avg_sq")
"""fp32 master and AdamW's two moments of each parameter."""
_EXPERTS = 8
_LAYERS = 16


def shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a model whose fp32 masters and moments have about `size` bytes.

    Args:
        size: in bytes; the model has 16 layers of 8 experts, whose width follows from it.
    """
    each = size // (4 * len(SLOTS) * _LAYERS)
    hidden = next((n for n in (1024, 64) if each > 12 * n * n), 16)
    inner = max(8, (each - 4 * hidden * hidden) // (3 * _EXPERTS * hidden) // 8 * 8)
    layer = {
        "attention.qkv": (3 * hidden, hidden),
        "attention.out": (hidden, hidden),
        "experts.gate_up": (_EXPERTS, 2 * inner, hidden),
        "experts.down": (_EXPERTS, hidden, inner),
    }
    return {f"blocks.{number}.{name}": shape for number in range(_LAYERS) for name, shape in layer.items()}


@dataclass(frozen=True)
class Share:
    """One rank's part of a named tensor, as `pieces.owned` takes it."""

    name: str
    tensor: torch.Tensor
    box: Box
    replica: int = 0
    replicas: int = 1


def boxes(params: dict[str, tuple[int, ...]], rank: int, world: int, dim: int) -> Iterator[tuple[str, Box]]:
    """What a rank has of each parameter: an even part along a dim.

    Args:
        dim: counted from the end for the tensors of experts, so that 0 is whole experts and -1 columns of each.
    """
    for name, shape in params.items():
        at = dim % len(shape)
        first, last = (shape[at] * turn // world for turn in (rank, rank + 1))
        yield name, Box.full(shape).cut(at, first, last)


def share(params: dict[str, tuple[int, ...]], rank: int, world: int, dim: int = 0) -> list[Share]:
    """A rank's live state: every slot of its part of each parameter, with values that tell tensors apart."""
    import torch

    shares: list[Share] = []
    for number, slot in enumerate(SLOTS):
        for name, box in boxes(params, rank, world, dim):
            tensor = torch.empty(box.shape, dtype=torch.float32)
            tensor.fill_(float(number + 1) + len(shares) % 97 / 128)
            shares.append(Share(f"{name}{slot}", tensor, box))
    return shares


def elements(params: dict[str, tuple[int, ...]]) -> int:
    """Of all parameters."""
    return sum(prod(shape) for shape in params.values())
