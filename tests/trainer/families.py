"""Small models of every family, and the batches that the layout tests train them on."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from configs.errors import ReplicasDiffer
from configs.schema import ModelConfig, RouterConfig, YarnConfig
from trainer.engines.base import Batch, Engine
from trainer.parallel.mesh import Mesh
from trainer.parallel.replicas import compare

SEQUENCE = 32
VOCAB = 64
SEPARATOR = 0

_BASE: dict[str, Any] = {
    "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 4, "head_dim": 8, "vocab": VOCAB, "experts": 8, "top_k": 2,
    "expert_width": 16, "init_std": 0.1,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"router": {"balance": "aux", "aux_coefficient": 0.02}},
    "olmoe": {
        "qk_norm": "projection", "top_k": 4,
        "router": {"balance": "aux", "renormalize": False, "losses_over_layers": "mean", "z_coefficient": 0.01},
    },
    "qwen3": {"qk_norm": "head", "router": {"balance": "bias", "bias_update_rate": 0.01}},
    "deepseek": {
        "attention": "mla", "q_lora_rank": 16, "kv_lora_rank": 12, "rope_head_dim": 4, "dense_layers": 1,
        "dense_width": 32, "shared_width": 16, "mtp_layers": 1,
        "yarn": {"factor": 4.0, "original": 16},
        "router": {
            "score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5, "balance": "both", "bias_update_rate": 0.01,
        },
    },
    "maverick": {
        "moe_every": 2, "dense_width": 32, "top_k": 1, "shared_width": 16, "kv_heads": 2,
        "router": {"score": "sigmoid", "balance": "both", "aux_coefficient": 0.02, "bias_update_rate": 0.01},
    },
    "zaya": {
        "attention": "cca", "experts": 16, "top_k": 1, "rope_fraction": 0.5, "residual_scaling": True,
        "tie_embeddings": True,
        "router": {"kind": "mlp", "hidden": 16, "bias_rule": "load_error", "bias_update_rate": 0.01},
    },
    "zaya-interleaved": {
        "attention": "cca", "moe_every": 3, "dense_width": 32, "top_k": 1, "rope_fraction": 0.5, "layers": 6,
        "router": {"kind": "mlp", "hidden": 16, "bias_rule": "load_error", "bias_update_rate": 0.01},
    },
    "megascale": {"parallel_block": True, "window": 12, "gated": False, "tie_embeddings": True},
    "dropping": {"router": {"capacity_factor": 1.0, "balance": "none"}},
}  # fmt: skip
"""Differences from one small decoder. `zaya` leaves experts without tokens, `dropping` drops."""

VARIATIONS: dict[str, dict[str, Any]] = {
    "deepseek-tied": FAMILIES["deepseek"] | {"tie_embeddings": True},
    "deepseek-twice": FAMILIES["deepseek"] | {"mtp_layers": 2},
}  # fmt: skip
"""Families whose weights meet in another way, for some layouts alone."""


def family(name: str) -> ModelConfig:
    """The small model of a family, or of a variation."""
    tree = _BASE | (FAMILIES | VARIATIONS)[name]
    router = RouterConfig(**tree.pop("router", {}))
    yarn = YarnConfig(**tree.pop("yarn", {}))
    return ModelConfig(name=name, router=router, yarn=yarn, **tree)


def sample(number: int) -> torch.Tensor:
    """Tokens of one sample, [SEQUENCE + 1]: a noisy cycle that can be learned, uneven, with documents in it."""
    generator = torch.Generator().manual_seed(number)
    noise = torch.randint(1, VOCAB, (SEQUENCE + 1,), generator=generator)
    start = int(torch.randint(1, VOCAB, (1,), generator=generator))
    cycle = (start + 3 * torch.arange(SEQUENCE + 1)) % 9 + 1
    tokens = torch.where(torch.rand(SEQUENCE + 1, generator=generator) < 0.3, noise, cycle)
    tokens[torch.rand(SEQUENCE + 1, generator=generator) < 0.06] = SEPARATOR
    return tokens


def batches(step: int, samples: int, micro_batch: int, index: int, size: int) -> list[Batch]:
    """A step's micro-batches of one data-parallel place; the samples of a step are the same whatever the layout."""
    made = []
    for micro in range(samples // (micro_batch * size)):
        first = step * samples + (micro * size + index) * micro_batch
        tokens = torch.stack([sample(first + i) for i in range(micro_batch)])
        ends = (tokens[:, :-1] == SEPARATOR).long()
        made.append(Batch(tokens, (ends.cumsum(1) - ends).to(torch.int32)))
    return made


def drift(engine: Engine, mesh: Mesh, step: int) -> float:
    """0, or infinite where ranks' copies of the state differ, as no layout may make them: no comparison holds then."""
    try:
        compare(engine.state(), mesh, step)
    except ReplicasDiffer as error:
        print(error, file=sys.stderr)
        return math.inf
    return 0.0
