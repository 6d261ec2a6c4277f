"""bf16 weights that stay beside their fp32 masters, for parameters that a rank shares with nobody.

FSDP would gather them from itself, which casts and copies all weights in each step, and reduce their gradients with itself,
which copies those too. Here the optimizer writes both precisions, and reads a gradient as the matmuls leave it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from weakref import ref

import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from trainer.model.decoder import DecoderStage
from trainer.parallel.mesh import Mesh


def alone(stage: DecoderStage, mesh: Mesh, config: RunConfig) -> set[str]:
    """Names of the parameters that are resident: all of a rank that shares none, or the experts where they aren't shared.

    Under pipelines FSDP stays, since their schedules may add a weight's gradients up without telling.
    """
    if config.train.precision != "bf16" or mesh["pp"].size > 1 or mesh["edp"].size > 1:
        return set()
    if mesh["dp_cp"].size == 1:
        return {name for name, _ in stage.named_parameters()}
    return set(stage.expert_splits())


def reserve(stage: DecoderStage, names: set[str]) -> set[nn.Parameter]:
    """Make parameters of a stage on the meta device bf16; the new ones."""
    made = set()
    for name in names:
        owner_name, _, leaf = name.rpartition(".")
        owner = stage.get_submodule(owner_name)
        shape = getattr(owner, leaf).shape
        setattr(owner, leaf, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")))
        made.add(getattr(owner, leaf))
    return made


class Resident:
    """Their masters, and the sums of their gradients over micro-batches, in fp32 where there are several.

    Args:
        masters: by name, fp32.
    """

    def __init__(self, stage: DecoderStage, masters: Mapping[str, Tensor]) -> None:
        self.masters = dict(masters)
        self._parameters = {name: one for name, one in stage.named_parameters() if name in masters}
        self._sums: dict[str, Tensor] = {}
        self._several = False
        # A hook that held this object would keep it and its parameters alive, where Python sees no cycle.
        itself = ref(self)
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(_add, itself, name))

    def begin(self, micros: int) -> None:
        """Before the backward passes of a step with so many micro-batches."""
        self._several = micros > 1
        self._sums.clear()

    def _add(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        if not self._several or gradient is None:
            return
        if name in self._sums:
            self._sums[name].add_(gradient)
        else:
            self._sums[name] = gradient.float()
        parameter.grad = None

    def weight(self, name: str) -> Tensor:
        """What matmuls use."""
        return self._parameters[name].detach()

    def take(self, name: str) -> Tensor | None:
        """The step's gradient, which is nobody else's from now on: bf16 of one micro-batch, fp32 of several."""
        parameter = self._parameters[name]
        gradient, parameter.grad = parameter.grad, None
        return self._sums.pop(name, gradient)


def _add(resident: ref[Resident], name: str, parameter: Tensor) -> None:
    alive = resident()
    if alive is not None:
        alive._add(name, parameter)
