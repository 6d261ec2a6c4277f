"""The router: which experts a token goes to, with which weight, and how the loads are kept even.

Shape letters: B samples, S tokens of a sample on this rank, D model width, R router width, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import ModelConfig
from trainer.kernels.choice import use_kernels
from trainer.model.norm import RMSNorm, upcast
from trainer.model.seams import MicroBatch, SampleSeam

#: AdamW on the balancing bias (`bias_rule=load_error`), as AMD's port of ZAYA1 has it.
_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class RouterChoice:
    """What a router says of a micro-batch."""

    chosen_BSK: Tensor
    """Experts, best first; -1 where the expert has no room."""
    weights_BSK: Tensor
    """Their weights, fp32."""
    loss: Tensor | None
    """This rank's share of the step's auxiliary losses, a number; None without any."""
    state_BSR: Tensor | None
    """What the next layer's router adds to its own; None for a `linear` router."""


class Router(nn.Module):
    """One matrix, `linear.weight` [E, D]; softmax or sigmoid scores and the choice of the top k, all in fp32.

    choice = scores + bias, without gradient; the bias [E] is a buffer that counts under `balance=bias` and `both` alone
    (aux-loss-free balancing, DeepSeek-V3 section 2.1.2). With groups, a group counts as much as its best choice, or as the
    sum of its two best with sigmoid scores; only experts of the best groups compete. Weights are the scores of the chosen,
    divided by (their sum + 1e-20) under `renormalize` where K > 1, times `scale`.

    Losses are those of whole samples, so that neither micro-batch nor layout changes them. For a sample b of S tokens:
    auxiliary loss (`balance=aux` and `both`) aux_coefficient * E * sum_e f_be P_be, f_be being the share of the S*K
    choices that fell on e (dropped ones among them) and P_be the mean over tokens of scores/sum(scores); z-loss
    z_coefficient * mean over tokens of logsumexp(logits)^2. Under `losses_over_layers=mean` both are divided by the number
    of routers, those of multi-token prediction among them.
    """

    bias: Tensor
    bias_avg: Tensor
    bias_avg_sq: Tensor

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = model.router, layer
        self.biased = model.router.balance in ("bias", "both")
        """Whether the bias counts, and moves."""
        self.top_k, self.experts = model.top_k, model.experts
        routers = len(model.router_layers)
        self.share = 1.0 / routers if model.router.losses_over_layers == "mean" else 1.0
        self._build(model)
        slots = ["bias", "bias_avg", "bias_avg_sq"] if self.config.bias_rule == "load_error" else ["bias"]
        for name in slots:
            self.register_buffer(name, torch.zeros(model.experts, dtype=torch.float32))

    def _build(self, model: ModelConfig) -> None:
        self.linear = nn.Linear(model.hidden, model.experts, bias=False)

    def logits(self, x_BSD: Tensor, state_BSR: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, S, E] in fp32, and the state for the next layer."""
        if use_kernels(x_BSD):
            from trainer.kernels.route import fp32_linear

            return fp32_linear(x_BSD, self.linear.weight), state_BSR
        return F.linear(upcast(x_BSD), upcast(self.linear.weight)), state_BSR

    def forward(
        self, x_BSD: Tensor, state_BSR: Tensor | None, micro: MicroBatch, samples: SampleSeam
    ) -> RouterChoice:
        """Choose, count the choices in `micro.tally`, and drop what is over the capacity."""
        logits_BSE, state_BSR = self.logits(x_BSD, state_BSR)
        if self.config.groups == 1 and use_kernels(x_BSD):
            return self._fused(logits_BSE, state_BSR, micro, samples)
        softmax = self.config.score == "softmax"
        scores_BSE = logits_BSE.softmax(dim=-1) if softmax else logits_BSE.sigmoid()
        chosen_BSK = self.choose(scores_BSE.detach())
        weights_BSK = scores_BSE.gather(-1, chosen_BSK)
        if self.config.renormalize and self.top_k > 1:
            weights_BSK = weights_BSK / (weights_BSK.sum(dim=-1, keepdim=True) + 1e-20)
        count_BE = count(chosen_BSK, self.experts)
        micro.tally.count(self.layer, count_BE.sum(dim=0))
        loss = self._losses(scores_BSE, logits_BSE, count_BE, micro, samples)
        if self.config.capacity_factor is not None:
            chosen_BSK = self._drop(chosen_BSK, micro, samples)
        return RouterChoice(chosen_BSK, weights_BSK * self.config.scale, loss, state_BSR)

    def _fused(
        self, logits_BSE: Tensor, state_BSR: Tensor | None, micro: MicroBatch, samples: SampleSeam
    ) -> RouterChoice:
        """The same by one kernel each way."""
        from trainer.kernels.route import RoutingRule, route

        config = self.config
        rule = RoutingRule(
            self.top_k, config.score == "softmax", config.renormalize and self.top_k > 1, config.scale,
            sums=self._balances or bool(config.z_coefficient),
        )  # fmt: skip
        bias_E = self.bias if self.biased else None
        chosen_BSK, weights_BSK, count_BPE, share_BE, square = route(logits_BSE, bias_E, rule)
        micro.tally.count(self.layer, count_BPE.sum(dim=(0, 1)))
        loss = self._weighted(share_BE, square, count_BPE.sum(dim=1), micro, samples) if rule.sums else None
        if config.capacity_factor is not None:
            chosen_BSK = self._drop(chosen_BSK, micro, samples)
        return RouterChoice(chosen_BSK, weights_BSK, loss, state_BSR)

    def choose(self, scores_BSE: Tensor) -> Tensor:
        """The top k experts by score and bias within the best groups, [..., K], best first."""
        choice_BSE = scores_BSE + self.bias if self.biased else scores_BSE
        groups = self.config.groups
        if groups > 1:
            in_groups = choice_BSE.unflatten(-1, (groups, -1))
            best = 2 if self.config.score == "sigmoid" else 1
            group_BSG = in_groups.topk(min(best, in_groups.shape[-1]), dim=-1).values.sum(dim=-1)
            top = group_BSG.topk(self.config.top_groups, dim=-1).indices
            out = torch.ones_like(group_BSG, dtype=torch.bool).scatter(-1, top, False)
            choice_BSE = in_groups.masked_fill(out.unsqueeze(-1), -math.inf).flatten(-2)
        return choice_BSE.topk(self.top_k, dim=-1).indices

    def capacity(self, sequence: int) -> int:
        """Rows that an expert takes of one sample: ceil(capacity_factor * sequence * K / E)."""
        factor = self.config.capacity_factor
        return sequence if factor is None else math.ceil(factor * sequence * self.top_k / self.experts)

    def _drop(self, chosen_BSK: Tensor, micro: MicroBatch, samples: SampleSeam) -> Tensor:
        over_BSK = samples.queue(chosen_BSK, self.experts, micro) >= self.capacity(micro.sequence)
        micro.tally.add(micro.tally.dropped, over_BSK.sum())
        return chosen_BSK.masked_fill(over_BSK, -1)

    def _losses(
        self, scores_BSE: Tensor, logits_BSE: Tensor, count_BE: Tensor, micro: MicroBatch, samples: SampleSeam
    ) -> Tensor | None:
        sums_BE = square = None
        if self._balances:
            probability_BSE = scores_BSE / scores_BSE.sum(dim=-1, keepdim=True)
            sums_BE = probability_BSE.sum(dim=1)
        if self.config.z_coefficient:
            square = logits_BSE.logsumexp(dim=-1).square().sum()
        return self._weighted(sums_BE, square, count_BE, micro, samples)

    @property
    def _balances(self) -> bool:
        """Whether a loss balances."""
        return self.config.balance in ("aux", "both") and bool(self.config.aux_coefficient)

    def _weighted(
        self,
        sums_BE: Tensor | None,
        square: Tensor | None,
        count_BE: Tensor,
        micro: MicroBatch,
        samples: SampleSeam,
    ) -> Tensor | None:
        """The losses from each sample's sums of probabilities and the sum of squared logsumexps."""
        parts = []
        if self._balances and sums_BE is not None:
            share_BE = samples.total(count_BE) / (micro.sequence * self.top_k)
            even = self.experts * (share_BE * sums_BE).sum()
            parts.append(self.config.aux_coefficient * even)
        if self.config.z_coefficient and square is not None:
            parts.append(self.config.z_coefficient * square)
        if not parts:
            return None
        loss = sum(parts[1:], parts[0]) * (micro.loss_weight * self.share / micro.sequence)
        micro.tally.add(micro.tally.losses, loss)
        return loss


