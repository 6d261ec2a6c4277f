"""Kernels of ZAYA1's parts against the same in fp64: on a GPU, or else by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.model.small_models import KINDS, micro, routed, shape, tokens
from tests.trainer.model.test_kernels import (
    BF16,
    CLOSE,
    DEVICE,
    check,
    interpreter,
    noise,
    off,
    tallies_as_in_fp64,
)
from trainer.model.block import Residual
from trainer.model.compressed import CompressedAttention
from trainer.model.initial import build
from trainer.model.rotary import Rotary
from trainer.model.router import MLPRouter
from trainer.model.seams import MicroBatch, SoloSeams, masked_attention

__all__ = ["interpreter"]
pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]


def test_a_scaled_residual_sum() -> None:
    from trainer.kernels.residual import scaled_sum

    for rows, width in ((70, 40), (33, 300)):
        check(
            lambda x, y, a, b, c, d: scaled_sum(x, y, (a, b), (c, d)),
            lambda x, y, a, b, c, d: (x + b) * a + (y + d) * c,
            [noise(rows, width), noise(rows, width), *(noise(width) for _ in range(4))],
        )


class _Apart(SoloSeams):
    """A rank that has every token, but is treated as one that hasn't."""

    whole = False


class _Second(SoloSeams):
    """The second of two tensor-parallel ranks, whose values are all of the token before."""

    size, index = 2, 1


def _on_device(batch: MicroBatch) -> MicroBatch:
    batch.positions_S.data = batch.positions_S.to(DEVICE)
    return batch


def _attention(**changes: Any) -> tuple[CompressedAttention, Rotary]:
    model = shape(attention="cca", **changes)
    layer = CompressedAttention(model).to(DEVICE)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            mean = 1.0 if name == "key_scale" else 0.0
            parameter.copy_(mean + 0.3 * torch.randn(parameter.shape, device=DEVICE))
    return layer.to(BF16), Rotary(model)


def _documents() -> Tensor:
    """A document of one token at the start, one in the middle, and one at the end of a sample."""
    starts = torch.zeros(2, 21, dtype=torch.int64)
    starts[0, 1] = starts[0, 9] = starts[0, 10] = starts[1, 20] = 1
    return starts.cumsum(1).to(DEVICE)


_SHAPES: dict[str, dict[str, Any]] = {
    "half turned": {"rope_fraction": 0.5},
    "all turned, one group": {"kv_heads": 1},
    "each key its own": {"kv_heads": 4, "rope_fraction": 0.25, "head_dim": 16},
    "three groups of odd widths": {"heads": 6, "kv_heads": 3, "head_dim": 12, "rope_fraction": 0.5},
}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", list(_SHAPES))
@pytest.mark.parametrize("seam", ["whole", "apart", "second"])
def test_compressed_attention(name: str, documents: bool, seam: str) -> None:
    """What attention takes and all gradients: within documents, with the tokens before from a seam, and of heads whose
    values are all of the token before."""
    layer, rotary = _attention(**_SHAPES[name])
    exact, _ = _attention(**_SHAPES[name])
    exact.load_state_dict(layer.state_dict())
    exact = exact.double()
    layer.core = _Apart() if seam == "apart" else layer.core
    if seam == "second":
        layer.tensors = exact.tensors = _Second()
    batch = _on_device(micro(tokens(2, 21).to(DEVICE), _documents() if documents else None))
    x = noise(2, 21, 32).requires_grad_()
    wide = x.detach().double().requires_grad_()
    found = layer._fused(x, batch, rotary(batch.positions_S, torch.float32))
    expected = exact._mixed(wide, batch, rotary(batch.positions_S, torch.float64))
    total, theirs = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE, dtype=torch.float64)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is BF16 and one.shape == other.shape
        assert off(one, other) < CLOSE
        grad = torch.randn(one.shape, device=DEVICE)
        total, theirs = total + (one * grad).sum(), theirs + (other * grad).sum()
    named = [key for key, _ in layer.named_parameters() if not key.startswith("output")]
    ours = torch.autograd.grad(total, [x, *(layer.get_parameter(key) for key in named)])
    exacts = torch.autograd.grad(theirs, [wide, *(exact.get_parameter(key) for key in named)])
    for key, one, other in zip(["x", *named], ours, exacts, strict=True):
        assert one.dtype is BF16 and off(one, other) < 2 * CLOSE, key


def test_gradients_of_heads_may_lie_in_any_order() -> None:
    """Attention's backward pass gives them by head or by token."""
    layer, rotary = _attention(rope_fraction=0.5)
    batch = _on_device(micro(tokens(2, 21).to(DEVICE)))
    x = noise(2, 21, 32).requires_grad_()
    grads = [noise(*out.shape) for out in layer._fused(x, batch, rotary(batch.positions_S, torch.float32))]
    results: list[Tensor] = []
    for order in (
        lambda y: y,
        lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),
        lambda y: y.mT.contiguous().mT,
    ):
        out = layer._fused(x, batch, rotary(batch.positions_S, torch.float32))
        results += torch.autograd.grad(out, x, [order(grad) for grad in grads])
    assert results[0].equal(results[1]) and results[0].equal(results[2])


def test_a_head_of_zeros_has_a_gradient() -> None:
    """A head is divided by no less than fp32's epsilon."""
    layer, rotary = _attention()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "mix" in name or "conv" in name:
                parameter.zero_()
    batch = _on_device(micro(tokens(1, 5).to(DEVICE)))
    x = torch.zeros(1, 5, 32, dtype=BF16, device=DEVICE, requires_grad=True)
    q, k, v = layer._fused(x, batch, rotary(batch.positions_S, torch.float32))
    assert q.eq(0).all() and k.eq(0).all()
    (grad,) = torch.autograd.grad(q.sum() + k.sum() + v.sum(), x)
    assert grad.isfinite().all()


