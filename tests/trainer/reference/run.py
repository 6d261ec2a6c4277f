"""Several steps, one after the other."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.model import ModelConfig, RouterConfig
from configs.training import OptimConfig, TrainConfig
from tests.trainer.reference.loss import gradients
from tests.trainer.reference.names import is_buffer
from tests.trainer.reference.optimizers import slot_names, update
from tests.trainer.reference.schedule import learning_rate, samples_of_step


@dataclass(frozen=True)
class ReferenceLine:
    """What a step says of itself."""

    samples: int
    rate: float
    loss: float
    """Mean cross-entropy."""
    aux: float
    """Auxiliary and z-losses, weighted."""
    mtp: float
    norm: float
    skipped: bool
    load: dict[str, list[int]]
    dropped: int


class Reference:
    """Trains a model in fp64.

    Args:
        separator: token that ends a document, where attention stays within documents; None: samples are one document each.
    """

    def __init__(
        self, model: ModelConfig, optim: OptimConfig, train: TrainConfig, separator: int | None = None
    ) -> None:
        self.model, self.optim, self.train, self.separator = model, optim, train, separator

    def run(
        self,
        steps: int,
        initial_state: dict[str, Tensor],
        samples: Sequence[Sequence[int]],
        spoiled: Collection[int] = (),
    ) -> tuple[list[ReferenceLine], dict[str, Tensor]]:
        """The first `steps` steps of `train.steps`, with the samples in their order.

        Args:
            initial_state: by name; optimizer slots that it lacks begin at zero. It isn't changed.
            samples: of S + 1 tokens.
            spoiled: steps whose gradients are taken to be infinite.

        Returns:
            A line per step, and the state at the end: parameters, router biases, optimizer slots, `optimizer/step`.
        """
        state = {name: tensor.detach().double().clone() for name, tensor in initial_state.items()}
        for name in [name for name in state if not is_buffer(name) and "/" not in name]:
            for slot in slot_names(self.optim, name, tuple(state[name].shape)):
                state.setdefault(slot, torch.zeros_like(state[name]))
        state.setdefault("optimizer/step", torch.zeros((), dtype=torch.float64))
        lines, taken = [], 0
        for step in range(steps):
            size = samples_of_step(self.train, step)
            batch = [list(sample) for sample in samples[taken : taken + size]]
            if len(batch) < size:
                raise ValueError(f"step {step} needs {size} samples; {len(batch)} are left")
            taken += size
            lines.append(self._step(state, batch, step, step in spoiled))
        return lines, state

    def _step(
        self, state: dict[str, Tensor], batch: list[list[int]], step: int, spoiled: bool
    ) -> ReferenceLine:
        values = {name: tensor for name, tensor in state.items() if "/" not in name}
        result = gradients(self.model, values, batch, self.separator)
        norm = math.inf if spoiled else result.norm
        rate = learning_rate(self.optim, step, self.train.steps)
        skipped = not math.isfinite(norm)
        if not skipped:
            state["optimizer/step"] += 1
            count = int(state["optimizer/step"])
            factor = min(1.0, self.optim.clip / (norm + 1e-6)) if self.optim.clip else 1.0
            for name, gradient in result.gradients.items():
                update(self.optim, state, name, gradient * factor, rate, count, self.model.hidden)
            if self.model.router.balance in ("bias", "both"):
                for router, load in result.load.items():
                    balance(self.model.router, state, router, load, count)
        return ReferenceLine(
            len(batch),
            rate,
            result.cross_entropy,
            result.aux + result.z,
            result.mtp,
            norm,
            skipped,
            result.load,
            result.dropped,
        )


def balance(router: RouterConfig, state: dict[str, Tensor], name: str, load: list[int], count: int) -> None:
    """Move a router's balancing bias after a step.

    `sign` is DeepSeek-V3's (arXiv 2408.15664): a step of fixed size up where an expert had less than the mean load, down
    where it had more. `load_error` is ZAYA1's: Adam on an expert's share of the load less the even share.
    """
    experts, total = len(load), sum(load)
    rate = router.bias_update_rate
    if rate is None:
        rate = 1e-3 if router.score == "sigmoid" or router.bias_rule == "load_error" else 2e-3 / experts
    bias = state[f"{name}.bias"]
    for number in range(experts):
        if router.bias_rule == "sign":
            short = total / experts - load[number]
            bias[number] += rate * ((short > 0) - (short < 0))
            continue
        error = load[number] / total - 1 / experts
        mean, square = state[f"{name}.bias_avg"], state[f"{name}.bias_avg_sq"]
        mean[number] = 0.9 * mean[number] + 0.1 * error
        square[number] = 0.999 * square[number] + 0.001 * error**2
        corrected = mean[number] / (1 - 0.9**count), square[number] / (1 - 0.999**count)
        bias[number] -= rate * corrected[0] / (torch.sqrt(corrected[1]) + 1e-8)
