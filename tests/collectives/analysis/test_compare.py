"""A measurement against its baseline, the hardware's limit and its peers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from collectives.analysis.compare import against_baseline, against_limit, among_peers, pair_rates
from collectives.analysis.judge import FindingKind
from collectives.ops.operations import OPERATIONS, bandwidths
from collectives.store.results import Metadata, Results, SweepRow, Timing
from configs.compose import compose
from configs.errors import UserError

pytestmark = pytest.mark.unit

SIZES = [1 << e for e in range(10, 31, 2)]


def timing(op: str, size: int, ranks: int, us: float, own: tuple[float, ...] = ()) -> Timing:
    alg, bus = bandwidths(OPERATIONS[op], size, us / 1e6, ranks)
    own = own or (us,) * ranks
    return Timing(
        us,
        0.01 * us,
        us,
        us,
        us,
        us,
        us,
        0.0,
        us,
        alg,
        bus,
        None,
        5,
        0,
        tuple((t,) * 10 for t in own),
        (us,) * 10,
    )


def results(
    scale: float = 1.0, op: str = "all_reduce", group: str = "world", slow: int | None = None
) -> Results:
    """A sweep over 8 ranks on 4 hosts, at 100 GB/s of busbw; `slow` is the group that takes three times as long."""
    hosts = [{"address": f"10.0.0.{n}", "hostname": f"h{n}", "ranks": [2 * n, 2 * n + 1]} for n in range(4)]
    layout = {"pp": 1, "dp": 8, "cp": 1, "tp": 1, "ep": 2, "etp": 1}
    about = Metadata(
        {"hosts": hosts, "devices": [], "hardware": "h100"}, {}, {"layout": layout, "ranks": 8}, {}, ""
    )
    width, count = (2, 4) if group != "world" else (8, 1)
    rows = []
    for size in SIZES:
        us = scale * (10 + size / 1e5)
        own = tuple(3 * us if slow is not None and rank // width == slow else us for rank in range(8))
        rows.append(
            SweepRow(
                op,
                group,
                width,
                count,
                size,
                size // 4,
                "float",
                "sum",
                -1,
                0,
                None,
                timing(op, size, width, us, own),
            )
        )
    return Results(about, tuple(rows), "now")


def test_the_same_is_no_finding_and_a_slower_one_is_named() -> None:
    assert against_baseline(results(), results(), 0.1) == []
    assert against_baseline(results(1.08), results(), 0.1) == []
    (finding,) = against_baseline(results(1.3), results(), 0.1)
    assert finding.kind is FindingKind.BELOW_BASELINE and finding.ratio == pytest.approx(1 / 1.3)
    assert finding.evidence["op"] == "all_reduce" and len(finding.evidence["ratios"]) == len(SIZES)
    assert f"at {len(SIZES)} of {len(SIZES)} sizes" in finding.what


def test_one_size_of_many_may_be_slower_by_chance() -> None:
    now = results()
    odd = replace(now.rows[3], in_place=timing("all_reduce", SIZES[3], 8, 1000))
    assert against_baseline(replace(now, rows=(*now.rows[:3], odd, *now.rows[4:])), results(), 0.1) == []


def test_every_line_is_compared_and_not_only_those_that_a_plot_draws() -> None:
    """Of more than twelve types and reductions, the others were passed over: whatever happened to them was no finding."""
    kinds = [
        (dtype, redop)
        for dtype in ("half", "bfloat16", "float", "double")
        for redop in ("sum", "prod", "max", "min")
    ]
    before, slow = results(), results(1.3)
    every = [
        replace(row, dtype=dtype, redop=redop)
        for dtype, redop in kinds
        for row in (slow if (dtype, redop) == kinds[-1] else before).rows
    ]
    usual = [replace(row, dtype=dtype, redop=redop) for dtype, redop in kinds for row in before.rows]
    (finding,) = against_baseline(replace(before, rows=tuple(every)), replace(before, rows=tuple(usual)), 0.1)
    assert finding.what.startswith("all_reduce double min in group world, in place: slower")


def without_intervals(measured: Results, sizes: list[int]) -> Results:
    """Of fewer than five calls each."""
    rows = [
        replace(row, in_place=replace(row.in_place, ci_us=math.inf))
        if row.size in sizes and row.in_place
        else row
        for row in measured.rows
    ]
    return replace(measured, rows=tuple(rows))


def test_what_has_no_interval_is_not_passed_over_in_silence() -> None:
    """Times of fewer than five calls have none: three times as slow, they were "nothing slower than it should be"."""
    with pytest.raises(
        UserError, match="none of the sizes .* has a confidence interval, which takes five calls"
    ):
        against_baseline(without_intervals(results(3.0), SIZES), results(), 0.1)
    lines = list[str]()
    (finding,) = against_baseline(without_intervals(results(3.0), SIZES[-2:]), results(), 0.1, lines.append)
    assert len(finding.evidence["ratios"]) == len(SIZES) - 2
    assert lines == [
        f"2 of {len(SIZES)} times have fewer than the five calls that intervals take, and aren't judged"
    ]


def test_what_has_nothing_in_common_is_refused() -> None:
    with pytest.raises(UserError, match="share no operation, group, number of ranks, type and size"):
        against_baseline(results(), results(op="all_gather"), 0.1)


def test_the_links_limit_counts_where_it_is_known() -> None:
    hopper = compose(["hardware=h100"]).hardware
    assert against_limit(results(), hopper, 0.6) == []  # 4 hosts: the network's 50 GB/s
    (finding,) = against_limit(results(8.0), hopper, 0.6)
    assert finding.kind is FindingKind.BELOW_LIMIT and "h100's adapters make 50" in finding.what
    (inside,) = against_limit(results(8.0, group="node"), hopper, 0.6)
    assert "h100's links give a group of 2 450" in inside.what
    assert against_limit(results(8.0), compose(["hardware=cpu"]).hardware, 0.6) == []


def test_a_group_that_is_slower_than_its_peers_is_named_by_its_host() -> None:
    assert among_peers(results(group="node"), 0.6) == []
    (finding,) = among_peers(results(group="node", slow=2), 0.6)
    assert (finding.kind, finding.hosts, finding.ranks) == (FindingKind.SLOW_GROUP, ("10.0.0.2",), (4, 5))


def test_pairs_have_rates_both_ways() -> None:
    found = pair_rates(results(group="pairs1", op="sendrecv"))
    assert {(a, b) for a, b, _ in found} == {(0, 7), (7, 0), (1, 6), (6, 1), (2, 5), (5, 2), (3, 4), (4, 3)}
    assert all(rate == pytest.approx(100, rel=0.01) for _, _, rate in found)
