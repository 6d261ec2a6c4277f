"""Linear layers of one input: the matmuls of the backward pass add up its gradient themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.kernels.choice import use_kernels
from trainer.model.deferred import DeferredWeight


class _JointLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, deferred: Sequence[DeferredWeight], x_TD: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TD, *weights)
        ctx.deferred = deferred
        return tuple(torch.mm(x_TD, weight.t()) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, *weights = ctx.saved_tensors
        first, *rest = zip(grads, weights, strict=True)
        x_grad = torch.mm(*first)
        for grad, weight in rest:
            x_grad.addmm_(grad, weight)
        if not ctx.deferred:
            return (None, x_grad, *(torch.mm(grad.t(), x_TD) for grad in grads))
        for weight, grad in zip(ctx.deferred, grads, strict=True):
            weight.save(grad, x_TD)
        return (None, x_grad, *(weight.placeholder() for weight in ctx.deferred))


def joint_linear(
    x: Tensor, layers: Sequence[nn.Linear], deferred: Sequence[DeferredWeight] = ()
) -> tuple[Tensor, ...]:
    """Each layer's output, [..., width]; the layers have no bias.

    Args:
        deferred: the layers' weights, where their gradients are deferred.
    """
    if not use_kernels(x):
        return tuple(layer(x) for layer in layers)
    weights = [one.weight for one in deferred] or [layer.weight for layer in layers]
    outputs = _JointLinear.apply(deferred, x.flatten(0, -2), *weights)
    return tuple(out.view(*x.shape[:-1], -1) for out in outputs)
