"""The fields of `ModelConfig` by family of published models, from the family's `config.json`.

Sources: the configuration and modeling files of `transformers` 5. `tests/configs/test_hugging_face.py` compares every
count of parameters with that of the family's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from configs.errors import UserError
from configs.hugging_face.file import ConfigFile, Tree
from configs.model import has_experts

ARCHITECTURES = {
    "MixtralForCausalLM": "mixtral", "OlmoeForCausalLM": "olmoe", "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe", "DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3",
    "GptOssForCausalLM": "gpt_oss", "Llama4ForConditionalGeneration": "llama4", "Llama4ForCausalLM": "llama4",
    "PhimoeForCausalLM": "phimoe", "PhiMoEForCausalLM": "phimoe", "MistralForCausalLM": "mistral",
    "Mistral3ForConditionalGeneration": "mistral", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3", "Glm4MoeForCausalLM": "glm4_moe", "GraniteMoeForCausalLM": "granitemoe",
}  # fmt: skip
"""Class that a file names under `architectures` -> its `model_type`."""
ALIASES = {"llama4_text": "llama4", "mistral3": "mistral"}

_LATENT = {"q_lora_rank": 1536}
DEFAULTS: dict[str, Tree] = {
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "olmoe": {"rms_norm_eps": 1e-5},
    "qwen2_moe": {"num_key_value_heads": 16},
    "qwen3_moe": {"num_key_value_heads": 4},
    "deepseek_v2": _LATENT | {"n_shared_experts": 2},
    "deepseek_v3": _LATENT | {"n_shared_experts": 1, "n_group": 8, "topk_group": 4},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "rms_norm_eps": 1e-5, "rope_theta": 1.5e5},
    "llama4": {"num_key_value_heads": 8, "head_dim": 128, "attention_chunk_size": 8192, "attn_temperature_tuning": True,
               "rms_norm_eps": 1e-5, "rope_theta": 5e5},
    "phimoe": {"num_key_value_heads": 8, "router_jitter_noise": 0.01, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "glm4_moe": {"num_key_value_heads": 8, "n_shared_experts": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5},
}  # fmt: skip
"""What the families' own classes have for keys that a file leaves out, where it isn't what most of them have."""


def common(config: ConfigFile, name: str) -> Tree:
    """The fields that all families spell alike.

    Raises:
        UserError: where a size is missing or isn't a whole number.
    """
    config.only("hidden_act", "silu", "swish")
    if config.get("quantization_config"):
        config.differs("quantization_config", "weights in `train.precision`")
    heads, hidden = config.whole("num_attention_heads"), config.whole("hidden_size")
    theta, yarn = _rope(config)
    return {
        "name": name, "layers": config.layers(), "hidden": hidden, "heads": heads,
        "kv_heads": config.whole("num_key_value_heads", default=heads), "vocab": config.whole("vocab_size"),
        "head_dim": config.whole("head_dim", default=hidden // max(heads, 1)), "rope_theta": theta, "yarn": yarn,
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "init_std": config.number("initializer_range", 0.02),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }  # fmt: skip


_ROPE = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
"""Keys of `rope_parameters` that any kind of them has."""


def _rope(config: ConfigFile) -> tuple[float, Tree]:
    new, old = config.part("rope_parameters"), config.part("rope_scaling")
    theta = new.number("rope_theta", 0.0) or config.number("rope_theta", 1e4)
    config.get("rope_theta")
    rope = new if new.tree else old
    scaling = rope.tree
    if "partial_rotary_factor" in scaling and "partial_rotary_factor" not in config.defaults:
        config.differs(f"partial_rotary_factor={scaling['partial_rotary_factor']}", "whole heads are rotated")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", None):
        if more := {key: value for key, value in scaling.items() if key not in _ROPE}:
            config.differs(
                f"rope_parameters: {', '.join(f'{k}={v}' for k, v in more.items())}", "the default"
            )
        return theta, {}
    same = scaling.get("mscale", 1.0) == scaling.get("mscale_all_dim", 1.0) == 1.0
    plain = kind == "yarn" and scaling.get("attention_factor") is None and scaling.get("truncate", True)
    if not plain or not same:
        shown = ", ".join(f"{k}={v}" for k, v in scaling.items() if not isinstance(v, list))
        config.differs(f"rope_parameters: {shown}", "the default or plain yarn")
    if kind != "yarn":
        return theta, {}
    return theta, {
        "factor": rope.number("factor"),
        "original": rope.whole("original_max_position_embeddings", default=0)
        or config.whole("max_position_embeddings"),
        "beta_fast": rope.number("beta_fast", 0.0) or 32.0,
        "beta_slow": rope.number("beta_slow", 0.0) or 1.0,
    }


def _experts(config: ConfigFile) -> Tree:
    top_k = config.whole("num_experts_per_tok")
    return {"experts": config.whole("num_local_experts", "num_experts"), "top_k": top_k}


def _softmax(config: ConfigFile, top_k: int, coefficient: float, renormalize: bool) -> Tree:
    """A router that an auxiliary loss balances. Its shares sum to `top_k`, and layers are pooled."""
    weight = config.number("router_aux_loss_coef", coefficient) * top_k
    return {
        "balance": "aux", "aux_coefficient": weight, "losses_over_layers": "mean", "renormalize": renormalize,
    }  # fmt: skip


def _placed(config: ConfigFile, moe: list[int], width: str, settings: str, likely: tuple[int, int]) -> Tree:
    """The fields that give experts to the layers `moe`, and to no others.

    Args:
        width: key of the dense layers' inner width.
        settings: of the file, as a refusal names them.
        likely: `dense_layers` and `moe_every`, tried first.

    Raises:
        UserError: where no leading dense layers and period give just these.
    """
    layers = config.layers()
    dense_width = config.whole(width, default=0 if len(moe) == layers else None)
    if not moe:
        return {"dense_layers": layers, "dense_width": dense_width}
    period = moe[1] - moe[0] if len(moe) > 1 else moe[0] + 1
    for leading, every in (likely, (moe[0], 1), (max(0, moe[0] - period + 1), period)):
        if moe == [layer for layer in range(layers) if has_experts(layer, leading, every)]:
            used = dense_width if len(moe) < layers else 0
            return {"dense_layers": leading, "moe_every": every, "dense_width": used}
    shown = ", ".join(map(str, moe[:6])) + (", …" if len(moe) > 6 else "")
    raise UserError(
        f"{config.where}: {settings} gives experts to layers {shown} of {layers}, counted from 0; known are leading dense "
        "layers (model.dense_layers), and then experts in each layer whose number, counted from 1, is a multiple of "
        "model.moe_every"
    )


def _qwen_places(config: ConfigFile) -> Tree:
    """`mlp_only_layers` are dense, and so are those that `decoder_sparse_step` passes over."""
    dense, step = config.numbers("mlp_only_layers") or [], config.period("decoder_sparse_step")
    layers = range(config.layers())
    moe = [layer for layer in layers if layer not in dense and has_experts(layer, 0, step)]
    leading = next((layer for layer in layers if layer not in dense), len(layers))
    settings = f"decoder_sparse_step={step} with mlp_only_layers={dense}"
    return _placed(config, moe, "intermediate_size", settings, (leading, step))


def _biases(config: ConfigFile, default: bool = False) -> None:
    """Note biases in the attention; `default`: whether the family has them where the file doesn't say."""
    if config.get("attention_bias", default):
        config.differs("attention_bias=True", "False")


