"""The router: which experts a token goes to, with which weight, and how the loads are kept even.

Shape letters: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig


class Router(nn.Module):
    """Top-k routing with softmax or sigmoid scores, computed in fp32.

    Under `balance=bias` a per-expert bias is added to the scores for the choice alone, never for the weights
    (aux-loss-free balancing, DeepSeek-V3 section 2.1.2), and `update_bias` moves it after each step. Under
    `balance=aux` the forward pass also gives the Switch auxiliary loss (Fedus et al. 2021, equation 4).
    """

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.config = model.router
        self.top_k, self.experts = model.top_k, model.experts
        self.weight = nn.Parameter(torch.empty(model.experts, model.hidden))
        self.register_buffer("bias_E", torch.zeros(model.experts, dtype=torch.float32))
        self.register_buffer("load_E", torch.zeros(model.experts, dtype=torch.int64), persistent=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen experts [T, K], their weights [T, K] in fp32, and the auxiliary loss (0 without one)."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        softmax = self.config.score == "softmax"
        scores_TE = logits_TE.softmax(dim=-1) if softmax else logits_TE.sigmoid()
        chosen_TK = (scores_TE.detach() + self.bias_E).topk(self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, chosen_TK)
        if self.config.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        count_E = torch.bincount(chosen_TK.flatten(), minlength=self.experts)
        if self.training:
            self.load_E += count_E
        return chosen_TK, weights_TK * self.config.scale, self._auxiliary_loss(scores_TE, count_E)

    def _auxiliary_loss(self, scores_TE: Tensor, count_E: Tensor) -> Tensor:
        if self.config.balance != "aux":
            return scores_TE.new_zeros(())
        share_E = count_E / count_E.sum()
        probability_E = (scores_TE / scores_TE.sum(dim=-1, keepdim=True)).mean(dim=0)
        return self.config.aux_coefficient * self.experts * (share_E * probability_E).sum()

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower it above; `load_E` is of the whole step."""
        if self.config.balance == "bias":
            load_E = load_E.float()
            self.bias_E += self.config.bias_update_rate * torch.sign(load_E.mean() - load_E)
