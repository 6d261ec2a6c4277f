"""Where tokens go: generated and recorded routing, as loads of experts and bytes between ranks. Pure.

Loads are integers [ranks, experts]: token-expert pairs that each rank sends to each expert. Experts are spread over
the ranks in order, experts / ranks on each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from configs.fabric import Pattern

Loads = NDArray[np.int64]
"""[ranks, experts]"""
_HOT = 4.0
"""Load of what is hot over the mean."""
_BURST_STAY, _BURST_BEGIN = 0.7, 0.2
"""Chances from one step to the next that a burst continues, and that one begins."""


def shares(
    pattern: Pattern, steps: int, ranks: int, experts: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Share of all pairs that goes to each expert, step after step.

    `hot_expert`, `hot_rank`: one has four times the mean, all the time; `zipf`: as one over the place; `bursty`: at
    times a hot expert, at times even; `rotating`: the hot expert moves on by one each step.
    """
    bursting = False
    for step in range(steps):
        if pattern == "zipf":
            yield _normal(1 / np.arange(1, experts + 1))
            continue
        hot: Sequence[int] = ()
        if pattern == "hot_rank":
            hot = range(experts // ranks)
        elif pattern == "hot_expert":
            hot = (0,)
        elif pattern == "rotating":
            hot = (step % experts,)
        elif pattern == "bursty":
            bursting = bool(rng.random() < (_BURST_STAY if bursting else _BURST_BEGIN))
            hot = (int(rng.integers(experts)),) if bursting else ()
        yield _with_hot_experts(experts, hot)


def _with_hot_experts(experts: int, hot: Sequence[int]) -> np.ndarray:
    """Even, but for the hot ones, which have `_HOT` times the mean, or all that there is."""
    share = np.full(experts, 1 / experts)
    if hot:
        each = min(_HOT / experts, 1 / len(hot))
        share[:] = (1 - each * len(hot)) / max(1, experts - len(hot))
        share[list(hot)] = each
    return share


def _normal(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def generated(
    pattern: Pattern, steps: int, ranks: int, experts: int, pairs: int, rng: np.random.Generator
) -> list[Loads]:
    """Loads of each step: every rank sends `pairs`; evenly where `balanced`, else drawn at random by the shares."""
    if pattern == "balanced":
        even = np.full(experts, pairs // experts)
        even[: pairs % experts] += 1
        return [np.tile(even, (ranks, 1))]
    return [
        rng.multinomial(pairs, share, size=ranks).astype(np.int64)
        for share in shares(pattern, steps, ranks, experts, rng)
    ]


def recorded(load: Sequence[int], ranks: int, pairs: int) -> Loads:
    """A layer's load as a run recorded it, over all ranks, scaled to `pairs` from each of `ranks`."""
    share = np.asarray(load, float)
    exact = share / share.sum() * pairs
    whole = np.floor(exact).astype(np.int64)
    # What rounding down left over goes to the largest remainders.
    for index in np.argsort(whole - exact, kind="stable")[: pairs - int(whole.sum())]:
        whole[index] += 1
    return np.tile(whole, (ranks, 1))


def skewed(imbalance: float, ranks: int, experts: int, pairs: int) -> Loads:
    """Loads where rank 0 gets `imbalance` times the mean and the others share the rest evenly."""
    mine = experts // ranks
    weights = np.full(experts, (ranks - imbalance) / (ranks - 1))
    weights[:mine] = imbalance
    return recorded([*weights], ranks, pairs)


def between_ranks(loads: Loads) -> NDArray[np.int64]:
    """Pairs from each rank (row) to each rank (column)."""
    ranks = len(loads)
    return loads.reshape(ranks, ranks, -1).sum(axis=2)


def imbalance(loads: Loads) -> float:
    """Pairs that the most loaded rank gets over the mean of the ranks."""
    got = between_ranks(loads).sum(axis=0)
    return float(got.max() / got.mean())


def split_loads(loads: Loads, parts: int) -> list[Loads]:
    """Loads in `parts` that add up to the whole, each as even as whole pairs allow."""
    edges = [loads * number // parts for number in range(parts + 1)]
    return [after - before for before, after in zip(edges, edges[1:], strict=False)]
