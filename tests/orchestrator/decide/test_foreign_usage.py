"""What is free of nodes that other users of Ray hold slots of."""

from __future__ import annotations

import pytest

from orchestrator.decide.foreign_usage import UsageSample, free_slots, unclaimed_slots
from orchestrator.decide.placement import Node

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

NODE = Node("n1", "10.0.0.1", "host1", {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4})
BUNDLE = {"GPU": 2.0, "node:10.0.0.1": 0.001}


def look(gpus: float, **groups: dict[str, float]) -> UsageSample:
    return UsageSample({"n1": {"CPU": 8.0, "GPU": gpus}}, {"n1": groups})


@pytest.mark.parametrize(
    ("available", "own", "free"),
    [
        ({"CPU": 8.0, "GPU": 4.0}, {}, {"CPU": 8, "GPU": 4}),
        ({"CPU": 8.0, "GPU": 1.0}, {}, {"CPU": 8, "GPU": 1}),
        ({"CPU": 8.0, "GPU": 1.0}, {"GPU": 3.0}, {"CPU": 8, "GPU": 4}),
        ({"CPU": 8.0}, {"GPU": 3.0}, {"CPU": 8, "GPU": 3}),
        ({}, {}, {"CPU": 0, "GPU": 0}),
        ({"CPU": 7.5, "GPU": 0.9999}, {}, {"CPU": 7, "GPU": 1}),
        ({"CPU": 8.0, "GPU": 4.0}, {"GPU": 2.0}, {"CPU": 8, "GPU": 4}),
        ({"CPU": -1.0, "GPU": 4.0}, {}, {"CPU": 0, "GPU": 4}),
    ],
)
def test_a_slot_is_free_unless_another_user_holds_some_of_it(
    available: dict[str, float], own: dict[str, float], free: dict[str, int]
) -> None:
    """What Ray gives out, and what it holds for us; never more than the node has, nor less than none."""
    assert unclaimed_slots(NODE.slots, available, own) == free


def test_groups_of_ours_are_counted_back_in_and_those_of_others_are_not() -> None:
    held = look(0.0, **{"run-a001": BUNDLE, "theirs": BUNDLE})
    assert held.free(NODE, {"run-a001"}) == {"CPU": 8, "GPU": 2}
    assert held.free(NODE, ()) == {"CPU": 8, "GPU": 0}
    assert held.free(NODE, {"run-a001", "theirs", "of another node"}) == {"CPU": 8, "GPU": 4}


def test_a_node_that_ray_has_said_nothing_of_is_free() -> None:
    assert UsageSample({}, {}).free(NODE, ()) == NODE.slots
    assert free_slots(NODE, [], ()) == NODE.slots


def test_a_slot_is_anothers_where_each_of_the_newest_looks_says_so() -> None:
    """A group that is being removed is gone from the list before its node has its slots back."""
    before, between, after = look(2.0, **{"run-a001": BUNDLE}), look(2.0), look(4.0)
    own = {"run-a001"}
    assert (
        free_slots(NODE, [between, before], own)["GPU"] == free_slots(NODE, [after, between], own)["GPU"] == 4
    )
    assert free_slots(NODE, [between, between], own)["GPU"] == 2
    assert free_slots(NODE, [between], own)["GPU"] == 2, "a new controller knows it at its first look"
