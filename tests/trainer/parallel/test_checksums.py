"""Checksums of copies, what is reduced of them, and whose copy is judged to be wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from trainer.parallel import replicas
from trainer.parallel.replicas import HeldCopy, RankPlace, checksums, judge
from trainer.state import Box, Slice

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]

PLAIN = (0.0, -0.0, 1.0, -2.5, math.nan, math.inf, 1e-40, 3e38)


# ---- sums ----


def flipped(tensor: torch.Tensor, place: int, bit: int) -> torch.Tensor:
    """The same with one bit of one element flipped."""
    made = tensor.clone()
    flip(made, place, bit)
    return made


def flip(tensor: torch.Tensor, place: int, bit: int) -> None:
    """Flip one bit of an element in place."""
    size = tensor.element_size()
    words = tensor.view(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    bits = int(words[place]) ^ (1 << bit)
    top = 1 << (8 * size - 1)
    words[place] = (
        bits if size == 1 or -top <= bits < top else bits - 2 * top if bits >= top else bits + 2 * top
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
def test_every_single_bit_changes_the_sum_and_so_do_two(dtype: torch.dtype) -> None:
    tensor = torch.tensor([abs(value) if dtype is torch.uint8 else value for value in PLAIN[:4]]).to(dtype)
    places = list(itertools.product(range(4), range(8 * tensor.element_size())))
    ones = [flipped(tensor, *place) for place in places]
    twos = [
        flipped(flipped(tensor, *a), *b) for a, b in itertools.combinations(places[:: len(places) // 24], 2)
    ]
    assert checksums([tensor.clone()]) == checksums([tensor])
    assert checksums([tensor])[0] not in checksums(ones)
    if tensor.element_size() <= 4:  # of wider ones two top bits cancel
        assert checksums([tensor])[0] not in checksums(twos) and len(set(checksums(ones))) == len(ones)


def test_bits_are_summed_and_not_numbers() -> None:
    tensor = torch.tensor(PLAIN)
    sums = checksums([tensor, tensor.clone(), -tensor, tensor.flip(0)])
    assert sums[0] == sums[1] and len(set(sums)) == 3, (
        "numbers that aren't any are equal where their bits are"
    )
    zero = torch.zeros(2)
    assert checksums([zero])[0] != checksums([-zero])[0]


def test_a_sum_does_not_hang_on_what_is_summed_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n, generator=made) for n in (1, 700, 3, 2000, 64)]
    tensors += [tensors[1].bfloat16(), tensors[3].view(40, 50).t(), torch.tensor(7.0)]
    for stretch in (1 << 20, 512):
        monkeypatch.setattr(replicas, "_STRETCH", stretch)
        alone = [checksums([tensor])[0] for tensor in tensors]
        assert checksums(tensors) == alone and len(set(alone)) == len(alone)
        assert checksums(tensors[::-1]) == alone[::-1]
        assert checksums([flipped(tensors[3], 1999, 0)])[0] != alone[3], "in the last stretch"
        swapped = torch.cat([tensors[3][1000:], tensors[3][:1000]])
        assert checksums([swapped])[0] != alone[3]
    assert checksums([]) == []


def test_a_count_is_read_whatever_its_shape() -> None:
    assert (
        len(set(checksums([torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1), torch.tensor(True)]))) >= 3
    )


# ---- what is reduced ----


def total(sums: Sequence[int]) -> int:
    """What the shares of a tensor's copies come to."""
    copies = [HeldCopy("blocks.0.norm.weight[0:8]", n, len(sums), one) for n, one in enumerate(sums)]
    assert len({copy.share[0] for copy in copies}) == 1
    return sum(copy.share[1] for copy in copies) % replicas._PRIME


