"""What a step's index decides: its learning rate and its number of samples. Pure arithmetic, without torch."""

from __future__ import annotations

import math

from configs.training import OptimConfig, TrainConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of the step with index `step`, from 0, of a run of `steps`.

    Linear warm-up to `lr`, which its last step has. Then `constant` stays there; `cosine` and `linear` fall from the
    first step after the warm-up to `min_lr` at the run's last step; `wsd` (warm-up, stable, decay; Hu et al. 2024,
    MiniCPM) falls in equal parts over the last `decay_steps`, a tenth of all where that is None, to the same end. Steps
    past the end keep the last one's rate.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    last = steps - 1
    first = optim.warmup_steps  # the last step that has all of `lr`
    if optim.schedule == "wsd":
        first = last - (optim.decay_steps or max(1, steps // 10))
    done = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    share = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    return optim.min_lr + (optim.lr - optim.min_lr) * share


def global_batch_size(train: TrainConfig, step: int) -> int:
    """Samples of the step with index `step`: `global_batch`, or while the batch grows, as many `ramp_batch` as are due.

    `global_batch` is set and a multiple of `ramp_batch`: the planner sees to both.
    """
    assert train.global_batch is not None, "the planner sets train.global_batch"
    if train.ramp_batch is None or step >= train.ramp_steps:
        return train.global_batch
    sizes = train.global_batch // train.ramp_batch
    return train.ramp_batch * (1 + step * sizes // train.ramp_steps)


def consumed_samples(train: TrainConfig, step: int) -> int:
    """Samples of all steps before the one with index `step`; the work grows with the ramp's batch sizes, not with steps."""
    assert train.global_batch is not None, "the planner sets train.global_batch"
    if train.ramp_batch is None:
        return train.global_batch * step
    sizes = train.global_batch // train.ramp_batch
    # Size k (from 1) is reached at the first step i with i * sizes // ramp_steps >= k - 1, and kept from there on.
    reached = (-(-size * train.ramp_steps // sizes) for size in range(sizes))
    return train.ramp_batch * sum(max(0, step - first) for first in reached)
