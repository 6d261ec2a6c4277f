"""AdamW in one pass: master and moments are read and written once, a gradient of either precision read once, and the bf16
weights that matmuls use written beside them. And the squares of gradients for the norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import programs

_BLOCK = 2048
_SQUARES = 4096


@triton.jit
def _adamw(
    master: tl.tensor, grad: tl.tensor, mean: tl.tensor, square: tl.tensor, cast: tl.tensor, numbers: tl.tensor,
    elements: tl.tensor,
    lr: tl.tensor, decay: tl.tensor, beta1: tl.tensor, beta2: tl.tensor, eps: tl.tensor,
    CAST: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    factor, skip = tl.load(numbers), tl.load(numbers + 1)
    first, second = tl.load(numbers + 2), tl.load(numbers + 3)
    if skip == 0.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < elements
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
        w = tl.load(master + at, mask=inside, other=0.0)
        m = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(square + at, mask=inside, other=0.0).to(tl.float32)
        w = w - lr * decay * w
        m = beta1 * m + (1.0 - beta1) * g
        v = beta2 * v + (1.0 - beta2) * g * g
        w = w - lr * first * m / (tl.sqrt(v) * second + eps)
        tl.store(master + at, w, mask=inside)
        tl.store(mean + at, m.to(mean.dtype.element_ty), mask=inside)
        tl.store(square + at, v.to(square.dtype.element_ty), mask=inside)
        if CAST:
            tl.store(cast + at, w.to(cast.dtype.element_ty), mask=inside)


@triton.jit
def _squared_norm(
    x: tl.tensor, out: tl.tensor, elements: tl.tensor, EACH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for turn in range(EACH):
        at = (tl.program_id(0).to(tl.int64) * EACH + turn) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < elements, other=0.0).to(tl.float32)
        total += value * value
    tl.store(out + tl.program_id(0), tl.sum(total, axis=0))


def update(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    numbers: Tensor,
    rates: tuple[float, float],
    rule: tuple[float, float, float],
) -> None:
    """Move one contiguous tensor.

    Args:
        tensors: master, gradient, mean, square, and the weights that matmuls use or None.
        numbers: on the device, fp32: factor of the gradient, 1 where nothing may move, 1 / (1 - beta1^steps),
            1 / sqrt(1 - beta2^steps).
        rates: learning rate, weight decay.
        rule: beta1, beta2, eps.
    """
    master, grad, mean, square, cast = tensors
    elements = master.numel()
    _adamw[(triton.cdiv(elements, _BLOCK),)](
        master, grad, mean, square, master if cast is None else cast, numbers, elements, *rates, *rule,
        CAST=cast is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def squares(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements, a number in fp64; each program adds up its part in fp32."""
    most = programs(tensors[0].device, 8)
    blocks = [triton.cdiv(tensor.numel(), _SQUARES) for tensor in tensors]
    turns = [triton.cdiv(count, most) for count in blocks]
    counts = [triton.cdiv(count, each) for count, each in zip(blocks, turns, strict=True)]
    parts = torch.empty(sum(counts), dtype=torch.float32, device=tensors[0].device)
    for tensor, part, each in zip(tensors, parts.split(counts), turns, strict=True):
        _squared_norm[(part.numel(),)](tensor, part, tensor.numel(), EACH=each, BLOCK=_SQUARES, num_warps=8)
    return parts.sum(dtype=torch.float64)
