"""How many steps lie between two saves: what saves cost against what failures cost. Pure arithmetic.

The optimum is that of Young ("A first order approximation to the optimum checkpoint interval", 1974) with the higher
order terms of Daly ("A higher order estimate of the optimum checkpoint interval for restart dumps", 2006), equation 37.
Both hold for failures that come at random at a constant rate. What a save holds training for is their cost of a dump; the
time until it is durable, in which training continues, adds the same to every loss and so moves no optimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_NOISE = 1e-9
"""Relative error of a quotient that would else be rounded up by one."""


@dataclass(frozen=True)
class Interval:
    """How often to save."""

    steps: int
    """Between two saves."""
    reason: str
    """Which numbers led to it, and what bound it."""


def optimum(held_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of training between two saves that lose least (Daly 2006, equation 37).

    sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + (d / 2M) / 9) - d for a save that holds d < 2 M, where M is the mean time between
    failures; M where a save holds longer.
    """
    if held_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    share = held_seconds / (2 * mtbf_seconds)
    young = math.sqrt(2 * held_seconds * mtbf_seconds)
    return young * (1 + math.sqrt(share) / 3 + share / 9) - held_seconds


def interval(
    step_seconds: float,
    held_seconds: float,
    durable_seconds: float,
    mtbf_seconds: float,
    budget: float,
    least: int,
    most: int,
) -> Interval:
    """The interval that loses least, with bounds in this order: the budget, one save at a time, then `least` and `most`.

    Args:
        step_seconds: of one step, saves not counted.
        held_seconds: that a save holds training.
        durable_seconds: from the call of a save to its commit.
        mtbf_seconds: mean time between failures of the whole gang.
        budget: largest share of the time that saves may hold training; in (0, 1).
        least: fewest steps.
        most: most steps; it holds where it contradicts the other bounds.

    Raises:
        ValueError: for numbers that aren't positive where they must be, or `least` above `most`.
    """
    _check(step_seconds, held_seconds, durable_seconds, mtbf_seconds)
    if not 0 < budget < 1 or not 1 <= least <= most:
        raise ValueError(
            f"budget={budget}, least={least}, most={most}: 0 < budget < 1 and 1 <= least <= most hold"
        )
    best = optimum(held_seconds, mtbf_seconds)
    steps = max(1, round(best / step_seconds))
    why = (
        f"{held_seconds:.3g} s held a save, {_span(mtbf_seconds)} between failures: best after {_span(best)}"
    )
    floors = [
        (held_seconds * (1 - budget) / budget / step_seconds, f"checkpoint.budget={budget:g}"),
        (
            (durable_seconds - held_seconds) / step_seconds,
            f"a save that takes {durable_seconds:.3g} s to commit",
        ),
        (least, f"at least {least}"),
    ]
    for floor, name in floors:
        if math.ceil(floor * (1 - _NOISE)) > steps:
            why += f"; {steps} steps raised to {math.ceil(floor * (1 - _NOISE))} by {name}"
            steps = math.ceil(floor * (1 - _NOISE))
    if steps > most:
        why, steps = f"{why}; {steps} steps lowered to {most}, the most", most
    lost = lost_seconds(steps, step_seconds, held_seconds, durable_seconds)
    return Interval(
        steps, f"{steps} steps of {step_seconds:.3g} s ({why}); a failure then costs {_span(lost)} of work"
    )


def lost_seconds(steps: float, step_seconds: float, held_seconds: float, durable_seconds: float) -> float:
    """Seconds of training that a failure costs on average: half an interval, and the time until a save counts.

    A failure finds the newest commit to be of a state that is `durable_seconds` to `durable_seconds` plus an interval old,
    each as likely.
    """
    return durable_seconds + (steps * step_seconds + held_seconds) / 2


def mtbf(prior_hours: float, failures: int, hours: float) -> float:
    """Mean hours between failures, from what was assumed and what was met.

    The assumption counts as one failure in `prior_hours`: the mean rate after a gamma prior of that weight. So a run that
    has met nothing yet continues with the assumption, and slowly trusts its luck.

    Args:
        failures: met so far.
        hours: in which they were met.

    Raises:
        ValueError: where the assumption isn't positive, or a number is negative.
    """
    if not prior_hours > 0 or failures < 0 or not hours >= 0:
        raise ValueError(
            f"prior_hours={prior_hours}, failures={failures}, hours={hours}: negative or no time at all"
        )
    return (prior_hours + hours) / (1 + failures)


def _check(step: float, held: float, durable: float, between: float) -> None:
    if not (step > 0 and held >= 0 and durable >= 0 and between > 0) or math.isinf(
        step + held + durable + between
    ):
        raise ValueError(
            f"step {step} s, held {held} s, durable {durable} s, mtbf {between} s: finite and positive, held and durable "
            "may be 0"
        )


def _span(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
