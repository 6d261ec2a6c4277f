"""Feed-forward layers: dense, and the mixture of experts.

Shape letters: B samples, S tokens of a sample on this rank, T = B*S, D model width, F inner width, E experts, L experts
held by this rank, K experts per token, R rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import ModelConfig
from trainer.kernels.choice import fused
from trainer.model.exchange import LocalExchange
from trainer.model.router import Router, make_router
from trainer.model.seams import Alone, Exchange, Micro, Samples, Tensors, attach


class Feed(nn.Module):
    """`gated`: silu(x gate) * (x up), then down (SwiGLU); else gelu(x up), then down, with the exact GELU.

    Parameters: `gate.weight` (where gated) and `up.weight` [F, D], `down.weight` [D, F]. Under tensor parallelism x is
    entered and F is split.
    """

    def __init__(self, hidden: int, width: int, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False) if gated else None
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        self.tensors: Tensors = Alone()

    def splits(self) -> dict[str, int | None]:
        """Dim of each parameter that tensor parallelism splits."""
        gate: dict[str, int | None] = {} if self.gate is None else {"gate.weight": 0}
        return {**gate, "up.weight": 0, "down.weight": 1}

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape as `x_BSD`."""
        x_BSD = self.tensors.enter(x_BSD)
        up = self.up(x_BSD)
        if self.gate is not None and fused(up):
            from trainer.kernels import activation

            return self.tensors.leave(self.down(activation.gated(self.gate(x_BSD), up)))
        inner = F.gelu(up) if self.gate is None else F.silu(self.gate(x_BSD)) * up
        return self.tensors.leave(self.down(inner))


class Experts(nn.Module):
    """Feed-forward layers side by side, of which each row goes through one.

    Parameters: `gate_up` [E, 2, F, D] (gate, then up) and `down` [E, D, F]; `up` [E, F, D] instead of `gate_up` where the
    layers aren't gated. A rank holds some experts of the layer, and of each expert perhaps a part of F: then the rows that
    come out are partial sums.
    """

    def __init__(self, hidden: int, width: int, experts: int, gated: bool) -> None:
        super().__init__()
        if gated:
            self.gate_up = nn.Parameter(torch.empty(experts, 2, width, hidden))
        else:
            self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.gated = gated

    def expert_splits(self) -> dict[str, tuple[int, int]]:
        """Dims of each parameter that expert parallelism and expert-tensor parallelism split."""
        return {"gate_up": (0, 2), "down": (0, 2)} if self.gated else {"up": (0, 1), "down": (0, 2)}

    def forward(self, x_RD: Tensor, counts_L: Tensor, weights_R: Tensor | None = None) -> Tensor:
        """Rows in, rows out, each times its weight where there are any.

        Args:
            counts_L: rows of each local expert, [L] int64 on the device: the first `counts_L[0]` rows go through expert 0,
                and so on. Rows beyond their sum give rows of any value.
        """
        into = self.gate_up.flatten(1, 2) if self.gated else self.up
        if _grouped(x_RD, into, self.down):
            ends_L = counts_L.cumsum(0, dtype=torch.int32)
            inner = self._inner(F.grouped_mm(x_RD, into.transpose(1, 2), offs=ends_L), weights_R)
            return F.grouped_mm(inner, self.down.transpose(1, 2), offs=ends_L)
        y_RD = self._by_expert(x_RD, into, counts_L)
        return y_RD if weights_R is None else y_RD * weights_R.unsqueeze(-1).to(y_RD.dtype)

    def _by_expert(self, x_RD: Tensor, into: Tensor, counts_L: Tensor) -> Tensor:
        """One expert after the other, which waits for the counts."""
        counts = counts_L.tolist()
        rest = x_RD.shape[0] - sum(counts)
        *parts, beyond = x_RD.split((*counts, rest))
        weights = zip(parts, into.unbind(), self.down.unbind(), strict=True)
        out = [F.linear(self._activate(F.linear(rows, first)), second) for rows, first, second in weights]
        return torch.cat(out if not rest else (*out, torch.zeros_like(beyond)))

    def _inner(self, both: Tensor, weights_R: Tensor | None) -> Tensor:
        """What goes into `down`, in which a row's weight may stand since all after it is linear."""
        if self.gated and fused(both):
            from trainer.kernels import activation

            return activation.gated_pair(both, weights_R)
        inner = self._activate(both)
        return inner if weights_R is None else inner * weights_R.unsqueeze(-1).to(inner.dtype)

    def _activate(self, inner: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(inner)
        gate, up = inner.chunk(2, dim=-1)
        return F.silu(gate) * up


def _grouped(x_RD: Tensor, into: Tensor, down: Tensor) -> bool:
    """Whether torch's grouped matmul takes these: bf16 on a GPU, rows of whole 16 bytes."""
    aligned = into.shape[-1] % 8 == 0 and into.shape[-2] % 8 == 0 and down.shape[-1] % 8 == 0
    return x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm")


class MoELayer(nn.Module):
    """Router, experts and shared expert of one block.

    It works on the tokens as they lie between blocks, under sequence parallelism a part of them: nothing is entered but the
    shared expert's input, by the shared expert.

    Args:
        layer: of the whole model, by which the router's choices are counted; blocks of multi-token prediction count on
            from the model's last.
        carried: whether a `mlp` router takes the state of the layer before.
    """

    def __init__(self, model: ModelConfig, layer: int, carried: bool) -> None:
        super().__init__()
        self.num_experts = model.experts
        self.router: Router = make_router(model, layer, carried)
        self.experts = Experts(model.hidden, model.expert_width, model.experts, model.gated)
        self.shared = Feed(model.hidden, model.shared_width, model.gated) if model.shared_width else None
        self.exchange: Exchange = LocalExchange(drops=model.router.capacity_factor is not None)
        self.samples: Samples = Alone()

    def forward(self, x_BSD: Tensor, state_BSR: Tensor | None, micro: Micro) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] to [B, S, D], and the router's state for the next layer (None but for `mlp` routers).

        The router's losses are attached to the result and counted in `micro.tally`.
        """
        choice = self.router(x_BSD, state_BSR, micro, self.samples)
        chosen_TK, weights_TK = choice.chosen_BSK.flatten(0, 1), choice.weights_BSK.flatten(0, 1)
        y_TD = self.exchange.run(x_BSD.flatten(0, 1), chosen_TK, weights_TK, self.num_experts, self.experts)
        y_BSD = y_TD.view_as(x_BSD)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        if choice.loss is not None:
            y_BSD = attach(y_BSD, choice.loss)
        return y_BSD, choice.state_BSR
