"""Generated and recorded routing: totals, shapes of the patterns, and what a cut leaves whole."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from collectives.ops import routing
from configs.fabric import Pattern

pytestmark = pytest.mark.unit

RANKS, EXPERTS, PAIRS, STEPS = 4, 16, 4096, 8


def loads(pattern: Pattern) -> list[routing.Loads]:
    return routing.generated(pattern, STEPS, RANKS, EXPERTS, PAIRS, np.random.default_rng(1))


@pytest.mark.parametrize("pattern", get_args(Pattern))
def test_every_rank_sends_all_its_pairs(pattern: Pattern) -> None:
    found = loads(pattern)
    assert len(found) == (1 if pattern == "balanced" else STEPS)
    for one in found:
        assert one.shape == (RANKS, EXPERTS) and one.min() >= 0
        assert (one.sum(axis=1) == PAIRS).all()
        between = routing.between_ranks(one)
        assert between.sum() == RANKS * PAIRS and (between.sum(axis=1) == PAIRS).all()
    assert all((a == b).all() for a, b in zip(found, loads(pattern), strict=True)), "the seed decides"


def test_what_is_hot_is_hot() -> None:
    assert routing.imbalance(loads("balanced")[0]) == 1
    expert = np.sum(loads("hot_expert"), axis=(0, 1))
    assert expert.argmax() == 0 and expert[0] == pytest.approx(4 * expert.mean(), rel=0.1)
    assert routing.imbalance(loads("hot_rank")[0]) == pytest.approx(4, rel=0.1)
    zipf = np.sum(loads("zipf"), axis=(0, 1))
    assert zipf[0] / zipf[7] == pytest.approx(8, rel=0.15)
    hottest = [int(one.sum(axis=0).argmax()) for one in loads("rotating")]
    assert hottest == list(range(STEPS))
    bursts = [
        routing.imbalance(one) > 1.3
        for one in routing.generated("bursty", 200, RANKS, EXPERTS, PAIRS, np.random.default_rng(2))
    ]
    assert 0.2 < np.mean(bursts) < 0.6, "some steps burst, and some don't"


@pytest.mark.parametrize("imbalance", [1.0, 1.25, 2.0, 4.0])
def test_the_curve_has_the_imbalance_it_says(imbalance: float) -> None:
    assert routing.imbalance(routing.skewed(imbalance, RANKS, EXPERTS, PAIRS)) == pytest.approx(
        imbalance, rel=0.01
    )


def test_a_record_is_played_back_in_proportion() -> None:
    found = routing.recorded([100, 0, 300, 7], 2, 1000)
    assert found.shape == (2, 4) and (found.sum(axis=1) == 1000).all()
    assert found[0].tolist() == [246, 0, 737, 17]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_chunks_add_up(parts: int) -> None:
    whole = loads("zipf")[0]
    cut = routing.split_loads(whole, parts)
    assert len(cut) == parts and (sum(cut) == whole).all()
    assert max(int(np.abs(one * parts - whole).max()) for one in cut) <= parts


def test_a_run_without_a_record_is_refused(tmp_path: Path) -> None:
    from collectives.studies.moe import recorded_loads
    from configs.errors import UserError
    from configs.metrics import MetricWriter
    from configs.paths import RunPaths
    from tests.orchestrator.fake_runtime import step_line

    with pytest.raises(UserError, match="holds no expert loads; name the folder of a training run"):
        recorded_loads(tmp_path, 2)
    writer = MetricWriter(RunPaths(tmp_path).attempt(1).metrics)
    line = step_line(1, 1, 0.0)
    writer.write(line)
    writer.write(line)
    experts = len(line.expert_load[0])
    assert recorded_loads(tmp_path, experts) == [[2 * n for n in layer] for layer in line.expert_load]
    with pytest.raises(UserError, match=f"has {experts} experts a layer, and model.experts=3"):
        recorded_loads(tmp_path, 3)
