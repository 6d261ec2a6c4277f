"""Rows through weights whose gradients come later in the backward pass than those of the rows.

The engine of autograd takes the nodes that were made last first. A weight's own node, made early, so comes after all that
the rows' gradients lead to, such as the start of a collective that then runs beside the weight's matmul.

Shape letters: R rows, L experts, F and D the widths on the two sides of a weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Later:
    """A weight whose gradient is worked out where this object was made."""

    def __init__(self, weight: Tensor) -> None:
        self._kept: tuple[Tensor, ...] | None = None
        self.weight: Tensor = _Weight.apply(weight, self)

    def keep(self, *parts: Tensor) -> None:
        """What `gradient` is made of."""
        self._kept = parts

    def nothing(self) -> Tensor:
        """A gradient that nobody reads, in the shape that autograd wants."""
        return self.weight.new_empty(1).expand(self.weight.shape)

    def gradient(self) -> Tensor:
        """That of the weight."""
        assert self._kept is not None, "the rows' backward pass comes before"
        parts, self._kept = self._kept, None
        return self.product(*parts)

    def product(self, slope_RF: Tensor, x_RD: Tensor) -> Tensor:
        """Of a weight [F, D] that all rows meet."""
        return torch.mm(slope_RF.t(), x_RD)


class WeightLater(Later):
    """A weight [L, F, D] of grouped matmuls."""

    def rows(self, x_RD: Tensor, ends_L: Tensor) -> Tensor:
        """Each row times the transposed weight of its expert, [R, F]; once."""
        return _Rows.apply(x_RD, self.weight, ends_L, self)

    def product(self, slope_RF: Tensor, x_RD: Tensor, *rest: Tensor) -> Tensor:
        """[L, F, D]."""
        return F.grouped_mm(slope_RF.t(), x_RD, offs=rest[0])


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, later: Later) -> Tensor:
        ctx.later = later
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _nothing: Tensor) -> tuple[Tensor, None]:
        return ctx.later.gradient(), None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight: Tensor, ends_L: Tensor, later: WeightLater) -> Tensor:
        ctx.save_for_backward(x_RD, weight, ends_L)
        ctx.later = later
        return F.grouped_mm(x_RD, weight.transpose(1, 2), offs=ends_L)

    @staticmethod
    def backward(ctx: Any, slope_RF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_RD, weight, ends_L = ctx.saved_tensors
        slope_RF = slope_RF.contiguous()
        ctx.later.keep(slope_RF, x_RD, ends_L)
        return F.grouped_mm(slope_RF, weight, offs=ends_L), ctx.later.nothing(), None, None
