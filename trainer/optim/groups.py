"""Parameter groups for an engine that brings its own optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn


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
