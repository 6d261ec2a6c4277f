"""Kernels of the router against the same in fp64: on a GPU, or else by Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.model.test_kernels import DEVICE, check, interpreter, noise, off

__all__ = ["interpreter"]
pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]


@pytest.mark.parametrize("softmax", (True, False))
@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("biased", (True, False))
def test_routes(softmax: bool, renormalize: bool, biased: bool) -> None:
    from trainer.kernels.route import RoutingRule, route

    samples, sequence, experts, top_k, scale = 2, 21, 10, 3, 1.7
    logits = torch.randn(samples, sequence, experts, device=DEVICE, requires_grad=True)
    wide = logits.detach().double().requires_grad_()
    bias = torch.randn(experts, device=DEVICE) * 0.3 if biased else None
    found = route(logits, bias, RoutingRule(top_k, softmax, renormalize, scale))
    score = wide.softmax(-1) if softmax else wide.sigmoid()
    chosen = (score.detach() + (0.0 if bias is None else bias)).topk(top_k).indices
    weights = score.gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True) if renormalize else weights
    sums, squares = (score / score.sum(-1, keepdim=True)).sum(1), wide.logsumexp(-1).square().sum()
    assert found[0].equal(chosen)
    assert found[2].sum(1).equal(F.one_hot(chosen, experts).sum((1, 2)))
    expected = (weights * scale, sums, squares)
    total, exact = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE, dtype=torch.float64)
    for one, other in zip((found[1], found[3], found[4]), expected, strict=True):
        assert off(one, other) < 1e-5
        grad = torch.randn(one.shape, device=DEVICE)
        total, exact = total + (one * grad).sum(), exact + (other * grad).sum()
    assert off(torch.autograd.grad(total, logits)[0], torch.autograd.grad(exact, wide)[0]) < 1e-5


@pytest.mark.parametrize("softmax", (True, False))
@pytest.mark.parametrize("renormalize", (True, False))
def test_a_router_without_losses_sums_nothing_up(softmax: bool, renormalize: bool) -> None:
    """Its choices, weights and gradient are those of one with losses that count for nothing."""
    from trainer.kernels.route import RoutingRule, route

    logits = torch.randn(2, 21, 10, device=DEVICE, requires_grad=True)
    rule = RoutingRule(3, softmax, renormalize, 1.7)
    chosen, weights, count, _, _ = route(logits, None, rule)
    found = route(logits, None, replace(rule, sums=False))
    assert found[0].equal(chosen) and found[1].equal(weights) and found[2].equal(count)
    assert found[3] is None and found[4] is None
    grad = torch.randn(weights.shape, device=DEVICE)
    (one,), (other,) = (torch.autograd.grad(w, logits, grad) for w in (weights, found[1]))
    assert one.equal(other) and one.any()


@pytest.mark.parametrize("softmax", (True, False))
def test_logits_that_are_not_finite_choose_experts_that_exist_each_once(softmax: bool) -> None:
    """Such a step is skipped at its end; a choice outside of the experts would have read other memory before that."""
    from trainer.kernels.route import RoutingRule, route

    experts, top_k = 60, 4
    logits = torch.randn(1, 32, experts, device=DEVICE)
    logits[0, 3], logits[0, 5, 7], logits[0, 7, 2], logits[0, 9] = math.nan, math.nan, math.inf, -math.inf
    for bias in (None, torch.full((experts,), math.nan, device=DEVICE)):
        chosen, *_ = route(logits, bias, RoutingRule(top_k, softmax, True, 1.0))
        assert int(chosen.min()) >= 0 and int(chosen.max()) < experts
        assert all(len(set(row)) == top_k for row in chosen.reshape(-1, top_k).tolist())


def test_router_logits_keep_fp32() -> None:
    from trainer.kernels.route import fp32_linear

    x, w = noise(2, 9, 64), noise(10, 64)
    assert off(fp32_linear(x, w), F.linear(x.double(), w.double())) < 1e-6
    check(fp32_linear, F.linear, [x, w])
