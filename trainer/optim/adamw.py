"""AdamW (Loshchilov and Hutter 2019) over named shards, by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.training import OptimConfig
from trainer.kernels.choice import LEAST, usable
from trainer.optim.common import (
    Rate,
    check,
    chunk_of,
    device_of,
    gradient,
    moment_dtype,
    ranges,
    rate_of,
    refresh,
)
from trainer.optim.slots import Slot


@dataclass(frozen=True)
class _Row:
    """A slot with its moments, of the slot's shape."""

    slot: Slot
    mean: Tensor
    square: Tensor


@dataclass(frozen=True)
class Numbers:
    """What the kernel reads from the device: numbers in fp32."""

    after: Tensor
    """Steps applied, this one counted."""
    divisor: Tensor
    """Of gradients: 1 over the clipping factor."""
    skip: Tensor
    """1 where nothing may move."""


class AdamW:
    """The protocol `trainer.optim.slots.Optimizer`, as torch.optim.AdamW computes it.

    The kernel behind `torch.optim.AdamW(fused=True)`, which torch has for CPU and CUDA (ROCm) alike, is called on whole
    lists of shards. It takes the clipping factor and the skip flag from the device, so nothing waits for them, and moves
    32 bytes per parameter: value, gradient and two moments are each read and written once (it writes the clipped
    gradient back). It is called directly, not through torch.optim.AdamW, because that keeps a count of steps for each
    tensor; here there is one for all.

    On a GPU with Triton a kernel of our own takes the large shards instead: it reads a gradient of either precision, leaves
    it alone, and writes the weights that matmuls use where a slot has them: 28 to 30 bytes per parameter in all.

    With bf16 moments, a few million elements at a time get fp32 copies of their moments, go through the same kernel, and
    are rounded back: `common.moment_dtype` says with which error.
    """

    def __init__(
        self, slots: Sequence[Slot], optim: OptimConfig, width: int, device: torch.device | None = None
    ) -> None:
        """Moments of zero for `slots` of a model of `width`; `device` only matters where there is no slot."""
        check(slots)
        self._optim = optim
        dtype = moment_dtype(optim)
        self.count = torch.zeros((), device=device or device_of(slots))
        """Steps applied, a number in fp32."""
        self._rows = [
            _Row(slot, torch.zeros_like(slot.tensor, dtype=dtype), torch.zeros_like(slot.tensor, dtype=dtype))
            for slot in slots
        ]
        self._groups: list[tuple[Rate, list[_Row]]] = []
        for row in self._rows:
            rate = rate_of(row.slot.kind, optim, width)
            same = next((rows for other, rows in self._groups if other == rate), None)
            if same is None:
                self._groups.append((rate, same := []))
            if row.slot.tensor.numel():
                same.append(row)

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, skip: Tensor) -> None:
        """Move the masters; see the protocol."""
        numbers = self.numbers(factor, skip)
        fast = self._fast(numbers) if usable(self.count.device) else None
        for rate, every in self._groups:
            rows = every
            if fast is not None:
                rows = self._update_large(every, lr * rate.scale, rate.decay, fast)
            gradients = [gradient(row.slot) for row in rows]
            for lists in self._batches(rows, gradients):
                update(lists, self._optim, lr * rate.scale, rate.decay, numbers)
            refresh(row.slot for row in rows)
        self.count.add_(1 - numbers.skip)

    def _fast(self, numbers: Numbers) -> Tensor:
        """What the kernel reads from the device (see `trainer.kernels.adamw.update`)."""
        after = numbers.after.double()
        corrections = (1 / (1 - self._optim.beta1**after), (1 - self._optim.beta2**after).rsqrt())
        return torch.stack([numbers.divisor.reciprocal(), numbers.skip, *(x.float() for x in corrections)])

    def _update_large(self, rows: Sequence[_Row], lr: float, decay: float, numbers: Tensor) -> list[_Row]:
        """Move the large shards by the kernel; those that are left."""
        from trainer.kernels import adamw as kernel

        optim, left = self._optim, []
        for row in rows:
            slot = row.slot
            if slot.tensor.numel() < LEAST:
                left.append(row)
                continue
            grad = slot.gradient
            grad = torch.zeros_like(slot.tensor) if grad is None else grad.contiguous()
            weight = None if slot.cast is None else slot.cast.weight
            rule = (optim.beta1, optim.beta2, optim.eps)
            kernel.update((slot.tensor, grad, row.mean, row.square, weight), numbers, (lr, decay), rule)
        return left

    def state(self) -> Iterator[tuple[str, Tensor, Slot | None]]:
        """Both moments of every slot, and the count of applied steps."""
        for row in self._rows:
            yield "exp_avg", row.mean, row.slot
            yield "exp_avg_sq", row.square, row.slot
        yield "optimizer/step", self.count, None

    def numbers(self, factor: Tensor, skip: Tensor) -> Numbers:
        """What the step to come tells the kernel."""
        return Numbers(self.count + 1, factor.float().reciprocal(), skip.float())

    @staticmethod
    def _batches(rows: Sequence[_Row], gradients: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
        """Values, gradients, means and squares for one call of the kernel each: all, or no more than have scratch."""
        if not rows or rows[0].mean.dtype == torch.float32:
            tensors = [row.slot.tensor for row in rows]
            yield [tensors, list(gradients), [row.mean for row in rows], [row.square for row in rows]]
            return
        batch: list[list[Tensor]] = [[], [], [], []]
        filled, most = 0, chunk_of(gradients[0].device)
        for row, grad in zip(rows, gradients, strict=True):
            parts = [tensor.view(-1) for tensor in (row.slot.tensor, grad, row.mean, row.square)]
            for start, end in ranges(grad.numel(), most):
                if filled + end - start > most:
                    yield batch
                    batch, filled = [[], [], [], []], 0
                for column, part in zip(batch, parts, strict=True):
                    column.append(part[start:end])
                filled += end - start
        yield batch


def update(
    lists: Sequence[list[Tensor]], optim: OptimConfig, lr: float, decay: float, numbers: Numbers
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
        values, gradients, wide_means, wide_squares, [], [numbers.after] * len(values),
        lr=lr, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps, weight_decay=decay,
        amsgrad=False, maximize=False, grad_scale=numbers.divisor, found_inf=numbers.skip,
    )  # fmt: skip
    if means[0].dtype != torch.float32:
        torch._foreach_copy_(means, wide_means)
        torch._foreach_copy_(squares, wide_squares)
