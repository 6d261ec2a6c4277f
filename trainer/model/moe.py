"""Feed-forward layers: dense SwiGLU, and the mixture of SwiGLU experts.

Shape letters: T tokens, D model width, F inner width, L experts held by this rank, R rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig
from trainer.model.router import Router
from trainer.parallel.expert import Dispatch


class SwiGLU(nn.Module):
    """silu(x gate) * (x up), then down."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(width, hidden))
        self.up = nn.Parameter(torch.empty(width, hidden))
        self.down = nn.Parameter(torch.empty(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class Experts(nn.Module):
    """The experts of one rank, stacked.

    Their parameters carry the marks by which DeepSpeed keeps them out of the data-parallel reduction and
    reduces them among the ranks that hold the same experts.
    """

    def __init__(self, hidden: int, width: int, first: int, count: int, ep: int) -> None:
        super().__init__()
        self.first = first
        """Index of this rank's first expert in the layer."""
        self.gate_up = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(count, hidden, width))
        for parameter in self.parameters():
            parameter.allreduce = False
            parameter.group_name = f"ep_size_{ep}"

    def forward(self, x_RD: Tensor, counts_L: list[int]) -> Tensor:
        """Rows in, rows out; the first `counts_L[0]` rows go through expert 0, and so on."""
        gate_up, down = self.gate_up, self.down
        if x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
            ends = torch.tensor(counts_L, device=x_RD.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            gate, up = F.grouped_mm(x_RD, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
            return F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        out = []
        for rows, into, back in zip(x_RD.split(counts_L), gate_up.unbind(), down.unbind(), strict=True):
            gate, up = F.linear(rows, into).chunk(2, dim=-1)
            out.append(F.linear(F.silu(gate) * up, back))
        return torch.cat(out)


class MoELayer(nn.Module):
    """Router, experts and shared expert of one block."""

    def __init__(self, model: ModelConfig, group: dist.ProcessGroup, ep_rank: int) -> None:
        super().__init__()
        ep = dist.get_world_size(group)
        here = model.experts // ep
        self.num_experts = model.experts
        self._group = group
        self.router = Router(model)
        self.experts = Experts(model.hidden, model.expert_width, ep_rank * here, here, ep)
        self.shared = SwiGLU(model.hidden, model.shared_width) if model.shared_width else None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] to [T, D], and the router's auxiliary loss."""
        chosen_TK, weights_TK, auxiliary = self.router(x_TD)
        dispatch = Dispatch(chosen_TK, self.num_experts, self._group)
        y_RD = self.experts(dispatch.send(x_TD), dispatch.counts_L)
        y_TD = dispatch.combine(y_RD, weights_TK)
        return (y_TD if self.shared is None else y_TD + self.shared(x_TD)), auxiliary
