"""The decoder: embedding, pre-norm blocks of attention and experts, output projection, loss.

Shape letters: B samples, S tokens of a sample, D model width, V vocabulary.
"""

from __future__ import annotations

import math
import zlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig
from trainer.model.attention import Attention, RMSNorm, Rotary
from trainer.model.moe import Experts, MoELayer, SwiGLU
from trainer.model.router import Router


class Block(nn.Module):
    """Attention, then experts or a dense layer, each behind a norm and a residual."""

    def __init__(
        self, model: ModelConfig, layer: int, rotary: Rotary, group: dist.ProcessGroup, ep_rank: int
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.hidden, model.norm_eps)
        self.attention = Attention(model, rotary)
        self.feed_norm = RMSNorm(model.hidden, model.norm_eps)
        dense = layer < model.dense_layers
        self.feed: SwiGLU | MoELayer = (
            SwiGLU(model.hidden, model.dense_width) if dense else MoELayer(model, group, ep_rank)
        )

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D] to [B, S, D], and the auxiliary loss."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        fed_TD = self.feed(self.feed_norm(x_BSD).flatten(0, 1))
        y_TD, auxiliary = fed_TD if isinstance(fed_TD, tuple) else (fed_TD, x_BSD.new_zeros(()))
        return x_BSD + y_TD.view_as(x_BSD), auxiliary


class Decoder(nn.Module):
    """A decoder-only language model whose forward pass is its training loss.

    The initial weights depend on `seed` and the names of the parameters alone, an expert's on its index in the
    layer, so every layout begins with the same model.
    """

    def __init__(
        self, model: ModelConfig, sequence: int, group: dist.ProcessGroup, ep_rank: int, seed: int
    ) -> None:
        super().__init__()
        self.config = model
        self.embedding = nn.Parameter(torch.empty(model.vocab, model.hidden))
        rotary = Rotary(model.head_dim, sequence, model.rope_theta)
        self.blocks = nn.ModuleList(Block(model, i, rotary, group, ep_rank) for i in range(model.layers))
        self.final_norm = RMSNorm(model.hidden, model.norm_eps)
        self.head = None if model.tie_embeddings else nn.Parameter(torch.empty(model.vocab, model.hidden))
        self._initialize(seed)

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of predicting each next token, and the summed auxiliary loss.

        `tokens_BS` is [B, sequence + 1]: the last token is only a target, the first only an input.
        """
        x_BSD = F.embedding(tokens_BS[:, :-1], self.embedding)
        auxiliary = torch.zeros((), device=x_BSD.device)
        for block in self.blocks:
            x_BSD, extra = block(x_BSD)
            auxiliary = auxiliary + extra
        logits_BSV = F.linear(self.final_norm(x_BSD), self.embedding if self.head is None else self.head)
        loss = F.cross_entropy(logits_BSV.float().flatten(0, 1), tokens_BS[:, 1:].flatten())
        return loss, auxiliary

    def routers(self) -> list[Router]:
        """The routers of all MoE layers, first layer first."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        std, scaled = self.config.init_std, self.config.init_std / math.sqrt(2 * self.config.layers)
        experts = {name: m for name, m in self.named_modules() if isinstance(m, Experts)}
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            spread = scaled if name.endswith(("down", "attention.output")) else std
            owner = experts.get(name.rpartition(".")[0])
            if owner is None:
                parameter.normal_(0.0, spread, generator=_generator(seed, name))
            else:
                for index, weight in enumerate(parameter):
                    unit = f"{name}.{owner.first + index}"
                    weight.normal_(0.0, spread, generator=_generator(seed, unit))


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))
