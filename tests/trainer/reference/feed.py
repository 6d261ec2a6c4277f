"""Feed-forward part of one sample: dense, or a router and its experts with what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.model import ModelConfig
from tests.trainer.reference.attention import linear, rms_norm


def silu(x: Tensor) -> Tensor:
    """x times its logistic function."""
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function of x (exact, no tanh)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def mlp(model: ModelConfig, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """SwiGLU, or up, GELU and down."""
    if model.gated:
        return linear(silu(linear(x, w["gate.weight"])) * linear(x, w["up.weight"]), w["down.weight"])
    return linear(gelu(linear(x, w["up.weight"])), w["down.weight"])


def experts_of(model: ModelConfig, w: dict[str, Tensor]) -> list[Callable[[Tensor], Tensor]]:
    """Each expert as a function of one token [D]."""

    def gated(both: Tensor, down: Tensor) -> Callable[[Tensor], Tensor]:
        gate, up = both[0], both[1]
        return lambda x_D: down @ (silu(gate @ x_D) * (up @ x_D))

    def plain(up: Tensor, down: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x_D: down @ gelu(up @ x_D)

    first = w["experts.gate_up"] if model.gated else w["experts.up"]
    make = gated if model.gated else plain
    return [make(one, down) for one, down in zip(first, w["experts.down"], strict=True)]


@dataclass
class RoutedSample:
    """What a router did to one sample."""

    output: Tensor
    """[S, D]"""
    load: list[int]
    """Choices of each expert, dropped ones among them."""
    dropped: int
    aux: Tensor
    """Weighted auxiliary loss, not yet divided by a number of layers."""
    z: Tensor
    """Weighted z-loss, likewise."""
    state: Tensor | None
    """What an `mlp` router hands to that of the next layer, [S, hidden]."""


def router_logits(
    model: ModelConfig, w: dict[str, Tensor], x: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits [S, E], and the state for the next layer's router.

    `mlp` is ZAYA1's router (arXiv 2511.17127): down-projection, average over depth (the state of the router before, times
    a learned vector, is added), norm, and an MLP of three layers.
    """
    if model.router.kind == "linear":
        return linear(x, w["router.linear.weight"]), None
    hidden = linear(x, w["router.compress.weight"], w["router.compress.bias"])
    if state is not None:
        hidden = hidden + state * w["router.state_scale"]
    y = rms_norm(hidden, w["router.norm.weight"], model.norm_eps)
    y = gelu(linear(y, w["router.first.weight"], w["router.first.bias"]))
    y = gelu(linear(y, w["router.second.weight"], w["router.second.bias"]))
    return linear(y, w["router.last.weight"]), hidden


def choose(model: ModelConfig, choice: list[float]) -> list[int]:
    """The experts of one token, best first, by choice score; only those of the best groups compete."""
    experts, groups = len(choice), model.router.groups
    allowed = set(range(experts))
    if groups > 1:
        size = experts // groups
        best_of_group = 2 if model.router.score == "sigmoid" else 1
        scores = []
        for group in range(groups):
            members = sorted(choice[group * size : (group + 1) * size], reverse=True)
            scores.append(sum(members[:best_of_group]))
        best = sorted(range(groups), key=lambda group: -scores[group])[: model.router.top_groups]
        allowed = {expert for expert in allowed if expert // size in best}
    return sorted(allowed, key=lambda expert: -choice[expert])[: model.top_k]


def mixture(model: ModelConfig, w: dict[str, Tensor], x: Tensor, state: Tensor | None) -> RoutedSample:
    """Router, experts and shared expert on one sample."""
    router, places, experts = model.router, x.shape[0], model.experts
    logits, state = router_logits(model, w, x, state)
    shifted = torch.exp(logits - logits.max(dim=-1, keepdim=True).values.detach())
    scores = (
        1 / (1 + torch.exp(-logits)) if router.score == "sigmoid" else shifted / shifted.sum(-1, keepdim=True)
    )
    bias = w["router.bias"] if router.balance in ("bias", "both") else torch.zeros(experts, dtype=x.dtype)
    chosen = [choose(model, (scores[place].detach() + bias).tolist()) for place in range(places)]

    limit = places * model.top_k
    if router.capacity_factor is not None:
        limit = math.ceil(router.capacity_factor * places * model.top_k / experts)
    functions, load, dropped, rows = experts_of(model, w), [0] * experts, 0, []
    for place in range(places):
        weights = torch.stack([scores[place, number] for number in chosen[place]])
        if router.renormalize and model.top_k > 1:
            weights = weights / (weights.sum() + 1e-20)
        row = torch.zeros_like(x[place])
        for number, weight in zip(chosen[place], weights * router.scale, strict=True):
            if load[number] < limit:
                row = row + weight * functions[number](x[place])
            else:
                dropped += 1
            load[number] += 1
        rows.append(row)
    output = torch.stack(rows)
    if model.shared_width:
        output = output + mlp(model, inside(w, "shared."), x)

    aux = z = torch.zeros((), dtype=x.dtype)
    if router.balance in ("aux", "both"):
        share = scores / scores.sum(-1, keepdim=True)
        for number in range(experts):
            aux = aux + load[number] / (places * model.top_k) * share[:, number].sum() / places
        aux = router.aux_coefficient * experts * aux
    if router.z_coefficient:
        largest = logits.max(dim=-1).values.detach()
        log_sum = torch.log(torch.exp(logits - largest[:, None]).sum(-1)) + largest
        z = router.z_coefficient * (log_sum * log_sum).sum() / places
    return RoutedSample(output, load, dropped, aux, z, state)


def inside(w: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
