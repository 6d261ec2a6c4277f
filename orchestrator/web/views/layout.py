"""Who is where in the layout, what each rank does, and who waits for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from faulttol.timeline.heat import AXES, coordinates
from orchestrator.record.history import AttemptHistory
from orchestrator.record.rank_status import RankStatus

_GROUPS = 256
_RANKS = 512
"""Ranks of a group that are listed."""
_LIVE = 15.0
"""Seconds after which what was reported is old."""
_DENSE = ("pp", "dp", "cp", "tp")
_SPARSE = ("pp", "edp", "ep", "etp")


def group(layout: Mapping[str, int], world: int, axis: str, rank: int) -> list[int]:
    """Ranks that share a group along an axis with a rank.

    Raises:
        UserError: for an axis or a rank that isn't there.
    """
    if axis not in AXES:
        raise UserError(f"axis='{axis[:40]}' is none of {', '.join(AXES)}")
    if not 0 <= rank < world:
        raise UserError(f"rank={rank} is none of this attempt's {world} ranks, which count from 0")
    places = coordinates(layout, np.arange(world))
    same = np.ones(world, dtype=bool)
    for other in _view(axis):
        if other != axis:
            same &= places[other] == places[other][rank]
    return [int(r) for r in np.flatnonzero(same)]


def _view(axis: str) -> tuple[str, ...]:
    return _DENSE if axis in _DENSE else _SPARSE


def is_live(own: AttemptHistory, made: Mapping[str, Any], now: float) -> bool:
    """Whether an answer of `layout` tells of now: of an attempt that is running, and not old."""
    return made["seen"] is not None and now - made["seen"] < _LIVE and own.ended is None


def layout(own: AttemptHistory, looks: Sequence[RankStatus], culprits: Sequence[int]) -> dict[str, Any]:
    """The ranks of an attempt.

    Args:
        own: the attempt.
        looks: what its ranks were last seen doing.
        culprits: ranks that incidents of the attempt name.
    """
    world = own.ranks
    places = coordinates(own.layout, np.arange(world))
    node = np.full(world, -1)
    for i, share in enumerate(own.nodes):
        node[share["ranks"][0] : share["ranks"][1] + 1] = i
    seen = {look.rank: look for look in looks if 0 <= look.rank < world}
    newest = max((look.time for look in seen.values()), default=None)
    listed = [seen.get(rank) for rank in range(world)]
    groups, waits, left_out = _waiting(seen, own.layout, world)
    named = sorted({*culprits, *(rank for one in waits for rank in one["to"])}) if waits else list(culprits)
    return {
        "seen": newest,
        "world": world,
        "layout": own.layout,
        "axes": list(AXES),
        "coordinates": {axis: places[axis].tolist() for axis in AXES},
        "nodes": [share["ip"] for share in own.nodes],
        "node": node.tolist(),
        "ranks": {
            "step": [one.step if one else None for one in listed],
            "phase": [one.phase if one else "" for one in listed],
            "state": [one.state if one else "" for one in listed],
            "waits": [one.waits if one else "" for one in listed],
            "exit": [one.exit_code if one else None for one in listed],
            "age": [
                round(max(0.0, one.time - one.since), 1) if one and one.since else None for one in listed
            ],
            "held": [one.held if one else "" for one in listed],
        },
        "groups": groups,
        "waits": waits,
        "culprits": named[:_RANKS],
        "said": _said(waits, seen, named),
        "left_out": left_out,
    }


def _waiting(
    seen: Mapping[int, RankStatus], layout: Mapping[str, int], world: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Groups in which some rank is inside a call that another hasn't entered, and the waits in them."""
    entered: dict[tuple[str, Sequence[int]], dict[int, tuple[int, bool]]] = {}
    for rank, look in seen.items():
        for one in look.groups:
            key = one.name, one.ranks  # a range or a tuple: both compare by value
            entered.setdefault(key, {})[rank] = one.entered, one.left < one.entered
    axes = _by_ranks(layout, world)
    groups, waits = [], []
    for (name, ranks), calls in entered.items():
        most = max(count for count, _ in calls.values())
        inside = [rank for rank, (count, within) in calls.items() if within and count == most]
        missing = [rank for rank in ranks if rank not in calls or calls[rank][0] < most]
        if not inside or not missing:
            continue
        axis = axes.get((len(ranks), ranks[0], ranks[-1]), "")
        label = f"{axis} of rank {ranks[0]}" if axis else name
        shown = ranks[:_RANKS]
        groups.append(
            {
                "name": label, "axis": axis, "ranks": list(shown),
                "entered": [calls.get(r, (None, False))[0] for r in shown],
                "inside": [calls.get(r, (None, False))[1] for r in shown], "missing": missing[:_RANKS],
            }
        )  # fmt: skip
        call = next((seen[rank].waits for rank in inside if seen[rank].waits), "")
        waits.append({"from": inside[:_RANKS], "to": missing[:_RANKS], "group": label, "call": call})
    order = sorted(range(len(groups)), key=lambda i: (len(groups[i]["missing"]), groups[i]["name"]))[:_GROUPS]
    return [groups[i] for i in order], [waits[i] for i in order], max(0, len(groups) - _GROUPS)


def _by_ranks(layout: Mapping[str, int], world: int) -> dict[tuple[int, int, int], str]:
    """Axis by size, first and last rank of its groups; the first of `AXES` where two have the same groups."""
    places = coordinates(layout, np.arange(world))
    axes: dict[tuple[int, int, int], str] = {}
    for axis in AXES:
        rest = [places[other] for other in _view(axis) if other != axis]
        keys: NDArray[np.int64] = np.zeros(world, dtype=np.int64)
        for other in rest:
            keys = keys * (int(other.max(initial=0)) + 1) + other
        _, first, counts = np.unique(keys, return_index=True, return_counts=True)
        last = {int(k): i for i, k in enumerate(keys)}
        for begin, count in zip(first, counts, strict=True):
            if count > 1:
                axes.setdefault((int(count), int(begin), last[int(keys[begin])]), axis)
    if world > 1:
        axes.setdefault((world, 0, world - 1), "all")
    return axes


def _said(waits: Sequence[Mapping[str, Any]], seen: Mapping[int, RankStatus], culprits: Sequence[int]) -> str:
    """One sentence: who is waited for; where no wait was recorded, whom the attempt's incidents name."""
    if not waits and not culprits:
        return ""
    if not waits:
        return f"An incident names {_named(culprits, False)}{_held(culprits, seen)}"
    waiting = {rank for one in waits for rank in one["from"]}
    waited = {rank for one in waits for rank in one["to"]}
    # A rank that is waited for and waits itself isn't where it begins.
    first = sorted(waited - waiting) or sorted(waited)
    return f"{_named(sorted(waiting))} for {_named(first, False)}{_held(first, seen)}"


def _held(ranks: Sequence[int], seen: Mapping[int, RankStatus]) -> str:
    held = next((seen[rank].held for rank in ranks if rank in seen and seen[rank].held), "")
    return f", which is {held}" if held else ""


def _named(ranks: Sequence[int], wait: bool = True) -> str:
    most = 8
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    plural = len(ranks) != 1
    text = f"rank{'s' if plural else ''} {', '.join(map(str, ranks[:most]))}{more}"
    return f"{text} wait{'' if plural else 's'}" if wait else text
