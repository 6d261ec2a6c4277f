"""Initial weights: a function of the seed, a parameter's name in the whole model and an element's place in it.

So every layout begins with the same model, and a rank works out its own part of a tensor alone, on its own device, without
the rest. The same bits come out on every device: integers are mixed, and looked up in a table that is made on the CPU.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from configs.model import ModelConfig
from trainer.model.decoder import DecoderStage
from trainer.state import Box

#: Elements that are worked out at a time: on a CPU what its cache holds (seven times as fast as 1 << 24), elsewhere enough
#: to fill the device with a few hundred MB of intermediates.
_CHUNK_CPU, _CHUNK = 1 << 17, 1 << 24
#: The table divides the half of a normal distribution into this many bins of equal probability.
_BITS = 15
_ADD, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def initial(name: str, box: Box, model: ModelConfig, seed: int, device: torch.device | str) -> Tensor:
    """The initial values of a box of a parameter, fp32, on `device`.

    Norms and scales are 1, biases 0. All else is normal with mean 0 and deviation `init_std`, and
    `init_std / sqrt(2 * layers)` for what is added to the residual stream (`down` and `output`).

    Args:
        name: of the parameter in the whole model, such as `blocks.3.feed.experts.gate_up`.
        seed: of any size; all its bits count.
    """
    last = name.rpartition(".")[2]
    if last.endswith("bias"):
        return torch.zeros(box.shape, device=device)
    if last.endswith("scale") or name.endswith("norm.weight"):
        return torch.ones(box.shape, device=device)
    scaled = name.endswith((".down.weight", ".down", ".output.weight"))
    std = model.init_std / math.sqrt(2 * model.layers) if scaled else model.init_std
    return _normal(_key(seed, name), box, device) * std


def kind(name: str) -> str:
    """How an optimizer treats a parameter: `matrix`, `embedding` or `vector` (see `trainer.optim.shards.ParameterShard`).

    ZAYA1's convolutions are vectors: it trains them with AdamW.
    """
    if name in ("embedding.weight", "head.weight"):
        return "embedding"
    owner, _, last = name.rpartition(".")
    vector = last.endswith(("bias", "scale")) or owner.endswith(("norm", "_conv", "_mix"))
    return "vector" if vector else "matrix"


@torch.no_grad()
def initialize(stage: DecoderStage, seed: int) -> None:
    """Fill all parameters of a stage that is whole on this rank, and zero its buffers (the routers' biases)."""
    for name, parameter in stage.named_parameters():
        whole = Box.full(tuple(parameter.shape))
        parameter.copy_(initial(name, whole, stage.config, seed, parameter.device))
    for buffer in stage.buffers():
        buffer.zero_()


def build(model: ModelConfig, seed: int, device: torch.device | str = "cpu") -> DecoderStage:
    """The whole model on one rank, in fp32."""
    with torch.device("meta"):
        stage = DecoderStage(model, 0, model.layers)
    stage.to_empty(device=device)
    initialize(stage, seed)
    return stage


def _key(seed: int, name: str) -> int:
    """64 bits of the seed and the name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest, "little"))


def _signed(value: int) -> int:
    """64 bits as the signed integer that torch has."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _normal(key: int, box: Box, device: torch.device | str) -> Tensor:
    """Standard normal values of a box, [box.shape] fp32."""
    out = torch.empty(box.shape, device=device)
    if not box.elements:
        return out
    table = _table().to(device)
    rows = out.view(-1, box.shape[-1])
    starts = _rows(box, device)
    columns = torch.arange(box.start[-1], box.start[-1] + box.shape[-1], device=device)
    step = max(1, (_CHUNK_CPU if table.device.type == "cpu" else _CHUNK) // box.shape[-1])
    for i in range(0, len(starts), step):
        rows[i : i + step] = _values(
            (starts[i : i + step, None] + columns).mul_(_signed(_ADD)).add_(key), table
        )
    return out


def _rows(box: Box, device: torch.device | str) -> Tensor:
    """Place in the whole tensor, row-major, of the first element of each row of the box; the rows' own start left out."""
    places, stride = torch.zeros((), dtype=torch.int64, device=device), box.whole[-1]
    for whole, start, length in zip(box.whole[-2::-1], box.start[-2::-1], box.shape[-2::-1], strict=True):
        along = torch.arange(start, start + length, device=device) * stride
        places = (along[:, None] + places.reshape(1, -1)).flatten()
        stride *= whole
    return places.reshape(-1)


def _values(bits: Tensor, table: Tensor) -> Tensor:
    """Normal values of the states of a SplitMix64 generator (Steele et al. 2014), which are used up."""
    bits.bitwise_xor_(_shifted(bits, 30)).mul_(_signed(_MIX1))
    bits.bitwise_xor_(_shifted(bits, 27)).mul_(_signed(_MIX2))
    bits.bitwise_xor_(_shifted(bits, 31))
    bin_index = bits & ((1 << _BITS) - 1)
    low = table[bin_index]
    # Product and sum stay two operations: a fused one rounds otherwise, and not on every device.
    within = (_shifted(bits, 40)).float().mul_(2.0**-24)
    value = within.mul_(table[bin_index + 1] - low).add_(low)
    return torch.where(bits & (1 << _BITS) == 0, value, -value)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shifted right with zeros coming in; torch's own shift copies the sign."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


@lru_cache(maxsize=1)
def _table() -> Tensor:
    """Bounds of bins of equal probability of |z|, z normal, [2^15 + 1] fp32.

    Within a bin the density is taken as even. The last bin, which has no end, ends where its mean square is right,
    at 4.6 deviations.
    """
    bins = 1 << _BITS
    p = torch.arange(bins, dtype=torch.float64) / bins
    table = torch.special.ndtri(0.5 + p / 2)
    start = table[-1].item()
    # E[z^2; z > a] = a phi(a) + Q(a); for an even density on [a, b] the mean square is (a^2 + ab + b^2)/3.
    density = math.exp(-start * start / 2) / math.sqrt(2 * math.pi)
    square = start * density * 2 * bins + 1
    end = (-start + math.sqrt(start * start - 4 * (start * start - 3 * square))) / 2
    return torch.cat((table, torch.tensor([end], dtype=torch.float64))).float()
