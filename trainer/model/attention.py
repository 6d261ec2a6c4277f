"""Grouped-query attention with rotary positions.

Shape letters: B samples, S tokens of a sample, D model width, N query heads, G key/value heads, H head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, in fp32, with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021), halves rotated as in Llama."""

    cos_SH: Tensor
    sin_SH: Tensor

    def __init__(self, head_dim: int, sequence: int, theta: float) -> None:
        super().__init__()
        frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.outer(torch.arange(sequence, dtype=torch.float64), frequency).repeat(1, 2)
        self.register_buffer("cos_SH", angle.cos().float(), persistent=False)
        self.register_buffer("sin_SH", angle.sin().float(), persistent=False)

    def forward(self, x_BNSH: Tensor) -> Tensor:
        """Rotate every head by its token's position."""
        sequence = x_BNSH.shape[-2]
        cos, sin = self.cos_SH[:sequence].to(x_BNSH.dtype), self.sin_SH[:sequence].to(x_BNSH.dtype)
        first, second = x_BNSH.chunk(2, dim=-1)
        return x_BNSH * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention; each key/value head serves `heads / kv_heads` query heads."""

    def __init__(self, model: ModelConfig, rotary: Rotary) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = model.heads, model.kv_heads, model.head_dim
        self.query = nn.Parameter(torch.empty(model.heads * model.head_dim, model.hidden))
        self.key = nn.Parameter(torch.empty(model.kv_heads * model.head_dim, model.hidden))
        self.value = nn.Parameter(torch.empty(model.kv_heads * model.head_dim, model.hidden))
        self.output = nn.Parameter(torch.empty(model.hidden, model.heads * model.head_dim))
        self.query_norm = RMSNorm(model.head_dim, model.norm_eps) if model.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(model.head_dim, model.norm_eps) if model.qk_norm else nn.Identity()
        self.rotary = rotary

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        q_BNSH = self.rotary(self.query_norm(self._heads(F.linear(x_BSD, self.query), self.heads)))
        k_BGSH = self.rotary(self.key_norm(self._heads(F.linear(x_BSD, self.key), self.kv_heads)))
        v_BGSH = self._heads(F.linear(x_BSD, self.value), self.kv_heads)
        out_BNSH = F.scaled_dot_product_attention(
            q_BNSH, k_BGSH, v_BGSH, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return F.linear(out_BNSH.transpose(1, 2).flatten(2), self.output)

    def _heads(self, x_BSD: Tensor, heads: int) -> Tensor:
        return x_BSD.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