def _mixtral(config: ConfigFile) -> Tree:
    _biases(config)
    config.only("router_jitter_noise", 0.0)
    own = _experts(config)
    router = _softmax(config, own["top_k"], 0.001, True)
    return own | {
        "expert_width": config.whole("intermediate_size"), "window": config.whole("sliding_window", default=0),
        "router": router,
    }  # fmt: skip


def _olmoe(config: ConfigFile) -> Tree:
    _biases(config)
    config.only("clip_qkv", None, here="no clipping")
    own = _experts(config)
    router = {
        # OLMoE's own training code: shares that sum to 1, and a z-loss.
        "balance": "aux", "aux_coefficient": config.number("router_aux_loss_coef", 0.01),
        "z_coefficient": 0.001 / max(own["top_k"], 1), "losses_over_layers": "mean",
        "renormalize": bool(config.get("norm_topk_prob", False)),
    }  # fmt: skip
    return own | {
        "expert_width": config.whole("intermediate_size"),
        "qk_norm": "projection",
        "router": router,
    }


def _qwen_window(config: ConfigFile) -> None:
    config.only("use_sliding_window", False, here="full attention")
    config.get("sliding_window")


def _qwen2_moe(config: ConfigFile) -> Tree:
    _qwen_window(config)
    own = _experts(config)
    if config.get("qkv_bias", True):
        config.differs("qkv_bias=True", "no biases")
    shared = config.whole("shared_expert_intermediate_size", default=5632)
    config.differs("shared_expert_gate", "the shared expert's output is added whole")
    router = _softmax(config, own["top_k"], 0.001, bool(config.get("norm_topk_prob", False)))
    width = config.whole("moe_intermediate_size")
    return own | _qwen_places(config) | {"expert_width": width, "shared_width": shared, "router": router}


