"""What the optimizers share: hyperparameters by kind of parameter, checks of their shards, precision and chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.training import OptimConfig
from trainer.optim.shards import ParameterShard, StagePeers

_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_DEFAULT_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Hyperparameters:
    """Of a parameter group: how a kind of parameter uses the step's learning rate."""

    lr_scale: float
    """Factor on the learning rate."""
    weight_decay: float
    """A step subtracts `lr * lr_scale * weight_decay` of a value."""


def hyperparameters(kind: str, optim: OptimConfig, width: int) -> Hyperparameters:
    """Hyperparameters of a kind of shard in a model of `width`.

    Only matrices decay. With `base_width` the rates of a narrower model carry over: a matrix gets `lr * base / width` and
    `decay * sqrt(width / base)`.
    """
    if kind != "matrix":
        return Hyperparameters(1.0, 0.0)
    wider = width / optim.base_width if optim.base_width else 1.0
    return Hyperparameters(1 / wider, optim.weight_decay * math.sqrt(wider))


def device_of(shards: Sequence[ParameterShard]) -> torch.device:
    """Device of the shards; the CPU for none."""
    return shards[0].tensor.device if shards else torch.device("cpu")


def chunk_elements(device: torch.device) -> int:
    """Elements to work on at a time where a step needs scratch memory.

    32 MiB of fp32 on a GPU, where launches cost more than memory below that; 1 MiB on a CPU, which a core caches.
    """
    return _CHUNK_ELEMENTS.get(device.type, _DEFAULT_CHUNK_ELEMENTS)


def moment_dtype(optim: OptimConfig) -> torch.dtype:
    """Type that moments are kept in.

    A bf16 moment is computed in fp32 and rounded to nearest once a step, a relative error of at most 2^-8 each time, which
    fades with the moment: AdamW's updates differ from those of fp32 moments by about half a percent (root mean square)
    at betas 0.9 and 0.95. The configuration refuses decays so near 1 that rounding would keep a moment from falling.
    """
    return torch.float32 if optim.moments == "fp32" else torch.bfloat16


def check_masters(shards: Sequence[ParameterShard]) -> None:
    """Refuse shards that the optimizers' views and kernels would misread.

    Raises:
        ValueError: a tensor isn't contiguous fp32 of its box's shape.
    """
    for shard in shards:
        tensor = shard.tensor
        if (
            tensor.dtype != torch.float32
            or not tensor.is_contiguous()
            or tuple(tensor.shape) != shard.box.shape
        ):
            raise ValueError(
                f"the master of {shard.name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}; an "
                f"optimizer needs contiguous fp32 of its box's shape {shard.box.shape}"
            )


def check_peers(shards: Sequence[ParameterShard], peers: StagePeers) -> None:
    """Refuse `peers` that don't describe these shards, or ranks that lack a parameter, thus its kind.

    Raises:
        ValueError: for either, on all ranks alike.
    """
    mine = [(shard.name, shard.box, shard.replica, shard.replicas) for shard in shards]
    if list(peers.shards[peers.rank]) != mine:
        raise ValueError(f"rank {peers.rank} of the stage has other shards than its peers have on record")
    names = [{name for name, *_ in listed} for listed in peers.shards]
    for rank, known in enumerate(names):
        if missing := set().union(*names) - known:
            raise ValueError(
                f"rank {rank} of the stage has no shard of {min(missing)}; give it one with an empty box"
            )


def gradient_or_zeros(shard: ParameterShard) -> Tensor:
    """The shard's gradient, contiguous fp32; zeros where there is none."""
    grad = shard.gradient
    return torch.zeros_like(shard.tensor) if grad is None else grad.float().contiguous()


def copy_masters_to_weights(shards: Iterable[ParameterShard]) -> None:
    """Round the masters to the bf16 weights that matmuls use."""
    with torch.no_grad():
        copies = [
            (shard.compute_weight.tensor, shard.tensor)
            for shard in shards
            if shard.compute_weight is not None
        ]
        if copies:
            torch._foreach_copy_([weight for weight, _ in copies], [master for _, master in copies])


def chunk_ranges(elements: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `size` elements that cover `[0, elements)`."""
    for start in range(0, elements, size):
        yield start, min(elements, start + size)
