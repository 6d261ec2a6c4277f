"""ZAYA1's attention, router and residuals against the modules that transformers has of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.model.small_models import micro, shape, stage, tokens
from trainer.model.compressed import CompressedAttention
from trainer.model.rotary import Rotary
from trainer.model.seams import SoloSeams, zero_at_starts

pytestmark = pytest.mark.dist

MODEL = shape(attention="cca", rope_fraction=0.5)


def _attention(**changes: Any) -> CompressedAttention:
    attention = stage(shape(attention="cca", rope_fraction=0.5, **changes)).blocks["0"].attention
    assert isinstance(attention, CompressedAttention)
    return attention


def _norm_rotary(x: Tensor, kv_heads: int = 2) -> Tensor:
    batch = micro(tokens(x.shape[0], x.shape[1]))
    return _attention(kv_heads=kv_heads)(x, batch, Rotary(MODEL)(batch.positions_S, torch.float64))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_that_of_transformers(kv_heads: int) -> None:
    pytest.importorskip("transformers.models.zaya")
    from transformers.models.zaya.configuration_zaya import ZayaConfig
    from transformers.models.zaya.modeling_zaya import ZayaAttention, ZayaRotaryEmbedding

    config = ZayaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=8, num_hidden_layers=1,
        vocab_size=40, moe_intermediate_size=24, num_experts=8, attn_implementation="eager",
        rope_parameters={"hybrid": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    )  # fmt: skip
    ours, theirs = _attention(kv_heads=kv_heads), ZayaAttention(config, 0).double()
    half = kv_heads * 8 // 2
    cca, named = theirs.qkv_proj, dict(ours.named_parameters())
    pairs = {
        cca.q_proj.weight: named["query.weight"],
        cca.k_proj.weight: named["key.weight"],
        cca.v_proj_current.weight: named["value.weight"][:half],
        cca.v_proj_delayed.weight: named["value.weight"][half:],
        cca.conv_qk_depthwise.weight: torch.cat((named["query_conv.weight"], named["key_conv.weight"]))[
            :, None
        ],
        cca.conv_qk_depthwise.bias: torch.cat((named["query_conv.bias"], named["key_conv.bias"])),
        cca.conv_qk_grouped.weight: torch.cat((named["query_mix.weight"], named["key_mix.weight"])),
        cca.conv_qk_grouped.bias: torch.cat((named["query_mix.bias"], named["key_mix.bias"])),
        theirs.qk_norm.temp: named["key_scale"],
        theirs.o_proj.weight: named["output.weight"],
    }
    with torch.no_grad():
        for to, value in pairs.items():
            assert to.shape == value.shape
            to.copy_(value)
    x, batch = torch.randn(2, 12, 32, dtype=torch.float64), micro(tokens())
    places = ZayaRotaryEmbedding(config)(x, batch.positions_S[None], "hybrid")
    mask = torch.full((12, 12), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected, _ = theirs(x, {"causal": mask}, None, places)
    found = ours(x, batch, Rotary(MODEL)(batch.positions_S, torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    ours_gradients = torch.autograd.grad(
        found.square().sum(), [named["query_conv.bias"], named["value.weight"]]
    )
    theirs_gradients = torch.autograd.grad(
        expected.square().sum(),
        [cca.conv_qk_depthwise.bias, cca.v_proj_current.weight, cca.v_proj_delayed.weight],
    )
    torch.testing.assert_close(ours_gradients[0], theirs_gradients[0][:32], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours_gradients[1], torch.cat(theirs_gradients[1:]), rtol=1e-4, atol=1e-5)


def test_a_query_reaches_three_tokens_back_before_attention() -> None:
    """Two convolutions of width 2: a key at t knows tokens t-2 to t, and nothing after t."""
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    before = _norm_rotary(x)
    x[:, 5] += 1.0
    moved = (_norm_rotary(x) - before).abs().amax(dim=(0, 2))
    assert moved[:5].max() < 1e-12 and moved[5:].min() > 1e-6


class _Part(SoloSeams):
    """The second or first of two tensor-parallel ranks, whose results are added by hand."""

    def __init__(self, index: int) -> None:
        self.size, self.index = 2, index


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_halves_by_heads_add_up_to_the_whole(kv_heads: int) -> None:
    """Which values are of the token before depends on the head of the whole layer, not of the rank's part."""
    x, batch = torch.randn(2, 12, 32, dtype=torch.float64), micro(tokens())
    angles = Rotary(MODEL)(batch.positions_S, torch.float64)
    whole = _attention(kv_heads=kv_heads)
    total = torch.zeros_like(x)
    for index in range(2):
        part = _attention(kv_heads=kv_heads)
        part.tensors = _Part(index)
        for name, dim in part.splits().items():
            value = dict(whole.named_parameters())[name].detach().chunk(2, dim=dim)[index]
            owner, _, last = name.rpartition(".")
            setattr(part.get_submodule(owner), last, torch.nn.Parameter(value.clone()))
        total = total + part(x, batch, angles)
    torch.testing.assert_close(total, whole(x, batch, angles))


def test_starts_of_samples_and_documents_see_nothing_before() -> None:
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
    batch = micro(tokens(2, 4), documents)
    ones = torch.ones(2, 4, 1)
    assert zero_at_starts(ones, batch)[..., 0].tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
    assert zero_at_starts(ones, micro(tokens(2, 4)))[..., 0].tolist() == [[0, 1, 1, 1]] * 2
