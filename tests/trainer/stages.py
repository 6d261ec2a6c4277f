"""The trainer's model as one stage on one process, for tests that compare it with something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from configs.model import ModelConfig
from trainer.model.decoder import DecoderStage, inputs
from trainer.model.seams import MicroBatch, Tally


def whole(model: ModelConfig, state: dict[str, Tensor]) -> DecoderStage:
    """All layers, with the parameters and router biases of `state`, in its dtype. Names and shapes have to be the same."""
    stage = DecoderStage(model, 0, model.layers)
    parameters = dict(stage.named_parameters())
    given = {name: tensor for name, tensor in state.items() if ".router.bias" not in name}
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {
        name: tuple(p.shape) for name, p in given.items()
    }
    stage.to(next(iter(given.values())).dtype)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            parameter.copy_(given[name])
        for name, buffer in stage.named_buffers():
            buffer.copy_(state.get(name, torch.zeros_like(buffer)))
    return stage


@contextmanager
def exact() -> Iterator[None]:
    """Around a run of the model in fp64: what asks for fp32, or divides integers, gets fp64."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def micro(tokens_BS: Tensor, documents_BS: Tensor | None = None, samples: int | None = None) -> MicroBatch:
    """The samples as one micro-batch of a step of `samples`, as many by default."""
    places_S = torch.arange(tokens_BS.shape[1] - 1)
    return MicroBatch(tokens_BS, places_S, documents_BS, 1 / (samples or len(tokens_BS)), Tally())


def logits(stage: DecoderStage, tokens_BS: Tensor) -> Tensor:
    """Of every place's next token, [B, S, V]."""
    one = micro(tokens_BS)
    with torch.no_grad():
        return stage.logits(inputs(one), one)


def learn(
    stage: DecoderStage, tokens_BS: Tensor, documents_BS: Tensor | None = None, samples: int | None = None
) -> tuple[Tensor, Tally]:
    """Forward and backward; gradients are added to what is there. The cross-entropy, and what routers counted."""
    one = micro(tokens_BS, documents_BS, samples)
    loss = stage(inputs(one), one)
    loss.backward()
    return loss.detach(), one.tally


def gradients(stage: DecoderStage) -> dict[str, Tensor]:
    """By name; zeros where nothing arrived."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach()
        for name, p in stage.named_parameters()
    }
