"""Whatever the sharding, the optimizers compute the same: gloo ranks against one process and against fp64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.trainer.optim.cases import (
    CONFIGS,
    CUTS,
    PARAMETERS,
    OptimRank,
    Saved,
    all_cases,
    gathered,
    together,
)
from tests.trainer.optim.maths import expected

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]
Results = dict[tuple[str, str], list[tuple[Saved, Saved]]]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By case, what each rank ends with."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    ranks = together(request.param, folder, "gloo", all_cases, "cpu")
    return {case: [rank[case] for rank in ranks] for case in ranks[0]}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("cut", CUTS)
def test_sharded_steps_equal_those_of_one_process(results: Results, kind: str, cut: str) -> None:
    alone = gathered([OptimRank.make(CONFIGS[kind]).go().saved()])
    sharded = gathered([straight for straight, _ in results[kind, cut]])
    assert sharded.keys() == alone.keys()
    for name, array in sharded.items():
        np.testing.assert_allclose(array, alone[name], rtol=0, atol=1e-6, err_msg=name)
    for name, array in expected(CONFIGS[kind]).items():
        np.testing.assert_allclose(sharded[name], array, rtol=0, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("cut", CUTS)
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(results: Results, kind: str, cut: str) -> None:
    for straight, resumed in results[kind, cut]:
        for (name, _, tensor), (_, _, again) in zip(straight, resumed, strict=True):
            assert tensor.equal(again), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_state_goes_on_at_another_sharding(results: Results, kind: str) -> None:
    saved = [straight for straight, _ in results[kind, "grid"]]
    alone = gathered([OptimRank.make(CONFIGS[kind]).go().saved()])
    again = gathered([OptimRank.make(CONFIGS[kind]).load(saved).saved()])
    assert again.keys() == alone.keys() > PARAMETERS.keys()
    for name, array in again.items():
        np.testing.assert_allclose(array, alone[name], rtol=0, atol=1e-6, err_msg=name)