def _qwen3_moe(config: ConfigFile) -> Tree:
    _biases(config)
    _qwen_window(config)
    own = _experts(config)
    router = _softmax(config, own["top_k"], 0.001, bool(config.get("norm_topk_prob", False)))
    width = config.whole("moe_intermediate_size")
    return own | _qwen_places(config) | {"expert_width": width, "qk_norm": "head", "router": router}


def _latent(config: ConfigFile, dense: int) -> Tree:
    """What DeepSeek-V2 and V3 share: latent attention, leading dense layers, shared experts.

    Their own code reads `moe_layer_freq`, and counts layers from 0; that of `transformers` doesn't read it.
    """
    _biases(config)
    config.only("mlp_bias", False, None)
    plain, value = config.whole("qk_nope_head_dim", default=128), config.whole("v_head_dim", default=128)
    if value != plain:
        raise UserError(
            f"{config.where}: v_head_dim={value} isn't known here, {plain} is: model.head_dim is both the width of values "
            "and that of qk_nope_head_dim"
        )
    return _shared_experts(config, dense) | {
        "head_dim": plain, "attention": "mla",
        "q_lora_rank": config.whole("q_lora_rank", default=0), "kv_lora_rank": config.whole("kv_lora_rank"),
        "rope_head_dim": config.whole("qk_rope_head_dim", default=64),
    }  # fmt: skip


def _shared_experts(config: ConfigFile, dense: int) -> Tree:
    """Leading dense layers, then routed and shared experts of one width."""
    width = config.whole("moe_intermediate_size")
    leading, step = config.whole("first_k_dense_replace", default=dense), config.period("moe_layer_freq")
    layers = range(config.layers())
    moe = [layer for layer in layers if layer >= leading and layer % step == 0]
    settings = f"first_k_dense_replace={leading} with moe_layer_freq={step}"
    return _placed(config, moe, "intermediate_size", settings, (leading, 1)) | {
        "experts": config.whole("n_routed_experts", "num_local_experts"), "expert_width": width,
        "top_k": config.whole("num_experts_per_tok"), "shared_width": width * config.whole("n_shared_experts", default=0),
    }  # fmt: skip


def _deepseek_v2(config: ConfigFile) -> Tree:
    groups = config.whole("n_group", default=1)
    config.only("scoring_func", "softmax")
    config.only(
        "topk_method", "greedy", here="groups are ranked by their best two experts"
    ) if groups > 1 else None
    config.get("topk_method")
    router = {
        "groups": groups, "top_groups": config.whole("topk_group", default=1), "balance": "aux",
        "scale": config.number("routed_scaling_factor", 1.0), "aux_coefficient": config.number("aux_loss_alpha", 0.001),
        "renormalize": bool(config.get("norm_topk_prob", False)),
    }  # fmt: skip
    return _latent(config, 0) | {"router": router}


def _sigmoid(config: ConfigFile, scale: float) -> Tree:
    """DeepSeek-V3's router: sigmoid scores, balanced by a bias, in groups."""
    config.only("scoring_func", "sigmoid")
    config.only("topk_method", "noaux_tc")
    return {
        "score": "sigmoid", "groups": config.whole("n_group", default=1),
        "top_groups": config.whole("topk_group", default=1), "scale": config.number("routed_scaling_factor", scale),
        "balance": "both", "aux_coefficient": 1e-4,
        "renormalize": bool(config.get("norm_topk_prob", True)), "bias_update_rate": 1e-3,
    }  # fmt: skip


def _deepseek_v3(config: ConfigFile) -> Tree:
    return _latent(config, 3) | {"router": _sigmoid(config, 2.5)}


def _glm4_moe(config: ConfigFile) -> Tree:
    _biases(config)
    rotated = config.part("rope_parameters").number("partial_rotary_factor", 0.0)
    fraction = rotated or config.number("partial_rotary_factor", 1.0)
    return _shared_experts(config, 1) | {
        "qk_norm": "head" if config.get("use_qk_norm", False) else "none", "rope_fraction": fraction,
        "router": _sigmoid(config, 1.0),
    }  # fmt: skip