@torch.no_grad()
def update_biases(
    routers: Sequence[Router], load_LE: Tensor, applied: int | Tensor, skip: Tensor | None = None
) -> None:
    """After a step, raise the biases of experts with less than their share and lower those of the others.

    All routers' in one go: their own launches, two dozen for each, took 0.5 ms of the host each.

    `sign`: bias += rate * sign(mean(load) - load). `load_error`: AdamW (betas 0.9 and 0.999, eps 1e-8, no decay) with
    the gradient load/sum(load) - 1/E and lr = rate.

    Args:
        load_LE: pairs of each expert over the whole step, by router.
        applied: steps that have moved the weights, this one among them.
        skip: 1 on the device where nothing may move, 0 elsewhere; None for 0.
    """
    if not routers or not routers[0].biased:
        return
    config, experts = routers[0].config, routers[0].experts
    rate = config.bias_rate(experts)

    def now(name: str) -> Tensor:
        return torch.stack([getattr(router, name) for router in routers])

    bias_LE = now("bias")
    load_LE = load_LE.to(bias_LE.dtype)
    if config.bias_rule == "sign":
        to = {"bias": bias_LE + rate * torch.sign(load_LE.mean(dim=1, keepdim=True) - load_LE)}
    else:
        error_LE = load_LE / load_LE.sum(dim=1, keepdim=True) - 1.0 / experts
        first, second = _BETAS
        avg_LE = first * now("bias_avg") + (1 - first) * error_LE
        avg_sq_LE = second * now("bias_avg_sq") + (1 - second) * error_LE.square()
        spread_LE = (avg_sq_LE / (1 - second**applied)).sqrt() + _EPS
        to = {
            "bias": bias_LE - rate * (avg_LE / (1 - first**applied)) / spread_LE,
            "bias_avg": avg_LE, "bias_avg_sq": avg_sq_LE,
        }  # fmt: skip
    for name, moved_LE in to.items():
        kept_LE = moved_LE if skip is None else torch.where(skip > 0, now(name), moved_LE)
        torch._foreach_copy_([getattr(router, name) for router in routers], list(kept_LE))