@pytest.mark.parametrize("count", [2, 3, 4, 7, 512])
def test_equal_copies_cancel_and_no_others_do(count: int) -> None:
    top = (1 << 64) - 1
    for value in (0, 1, 12345, top):
        assert total([value] * count) == 0
    for wrong in {0, 1, count // 2, count - 1}:
        for bit in range(64):
            sums = [12345] * count
            sums[wrong] ^= 1 << bit
            assert total(sums), (wrong, bit)
    assert total([1, *[0] * (count - 2), 1] if count > 2 else [0, 1])
    assert total([top, *[5] * (count - 2), 4])


def test_the_modulus_is_prime_and_many_ranks_fit() -> None:
    prime = replicas._PRIME
    assert all(prime % n for n in (2, *range(3, 1 << 20, 2))) and prime < 1 << 40
    assert (prime - 1) * 100_000 < 1 << 63


def test_copies_that_may_part_by_rounding_are_compared_in_groups() -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002])
    bad = flipped(other, 0, 3)

    def ranks(*tensors: torch.Tensor, exact: int) -> list[tuple[RankPlace, list[HeldCopy]]]:
        box, count = Box.full((2,)), len(tensors)
        parts = [Slice("norm", tensor, box, r, count, exact) for r, tensor in enumerate(tensors)]
        return [(RankPlace(str(r), str(r)), list(replicas._copies([part]))) for r, part in enumerate(parts)]

    apart = ranks(*[one] * 4, *[other] * 4, exact=4)
    assert judge(apart, 1) is None
    for group in (apart[:4], apart[4:]):
        assert sum(copies[0].share[1] for _, copies in group) % replicas._PRIME == 0
    assert judge(ranks(*[one] * 4, *[other] * 4, exact=0), 1) is not None
    drift = judge(ranks(*[one] * 4, other, other, bad, other, exact=4), 1)
    assert drift is not None and drift.sure and drift.suspects == [6]
    assert "norm[0:2] in group 1 of rank 6 on 6 isn't as" in drift.text


# ---- who is wrong ----


def held(*tensors: Sequence[int], hosts: str = "abcdefgh") -> list[tuple[RankPlace, list[HeldCopy]]]:
    """What ranks tell: of each tensor, its sum on each of them."""
    ranks = range(len(tensors[0]))
    return [
        (RankPlace(hosts[r], f"host-{hosts[r]}"), [HeldCopy(f"w{n}", r, len(ranks), t[r]) for n, t in enumerate(tensors)])
        for r in ranks
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sums", "suspects", "sure"),
    [
        ((1, 1, 2), [2], True),
        ((2, 1, 1, 1), [0], True),
        ((1, 2, 1, 3, 1), [1, 3], True),
        ((1, 2), [0, 1], False),
        ((1, 1, 2, 2), [0, 1, 2, 3], False),
        ((1, 1, 2, 3), [0, 1, 2, 3], False),
        ((1, 2, 3), [0, 1, 2], False),
    ],
)
def test_a_strict_majority_names_the_others(sums: tuple[int, ...], suspects: list[int], sure: bool) -> None:
    drift = judge(held(sums), 6)
    assert drift is not None and (drift.suspects, drift.sure) == (suspects, sure)
    assert all(f"rank {rank} on host-{'abcdefgh'[rank]}" in drift.text for rank in suspects)
    assert "behind step 6" in drift.text and "w0" in drift.text
    assert ("no majority says which is right" in drift.text) is not sure


def test_a_tensor_with_a_majority_decides_where_another_has_none() -> None:
    pair = [
        (RankPlace("a", "a"), [HeldCopy("few", 0, 2, 1), HeldCopy("many", 0, 3, 5)]),
        (RankPlace("b", "b"), [HeldCopy("few", 1, 2, 2), HeldCopy("many", 1, 3, 6)]),
        (RankPlace("c", "c"), [HeldCopy("many", 2, 3, 5)]),
    ]
    drift = judge(pair, 1)
    assert drift is not None and (drift.suspects, drift.sure) == ([1], True)
    assert "many of rank 1 on b isn't as the other ranks have it" in drift.text


def test_one_host_with_all_suspects_is_known_to_be_at_fault() -> None:
    drift = judge(held((1, 2), hosts="aa"), 1)
    assert drift is not None and drift.sure and drift.suspects == [0, 1]
    assert "isn't the same on rank 0 on host-a, rank 1 on host-a; test that host's devices" in drift.text


def test_equal_copies_are_no_finding_and_long_ones_are_cut() -> None:
    assert judge(held((1, 1), (2, 2)), 1) is None
    drift = judge(held(*[tuple(range(8))] * 5, hosts="abcdefgh"), 1)
    assert drift is not None and "w0 and 4 more" in drift.text
    many = [(RankPlace(str(r), str(r)), [HeldCopy("w", r, 20, r)]) for r in range(20)]
    drift = judge(many, 1)
    assert (
        drift is not None and drift.text.count("rank ") == 8 and "and 12 more, and no majority" in drift.text
    )
