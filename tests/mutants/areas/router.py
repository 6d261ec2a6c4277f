"""Defects of the router: choice, weights, balancing, losses, capacity, counting."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_ROUTER = "trainer/model/router.py"
_SEAMS = "trainer/model/seams.py"

_TEST = "tests/trainer/model/test_router.py::test_"
_WEIGHTS = f"{_TEST}weights_are_the_scores_of_the_chosen"
_LOSSES = f"{_TEST}losses_by_hand_and_gone_into_the_gradient"
_SIGN = f"{_TEST}the_sign_rule_raises_what_has_too_little"
_CAPACITY = f"{_TEST}capacity_drops_the_last_in_the_queue_and_counts_them"
_ERROR = f"{_TEST}the_load_error_rule_is_adamw[False]"
_DEEP = f"{_TEST}the_deep_router_by_hand"

MUTANTS = [
    Mutant(
        "a router without losses takes its logits for their grads",
        "trainer/kernels/route.py",
        "SUMS=rule.sums, TOKENS=_TOKENS,\n        )  # fmt: skip\n        return out",
        "SUMS=True, TOKENS=_TOKENS,\n        )  # fmt: skip\n        return out",
        "tests/trainer/model/test_route_kernels.py::test_a_router_without_losses_sums_nothing_up[True-True]",
    ),
    Mutant(
        "a router with a z-loss alone sums nothing up",
        "trainer/model/router.py",
        "sums=self._balances or bool(config.z_coefficient)",
        "sums=self._balances",
        "tests/trainer/model/test_kernels.py::test_a_model_trains_as_in_fp64[changes3]",
    ),
    Mutant(
        "weights aren't renormalised",
        _ROUTER,
        "if self.config.renormalize and self.top_k > 1:",
        "if False:",
        f"{_WEIGHTS}[True-softmax]",
    ),
    Mutant(
        "one expert's weight is renormalised to 1",
        _ROUTER,
        "if self.config.renormalize and self.top_k > 1:",
        "if self.config.renormalize:",
        f"{_TEST}one_expert_per_token_still_teaches_the_router[softmax]",
    ),
    Mutant(
        "the weights' scale is left out",
        _ROUTER,
        "weights_BSK * self.config.scale",
        "weights_BSK",
        f"{_WEIGHTS}[True-softmax]",
    ),
    Mutant(
        "the softmax is over tokens",
        _ROUTER,
        "logits_BSE.softmax(dim=-1)",
        "logits_BSE.softmax(dim=1)",
        f"{_WEIGHTS}[False-softmax]",
    ),
    Mutant(
        "the worst experts are chosen",
        _ROUTER,
        "choice_BSE.topk(self.top_k, dim=-1)",
        "choice_BSE.topk(self.top_k, dim=-1, largest=False)",
        f"{_WEIGHTS}[False-softmax]",
    ),
    Mutant(
        "one expert too few is chosen",
        _ROUTER,
        "choice_BSE.topk(self.top_k, dim=-1)",
        "choice_BSE.topk(max(1, self.top_k - 1), dim=-1)",
        f"{_WEIGHTS}[False-softmax]",
    ),
    Mutant(
        "the bias doesn't move the choice",
        _ROUTER,
        "choice_BSE = scores_BSE + self.bias",
        "choice_BSE = scores_BSE",
        f"{_TEST}the_bias_moves_the_choice_and_never_the_weights",
    ),
    Mutant(
        "the bias moves the weights",
        _ROUTER,
        "weights_BSK = scores_BSE.gather(-1, chosen_BSK)",
        "weights_BSK = (scores_BSE + self.bias).gather(-1, chosen_BSK)",
        f"{_TEST}the_bias_moves_the_choice_and_never_the_weights",
    ),
    Mutant(
        "a group counts as its best sigmoid score",
        _ROUTER,
        'best = 2 if self.config.score == "sigmoid" else 1',
        "best = 1",
        f"{_TEST}groups_limit_the_choice[4-2-3-sigmoid]",
    ),
    Mutant(
        "one group too many competes",
        _ROUTER,
        "group_BSG.topk(self.config.top_groups,",
        "group_BSG.topk(min(groups, self.config.top_groups + 1),",
        f"{_TEST}groups_limit_the_choice[4-2-3-softmax]",
    ),
    # Losses.
    Mutant(
        "the auxiliary loss is negated",
        _ROUTER,
        "even = self.experts * (",
        "even = -self.experts * (",
        f"{_LOSSES}[aux-sum-softmax]",
    ),
    Mutant(
        "the auxiliary loss adds up over layers",
        _ROUTER,
        'self.share = 1.0 / routers if model.router.losses_over_layers == "mean" else 1.0',
        "self.share = 1.0",
        f"{_LOSSES}[aux-mean-softmax]",
    ),
    Mutant(
        "predictors' routers aren't among those averaged",
        _ROUTER,
        "len(model.router_layers)",
        "len(model.moe_layers)",
        f"{_TEST}multi_token_predictions_routers_are_among_those_averaged",
    ),
    Mutant(
        "the auxiliary loss is over the micro-batch",
        _ROUTER,
        "share_BE = samples.total(count_BE) /",
        "share_BE = samples.total(count_BE.double().mean(0, keepdim=True)) /",
        f"{_TEST}losses_do_not_depend_on_the_micro_batch",
    ),
    Mutant(
        "the auxiliary loss isn't weighted by the step's samples",
        _ROUTER,
        "(micro.loss_weight * self.share / micro.sequence)",
        "(self.share / micro.sequence)",
        f"{_LOSSES}[aux-sum-softmax]",
    ),
    Mutant(
        "sigmoid scores aren't made a distribution",
        _ROUTER,
        "probability_BSE = scores_BSE / scores_BSE.sum(dim=-1, keepdim=True)",
        "probability_BSE = scores_BSE",
        f"{_LOSSES}[aux-sum-sigmoid]",
    ),
    Mutant(
        "the z-loss is negated",
        _ROUTER,
        "parts.append(self.config.z_coefficient *",
        "parts.append(-self.config.z_coefficient *",
        f"{_LOSSES}[bias-sum-softmax]",
    ),
    Mutant(
        "the z-loss isn't squared",
        _ROUTER,
        "logits_BSE.logsumexp(dim=-1).square().sum()",
        "logits_BSE.logsumexp(dim=-1).sum()",
        f"{_LOSSES}[bias-sum-softmax]",
    ),
    Mutant(
        "losses don't reach the gradient",
        _SEAMS,
        "return gradient, torch.ones_like(ctx.saved_tensors[0])",
        "return gradient, torch.zeros_like(ctx.saved_tensors[0])",
        f"{_LOSSES}[aux-sum-softmax]",
    ),
    # Balancing.
    Mutant(
        "the bias moves the wrong way",
        _ROUTER,
        "torch.sign(load_LE.mean(dim=1, keepdim=True) - load_LE)",
        "torch.sign(load_LE - load_LE.mean(dim=1, keepdim=True))",
        _SIGN,
    ),
    Mutant(
        "a skipped step moves the bias",
        _ROUTER,
        "moved_LE if skip is None else torch.where(skip > 0, now(name), moved_LE)",
        "moved_LE",
        _SIGN,
    ),
    Mutant(
        "all biases move by the mean load of all routers",
        _ROUTER,
        "load_LE.mean(dim=1, keepdim=True)",
        "load_LE.mean()",
        _SIGN,
    ),
    Mutant(
        "the load error is that of all routers together",
        _ROUTER,
        "load_LE / load_LE.sum(dim=1, keepdim=True)",
        "load_LE / load_LE.sum()",
        _ERROR,
    ),
    Mutant(
        "the bias moves where a loss balances",
        _ROUTER,
        "if not routers or not routers[0].biased:\n        return",
        "if not routers:\n        return",
        _SIGN,
    ),
    Mutant(
        "the load error has the wrong sign",
        _ROUTER,
        "error_LE = load_LE / load_LE.sum(dim=1, keepdim=True) - 1.0 / experts",
        "error_LE = 1.0 / experts - load_LE / load_LE.sum(dim=1, keepdim=True)",
        _ERROR,
    ),
    Mutant(
        "the load error's average isn't corrected",
        _ROUTER,
        "rate * (avg_LE / (1 - first**applied)) / spread_LE",
        "rate * avg_LE / spread_LE",
        _ERROR,
    ),
    Mutant(
        "the load error's spread isn't corrected",
        _ROUTER,
        "(avg_sq_LE / (1 - second**applied)).sqrt() + _EPS",
        "avg_sq_LE.sqrt() + _EPS",
        _ERROR,
    ),
    # Capacity and counting.
    Mutant(
        "one pair too many is kept",
        _ROUTER,
        "samples.queue(chosen_BSK, self.experts, micro) >= self.capacity",
        "samples.queue(chosen_BSK, self.experts, micro) > self.capacity",
        _CAPACITY,
    ),
    Mutant(
        "the capacity is rounded down",
        _ROUTER,
        "math.ceil(factor * sequence",
        "math.floor(factor * sequence",
        _CAPACITY,
    ),
    Mutant(
        "drops aren't counted",
        _ROUTER,
        "micro.tally.add(micro.tally.dropped, over_BSK.sum())",
        "micro.tally.add(micro.tally.dropped, 0 * over_BSK.sum())",
        _CAPACITY,
    ),
    Mutant(
        "the last in the queue are first",
        _SEAMS,
        "flat_BR.argsort(dim=1, stable=True)",
        "flat_BR.flip(1).argsort(dim=1, stable=True).sub(flat_BR.shape[1] - 1).neg()",
        _CAPACITY,
    ),
    Mutant(
        "what is computed again is counted again",
        _SEAMS,
        "if not self.muted:\n            self.counts",
        "if True:\n            self.counts",
        f"{_TEST}a_loss_counted_once_is_added_once_when_computed_again",
    ),
    # ZAYA1's router.
    Mutant(
        "the average over depth has no weights",
        _ROUTER,
        "upcast(state_BSR) * upcast(self.state_scale)",
        "upcast(state_BSR)",
        _DEEP,
    ),
    Mutant(
        "there is no average over depth",
        _ROUTER,
        "if self.carried and state_BSR is not None:",
        "if False:",
        _DEEP,
    ),
    Mutant(
        "the state is handed on normed",
        _ROUTER,
        "handed_BSR = own_BSR.to(x_BSD.dtype)",
        "handed_BSR = self.norm(own_BSR).to(x_BSD.dtype)",
        _DEEP,
    ),
    Mutant(
        "the deep router's MLP has one layer less",
        _ROUTER,
        "F.gelu(_linear(self.second, inner_BSR))",
        "inner_BSR",
        _DEEP,
    ),
    Mutant(
        "the router works in bf16",
        _ROUTER,
        "F.linear(upcast(x_BSD), upcast(self.linear.weight))",
        "upcast(F.linear(x_BSD, self.linear.weight))",
        "tests/trainer/model/test_precision.py::test_routers_choose_in_fp32[linear]",
    ),
]
