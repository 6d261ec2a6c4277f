"""The plan of who orthogonalises which matrix: balanced, bounded, alike on all ranks."""

from __future__ import annotations

import pytest

from trainer.optim.common import check_names
from trainer.optim.routes import Route, find, plan
from trainer.optim.slots import StagePeers
from trainer.state import Box

pytestmark = pytest.mark.dist

Listed = list[tuple[str, Box, int, int]]


def plans(slots: list[Listed], limit: int = 1 << 20) -> list[list[Route]]:
    """Routes of all ranks; every slot is a matrix."""
    kinds = {name: "matrix" for listed in slots for name, *_ in listed}
    return [plan(StagePeers(None, rank, len(slots), slots), kinds, limit) for rank in range(len(slots))]


def split(name: str, rows: int, columns: int, ranks: int) -> list[Listed]:
    """A matrix whose rows are spread evenly."""
    part = rows // ranks
    return [[(name, Box((rows, columns), (rank * part, 0), (part, columns)), 0, 1)] for rank in range(ranks)]


def joined(*slots: list[Listed]) -> list[Listed]:
    return [sum(listed, []) for listed in zip(*slots, strict=True)]


def test_equal_matrices_are_owned_in_equal_numbers() -> None:
    slots = joined(*(split(f"w{i}", 8, 16, 4) for i in range(12)))
    routes = plans(slots)
    assert [sum(len(route.owned) for route in rank) for rank in routes] == [3, 3, 3, 3]


def test_the_dear_ones_are_spread_before_the_cheap() -> None:
    slots = joined(*(split(f"small{i}", 4, 4, 2) for i in range(8)), split("big", 8, 16, 2))
    one, two = ([unit.name for route in rank for unit in route.owned] for rank in plans(slots))
    assert "big" in one and len(one) < len(two)


def test_what_a_rank_has_to_do_anyway_counts() -> None:
    own: list[Listed] = [
        [("own", Box((8, 16), (0, 0), (8, 16)), 0, 1)],
        [("own", Box((8, 16), (0, 0), (0, 16)), 0, 1)],
    ]
    slots = joined(own, split("w", 8, 16, 2))
    one, two = ([unit.name for route in rank for unit in route.owned] for rank in plans(slots))
    assert (one, two) == (["own"], ["w"])


def test_a_matrix_on_one_rank_stays_there_and_nothing_travels() -> None:
    whole = Box.all_of((5, 4, 4))
    slots: list[Listed] = [
        [("e", Box((5, 4, 4), (0, 0, 0), (2, 4, 4)), 0, 1)],
        [("e", Box((5, 4, 4), (2, 0, 0), (3, 4, 4)), 0, 1)],
    ]
    for routes, count in zip(plans(slots), (2, 3), strict=True):
        assert [len(route.owned) for route in routes] == [count] and not routes[0].travels
    assert len(find(StagePeers(None, 0, 1, [[("e", whole, 0, 1)]]), {"e": "matrix"})) == 5


def test_of_copies_one_is_sent_and_all_get_the_result() -> None:
    upper, lower = Box((4, 4), (0, 0), (2, 4)), Box((4, 4), (2, 0), (2, 4))
    slots: list[Listed] = [[("w", box, replica, 2)] for replica in range(2) for box in (upper, lower)]
    routes = [only for (only,) in plans(slots)]
    owner = next(rank for rank, route in enumerate(routes) if route.owned)
    assert sum(sum(route.gives.counts) for route in routes) == 16 == sum(routes[owner].takes.counts)
    assert routes[owner].returns.counts == [8, 8, 8, 8]
    assert [sum(route.lands.counts) for route in routes] == [8, 8, 8, 8]


def test_what_a_rank_sends_is_what_the_other_expects() -> None:
    slots = joined(split("a", 8, 6, 4), split("b", 4, 12, 4), split("c", 16, 2, 4))
    for routes in zip(*plans(slots, limit=60), strict=True):
        for one in range(4):
            for other in range(4):
                assert routes[one].gives.counts[other] == routes[other].takes.counts[one]
                assert routes[one].returns.counts[other] == routes[other].lands.counts[one]


def test_no_rank_has_more_than_the_limit_in_a_bucket() -> None:
    slots = joined(*(split(f"w{i}", 8, 16, 4) for i in range(12)))
    for limit, most in ((400, 400), (1, 128 + 32)):
        for routes in plans(slots, limit):
            for route in routes:
                held = sum(route.gives.counts) + sum(unit.elements for unit in route.owned)
                assert held <= most
            assert len(routes) > 1


def test_parts_that_leave_a_hole_are_refused() -> None:
    slots = split("w", 8, 4, 4)[:3]
    with pytest.raises(ValueError, match=r"hold 24 of the 32 elements of w\[\]"):
        plans(slots)


def test_a_rank_without_a_parameter_is_refused() -> None:
    slots: list[Listed] = [[("v", Box.all_of((4,)), 0, 1)], []]
    with pytest.raises(
        ValueError, match="rank 1 of the stage has no slot of v; give it one with an empty box"
    ):
        check_names([], StagePeers(None, 1, 2, slots))
    with pytest.raises(ValueError, match="rank 0 of the stage has other slots"):
        check_names([], StagePeers(None, 0, 2, slots))
