"""How much is learned in a step, and from how many samples."""

from __future__ import annotations

import math

from configs.training import OptimConfig, TrainConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Of the step with index `step` from 0 out of `steps`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    last = steps - 1
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "wsd":
        decay = optim.decay_steps if optim.decay_steps is not None else max(1, steps // 10)
        if step < steps - decay:
            return optim.lr
        start = steps - decay - 1  # the last step at full rate
        return optim.lr + (optim.min_lr - optim.lr) * (step - start) / (last - start)
    if last <= optim.warmup_steps:
        return optim.lr
    way = (step - optim.warmup_steps) / (last - optim.warmup_steps)
    if optim.schedule == "linear":
        return optim.lr + (optim.min_lr - optim.lr) * way
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * way)) / 2


def samples_of_step(train: TrainConfig, step: int) -> int:
    """Samples that the step with index `step` learns from; `train.global_batch` has to be set."""
    whole = train.global_batch
    assert whole is not None
    if train.ramp_batch is None or step >= train.ramp_steps:
        return whole
    sizes = whole // train.ramp_batch
    return train.ramp_batch * min(sizes, 1 + step * sizes // max(1, train.ramp_steps))
