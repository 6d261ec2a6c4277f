"""The learning-rate schedule and the optimizer's parameter groups."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from configs.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of the step with index `step`, from 0: linear warm-up, then cosine from lr to min_lr."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    span = max(1, steps - 1 - optim.warmup_steps)
    done = min(1.0, (step - optim.warmup_steps) / span)
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * done))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; embeddings and everything of one dim without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim < 2 or name == "embedding" else decayed).append(parameter)
    return [
        {"params": decayed, "name": "decayed", "weight_decay": weight_decay},
        {"params": plain, "name": "plain", "weight_decay": 0.0},
    ]
