"""A micro-batch's gradient added to those of earlier ones in one pass: each is read once, and the sum written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _add_gradients(
    out: tl.tensor, earlier: tl.tensor, gradient: tl.tensor, elements: tl.tensor, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    one = tl.load(earlier + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, one + other, mask=inside)


def add(earlier: Tensor, gradient: Tensor) -> Tensor:
    """The sum of two contiguous tensors in fp32: `earlier` itself where that is fp32, else a new one."""
    out = earlier if earlier.dtype == torch.float32 else torch.empty_like(earlier, dtype=torch.float32)
    elements = out.numel()
    _add_gradients[(triton.cdiv(elements, _BLOCK),)](
        out, earlier, gradient, elements, BLOCK=_BLOCK, num_warps=8
    )
    return out
