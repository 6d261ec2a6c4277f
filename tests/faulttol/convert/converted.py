"""Checkpoints that conversion tests begin with, and what came of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from configs.model import ModelConfig
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.hashes import CheckpointSource
from faulttol.checkpoint.save import Retention, owned, save
from faulttol.checkpoint.store import CheckpointStore
from faulttol.convert.facts import fingerprint, opened, slots
from tests.faulttol.ranks import identity, together
from tests.faulttol.tensors import layout


def commit(
    root: object,
    state: dict[str, Tensor],
    facts: dict[str, Any],
    step: int = 7,
    world: int = 3,
    kind: str = "flat",
) -> None:
    """A checkpoint of a state, as several ranks save it."""
    parts = layout(state, world, 0, kind)
    done = together(
        world,
        lambda rank, peers: save(
            str(root), step, owned(parts[rank]), identity(rank, world), facts, peers, Retention(9)
        ),
    )
    for one in done:
        if isinstance(one, Exception):
            raise one


def trained(model: ModelConfig, parameters: dict[str, Tensor], kind: Any = "adamw") -> dict[str, Tensor]:
    """Parameters with random slots of an optimizer beside them, and its count."""
    state = dict(parameters)
    for name, tensor in parameters.items():
        if not name.endswith(".router.bias"):
            state |= {f"{name}/{slot}": torch.rand_like(tensor) for slot in slots(name, kind)}
    return state | {"optimizer/step": torch.tensor(7.0)}


def told(model: ModelConfig, **more: Any) -> dict[str, Any]:
    """Facts that training would save."""
    data = {"parts": [], "sequence": 24, "validation": 0.0, "document_mask": True}
    prints = fingerprint(model, "adamw") | {"seed": 1234, "data": data}
    return {"fingerprint": prints, "samples": 70, "tokens": 1680, "loss": 2.5, "lineage": [], **more}


def read(root: object) -> tuple[dict[str, Tensor], CheckpointSource]:
    """All tensors of the newest checkpoint, and the checkpoint."""
    source = opened(CheckpointStore(str(root)))
    found = {}
    for name, tensor in source.tensors.items():
        bits = source.read(name, Box.full(tensor.shape))
        flat = torch.frombuffer(bytearray(bits.tobytes() or b"\0" * 8), dtype=getattr(torch, tensor.dtype))
        found[name] = flat[: bits.size].view(tensor.shape).clone()
    return found, source


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Assert that two states are equal, bit for bit."""
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, (name, tensor.dtype, other[name].dtype)
        assert torch.equal(tensor, other[name]), name
