"""The published models' own code (`transformers`) as the truth: same weights, same logits, same gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor, nn

from configs.model import ModelConfig, RouterConfig, YarnConfig
from tests.trainer import stages
from tests.trainer.reference import gradients, parameter_shapes
from tests.trainer.reference.loss import sample_losses

pytestmark = pytest.mark.dist

SAMPLES, SEQUENCE, VOCAB = 2, 24, 96
LOGITS, GRADIENTS = 1e-5, 1e-4

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A published architecture at a small size."""

    ours: ModelConfig
    build: Callable[[], nn.Module]
    rename: Callable[[Weights], Weights]
    """Tensors by their name to tensors by ours. Only moves elements, so it maps gradients as well as values."""


def common(theirs: Weights, layers: int) -> Weights:
    """What all families name alike."""
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "final_norm.weight": theirs["model.norm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    for layer in range(layers):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        ours[f"{here}.attention_norm.weight"] = theirs[f"{there}.input_layernorm.weight"]
        ours[f"{here}.feed_norm.weight"] = theirs[f"{there}.post_attention_layernorm.weight"]
        for mine, his in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj"),
                          ("query_norm", "q_norm"), ("key_norm", "k_norm")):  # fmt: skip
            if f"{there}.self_attn.{his}.weight" in theirs:
                ours[f"{here}.attention.{mine}.weight"] = theirs[f"{there}.self_attn.{his}.weight"]
        if f"{there}.mlp.experts.gate_up_proj" in theirs:
            both = theirs[f"{there}.mlp.experts.gate_up_proj"]  # [E, gates then ups, D]
            experts, rows, width = both.shape
            ours[f"{here}.feed.experts.gate_up"] = both.view(experts, 2, rows // 2, width)
            ours[f"{here}.feed.experts.down"] = theirs[f"{there}.mlp.experts.down_proj"]
        if f"{there}.mlp.gate.weight" in theirs:
            ours[f"{here}.feed.router.linear.weight"] = theirs[f"{there}.mlp.gate.weight"]
    return ours


def plain(layers: int) -> Callable[[Weights], Weights]:
    return lambda theirs: common(theirs, layers)


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
    return Family(ours, lambda: transformers.MixtralForCausalLM(theirs), plain(2))


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
    return Family(ours, lambda: transformers.OlmoeForCausalLM(theirs), plain(2))


def qwen3() -> Family:
    ours = ModelConfig(
        name="qwen3", layers=2, hidden=32, heads=4, kv_heads=2, head_dim=16, vocab=VOCAB, experts=8, top_k=2,
        expert_width=24, qk_norm="head", rope_theta=1e6, norm_eps=1e-6, router=RouterConfig(balance="none"),
    )  # fmt: skip
    theirs = transformers.Qwen3MoeConfig(
        **shape(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )  # fmt: skip
    return Family(ours, lambda: transformers.Qwen3MoeForCausalLM(theirs), plain(2))


def qwen3_yarn() -> Family:
    """YaRN as the paper has it, on cosine and sine."""
    base = qwen3()
    ours = base.ours.model_copy(update={"yarn": YarnConfig(factor=4, original=8), "rope_theta": 500.0})
    made = base.build()
    made.config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8,
    }  # fmt: skip
    return Family(ours, lambda: transformers.Qwen3MoeForCausalLM(made.config), base.rename)


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
    # DeepSeek rotates channels 2j and 2j+1 together, we j and j + R/2: the rotary rows of its weights change places.
    halves = [*range(0, rotary, 2), *range(1, rotary, 2)]
    of_head = [*range(plain_width), *(plain_width + row for row in halves)]
    query_rows = [head * (plain_width + rotary) + row for head in range(heads) for row in of_head]
    down_rows = [*range(rank), *(rank + row for row in halves)]

    def rename(them: Weights) -> Weights:
        ours = common(them, 3)
        for layer in range(3):
            here, there = f"blocks.{layer}.attention", f"model.layers.{layer}.self_attn"
            if compressed:
                ours[f"{here}.query_down.weight"] = them[f"{there}.q_a_proj.weight"]
                ours[f"{here}.query_down_norm.weight"] = them[f"{there}.q_a_layernorm.weight"]
                ours[f"{here}.query_up.weight"] = them[f"{there}.q_b_proj.weight"][query_rows]
            else:
                ours[f"{here}.query.weight"] = them[f"{there}.q_proj.weight"][query_rows]
            ours[f"{here}.key_value_down.weight"] = them[f"{there}.kv_a_proj_with_mqa.weight"][down_rows]
            ours[f"{here}.key_value_norm.weight"] = them[f"{there}.kv_a_layernorm.weight"]
            ours[f"{here}.key_value_up.weight"] = them[f"{there}.kv_b_proj.weight"]
            feed, mlp = f"blocks.{layer}.feed", f"model.layers.{layer}.mlp"
            dense = (feed, mlp) if layer == 0 else (f"{feed}.shared", f"{mlp}.shared_experts")
            for part in ("gate", "up", "down"):
                ours[f"{dense[0]}.{part}.weight"] = them[f"{dense[1]}.{part}_proj.weight"]
            if f"{mlp}.gate.e_score_correction_bias" in them:
                ours[f"{feed}.router.bias"] = them[f"{mlp}.gate.e_score_correction_bias"]
        return ours

    return Family(ours, lambda: transformers.DeepseekV3ForCausalLM(theirs), rename)


def zaya() -> Family:
    """ZAYA1 but for its router's class that skips the experts, which ours hasn't: that logit is made minus infinity."""
    layers = 3
    ours = ModelConfig(
        name="zaya", layers=layers, hidden=32, heads=4, kv_heads=2, head_dim=8, vocab=VOCAB, experts=4, top_k=1,
        expert_width=24, attention="cca", rope_theta=500.0, rope_fraction=0.5, tie_embeddings=True, residual_scaling=True,
        router=RouterConfig(kind="mlp", hidden=12, renormalize=False, balance="bias", bias_rule="load_error"),
    )  # fmt: skip
    theirs = transformers.ZayaConfig(
        **shape(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            moe_intermediate_size=24, num_experts=4, num_experts_per_tok=1, router_hidden_size=12, rms_norm_eps=1e-5,
            rope_parameters={"hybrid": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
            eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip

    def never_skip(_module: nn.Module, _inputs: object, logits: Tensor) -> Tensor:
        return torch.cat([logits[..., :-1], torch.full_like(logits[..., -1:], -1e9)], dim=-1)

    def build() -> nn.Module:
        made = transformers.ZayaForCausalLM(theirs)
        for layer in made.model.layers:
            layer.mlp.gate.router_mlp.out_proj.register_forward_hook(never_skip)
        return made

    return Family(ours, build, lambda them: _rename_zaya(them, layers, queries=4 * 8))


def _rename_zaya(them: Weights, layers: int, queries: int) -> Weights:
    ours = common({"lm_head.weight": torch.empty(0), **them}, layers)
    del ours["head.weight"]
    for part in ("scale", "bias"):
        ours[f"input_scaling.{part}"] = them[f"model.input_hidden_states_{part}"]
    for layer in range(layers):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        projection = f"{there}.self_attn.qkv_proj"
        for mine, his in (("query", "q_proj"), ("key", "k_proj")):
            ours[f"{here}.attention.{mine}.weight"] = them[f"{projection}.{his}.weight"]
        values = [them[f"{projection}.v_proj_{which}.weight"] for which in ("current", "delayed")]
        ours[f"{here}.attention.value.weight"] = torch.cat(values)
        for part in ("weight", "bias"):
            # Queries and keys lie in one convolution there. Its channel kernels have a dim for the single input channel.
            for mine, his in (("conv", "depthwise"), ("mix", "grouped")):
                both = them[f"{projection}.conv_qk_{his}.{part}"]
                both = both.squeeze(1) if (mine, part) == ("conv", "weight") else both
                ours[f"{here}.attention.query_{mine}.{part}"] = both[:queries]
                ours[f"{here}.attention.key_{mine}.{part}"] = both[queries:]
            for mine, his in (
                ("compress", "down_proj"),
                ("first", "router_mlp.fc1"),
                ("second", "router_mlp.fc2"),
            ):
                ours[f"{here}.feed.router.{mine}.{part}"] = them[f"{there}.mlp.gate.{his}.{part}"]
        ours[f"{here}.attention.key_scale"] = them[f"{there}.self_attn.qk_norm.temp"]
        for mine, his in (("attention", "post_attention"), ("feed", "post_mlp")):
            for part in ("scale", "bias"):
                scaling = f"{there}.{his}_residual_scale"
                ours[f"{here}.{mine}_residual.stream.{part}"] = them[f"{scaling}.residual_{part}"]
                ours[f"{here}.{mine}_residual.output.{part}"] = them[f"{scaling}.hidden_states_{part}"]
        ours[f"{here}.feed.router.norm.weight"] = them[f"{there}.mlp.gate.router_mlp.norm.weight"]
        ours[f"{here}.feed.router.last.weight"] = them[f"{there}.mlp.gate.router_mlp.out_proj.weight"][:-1]
        if layer:
            ours[f"{here}.feed.router.state_scale"] = them[f"{there}.mlp.gate.router_states_scale"]
        if f"{there}.mlp.gate.balancing_biases" in them:
            ours[f"{here}.feed.router.bias"] = them[f"{there}.mlp.gate.balancing_biases"][:-1]
    return ours


FAMILIES: dict[str, Callable[[], Family]] = {
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen3": qwen3,
    "qwen3-yarn": qwen3_yarn,
    "deepseek-v3": deepseek,
    "deepseek-v3-yarn": lambda: deepseek(yarn=True),
    "deepseek-v3-query-whole": lambda: deepseek(compressed=False),
    "zaya1": zaya,
}


@dataclass(frozen=True)
class Published:
    """What a family's own code computes, under our names."""

    model: ModelConfig
    state: Weights
    tokens: Tensor
    """[samples, sequence + 1]"""
    logits: Tensor
    gradients: Weights


def publish(name: str, dtype: torch.dtype) -> Published:
    """Random weights in a family's own model, and its answers in `dtype`."""
    family = FAMILIES[name]()
    torch.manual_seed(5)
    theirs = family.build()
    with torch.no_grad():
        for key, tensor in (*theirs.named_parameters(), *theirs.named_buffers()):
            if "inv_freq" in key:
                continue
            is_bias = "bias" in key.rsplit(".", 1)[-1]
            # Norms, scales and temperatures about 1; the rest so that every part carries weight and softmax isn't flat.
            spread = 0.2 if tensor.ndim == 1 else 0.8 if "embed" in key else 1.2 / math.sqrt(tensor.shape[-1])
            tensor.copy_(
                torch.randn(tensor.shape) * spread + (1.0 if tensor.ndim == 1 and not is_bias else 0.0)
            )
            if key.endswith("balancing_biases"):
                tensor[-1] = -9.0  # of the class that skips the experts
    theirs.to(dtype)
    tokens = torch.randint(0, VOCAB, (SAMPLES, SEQUENCE + 1))
    logits = theirs(input_ids=tokens[:, :-1], use_cache=False).logits
    log_shares = logits.double().log_softmax(-1)
    loss = -log_shares.gather(-1, tokens[:, 1:, None]).mean()
    loss.backward()
    state = {key: tensor.detach() for key, tensor in (*theirs.named_parameters(), *theirs.named_buffers())}
    slopes = {key: tensor.grad for key, tensor in theirs.named_parameters() if tensor.grad is not None}
    return Published(family.ours, family.rename(state), tokens, logits.detach(), family.rename(slopes))


def assert_gradients(found: Weights, expected: Weights, limit: float) -> None:
    """Each within `limit` of the largest element of the tensor."""
    assert sorted(found) == sorted(expected)
    errors = {
        name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-9)).item()
        for name in expected
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < limit, f"{worst} is off by {errors[worst]:.1e}; all: {errors}"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_agrees_with_the_published_model(name: str) -> None:
    published = publish(name, torch.float64)
    # transformers keeps rotary angles, and parts of its routers and norms, in fp32 whatever the model's type.
    state = {key: tensor.double() for key, tensor in published.state.items()}
    assert {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("router.bias")} == (
        parameter_shapes(published.model)
    )
    logits = torch.stack(
        [sample_losses(published.model, state, sample, None).logits for sample in published.tokens.tolist()]
    )
    torch.testing.assert_close(logits, published.logits.double(), rtol=LOGITS, atol=LOGITS)
    step = gradients(published.model, state, published.tokens.tolist())
    assert_gradients(step.gradients, {k: g.double() for k, g in published.gradients.items()}, GRADIENTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_agrees_with_the_published_model(name: str) -> None:
    published = publish(name, torch.float32)
    stage = stages.whole(published.model, published.state)
    logits = stages.logits(stage, published.tokens)
    torch.testing.assert_close(logits, published.logits, rtol=LOGITS, atol=LOGITS)
    stages.learn(stage, published.tokens)
    assert_gradients(stages.gradients(stage), published.gradients, GRADIENTS)
