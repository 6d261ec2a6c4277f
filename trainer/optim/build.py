"""The optimizer that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from configs.training import OptimConfig, Precision
from trainer.optim.adamw import AdamW
from trainer.optim.common import device_of
from trainer.optim.lamb import Lamb
from trainer.optim.muon import Muon
from trainer.optim.shards import Optimizer, ParameterShard, StagePeers


def build(
    optim: OptimConfig,
    width: int,
    shards: Sequence[ParameterShard],
    peers: StagePeers,
    precision: Precision = "fp32",
) -> Optimizer:
    """The optimizer over a rank's shards, with moments of zero.

    Args:
        width: of the model, for `optim.base_width`.
        shards: this rank's.
        peers: all ranks of the stage, which build together.
        precision: of the run. `bf16` lets Muon multiply in bf16 on GPUs, which have the units for it; on CPUs it is fp32.
    """
    if optim.kind == "muon":
        fast = precision == "bf16" and device_of(shards).type == "cuda"
        return Muon(shards, optim, width, peers, torch.bfloat16 if fast else torch.float32)
    return Lamb(shards, optim, width, peers) if optim.kind == "lamb" else AdamW(shards, optim, width)
