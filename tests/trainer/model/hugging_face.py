"""Published architectures at a small size, in their own code (`transformers`) and as ours, with random weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from configs.model import ModelConfig, RouterConfig, YarnConfig
from faulttol.convert.families import tensors

VOCAB = 96
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A published architecture at a small size."""

    ours: ModelConfig
    build: Callable[[], nn.Module]


def shape(**more: object) -> dict[str, object]:
    return {"vocab_size": VOCAB, "attn_implementation": "eager", "experts_implementation": "eager", **more}


def mixtral() -> Family:
    ours = ModelConfig(
        name="mixtral", layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, vocab=VOCAB, experts=4, top_k=2,
        expert_width=40, rope_theta=1e6, norm_eps=1e-5, window=7, router=RouterConfig(balance="none"),
    )  # fmt: skip
    theirs = transformers.MixtralConfig(
        **shape(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
            num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-5, sliding_window=7,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )  # fmt: skip
    return Family(ours, lambda: transformers.MixtralForCausalLM(theirs))


def olmoe() -> Family:
    ours = ModelConfig(
        name="olmoe", layers=2, hidden=32, heads=4, kv_heads=4, head_dim=8, vocab=VOCAB, experts=8, top_k=3,
        expert_width=24, qk_norm="projection", router=RouterConfig(balance="none", renormalize=False),
    )  # fmt: skip
    theirs = transformers.OlmoeConfig(
        **shape(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=24,
            num_experts=8, num_experts_per_tok=3, norm_topk_prob=False, clip_qkv=None, eos_token_id=None,
        )
    )  # fmt: skip
    return Family(ours, lambda: transformers.OlmoeForCausalLM(theirs))


def qwen3(layers: int = 2, step: int = 1, dense_layers: int = 0) -> Family:
    """With experts in every `step`th layer, after so many dense ones."""
    ours = ModelConfig(
        name="qwen3", layers=layers, hidden=32, heads=4, kv_heads=2, head_dim=16, vocab=VOCAB, experts=8, top_k=2,
        expert_width=24, qk_norm="head", rope_theta=1e6, norm_eps=1e-6, router=RouterConfig(balance="none"),
        dense_layers=dense_layers, moe_every=step, dense_width=40,
    )  # fmt: skip
    theirs = transformers.Qwen3MoeConfig(
        **shape(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, decoder_sparse_step=step,
            mlp_only_layers=list(range(dense_layers)), intermediate_size=40,
        )
    )  # fmt: skip
    return Family(ours, lambda: transformers.Qwen3MoeForCausalLM(theirs))


def qwen3_yarn() -> Family:
    """YaRN as the paper has it, on cosine and sine."""
    base = qwen3()
    ours = base.ours.model_copy(update={"yarn": YarnConfig(factor=4, original=8), "rope_theta": 500.0})
    made = base.build()
    made.config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8,
    }  # fmt: skip
    return Family(ours, lambda: transformers.Qwen3MoeForCausalLM(made.config))


def deepseek(yarn: bool = False, compressed: bool = True) -> Family:
    rank, query_rank, plain_width, rotary, heads = 12, 10, 12, 8, 4
    ours = ModelConfig(
        name="deepseek", layers=3, hidden=32, heads=heads, kv_heads=heads, head_dim=plain_width, vocab=VOCAB, experts=8,
        top_k=2, expert_width=24, shared_width=24, dense_layers=1, dense_width=40, attention="mla",
        q_lora_rank=query_rank if compressed else 0, kv_lora_rank=rank, rope_head_dim=rotary, rope_theta=500.0,
        norm_eps=1e-6, yarn=YarnConfig(factor=4, original=8) if yarn else YarnConfig(),
        router=RouterConfig(score="sigmoid", scale=2.5, groups=4, top_groups=2, balance="bias"),
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 500.0}
    if yarn:
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32,
                 "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    theirs = transformers.DeepseekV3Config(
        **shape(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=heads,
            intermediate_size=40, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, n_group=4,
            topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True, n_shared_experts=1, first_k_dense_replace=1,
            kv_lora_rank=rank, q_lora_rank=query_rank if compressed else None, qk_rope_head_dim=rotary,
            qk_nope_head_dim=plain_width, v_head_dim=plain_width, rms_norm_eps=1e-6, rope_parameters=rope,
        )
    )  # fmt: skip
    return Family(ours, lambda: transformers.DeepseekV3ForCausalLM(theirs))


FAMILIES: dict[str, Callable[[], Family]] = {
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen3": qwen3,
    "qwen3-interleaved": lambda: qwen3(layers=6, step=2, dense_layers=2),
    "qwen3-yarn": qwen3_yarn,
    "deepseek-v3": deepseek,
    "deepseek-v3-yarn": lambda: deepseek(yarn=True),
    "deepseek-v3-query-whole": lambda: deepseek(compressed=False),
}


def randomize(theirs: nn.Module) -> None:
    """Random weights: norms, scales and temperatures about 1; the rest so that every part carries weight and softmax isn't
    flat."""
    with torch.no_grad():
        for key, tensor in (*theirs.named_parameters(), *theirs.named_buffers()):
            if "inv_freq" in key:
                continue
            is_bias = "bias" in key.rsplit(".", 1)[-1]
            spread = 0.2 if tensor.ndim == 1 else 0.8 if "embed" in key else 1.2 / math.sqrt(tensor.shape[-1])
            tensor.copy_(
                torch.randn(tensor.shape) * spread + (1.0 if tensor.ndim == 1 and not is_bias else 0.0)
            )


def renamed(model: ModelConfig, theirs: Weights) -> Weights:
    """Tensors by their name in `transformers` to tensors by ours. Only moves elements, so it maps gradients as well."""
    files = unstacked(theirs)
    ours: Weights = {}
    for placed in tensors(model):
        if placed.foreign not in files:
            continue  # a buffer, which has no gradient
        given = files[placed.foreign]
        if placed.order is not None:
            given = given.index_select(placed.order.dim, torch.tensor(placed.order.places))
        whole = ours.setdefault(placed.name, given.new_zeros(placed.box.whole))
        whole[tuple(slice(a, a + n) for a, n in zip(placed.box.start, placed.box.shape, strict=True))] = given
    return ours


def unstacked(theirs: Weights) -> Weights:
    """As the published files have them: an expert has tensors of its own, and Mixtral's other names."""
    mixtral = not any(
        key.startswith(("model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.kv_a")) for key in theirs
    )
    files: Weights = {}
    for key, tensor in theirs.items():
        layer, found, last = key.partition(".mlp.")
        block = f"{layer}.block_sparse_moe" if mixtral else f"{layer}.mlp"
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        if last == "experts.gate_up_proj":  # [E, gates then ups, D]
            for expert, both in enumerate(tensor):
                (
                    files[f"{block}.experts.{expert}.{gate}.weight"],
                    files[f"{block}.experts.{expert}.{up}.weight"],
                ) = both.chunk(2)
        elif last == "experts.down_proj":
            files |= {f"{block}.experts.{expert}.{down}.weight": one for expert, one in enumerate(tensor)}
        else:
            files[f"{block}.{last}" if found else key] = tensor
    return files
