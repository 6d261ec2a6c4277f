"""The router: choice, weights, losses, balancing, capacity; and the way to the experts and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import ModelConfig, RouterConfig
from tests.trainer.model.small_models import gradients, micro, routed, shape, stage, tokens
from trainer.model.decoder import inputs
from trainer.model.exchange import LocalExchange, sort_keys
from trainer.model.moe import Experts, MoELayer
from trainer.model.router import MLPRouter, Router, count, update_biases
from trainer.model.seams import MicroBatch, SoloSeams

pytestmark = pytest.mark.dist


def _router(model: ModelConfig, seed: int = 0) -> Router:
    router = Router(model, 0).double()
    with torch.no_grad():
        router.linear.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    return router


def _x(samples: int = 2, sequence: int = 12, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, sequence, 32, dtype=torch.float64, generator=generator)


def _layer(model: ModelConfig) -> MoELayer:
    feed = stage(model).blocks["0"].feed
    assert isinstance(feed, MoELayer)
    return feed


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_weights_are_the_scores_of_the_chosen(score: str, renormalize: bool) -> None:
    router, x = _router(routed(score=score, renormalize=renormalize, scale=2.5, top_k=3)), _x()
    router.bias = torch.linspace(-0.4, 0.4, 8, dtype=torch.float64)
    found = router(x, None, micro(tokens()), SoloSeams())
    logits = x @ router.linear.weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    for b in range(2):
        for s in range(12):
            ranked = sorted(range(8), key=lambda e: -(scores[b, s, e] + router.bias[e]).item())[:3]
            assert found.chosen_BSK[b, s].tolist() == ranked
            weights = scores[b, s, ranked] * 2.5
            weights = weights / scores[b, s, ranked].sum() if renormalize else weights
            torch.testing.assert_close(found.weights_BSK[b, s], weights)


def test_the_bias_moves_the_choice_and_never_the_weights() -> None:
    router, x = _router(routed(score="sigmoid", renormalize=False)), _x()
    plain = router(x, None, micro(tokens()), SoloSeams())
    router.bias += 7.0
    torch.testing.assert_close(router(x, None, micro(tokens()), SoloSeams()).weights_BSK, plain.weights_BSK)
    router.bias[5] += 10.0
    found = router(x, None, micro(tokens()), SoloSeams())
    assert (found.chosen_BSK[..., 0] == 5).all() and (found.weights_BSK < 1).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(4, 2, 3), (2, 1, 4), (8, 3, 2)])
def test_groups_limit_the_choice(score: str, groups: int, top_groups: int, top_k: int) -> None:
    router = _router(routed(score=score, groups=groups, top_groups=top_groups, top_k=top_k))
    router.bias = torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = torch.rand(50, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    size, differs = 8 // groups, 0
    for row, chosen in zip(scores, router.choose(scores), strict=True):
        choice = (row + router.bias).tolist()
        members = [list(range(g * size, g * size + size)) for g in range(groups)]
        best = 2 if score == "sigmoid" else 1
        value = [sum(sorted((choice[e] for e in group), reverse=True)[:best]) for group in members]
        kept = sorted(range(groups), key=lambda g: -value[g])[:top_groups]
        allowed = [e for g in kept for e in members[g]]
        assert chosen.tolist() == sorted(allowed, key=lambda e: -choice[e])[:top_k]
        differs += chosen.tolist() != sorted(range(8), key=lambda e: -choice[e])[:top_k]
    assert differs > 10 or size == 1


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_expert_per_token_still_teaches_the_router(score: str) -> None:
    model = routed(top_k=1, renormalize=True, score=score)
    built, batch = stage(model), micro(tokens())
    built(inputs(batch), batch).backward()
    learned = gradients(built)["blocks.0.feed.router.linear.weight"]
    assert learned.abs().max() > 1e-4


def test_a_router_learns_which_expert_is_right() -> None:
    torch.manual_seed(0)
    layer = _layer(routed(top_k=1, experts=4, balance="none")).float()
    optimizer = torch.optim.Adam(layer.router.parameters(), 1e-2)
    x = torch.randn(1, 64, 32)
    wanted = layer.experts(x[0], torch.tensor([0, 0, 64, 64])).detach()
    batch, losses = micro(tokens(1, 64)), []
    for _ in range(60):
        loss = F.mse_loss(layer(x, None, batch)[0][0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (layer.router(x, None, batch, SoloSeams()).chosen_BSK == 2).float().mean() > 0.6


def test_a_mixture_of_one_expert_is_a_dense_layer() -> None:
    layer, x = _layer(routed(top_k=1, experts=1)), _x()
    gate, up = layer.experts.gate_up[0]
    by_hand = (F.silu(x @ gate.T) * (x @ up.T)) @ layer.experts.down[0].T
    torch.testing.assert_close(layer(x, None, micro(tokens()))[0], by_hand)


@pytest.mark.parametrize("changes", [{}, {"gated": False}, {"shared_width": 16}, {"top_k": 1}])
def test_the_mixture_by_hand(changes: dict[str, Any]) -> None:
    layer, x = _layer(shape(**changes)), _x()
    found, state = layer(x, None, micro(tokens()))
    assert state is None
    choice = layer.router(x, None, micro(tokens()), SoloSeams())

    def expert(e: int, row: Tensor) -> Tensor:
        if changes.get("gated", True):
            gate, up = layer.experts.gate_up[e]
            return layer.experts.down[e] @ (F.silu(gate @ row) * (up @ row))
        return layer.experts.down[e] @ F.gelu(layer.experts.up[e] @ row)

    for b in range(2):
        for s in range(12):
            pairs = zip(choice.chosen_BSK[b, s].tolist(), choice.weights_BSK[b, s], strict=True)
            row = sum(weight * expert(e, x[b, s]) for e, weight in pairs)
            if layer.shared is not None:
                row = row + layer.shared(x[b, s])
            torch.testing.assert_close(found[b, s], row)


def _losses_by_hand(router: Router, x: Tensor, config: RouterConfig) -> Tensor:
    logits, total = x @ router.linear.weight.T, torch.zeros((), dtype=torch.float64)
    scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
    for b in range(x.shape[0]):
        chosen = (scores[b] + router.bias).topk(router.top_k, -1).indices.flatten().tolist()
        share = torch.tensor([chosen.count(e) / len(chosen) for e in range(8)], dtype=torch.float64)
        probability = (scores[b] / scores[b].sum(-1, keepdim=True)).mean(0)
        if config.balance == "aux":
            total = total + config.aux_coefficient * 8 * (share * probability).sum()
        total = total + config.z_coefficient * logits[b].exp().sum(-1).log().square().mean()
    return total


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("over", ["sum", "mean"])
@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_losses_by_hand_and_gone_into_the_gradient(score: str, over: str, balance: str) -> None:
    config = RouterConfig(
        score=score, balance=balance, aux_coefficient=0.3, z_coefficient=0.02, losses_over_layers=over
    )
    layer, x = _layer(shape(layers=2, router=config)), _x(3)
    batch = micro(tokens(3), samples=6)
    # The output isn't used, so nothing but the attached losses reaches the router.
    (layer(x, None, batch)[0] * 0.0).sum().backward()
    found = gradients(layer)["router.linear.weight"]
    by_hand = _losses_by_hand(layer.router, x, config) / 6 / (2 if over == "mean" else 1)
    torch.testing.assert_close(sum(batch.tally.losses), by_hand.detach())
    (expected,) = torch.autograd.grad(by_hand, layer.router.linear.weight)
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 1e-5


def test_multi_token_predictions_routers_are_among_those_averaged() -> None:
    config = RouterConfig(balance="aux", losses_over_layers="mean")
    built = stage(shape(layers=3, dense_layers=1, dense_width=16, mtp_layers=1, router=config))
    assert {router.share for router in built.routers().values()} == {1 / 3}


def test_losses_do_not_depend_on_the_micro_batch() -> None:
    model = routed(balance="aux", aux_coefficient=0.5, z_coefficient=0.1)
    built, base = stage(model), tokens(4)
    results = []
    for parts in (1, 2, 4):
        losses = []
        for part in base.chunk(parts):
            batch = micro(part, samples=4)
            built(inputs(batch), batch).backward()
            losses.append(sum(batch.tally.losses))
        results.append((sum(losses), gradients(built)))
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, results[0][1][name], msg=name)


def test_a_loss_counted_once_is_added_once_when_computed_again() -> None:
    layer, batch = _layer(routed(balance="aux", capacity_factor=0.5)), micro(tokens())
    layer(_x(), None, batch)
    with batch.tally.again():
        layer(_x(), None, batch)
    assert len(batch.tally.losses) == len(batch.tally.dropped) == 1
    assert batch.tally.counts[0].sum() == 2 * 12 * 2


def test_the_sign_rule_raises_what_has_too_little() -> None:
    first, second = (Router(routed(bias_update_rate=0.25), layer) for layer in range(2))
    loads = torch.tensor([[9, 0, 4, 4, 4, 4, 4, 3], [0, 0, 0, 0, 0, 0, 0, 800]])
    update_biases([first, second], loads, 1)
    moved = [-0.25, 0.25, 0, 0, 0, 0, 0, 0.25]
    assert first.bias.tolist() == moved and second.bias.tolist() == [0.25] * 7 + [-0.25]
    update_biases([first], loads[:1], 2, torch.tensor(1.0))
    assert first.bias.tolist() == moved
    fixed = Router(routed(balance="aux"), 0)
    update_biases([fixed], loads[:1], 1)
    assert fixed.bias.abs().max() == 0
    update_biases([], loads[:0], 1)


@pytest.mark.parametrize("on_device", [False, True])
def test_the_load_error_rule_is_adamw(on_device: bool) -> None:
    routers = [Router(routed(bias_rule="load_error"), layer) for layer in range(3)]
    bias = torch.nn.Parameter(torch.zeros(3, 8))
    adamw = torch.optim.AdamW([bias], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for applied in range(1, 6):
        load = torch.randint(100, (3, 8), generator=generator)
        bias.grad = load / load.sum(dim=1, keepdim=True) - 1 / 8
        adamw.step()
        update_biases(routers, load, torch.tensor(applied) if on_device else applied)
        for router, expected in zip(routers, bias.detach(), strict=True):
            torch.testing.assert_close(router.bias, expected, rtol=1e-5, atol=1e-8)
    before = [{name: value.clone() for name, value in router.named_buffers()} for router in routers]
    assert sorted(before[0]) == ["bias", "bias_avg", "bias_avg_sq"]
    update_biases(routers, load, 6, torch.tensor(1))
    for router, kept in zip(routers, before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in router.named_buffers())


@pytest.mark.parametrize("changes", [{}, {"bias_rule": "load_error", "bias_update_rate": 0.01}])
def test_balancing_evens_the_load(changes: dict[str, Any]) -> None:
    router = _router(routed(score="sigmoid", **({"bias_update_rate": 0.02} | changes)), seed=4)
    x, spreads = _x(4, 64) + 0.5, []
    for step in range(1, 200):
        batch = micro(tokens(4, 64))
        router(x, None, batch, SoloSeams())
        load = batch.tally.counts[0].double()
        spreads.append((load.max() / load.mean()).item())
        update_biases([router], load.unsqueeze(0), step)
    assert spreads[0] > 1.5 and min(spreads[-10:]) < 1.2


def test_capacity_drops_the_last_in_the_queue_and_counts_them() -> None:
    model = routed(capacity_factor=0.6, balance="aux")
    layer, x, batch = _layer(model), _x(), micro(tokens())
    room = math.ceil(0.6 * 12 * 2 / 8)
    assert layer.router.capacity(12) == room == 2
    free = layer.router(x, None, micro(tokens()), _Roomy())
    found, dropped = layer.router(x, None, batch, SoloSeams()), 0
    for b in range(2):
        taken = [0] * 8
        for s in range(12):
            for k in range(2):
                e = int(free.chosen_BSK[b, s, k])
                taken[e] += 1
                dropped += taken[e] > room
                assert found.chosen_BSK[b, s, k] == (e if taken[e] <= room else -1)
    assert 0 < dropped == batch.tally.dropped[0]
    torch.testing.assert_close(found.weights_BSK, free.weights_BSK)
    # What is dropped is in the load, and gives nothing.
    assert torch.equal(batch.tally.counts[0], count(free.chosen_BSK, 8).sum(0))
    y = layer(x, None, micro(tokens()))[0]
    nowhere = (found.chosen_BSK == -1).all(dim=-1)
    assert nowhere.any() and y[nowhere].abs().max() == 0 and y[~nowhere].abs().min() > 0


class _Roomy(SoloSeams):
    """As if every choice were the first in its queue."""

    def queue(self, chosen_BSK: Tensor, experts: int, micro: MicroBatch) -> Tensor:
        return torch.zeros_like(chosen_BSK)


def test_dropped_rows_are_gone_both_ways_whatever_the_experts_leave_there() -> None:
    chosen = torch.tensor([[0, -1], [2, 0], [-1, -1]])
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64)

    def compute(rows: Tensor, ends: Tensor) -> Tensor:
        assert ends.tolist() == [2, 2, 3] and rows.shape == (6, 4)
        held = int(ends[-1])
        return torch.cat((rows[:held] * 2, torch.full_like(rows[held:], torch.nan) * rows[held:]))

    y, _ = LocalExchange(drops=True).run(x, chosen, weights, 3, compute)
    used = torch.stack((weights[0, 0], weights[1].sum(), torch.zeros((), dtype=torch.float64)))
    torch.testing.assert_close(y, x * 2 * used[:, None])
    y.sum().backward()
    torch.testing.assert_close(x.grad, (2 * used[:, None]).expand(3, 4))


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_exchange_has_the_gradients_of_a_plain_sum(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = Experts(8, 8, 5, True).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(7, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    # Expert 4: no tokens.
    chosen = torch.stack([torch.randperm(4, generator=generator)[:top_k] for _ in range(7)])
    weights = torch.rand(7, top_k, dtype=torch.float64, generator=generator, requires_grad=True)
    y, _ = LocalExchange().run(x, chosen, weights, 5, experts)
    rows = [torch.zeros(7, 8, dtype=torch.float64)]
    for e in range(5):
        gate, up = experts.gate_up[e]
        out = (F.silu(x @ gate.T) * (x @ up.T)) @ experts.down[e].T
        rows.append(out * ((chosen == e) * weights).sum(1, keepdim=True))
    plain = sum(rows)
    torch.testing.assert_close(y, plain)
    leaves = (x, weights, *experts.parameters())
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), leaves),
                            torch.autograd.grad(plain.square().sum(), leaves), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


def test_the_deep_router_by_hand() -> None:
    model = shape(top_k=1, layers=3, router=RouterConfig(kind="mlp", hidden=16, renormalize=False))
    built, x = stage(model), _x()
    state, names = None, [n for n, _ in built.named_parameters() if n.endswith("state_scale")]
    assert names == ["blocks.1.feed.router.state_scale", "blocks.2.feed.router.state_scale"]
    for layer in range(3):
        router = built.routers()[layer]
        assert isinstance(router, MLPRouter)
        logits, handed = router.logits(x, state)
        own = F.linear(x, router.compress.weight, router.compress.bias)
        own = own if state is None else own + router.state_scale * state
        h = own / (own.square().mean(-1, keepdim=True) + 1e-5).sqrt() * router.norm.weight
        for part in (router.first, router.second):
            h = F.gelu(F.linear(h, part.weight, part.bias))
        torch.testing.assert_close(logits, h @ router.last.weight.T)
        torch.testing.assert_close(handed, own)
        state = handed


def test_the_deep_router_averages_over_depth() -> None:
    model = shape(top_k=1, router=RouterConfig(kind="mlp", hidden=16, renormalize=False))
    built, batch = stage(model), micro(tokens())
    built(inputs(batch), batch).backward()
    before = gradients(built)["blocks.0.feed.router.compress.weight"]
    with torch.no_grad():
        built.routers()[1].state_scale.zero_()
    built(inputs(batch), batch).backward()
    assert (gradients(built)["blocks.0.feed.router.compress.weight"] - before).abs().max() > 1e-9


@pytest.mark.parametrize("most", [3, 255, 256, 40_000])
def test_keys_are_sorted_whatever_their_number(most: int) -> None:
    """In order, equal ones as they came; the ends of all but the last."""
    keys = torch.randint(most + 1, (500,), generator=torch.Generator().manual_seed(0))
    keys[7] = most
    order, ends = sort_keys(keys, most)
    assert order.equal(keys.argsort(stable=True))
    assert ends.equal(keys.bincount(minlength=most + 1)[:most].cumsum(0, dtype=torch.int32))
