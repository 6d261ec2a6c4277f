"""Compressed convolutional attention with grouped queries (arXiv 2510.04476), as ZAYA1 has it.

Shape letters: B samples, S tokens of a sample, D model width, N query heads and G key/value heads of this rank, H head
width, C = (N+G)*H channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import ModelConfig
from trainer.kernels.choice import use_kernels
from trainer.model.norm import upcast
from trainer.model.rotary import RotaryAngles
from trainer.model.seams import AttentionSeam, MicroBatch, SoloSeams, TensorSeam


class Taps(nn.Module):
    """A causal convolution of width 2: `weight` [channels, ..., 2] (token before, token), `bias` [channels]."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, 2))
        self.bias = nn.Parameter(torch.zeros(shape[0]))


class CompressedAttention(nn.Module):
    """Attention whose queries and keys are narrow, mixed along the sequence and normed.

    With q = query(x), k = key(x), v = value(x), heads of width H, and each key head serving N/G query heads:

    1. mean_n = (q_n + k of its group)/2 for each query head; each key head has the mean of its group's mean_n.
    2. Queries and keys go through two causal convolutions of width 2: one per channel
       (`query_conv`, `key_conv`: `.weight` [channels, 2]), then one per head (`query_mix`, `key_mix`: `.weight`
       [channels, H, 2], for each tap a matrix from the head's H inputs to H outputs); both have a `.bias` [channels]. Tap 0
       is the token before, tap 1 the token itself. Before a sample or document the first convolution sees zeros and the
       second the first one's bias, which is what it makes of zeros.
    3. q_n = convolved + mean_n, then q_n * sqrt(H)/|q_n|; k the same, times `key_scale` [G].
    4. Of the values' G*H channels the second half is that of the token before (zero at the start).
    5. Rotation, causal attention with scale 1/sqrt(H), `output`.

    Parameters beside those: `query.weight` [N*H, D], `key.weight` and `value.weight` [G*H, D], `output.weight` [D, N*H].
    `key_scale` begins at 1 (the released code begins at 0, where attention sees no difference between keys). Under tensor
    parallelism x is entered, and all but `output` is split by heads.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.window = model.head_dim, model.window
        query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
        self.current = key // 2
        """Channels of all ranks' values that are of the token itself."""
        self.query = nn.Linear(model.hidden, query, bias=False)
        self.key = nn.Linear(model.hidden, key, bias=False)
        self.value = nn.Linear(model.hidden, key, bias=False)
        self.query_conv, self.key_conv = Taps(query), Taps(key)
        self.query_mix, self.key_mix = Taps(query, model.head_dim), Taps(key, model.head_dim)
        self.key_scale = nn.Parameter(torch.ones(model.kv_heads))
        self.output = nn.Linear(query, model.hidden, bias=False)
        self.single_output = False
        """As in `RMSNorm`."""
        self.tensors: TensorSeam = SoloSeams()
        self.core: AttentionSeam = SoloSeams()

    def splits(self) -> dict[str, int | None]:
        """Dim of each parameter that tensor parallelism splits."""
        return {name: 1 if name == "output.weight" else 0 for name, _ in self.named_parameters()}

    def forward(self, x_BSD: Tensor, micro: MicroBatch, angles: RotaryAngles) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        x_BSD = self.tensors.enter(x_BSD)
        mixed = self._fused if use_kernels(x_BSD) and not self.single_output else self._mixed
        out_BNSH = self.core.attend(*mixed(x_BSD, micro, angles), micro, self.window, None)
        return self.tensors.leave(self.output(out_BNSH.transpose(1, 2).flatten(2)))

    def _here(self, keys: int) -> int:
        """Channels of this rank's values that are of the token itself, of `keys`."""
        return min(max(self.current - self.tensors.index * keys, 0), keys)

    def _fused(self, x_BSD: Tensor, micro: MicroBatch, angles: RotaryAngles) -> tuple[Tensor, Tensor, Tensor]:
        """What attention takes, by kernels."""
        from trainer.kernels.compressed import Before, CompressedRule, compressed

        layers = self.query, self.key, self.value
        joined_BSW = F.linear(x_BSD, torch.cat([layer.weight for layer in layers]))
        queries, keys = self.query.weight.shape[0], self.key.weight.shape[0]
        if self.core.whole:
            before = Before(micro.starts_BS.view(torch.uint8))
        else:
            one_BSW = self.core.previous(joined_BSW, micro)
            before = Before(None, one_BSW, self.core.previous(one_BSW[..., : queries + keys], micro))
        convs, mixes = (self.query_conv, self.key_conv), (self.query_mix, self.key_mix)
        parameters = [
            torch.cat([getattr(taps, name) for taps in pair])
            for pair in (convs, mixes)
            for name in ("weight", "bias")
        ]
        rule = CompressedRule(
            angles.cos_SP, angles.sin_SP, queries // self.head_dim, keys // self.head_dim, self.head_dim,
            self._here(keys),
        )  # fmt: skip
        return compressed(joined_BSW, before, (*parameters, self.key_scale), rule)

    def _mixed(self, x_BSD: Tensor, micro: MicroBatch, angles: RotaryAngles) -> tuple[Tensor, Tensor, Tensor]:
        """The same by torch's operators."""
        q, k, v = self.query(x_BSD), self.key(x_BSD), self.value(x_BSD)
        queries, keys = q.shape[-1], k.shape[-1]
        joined = torch.cat((q, k), dim=-1)
        here = self._here(keys)
        before = self.core.previous(torch.cat((joined, v[..., here:]), dim=-1), micro)
        v = torch.cat((v[..., :here], before[..., queries + keys :]), dim=-1)
        mixed = self._convolve(joined, before[..., : queries + keys], micro)

        q_BSGMH = q.unflatten(-1, (keys // self.head_dim, -1, self.head_dim))
        mean_BSGMH = (q_BSGMH + k.unflatten(-1, (-1, 1, self.head_dim))) * 0.5
        q = mixed[..., :queries] + mean_BSGMH.flatten(2)
        k = mixed[..., queries:] + mean_BSGMH.mean(dim=3).flatten(2)
        q_BNSH, k_BGSH = self._normed(q), self._normed(k) * upcast(self.key_scale)[:, None, None]
        q_BNSH, k_BGSH = (angles.rotate(x).to(v.dtype) for x in (q_BNSH, k_BGSH))
        return q_BNSH, k_BGSH, v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _convolve(self, x_BSC: Tensor, before_BSC: Tensor, micro: MicroBatch) -> Tensor:
        """Both convolutions over the channels of queries and keys."""
        taps_C2 = torch.cat((self.query_conv.weight, self.key_conv.weight))
        bias_C = torch.cat((self.query_conv.bias, self.key_conv.bias))
        once_BSC = before_BSC * taps_C2[:, 0] + x_BSC * taps_C2[:, 1]
        pair_BS2C = torch.stack((self.core.previous(once_BSC, micro), once_BSC), dim=2) + bias_C
        pair_BS2NH = pair_BS2C.unflatten(-1, (-1, self.head_dim))
        mix_CH2 = torch.cat((self.query_mix.weight, self.key_mix.weight))
        mix_NOH2 = mix_CH2.unflatten(0, (-1, self.head_dim))
        twice_BSNO = torch.einsum("bstnh,noht->bsno", pair_BS2NH, mix_NOH2)
        return twice_BSNO.flatten(2) + torch.cat((self.query_mix.bias, self.key_mix.bias))

    def _normed(self, x_BSC: Tensor) -> Tensor:
        """Heads of length sqrt(H), [B, heads, S, H] in fp32."""
        x_BNSH = upcast(x_BSC).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return F.normalize(x_BNSH, dim=-1, eps=torch.finfo(torch.float32).eps) * self.head_dim**0.5
