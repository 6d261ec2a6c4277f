"""Forced routing: routers compute as usual, then a table replaces their choices, here and in baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.bench.options import FORCED
from trainer.model.decoder import DecoderStage
from trainer.model.router import Router, RouterChoice, count
from trainer.model.seams import MicroBatch, SampleSeam

EXPONENT = 1.0
"""Of Zipf's law: the load of the i-th expert is as 1/i."""


def force_routing(stage: DecoderStage, routing: str) -> None:
    """Have all routers of a stage choose by a table, `balanced` or `zipf`."""
    for router in stage.routers().values():
        setattr(router, "forward", _Forced(router, routing))  # noqa: B010  (a method, for the bench alone)


class _Forced:
    def __init__(self, router: Router, routing: str) -> None:
        self._choose, self._router, self._routing = router.forward, router, routing
        self._tables: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def __call__(
        self, x: Tensor, state: Tensor | None, micro: MicroBatch, samples: SampleSeam, *rest: Any
    ) -> RouterChoice:
        muted, micro.tally.muted = micro.tally.muted, True
        choice = self._choose(x, state, micro, samples, *rest)
        micro.tally.muted = muted
        shape = tuple(choice.chosen_BSK.shape)
        if shape not in self._tables:
            table = routing_table(self._routing, shape, self._router.experts, self._router.layer).to(x.device)
            self._tables[shape] = table, count(table, self._router.experts).sum(dim=0)
        chosen, loads = self._tables[shape]
        micro.tally.count(self._router.layer, loads)
        if choice.loss is not None:
            micro.tally.add(micro.tally.losses, choice.loss)
        return replace(choice, chosen_BSK=chosen)


def max_over_mean_rows(load: Tensor, ep: int) -> float:
    """Rows of the fullest of `ep` ranks over their mean, averaged over layers, each of which waits for its fullest rank.
    What is lent counts where it is at home.

    Args:
        load: token-expert pairs, [MoE layers, experts], as a step returns them; each rank of ep has equally many experts.
    """
    rows = load.double().unflatten(1, (ep, -1)).sum(dim=2)
    return float((rows.amax(dim=1) / rows.mean(dim=1)).mean())


def force_baseline_routing(
    routers: Sequence[nn.Module], routing: str, shape: tuple[int, int], experts: int, top_k: int
) -> None:
    """Force the routers of a baseline's model, in the order of its layers, whose call ends with the experts of each token,
    [..., K].

    Args:
        shape: samples and tokens of a sample.
    """
    for layer, router in enumerate(routers):
        table = routing_table(routing, (*shape, top_k), experts, layer).flatten(0, 1)
        router.register_forward_hook(partial(_replace_choice, table.to(next(router.parameters()).device)))


def _replace_choice(table: Tensor, _router: nn.Module, _given: Any, made: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*made[:-1], table)


def routing_table(routing: str, shape: tuple[int, ...], experts: int, seed: int) -> Tensor:
    """Choices of each token, no expert twice; [B, S, K] int64.

    `balanced`: every expert has the same load to within one. `zipf`: drawn without replacement by 1/rank, another order of
    the experts in each layer.

    Raises:
        ValueError: for another routing.
    """
    if routing not in FORCED:
        raise ValueError(f"routing '{routing}' can't be forced; {' and '.join(FORCED)} can")
    generator = torch.Generator().manual_seed(seed)
    tokens, top_k = shape[0] * shape[1], shape[2]
    order = torch.randperm(experts, generator=generator)
    if routing == "balanced":
        pairs = torch.arange(tokens * top_k).view(tokens, top_k) % experts
        pairs = pairs[torch.randperm(tokens, generator=generator)]
        return order[pairs].view(shape)
    weights = 1.0 / torch.arange(1, experts + 1, dtype=torch.float64) ** EXPONENT
    drawn = torch.multinomial(weights.expand(tokens, -1), top_k, replacement=False, generator=generator)
    return order[drawn].view(shape)
