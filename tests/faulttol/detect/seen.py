"""Gangs as plain data, for detectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.timeouts import Timeouts
from faulttol.detect.snapshot import RankObservation, Snapshot
from faulttol.recorder import PhaseMark, RankPhase, Record

TIMEOUTS = Timeouts(patience=30.0)  # heartbeat 1, agent 10, hang 30, start 180


def record(
    sequence: int,
    step: int,
    time: float,
    phase: RankPhase = RankPhase.FORWARD,
    mark: PhaseMark = PhaseMark.BEGIN,
) -> Record:
    return Record(sequence, time, mark, phase, step)


def gang(*ranks: RankObservation, now: float, world: int | None = None, **more: Any) -> Snapshot:
    """A gang of these ranks on two nodes, in its steps."""
    world = len(ranks) if world is None else world
    nodes = {rank: f"10.0.0.{1 + 2 * rank // max(world, 1)}" for rank in range(world)}
    told = {
        "since_start": now,
        "first_step_done": True,
        "timeouts": TIMEOUTS,
        "logs": "logs",
        "nodes": nodes,
    } | more
    return Snapshot(now=now, world=world, ranks={rank.rank: rank for rank in ranks}, **told)


def of_records(newest: Mapping[int, Record | None], **more: Any) -> list[RankObservation]:
    """Living ranks with these records."""
    return [RankObservation(rank, 1000 + rank, newest=one, **more) for rank, one in newest.items()]
