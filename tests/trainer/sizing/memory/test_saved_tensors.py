"""What sizing counts as kept is what the trainer's own decoder keeps for its backward pass, byte by byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from configs.compose import compose
from tests.trainer.model.small_models import micro
from trainer.model.decoder import inputs
from trainer.model.initial import build
from trainer.sizing.memory import activations
from trainer.sizing.model import frameworks, weights
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout

pytestmark = pytest.mark.dist

SAMPLES, TOKENS = 2, 256


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"shared_width": 192},
        {"dense_layers": 2, "dense_width": 512},
        {"dense_layers": 4, "dense_width": 512, "experts": 1, "top_k": 1},
        {"top_k": 4, "experts": 16, "expert_width": 96},
        {"residual_scaling": True},
        {
            "attention": "cca",
            "qk_norm": "none",
            "residual_scaling": True,
            "router": {"kind": "mlp", "hidden": 64},
        },
    ],
)
def test_the_decoder_keeps_what_is_counted(shape: dict[str, Any]) -> None:
    preset = compose(["model=demo"]).model
    wide = {"hidden": 256, "heads": 8, "kv_heads": 4, "expert_width": 128, "vocab": 512}
    router = preset.router.model_copy(update=shape.get("router", {}))
    model = preset.model_copy(update=wide | shape | {"router": router})
    torch.manual_seed(0)
    decoder = build(model, 1).to(torch.bfloat16)
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*decoder.parameters(), *decoder.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch = micro(torch.randint(model.vocab, (SAMPLES, TOKENS + 1)))
        loss = decoder(inputs(batch), batch)
    assert loss.requires_grad
    tokens = SAMPLES * TOKENS
    # On a CPU attention's output is copied for the matmul after it.
    copied = model.layers * tokens * model.heads * model.head_dim * 2
    log_probabilities = tokens * model.vocab * 4
    if model.residual_scaling:  # embeddings with their bias, which are scaled too
        copied += tokens * model.hidden * 2
    if model.attention == "cca":  # weights: the taps of queries and keys joined, the router's in fp32
        taps = (model.heads + model.kv_heads) * model.head_dim * 2 * model.head_dim
        copied += model.layers * (2 * taps + 4 * weights.total(model, True, "router"))
    software = frameworks.megaray(kind="cpu")
    job = TrainingJob(model, Layout(1, 1, 1, 1, 1, 1), TOKENS, SAMPLES, SAMPLES, "bf16", software=software)
    counted = sum(activations.saved_bytes(job, layer >= model.dense_layers) for layer in range(model.layers))
    assert counted + activations.head_bytes(job) + copied + log_probabilities == pytest.approx(
        sum(kept.values()), rel=0.01
    )
