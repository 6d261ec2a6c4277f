"""The trainer against the fp64 reference: what a step of every family computes, schedules and update rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.model import ModelConfig, RouterConfig, YarnConfig
from configs.training import OptimConfig, TrainConfig
from tests.trainer import stages
from tests.trainer.reference import (
    ReferenceStep,
    document_ids,
    gradients,
    learning_rate,
    random_state,
    samples_of_step,
)
from tests.trainer.reference.names import kind
from tests.trainer.reference.optimizers import slot_names, update
from trainer.model.seams import Tally

pytestmark = pytest.mark.dist

SEPARATOR, SEQUENCE, VOCAB, SAMPLES = 0, 14, 24, 3
SAME = 1e-9
"""Of two fp64 computations, relative to the largest element of a tensor."""

_BASE: dict[str, Any] = {
    "name": "small", "layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": VOCAB, "experts": 6,
    "top_k": 2, "expert_width": 12,
}  # fmt: skip
_MLA: dict[str, Any] = {
    "attention": "mla",
    "kv_heads": 4,
    "kv_lora_rank": 6,
    "q_lora_rank": 5,
    "rope_head_dim": 4,
}
_SIGMOID = {"score": "sigmoid", "groups": 3, "top_groups": 2, "scale": 2.5}
_ZAYA: dict[str, Any] = {"attention": "cca", "rope_fraction": 0.5, "residual_scaling": True, "top_k": 1}
_MLP = {"kind": "mlp", "hidden": 10, "bias_rule": "load_error"}
_YARN = {"factor": 4.0, "original": 12}

FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-key-head": {"kv_heads": 1},
    "window": {"window": 5},
    "norm-of-heads": {"qk_norm": "head", "rope_fraction": 0.5, "norm_eps": 1e-2},
    "norm-of-projections": {"qk_norm": "projection", "norm_eps": 1e-2},
    "yarn": {"yarn": _YARN, "rope_theta": 100.0},
    "tied": {"tie_embeddings": True},
    "no-gate": {"gated": False, "shared_width": 8, "dense_layers": 1, "dense_width": 20},
    "parallel-block": {"parallel_block": True, "window": 7},
    "aux-sum": {"router": {"balance": "aux", "aux_coefficient": 0.3}},
    "aux-mean": {"layers": 3, "router": {"balance": "aux", "aux_coefficient": 0.3, "losses_over_layers": "mean"}},
    "aux-mean-mtp": {"mtp_layers": 1, "router": {"balance": "aux", "losses_over_layers": "mean", "z_coefficient": 0.1}},
    "aux-of-sigmoid": {"router": {"balance": "aux", "aux_coefficient": 0.3, "score": "sigmoid"}},
    "z-loss": {"router": {"z_coefficient": 0.2}},
    "unbalanced": {"router": {"balance": "none"}},
    "not-renormalized": {"top_k": 3, "router": {"renormalize": False, "scale": 1.7}},
    "one-expert": {"top_k": 1, "router": {"renormalize": True}},
    "groups-of-softmax": {"router": {"groups": 3, "top_groups": 1}},
    "dropping": {"router": {"capacity_factor": 0.6, "balance": "aux"}},
    "dropping-sigmoid": {"top_k": 3, "router": {"capacity_factor": 1.0, "score": "sigmoid"}},
    "latent": {**_MLA, "router": _SIGMOID, "dense_layers": 1, "dense_width": 20, "shared_width": 8, "norm_eps": 1e-2},
    "latent-query-whole": {**_MLA, "q_lora_rank": 0, "window": 6},
    "latent-yarn": {**_MLA, "yarn": _YARN, "rope_theta": 100.0},
    "interleaved": {"layers": 4, "moe_every": 2, "dense_width": 20, "shared_width": 8, "router": {"balance": "aux"}},
    "interleaved-late": {
        "layers": 5, "dense_layers": 2, "moe_every": 2, "dense_width": 20, "mtp_layers": 1,
        "router": {"balance": "both", "aux_coefficient": 0.3, "losses_over_layers": "mean", "z_coefficient": 0.1},
    },
    "mtp": {"mtp_layers": 2, "shared_width": 8, "router": {"score": "sigmoid"}},
    "mtp-tied": {"mtp_layers": 1, "tie_embeddings": True, "mtp_coefficient": 0.8},
    "zaya": {**_ZAYA, "tie_embeddings": True, "router": _MLP, "layers": 3},
    "zaya-parallel": {**_ZAYA, "parallel_block": True, "router": {**_MLP, "bias_rule": "sign"}},
    "zaya-interleaved": {**_ZAYA, "layers": 7, "moe_every": 3, "dense_width": 20, "router": _MLP},
    "zaya-mtp": {**_ZAYA, "mtp_layers": 1, "dense_layers": 1, "dense_width": 20, "layers": 3, "router": _MLP},
}  # fmt: skip
"""Differences from `_BASE`; every architecture option by itself or with those that it meets."""


def family(name: str) -> ModelConfig:
    tree = _BASE | FAMILIES[name]
    router, yarn = RouterConfig(**tree.pop("router", {})), YarnConfig(**tree.pop("yarn", {}))
    return ModelConfig(router=router, yarn=yarn, **tree)


def tokens(samples: int, seed: int = 3) -> Tensor:
    """Samples of uneven tokens, in documents of about five."""
    draw = torch.Generator().manual_seed(seed)
    made = (torch.rand(samples, SEQUENCE + 1, generator=draw) ** 2 * (VOCAB - 1)).long() + 1
    ends = torch.rand(samples, SEQUENCE + 1, generator=draw) < 1 / 5
    return made.masked_fill(ends, SEPARATOR)


def documents(tokens_BS: Tensor) -> Tensor:
    """By the reference's rule."""
    return torch.tensor([document_ids(sample[:-1], SEPARATOR) for sample in tokens_BS.tolist()])