class MLPRouter(Router):
    """ZAYA1's router (arXiv 2511.17127): down-projection, average over depth, three-layer MLP with GELU.

    state = compress(x) + state_scale * (state of the MoE layer before); the first MoE layer, and each block of multi-token
    prediction, has neither a layer before nor a `state_scale`. logits = last(gelu(second(gelu(first(norm(state)))))).
    Parameters: `compress` [R, D], `first` and `second` [R, R], each with `.weight` and `.bias`; `last.weight` [E, R];
    `norm.weight` and `state_scale` [R]. The state is handed on in the activations' dtype. ZAYA1's released code has one
    more class that skips the experts, which the paper doesn't have; it isn't built.
    """

    def __init__(self, model: ModelConfig, layer: int, carried: bool) -> None:
        super().__init__(model, layer)
        if carried:
            self.state_scale = nn.Parameter(torch.ones(model.router.hidden))
        self.carried = carried
        self.single_output = False
        """As in `RMSNorm`."""

    def _build(self, model: ModelConfig) -> None:
        width = model.router.hidden
        self.compress = nn.Linear(model.hidden, width)
        self.norm = RMSNorm(width, model.norm_eps)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, model.experts, bias=False)

    def logits(self, x_BSD: Tensor, state_BSR: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, S, E] in fp32, and the state for the next layer."""
        if use_kernels(x_BSD) and self.compress.weight.dtype == x_BSD.dtype and not self.single_output:
            return self._by_kernels(x_BSD, state_BSR)
        own_BSR = _linear(self.compress, upcast(x_BSD))
        if self.carried and state_BSR is not None:
            own_BSR = own_BSR + upcast(state_BSR) * upcast(self.state_scale)
        handed_BSR = own_BSR.to(x_BSD.dtype)
        inner_BSR = F.gelu(_linear(self.first, self.norm(own_BSR)))
        return _linear(self.last, F.gelu(_linear(self.second, inner_BSR))), handed_BSR

    def _by_kernels(self, x_BSD: Tensor, state_BSR: Tensor | None) -> tuple[Tensor, Tensor]:
        from trainer.kernels.mlp import RouterWeights, mlp_logits

        carries = self.carried and state_BSR is not None
        weights = RouterWeights(
            self.compress.weight, self.compress.bias, self.state_scale if carries else None, self.norm.weight,
            self.first.weight, self.first.bias, self.second.weight, self.second.bias, self.last.weight,
        )  # fmt: skip
        return mlp_logits(x_BSD, state_BSR if carries else None, weights, self.norm.eps)


def make_router(model: ModelConfig, layer: int, carried: bool) -> Router:
    """The router that the configuration asks for."""
    return MLPRouter(model, layer, carried) if model.router.kind == "mlp" else Router(model, layer)


def count(chosen_BSK: Tensor, experts: int) -> Tensor:
    """Choices of each expert by sample, [B, E] int64. A comparison instead of `bincount`, which waits for the device."""
    ids_E = torch.arange(experts, device=chosen_BSK.device)
    return (chosen_BSK.flatten(1).unsqueeze(-1) == ids_E).sum(dim=1)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, upcast(layer.weight), None if layer.bias is None else upcast(layer.bias))
