"""Update rules of AdamW, Muon and LAMB, one parameter at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from configs.training import OptimConfig
from tests.trainer.reference.names import kind


def matrices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Indices of the matrices of a tensor: of experts, and of gate and up."""
    leading = shape[:-2]
    for number in range(math.prod(leading)):
        index = []
        for size in reversed(leading):
            index.insert(0, number % size)
            number //= size
        yield tuple(index)


def length(x: Tensor) -> float:
    """Root of the sum of squares."""
    return math.sqrt(float((x * x).sum()))


def adam_direction(
    optim: OptimConfig, slots: dict[str, Tensor], name: str, gradient: Tensor, count: int
) -> Tensor:
    """Moves the moments of `name`; gives their bias-corrected ratio. `count`: applied steps, this one among them."""
    mean, square = slots[f"{name}/exp_avg"], slots[f"{name}/exp_avg_sq"]
    mean.copy_(optim.beta1 * mean + (1 - optim.beta1) * gradient)
    square.copy_(optim.beta2 * square + (1 - optim.beta2) * gradient * gradient)
    corrected_mean = mean / (1 - optim.beta1**count)
    corrected_square = square / (1 - optim.beta2**count)
    return corrected_mean / (torch.sqrt(corrected_square) + optim.eps)


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """Nearly the matrix's polar factor, by Newton-Schulz (Muon, K. Jordan 2024; coefficients of its code)."""
    x = matrix / (length(matrix) + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.transpose(0, 1)
    for _ in range(steps):
        a = x @ x.transpose(0, 1)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.transpose(0, 1) if tall else x


def muon_direction(optim: OptimConfig, slots: dict[str, Tensor], name: str, gradient: Tensor) -> Tensor:
    """Nesterov momentum, each matrix orthogonalised and given AdamW's usual size (Moonlight, arXiv 2502.16982)."""
    momentum = slots[f"{name}/momentum"]
    momentum.copy_(optim.momentum * momentum + gradient)
    ahead = gradient + optim.momentum * momentum
    direction = torch.empty_like(ahead)
    rows, columns = ahead.shape[-2:]
    for index in matrices(tuple(ahead.shape)):
        direction[index] = (
            0.2 * math.sqrt(max(rows, columns)) * orthogonal(ahead[index], optim.orthogonal_steps)
        )
    return direction


def trust_ratio(value: Tensor, direction: Tensor) -> float:
    """LAMB's (arXiv 1904.00962): length of the parameter over that of its step; 1 where either is 0."""
    of_value, of_direction = length(value), length(direction)
    return of_value / of_direction if of_value and of_direction else 1.0


def slot_names(optim: OptimConfig, name: str, shape: tuple[int, ...]) -> list[str]:
    """What the optimizer keeps for a parameter."""
    if optim.kind == "muon" and kind(name, shape) == "matrix":
        return [f"{name}/momentum"]
    return [f"{name}/exp_avg", f"{name}/exp_avg_sq"]


def update(
    optim: OptimConfig,
    state: dict[str, Tensor],
    name: str,
    gradient: Tensor,
    rate: float,
    count: int,
    width: int,
) -> None:
    """Move one parameter and its slots.

    Args:
        gradient: after clipping.
        rate: learning rate of the step.
        count: applied steps, this one among them.
        width: of the model, for width transfer.
    """
    value = state[name]
    of_kind = kind(name, tuple(value.shape))
    decay = optim.weight_decay if of_kind == "matrix" else 0.0
    if optim.base_width is not None and of_kind == "matrix":
        rate *= optim.base_width / width
        decay *= math.sqrt(width / optim.base_width)
    if optim.kind == "muon" and of_kind == "matrix":
        direction = muon_direction(optim, state, name, gradient)
        value.copy_(value * (1 - rate * decay) - rate * direction)
        return
    direction = adam_direction(optim, state, name, gradient, count)
    if optim.kind != "lamb":
        value.copy_(value * (1 - rate * decay) - rate * direction)
        return
    direction = direction + decay * value
    if of_kind == "matrix":
        for index in matrices(tuple(value.shape)):
            direction[index] = direction[index] * trust_ratio(value[index], direction[index])
    elif of_kind == "embedding":
        direction = direction * trust_ratio(value, direction)
    value.copy_(value - rate * direction)
