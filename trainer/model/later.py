"""Rows through weights whose gradients come later in the backward pass than those of the rows.

The engine of autograd takes the nodes that were made last first. A weight's own node, made early, so comes after all that
the rows' gradients lead to, such as the start of a collective that then runs beside the weight's matmul.

Shape letters: R rows, L experts, F and D the widths on the two sides of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Owing:
    """A gradient that is still to be worked out: what it is made of, and how.

    The weight's node in the graph holds this and not the `Later`, whose `weight` holds that node: a ring that reference
    counts never free, and while a run trains nothing else does.
    """

    def __init__(self, product: Callable[..., Tensor]) -> None:
        self._product = product
        self._parts: tuple[Tensor, ...] | None = None

    def keep(self, parts: tuple[Tensor, ...]) -> None:
        """What `gradient` is made of."""
        self._parts = parts

    def gradient(self) -> Tensor:
        """That of the weight; once."""
        assert self._parts is not None, "the rows' backward pass comes before"
        parts, self._parts = self._parts, None
        return self._product(*parts)


class Later:
    """A weight whose gradient is worked out where this object was made."""

    def __init__(self, weight: Tensor) -> None:
        self._owing = _Owing(self.product)
        self.weight: Tensor = _Weight.apply(weight, self._owing)

    def keep(self, *parts: Tensor) -> None:
        """What the weight's gradient is made of, for `product`."""
        self._owing.keep(parts)

    def nothing(self) -> Tensor:
        """A gradient that nobody reads, in the shape that autograd wants."""
        return self.weight.new_empty(1).expand(self.weight.shape)

    @staticmethod
    def product(slope_RF: Tensor, x_RD: Tensor, *_rest: Tensor) -> Tensor:
        """The gradient of a weight [F, D] that all rows meet."""
        return torch.mm(slope_RF.t(), x_RD)


class WeightLater(Later):
    """A weight [L, F, D] of grouped matmuls."""

    def rows(self, x_RD: Tensor, ends_L: Tensor) -> Tensor:
        """Each row times the transposed weight of its expert, [R, F]; once."""
        return _Rows.apply(x_RD, self.weight, ends_L, self)

    @staticmethod
    def product(slope_RF: Tensor, x_RD: Tensor, *rest: Tensor) -> Tensor:
        """[L, F, D]."""
        return F.grouped_mm(slope_RF.t(), x_RD, offs=rest[0])


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, owing: _Owing) -> Tensor:
        ctx.owing = owing
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _nothing: Tensor) -> tuple[Tensor, None]:
        return ctx.owing.gradient(), None


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
