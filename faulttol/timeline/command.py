"""`python -m faulttol timeline RUN`: what an attempt's ranks did, as a file for Perfetto."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.paths import HomePaths, RunPaths, default_home
from faulttol.commands.handlers import CommandResult
from faulttol.recorder import PhaseMark, RankPhase
from faulttol.timeline.export import Timeline
from faulttol.timeline.sources import Activity, activities

_STEPS = 20
"""Steps that are drawn where none are named."""


def run(options: argparse.Namespace) -> CommandResult:
    """Write the file.

    Raises:
        UserError: where the run, the attempt, the steps or the ranks aren't on record.
    """
    paths = find(options.run)
    number = _attempt(paths, options.attempt)
    recorded = activities(paths.attempt(number))
    if not recorded:
        raise UserError(
            f"attempt {number} of {paths.run_id} has no records: nothing in {paths.attempt(number).root / 'steps'}, "
            "no rings and no evidence; name another with --attempt"
        )
    ranks = _span(options.ranks, "--ranks")
    chosen = {rank: one for rank, one in recorded.items() if ranks is None or rank in ranks}
    if not chosen:
        raise UserError(
            f"--ranks {options.ranks}: there are records of ranks {min(recorded)} to {max(recorded)}; name some of them"
        )
    steps = _cut(chosen, _span(options.steps, "--steps"), options.steps)
    timeline = Timeline.of(chosen)
    out = options.out or Path(f"timeline-{paths.run_id}-{number}.json")
    try:
        with out.open("w", encoding="utf-8") as file:
            events = timeline.write(file, {"run": paths.run_id, "attempt": number, "steps": list(steps)})
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name a file that can be written") from None
    overlap = timeline.overlap()
    data = {
        "file": str(out),
        "run": paths.run_id,
        "attempt": number,
        "steps": list(steps),
        "ranks": len(chosen),
        "events": events,
        "clocks": {
            "offsets_seconds": {node: ns / 1e9 for node, ns in timeline.alignment.offsets.items()},
            "residual_seconds": timeline.alignment.residual if timeline.alignment.shared else None,
            "shared_collectives": timeline.alignment.shared,
            "not_compared": list(timeline.alignment.apart),
        },
        "overlap": {name: asdict(one) | {"hidden": one.hidden} for name, one in overlap.items()},
    }
    return CommandResult(data, _lines(data, timeline))


def find(typed: str) -> RunPaths:
    """The run that was typed: its id, or its folder.

    Raises:
        UserError: where there is none.
    """
    path = Path(typed).expanduser()
    if path.is_dir() and (path / "attempts").is_dir():
        return RunPaths(path.resolve())
    home = HomePaths(default_home())
    # One under torchrun has no event log.
    if typed and "/" not in typed and home.run(typed).attempts.is_dir():
        return home.run(typed)
    return home.existing(typed)


def _attempt(paths: RunPaths, typed: int | None) -> int:
    there = paths.attempt_numbers()
    if not there:
        raise UserError(
            f"run '{paths.run_id}' has no attempt yet; `python -m orchestrator status {paths.run_id}` says why"
        )
    if typed is not None and typed not in there:
        raise UserError(
            f"--attempt {typed}: {paths.run_id} has attempts {', '.join(map(str, there[-8:]))}; name one of them"
        )
    return there[-1] if typed is None else typed


def _span(typed: str | None, option: str) -> range | None:
    if typed is None:
        return None
    first, colon, last = typed.partition(":")
    if (
        not colon
        or not all(end == "" or end.isdecimal() for end in (first, last))
        or (first and last and int(first) >= int(last))
    ):
        raise UserError(f"{option} {typed} isn't a span; type e.g. {option} 100:120, which is 100 to 119")
    return range(int(first or 0), int(last) if last else 1 << 62)


def _cut(chosen: Mapping[int, Activity], span: range | None, typed: str | None) -> tuple[int, int]:
    """Keep the steps that were asked for; the first, and the one after the last."""
    known = np.unique(np.concatenate([_begun(one)[0] for one in chosen.values()]))
    if not len(known):  # it never came to a step: all there is
        return 0, 0
    if span is None:
        wanted = known[-_STEPS:]
    else:
        wanted = known[(known >= span.start) & (known < span.stop)]
        if not len(wanted):
            raise UserError(
                f"--steps {typed}: steps {known[0]} to {known[-1]} are on record; name some of them"
            )
    first, last = int(wanted[0]), int(wanted[-1])
    for one in chosen.values():
        steps, times = _begun(one)
        begin, end = np.searchsorted(steps, first, "left"), np.searchsorted(steps, last, "right")
        start = int(times[begin]) if begin < len(times) else 1 << 62
        one.between(start, int(times[end]) if end < len(times) else 1 << 62)
    return first, last + 1


def _begun(one: Activity) -> tuple[np.ndarray, np.ndarray]:
    """Steps of a rank, and when each began."""
    rows = one.phases
    starting = np.flatnonzero((rows["mark"] == PhaseMark.BEGIN) & (rows["phase"] == RankPhase.LOAD))
    rows = rows[starting[-1] :] if len(starting) else rows
    mine = rows[(rows["mark"] == PhaseMark.BEGIN) & (rows["phase"] == RankPhase.DATA)]
    steps, first = np.unique(mine["step"], return_index=True)
    return steps, mine["ns"][first]


def _lines(data: Mapping[str, Any], timeline: Timeline) -> list[str]:
    first, last = data["steps"]
    steps = f"steps {first} to {last - 1}" if last > first else "no steps"
    lines = [
        f"{data['file']}: {data['events']} events of {data['ranks']} ranks, {steps} of attempt {data['attempt']}"
    ]
    apart = timeline.alignment
    if len(apart.offsets) > 1 and apart.shared:
        most = max(abs(ns) for ns in apart.offsets.values()) / 1e3
        lines.append(
            f"clocks of {len(apart.offsets)} nodes aligned by {apart.shared} collectives: up to {most:.0f} us apart, "
            f"{apart.residual * 1e6:.0f} us left"
        )
    if apart.apart:
        lines.append(
            f"clocks not compared, since they share no collective here: {', '.join(apart.apart[:8])}"
        )
    for name, one in timeline.overlap().items():
        lines.append(
            f"{name}: {one.calls} calls, {one.flight:.3f} s in flight, {one.waited:.3f} s waited, {one.hidden:.0%} hidden"
        )
    return [*lines, "open it at ui.perfetto.dev or chrome://tracing: both keep it in the browser"]
