"""Each kernel against the same in fp64, forward and gradients: on a GPU, or else by Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import ModelConfig
from tests.trainer.model.interpreter import import_interpreted
from tests.trainer.model.small_models import micro, shape, tokens
from trainer.kernels import choice
from trainer.model.decoder import inputs
from trainer.model.initial import build
from trainer.model.seams import Tally

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if find_spec("triton") is None or (DEVICE == "cpu" and not import_interpreted()):
    pytest.skip("kernels need triton; on a CPU it interprets them", allow_module_level=True)
pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

BF16 = torch.bfloat16
CLOSE = 8e-3
"""Relative error of a result that is rounded to bf16 once or twice; the interpreter cuts off where a GPU rounds."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice.why_not.cache_clear()
    torch.manual_seed(0)
    yield
    choice.why_not.cache_clear()


def noise(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def off(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - expected.double()).norm() / (expected.double().norm() + 1e-30))


def check(
    kernel: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    limit: float = CLOSE,
) -> None:
    """Result and gradients of a kernel, against what fp64 gives of the same numbers."""
    given = [leaf.detach().requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found, expected = kernel(*given), exact(*wide)
    assert off(found, expected) < limit
    grad = torch.randn(found.shape, device=DEVICE).to(found.dtype)
    ours = torch.autograd.grad((found * grad).sum(), given)
    theirs = torch.autograd.grad((expected * grad.double()).sum(), wide)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype is not torch.float64
        assert off(one, other) < limit


class RoutedPairs:
    """Tokens and their pairs in the order of experts, two of the pairs dropped."""

    def __init__(self, top_k: int) -> None:
        self.tokens, self.top_k, experts = 37, top_k, 5
        self.chosen_TK = torch.rand(self.tokens, experts, device=DEVICE).topk(top_k).indices
        self.chosen_TK[3, 0] = self.chosen_TK[7, -1] = -1
        flat_R = self.chosen_TK.flatten()
        self.order_R = torch.where(flat_R < 0, experts, flat_R).argsort(stable=True)
        back_R = torch.empty_like(self.order_R)
        back_R[self.order_R] = torch.arange(flat_R.numel(), device=DEVICE)
        self.plain_TK = back_R.view(self.tokens, top_k)
        self.kept_TK1 = (self.chosen_TK >= 0).unsqueeze(-1)
        self.back_TK = self.plain_TK.masked_fill(self.chosen_TK < 0, -1)
        self.kept_R1 = (flat_R[self.order_R] >= 0).unsqueeze(-1)


@pytest.mark.parametrize("top_k", (1, 3))
@pytest.mark.parametrize("width", (80, 1040, 3000))
def test_rows_are_spread_collected_and_weighed(top_k: int, width: int) -> None:
    from trainer.kernels import rows

    at = RoutedPairs(top_k)
    count = at.tokens * top_k
    check(
        lambda x: rows.dispatch(x, at.back_TK, count).masked_fill(~at.kept_R1, 0.0),
        lambda x: x[at.order_R // top_k] * at.kept_R1,
        [noise(at.tokens, width)],
    )
    check(
        lambda y: rows.combine(at.back_TK, y.masked_fill(~at.kept_R1, 0.0)),
        lambda y: (y[at.plain_TK] * at.kept_TK1).sum(1),
        [noise(count, width)],
    )
    check(
        lambda y, w: rows.combine_weighted(y * at.kept_R1, w, at.back_TK, at.order_R),
        lambda y, w: (y[at.plain_TK] * at.kept_TK1 * w.unsqueeze(-1)).sum(1),
        [noise(count, width), torch.rand(at.tokens, top_k, device=DEVICE)],
    )


@pytest.mark.parametrize(("first", "experts"), [(0, 5), (2, 2), (3, 1)])
@pytest.mark.parametrize(("tokens", "top_k"), [(37, 3), (2000, 1), (1, 2)])
def test_pairs_are_sorted_by_expert(first: int, experts: int, tokens: int, top_k: int) -> None:
    """Against a stable sort, with dropped pairs and experts that are elsewhere."""
    from trainer.kernels.sorting import row_weights, sort_pairs

    chosen = torch.rand(tokens, 5, device=DEVICE).topk(top_k).indices
    chosen[tokens // 2, 0] = -1
    weights = torch.rand(tokens, top_k, device=DEVICE).requires_grad_()
    for given in (chosen, chosen.to(torch.int32)):
        at = sort_pairs(given, weights, first, experts)
        local = chosen.flatten() - first
        local = torch.where((local >= 0) & (local < experts), local, experts)
        order = local.argsort(stable=True)[: int((local < experts).sum())]
        total = int(at.total)
        assert total == len(order)
        assert at.counts_L.equal(local.bincount(minlength=experts + 1)[:experts])
        assert at.ends_L.equal(at.counts_L.cumsum(0, dtype=torch.int32))
        assert at.pair_P[:total].equal(order.to(torch.int32))
        back = torch.full((tokens * top_k,), -1, dtype=torch.int32, device=DEVICE)
        back[order] = torch.arange(total, dtype=torch.int32, device=DEVICE)
        assert at.back_TK.flatten().equal(back)
        mine = row_weights(weights, at, total)
        assert mine.equal(weights.flatten()[order])
        grad = torch.rand(total, device=DEVICE)
        expected = torch.zeros(tokens * top_k, device=DEVICE)
        expected[order] = grad
        (found,) = torch.autograd.grad(mine, weights, grad)
        assert found.flatten().equal(expected)


@pytest.mark.parametrize(("sources", "experts"), [(2, 3), (1, 4), (4, 1), (3, 5)])
def test_rows_that_came_by_source_are_put_in_the_order_of_experts(sources: int, experts: int) -> None:
    """Against a stable sort of each row's expert; blocks of no row, and of more than the programs take at once."""
    from trainer.kernels.sorting import regroup_by_expert

    incoming = torch.randint(0, 40, (sources, experts), device=DEVICE)
    incoming[-1, 0] = 0
    incoming[0, -1] = 9000
    total = int(incoming.sum())
    labels = torch.arange(experts, device=DEVICE).repeat(sources).repeat_interleave(incoming.flatten())
    order, back, ends = regroup_by_expert(incoming, total)
    assert ends.equal(incoming.sum(dim=0).cumsum(0, dtype=torch.int32))
    assert order.equal(labels.argsort(stable=True).to(torch.int32))
    assert back[order.long()].equal(torch.arange(total, dtype=torch.int32, device=DEVICE))
    none, nowhere, ends = regroup_by_expert(torch.zeros_like(incoming), 0)
    assert len(none) == len(nowhere) == 0 and not ends.any()


def test_rows_of_no_expert_may_hold_anything() -> None:
    from trainer.kernels import rows

    at = RoutedPairs(3)
    y = noise(at.tokens * 3, 48).masked_fill(~at.kept_R1, math.nan).requires_grad_()
    w = torch.rand(at.tokens, 3, device=DEVICE, requires_grad=True)
    for out in (rows.combine(at.back_TK, y), rows.combine_weighted(y, w, at.back_TK, at.order_R)):
        assert out.isfinite().all()
    (grad,) = torch.autograd.grad(rows.combine_weighted(y, w, at.back_TK, at.order_R).sum(), w)
    assert grad.isfinite().all() and (grad[at.chosen_TK < 0] == 0).all()


def test_spreading_leaves_rows_that_none_names_alone() -> None:
    """A write for a pair without a row would land before the first."""
    from trainer.kernels import rows

    memory, x = torch.full((4, 40), 7.0, device=DEVICE, dtype=BF16), noise(2, 40)
    back = torch.tensor([[2, -1], [-1, 0]], device=DEVICE, dtype=torch.int32)
    rows._dispatch[(1, 1)](x, back, memory[1:], 2, 40, TOP=2, TOKENS=4, COLUMNS=64)
    assert memory[3].equal(x[0]) and memory[1].equal(x[1]) and memory[2].eq(7).all() and memory[0].eq(7).all()


@pytest.mark.parametrize("width", (48, 1500))
def test_gated_activations(width: int) -> None:
    from trainer.kernels import activation

    check(
        lambda both, w: activation.swiglu_joint(both, w),
        lambda both, w: F.silu(both[:, :width]) * both[:, width:] * w[:, None],
        [noise(33, 2 * width), torch.rand(33, device=DEVICE)],
    )
    check(
        activation.swiglu_joint,
        lambda both: F.silu(both[:, :width]) * both[:, width:],
        [noise(33, 2 * width)],
    )
    check(activation.swiglu, lambda gate, up: F.silu(gate) * up, [noise(2, 9, width), noise(2, 9, width)])


def turned(x: Tensor, cos: Tensor, sin: Tensor, head: int) -> Tensor:
    """Rotation of [B, S, heads * head] by halves of the first 2P of each head."""
    pairs = cos.shape[1]
    first, second, rest = x.unflatten(-1, (-1, head)).split((pairs, pairs, head - 2 * pairs), -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((first * c - second * s, second * c + first * s, rest), -1).flatten(-2)


@pytest.mark.parametrize(("norm", "turn"), [(True, False), (False, True), (True, True)])
def test_norms_and_rotations(norm: bool, turn: bool) -> None:
    from trainer.kernels.norm import Rotation, norm_rotary

    pairs = 8
    angle = torch.randn(10, pairs, device=DEVICE)
    cos, sin = angle.cos(), angle.sin()
    for per_token, width in ((1, 48), (3, 16)):
        rotation = Rotation(cos, sin, per_token, 16) if turn else None

        def exact(x: Tensor, *weight: Tensor) -> Tensor:
            y = F.rms_norm(x, (x.shape[-1],), *weight, eps=1e-5) if norm else x  # noqa: B023
            return turned(y.flatten(2), cos, sin, 16).view_as(y) if turn else y

        leaves = [noise(2, 10, per_token, width)] + [noise(width)] * norm
        check(lambda x, w=None: norm_rotary(x, w, 1e-5, rotation), exact, leaves)  # noqa: B023


@pytest.mark.parametrize("added", (True, False))
def test_a_norm_with_the_residual_sum_before_it(added: bool) -> None:
    from trainer.kernels.norm import add_norm

    def exact(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        total = x + y if added else x + 0 * y
        return torch.cat((F.rms_norm(total, (40,), w, eps=1e-5), total))

    check(
        lambda x, y, w: torch.cat(add_norm(x, y, w, 1e-5) if added else add_norm(x + 0 * y, None, w, 1e-5)),
        exact,
        [noise(700, 40), noise(700, 40), noise(40)],
    )


@pytest.mark.parametrize("apart", [False, True])
def test_layers_beside_each_other(apart: bool) -> None:
    """Also where the gradients of the weights come later than that of what goes in."""
    from torch import nn

    from trainer.model.deferred import DeferredWeight
    from trainer.model.joint_linear import joint_linear

    layers = [nn.Linear(24, width, bias=False, device=DEVICE, dtype=BF16) for width in (8, 16, 8)]
    x = noise(2, 5, 24).requires_grad_()
    wide = x.detach().double().requires_grad_()
    deferred = [DeferredWeight(layer.weight) for layer in layers] if apart else []
    found = torch.cat(joint_linear(x, layers, deferred), -1)
    expected = torch.cat([F.linear(wide, layer.weight.detach().double()) for layer in layers], -1)
    grad = noise(*found.shape)
    assert off(found, expected) < CLOSE
    ours = torch.autograd.grad((found * grad).sum(), (x, *(layer.weight for layer in layers)))
    (theirs,) = torch.autograd.grad((expected * grad.double()).sum(), wide)
    assert off(ours[0], theirs) < CLOSE
    for part, one in zip(grad.split((8, 16, 8), dim=-1), ours[1:], strict=True):
        assert off(one, part.double().flatten(0, 1).t() @ x.detach().double().flatten(0, 1)) < CLOSE


def test_a_long_norms_weight_gets_every_rows_part() -> None:
    from trainer.kernels.norm import norm_rotary

    check(
        lambda x, w: norm_rotary(x, w, 1e-5, None),
        lambda x, w: F.rms_norm(x, (24,), w, eps=1e-5),
        [noise(1500, 24), noise(24)],
    )


@pytest.mark.parametrize("vocabulary", (300, 5000))
def test_cross_entropy(vocabulary: int) -> None:
    from trainer.kernels.loss import linear_cross_entropy

    targets = torch.randint(vocabulary, (9,), device=DEVICE)
    targets[2], targets[5], targets[7] = -1, 0, vocabulary - 1
    leaves = [noise(9, 32), (noise(vocabulary, 32).float() * 0.3).to(BF16)]
    check(
        lambda x, w: linear_cross_entropy(x, w, targets) * 0.25,
        lambda x, w: F.cross_entropy(x @ w.t(), targets, reduction="sum", ignore_index=-1) * 0.25,
        leaves,
        limit=1e-2,  # gradients are rounded twice
    )
    with torch.no_grad():
        assert (
            off(
                linear_cross_entropy(*leaves, targets),
                F.cross_entropy(
                    (leaves[0] @ leaves[1].t()).double(), targets, reduction="sum", ignore_index=-1
                ),
            )
            < 1e-5
        )


def test_a_losss_grad_is_not_rounded() -> None:
    """torch would take 1/3 as bf16 has it, 0.2 % off, for all gradients alike; so does the interpreter with results."""
    from trainer.kernels.loss import linear_cross_entropy

    x, w = noise(64, 32).requires_grad_(), noise(300, 32).requires_grad_()
    targets = torch.randint(300, (64,), device=DEVICE)
    once = torch.autograd.grad(linear_cross_entropy(x, w, targets), (x, w))
    third = torch.autograd.grad(linear_cross_entropy(x, w, targets) / 3, (x, w))
    for one, other in zip(once, third, strict=True):
        ratio = (one.double() * other.double()).sum() / one.double().square().sum()
        assert abs(float(ratio) * 3 - 1) < (4e-4 if DEVICE == "cuda" else 4e-3)


@pytest.mark.parametrize("vocabulary", (300, 20000))
def test_parts_of_a_vocabulary_make_the_whole_loss_and_its_grads(vocabulary: int) -> None:
    """Three parts, the last with logits far above the others; targets in each, at the edges of one, and one that doesn't
    count."""
    from trainer.kernels.loss import logits_to_grads, partial_logsumexp

    logits = noise(9, 3 * vocabulary)
    logits[:, 2 * vocabulary + 7] *= 9
    targets = torch.tensor(
        [0, vocabulary - 1, vocabulary, -1, 2 * vocabulary - 1, 2 * vocabulary, 3 * vocabulary - 1, 5, 2 * vocabulary + 7],
        device=DEVICE,
    )  # fmt: skip
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none", ignore_index=-1)
    expected.sum().backward()
    pieces = [one.contiguous() for one in logits.chunk(3, dim=1)]
    firsts = [0, vocabulary, 2 * vocabulary]
    parts = torch.stack(
        [partial_logsumexp(one, targets, first) for one, first in zip(pieces, firsts, strict=True)]
    )
    whole, own = parts[:, 0].logsumexp(0), parts[:, 1].sum(0)
    assert off(torch.where(targets >= 0, whole - own, 0.0), expected) < 1e-5
    for one, first in zip(pieces, firsts, strict=True):
        logits_to_grads(one, targets, first, whole)
    assert wide.grad is not None and off(torch.cat(pieces, 1), wide.grad) < CLOSE
    assert not torch.cat(pieces, 1)[3].any()
    assert partial_logsumexp(logits[:0], targets[:0], 0).shape == (2, 0)


@pytest.mark.parametrize("gradient", (BF16, torch.float32))
@pytest.mark.parametrize("moments", (BF16, torch.float32))
def test_adamw_is_torchs(gradient: torch.dtype, moments: torch.dtype) -> None:
    from trainer.kernels.adamw import update

    count = 5000
    master = noise(count, dtype=torch.float32)
    parameter = torch.nn.Parameter(master.clone())
    torchs = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    grad = noise(count, dtype=gradient)
    mean, square = (torch.zeros(count, dtype=moments, device=DEVICE) for _ in range(2))
    cast = torch.zeros(count, dtype=BF16, device=DEVICE)
    for step in (1, 2, 3):
        parameter.grad = grad.float() * 0.5
        torchs.step()
        numbers = torch.tensor([0.5, 0.0, 1 / (1 - 0.9**step), (1 - 0.95**step) ** -0.5], device=DEVICE)
        update((master, grad, mean, square, cast), numbers, (1e-3, 0.1), (0.9, 0.95, 1e-8))
    limit = 2e-6 if moments is torch.float32 else 2e-5
    assert (master - parameter).abs().max().item() < limit
    assert off(cast, master) < 4e-3
    before = master.clone(), mean.clone(), square.clone(), cast.clone()
    update((master, grad, mean, square, cast), torch.ones(4, device=DEVICE), (1e-3, 0.1), (0.9, 0.95, 1e-8))
    assert all(one.equal(other) for one, other in zip(before, (master, mean, square, cast), strict=True))


def test_squares() -> None:
    from trainer.kernels.adamw import squares

    tensors = [noise(5000), noise(70000, dtype=torch.float32), noise(1)]
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    assert off(squares(tensors), torch.as_tensor(exact)) < 1e-6


def tallies_as_in_fp64(model: ModelConfig, seed: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tally]:
    """Tallies of a model's forward and backward pass in bf16 with kernels and in fp64 without, once loss, choices and all
    gradients are seen to be equal, to what bf16 leaves of them.

    Args:
        seed: of weights for which bf16 sends no token another way, by torch's operators or by these; on a GPU, which rounds
            otherwise, one of the next five is taken where that one does.
    """
    for near in range(seed, seed + (6 if DEVICE == "cuda" else 1)):
        passes = _both_ways(model, near, monkeypatch)
        kernels, exact = passes["kernels"], passes["exact"]
        if all(counts.equal(kernels[2].counts[layer]) for layer, counts in exact[2].counts.items()):
            break
    else:
        pytest.fail("tokens go other ways than in fp64")
    assert abs(float(kernels[0] - exact[0])) < 0.02
    assert off(kernels[1], exact[1]) < 0.06
    return {name: tally for name, (_, _, tally) in passes.items()}


def _both_ways(
    model: ModelConfig, seed: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[Tensor, Tensor, Tally]]:
    """Loss, gradients and tally by kernels in bf16, and by torch in fp64."""
    given, passes = tokens().to(DEVICE), {}
    for name in ("kernels", "exact"):
        monkeypatch.setenv(choice.VARIABLE, "torch" if name == "exact" else "")
        choice.why_not.cache_clear()
        built = build(model, seed, DEVICE).to(BF16)
        for router in built.routers().values():
            router.bias.data = router.bias.float()
        built = built.double() if name == "exact" else built
        batch = micro(given)
        batch.positions_S.data = batch.positions_S.to(DEVICE)
        loss = built(inputs(batch), batch)
        loss.backward()
        grads = torch.cat([parameter.grad.double().flatten() for parameter in built.parameters()])
        passes[name] = loss, grads, batch.tally
    return passes


@pytest.mark.parametrize(
    "changes",
    [
        {
            "router": {"balance": "aux", "aux_coefficient": 0.02, "z_coefficient": 0.01},
            "qk_norm": "projection",
        },
        {"router": {"score": "sigmoid", "balance": "bias"}, "qk_norm": "head", "shared_width": 16},
        {"router": {"capacity_factor": 0.6, "balance": "none"}},
        {"router": {"balance": "none", "z_coefficient": 0.01}},
    ],
)
def test_a_model_trains_as_in_fp64(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, tallies and all gradients, to what bf16 leaves of them."""
    tallies = tallies_as_in_fp64(shape(**changes), 2 if "capacity_factor" in str(changes) else 1, monkeypatch)
    assert len(tallies["kernels"].losses) == len(tallies["exact"].losses)
    for one, other in zip(tallies["kernels"].losses, tallies["exact"].losses, strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-2)


def test_a_backward_pass_in_two_halves() -> None:
    """Zero-bubble schedules work weights' gradients out later, torch 2.11's from the sum of those of a node's results."""
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    from trainer.model.block import result_of
    from trainer.parallel.apply import give_single_outputs

    built = build(shape(kv_heads=4, router={"balance": "none"}, qk_norm="head"), 1, DEVICE).to(BF16)
    give_single_outputs(built)
    batch = micro(tokens().to(DEVICE))
    batch.positions_S.data = batch.positions_S.to(DEVICE)
    block, x = built.blocks["0"], noise(3, 12, 32).requires_grad_()
    weights = [parameter for parameter in block.parameters() if parameter.requires_grad]

    def out() -> Tensor:
        hidden, _, pending = block(x, None, batch, built.rotary(batch.positions_S, torch.float32))
        return hidden + result_of(pending)

    grad = noise(3, 12, 32)
    expected = torch.autograd.grad(out(), (x, *weights), grad)
    (found,), groups = stage_backward_input([out()], [grad], [x], iter(weights))
    stage_backward_weight(iter(weights), groups)
    assert found is not None and off(found, expected[0]) < CLOSE
    for weight, one in zip(weights, expected[1:], strict=True):
        assert weight.grad is not None and off(weight.grad, one) < CLOSE
