"""Gradients of several micro-batches are those of a cast and an addition each, bit for bit, and less is kept and moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from configs.compose import compose
from configs.rank import RankContext
from configs.schema import RunConfig
from tests.collectives.ranks import together
from tests.trainer.families import batches, family
from tests.trainer.model.interpreter import import_interpreted
from trainer.engines.native import NativeEngine
from trainer.kernels import choice
from trainer.parallel import accumulate, apply, resident
from trainer.parallel.mesh import assemble, join

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16
MICROS, STEPS = 3, 2


@dataclass(frozen=True)
class AccumulateCase:
    """A layout, and whether FSDP has all weights there."""

    layout: tuple[str, ...] = ()
    wrapped: bool = False


CASES = {
    1: [AccumulateCase(), AccumulateCase(("zero=1",), wrapped=True)],
    2: [AccumulateCase(("dp=2", "zero=1")), AccumulateCase(("dp=2", "zero=1", "ep=2"), wrapped=True),
        AccumulateCase(("dp=2", "zero=2")), AccumulateCase(("tp=2", "ep=2")), AccumulateCase(("pp=2",)),
        AccumulateCase(("pp=2", "schedule=zbv"))],
}  # fmt: skip


def config_of(case: AccumulateCase) -> RunConfig:
    words = [f"parallel.{word}" for word in ("dp=1", "zero=2", *case.layout)]
    samples = 2 * MICROS if "dp=2" in case.layout else MICROS
    config = compose(
        ["model=demo", "hardware=cpu", "train.engine=native", "train.precision=bf16", "train.micro_batch=1",
         f"train.global_batch={samples}", "optim.lr=0.01", "optim.warmup_steps=0", "data.sequence=32", *words]
    )  # fmt: skip
    return config.model_copy(update={"model": family("qwen3")})


def cast_and_add(self: Any, name: str, parameter: Tensor) -> None:
    """What weights outside of FSDP did before: the first is cast, and what follows added to it."""
    if self._several and parameter.grad is not None:
        wide = parameter.grad.float()
        self._sums[name] = self._sums[name] + wide if name in self._sums else wide
        parameter.grad = None


@contextmanager
def librarys() -> Iterator[None]:
    with (
        mock.patch.object(apply, "defer_first_cast", lambda _: None),
        mock.patch.object(resident.Resident, "_add", cast_and_add),
    ):
        yield


def kept(engine: NativeEngine) -> int:
    """Bytes of gradients that wait for the next micro-batch."""
    tensors = [one for each in engine._residents for one in each._sums.values()]
    for stage in engine._stages:
        groups = {
            group for module in apply.sharded(stage) for group in accumulate.groups(module._get_fsdp_state())
        }
        tensors += [p.unsharded_accumulated_grad for group in groups for p in group.fsdp_params]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def trained(config: RunConfig, mesh: Any) -> tuple[list[Any], list[float]]:
    """Losses, norms and the state after some steps; and bytes that were kept, by element, before each phase of a step."""
    engine, results, waiting = NativeEngine(config, mesh), [], []
    elements = sum(p.numel() for stage in engine._stages for p in stage.parameters())

    def phase(name: str) -> Any:
        if name == "forward":
            waiting.append(kept(engine) / elements)
        return nullcontext()

    for step in range(STEPS):
        given = batches(
            step, config.train.global_batch, 1, engine.data_parallel.index, engine.data_parallel.size
        )
        result = engine.step(given, config.train.global_batch, 0.01, phase)
        results += [float(result.loss), float(result.grad_norm)]
    return [*results, {part.name: part.tensor.clone() for part in engine.state()}], waiting


def both(rank: RankContext) -> list[Any]:
    """By case: results of either way, and what was kept on ours and the library's."""
    torch.set_num_threads(1)
    cases = CASES[rank.world]
    first, made = join(config_of(cases[0]), rank, torch.device("cpu")), []
    for case in cases:
        config = config_of(case)
        mesh = assemble(config, rank.rank, rank.world, first.device, first.control_group, first.network)
        with mock.patch.object(resident, "whole", lambda *_: set()) if case.wrapped else nullcontext():
            ours = trained(config, mesh)
            with librarys():
                made.append((case, ours, trained(config, mesh)))
    return made


