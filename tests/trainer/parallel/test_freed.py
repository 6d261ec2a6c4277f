"""What a step made is gone when it is over, without the garbage collector, which a run turns off between its pauses."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from configs.compose import compose
from configs.schema import RunConfig
from tests.trainer.families import batches
from tests.trainer.parallel import seam_checks
from tests.trainer.parallel.rank_pool import RankPool
from trainer.engines.native import NativeEngine
from trainer.parallel.exchange import Flight

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]
SAMPLES, STEPS = 4, 3


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.end()


def _config(recompute: str) -> RunConfig:
    """Tokens are gathered; recomputation stops in the shared expert, where the exchange has begun and not ended."""
    return compose(
        ["model=demo", "hardware=cpu", "train.engine=native", "train.micro_batch=1", f"train.global_batch={SAMPLES}",
         "data.sequence=32", "train.precision=fp32", "model.layers=2", "model.top_k=2", "model.shared_width=16",
         "model.router.balance=bias", "parallel.dp=2", "parallel.ep=2", f"train.recompute={recompute}"]
    )  # fmt: skip


def _alive(rank: int, world: int, store: Any, recompute: str) -> list[Counter[str]]:
    """Flights and tensors after each step."""
    config, counts = _config(recompute), []
    with seam_checks.met(rank, world, store, dp=2, ep=2) as mesh:
        engine = NativeEngine(config, mesh)
        gc.collect()
        gc.disable()
        try:
            for step in range(STEPS):
                given = batches(step, SAMPLES, 1, engine.place.index, engine.place.size)
                engine.step(given, SAMPLES, 1e-4, lambda _phase: nullcontext())
                del given
                kinds = [type(one) for one in gc.get_objects()]
                counts.append(Counter({
                    "flights": sum(kind is Flight for kind in kinds),
                    "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds),
                }))  # fmt: skip
        finally:
            gc.enable()
    return counts


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_leaves_nothing(ranks: RankPool, recompute: str) -> None:
    for counts in ranks.run(2, _alive, recompute):
        assert [one["flights"] for one in counts] == [0] * STEPS
        # One may come or go with a thread that is late; an exchange that stays alive brings a dozen a step.
        assert abs(counts[2]["tensors"] - counts[1]["tensors"]) < 4