def _granitemoe(config: ConfigFile) -> Tree:
    _biases(config)
    heads, hidden = config.whole("num_attention_heads"), config.whole("hidden_size")
    usual = max(hidden // max(heads, 1), 1) ** -0.5  # no width is refused with the model
    factor = config.number("attention_multiplier", 1.0)
    if abs(factor - usual) > 1e-9:
        config.differs(f"attention_multiplier={factor}", f"{usual:.6g}, one over the root of a head's width")
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        config.only(name, 1.0)
    own = _experts(config)
    router = _softmax(config, own["top_k"], 0.001, True)
    return own | {"expert_width": config.whole("intermediate_size"), "router": router}


def _gpt_oss(config: ConfigFile) -> Tree:
    _biases(config, default=True)
    config.differs("biases of router and experts", "no biases")
    config.differs("attention sinks", "none")
    limit = config.get("swiglu_limit", 7.0)
    config.differs(f"SwiGLU with swiglu_limit={limit}", "SwiGLU without a limit")
    config.get("swiglu_alpha")
    window = config.whole("sliding_window", default=0)
    if window:
        config.differs(f"sliding_window={window} in every second layer", "full attention in all")
    own = _experts(config)
    router = _softmax(config, own["top_k"], 0.001, True)
    return own | {"expert_width": config.whole("intermediate_size"), "router": router}


def _llama4(config: ConfigFile) -> Tree:
    _biases(config)
    config.differs("sigmoid weights on the experts' inputs", "on their outputs")
    if config.get("use_qk_norm", True):
        config.differs("use_qk_norm=True, a norm without weights after the rotation", "none")
    # An empty list, as the published files have it, stands for every fourth layer.
    if not all(config.numbers("no_rope_layers") or [0]):
        config.differs("no_rope_layers", "rotary positions in every layer")
    if chunk := config.get("attention_chunk_size"):
        config.differs(f"attention_chunk_size={chunk}", "full attention")
    config.only("attn_temperature_tuning", False, None)
    config.only("router_jitter_noise", 0.0)
    own, width = _experts(config), config.whole("intermediate_size")
    router = _softmax(config, own["top_k"], 0.001, False) | {"score": "sigmoid"}
    return own | _llama4_places(config) | {"expert_width": width, "shared_width": width, "router": router}


def _llama4_places(config: ConfigFile) -> Tree:
    """`moe_layers` names them; where it is missing, every `interleave_moe_layer_step`-th layer has experts."""
    step, named = config.period("interleave_moe_layer_step"), config.numbers("moe_layers")
    layers = range(config.layers())
    if named is None:
        moe, settings = (
            [layer for layer in layers if has_experts(layer, 0, step)],
            f"interleave_moe_layer_step={step}",
        )
    else:
        moe, settings = [layer for layer in layers if layer in named], f"moe_layers={named}"
    return _placed(config, moe, "intermediate_size_mlp", settings, (0, step))


def _phimoe(config: ConfigFile) -> Tree:
    _biases(config)
    config.only("lm_head_bias", False, here="no biases")
    config.only("input_jitter_noise", 0.0)
    config.only("router_jitter_noise", 0.0)
    config.differs("LayerNorm with biases", "RMSNorm")
    config.differs("SparseMixer routing", "weights are the scores of the chosen experts")
    own = _experts(config)
    router = _softmax(config, own["top_k"], 0.001, False)
    return own | {
        "expert_width": config.whole("intermediate_size"), "window": config.whole("sliding_window", default=0),
        "router": router,
    }  # fmt: skip


def _dense(config: ConfigFile, **more: Any) -> Tree:
    """A model without experts: every layer is one of the leading dense ones."""
    layers, width = config.layers(), config.whole("intermediate_size")
    return {
        "experts": 1, "top_k": 1, "expert_width": width, "dense_layers": layers, "dense_width": width,
        "router": {"balance": "none"}, **more,
    }  # fmt: skip


def _llama(config: ConfigFile) -> Tree:
    _biases(config)
    config.only("mlp_bias", False, None, here="no biases")
    return _dense(config)


def _mistral(config: ConfigFile) -> Tree:
    _biases(config)
    return _dense(config, window=config.whole("sliding_window", default=0))


def _qwen2(config: ConfigFile) -> Tree:
    _qwen_window(config)
    config.differs("biases of query, key and value", "no biases")
    return _dense(config)


def _qwen3(config: ConfigFile) -> Tree:
    _biases(config)
    _qwen_window(config)
    return _dense(config, qk_norm="head")


READERS: dict[str, Callable[[ConfigFile], Tree]] = {
    "mixtral": _mixtral, "olmoe": _olmoe, "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe, "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3, "gpt_oss": _gpt_oss, "llama4": _llama4, "phimoe": _phimoe, "mistral": _mistral,
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "glm4_moe": _glm4_moe, "granitemoe": _granitemoe,
}  # fmt: skip
