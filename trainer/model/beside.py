"""Linear layers of one input: their gradients for it are added up by the matmuls themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.kernels.choice import fused


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TD, *weights)
        return tuple(torch.mm(x_TD, weight.t()) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, ...]:
        x_TD, *weights = ctx.saved_tensors
        first, *rest = zip(slopes, weights, strict=True)
        x_slope = torch.mm(*first)
        for slope, weight in rest:
            x_slope.addmm_(slope, weight)
        return (x_slope, *(torch.mm(slope.t(), x_TD) for slope in slopes))


def beside(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Each layer's output, [..., width]; the layers have no bias."""
    if not fused(x):
        return tuple(layer(x) for layer in layers)
    found = _Beside.apply(x.flatten(0, -2), *(layer.weight for layer in layers))
    return tuple(out.view(*x.shape[:-1], -1) for out in found)
