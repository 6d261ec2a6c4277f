"""The usual step around a bf16 model: fp32 master weights, clipping, torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from configs.training import OptimConfig
from trainer.bench.measure import PartTimer


class MasterWeightTrainer:
    """A training step of any model whose parameters are in bf16, or in fp32 without masters beside them."""

    def __init__(self, model: nn.Module, optim: OptimConfig) -> None:
        self._parameters: list[Tensor] = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        self._cast = self._parameters[0].dtype != torch.float32
        self._masters: list[Tensor] = (
            [parameter.detach().float().requires_grad_() for parameter in self._parameters]
            if self._cast
            else self._parameters
        )
        decayed = [master for master in self._masters if master.ndim > 1]
        rest = [master for master in self._masters if master.ndim < 2]
        self._optim = optim
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=1e-4, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True,
        )  # fmt: skip

    def step(self, loss_of: Callable[[], Tensor], mark: PartTimer) -> Tensor:
        """Forward, backward, clipping and update."""
        with mark("forward"):
            loss = loss_of()
        with mark("backward"):
            loss.backward()
        with mark("optimizer"):
            if self._cast:
                for master, parameter in zip(self._masters, self._parameters, strict=True):
                    master.grad = None if parameter.grad is None else parameter.grad.float()
                    parameter.grad = None
            torch.nn.utils.clip_grad_norm_(self._masters, self._optim.clip, foreach=True)
            self._adamw.step()
            self._adamw.zero_grad(set_to_none=True)
            if self._cast:
                with torch.no_grad():
                    torch._foreach_copy_(self._parameters, self._masters)
        return loss.detach()
