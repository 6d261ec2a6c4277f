"""The decoder: what a token may see, positions, blocks, heads and the loss."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import YarnConfig
from tests.trainer.model.small_models import KINDS, gradients, logits, micro, shape, stage, tokens
from trainer.model import seams
from trainer.model.attention import Attention
from trainer.model.block import result_of
from trainer.model.decoder import DecoderStage, boundary_width, inputs
from trainer.model.initial import build, initialize
from trainer.model.norm import RMSNorm
from trainer.model.rotary import Rotary, attention_factor

pytestmark = pytest.mark.dist

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_a_token_sees_what_is_before_it_and_nothing_after(kind: str) -> None:
    built, base = stage(shape(**KINDS[kind])), tokens()
    before, at = logits(built, base), 6
    base[:, at] = (base[:, at] + 1) % 40
    moved = (logits(built, base) - before).abs().amax(dim=-1)
    assert moved[:, :at].max() < 1e-12  # rounding: experts get other rows beside theirs
    seen = at + (KINDS[kind].get("window", 0) or 99)
    # Two layers see twice the window; a token that is looked at directly changes by far more than rounding.
    assert (moved[:, at : min(seen, 12)] > 1e-6).all()


@every_kind
def test_documents_of_a_sample_do_not_see_each_other(kind: str) -> None:
    built, base = stage(shape(**KINDS[kind])), tokens(1)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    together = logits(built, base, documents)
    other = base.clone()
    other[:, :5] = (other[:, :5] + 1) % 40
    torch.testing.assert_close(logits(built, other, documents)[:, 5:], together[:, 5:], rtol=0, atol=1e-12)
    # Rotation is relative: the second document alone, at places from 0, gives the same.
    alone = logits(built, base[:, 5:])
    torch.testing.assert_close(alone, together[:, 5:], rtol=0, atol=1e-9)
    assert (logits(built, base)[:, 5:] - together[:, 5:]).abs().max() > 1e-3


def test_a_window_ends_where_it_says() -> None:
    built, base = stage(shape(layers=1, window=3)), tokens()
    before = logits(built, base)
    base[:, 4] = (base[:, 4] + 1) % 40
    moved = (logits(built, base) - before).abs().amax(dim=(0, 2)) > 1e-9
    assert moved.tolist() == [4 <= place < 7 for place in range(12)]


@pytest.mark.parametrize("kind", ["gqa", "yarn", "mla", "cca"])
def test_rotated_scores_depend_on_the_distance_alone(kind: str) -> None:
    rotary = Rotary(shape(**KINDS[kind]))
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(place: int, other: int) -> Tensor:
        turned = [rotary(torch.tensor([p]), torch.float64).rotate(x) for p, x in ((place, q), (other, k))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-9, atol=1e-9)
    assert abs(score(9, 4) - score(9, 3)) > 1e-3


def test_rotation_is_by_halves_and_leaves_the_rest() -> None:
    angles = Rotary(shape(rope_fraction=0.5, rope_theta=100.0))(torch.tensor([0, 3]), torch.float64)
    x = torch.arange(1.0, 9.0, dtype=torch.float64).expand(1, 1, 2, 8)
    turned = angles.rotate(x)[0, 0]
    assert turned[0].tolist() == x[0, 0, 0].tolist() and turned[1, 4:].tolist() == [5.0, 6.0, 7.0, 8.0]
    for pair, frequency in enumerate((1.0, 0.1)):
        by_hand = torch.polar(torch.tensor(1.0), torch.tensor(3 * frequency)).to(torch.complex128)
        by_hand = by_hand * torch.complex(x[0, 0, 1, pair], x[0, 0, 1, pair + 2])
        torch.testing.assert_close(turned[1, pair], by_hand.real, rtol=0, atol=1e-6)
        torch.testing.assert_close(turned[1, pair + 2], by_hand.imag, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("factor", "original", "theta"), [(40.0, 4096, 1e4), (4.0, 8192, 1e6), (2.0, 64, 1e4)]
)
def test_yarn_is_that_of_transformers(factor: float, original: int, theta: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "rope_theta": theta,
    }
    theirs = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=int(factor * original),
        rope_parameters=yarn,
    )  # fmt: skip
    frequencies, attention = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    ours = shape(head_dim=64, rope_theta=theta, yarn=YarnConfig(factor=factor, original=original))
    torch.testing.assert_close(
        Rotary(ours).frequencies(torch.device("cpu")).float(), frequencies, rtol=1e-5, atol=0
    )
    assert attention_factor(ours.yarn) == pytest.approx(attention)
    angles = Rotary(ours)(torch.tensor([0]), torch.float64)
    assert angles.cos_SP[0, 0].item() == pytest.approx(attention)
    assert (frequencies[-1] / frequencies[0] * factor).item() == pytest.approx(theta ** (-62 / 64), rel=1e-3)


def test_norms_by_hand() -> None:
    x = torch.randn(3, 16, dtype=torch.float64)
    norm = RMSNorm(16, 0.1).double()
    torch.nn.init.normal_(norm.weight)
    by_hand = x / (x.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), by_hand)
    # In bf16 all is worked out in fp32 and rounded once.
    low = norm.to(torch.bfloat16)
    rounded = RMSNorm(16, 0.1).double()
    rounded.weight.data = low.weight.detach().double()
    rows = torch.randn(500, 16).to(torch.bfloat16)
    found, exact = low(rows), rounded(rows.double()).to(torch.bfloat16)
    assert found.dtype == torch.bfloat16 and (found != exact).double().mean() < 0.002


def _scores(attention: Attention, x: Tensor) -> Tensor:
    """Attention by hand from the module's weights, [B, S, D]."""
    places = torch.arange(x.shape[1])
    angles = Rotary(shape(qk_norm=attention.norm))(places, torch.float64)
    q, k, v = x @ attention.query.weight.T, x @ attention.key.weight.T, x @ attention.value.weight.T
    if attention.norm == "projection":
        q, k = attention.query_norm(q), attention.key_norm(k)
    out = []
    for head in range(4):
        at, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        qh, kh = q[..., at], k[..., shared]
        if attention.norm == "head":
            qh, kh = attention.query_norm(qh), attention.key_norm(kh)
        qh, kh = angles.rotate(qh[:, None])[:, 0], angles.rotate(kh[:, None])[:, 0]
        score = qh @ kh.transpose(1, 2) / 8**0.5
        score = score.masked_fill(places[:, None] < places[None, :], -torch.inf)
        out.append(score.softmax(-1) @ v[..., shared])
    return torch.cat(out, -1) @ attention.output.weight.T


