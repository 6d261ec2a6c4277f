"""The same decoder in sixty plain lines of torch: what a training step takes without this project.

Dropless experts by `grouped_mm`, attention by `scaled_dot_product_attention`, everything else as one writes it down; no
losses of the router. Meant for `torch.compile`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import ModelConfig
from trainer.bench.baselines import renormalizes


class _Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class _Router(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model, self.weight = model, nn.Linear(model.hidden, model.experts, bias=False).weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = F.linear(x.float(), self.weight.float()).softmax(-1).topk(self.model.top_k, -1)
        return weights / weights.sum(-1, keepdim=True) if renormalizes(self.model) else weights, chosen


class _Block(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        d, q, k = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
        self.first, self.second = _Norm(d, model.norm_eps), _Norm(d, model.norm_eps)
        self.q, self.k, self.v = (
            nn.Linear(d, q, bias=False),
            nn.Linear(d, k, bias=False),
            nn.Linear(d, k, bias=False),
        )
        widths = {"projection": (q, k), "head": (model.head_dim, model.head_dim)}.get(model.qk_norm or "", ())
        self.norms = nn.ModuleList(_Norm(width, model.norm_eps) for width in widths)
        self.out = nn.Linear(q, d, bias=False)
        self.router = _Router(model)
        self.up = nn.Parameter(torch.randn(model.experts, 2 * model.expert_width, d) * 0.02)
        self.down = nn.Parameter(torch.randn(model.experts, d, model.expert_width) * 0.02)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.first(x), cos, sin)
        return x + self.experts(self.second(x).flatten(0, 1)).view_as(x)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.model.qk_norm == "projection":
            q, k = self.norms[0](q), self.norms[1](k)
        q, k, v = (t.unflatten(-1, (-1, self.model.head_dim)) for t in (q, k, v))
        if self.model.qk_norm == "head":
            q, k = self.norms[0](q), self.norms[1](k)
        q, k, v = _turn(q, cos, sin).transpose(1, 2), _turn(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(y.transpose(1, 2).flatten(2))

    def experts(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        order = chosen.flatten().argsort(stable=True)
        ids = torch.arange(self.model.experts, device=x.device)
        ends = (chosen.flatten().unsqueeze(-1) == ids).sum(0).cumsum(0)
        token = order // self.model.top_k
        both = _grouped(x[token], self.up, ends.to(torch.int32))
        gate, up = both.chunk(2, -1)
        y = _grouped(F.silu(gate) * up, self.down, ends.to(torch.int32))
        return torch.zeros_like(x).index_add(0, token, y * weights.flatten()[order].to(y.dtype).unsqueeze(-1))


class PlainDecoder(nn.Module):
    """The decoder with its loss, of models that `trainer.bench.baselines` lets pass."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.embedding = nn.Embedding(model.vocab, model.hidden)
        self.blocks = nn.ModuleList(_Block(model) for _ in range(model.layers))
        self.norm = _Norm(model.hidden, model.norm_eps)
        self.head = nn.Linear(model.hidden, model.vocab, bias=False)

    def routers(self) -> list[nn.Module]:
        """By layer, for `trainer.bench.routing`."""
        return [module for module in self.modules() if isinstance(module, _Router)]

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of [B, S + 1] tokens."""
        x = self.embedding(tokens[:, :-1])
        half = self.model.head_dim // 2
        rate = self.model.rope_theta ** -(torch.arange(half, device=x.device) / half)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * rate
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), tokens[:, 1:].flatten())


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if x.is_cuda:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([F.linear(rows, one) for rows, one in zip(parts, weight, strict=True)])
