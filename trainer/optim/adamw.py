"""AdamW (Loshchilov and Hutter 2019) over named shards, by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.training import OptimConfig
from trainer.kernels.choice import LEAST, usable
from trainer.optim.common import (
    Hyperparameters,
    check_masters,
    chunk_elements,
    chunk_ranges,
    copy_masters_to_weights,
    device_of,
    gradient_or_zeros,
    hyperparameters,
    moment_dtype,
)
from trainer.optim.shards import ParameterShard


@dataclass(frozen=True)
class _MomentState:
    """A shard with its moments, of the shard's shape."""

    shard: ParameterShard
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class StepScalars:
    """Inputs of the fused kernel that stay on the device, fp32 scalars, so that no step waits for them."""

    step: Tensor
    """Number of applied steps, this one among them."""
    grad_scale: Tensor
    """The kernel divides gradients by it: 1 over the clipping factor."""
    skip: Tensor
    """1 where nothing may move."""


class AdamW:
    """The protocol `trainer.optim.shards.Optimizer`, as torch.optim.AdamW computes it.

    The kernel behind `torch.optim.AdamW(fused=True)`, which torch has for CPU and CUDA (ROCm) alike, is called on whole
    lists of shards. It takes the clipping factor and the skip flag from the device, so nothing waits for them, and moves
    32 bytes per parameter: value, gradient and two moments are each read and written once (it writes the clipped
    gradient back). It is called directly, not through torch.optim.AdamW, because that keeps a count of steps for each
    tensor; here there is one for all.

    On a GPU with Triton a kernel of our own takes the large shards instead: it reads a gradient of either precision, leaves
    it alone, and writes the weights that matmuls use where a shard has them: 28 to 30 bytes per parameter in all.

    With bf16 moments, a few million elements at a time get fp32 copies of their moments, go through the same kernel, and
    are rounded back: `common.moment_dtype` says with which error.
    """

    def __init__(
        self,
        shards: Sequence[ParameterShard],
        optim: OptimConfig,
        width: int,
        device: torch.device | None = None,
    ) -> None:
        """Moments of zero for `shards` of a model of `width`; `device` only matters where there is no shard."""
        check_masters(shards)
        self._optim = optim
        dtype = moment_dtype(optim)
        self.count = torch.zeros((), device=device or device_of(shards))
        """Steps applied, a number in fp32."""
        self._states = [
            _MomentState(
                shard,
                torch.zeros_like(shard.tensor, dtype=dtype),
                torch.zeros_like(shard.tensor, dtype=dtype),
            )
            for shard in shards
        ]
        self._groups: list[tuple[Hyperparameters, list[_MomentState]]] = []
        for state in self._states:
            hyper = hyperparameters(state.shard.kind, optim, width)
            same = next((states for other, states in self._groups if other == hyper), None)
            if same is None:
                self._groups.append((hyper, same := []))
            if state.shard.tensor.numel():
                same.append(state)

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, skip: Tensor) -> None:
        """Update the masters (see the protocol)."""
        scalars = self.step_scalars(factor, skip)
        kernel_scalars = self._kernel_scalars(scalars) if usable(self.count.device) else None
        for hyper, group in self._groups:
            states = group
            if kernel_scalars is not None:
                states = self._update_large(group, lr * hyper.lr_scale, hyper.weight_decay, kernel_scalars)
            gradients = [gradient_or_zeros(state.shard) for state in states]
            for lists in self._kernel_batches(states, gradients):
                fused_adamw(lists, self._optim, lr * hyper.lr_scale, hyper.weight_decay, scalars)
            copy_masters_to_weights(state.shard for state in states)
        self.count.add_(1 - scalars.skip)

    def _kernel_scalars(self, scalars: StepScalars) -> Tensor:
        """The `numbers` of our own kernel (see `trainer.kernels.adamw.update`)."""
        step = scalars.step.double()
        corrections = (1 / (1 - self._optim.beta1**step), (1 - self._optim.beta2**step).rsqrt())
        return torch.stack([scalars.grad_scale.reciprocal(), scalars.skip, *(x.float() for x in corrections)])

    def _update_large(
        self, states: Sequence[_MomentState], lr: float, decay: float, numbers: Tensor
    ) -> list[_MomentState]:
        """Update the large shards by our own kernel; returns the other ones."""
        from trainer.kernels import adamw as kernel

        optim, left = self._optim, []
        for state in states:
            shard = state.shard
            if shard.tensor.numel() < LEAST:
                left.append(state)
                continue
            grad = shard.gradient
            grad = torch.zeros_like(shard.tensor) if grad is None else grad.contiguous()
            weight = None if shard.compute_weight is None else shard.compute_weight.tensor
            rule = (optim.beta1, optim.beta2, optim.eps)
            kernel.update(
                (shard.tensor, grad, state.exp_avg, state.exp_avg_sq, weight), numbers, (lr, decay), rule
            )
        return left

    def state(self) -> Iterator[tuple[str, Tensor, ParameterShard | None]]:
        """Both moments of every shard, and the count of applied steps."""
        for state in self._states:
            yield "exp_avg", state.exp_avg, state.shard
            yield "exp_avg_sq", state.exp_avg_sq, state.shard
        yield "optimizer/step", self.count, None

    def step_scalars(self, factor: Tensor, skip: Tensor) -> StepScalars:
        """The kernel's inputs for the next step."""
        return StepScalars(self.count + 1, factor.float().reciprocal(), skip.float())

    @staticmethod
    def _kernel_batches(
        states: Sequence[_MomentState], gradients: Sequence[Tensor]
    ) -> Iterator[list[list[Tensor]]]:
        """Values, gradients, means and squares for each call of the kernel: all of them, or with bf16
        moments as many elements as have scratch memory."""
        if not states or states[0].exp_avg.dtype == torch.float32:
            tensors = [state.shard.tensor for state in states]
            yield [
                tensors,
                list(gradients),
                [state.exp_avg for state in states],
                [state.exp_avg_sq for state in states],
            ]
            return
        batch: list[list[Tensor]] = [[], [], [], []]
        filled, limit = 0, chunk_elements(gradients[0].device)
        for state, grad in zip(states, gradients, strict=True):
            parts = [
                tensor.view(-1) for tensor in (state.shard.tensor, grad, state.exp_avg, state.exp_avg_sq)
            ]
            for start, end in chunk_ranges(grad.numel(), limit):
                if filled + end - start > limit:
                    yield batch
                    batch, filled = [[], [], [], []], 0
                for column, part in zip(batch, parts, strict=True):
                    column.append(part[start:end])
                filled += end - start
        yield batch


def fused_adamw(
    lists: Sequence[list[Tensor]], optim: OptimConfig, lr: float, decay: float, scalars: StepScalars
) -> None:
    """One call of torch's kernel over lists of values, gradients, means and squares, all of one length and contiguous.

    Args:
        lr: learning rate, of any sign.
        decay: weight decay.
    """
    values, gradients, means, squares = lists
    if not values:
        return
    # fp32 ones as they are.
    wide_means, wide_squares = ([m.float() for m in column] for column in (means, squares))
    torch._fused_adamw_(
        values, gradients, wide_means, wide_squares, [], [scalars.step] * len(values),
        lr=lr, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps, weight_decay=decay,
        amsgrad=False, maximize=False, grad_scale=scalars.grad_scale, found_inf=scalars.skip,
    )  # fmt: skip
    if means[0].dtype != torch.float32:
        torch._foreach_copy_(means, wide_means)
        torch._foreach_copy_(squares, wide_squares)