@pytest.mark.parametrize("norm", ["none", "head", "projection"])
def test_grouped_attention_by_hand(norm: str) -> None:
    model = shape(qk_norm=norm)
    attention = stage(model).blocks["0"].attention
    x, batch = torch.randn(2, 12, 32, dtype=torch.float64), micro(tokens())
    found = attention(x, batch, Rotary(model)(batch.positions_S, torch.float64))
    torch.testing.assert_close(found, _scores(attention, x))


def test_latent_attention_by_hand() -> None:
    model = shape(**KINDS["mla"])
    attention = stage(model).blocks["0"].attention
    x, batch = torch.randn(1, 12, 32, dtype=torch.float64), micro(tokens(1))
    angles = Rotary(model)(batch.positions_S, torch.float64)
    down = x @ attention.key_value_down.weight.T
    shared = angles.rotate(down[:, None, :, 10:])[:, 0]
    kv = attention.key_value_norm(down[..., :10]) @ attention.key_value_up.weight.T
    q = attention.query_down_norm(x @ attention.query_down.weight.T) @ attention.query_up.weight.T
    out = []
    for head in range(4):
        qh, kvh = q[..., 12 * head : 12 * head + 12], kv[..., 16 * head : 16 * head + 16]
        score = qh[..., :8] @ kvh[..., :8].transpose(1, 2)
        score = (score + angles.rotate(qh[:, None, :, 8:])[:, 0] @ shared.transpose(1, 2)) / 12**0.5
        score = score + torch.full((12, 12), -torch.inf, dtype=torch.float64).triu(1)
        out.append(score.softmax(-1) @ kvh[..., 8:])
    torch.testing.assert_close(attention(x, batch, angles), torch.cat(out, -1) @ attention.output.weight.T)


def test_a_parallel_block_adds_two_layers_of_one_input() -> None:
    model = shape(parallel_block=True, dense_layers=2, dense_width=48)
    built, batch = stage(model), micro(tokens())
    block, x = built.blocks["0"], torch.randn(2, 12, 32, dtype=torch.float64)
    angles = built.rotary(batch.positions_S, torch.float64)
    h = block.attention_norm(x)
    feed = (F.silu(h @ block.feed.gate.weight.T) * (h @ block.feed.up.weight.T)) @ block.feed.down.weight.T
    by_hand = x + block.attention(h, batch, angles) + feed
    torch.testing.assert_close(block(x, None, batch, angles)[0], by_hand)
    assert not any("feed_norm" in name for name, _ in built.named_parameters())


