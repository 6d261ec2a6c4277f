"""Gradients of a step's micro-batches added up in fp32 with as few passes over memory as that takes.

The first one's stays in bf16 until the second is there: a kernel reads both and writes their sum, 8 bytes an element, where
a cast and then an addition move 16. So until then a rank keeps 2 bytes of each gradient, and not 4. bf16 is exact in fp32,
and the order of additions stays, so the sums are the same to the last bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from trainer.kernels.choice import LEAST, use_kernels


def accumulate(earlier: Tensor, gradient: Tensor) -> Tensor:
    """The sum in fp32: `earlier` itself where that is fp32, else a new tensor.

    Args:
        earlier: of the micro-batches so far: fp32, or bf16 of one.
        gradient: of one more, bf16.
    """
    contiguous = earlier.is_contiguous() and gradient.is_contiguous()
    if use_kernels(gradient) and contiguous and gradient.numel() >= LEAST:
        from trainer.kernels import accumulate

        return accumulate.add(earlier, gradient)
    return earlier.float().add_(gradient)


def groups(state: Any) -> list[Any]:
    """FSDP's groups of parameters of one module's state, under the name that this torch has for them."""
    several = getattr(state, "_fsdp_param_groups", None)
    each = [state._fsdp_param_group] if several is None else several
    return [group for group in each if group is not None]


class _DeferredCast:
    """What FSDP does with a parameter's gradient between the micro-batches of a step, in place of its own methods.

    It has no hook there. Its first method casts the first micro-batch's, which nothing reads before the second one's.
    """

    reduce_dtype: torch.dtype | None
    unsharded_accumulated_grad: Tensor | None
    _unsharded_param: nn.Parameter

    def to_accumulated_grad_if_needed(self) -> None:
        """Behind a backward pass that doesn't reduce."""
        gradient = self._unsharded_param.grad
        if gradient is None or self.reduce_dtype in (None, gradient.dtype):
            return
        self._unsharded_param.grad = None
        self.unsharded_accumulated_grad = gradient

    def accumulate_unsharded_grad_if_needed(self) -> None:
        """Behind each backward pass, before anything is reduced: FSDP reduces gradients of one dtype alone."""
        earlier = self.unsharded_accumulated_grad
        if earlier is None:
            return
        gradient = self._unsharded_param.grad
        total = earlier.float() if gradient is None else accumulate(earlier, gradient)
        self.unsharded_accumulated_grad = total
        self._unsharded_param.grad = None


_NEEDED = (
    "to_accumulated_grad_if_needed",
    "accumulate_unsharded_grad_if_needed",
    "unsharded_accumulated_grad",
)


@lru_cache
def _with_deferred_cast(own: Any) -> type:
    return type("DeferredCastParameter", (_DeferredCast, own), {})


def defer_first_cast(module: FSDPModule) -> None:
    """Have FSDP add up a module's gradients as here. A torch whose FSDP names these steps otherwise keeps its own way."""
    shard: Any = fully_shard  # its type hides the attributes that it adds
    for group in groups(shard.state(module)):
        for parameter in group.fsdp_params:
            own: Any = type(parameter)  # modules of one unit share their groups
            if not issubclass(own, _DeferredCast) and all(hasattr(parameter, name) for name in _NEEDED):
                parameter.__class__ = _with_deferred_cast(own)
