"""The plan of who orthogonalises which matrix: balanced, bounded, alike on all ranks."""

from __future__ import annotations

import pytest

from trainer.optim.common import check_peers
from trainer.optim.matrix_exchange import MatrixBucket, collect_matrices, plan_buckets
from trainer.optim.shards import StagePeers
from trainer.state import Box

pytestmark = pytest.mark.dist

Listed = list[tuple[str, Box, int, int]]


def plans(shards: list[Listed], limit: int = 1 << 20) -> list[list[MatrixBucket]]:
    """Buckets of all ranks; every shard is a matrix."""
    kinds = {name: "matrix" for listed in shards for name, *_ in listed}
    return [
        plan_buckets(StagePeers(None, rank, len(shards), shards), kinds, limit) for rank in range(len(shards))
    ]


def split(name: str, rows: int, columns: int, ranks: int) -> list[Listed]:
    """A matrix whose rows are spread evenly."""
    part = rows // ranks
    return [[(name, Box((rows, columns), (rank * part, 0), (part, columns)), 0, 1)] for rank in range(ranks)]


def joined(*shards: list[Listed]) -> list[Listed]:
    return [sum(listed, []) for listed in zip(*shards, strict=True)]


def test_equal_matrices_are_owned_in_equal_numbers() -> None:
    shards = joined(*(split(f"w{i}", 8, 16, 4) for i in range(12)))
    buckets = plans(shards)
    assert [sum(len(bucket.owned) for bucket in rank) for rank in buckets] == [3, 3, 3, 3]


def test_the_dear_ones_are_spread_before_the_cheap() -> None:
    shards = joined(*(split(f"small{i}", 4, 4, 2) for i in range(8)), split("big", 8, 16, 2))
    one, two = ([matrix.name for bucket in rank for matrix in bucket.owned] for rank in plans(shards))
    assert "big" in one and len(one) < len(two)


def test_what_a_rank_has_to_do_anyway_counts() -> None:
    own: list[Listed] = [
        [("own", Box((8, 16), (0, 0), (8, 16)), 0, 1)],
        [("own", Box((8, 16), (0, 0), (0, 16)), 0, 1)],
    ]
    shards = joined(own, split("w", 8, 16, 2))
    one, two = ([matrix.name for bucket in rank for matrix in bucket.owned] for rank in plans(shards))
    assert (one, two) == (["own"], ["w"])


def test_a_matrix_on_one_rank_stays_there_and_nothing_travels() -> None:
    whole = Box.full((5, 4, 4))
    shards: list[Listed] = [
        [("e", Box((5, 4, 4), (0, 0, 0), (2, 4, 4)), 0, 1)],
        [("e", Box((5, 4, 4), (2, 0, 0), (3, 4, 4)), 0, 1)],
    ]
    for buckets, count in zip(plans(shards), (2, 3), strict=True):
        assert [len(bucket.owned) for bucket in buckets] == [count] and not buckets[0].communicates
    assert len(collect_matrices(StagePeers(None, 0, 1, [[("e", whole, 0, 1)]]), {"e": "matrix"})) == 5


def test_of_copies_one_is_sent_and_all_get_the_result() -> None:
    upper, lower = Box((4, 4), (0, 0), (2, 4)), Box((4, 4), (2, 0), (2, 4))
    shards: list[Listed] = [[("w", box, replica, 2)] for replica in range(2) for box in (upper, lower)]
    buckets = [only for (only,) in plans(shards)]
    owner = next(rank for rank, bucket in enumerate(buckets) if bucket.owned)
    assert (
        sum(sum(bucket.part_sends.split_sizes) for bucket in buckets)
        == 16
        == sum(buckets[owner].part_receives.split_sizes)
    )
    assert buckets[owner].result_sends.split_sizes == [8, 8, 8, 8]
    assert [sum(bucket.result_receives.split_sizes) for bucket in buckets] == [8, 8, 8, 8]


def test_what_a_rank_sends_is_what_the_other_expects() -> None:
    shards = joined(split("a", 8, 6, 4), split("b", 4, 12, 4), split("c", 16, 2, 4))
    for buckets in zip(*plans(shards, limit=60), strict=True):
        for one in range(4):
            for other in range(4):
                assert (
                    buckets[one].part_sends.split_sizes[other]
                    == buckets[other].part_receives.split_sizes[one]
                )
                assert (
                    buckets[one].result_sends.split_sizes[other]
                    == buckets[other].result_receives.split_sizes[one]
                )


def test_no_rank_has_more_than_the_limit_in_a_bucket() -> None:
    shards = joined(*(split(f"w{i}", 8, 16, 4) for i in range(12)))
    for limit, most in ((400, 400), (1, 128 + 32)):
        for buckets in plans(shards, limit):
            for bucket in buckets:
                held = sum(bucket.part_sends.split_sizes) + sum(matrix.elements for matrix in bucket.owned)
                assert held <= most
            assert len(buckets) > 1


def test_parts_that_leave_a_hole_are_refused() -> None:
    shards = split("w", 8, 4, 4)[:3]
    with pytest.raises(ValueError, match=r"hold 24 of the 32 elements of w\[\]"):
        plans(shards)


def test_a_rank_without_a_parameter_is_refused() -> None:
    shards: list[Listed] = [[("v", Box.full((4,)), 0, 1)], []]
    with pytest.raises(
        ValueError, match="rank 1 of the stage has no shard of v; give it one with an empty box"
    ):
        check_peers([], StagePeers(None, 1, 2, shards))
    with pytest.raises(ValueError, match="rank 0 of the stage has other shards"):
        check_peers([], StagePeers(None, 0, 2, shards))