@dataclass(frozen=True)
class ModelStep:
    """What the model made of a step."""

    loss: float
    losses: float
    mtp: float
    load: dict[int, list[int]]
    dropped: int
    gradients: dict[str, Tensor]


def run_stage(model: ModelConfig, state: dict[str, Tensor], tokens_BS: Tensor, masked: bool) -> ModelStep:
    """The step in two micro-batches, in fp64."""
    stage = stages.whole(model, state)
    loss, tallies = 0.0, []
    with stages.exact():
        for part in tokens_BS.chunk(2):
            ids = documents(part) if masked else None
            share, tally = stages.learn(stage, part, ids, samples=len(tokens_BS))
            loss += share.item()
            tallies.append(tally)
    return ModelStep(
        loss,
        sum(number.item() for tally in tallies for number in tally.losses),
        sum(number.item() for tally in tallies for number in tally.extra),
        _loads(tallies),
        sum(int(number) for tally in tallies for number in tally.dropped),
        stages.gradients(stage),
    )


def _loads(tallies: list[Tally]) -> dict[int, list[int]]:
    layers = sorted({layer for tally in tallies for layer in tally.counts})
    return {layer: sum(tally.counts[layer] for tally in tallies).tolist() for layer in layers}


def assert_same(found: ModelStep, expected: ReferenceStep) -> None:
    assert found.loss == pytest.approx(expected.cross_entropy, rel=SAME)
    assert found.losses == pytest.approx(expected.aux + expected.z, rel=SAME)
    assert found.mtp == pytest.approx(expected.mtp, rel=SAME)
    assert list(found.load.values()) == list(expected.load.values())
    assert found.dropped == expected.dropped
    errors = {
        name: (found.gradients[name] - gradient).abs().max().item() / max(gradient.abs().max().item(), 1e-9)
        for name, gradient in expected.gradients.items()
    }
    off = {name: error for name, error in errors.items() if not error < SAME}  # what isn't a number, too
    assert not off, f"gradients are off: {off}"


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_every_family(name: str, masked: bool) -> None:
    model, batch = family(name), tokens(SAMPLES)
    state = random_state(model)
    expected = gradients(model, state, batch.tolist(), SEPARATOR if masked else None)
    if model.router.capacity_factor:
        assert 0 < expected.dropped < SAMPLES * SEQUENCE * model.top_k * model.layers
    assert_same(run_stage(model, state, batch, masked), expected)


def test_a_bias_that_a_checkpoint_brings_is_not_used_where_a_loss_balances() -> None:
    model, batch = family("aux-sum"), tokens(2)
    state = random_state(model)
    for name in state:
        if name.endswith("router.bias"):
            state[name] = torch.linspace(0, 1, model.experts, dtype=torch.float64)
    assert_same(run_stage(model, state, batch, False), gradients(model, state, batch.tolist()))


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    model, batch = family("plain"), tokens(2)
    state = random_state(model)
    state["blocks.0.feed.router.bias"][3] = -10.0
    expected = gradients(model, state, batch.tolist())
    assert expected.load["blocks.0.feed.router"][3] == 0
    found = run_stage(model, state, batch, False)
    assert_same(found, expected)
    assert found.gradients["blocks.0.feed.experts.down"][3].abs().max() == 0


