"""The heat map: rows of ranks, columns of steps, raw or as deviation from the ranks that do the same work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, nearest
from faulttol.timeline.reader import AttemptSteps
from faulttol.timeline.step_file import STORED

MODES = ("raw", "deviation")
AXES = ("pp", "dp", "cp", "tp", "edp", "ep", "etp")
GROUPS = ("rank", "node", *AXES)
_TOGETHER = 1024
"""Ranks that are joined at once."""
_PEERS = 256
"""Ranks of a stage whose median stands for all of it."""


@dataclass(frozen=True)
class HeatRequest:
    """What is to be drawn."""

    field: str = "compute"
    """One of `file.STORED`."""
    first: int = 0
    last: int = 1 << 62
    """The step after the last."""
    mode: str = "raw"
    """`raw`: seconds. `deviation`: value over the median of the stage's ranks in the same steps, less 1."""
    group: str = "rank"
    """One row for each rank, for each node, or for each place along an axis."""
    columns: int = 200
    rows: int = 256
    """Most rows; neighbours are joined above."""
    ranks: range | None = None
    """Only these; None: all. Peers are all ranks of a stage nevertheless."""


@dataclass(frozen=True)
class HeatRow:
    """A row of the map."""

    label: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class HeatMap:
    """The map. Where a row has several ranks, or a column several steps, `mean` is theirs and `most` the largest."""

    request: HeatRequest
    edges: NDArray[np.int64]
    """[columns + 1]: column c holds the steps from edges[c] up to but without edges[c + 1]."""
    rows: tuple[HeatRow, ...]
    mean: NDArray[np.float32]
    """[rows, columns]; NaN where nothing is known."""
    most: NDArray[np.float32]
    low: float
    """Ends of a scale that leaves out the most extreme hundredth at each end; NaN where nothing is known."""
    high: float

    @property
    def unit(self) -> str:
        """`s`, or empty for a ratio."""
        return "s" if self.request.mode == "raw" else ""


def heat_map(steps: AttemptSteps, request: HeatRequest, layout: Mapping[str, int]) -> HeatMap:
    """The map of one attempt.

    Args:
        steps: of the attempt.
        request: what is to be drawn.
        layout: the attempt's sizes by axis (pp, dp, cp, ep, etp, tp); what is missing is 1.

    Raises:
        UserError: where `request` names what there isn't.
    """
    for name, known in (("field", STORED), ("mode", MODES), ("group", GROUPS)):
        value = getattr(request, name)
        if value not in known:
            raise UserError(f"{name}={value!r} isn't one of {', '.join(known)}{nearest(value, known)}")
    by_peers = request.mode == "deviation"
    wanted = None if by_peers else request.ranks
    window = steps.window(request.field, request.first, request.last, request.columns, wanted)
    means, mosts, ranks = window.mean, window.most, window.ranks
    places = coordinates(layout, ranks)
    if by_peers:
        means, mosts = deviation(means, places["pp"]), deviation(mosts, places["pp"])
        if request.ranks is not None:
            chosen = (ranks >= request.ranks.start) & (ranks < request.ranks.stop)
            means, mosts, ranks = means[chosen], mosts[chosen], ranks[chosen]
            places = coordinates(layout, ranks)
    parts = _parts(steps, request, ranks, places)
    mean, most = joined(means, mosts, [index for _, index in parts])
    rows = tuple(HeatRow(label, tuple(ranks[index].tolist())) for label, index in parts)
    shown = most[~np.isnan(most)]
    low, high = np.percentile(shown, (1, 99)).tolist() if shown.size else (float("nan"), float("nan"))
    return HeatMap(request, window.edges, rows, mean, most, low, high)


