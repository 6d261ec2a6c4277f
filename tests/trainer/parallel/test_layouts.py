"""The quick grid of layouts, and a run that is stopped and resumed at changing dp."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer import grid, stop_and_go

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


def test_the_quick_grid_trains_what_one_process_trains() -> None:
    todo = grid.quick()
    assert {case.family for case in todo} == set(grid.FAMILIES)
    for axis in ("dp", "tp", "cp", "pp", "ep", "etp"):
        assert any(case.layout.get(axis, 1) > 1 for case in todo), axis
    told: list[str] = []
    count, worst = grid.run(todo, grid.QUICK_STEPS, told.append)
    assert count == len(todo) and worst <= grid.TOLERANCE, "\n".join(told)


def test_the_grid_sees_a_difference() -> None:
    """A comparison that can't fail proves nothing: one loss off by 2e-5, one load off by two pairs."""
    line = (1.0, 2.0, [[3, 5]], 0)
    assert grid.difference([line], [line]) == 0.0
    assert grid.difference([(1.00002, 2.0, [[3, 5]], 0)], [line]) > grid.TOLERANCE
    assert grid.difference([(1.0, 2.0, [[5, 3]], 0)], [line]) == float("inf")
    assert grid.difference([(1.0, 2.0, [[3, 5]], 1)], [line]) == float("inf")
    for odd in (float("nan"), float("inf")):
        assert grid.difference([line, (odd, 2.0, [[3, 5]], 0)], [line, line]) == float("inf")
        assert grid.difference([(1.0, odd, [[3, 5]], 0)], [line]) == float("inf")


def test_a_stopped_run_sees_the_same_samples(tmp_path: Path) -> None:
    count, wrong = stop_and_go.study(tmp_path, steps=40, stops=2, seed=3)
    assert (count, wrong) == (40 * stop_and_go.BATCH, "")
