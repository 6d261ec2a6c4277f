"""Which tensors a model has, by name, with their shapes and kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.model import ModelConfig


def with_experts(model: ModelConfig) -> list[int]:
    """Layers with experts: from layer `moe_every` - 1 on every `moe_every`-th, as `moe_layers` of Llama 4's configuration
    counts them, but for the leading dense layers (`first_k_dense_replace` of DeepSeek)."""
    step = model.moe_every
    return [layer for layer in range(step - 1, model.layers, step) if layer not in range(model.dense_layers)]


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of everything that is learned by gradient."""
    D, V = model.hidden, model.vocab
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (V, D)}
    if model.residual_scaling:
        shapes |= {"input_scaling.scale": (D,), "input_scaling.bias": (D,)}
    for layer in range(model.layers):
        shapes |= _block(model, f"blocks.{layer}.", layer, moe=layer in with_experts(model))
    shapes["final_norm.weight"] = (D,)
    if not model.tie_embeddings:
        shapes["head.weight"] = (V, D)
    for depth in range(model.mtp_layers):
        name = f"mtp.{depth}."
        for norm in ("hidden_norm", "embedding_norm", "final_norm"):
            shapes[f"{name}{norm}.weight"] = (D,)
        shapes[f"{name}project.weight"] = (D, 2 * D)
        shapes |= _block(model, f"{name}block.", model.layers + depth, moe=True)
    return shapes


def _block(model: ModelConfig, name: str, layer: int, moe: bool) -> dict[str, tuple[int, ...]]:
    D = model.hidden
    shapes: dict[str, tuple[int, ...]] = {f"{name}attention_norm.weight": (D,)}
    shapes |= {f"{name}attention.{part}": shape for part, shape in _ATTENTION[model.attention](model).items()}
    if not model.parallel_block:
        shapes[f"{name}feed_norm.weight"] = (D,)
    if model.residual_scaling:
        for part in ["attention"] if model.parallel_block else ["attention", "feed"]:
            for vector in ("stream.scale", "stream.bias", "output.scale", "output.bias"):
                shapes[f"{name}{part}_residual.{vector}"] = (D,)
    feed = _mixture(model, layer) if moe else _mlp(model, model.dense_width, "")
    return shapes | {f"{name}feed.{part}": shape for part, shape in feed.items()}


def _grouped(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, query, key = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "query.weight": (query, D),
        "key.weight": (key, D),
        "value.weight": (key, D),
        "output.weight": (D, query),
    }
    if model.qk_norm == "head":
        shapes |= {"query_norm.weight": (model.head_dim,), "key_norm.weight": (model.head_dim,)}
    if model.qk_norm == "projection":
        shapes |= {"query_norm.weight": (query,), "key_norm.weight": (key,)}
    return shapes


def _latent(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, N, H, R = model.hidden, model.heads, model.head_dim, model.rope_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "key_value_down.weight": (model.kv_lora_rank + R, D),
        "key_value_norm.weight": (model.kv_lora_rank,),
        "key_value_up.weight": (N * 2 * H, model.kv_lora_rank),
        "output.weight": (D, N * H),
    }
    if not model.q_lora_rank:
        return shapes | {"query.weight": (N * (H + R), D)}
    return shapes | {
        "query_down.weight": (model.q_lora_rank, D),
        "query_down_norm.weight": (model.q_lora_rank,),
        "query_up.weight": (N * (H + R), model.q_lora_rank),
    }


def _compressed(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, H, query, key = (
        model.hidden,
        model.head_dim,
        model.heads * model.head_dim,
        model.kv_heads * model.head_dim,
    )
    return {
        "query.weight": (query, D),
        "key.weight": (key, D),
        "value.weight": (key, D),
        "query_conv.weight": (query, 2),
        "query_conv.bias": (query,),
        "query_mix.weight": (query, H, 2),
        "query_mix.bias": (query,),
        "key_conv.weight": (key, 2),
        "key_conv.bias": (key,),
        "key_mix.weight": (key, H, 2),
        "key_mix.bias": (key,),
        "key_scale": (model.kv_heads,),
        "output.weight": (D, query),
    }


_ATTENTION = {"gqa": _grouped, "mla": _latent, "cca": _compressed}


def _mlp(model: ModelConfig, width: int, name: str) -> dict[str, tuple[int, ...]]:
    D = model.hidden
    shapes: dict[str, tuple[int, ...]] = {f"{name}up.weight": (width, D), f"{name}down.weight": (D, width)}
    return shapes | ({f"{name}gate.weight": (width, D)} if model.gated else {})


def _mixture(model: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    D, E, F = model.hidden, model.experts, model.expert_width
    shapes: dict[str, tuple[int, ...]] = {"experts.down": (E, D, F)}
    shapes |= {"experts.gate_up": (E, 2, F, D)} if model.gated else {"experts.up": (E, F, D)}
    if model.shared_width:
        shapes |= _mlp(model, model.shared_width, "shared.")
    if model.router.kind == "linear":
        return shapes | {"router.linear.weight": (E, D)}
    width = model.router.hidden
    shapes |= {
        "router.compress.weight": (width, D),
        "router.compress.bias": (width,),
        "router.norm.weight": (width,),
    }
    for part in ("first", "second"):
        shapes |= {f"router.{part}.weight": (width, width), f"router.{part}.bias": (width,)}
    shapes["router.last.weight"] = (E, width)
    if layer in with_experts(model)[1:]:  # the first, and multi-token prediction, have no router before them
        shapes["router.state_scale"] = (width,)
    return shapes


def is_buffer(name: str) -> bool:
    """Whether a tensor of the state is moved by the balancing rule and not by a gradient."""
    return name.endswith((".router.bias", ".router.bias_avg", ".router.bias_avg_sq"))


def kind(name: str, shape: tuple[int, ...]) -> str:
    """What an optimizer treats alike: `embedding` (table and output projection), `matrix`, `vector`."""
    if name in ("embedding.weight", "head.weight"):
        return "embedding"
    convolution = name.endswith(("_conv.weight", "_mix.weight"))  # ZAYA1 has AdamW for them
    return "vector" if len(shape) < 2 or convolution else "matrix"


def routers(model: ModelConfig) -> list[str]:
    """Names of all routers, in the order of the layers, those of multi-token prediction last."""
    blocks = [f"blocks.{layer}" for layer in with_experts(model)]
    return [
        f"{block}.feed.router"
        for block in blocks + [f"mtp.{depth}.block" for depth in range(model.mtp_layers)]
    ]


def random_state(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """fp64 values for everything, none of them 0 or 1, so that what is left out or doubled shows."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in parameter_shapes(model).items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind(name, shape) == "vector" and "bias" not in name and len(shape) == 1:
            state[name] = 1 + values / 5
        else:
            state[name] = values * (0.8 if name == "embedding.weight" else 1.2 / max(1, shape[-1]) ** 0.5)
    for router in routers(model):
        bias = 0.05 * torch.randn(model.experts, generator=generator, dtype=torch.float64)
        state[f"{router}.bias"] = bias if model.router.balance in ("bias", "both") else torch.zeros_like(bias)
        if model.router.bias_rule == "load_error":
            state[f"{router}.bias_avg"] = torch.zeros(model.experts, dtype=torch.float64)
            state[f"{router}.bias_avg_sq"] = torch.zeros(model.experts, dtype=torch.float64)
    return state
