"""The decoder, whole or one pipeline stage of it: embedding, blocks, output projection, loss.

Shape letters: B samples, S tokens of a sample on this rank, D model width, R router width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.model import ModelConfig
from trainer.model.block import DecoderBlock, Scaling, result_of
from trainer.model.moe import Experts
from trainer.model.mtp import Prediction
from trainer.model.norm import RMSNorm, upcast_dtype
from trainer.model.rotary import Rotary
from trainer.model.router import Router
from trainer.model.seams import MicroBatch, PendingOutput, SoloSeams, VocabularySeam, attach


class VocabularyTable(nn.Module):
    """Rows of the vocabulary, `weight` [V, D]: used by the stage through its vocabulary seam, never called."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def splits(self) -> dict[str, int | None]:
        """Dim of each parameter that tensor parallelism splits."""
        return {"weight": 0}


class DecoderStage(nn.Module):
    """Layers `first` to `last - 1` of a decoder-only language model; with all of them, its training loss.

    Built without looking at a value, so that it can be made on the meta device. `blocks` is keyed by the layer of the whole
    model. The first stage has `embedding` (and `input_scaling` under `residual_scaling`), the last `final_norm`, `head`
    unless it is tied, and `mtp`; the last has `embedding` too where it is tied to the head or multi-token prediction needs
    it. Where that isn't the first stage it is a copy that the engine keeps equal.
    """

    def __init__(self, model: ModelConfig, first: int, last: int) -> None:
        super().__init__()
        self.config, self.first, self.last = model, first, last
        begins, ends = first == 0, last == model.layers
        needed = begins or (ends and (model.tie_embeddings or model.mtp_layers > 0))
        self.embedding = VocabularyTable(model.vocab, model.hidden) if needed else None
        self.input_scaling = Scaling(model.hidden) if begins and model.residual_scaling else None
        self.blocks = nn.ModuleDict(
            {
                str(layer): DecoderBlock(model, layer, model.is_moe(layer), _behind_a_router(model, layer))
                for layer in range(first, last)
            }
        )
        self.final_norm = RMSNorm(model.hidden, model.norm_eps) if ends else None
        self.head = VocabularyTable(model.vocab, model.hidden) if ends and not model.tie_embeddings else None
        depths = range(1, model.mtp_layers + 1) if ends else range(0)
        self.mtp = nn.ModuleList(Prediction(model, depth) for depth in depths)
        self.rotary = Rotary(model)
        self.vocabulary: VocabularySeam = SoloSeams()

    def forward(self, x: Tensor, micro: MicroBatch) -> Tensor:
        """A stage's part of the forward pass.

        Args:
            x: for the first stage `inputs(micro)`, [B, S]; else what the stage before returned.

        Returns:
            The hidden state [B, S, D], between `mlp` routers with their state behind it, [B, S, D + R]. Of the last stage a
            number in fp32, this rank's share of the step's mean cross-entropy: the sum over its tokens times
            `micro.loss_weight / micro.sequence`. Losses of multi-token prediction and routers are attached to the graph and
            counted in `micro.tally`, and aren't in that number.
        """
        hidden_BSD, state_BSR = self.run(x, micro)
        if self.final_norm is None:
            return hidden_BSD if state_BSR is None else torch.cat((hidden_BSD, state_BSR), dim=-1)
        targets_BS = micro.tokens_BS[:, 1:].index_select(1, micro.positions_S)
        total = self.vocabulary.loss(self.final_norm(hidden_BSD), self._projection(), targets_BS)
        loss = total * (micro.loss_weight / micro.sequence)
        return attach(loss, self._predict(hidden_BSD, micro)) if self.mtp else loss

    def logits(self, x: Tensor, micro: MicroBatch) -> Tensor:
        """The last stage's logits of next tokens, [B, S, V]."""
        if self.final_norm is None:
            raise RuntimeError(f"layers {self.first} to {self.last} have no output projection")
        return self.vocabulary.logits(self.final_norm(self.run(x, micro)[0]), self._projection())

    def run(self, x: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """The hidden state [B, S, D] after the last block, before any final norm, and the `mlp` routers' state."""
        state_BSR: Tensor | None = None
        if self.first == 0:
            hidden_BSD = self._embed(x)
            if self.input_scaling is not None:
                hidden_BSD = self.input_scaling(hidden_BSD)
        else:
            hidden_BSD, state_BSR = x[..., : self.config.hidden], None
            if x.shape[-1] > self.config.hidden:
                state_BSR = x[..., self.config.hidden :]
        angles = self.rotary(micro.positions_S, upcast_dtype(hidden_BSD))
        pending: PendingOutput | None = None
        for block in self.blocks.values():
            hidden_BSD, state_BSR, pending = block(hidden_BSD, state_BSR, micro, angles, pending)
        last_BSD = result_of(pending)
        return hidden_BSD if last_BSD is None else hidden_BSD + last_BSD, state_BSR

    def _embed(self, tokens_BS: Tensor) -> Tensor:
        assert self.embedding is not None
        return self.vocabulary.embed(tokens_BS, self.embedding.weight)

    def _projection(self) -> Tensor:
        table = self.embedding if self.head is None else self.head
        assert table is not None
        return table.weight

    def _predict(self, hidden_BSD: Tensor, micro: MicroBatch) -> Tensor:
        """This rank's share of mtp_coefficient * mean over depths of the mean cross-entropy of their valid places."""
        angles = self.rotary(micro.positions_S, upcast_dtype(hidden_BSD))
        weight = self.config.mtp_coefficient * micro.loss_weight / len(self.mtp)
        share = torch.zeros((), device=hidden_BSD.device)
        for prediction in self.mtp:
            assert isinstance(prediction, Prediction)
            embedded_BSD = self._embed(prediction.inputs(micro))
            hidden_BSD = prediction(hidden_BSD, embedded_BSD, micro, angles)
            normed_BSD = prediction.final_norm(hidden_BSD)
            total = self.vocabulary.loss(normed_BSD, self._projection(), prediction.targets(micro))
            share = share + total * (weight / max(micro.sequence - prediction.depth, 1))
        micro.tally.add(micro.tally.extra, share)
        return share

    def routers(self) -> dict[int, Router]:
        """Routers by layer of the whole model; those of multi-token prediction count on from the last layer."""
        routers = [module for module in self.modules() if isinstance(module, Router)]
        return {router.layer: router for router in routers}

    def splits(self) -> dict[str, int | None]:
        """By name of every parameter but the experts': dim that tensor parallelism splits; None: each rank has all of it.

        A parameter with None sees other tokens or other heads on each tensor-parallel rank, so its gradient is the sum of
        theirs, without exception.
        """
        dims: dict[str, int | None] = {name: None for name, _ in self.named_parameters()}
        for prefix, module in self.named_modules():
            if hasattr(module, "splits") and module is not self:
                dims |= {f"{prefix}.{name}": dim for name, dim in module.splits().items()}
        return {name: dim for name, dim in dims.items() if name not in self.expert_splits()}

    def expert_splits(self) -> dict[str, tuple[int, int]]:
        """By name of the experts' parameters: dims that expert parallelism and expert-tensor parallelism split."""
        owners = [(prefix, m) for prefix, m in self.named_modules() if isinstance(m, Experts)]
        return {f"{prefix}.{name}": dims for prefix, m in owners for name, dims in m.expert_splits().items()}


def inputs(micro: MicroBatch) -> Tensor:
    """The tokens that a first stage starts from: this rank's places of all but the last token, [B, S]."""
    return micro.tokens_BS[:, :-1].index_select(1, micro.positions_S)


def boundary_width(model: ModelConfig, layer: int) -> int:
    """Last dim of what the stage that ends before `layer` returns: D, or D + R between `mlp` routers."""
    carries = model.router.kind == "mlp" and _behind_a_router(model, layer)
    return model.hidden + (model.router.hidden if carries else 0)


def _behind_a_router(model: ModelConfig, layer: int) -> bool:
    """Whether an MoE layer comes before this one; its router's state passes the dense layers between."""
    return layer > min(model.moe_layers, default=model.layers)
