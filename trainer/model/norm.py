"""Root-mean-square norms, computed in fp32 whatever the activations are kept in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.choice import use_kernels
from trainer.model.seams import SoloSeams, TensorSeam


def upcast_dtype(x: Tensor) -> torch.dtype:
    """fp32, or the dtype of `x` where that has more."""
    return torch.promote_types(x.dtype, torch.float32)


def upcast(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is where it has more than that."""
    return x.to(upcast_dtype(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.single_output = False
        """Whether a node of the graph may have one result alone (see `trainer.parallel.apply.give_single_outputs`)."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        if use_kernels(x):
            from trainer.kernels.norm import norm_rotary

            return norm_rotary(x, self.weight, self.eps, None)
        return F.rms_norm(upcast(x), (x.shape[-1],), upcast(self.weight), self.eps).to(x.dtype)

    def add_norm(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + y, or x without `y`, and its norm: one pass each way where kernels run."""
        if use_kernels(x) and not self.single_output:
            from trainer.kernels.norm import add_norm

            normed, total = add_norm(x, y, self.weight, self.eps)
            return total, normed
        total = x if y is None else x + y
        return total, self(total)


class SplitNorm(RMSNorm):
    """The same norm over a last dim of which a tensor-parallel rank has a part: the mean is that of all parts."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.tensors: TensorSeam = SoloSeams()

    def splits(self) -> dict[str, int | None]:
        """Dim of each parameter that tensor parallelism splits."""
        return {"weight": 0}

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        if self.tensors.size == 1:
            return super().forward(x)
        full = upcast(x)
        mean = self.tensors.sum(full.square().sum(dim=-1, keepdim=True)) / (x.shape[-1] * self.tensors.size)
        return (full * torch.rsqrt(mean + self.eps) * upcast(self.weight)).to(x.dtype)