# ---- schedules ----

_SCHEDULES = [
    OptimConfig(schedule="cosine", warmup_steps=4),
    OptimConfig(schedule="linear", warmup_steps=0, min_lr=0.0),
    OptimConfig(schedule="wsd", warmup_steps=3, decay_steps=6),
    OptimConfig(schedule="wsd", warmup_steps=3),
    OptimConfig(schedule="wsd", warmup_steps=3, decay_steps=1),
    OptimConfig(schedule="constant", warmup_steps=5),
]


@pytest.mark.parametrize("optim", _SCHEDULES, ids=lambda o: f"{o.schedule}-{o.warmup_steps}-{o.decay_steps}")
def test_learning_rate_of_every_step(optim: OptimConfig) -> None:
    from trainer.optim import schedule

    for step in range(30):
        assert schedule.learning_rate(optim, step, 30) == pytest.approx(
            learning_rate(optim, step, 30), rel=1e-12
        )


@pytest.mark.parametrize(
    ("whole", "ramp", "over"), [(32, 4, 20), (32, 8, 3), (12, 12, 5), (24, 4, 1), (8, 4, 0)]
)
def test_samples_of_every_step(whole: int, ramp: int, over: int) -> None:
    from trainer.optim import schedule

    train = TrainConfig(global_batch=whole, ramp_batch=ramp, ramp_steps=over)
    for step in range(over + 3):
        assert schedule.global_batch_size(train, step) == samples_of_step(train, step)
        before = sum(samples_of_step(train, earlier) for earlier in range(step))
        assert schedule.consumed_samples(train, step) == before


# ---- update rules ----

_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw"},
    "adamw-eps": {"kind": "adamw", "eps": 1e-2, "weight_decay": 0.5},
    "adamw-transfer": {"kind": "adamw", "base_width": 4, "weight_decay": 0.5},
    "muon": {"kind": "muon"},
    "muon-transfer": {"kind": "muon", "base_width": 4, "orthogonal_steps": 3, "momentum": 0.8},
    "lamb": {"kind": "lamb"},
    "lamb-transfer": {"kind": "lamb", "base_width": 4, "weight_decay": 0.5, "beta1": 0.5},
}
_SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (24, 16),
    "blocks.0.attention.query.weight": (32, 16),
    "blocks.0.attention.output.weight": (16, 32),
    "blocks.0.feed.experts.gate_up": (3, 2, 12, 16),
    "blocks.0.feed.experts.down": (3, 16, 12),
    "blocks.0.attention_norm.weight": (16,),
    "final_norm.weight": (16,),
}


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_update_rule(name: str) -> None:
    from trainer.optim.build import build
    from trainer.optim.shards import ParameterShard, StagePeers
    from trainer.state import Box

    optim, draw = OptimConfig(**_OPTIMIZERS[name]), torch.Generator().manual_seed(1)
    state = {key: torch.randn(shape, generator=draw).double() for key, shape in _SHAPES.items()}
    state["blocks.0.feed.experts.down"][1] = 0.0  # a matrix without a length
    slots = [
        ParameterShard(key, state[key].float().contiguous(), Box.full(shape), kind(key, shape), 0, 1)
        for key, shape in _SHAPES.items()
    ]
    for key, shape in _SHAPES.items():
        for slot in slot_names(optim, key, shape):
            state[slot] = torch.zeros(shape, dtype=torch.float64)
    optimizer = build(optim, 16, slots, StagePeers(None, 0, 1, [[(s.name, s.box, 0, 1) for s in slots]]))
    count = 0
    for step, rate in enumerate((1e-2, 3e-2, 2e-2, 1e-2)):
        skipped = step == 2
        for slot in slots:
            grad = torch.randn(slot.tensor.shape, generator=draw)
            slot.tensor.grad = grad * (math.inf if skipped else 1.0)
            if not skipped:
                update(optim, state, slot.name, grad.double() * 0.7, rate, count + 1, 16)
        count += not skipped
        optimizer.step(rate, torch.tensor(0.7), torch.tensor(float(skipped)))
    for slot in slots:
        torch.testing.assert_close(slot.tensor.double(), state[slot.name], rtol=2e-5, atol=2e-5)
    for part, tensor, owner in optimizer.state():
        expected = torch.tensor(count) if owner is None else state[f"{owner.name}/{part}"]
        torch.testing.assert_close(tensor.double(), expected.double(), rtol=2e-5, atol=2e-5)
    names = {f"{owner.name}/{part}" for part, _, owner in optimizer.state() if owner is not None}
    assert names == {key for key in state if "/" in key}
