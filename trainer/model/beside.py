"""Linear layers of one input: their gradients for it are added up by the matmuls themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.kernels.choice import fused
from trainer.model.later import Later


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, laters: Sequence[Later], x_TD: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TD, *weights)
        ctx.laters = laters
        return tuple(torch.mm(x_TD, weight.t()) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, *weights = ctx.saved_tensors
        first, *rest = zip(slopes, weights, strict=True)
        x_slope = torch.mm(*first)
        for slope, weight in rest:
            x_slope.addmm_(slope, weight)
        if not ctx.laters:
            return (None, x_slope, *(torch.mm(slope.t(), x_TD) for slope in slopes))
        for later, slope in zip(ctx.laters, slopes, strict=True):
            later.keep(slope, x_TD)
        return (None, x_slope, *(later.nothing() for later in ctx.laters))


def beside(x: Tensor, layers: Sequence[nn.Linear], laters: Sequence[Later] = ()) -> tuple[Tensor, ...]:
    """Each layer's output, [..., width]; the layers have no bias.

    Args:
        laters: of the layers' weights, where their gradients are to come later.
    """
    if not fused(x):
        return tuple(layer(x) for layer in layers)
    weights = [later.weight for later in laters] or [layer.weight for layer in layers]
    outputs = _Beside.apply(laters, x.flatten(0, -2), *weights)
    return tuple(out.view(*x.shape[:-1], -1) for out in outputs)
