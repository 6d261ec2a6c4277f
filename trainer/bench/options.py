"""What is typed to the bench. Loads no torch, so that the command line can say what there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError

BASELINES = ("plain", "hf", "deepspeed")
FORCED = ("balanced", "zipf")
"""Routings that don't ask the router."""
ROUTINGS = ("real", *FORCED)
FEEDS = ("device", "ahead", "inline")


@dataclass(frozen=True)
class Options:
    """What was typed."""

    overrides: tuple[str, ...]
    model: str
    layers: int | None
    routing: str
    """How tokens find their experts: `real`, as the router has it on real text; `balanced`; `zipf`."""
    steps: int
    baselines: tuple[str, ...]
    timeline: Path | None
    """Where the trace of a step goes."""
    overlap: bool = True
    """Whether communication may run beside computation."""
    feed: str = "device"
    """Where tokens come from: `device`, which has them already; `ahead`, a run's feed, which reads a step ahead; `inline`,
    the same within the step."""


def options_of(
    model: str, layers: int | None, routing_name: str, steps: int, others: str, timeline: Path | None,
    overrides: list[str],
) -> Options:  # fmt: skip
    """What was typed, checked.

    Raises:
        UserError: for a baseline that there isn't, none at all, or one that is there twice.
    """
    chosen = () if others == "none" else tuple(part.strip() for part in others.split(","))
    for one in chosen:
        if one not in BASELINES:
            why = "none can't be combined with others" if one == "none" else "no such baseline"
            raise UserError(
                f"--baselines {one or repr(one)}: {why}; use some of {', '.join(BASELINES)}, or none"
            )
    if twice := [one for one in BASELINES if chosen.count(one) > 1]:
        raise UserError(f"--baselines {others} names {twice[0]} twice; type it once")
    return Options(tuple(overrides), model, layers, routing_name, steps, chosen, timeline)
