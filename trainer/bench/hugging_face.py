"""The same shape as Hugging Face's `transformers` has it: its model code, fused attention, experts by grouped matmul."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from configs.model import ModelConfig
from trainer.bench.baselines import renormalizes


def build(model: ModelConfig, device: torch.device) -> nn.Module:
    """A model with random weights in bf16 on a GPU, in fp32 on a CPU; of those that `trainer.bench.baselines` lets pass.

    Raises:
        UserError: where `transformers` isn't installed or has no such architecture.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            "--baselines hf needs transformers; type pip install transformers, or leave it out"
        ) from None
    shape: dict[str, Any] = {
        "vocab_size": model.vocab, "hidden_size": model.hidden, "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "rms_norm_eps": model.norm_eps,
        "num_experts_per_tok": model.top_k, "attn_implementation": "sdpa", "use_cache": False,
        "experts_implementation": "grouped_mm" if device.type == "cuda" else "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings, "max_position_embeddings": 1 << 17, "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config: Any
    kind: Any
    if model.qk_norm == "projection":
        config = transformers.OlmoeConfig(
            **shape, intermediate_size=model.expert_width, num_experts=model.experts,
            norm_topk_prob=renormalizes(model),
        )  # fmt: skip
        kind = transformers.OlmoeForCausalLM
    elif model.qk_norm == "head":
        config = transformers.Qwen3MoeConfig(
            **shape | {"head_dim": model.head_dim}, moe_intermediate_size=model.expert_width, num_experts=model.experts,
            norm_topk_prob=renormalizes(model),
        )  # fmt: skip
        kind = transformers.Qwen3MoeForCausalLM
    else:
        config = transformers.MixtralConfig(
            **shape, intermediate_size=model.expert_width, num_local_experts=model.experts, head_dim=model.head_dim,
            sliding_window=None,
        )  # fmt: skip
        kind = transformers.MixtralForCausalLM
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            made = kind(config)
    finally:
        torch.set_default_dtype(before)
    return made.train()


def routers(theirs: nn.Module, model: ModelConfig) -> list[nn.Module]:
    """The routers of `build`'s model by layer, for `trainer.bench.routing`.

    Raises:
        UserError: where this release of `transformers` has others.
    """
    gates = [module for module in theirs.modules() if type(module).__name__.endswith("TopKRouter")]
    if len(gates) != model.layers:
        raise UserError(
            f"--baselines hf: this release of transformers has {len(gates)} routers that can be forced, in {model.layers} "
            "layers; type --routing real, or leave hf out"
        )
    return gates
