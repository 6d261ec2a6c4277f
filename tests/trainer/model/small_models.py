"""Small models for tests of the model's parts, and what a test runs them with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from configs.model import ModelConfig, RouterConfig
from trainer.model.decoder import DecoderStage, inputs
from trainer.model.initial import build
from trainer.model.seams import MicroBatch, Tally

SHAPE: dict[str, Any] = {
    "name": "small", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 40, "experts": 8,
    "top_k": 2, "expert_width": 24, "init_std": 0.2,
}  # fmt: skip
#: A name for each kind of model, and what makes it one.
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "window": {"window": 3},
    "head_norm": {"qk_norm": "head"},
    "projection_norm": {"qk_norm": "projection"},
    "yarn": {"yarn": {"factor": 4.0, "original": 8}},
    "mla": {"attention": "mla", "q_lora_rank": 12, "kv_lora_rank": 10, "rope_head_dim": 4},
    "mla_full_query": {"attention": "mla", "kv_lora_rank": 10, "rope_head_dim": 4},
    "cca": {"attention": "cca", "rope_fraction": 0.5},
    "zaya": {
        "attention": "cca", "rope_fraction": 0.5, "residual_scaling": True, "tie_embeddings": True, "top_k": 1,
        "router": {"kind": "mlp", "hidden": 16, "renormalize": False},
    },
    "parallel": {"parallel_block": True, "dense_layers": 1, "dense_width": 48},
    "interleaved": {"moe_every": 2, "dense_width": 48},
    "plain": {"gated": False, "shared_width": 16},
    "mtp": {"mtp_layers": 2},
}  # fmt: skip


def shape(**changes: Any) -> ModelConfig:
    """A small model with some fields of its own."""
    return ModelConfig(**(SHAPE | changes))


def routed(**changes: Any) -> ModelConfig:
    """A small model with some fields of its router set; `top_k` and `experts` are the model's."""
    of_model = {name: changes.pop(name) for name in ("top_k", "experts", "layers") if name in changes}
    return shape(**of_model, router=RouterConfig(**changes))


def stage(model: ModelConfig, seed: int = 1) -> DecoderStage:
    """The whole model in fp64, biases and scales off their initial values, so that leaving one out shows."""
    built = build(model, seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith(("bias", "scale", "norm.weight")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return built


def tokens(samples: int = 2, sequence: int = 12, vocab: int = 40, seed: int = 3) -> Tensor:
    """[samples, sequence + 1]."""
    return torch.randint(vocab, (samples, sequence + 1), generator=torch.Generator().manual_seed(seed))


def micro(tokens_BS: Tensor, documents_BS: Tensor | None = None, samples: int | None = None) -> MicroBatch:
    """A micro-batch on one rank, of a step of `samples` samples (its own alone where that is None)."""
    places = torch.arange(tokens_BS.shape[1] - 1)
    return MicroBatch(tokens_BS, places, documents_BS, 1.0 / (samples or tokens_BS.shape[0]), Tally())


def logits(built: DecoderStage, tokens_BS: Tensor, documents_BS: Tensor | None = None) -> Tensor:
    """[B, S, V]."""
    batch = micro(tokens_BS, documents_BS)
    return built.logits(inputs(batch), batch)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, and none left behind."""
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found
