"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437 section 2.2).

Shape letters: B samples, S tokens of a sample on this rank, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.model import ModelConfig
from trainer.model.block import DecoderBlock, result_of
from trainer.model.norm import RMSNorm
from trainer.model.rotary import RotaryAngles
from trainer.model.seams import MicroBatch


class Prediction(nn.Module):
    """One depth: the hidden state of each place, joined with the token `depth` places on, predicts the token after that.

    h = project(cat(hidden_norm(hidden), embedding_norm(embedding of token i + depth))), then `block` over all places, whose
    output is the hidden state for the next depth; `final_norm` and the model's head give the logits of token
    i + depth + 1. Its router begins an average over depth of its own.

    Args:
        depth: from 1.
    """

    def __init__(self, model: ModelConfig, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.hidden_norm = RMSNorm(model.hidden, model.norm_eps)
        self.embedding_norm = RMSNorm(model.hidden, model.norm_eps)
        self.project = nn.Linear(2 * model.hidden, model.hidden, bias=False)
        self.block = DecoderBlock(model, model.layers + depth - 1, moe=True, carried=False)
        self.final_norm = RMSNorm(model.hidden, model.norm_eps)

    def inputs(self, micro: MicroBatch) -> Tensor:
        """Token i + depth of each place i of this rank, [B, S]; token 0 past the end of the sample's S + 1 tokens."""
        return _ahead(micro, self.depth, past=0)

    def targets(self, micro: MicroBatch) -> Tensor:
        """Token i + depth + 1 of each place i of this rank, [B, S]; -1 past the end."""
        return _ahead(micro, self.depth + 1, past=-1)

    def forward(
        self, hidden_BSD: Tensor, embedded_BSD: Tensor, micro: MicroBatch, angles: RotaryAngles
    ) -> Tensor:
        """The hidden state of this depth, before `final_norm`."""
        joined = torch.cat((self.hidden_norm(hidden_BSD), self.embedding_norm(embedded_BSD)), dim=-1)
        x_BSD, _, pending = self.block(self.project(joined), None, micro, angles)
        y_BSD = result_of(pending)
        return x_BSD if y_BSD is None else x_BSD + y_BSD


def _ahead(micro: MicroBatch, places: int, past: int) -> Tensor:
    at_S = micro.positions_S + places
    last = micro.sequence
    found_BS = micro.tokens_BS.index_select(1, at_S.clamp(max=last))
    return found_BS.masked_fill(at_S > last, past)
