"""The update rules on one rank: against fp64, torch's own, and what a skipped step may do, which is nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from configs.training import OptimConfig
from tests.trainer.optim.cases import CONFIGS, PARAMETERS, SKIPPED, STEPS, WIDTH, OptimRank, gathered
from tests.trainer.optim.maths import expected
from trainer.optim import common, lamb
from trainer.optim.build import build
from trainer.optim.muon import orthogonalize
from trainer.optim.shards import Optimizer, ParameterShard, StagePeers
from trainer.state import Box

pytestmark = pytest.mark.dist

LOW = {kind: optim.model_copy(update={"moments": "bf16", "beta2": 0.95}) for kind, optim in CONFIGS.items()}


def shard(tensor: Tensor, kind: str, name: str = "w") -> ParameterShard:
    return ParameterShard(name, tensor, Box.full(tuple(tensor.shape)), kind, 0, 1)


def made(optim: OptimConfig, *shards: ParameterShard, width: int = WIDTH) -> Optimizer:
    listed = [(one.name, one.box, one.replica, one.replicas) for one in shards]
    return build(optim, width, shards, StagePeers(None, 0, 1, [listed]))


def number(value: float) -> Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize("kind", CONFIGS)
def test_steps_are_those_of_the_maths(kind: str) -> None:
    ends = gathered([OptimRank.make(CONFIGS[kind]).go().saved()])
    for name, array in expected(CONFIGS[kind]).items():
        np.testing.assert_allclose(ends[name], array, rtol=0, atol=3e-6, err_msg=name)
    assert ends["optimizer/step"] == STEPS - 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_scratch_of_any_size_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = gathered([OptimRank.make(LOW[kind]).go().saved()])
    monkeypatch.setitem(common._CHUNK_ELEMENTS, "cpu", 7)
    for name, array in gathered([OptimRank.make(LOW[kind]).go().saved()]).items():
        np.testing.assert_allclose(array, one[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("optim", [*CONFIGS.values(), *LOW.values()], ids=lambda o: f"{o.kind}-{o.moments}")
def test_a_skipped_step_leaves_every_bit(optim: OptimConfig) -> None:
    for start in (0, SKIPPED):
        rank = OptimRank.make(optim).go(0, start)
        signed = [one.tensor for one in rank.shards]
        signed += [tensor for part, tensor, _ in rank.optimizer.state() if part in ("exp_avg", "momentum")]
        for tensor in signed:
            tensor.view(-1)[0] = -0.0
        before = rank.saved()
        for bad in (math.nan, math.inf):
            for one in rank.shards:
                one.tensor.grad = torch.full_like(one.tensor, bad)
            rank.optimizer.step(0.1, number(bad), number(1.0))
        for (name, _, tensor), (_, _, after) in zip(before, rank.saved(), strict=True):
            assert tensor.equal(after) and tensor.signbit().equal(after.signbit()), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_factor_scales_gradients(kind: str) -> None:
    found = []
    for scale, factor in ((1.0, 0.25), (0.25, 1.0)):
        torch.manual_seed(0)
        shards = [shard(torch.randn(6, 4), "matrix"), shard(torch.randn(5), "vector", "v")]
        optimizer = made(CONFIGS[kind], *shards)
        for _ in range(2):
            for one in shards:
                one.tensor.grad = torch.randn_like(one.tensor) * scale
            optimizer.step(0.1, number(factor), number(0.0))
            for one in shards:
                one.tensor.grad = None
            optimizer.step(0.1, number(1.0), number(0.0))
        found.append([*(one.tensor for one in shards), *(t for _, t, _ in optimizer.state())])
    assert all(one.equal(two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_gradient_is_a_gradient_of_zeros(kind: str) -> None:
    found = []
    for later in (torch.zeros(6, 4), None):
        torch.manual_seed(0)
        one = shard(torch.randn(6, 4), "matrix")
        optimizer = made(CONFIGS[kind], one)
        for gradient in (torch.randn(6, 4), later):
            one.tensor.grad = gradient
            optimizer.step(0.1, number(1.0), number(0.0))
        found.append(one.tensor)
    assert found[0].equal(found[1])


def test_adamw_is_torchs_bit_for_bit() -> None:
    torch.manual_seed(0)
    optim = OptimConfig(weight_decay=0.2)
    shards = [
        shard(torch.randn(33, 47), "matrix"), shard(torch.randn(0, 5), "matrix", "none"),
        shard(torch.randn(65), "vector", "v"), shard(torch.randn(9, 7), "embedding", "e"),
    ]  # fmt: skip
    theirs = [torch.nn.Parameter(one.tensor.clone()) for one in shards]
    groups = [
        {"params": [p], "weight_decay": 0.2 if i == 0 else 0.0} for i, p in enumerate(theirs) if p.numel()
    ]
    torchs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    optimizer = made(optim, *shards)
    for step in range(20):
        for one, parameter in zip(shards, theirs, strict=True):
            parameter.grad = torch.randn_like(parameter)
            one.tensor.grad = parameter.grad.clone()
        for group in torchs.param_groups:
            group["lr"] = 0.1 / (step + 1)
        torchs.step()
        optimizer.step(0.1 / (step + 1), number(1.0), number(0.0))
    assert all(one.tensor.equal(parameter) for one, parameter in zip(shards, theirs, strict=True))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_wider_model_moves_its_matrices_less_and_decays_them_as_much_more(kind: str) -> None:
    ends = []
    for fields, lr in (({"base_width": 16, "weight_decay": 0.1}, 0.04), ({"weight_decay": 0.2}, 0.01)):
        torch.manual_seed(0)
        one = shard(torch.randn(6, 4), "matrix")
        one.tensor.grad = torch.randn(6, 4)
        made(OptimConfig(kind=kind, **fields), one, width=64).step(lr, number(1.0), number(0.0))  # type: ignore[arg-type]
        ends.append(one.tensor)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", CONFIGS)
def test_vectors_and_embeddings_have_neither_decay_nor_width(kind: str) -> None:
    ends = []
    for fields in ({"base_width": 16, "weight_decay": 0.3}, {"weight_decay": 0.0}):
        torch.manual_seed(0)
        shards = [shard(torch.randn(6, 4), "embedding"), shard(torch.randn(5), "vector", "v")]
        for one in shards:
            one.tensor.grad = torch.randn_like(one.tensor)
        made(OptimConfig(kind=kind, **fields), *shards).step(0.1, number(1.0), number(0.0))  # type: ignore[arg-type]
        ends.append([one.tensor for one in shards])
    assert all(one.equal(two) for one, two in zip(*ends, strict=True))


@pytest.mark.parametrize("kind", CONFIGS)
def test_bf16_moments_stay_near(kind: str) -> None:
    """Movement over 60 noisy steps differs by less than 1 % of itself, and by something."""
    ends = {}
    for moments in ("fp32", "bf16"):
        torch.manual_seed(0)
        shards = [shard(torch.randn(40, 30), "matrix"), shard(torch.randn(500), "vector", "v")]
        starts = [one.tensor.clone() for one in shards]
        optimizer = made(OptimConfig(kind=kind, moments=moments), *shards)  # type: ignore[arg-type]
        kept = {t.dtype for part, t, _ in optimizer.state() if part != "optimizer/step"}
        assert kept == {torch.bfloat16 if moments == "bf16" else torch.float32}
        mean = [torch.randn_like(one.tensor) for one in shards]
        for _ in range(60):
            for one, direction in zip(shards, mean, strict=True):
                one.tensor.grad = torch.randn_like(one.tensor) + 0.3 * direction
            optimizer.step(0.01, number(1.0), number(0.0))
        ends[moments] = [one.tensor - start for one, start in zip(shards, starts, strict=True)]
    for exact, near in zip(ends["fp32"], ends["bf16"], strict=True):
        assert 1e-4 < (near - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize(("kind", "field"), [("adamw", "beta2"), ("lamb", "beta1"), ("muon", "momentum")])
def test_a_bf16_moment_that_could_not_fall_is_refused(kind: str, field: str) -> None:
    with pytest.raises(
        ValidationError, match=rf"optim.{field}=0.999 with optim.moments=bf16: .* type optim.moments=fp32"
    ):
        OptimConfig(kind=kind, moments="bf16", **{field: 0.999})  # type: ignore[arg-type]
    OptimConfig(kind="adamw", moments="bf16", momentum=0.999)  # which AdamW hasn't
    moment = torch.ones((), dtype=torch.bfloat16)
    assert (moment.float() * 0.999).bfloat16() == moment and (moment.float() * 0.99).bfloat16() < moment


def test_muon_takes_matrices_to_nearly_orthogonal_ones() -> None:
    torch.manual_seed(0)
    for shape in ((3, 24, 40), (2, 40, 24), (1, 32, 32)):
        matrices = torch.randn(shape)
        left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
        inner = left.mT @ orthogonalize(matrices, 5).double() @ right.mT
        values = inner.diagonal(dim1=-2, dim2=-1)
        assert values.min() > 0.65 and values.max() < 1.25, shape
        torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=2e-5)
        # Less than it is from the orthogonal matrix itself, which is what `orthogonalize` promises of bf16.
        low = orthogonalize(matrices.bfloat16(), 5).double()
        assert (low - orthogonalize(matrices, 5)).norm() < 0.05 * low.norm() < (low - left @ right).norm()


def test_muon_treats_each_matrix_of_a_stack_alone() -> None:
    torch.manual_seed(0)
    stack, gradient = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    together = shard(stack.clone(), "matrix")
    together.tensor.grad = gradient.clone()
    made(CONFIGS["muon"], together).step(0.1, number(1.0), number(0.0))
    for lead in np.ndindex(3, 2):
        one = shard(stack[lead].clone(), "matrix")
        one.tensor.grad = gradient[lead].clone()
        made(CONFIGS["muon"], one).step(0.1, number(1.0), number(0.0))
        torch.testing.assert_close(one.tensor, together.tensor[lead], rtol=0, atol=1e-6)


def test_lambs_ratio_is_one_where_a_norm_is_zero() -> None:
    one = shard(torch.zeros(2, 3), "matrix")
    one.tensor.grad = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    still = shard(torch.ones(2, 3), "embedding", "e")
    made(CONFIGS["lamb"], one, still).step(0.1, number(1.0), number(0.0))
    torch.testing.assert_close(one.tensor, torch.tensor([[-0.1, 0.1, -0.1], [0.1, -0.1, 0.1]]))
    assert still.tensor.equal(torch.ones(2, 3))


def test_lambs_norms_keep_their_digits_over_millions() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(1 << 12, 1 << 10)
    (square,) = lamb._squares(tensor[None])
    assert square.item() == pytest.approx(tensor.double().square().sum().item(), rel=1e-7)


@pytest.mark.parametrize("optim", [*CONFIGS.values(), *LOW.values()], ids=lambda o: f"{o.kind}-{o.moments}")
def test_a_state_that_was_saved_goes_on_bit_for_bit(optim: OptimConfig) -> None:
    first = OptimRank.make(optim).go(0, 2)
    state = first.saved()
    names = {name for name, _, _ in state}
    assert "optimizer/step" in names and len(names) == len(state)
    if optim.kind == "muon":
        assert "wide.weight/momentum" in names and "wide.weight/exp_avg" not in names
    else:
        assert {"wide.weight/exp_avg", "wide.weight/exp_avg_sq"} < names
    assert "norm.weight/exp_avg_sq" in names and PARAMETERS.keys() < names
    straight, resumed = first.go(2).saved(), OptimRank.make(optim).load([state]).go(2).saved()
    assert all(one.equal(two) for (_, _, one), (_, _, two) in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_master_that_kernels_would_read_wrongly_is_refused(kind: str) -> None:
    box = Box.full((4, 6))
    for tensor in (torch.randn(6, 4).T, torch.randn(4, 6).bfloat16(), torch.randn(6, 4)):
        with pytest.raises(ValueError, match="the master of w is .* contiguous fp32 of its box's shape"):
            made(CONFIGS[kind], ParameterShard("w", tensor, box, "matrix", 0, 1))


def test_a_rank_may_have_nothing() -> None:
    for kind in CONFIGS:
        empty = ParameterShard("w", torch.zeros(0, 6), Box((4, 6), (4, 0), (0, 6)), "vector", 0, 1)
        for shards in ((), (empty,)):
            optimizer = made(CONFIGS[kind], *shards)
            optimizer.step(0.1, number(1.0), number(0.0))
            assert [t.item() for part, t, _ in optimizer.state() if part == "optimizer/step"] == [1.0]


def test_ranges_cover_all() -> None:
    assert list(common.chunk_ranges(7, 3)) == [(0, 3), (3, 6), (6, 7)] and not list(common.chunk_ranges(0, 3))
