"""A model's shape as `config.json` has it, both ways, for the families whose tensors are known.

Whatever changes what the model computes and has no counterpart on the other side is refused by its name.
"""

from __future__ import annotations

from typing import Any, Literal

from configs.errors import UserError
from configs.hugging_face.read import read
from configs.model import ModelConfig

Family = Literal["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"]
ARCHITECTURES: dict[str, Family] = {
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}
_NAMES = {"mixtral": "Mixtral", "olmoe": "OLMoE", "qwen3_moe": "Qwen3-MoE", "deepseek_v3": "DeepSeek-V3"}
_ALL: dict[str, tuple[Any, ...]] = {
    "gated": (True,), "parallel_block": (False,), "residual_scaling": (False,), "rope_fraction": (1.0,),
    "router.kind": ("linear",), "router.capacity_factor": (None,),
}  # fmt: skip
_SOFTMAX: dict[str, tuple[Any, ...]] = {
    "shared_width": (0,), "mtp_layers": (0,), "router.score": ("softmax",), "router.scale": (1.0,),
    "router.groups": (1,), "router.balance": ("aux", "none"),
}  # fmt: skip
_NO_DENSE: dict[str, tuple[Any, ...]] = {"dense_layers": (0,), "moe_every": (1,)}
_HAS: dict[str, dict[str, tuple[Any, ...]]] = {
    "mixtral": _SOFTMAX | _NO_DENSE | {"qk_norm": ("none",), "router.renormalize": (True,)},
    "olmoe": _SOFTMAX | _NO_DENSE | {"qk_norm": ("projection",), "window": (0,)},
    "qwen3_moe": _SOFTMAX | {"qk_norm": ("head",), "window": (0,)},
    "deepseek_v3": {"router.score": ("sigmoid",), "window": (0,), "moe_every": (1,)},
}
"""By family: settings and the values that its files can express."""
_POSITIONS = 4096
"""Longest context that is written where none is known."""


def family_of(model: ModelConfig) -> Family:
    """The family whose code computes what this model does.

    Raises:
        UserError: where none does, naming the first setting in the way.
    """
    by_norm: dict[str, Family] = {"none": "mixtral", "projection": "olmoe", "head": "qwen3_moe"}
    if model.attention == "cca":
        raise _no(
            "attention", "cca", "none of " + ", ".join(_NAMES.values()) + " has compressed convolutions"
        )
    family: Family = "deepseek_v3" if model.attention == "mla" else by_norm[model.qk_norm]
    for field, allowed in (_ALL | _HAS[family]).items():
        value: Any = model
        for word in field.split("."):
            value = getattr(value, word)
        if value not in allowed:
            known = " or ".join(map(str, allowed))
            raise _no(field, value, f"{_NAMES[family]}, the family with its attention, has only {known}")
    if family == "mixtral" and model.top_k == 1:
        raise _no("top_k", 1, "Mixtral divides a token's weights by their sum, so its one expert weighs 1")
    if family == "olmoe" and model.heads * model.head_dim != model.hidden:
        raise _no("head_dim", model.head_dim, f"OLMoE's heads make up its width, {model.hidden}")
    if family == "deepseek_v3":
        if model.kv_heads != model.heads:
            raise _no("kv_heads", model.kv_heads, f"DeepSeek-V3 has one for each of {model.heads} heads")
        if not model.shared_width or model.shared_width % model.expert_width:
            why = f"DeepSeek-V3's is a multiple of its experts' {model.expert_width}"
            raise _no("shared_width", model.shared_width, why)
    return family


def _no(field: str, value: object, why: str) -> UserError:
    return UserError(
        f"model.{field}={value} can't be exported to Hugging Face: {why}; type --to dcp, which takes all of it"
    )


