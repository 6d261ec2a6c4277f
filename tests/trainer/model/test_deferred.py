"""Deferred gradients of weights: the same numbers as autograd's, at the place that was asked for."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model.deferred import DeferredExpertWeight, DeferredWeight
from trainer.model.joint_linear import _JointLinear
from trainer.model.moe import Experts

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENDS = (16, 16, 40, 64)
"""Of the rows of four experts, the second of which has none."""


def _drawn() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32), torch.randn(4, 16, 32)
    ends = torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)
    x, weight = (t.to(DEVICE, torch.bfloat16).requires_grad_() for t in (x, weight))
    return x, weight, ends


@pytest.mark.parametrize("grouped", [True, False])
def test_gradients_are_those_of_autograd(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.model.deferred.fits_grouped_mm", lambda *_: grouped)
    x, weight, ends = _drawn()
    expected = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    found = DeferredExpertWeight(weight).matmul(x, ends)
    grad = torch.randn_like(found)
    theirs = (expected, *torch.autograd.grad(expected, (x, weight), grad))
    for one, other in zip((found, *torch.autograd.grad(found, (x, weight), grad)), theirs, strict=True):
        assert one.equal(other) if grouped else torch.allclose(one, other, rtol=1e-2, atol=1e-2)


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, seen: list[str]) -> Tensor:
        ctx.name, ctx.seen = name, seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.append(ctx.name)
        return grad, None, None


def test_a_weight_comes_after_what_the_rows_lead_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a collective needs it: launch, weight, wait in the forward pass; so the weight's matmul comes between the two."""
    seen: list[str] = []
    inner = DeferredExpertWeight.product

    def noted(*parts: Tensor) -> Tensor:
        seen.append("weight")
        return inner(*parts)

    monkeypatch.setattr(DeferredExpertWeight, "product", staticmethod(noted))
    x, weight, ends = _drawn()
    launched = _Noted.apply(x, "launch", seen)
    deferred = DeferredExpertWeight(weight)
    waited = _Noted.apply(launched, "wait", seen)
    deferred.matmul(waited, ends).sum().backward()
    assert seen == ["wait", "weight", "launch"]
    assert weight.grad is not None and weight.grad[1].eq(0).all() and weight.grad[0].ne(0).any()


@pytest.mark.parametrize("gated", [True, False])
def test_experts_compute_the_same_with_deferred_weights(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("moe", "deferred"):
        monkeypatch.setattr(f"trainer.model.{module}.fits_grouped_mm", lambda *_: True)
    torch.manual_seed(0)
    experts = Experts(32, 16, 4, gated).to(DEVICE, torch.bfloat16)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, _, _ = _drawn()
    ends = torch.tensor([16, 16, 40, 64], dtype=torch.int32, device=DEVICE)
    weights = torch.rand(64, device=DEVICE, requires_grad=True)
    found = {}
    for name, call in (("at once", experts), ("later", experts.deferred())):
        y = call(x, ends, weights)
        grads = torch.autograd.grad(y.float().square().sum(), (x, weights, *experts.parameters()))
        found[name] = (y, *grads)
    for one, other in zip(found["later"], found["at once"], strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("learns", [True, False])
def test_a_weight_is_gone_with_its_graph(learns: bool) -> None:
    """Without the garbage collector, which a run turns off between its pauses."""
    x, weight, ends = _drawn()
    gc.collect()
    gc.disable()
    try:
        grouped, dense = DeferredExpertWeight(weight), DeferredWeight(weight[0])
        alive = [weakref.ref(grouped), weakref.ref(dense)]
        (y,) = _JointLinear.apply((dense,), x, dense.weight)
        y = y.sum() + grouped.matmul(x, ends).sum()
        if learns:
            y.backward()
        del grouped, dense, y
        assert [one() for one in alive] == [None, None]
    finally:
        gc.enable()
