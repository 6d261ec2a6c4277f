"""Attention of one sample: grouped queries, latent keys and values, compressed convolutional attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from configs.model import ModelConfig, YarnConfig


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows of `weight` dotted with the last dim of `x`."""
    y = x @ weight.transpose(0, 1)
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dim."""
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / torch.sqrt(mean_square + eps) * weight


def frequencies(width: int, theta: float, yarn: YarnConfig) -> list[float]:
    """Radians per place of each rotated pair of a head.

    YaRN (arXiv 2309.00071, section 3.2, with the rounding of its code): pairs that turn more than `beta_fast` times within
    the original context keep their frequency, those below `beta_slow` turns have it divided by `factor`, and between the
    two it goes over linearly in the pair's index.
    """
    plain = [theta ** (-2 * pair / width) for pair in range(width // 2)]
    if yarn.factor == 1:
        return plain

    def pair_that_turns(turns: float) -> float:
        return width * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1)
    span = last - first if last != first else 0.001
    stretched = []
    for pair, frequency in enumerate(plain):
        share = min(1.0, max(0.0, (pair - first) / span))
        stretched.append(share * frequency / yarn.factor + (1 - share) * frequency)
    return stretched


def yarn_magnitude(yarn: YarnConfig) -> float:
    """Factor on queries and on keys that sharpens attention over a stretched context."""
    return 1.0 if yarn.factor == 1 else 0.1 * math.log(yarn.factor) + 1.0


def rotate(x_SH: Tensor, width: int, radians: list[float], magnitude: float) -> Tensor:
    """One head's first `width` channels turned by place; channel j is paired with j + width/2."""
    angles = [[place * r for r in radians] for place in range(x_SH.shape[0])]
    cos = torch.tensor([[math.cos(angle) * magnitude for angle in row] for row in angles], dtype=x_SH.dtype)
    sin = torch.tensor([[math.sin(angle) * magnitude for angle in row] for row in angles], dtype=x_SH.dtype)
    first, second, rest = x_SH[:, : width // 2], x_SH[:, width // 2 : width], x_SH[:, width:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=1)


def attend(
    queries: list[Tensor],
    keys: list[Tensor],
    values: list[Tensor],
    documents: list[int],
    window: int,
    scale: float,
) -> list[Tensor]:
    """Softmax attention, head by head. Query head n uses key/value head n // (N/G).

    A query sees the keys at or before its place that are of its document and, with a window, fewer than `window` back.
    """
    share = len(queries) // len(keys)
    heads = []
    for head, query in enumerate(queries):
        key, value = keys[head // share], values[head // share]
        rows = []
        for place in range(len(documents)):
            seen = [
                other
                for other in range(place + 1)
                if documents[other] == documents[place] and (not window or place - other < window)
            ]
            scores = key[seen] @ query[place] * scale
            weights = torch.exp(scores - scores.max().detach())
            rows.append((weights / weights.sum()) @ value[seen])
        heads.append(torch.stack(rows))
    return heads


def split_heads(x: Tensor, heads: int) -> list[Tensor]:
    """Head by head, each [S, H]."""
    width = x.shape[1] // heads
    return [x[:, head * width : (head + 1) * width] for head in range(heads)]


def grouped(model: ModelConfig, w: dict[str, Tensor], x: Tensor, documents: list[int]) -> Tensor:
    """Grouped-query attention."""
    query, key, value = (linear(x, w[f"{part}.weight"]) for part in ("query", "key", "value"))
    if model.qk_norm == "projection":
        query = rms_norm(query, w["query_norm.weight"], model.norm_eps)
        key = rms_norm(key, w["key_norm.weight"], model.norm_eps)
    queries, keys = split_heads(query, model.heads), split_heads(key, model.kv_heads)
    if model.qk_norm == "head":
        queries = [rms_norm(head, w["query_norm.weight"], model.norm_eps) for head in queries]
        keys = [rms_norm(head, w["key_norm.weight"], model.norm_eps) for head in keys]
    queries, keys = _turn(model, queries), _turn(model, keys)
    values = split_heads(value, model.kv_heads)
    heads = attend(queries, keys, values, documents, model.window, 1 / math.sqrt(model.head_dim))
    return linear(torch.cat(heads, dim=1), w["output.weight"])


def _turn(model: ModelConfig, heads: list[Tensor]) -> list[Tensor]:
    width = round(model.head_dim * model.rope_fraction)
    radians = frequencies(width, model.rope_theta, model.yarn)
    return [rotate(head, width, radians, yarn_magnitude(model.yarn)) for head in heads]


def latent(model: ModelConfig, w: dict[str, Tensor], x: Tensor, documents: list[int]) -> Tensor:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Under YaRN DeepSeek leaves cosine and sine as they are and puts the magnitude on the scores, position-free part
    included: `softmax_scale * mscale * mscale` in inference/model.py of deepseek-ai/DeepSeek-V3.
    """
    plain, rotary, rank = model.head_dim, model.rope_head_dim, model.kv_lora_rank
    if model.q_lora_rank:
        compressed = rms_norm(linear(x, w["query_down.weight"]), w["query_down_norm.weight"], model.norm_eps)
        query = linear(compressed, w["query_up.weight"])
    else:
        query = linear(x, w["query.weight"])
    down = linear(x, w["key_value_down.weight"])
    shared_key = down[:, rank:]
    up = linear(
        rms_norm(down[:, :rank], w["key_value_norm.weight"], model.norm_eps), w["key_value_up.weight"]
    )

    radians = frequencies(rotary, model.rope_theta, model.yarn)
    shared_key = rotate(shared_key, rotary, radians, 1.0)
    queries, keys, values = [], [], []
    for of_query, of_pair in zip(split_heads(query, model.heads), split_heads(up, model.heads), strict=True):
        queries.append(
            torch.cat([of_query[:, :plain], rotate(of_query[:, plain:], rotary, radians, 1.0)], dim=1)
        )
        keys.append(torch.cat([of_pair[:, :plain], shared_key], dim=1))
        values.append(of_pair[:, plain:])
    scale = yarn_magnitude(model.yarn) ** 2 / math.sqrt(plain + rotary)
    heads = attend(queries, keys, values, documents, model.window, scale)
    return linear(torch.cat(heads, dim=1), w["output.weight"])


def compressed(model: ModelConfig, w: dict[str, Tensor], x: Tensor, documents: list[int]) -> Tensor:
    """Compressed convolutional attention (arXiv 2510.04476) as ZAYA1 has it.

    Queries and keys go through two causal convolutions of width 2, the first channel by channel, the second head by head,
    and get the mean of the unconvolved queries and keys of their group added; both are brought to length sqrt(H), keys
    times a learned scale. Half of the value channels come from the token before. Before a sample or document there are
    zeros, which the first convolution turns into its bias.
    """
    query, key = linear(x, w["query.weight"]), linear(x, w["key.weight"])
    share = model.heads // model.kv_heads
    plain_queries, plain_keys = split_heads(query, model.heads), split_heads(key, model.kv_heads)
    mixed_queries = [(head + plain_keys[n // share]) / 2 for n, head in enumerate(plain_queries)]
    mixed_keys = [sum(mixed_queries[g * share : (g + 1) * share]) / share for g in range(model.kv_heads)]

    heads = split_heads(convolve_twice(query, w, "query", model.heads, documents), model.heads)
    queries = [unit(head + mixed) for head, mixed in zip(heads, mixed_queries, strict=True)]
    heads = split_heads(convolve_twice(key, w, "key", model.kv_heads, documents), model.kv_heads)
    keys = [
        unit(head + mixed) * w["key_scale"][g]
        for g, (head, mixed) in enumerate(zip(heads, mixed_keys, strict=True))
    ]
    before = torch.stack(
        [
            x[place - 1] if _goes_on(documents, place) else torch.zeros_like(x[0])
            for place in range(len(documents))
        ]
    )
    half = w["value.weight"].shape[0] // 2
    value = torch.cat([linear(x, w["value.weight"][:half]), linear(before, w["value.weight"][half:])], dim=1)
    queries, keys = _turn(model, queries), _turn(model, keys)
    values = split_heads(value, model.kv_heads)
    outputs = attend(queries, keys, values, documents, model.window, 1 / math.sqrt(model.head_dim))
    return linear(torch.cat(outputs, dim=1), w["output.weight"])


def unit(x_SH: Tensor) -> Tensor:
    """Each row with length sqrt(H)."""
    return x_SH / torch.sqrt((x_SH * x_SH).sum(-1, keepdim=True)) * math.sqrt(x_SH.shape[1])


def _goes_on(documents: list[int], place: int) -> bool:
    """Whether the token before is of the same document."""
    return place > 0 and documents[place - 1] == documents[place]


def convolve_twice(x: Tensor, w: dict[str, Tensor], which: str, heads: int, documents: list[int]) -> Tensor:
    """[S, channels]; index 0 of a kernel is the place before, index 1 the place itself."""
    channel, channel_bias = w[f"{which}_conv.weight"], w[f"{which}_conv.bias"]
    head_kernel, head_bias = w[f"{which}_mix.weight"], w[f"{which}_mix.bias"]
    width = x.shape[1] // heads
    nothing = torch.zeros_like(x[0])
    first = []
    for place in range(len(documents)):
        before = x[place - 1] if _goes_on(documents, place) else nothing
        first.append(channel[:, 0] * before + channel[:, 1] * x[place] + channel_bias)
    rows = []
    for place in range(len(documents)):
        before = first[place - 1] if _goes_on(documents, place) else channel_bias
        parts = []
        for head in range(heads):
            channels = slice(head * width, (head + 1) * width)
            kernel = head_kernel[channels]
            parts.append(kernel[:, :, 0] @ before[channels] + kernel[:, :, 1] @ first[place][channels])
        rows.append(torch.cat(parts) + head_bias)
    return torch.stack(rows)


ATTENTION = {"gqa": grouped, "mla": latent, "cca": compressed}
