"""bf16 weights that stay beside their fp32 masters, for parameters that a rank shares with nobody, and for small ones.

FSDP would gather the former from itself, which casts and copies all weights in each step, and reduce their gradients with
itself, which copies those too. Here the optimizer writes both precisions, and reads a gradient as the matmuls leave it.

Small ones aren't worth being gathered: each parameter costs FSDP about 0.1 ms of the host a step, and of 34 in a block of
ZAYA1 26 have 65,536 elements or fewer. Each rank has them whole, and one collective sums the gradients of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from weakref import ref

import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from trainer.model.decoder import DecoderStage
from trainer.parallel.accumulate import accumulate
from trainer.parallel.exchange import all_reduce_packed
from trainer.parallel.mesh import Axis, Mesh

_SMALL = 1 << 16
"""Elements up to which a parameter is small: 14 bytes each on every rank, where FSDP leaves it one rank's share."""


def whole(stage: DecoderStage, mesh: Mesh, config: RunConfig) -> set[str]:
    """Names of the parameters that are resident: all of a rank that shares none; else the experts where they aren't shared,
    and what is small.

    Under pipelines FSDP stays, since their schedules may add a weight's gradients up without telling.
    """
    if config.train.precision != "bf16" or mesh["pp"].size > 1:
        return set()
    experts = set(stage.expert_splits())
    chosen = set()
    for name, parameter in stage.named_parameters():
        small = name not in experts and parameter.numel() <= _SMALL
        if small or mesh["edp" if name in experts else "dp_cp"].size == 1:
            chosen.add(name)
    return chosen


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
    """Their masters, and the sums of their gradients over micro-batches, in fp32 from the second one on.

    Args:
        masters: by name, fp32.
        dense: names of those that all ranks of `axis` have.
    """

    def __init__(
        self, stage: DecoderStage, masters: Mapping[str, Tensor], dense: Sequence[str], axis: Axis
    ) -> None:
        self.masters = dict(masters)
        self._parameters = {name: one for name, one in stage.named_parameters() if name in masters}
        self._small = [name for name in dense if masters[name].numel() <= _SMALL]
        self._axis = axis
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
        parameter.grad = None
        earlier = self._sums.get(name)
        self._sums[name] = gradient if earlier is None else accumulate(earlier, gradient)

    def weight(self, name: str) -> Tensor:
        """What matmuls use."""
        return self._parameters[name].detach()

    def take(self) -> dict[str, Tensor | None]:
        """The step's gradients, which are nobody else's from now on: fp32 of small ones, summed over the ranks that have
        them too; of others bf16 of one micro-batch, fp32 of several."""
        taken: dict[str, Tensor | None] = {}
        for name, parameter in self._parameters.items():
            taken[name], parameter.grad = parameter.grad, None
            if name in self._sums:  # in bf16 still where one micro-batch alone used it
                taken[name] = self._sums.pop(name).float()
        mine = [(taken[name], self._parameters[name]) for name in self._small]
        parts = [torch.zeros_like(weight) if gradient is None else gradient for gradient, weight in mine]
        return taken | dict(zip(self._small, all_reduce_packed(parts, self._axis), strict=True))


def _add(resident: ref[Resident], name: str, parameter: Tensor) -> None:
    alive = resident()
    if alive is not None:
        alive._add(name, parameter)
