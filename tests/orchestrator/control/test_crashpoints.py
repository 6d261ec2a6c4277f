"""Some of the crash points, with every hardship; `python -m tests.orchestrator.crashpoints` plays all."""

from __future__ import annotations

import pytest

from tests.orchestrator.crashpoints import HARDSHIPS, configuration, play

pytestmark = [pytest.mark.sim, pytest.mark.timeout(120)]

EVERY = 19


@pytest.fixture(scope="module")
def points() -> list[str]:
    wrong, points = play(configuration(), -1, "alone")
    assert not wrong
    return points


def test_there_are_many_points_of_every_kind(points: list[str]) -> None:
    kinds = {point.split(" of ")[0] for point in points}
    assert len(points) >= 140
    assert {"before an append", "in an append", "after an append", "before queue.json", "after started", "before stopped",
            "after released", "before watched", "after reserved"} <= kinds  # fmt: skip


@pytest.mark.parametrize("hardship", HARDSHIPS)
def test_a_run_ends_alike_wherever_its_controller_dies(points: list[str], hardship: str) -> None:
    config = configuration()
    start = HARDSHIPS.index(hardship)
    wrong = {i: found for i in range(start, len(points), EVERY) if (found := play(config, i, hardship)[0])}
    assert not wrong, {f"{i} {points[i]}": found for i, found in wrong.items()}