def test_a_residual_takes_the_kernel_unless_nodes_are_kept_apart() -> None:
    residual = Residual(32).to(DEVICE).to(BF16)
    for apart in (False, True):
        residual.single_output = apart
        out = residual(noise(2, 32).requires_grad_(), noise(2, 32))
        assert out.grad_fn is not None and ("ScaledSum" in out.grad_fn.name()) is not apart


def test_kernels_take_over_where_activations_are_bf16() -> None:
    layer, rotary = _attention(rope_fraction=0.5)
    batch = _on_device(micro(tokens(2, 12).to(DEVICE)))
    angles, x = rotary(batch.positions_S, torch.float32), noise(2, 12, 32)
    q, k, v = layer._fused(x, batch, angles)
    expected = nn.functional.linear(
        masked_attention(q, k, v, batch.positions_S, batch.positions_S, None, 0, None)
        .transpose(1, 2)
        .flatten(2),
        layer.output.weight,
    )
    assert layer(x, batch, angles).equal(expected)
    layer.single_output = True
    assert off(layer(x, batch, angles), expected) < 0.05


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("width", [16, 20])
def test_the_routers_mlp(carried: bool, width: int) -> None:
    """Logits as in fp32, and all gradients, those that come through the handed state among them."""
    model = routed(kind="mlp", hidden=width, renormalize=False)
    router = MLPRouter(model, 0, carried).to(DEVICE)
    with torch.no_grad():
        for name, parameter in router.named_parameters():
            mean = 1.0 if name in ("norm.weight", "state_scale") else 0.0
            parameter.copy_(mean + 0.4 * torch.randn(parameter.shape, device=DEVICE))
    router = router.to(BF16)
    exact = MLPRouter(model, 0, carried).to(DEVICE).to(BF16)
    exact.load_state_dict(router.state_dict())
    exact = exact.double()
    leaves = [noise(2, 21, 32), noise(2, 21, width)]
    x, state = (leaf.clone().requires_grad_() for leaf in leaves)
    wide_x, wide_state = (leaf.double().requires_grad_() for leaf in leaves)
    logits, handed = router.logits(x, state)
    theirs, kept = exact.logits(wide_x, wide_state)
    assert logits.dtype is torch.float32 and handed is not None and kept is not None and handed.dtype is BF16
    assert off(logits, theirs) < 1e-6 and off(handed, kept) < CLOSE
    grad, other = torch.randn(logits.shape, device=DEVICE), torch.randn(handed.shape, device=DEVICE)
    named = [key for key, _ in router.named_parameters()]
    inputs = [x, state] if carried else [x]
    wides = [wide_x, wide_state] if carried else [wide_x]
    ours = torch.autograd.grad(
        (logits * grad).sum() + (handed * other).sum(),
        [*inputs, *(router.get_parameter(key) for key in named)],
    )
    exacts = torch.autograd.grad(
        (theirs * grad).sum() + (kept * other).sum(), [*wides, *(exact.get_parameter(key) for key in named)]
    )
    for key, one, right in zip(["x", "state"][: len(inputs)] + named, ours, exacts, strict=True):
        assert one.dtype is BF16 and off(one, right) < CLOSE, key


def test_a_state_that_is_not_read_has_no_gradient() -> None:
    router = MLPRouter(routed(kind="mlp", hidden=16, renormalize=False), 0, True).to(DEVICE)
    nn.init.normal_(router.state_scale)
    router = router.to(BF16)
    x, state = noise(1, 9, 32).requires_grad_(), noise(1, 9, 16).requires_grad_()
    logits, handed = router.logits(x, state)
    assert handed is not None
    for result in (logits, handed):
        grads = torch.autograd.grad(result.float().sum(), (x, state), retain_graph=True)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("name", "seed"), [("zaya", 5), ("cca", 3)])
def test_a_model_trains_as_in_fp64(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, choices and all gradients, to what bf16 leaves of them."""
    tallies_as_in_fp64(shape(**KINDS[name]), seed, monkeypatch)


def test_a_backward_pass_in_two_halves() -> None:
    """Zero-bubble schedules work weights' gradients out later; with kernels of one result alone."""
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    from trainer.parallel.apply import give_single_outputs

    built = build(shape(**KINDS["zaya"]), 1, DEVICE).to(BF16)
    give_single_outputs(built)
    batch = _on_device(micro(tokens().to(DEVICE)))
    block, x = built.blocks["1"], noise(2, 12, 32).requires_grad_()
    state = noise(2, 12, 16)
    weights = [parameter for parameter in block.parameters() if parameter.requires_grad]

    def out() -> Tensor:
        hidden, handed, _ = block(x, state, batch, built.rotary(batch.positions_S, torch.float32))
        return hidden + 0 * handed.sum()

    grad = noise(2, 12, 32)
    expected = torch.autograd.grad(out(), (x, *weights), grad)
    (found,), groups = stage_backward_input([out()], [grad], [x], iter(weights))
    stage_backward_weight(iter(weights), groups)
    assert found is not None and off(found, expected[0]) < CLOSE
    for weight, one in zip(weights, expected[1:], strict=True):
        assert weight.grad is not None and off(weight.grad, one) < CLOSE