def same(ours: list[Any], theirs: list[Any]) -> bool:
    *numbers, state = ours
    *others, expected = theirs
    return numbers == others and all(state[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("world", CASES)
def test_sums_are_the_librarys_and_the_first_gradient_waits_in_bf16(world: int, tmp_path: Path) -> None:
    for rank in together(world, tmp_path, both):
        for case, (ours, waiting), (theirs, before) in rank:
            assert same(ours, theirs), case
            if "zero=2" in case.layout:
                continue  # what FSDP has is reduced behind each micro-batch
            # A pipeline mixes its micro-batches: it has one phase.
            expected = [0.0] * STEPS if "pp=2" in case.layout else [0.0, 2.0, 4.0] * STEPS
            assert waiting == expected, case
            assert before == [4.0 if each else 0.0 for each in expected], case


# ---- what a micro-batch leaves out ----


class Pair(nn.Module):
    """Two weights, of which a micro-batch may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.one, self.other = (nn.Parameter(torch.randn(6, 4, generator=generator)) for _ in range(2))

    def forward(self, x: Tensor, used: str) -> Tensor:
        parts = [x @ weight.t() for name, weight in self.named_parameters() if name in used]
        return torch.stack(parts).float().square().sum()


def left_out(rank: RankContext) -> list[Tensor]:
    """Gradients of both weights, by FSDP as it is and with ours; both are used at first, and then one alone."""
    join(config_of(CASES[rank.world][0]), rank, torch.device("cpu"))
    gradients = []
    for late in (False, True):
        module: Any = fully_shard(
            Pair(), mesh=init_device_mesh("cpu", (rank.world,)), reshard_after_forward=False,
            mp_policy=MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32),
        )  # fmt: skip
        if late:
            accumulate.defer_first_cast(module)
        for turn, used in enumerate((("one", "other"), ("one",), ("one",))):
            module.set_requires_gradient_sync(turn == 2)
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(turn))
            module(x.bfloat16(), used).backward()
        gradients += [weight.grad.to_local() for weight in module.parameters()]
    return gradients


@pytest.mark.parametrize("world", [1, 2])
def test_a_weight_that_later_micro_batches_leave_out_is_reduced_with_the_others(
    world: int, tmp_path: Path
) -> None:
    for one, other, ours, others in together(world, tmp_path, left_out):
        assert ours.equal(one) and others.equal(other)
        assert other.abs().sum() > 0


def test_a_torch_whose_fsdp_has_other_names_keeps_its_own_way() -> None:
    class Known:
        unsharded_accumulated_grad = None
        to_accumulated_grad_if_needed = accumulate_unsharded_grad_if_needed = None

    class Unknown:
        unsharded_accumulated_grad = to_accumulated_grad_if_needed = None

    parameters = [Known(), Unknown()]
    state = SimpleNamespace(_fsdp_param_group=SimpleNamespace(fsdp_params=parameters))
    with mock.patch.object(accumulate, "fully_shard", SimpleNamespace(state=lambda _: state)):
        for _ in range(2):  # modules of one unit share their groups
            accumulate.defer_first_cast(nn.Linear(1, 1))  # type: ignore[arg-type]
    assert isinstance(parameters[0], accumulate._DeferredCast)
    assert type(parameters[1]) is Unknown


# ---- bytes ----


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if find_spec("triton") is None or (DEVICE == "cpu" and not import_interpreted()):
        pytest.skip("kernels need triton; on a CPU it interprets them")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice.why_not.cache_clear()
    yield
    choice.why_not.cache_clear()


class Moved(TorchDispatchMode):
    """Counts bytes that operators on fp32 tensors read and write; allocations move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in (*args, result) if isinstance(one, Tensor)]
        if "empty" not in str(func) and any(one.dtype == torch.float32 for one in tensors):
            self.bytes += sum(one.nbytes for one in tensors)
        return result


def test_the_first_gradient_isnt_moved_and_each_later_one_in_one_pass(kernels: None) -> None:
    """In bytes of an element: none; 2 and 2 read and 4 written; 4 and 2 read and 4 written."""
    from trainer.kernels import accumulate as kernel

    weight = nn.Parameter(torch.zeros(choice.LEAST + 5, dtype=BF16, device=DEVICE))
    module = nn.ParameterDict({"weight": weight})
    masters = {"weight": weight.detach().float()}
    sums = resident.Resident(module, masters, [], SimpleNamespace(size=1))  # type: ignore[arg-type]
    sums.begin(MICROS)
    moved, own, each = Moved(), kernel.add, []

    def counted(earlier: Tensor, gradient: Tensor) -> Tensor:
        before = moved.bytes + earlier.nbytes + gradient.nbytes
        out = own(earlier, gradient)
        moved.bytes = before + out.nbytes  # and not what an interpreter moves
        return out

    gradients = [torch.randn(weight.shape, device=DEVICE).to(BF16) for _ in range(MICROS)]
    with mock.patch.object(kernel, "add", counted):
        for gradient in gradients:
            weight.grad = gradient.clone()
            with moved:
                sums._add("weight", weight)
            each.append(moved.bytes / weight.numel())
            assert weight.grad is None
    assert each == [0, 8, 8 + 10]
    expected = gradients[0].float() + gradients[1].float() + gradients[2].float()
    taken = sums.take()["weight"]
    assert taken is not None and taken.equal(expected)


def test_what_one_micro_batch_of_several_used_is_taken_in_fp32() -> None:
    weight = nn.Parameter(torch.zeros(5, dtype=BF16))
    module = nn.ParameterDict({"weight": weight})
    sums = resident.Resident(module, {"weight": weight.float()}, [], SimpleNamespace(size=1))  # type: ignore[arg-type]
    for micros, dtype in ((1, BF16), (2, torch.float32)):
        sums.begin(micros)
        (weight * torch.arange(5).to(BF16)).sum().backward()
        taken = sums.take()["weight"]
        assert taken is not None and taken.dtype == dtype and taken.tolist() == [0, 1, 2, 3, 4]


def test_the_kernels_sum_is_fp32s(kernels: None) -> None:
    """To the last bit, subnormal numbers and infinities too, whatever the length; strides that differ are torch's."""
    for elements in (1, 2047, 4101):
        one = torch.randn(elements, device=DEVICE).to(BF16)
        other = (
            torch.randn(elements, device=DEVICE) * 2.0 ** torch.randint(-40, 9, (elements,), device=DEVICE)
        ).to(BF16)
        if elements > 4:
            # The interpreter takes subnormal numbers of bf16 for others.
            small = 1e-39 if DEVICE == "cuda" else 1e-37
            one[:4] = torch.tensor([small, -0.0, torch.inf, 2e38])
            other[:4] = torch.tensor([-2 * small, -0.0, 1.0, 1e38])
        expected = one.float() + other.float()
        with mock.patch.object(accumulate, "LEAST", 1):
            sum_ = accumulate.accumulate(one, other)
        assert sum_.dtype == torch.float32 and sum_.equal(expected)
        assert sum_.signbit().equal(expected.signbit())
        again = accumulate.accumulate(sum_, one)
        assert again is sum_ and again.equal(expected + one.float())
    one, other = (torch.randn(shape, device=DEVICE).to(BF16) for shape in ((40, 30), (30, 40)))
    with mock.patch.object(accumulate, "LEAST", 1):
        assert accumulate.accumulate(one.t(), other).equal(one.t().float() + other.float())