def test_residual_scaling_by_hand() -> None:
    model = shape(residual_scaling=True, dense_layers=2, dense_width=48, gated=False)
    built, batch = stage(model), micro(tokens())
    block, x = built.blocks["1"], torch.randn(2, 12, 32, dtype=torch.float64)
    angles = built.rotary(batch.positions_S, torch.float64)
    named = dict(block.named_parameters())

    def add(kind: str, x: Tensor, y: Tensor) -> Tensor:
        part = {key.removeprefix(f"{kind}_residual."): value for key, value in named.items()}
        kept = (x + part["stream.bias"]) * part["stream.scale"]
        return kept + (y + part["output.bias"]) * part["output.scale"]

    x1 = add("attention", x, block.attention(block.attention_norm(x), batch, angles))
    h = block.feed_norm(x1)
    feed = F.gelu(h @ named["feed.up.weight"].T) @ named["feed.down.weight"].T
    torch.testing.assert_close(block(x, None, batch, angles)[0], add("feed", x1, feed))
    scaled = (built.embedding.weight[:3] + built.input_scaling.bias) * built.input_scaling.scale
    torch.testing.assert_close(built.input_scaling(built.embedding.weight[:3]), scaled)
    fresh = build(model, 1)
    assert fresh.input_scaling.scale.unique().tolist() == [1.0] and fresh.input_scaling.bias.abs().max() == 0


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token() -> None:
    built, base = stage(shape()), tokens(3)
    batch = micro(base, samples=12)
    by_hand = F.cross_entropy(logits(built, base).flatten(0, 1), base[:, 1:].flatten())
    torch.testing.assert_close(built(inputs(batch), batch).double(), by_hand * 3 / 12, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_multi_token_prediction_by_hand(tied: bool) -> None:
    model = shape(mtp_layers=2, mtp_coefficient=0.7, tie_embeddings=tied)
    built, base = stage(model), tokens(2, sequence=9)
    batch = micro(base)
    hidden, _ = built.run(inputs(batch), batch)
    table, head = built.embedding.weight, (built.embedding if tied else built.head).weight
    angles, by_hand = built.rotary(batch.positions_S, torch.float64), 0.0
    main = F.cross_entropy((built.final_norm(hidden) @ head.T).flatten(0, 1), base[:, 1:].flatten())
    padded = torch.cat((base, torch.zeros(2, 4, dtype=torch.int64)), dim=1)
    for depth, part in enumerate(built.mtp, start=1):
        ahead = table[padded[:, depth : depth + 9]]
        joined = torch.cat((part.hidden_norm(hidden), part.embedding_norm(ahead)), -1) @ part.project.weight.T
        x, _, pending = part.block(joined, None, batch, angles)
        hidden = x + result_of(pending)
        found = part.final_norm(hidden)[:, : 9 - depth] @ head.T
        by_hand += 0.7 / 2 * F.cross_entropy(found.flatten(0, 1), base[:, depth + 1 :].flatten())
    (main + by_hand).backward()
    expected = gradients(built)
    batch = micro(base)
    loss = built(inputs(batch), batch)
    loss.backward()
    torch.testing.assert_close(loss.double(), main, rtol=1e-6, atol=0)
    torch.testing.assert_close(batch.tally.extra[0].double(), by_hand.detach(), rtol=1e-6, atol=0)
    for name, gradient in gradients(built).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    assert sorted(built.routers()) == [0, 1, 2, 3] == sorted(batch.tally.counts)


def test_a_tied_table_gets_the_gradients_of_both_uses() -> None:
    tied = stage(shape(tie_embeddings=True))
    apart = DecoderStage(shape(), 0, 2).double()
    apart.load_state_dict(tied.state_dict() | {"head.weight": tied.embedding.weight})
    batch = micro(tokens())
    for built in (tied, apart):
        built(inputs(batch), batch).backward()
    both, one = gradients(tied), gradients(apart)
    assert "head.weight" not in both and one["embedding.weight"].abs().max() > 0
    torch.testing.assert_close(both["embedding.weight"], one["embedding.weight"] + one["head.weight"])


@every_kind
@pytest.mark.parametrize("cut", [1, 2])
def test_stages_in_a_row_are_the_whole_model(kind: str, cut: int) -> None:
    model = shape(**KINDS[kind], layers=3)
    whole, batch = stage(model), micro(tokens())
    parts = [DecoderStage(model, 0, cut).double(), DecoderStage(model, cut, 3).double()]
    state = whole.state_dict()
    for part in parts:
        part.load_state_dict({name: state[name] for name in part.state_dict()})
    between = parts[0](inputs(batch), batch)
    assert between.shape[-1] == boundary_width(model, cut)
    loss, expected = parts[1](between, batch), whole(inputs(batch), batch)
    assert loss == expected
    loss.backward()
    expected.backward()
    summed: dict[str, Tensor] = {}
    for part in parts:
        for name, gradient in gradients(part).items():
            summed[name] = summed[name] + gradient if name in summed else gradient
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(summed.pop(name), gradient, msg=name)
    assert not summed


@every_kind
def test_every_parameter_learns_and_has_its_split(kind: str) -> None:
    model = shape(**KINDS[kind])
    built, batch = stage(model), micro(tokens(4, 24))
    built(inputs(batch), batch).backward()
    found = gradients(built)
    still = [name for name, _ in built.named_parameters() if name not in found or not found[name].any()]
    assert still == []
    dense, experts = built.splits(), built.expert_splits()
    assert {*dense, *experts} == {name for name, _ in built.named_parameters()} and not {*dense} & {*experts}
    for name, parameter in built.named_parameters():
        dims = [d for d in (*experts.get(name, ()), dense.get(name)) if d is not None]
        assert all(parameter.shape[d] % 2 == 0 for d in dims), name


@every_kind
def test_a_stage_made_on_meta_is_the_same(kind: str) -> None:
    model = shape(**KINDS[kind])
    with torch.device("meta"):
        lazy = DecoderStage(model, 0, 2)
    assert all(t.is_meta for t in (*lazy.parameters(), *lazy.buffers()))
    lazy.to_empty(device="cpu")
    initialize(lazy, 5)
    eager = DecoderStage(model, 0, 2)
    initialize(eager, 5)
    batch = micro(tokens())
    assert lazy(inputs(batch), batch) == eager(inputs(batch), batch)


def test_logits_are_asked_of_the_last_stage_alone() -> None:
    batch = micro(tokens())
    with pytest.raises(RuntimeError, match="layers 0 to 1 have no output projection"):
        DecoderStage(shape(), 0, 1).logits(inputs(batch), batch)


@every_kind
def test_bf16_is_close_to_fp32(kind: str) -> None:
    model = shape(**KINDS[kind])
    built, batch = stage(model).float(), micro(tokens(4, 24))
    exact = built(inputs(batch), batch)
    low = built.to(torch.bfloat16)(inputs(batch), batch)
    assert low.dtype == torch.float32 and abs(low - exact) < 0.1 * exact


def _documents_one_by_one(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *rest: Any, **how: Any
) -> tuple[Tensor]:
    """What `aten::_flash_attention_forward` says that it does, [T, heads, width], a document and a query at a time."""
    longest = int(bounds.diff().max())
    assert rest[0] is bounds and rest[1:] == (longest, longest, 0.0, True, False)
    left, group = how["window_size_left"], q.shape[1] // k.shape[1]
    assert how["window_size_right"] == (None if left is None else 0)
    out = torch.zeros_like(q)
    for begin, end in pairwise(bounds.tolist()):
        for place in range(begin, end):
            first = begin if left is None else max(begin, place - left)
            for head in range(q.shape[1]):
                keys, values = (x[first : place + 1, head // group] for x in (k, v))
                scale = how["scale"] or q.shape[-1] ** -0.5
                out[place, head] = (keys @ q[place, head] * scale).softmax(0) @ values
    return (out,)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_documents_known_on_the_host_need_no_mask(
    window: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 8, 4, dtype=torch.float64) for heads in (4, 2, 2))
    batch = micro(tokens(2, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0] * 8]))
    wanted = seams.attention(q, k, v, batch.positions_S, batch, window, scale)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", _documents_one_by_one)
    known = replace(batch, packed=seams.PackedDocuments(torch.tensor([0, 3, 7, 8, 16], dtype=torch.int32), 8))
    torch.testing.assert_close(seams.attention(q, k, v, batch.positions_S, known, window, scale), wanted)
    monkeypatch.setattr(seams, "_flashes", lambda *_: True)
    found = seams.attention(q, k, v, batch.positions_S, known, window, scale)
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(found, wanted), "the other way was taken"
