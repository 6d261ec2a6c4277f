"""What a step made is gone when it is over, without the garbage collector, which a run turns off between its pauses."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from configs.compose import compose
from configs.schema import RunConfig
from tests.trainer.families import batches
from tests.trainer.parallel import seam_checks
from tests.trainer.parallel.rank_pool import RankPool
from trainer.engines.native import NativeEngine
from trainer.parallel.exchange import AsyncCollective
from trainer.parallel.lending import Lending

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]
SAMPLES, STEPS = 4, 3


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.end()


def _config(recompute: str, lend: str) -> RunConfig:
    """Tokens are gathered; recomputation stops in the shared expert, where the exchange has begun and not ended."""
    return compose(
        ["model=demo", "hardware=cpu", "train.engine=native", "train.micro_batch=1", f"train.global_batch={SAMPLES}",
         "data.sequence=32", "train.precision=fp32", "model.layers=2", "model.top_k=2", "model.shared_width=16",
         "model.router.balance=bias", "parallel.dp=2", "parallel.ep=2", f"train.recompute={recompute}",
         f"parallel.lend_rows={lend}"]
    )  # fmt: skip


def _alive(rank: int, world: int, store: Any, recompute: str, lend: str) -> list[Counter[str]]:
    """Flights and tensors after each step."""
    config, counts = _config(recompute, lend), []
    with seam_checks.met(rank, world, store, dp=2, ep=2) as mesh:
        engine = NativeEngine(config, mesh)
        gc.collect()
        gc.disable()
        try:
            for step in range(STEPS):
                given = batches(step, SAMPLES, 1, engine.data_parallel.index, engine.data_parallel.size)
                engine.step(given, SAMPLES, 1e-4, lambda _phase: nullcontext())
                del given
                kinds = [type(one) for one in gc.get_objects()]
                counts.append(Counter({
                    "flights": sum(kind in (AsyncCollective, Lending) for kind in kinds),
                    "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds),
                }))  # fmt: skip
        finally:
            gc.enable()
    return counts


@pytest.mark.parametrize("lend", ["null", "1"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_leaves_nothing(ranks: RankPool, recompute: str, lend: str) -> None:
    for counts in ranks.run(2, _alive, recompute, lend):
        assert [one["flights"] for one in counts] == [0] * STEPS
        # One may come or go with a thread that is late; an exchange that stays alive brings a dozen a step.
        assert abs(counts[2]["tensors"] - counts[1]["tensors"]) < 4


def _kept(rank: int, world: int, store: Any, layout: dict[str, Any], precision: str) -> int:
    """Bytes of gradients that are left when a step is over."""
    words = [f"parallel.{name}={size}" for name, size in layout.items()]
    config = compose(
        ["model=demo", "hardware=cpu", "train.engine=native", "train.micro_batch=1", f"train.global_batch={SAMPLES}",
         "data.sequence=32", f"train.precision={precision}", "model.layers=2", *words]
    )  # fmt: skip
    with seam_checks.met(rank, world, store, **layout) as mesh:
        engine = NativeEngine(config, mesh)
        before = {
            id(one) for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.grad is not None
        }
        given = batches(0, SAMPLES, 1, engine.data_parallel.index, engine.data_parallel.size)
        engine.step(given, SAMPLES, 1e-4, lambda _phase: nullcontext())
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and id(one) not in before]
        held = [one.grad for one in tensors if one.grad is not None]
        held += [
            shard.compute_weight.gradient
            for shard in engine._shards
            if shard.compute_weight and shard.compute_weight.gradient is not None
        ]
        return sum(one.numel() * one.element_size() for one in held)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [{"dp": 2}, {"dp": 2, "zero": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_a_step_leaves_no_gradient(ranks: RankPool, layout: dict[str, Any], precision: str) -> None:
    """Kept, they would stand beside the next step's: four more bytes for each parameter of a rank."""
    assert ranks.run(2, _kept, layout, precision) == [0, 0]


def _received(rank: int, world: int, store: Any, schedule: str) -> list[int]:
    """Places for received activations that are alive as the batch grows by two micro-batches a step."""
    words = [f"parallel.schedule={schedule}", *["parallel.chunks=2"] * (schedule == "interleaved")]
    config = compose(
        ["model=demo", "hardware=cpu", "train.engine=native", "train.micro_batch=1", "train.global_batch=8",
         "data.sequence=32", "train.precision=fp32", "model.layers=4", "parallel.dp=1", "parallel.pp=2", *words]
    )  # fmt: skip
    counts = []
    with seam_checks.met(rank, world, store, pp=2) as mesh:
        engine = NativeEngine(config, mesh)
        gc.collect()
        gc.disable()
        try:
            for samples in (2, 4, 6, 8):
                given = batches(0, samples, 1, 0, 1)
                engine.evaluate(given[:2], 2)
                engine.step(given, samples, 1e-4, lambda _phase: nullcontext())
                stages = [one for one in gc.get_objects() if isinstance(one, PipelineStage)]
                counts.append(sum(len(one.args_recv_info) for one in stages))
        finally:
            gc.enable()
    return counts


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_a_batch_that_grows_leaves_no_memory_of_smaller_ones(ranks: RankPool, schedule: str) -> None:
    chunks = 1 if schedule == "1f1b" else 2
    for counts in ranks.run(2, _received, schedule):
        assert counts == [chunks * (samples + 2) for samples in (2, 4, 6, 8)], "two are evaluated"
