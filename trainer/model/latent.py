"""Multi-head latent attention (DeepSeek-V3, arXiv 2412.19437 section 2.1.1).

Shape letters: B samples, S tokens of a sample, D model width, N heads of this rank, H head width without position, R width
of the rotary part, rq and rkv ranks of the compressed queries and of the compressed keys and values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from configs.model import ModelConfig
from trainer.model.attention import heads
from trainer.model.norm import RMSNorm
from trainer.model.rotary import RotaryAngles, attention_factor
from trainer.model.seams import AttentionSeam, MicroBatch, SoloSeams, TensorSeam


class LatentAttention(nn.Module):
    """Queries, keys and values from compressed latents; the position goes through a rotary part of its own.

    Parameters: `query_down.weight` [rq, D], `query_down_norm.weight` [rq] and `query_up.weight` [N*(H+R), rq], or
    `query.weight` [N*(H+R), D] where `q_lora_rank` is 0: of each head H without position, then R that are rotated.
    `key_value_down.weight` [rkv+R, D]: the latent, then a rotary key that all heads share; `key_value_norm.weight` [rkv]
    acts on the latent; `key_value_up.weight` [N*2H, rkv]: of each head the key's H, then the value's H. `output.weight`
    [D, N*H]. Scores are scaled by 1/sqrt(H+R), under YaRN also by the square of its factor. The rotation is by halves, not
    interleaved as in DeepSeek's files.

    Under tensor parallelism the down-projections and norms are replicated and run on this rank's part of the tokens; the
    latents are entered, which are narrower than x. (Without query compression x is entered too, for `query`.) The
    up-projections are split by heads, output by its columns.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.rotary_dim, self.window = model.head_dim, model.rope_head_dim, model.window
        self.rank = model.kv_lora_rank
        self.scale = attention_factor(model.yarn) ** 2 / math.sqrt(model.head_dim + model.rope_head_dim)
        query, rank = model.heads * (model.head_dim + model.rope_head_dim), model.q_lora_rank
        self.compressed = bool(rank)
        if rank:
            self.query_down = nn.Linear(model.hidden, rank, bias=False)
            self.query_down_norm = RMSNorm(rank, model.norm_eps)
            self.query_up = nn.Linear(rank, query, bias=False)
        else:
            self.query = nn.Linear(model.hidden, query, bias=False)
        self.key_value_down = nn.Linear(model.hidden, self.rank + model.rope_head_dim, bias=False)
        self.key_value_norm = RMSNorm(self.rank, model.norm_eps)
        self.key_value_up = nn.Linear(self.rank, model.heads * 2 * model.head_dim, bias=False)
        self.output = nn.Linear(model.heads * model.head_dim, model.hidden, bias=False)
        self.tensors: TensorSeam = SoloSeams()
        self.core: AttentionSeam = SoloSeams()

    def splits(self) -> dict[str, int | None]:
        """Dim of each parameter that tensor parallelism splits."""
        query = "query_up.weight" if self.compressed else "query.weight"
        return {query: 0, "key_value_up.weight": 0, "output.weight": 1}

    def forward(self, x_BSD: Tensor, micro: MicroBatch, angles: RotaryAngles) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        latent, key = self.key_value_down(x_BSD).split((self.rank, self.rotary_dim), dim=-1)
        latent = self.key_value_norm(latent)
        if self.compressed:
            query = self.query_down_norm(self.query_down(x_BSD))
            joined = self.tensors.enter(torch.cat((query, latent, key), dim=-1))
            query, latent, key = joined.split((query.shape[-1], self.rank, self.rotary_dim), dim=-1)
            q = self.query_up(query)
        else:
            latent, key = self.tensors.enter(torch.cat((latent, key), dim=-1)).split(
                (self.rank, self.rotary_dim), dim=-1
            )
            q = self.query(self.tensors.enter(x_BSD))
        q_BNSH = heads(q, self.head_dim + self.rotary_dim)
        q_plain, q_turned = q_BNSH.split((self.head_dim, self.rotary_dim), dim=-1)
        kv_BNSH = heads(self.key_value_up(latent), 2 * self.head_dim)
        k_plain, v_BNSH = kv_BNSH.chunk(2, dim=-1)
        k_turned = angles.rotate(key.unsqueeze(1)).expand(-1, k_plain.shape[1], -1, -1)
        q_BNSH = torch.cat((q_plain, angles.rotate(q_turned)), dim=-1)
        k_BNSH = torch.cat((k_plain, k_turned), dim=-1)
        out_BNSH = self.core.attend(q_BNSH, k_BNSH, v_BNSH, micro, self.window, self.scale)
        return self.tensors.leave(self.output(out_BNSH.transpose(1, 2).flatten(2)))
