"""What each rank was last seen doing, for people: one small file per node, replaced whole by the node's agent.

The controller never reads it, and nothing is decided by it. It stays as it was when an attempt ends, so that who waited for
whom can still be looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import from_json
from configs.paths import write_whole
from faulttol.detect.snapshot import GroupStatus, RankObservation

_SUFFIX = ".seen.json"


@dataclass(frozen=True)
class RankStatus:
    """One rank as its node's agent saw it."""

    rank: int
    node: str
    time: float
    """When its agent wrote it, in seconds since the epoch."""
    step: int | None
    phase: str
    """That it has begun; empty where it has ended one or tells nothing."""
    since: float | None
    """Of its newest record."""
    state: str
    waits: str
    held: str
    exit_code: int | None
    groups: tuple[GroupStatus, ...]


def write_statuses(folder: Path, node: str, ranks: Sequence[RankObservation], now: float) -> None:
    """Replace a node's file.

    Args:
        folder: `AttemptPaths.seen`; made where it isn't there.
        node: id of the node; it names the file.
        ranks: newest look at each of the node's ranks.
        now: seconds since the epoch.

    Raises:
        OSError: where it can't be written.
    """
    rows = []
    for one in ranks:
        newest = one.newest
        begun = newest is not None and newest.mark == 0
        rows.append(
            {
                "rank": one.rank,
                "step": newest.step if newest else None,
                "phase": newest.phase.name.lower() if newest and begun else "",
                "since": newest.time if newest else None,
                "state": one.state,
                "waits": one.waits,
                "held": one.held,
                "exit": one.exit_code,
                "groups": [[g.name, _compact(g.ranks), g.entered, g.left] for g in one.groups],
            }
        )
    name = "".join(c if c.isalnum() or c in "-._" else "_" for c in node)
    path = folder / f"{name}{_SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"format": 1, "node": node, "time": now, "ranks": rows}))


def _compact(ranks: Sequence[int]) -> list[Any]:
    if isinstance(ranks, range):
        return ["range", ranks.start, ranks.stop, ranks.step]
    return ["list", *ranks]


class RankStatusReader:
    """The files of one folder, each read again only where it has changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[tuple[int, int], list[RankStatus]]] = {}

    def update(self) -> list[RankStatus]:
        """All ranks that were seen, by rank. A file that is damaged or isn't there has none.

        Raises:
            OSError: where the folder can't be read.
        """
        try:
            entries = [e for e in os.scandir(self._folder) if e.name.endswith(_SUFFIX)]
        except FileNotFoundError:
            entries = []
        current = {}
        for entry in entries:
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue
            mark = (stat.st_mtime_ns, stat.st_size)
            known = self._known.get(entry.name)
            current[entry.name] = known if known and known[0] == mark else (mark, _read(Path(entry.path)))
        self._known = current
        return sorted((one for _, looks in current.values() for one in looks), key=lambda one: one.rank)


def _read(path: Path) -> list[RankStatus]:
    try:
        tree = from_json(path.read_bytes())
        node, time = str(tree["node"]), float(tree["time"])
        return [
            RankStatus(
                int(row["rank"]), node, time, row["step"], str(row["phase"]), row["since"], str(row["state"]),
                str(row["waits"]), str(row["held"]), row["exit"],
                tuple(GroupStatus(name, _ranks(ranks), int(into), int(out)) for name, ranks, into, out in row["groups"]),
            )
            for row in tree["ranks"]
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _ranks(words: list[Any]) -> Sequence[int]:
    return range(*words[1:]) if words[0] == "range" else tuple(words[1:])