def coordinates(layout: Mapping[str, int], ranks: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Place of ranks along each axis of `AXES`.

    Ranks are numbered with pp outermost, then dp, cp, tp; the ranks of a stage are numbered again as edp, ep, etp.
    """
    size = {axis: max(1, int(layout.get(axis, 1))) for axis in ("pp", "dp", "cp", "tp", "ep", "etp")}
    width = size["dp"] * size["cp"] * size["tp"]
    inside, tp, etp = ranks % width, size["tp"], size["etp"]
    return {
        "pp": ranks // width,
        "dp": inside // (size["cp"] * tp),
        "cp": inside // tp % size["cp"],
        "tp": inside % tp,
        "edp": inside // (size["ep"] * etp),
        "ep": inside // etp % size["ep"],
        "etp": inside % etp,
    }


def deviation(values: NDArray[np.float32], stages: NDArray[np.int64]) -> NDArray[np.float32]:
    """Values over the median of their stage in the same column, less 1: [ranks, columns].

    Ranks of one stage have the same work, so what one of them has beyond the others is its own. The median is that of
    at most 256 ranks, evenly spaced. Where it is 0, nothing is known.
    """
    over = np.full_like(values, np.nan)
    for stage in np.unique(stages):
        mine = np.flatnonzero(stages == stage)
        usual = median(values[mine[:: -(-len(mine) // _PEERS)]])
        usual[~(usual > 0)] = np.nan
        for at in range(0, len(mine), _TOGETHER):
            some = mine[at : at + _TOGETHER]
            over[some] = values[some] / usual - 1
    return over


def median(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Median over the first axis of what is known: [columns]."""
    if not len(values):
        return np.full(values.shape[1], np.nan, np.float32)
    ordered = np.sort(values, axis=0)  # NaN comes last
    known = len(values) - np.isnan(ordered).sum(0)
    across = np.arange(values.shape[1])
    low, high = np.maximum(known - 1, 0) // 2, known // 2
    middle = (ordered[low, across] + ordered[np.minimum(high, len(values) - 1), across]) / 2
    return np.where(known > 0, np.where(known % 2 == 1, ordered[low, across], middle), np.float32(np.nan))


def joined(
    means: NDArray[np.float32], mosts: NDArray[np.float32], parts: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows joined: the mean of what is known, and the most."""
    if all(len(part) == 1 for part in parts):
        order = np.array([part[0] for part in parts], np.int64)
        return means[order], mosts[order]
    if sum(map(len, parts)) > _TOGETHER:
        halves = len(parts) // 2
        if halves:  # small pieces stay in the processor's caches
            above, below = joined(means, mosts, parts[:halves]), joined(means, mosts, parts[halves:])
            return np.concatenate((above[0], below[0])), np.concatenate((above[1], below[1]))
    order = np.concatenate(parts)
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    run = np.array_equal(order, np.arange(order[0], order[0] + len(order)))
    picked = slice(int(order[0]), int(order[0]) + len(order)) if run else order
    ordered, tops = means[picked], mosts[picked]
    known = ~np.isnan(ordered)
    if known.all():
        lengths = np.array([[len(part)] for part in parts], np.float32)
        return np.add.reduceat(ordered, starts, axis=0) / lengths, np.maximum.reduceat(tops, starts, axis=0)
    count = np.add.reduceat(known, starts, axis=0, dtype=np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(known, ordered, np.float32(0)), starts, axis=0) / count
    return mean, np.fmax.reduceat(tops, starts, axis=0)


def _parts(
    steps: AttemptSteps, request: HeatRequest, ranks: NDArray[np.int64], places: Mapping[str, Any]
) -> list[tuple[str, NDArray[np.int64]]]:
    """Label of each row, and the places of its ranks in `ranks`."""
    everybody = np.arange(len(ranks))
    if request.group == "rank":
        parts = [(str(rank), everybody[i : i + 1]) for i, rank in enumerate(ranks.tolist())]
        labels = ("rank {}", "ranks {}–{}")
    elif request.group == "node":
        nodes = sorted(steps.nodes.items(), key=lambda item: min(item[1]))
        first = int(ranks[0]) if len(ranks) else 0
        there = range(first, int(ranks[-1]) + 1) if len(ranks) else range(0)
        parts = [
            (node, np.searchsorted(ranks, own))
            for node, own in (
                (node, sorted(rank for rank in every if rank in there)) for node, every in nodes
            )
            if own
        ]
        labels = ("{}", "{} … {}")
    else:
        along = places[request.group]
        parts = [
            (f"{request.group} {place}", everybody[along == place]) for place in np.unique(along).tolist()
        ]
        labels = ("{}", "{} … {}")
    if len(parts) <= request.rows:
        return [(labels[0].format(name), own) for name, own in parts]
    each = -(-len(parts) // max(1, request.rows))
    bundled = []
    for at in range(0, len(parts), each):
        some = parts[at : at + each]
        bundled.append((labels[1].format(some[0][0], some[-1][0]), np.concatenate([own for _, own in some])))
    return bundled