def config_of(model: ModelConfig, dtype: str, source: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of a model.

    Args:
        dtype: of the weights, as torch names it.
        source: what is known besides: `max_position_embeddings`, `bos_token_id`, `eos_token_id`, `pad_token_id`.

    Raises:
        UserError: as `family_of` does.
    """
    family = family_of(model)
    (architecture,) = (name for name, of in ARCHITECTURES.items() if of == family)
    yarn = model.yarn
    longest = round(yarn.factor * yarn.original) if yarn.factor > 1 else _POSITIONS
    return {
        "architectures": [architecture],
        "model_type": family,
        "dtype": dtype,
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": longest,
        "num_experts_per_tok": model.top_k,
        "rope_theta": model.rope_theta,
        "rope_parameters": _rope(model),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **_own(model, family),
        **source,
    }


def _rope(model: ModelConfig) -> dict[str, Any]:
    yarn = model.yarn
    if yarn.factor == 1:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    settings = {
        "rope_type": "yarn", "rope_theta": model.rope_theta, "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original, "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
    }  # fmt: skip
    # DeepSeek scales scores, and so whole heads, by the square; the others cosine and sine.
    return settings | ({"mscale": 1.0, "mscale_all_dim": 1.0} if model.attention == "mla" else {})


def _own(model: ModelConfig, family: Family) -> dict[str, Any]:
    """What a family has of its own."""
    router = model.router
    divided = router.renormalize and model.top_k > 1
    if family == "mixtral":
        return {
            "head_dim": model.head_dim, "intermediate_size": model.expert_width, "num_local_experts": model.experts,
            "sliding_window": model.window or None,
        }  # fmt: skip
    if family == "olmoe":
        return {
            "intermediate_size": model.expert_width, "num_experts": model.experts, "norm_topk_prob": divided,
            "clip_qkv": None,
        }  # fmt: skip
    if family == "qwen3_moe":
        return {
            "head_dim": model.head_dim, "moe_intermediate_size": model.expert_width, "num_experts": model.experts,
            "norm_topk_prob": divided, "intermediate_size": model.dense_width or model.expert_width,
            "decoder_sparse_step": model.moe_every, "mlp_only_layers": list(range(model.dense_layers)),
            "use_sliding_window": False, "sliding_window": None,
        }  # fmt: skip
    return {
        "kv_lora_rank": model.kv_lora_rank, "q_lora_rank": model.q_lora_rank or None,
        "qk_rope_head_dim": model.rope_head_dim, "qk_nope_head_dim": model.head_dim, "v_head_dim": model.head_dim,
        "moe_intermediate_size": model.expert_width, "n_routed_experts": model.experts,
        "n_shared_experts": model.shared_width // model.expert_width,
        "intermediate_size": model.dense_width or model.expert_width,
        "first_k_dense_replace": model.dense_layers, "moe_layer_freq": 1, "n_group": router.groups,
        "topk_group": router.top_groups, "routed_scaling_factor": router.scale, "norm_topk_prob": divided,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True,
        "num_nextn_predict_layers": model.mtp_layers,
    }  # fmt: skip


# ---- the other way ----


def family_in(tree: dict[str, Any], where: str) -> Family:
    """The family of a `config.json`.

    Raises:
        UserError: where it is none that is known.
    """
    names = tree.get("architectures") or []
    declared = names[0] if isinstance(names, list) and names else tree.get("model_type")
    for architecture, family in ARCHITECTURES.items():
        if declared in (architecture, family):
            return family
    known = ", ".join(ARCHITECTURES)
    raise UserError(f"{where}: architectures={declared!r} isn't known here; the known ones are {known}")


def model_in(tree: dict[str, Any], where: str, name: str, predictions: int = 0) -> ModelConfig:
    """The model of a `config.json` whose tensors can be imported: all that changes what it computes is known here.

    Args:
        where: its path, as messages name it.
        name: of the model.
        predictions: layers of multi-token prediction that its files hold.

    Raises:
        UserError: where a setting is missing or can't be expressed, by its name.
    """
    family_in(tree, where)
    if tree.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config is set, and quantised weights aren't read; convert them to bf16 first"
        )
    reading = read(tree, where, name, predictions)
    for left in reading.differences:
        raise UserError(f"{where}: {left.setting} isn't known here, {left.here} is; it can't be imported")
    family_of(reading.model)
    return reading.model
