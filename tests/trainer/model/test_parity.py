"""The published models' own code (`transformers`) as the truth: same weights, same logits, same gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor, nn

from configs.model import ModelConfig, RouterConfig
from tests.trainer import stages
from tests.trainer.model import hugging_face
from tests.trainer.model.hugging_face import VOCAB, Family, Weights, randomize, renamed, shape
from tests.trainer.reference import gradients, parameter_shapes
from tests.trainer.reference.loss import sample_losses

pytestmark = pytest.mark.dist

SAMPLES, SEQUENCE = 2, 24
LOGITS, GRADIENTS = 1e-5, 1e-4


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

    return Family(ours, build)


def _rename_zaya(model: ModelConfig, them: Weights) -> Weights:
    layers, queries = model.layers, model.heads * model.head_dim
    ours = {
        "embedding.weight": them["model.embed_tokens.weight"],
        "final_norm.weight": them["model.norm.weight"],
    }
    for part in ("scale", "bias"):
        ours[f"input_scaling.{part}"] = them[f"model.input_hidden_states_{part}"]
    for layer in range(layers):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        ours[f"{here}.attention_norm.weight"] = them[f"{there}.input_layernorm.weight"]
        ours[f"{here}.feed_norm.weight"] = them[f"{there}.post_attention_layernorm.weight"]
        ours[f"{here}.attention.output.weight"] = them[f"{there}.self_attn.o_proj.weight"]
        both = them[f"{there}.mlp.experts.gate_up_proj"]  # [E, gates then ups, D]
        ours[f"{here}.feed.experts.gate_up"] = both.view(model.experts, 2, model.expert_width, model.hidden)
        ours[f"{here}.feed.experts.down"] = them[f"{there}.mlp.experts.down_proj"]
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


FAMILIES: dict[str, Callable[[], Family]] = {**hugging_face.FAMILIES, "zaya1": zaya}


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
    randomize(theirs)
    if name == "zaya1":
        with torch.no_grad():
            for key, tensor in theirs.named_buffers():
                if key.endswith("balancing_biases"):
                    tensor[-1] = -9.0  # of the class that skips the experts
    theirs.to(dtype)
    tokens = torch.randint(0, VOCAB, (SAMPLES, SEQUENCE + 1))
    logits = theirs(input_ids=tokens[:, :-1], use_cache=False).logits
    log_shares = logits.double().log_softmax(-1)
    loss = -log_shares.gather(-1, tokens[:, 1:, None]).mean()
    loss.backward()
    state = {key: tensor.detach() for key, tensor in (*theirs.named_parameters(), *theirs.named_buffers())}
    grads = {key: tensor.grad for key, tensor in theirs.named_parameters() if tensor.grad is not None}
    rename = _rename_zaya if name == "zaya1" else renamed
    return Published(
        family.ours, rename(family.ours, state), tokens, logits.detach(), rename(family.ours, grads)
    )


def assert_gradients(found: Weights, expected: Weights, limit: float) -> None:
    """Each within `limit` of the largest element of the tensor."""
    assert sorted(found) == sorted(expected)
    errors = {
        name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-9)).item()
        for name in expected
    }
    off = {name: error for name, error in errors.items() if not error < limit}  # what isn't a number, too
    assert not off, f"gradients are off: {off}; all: {errors}"


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
