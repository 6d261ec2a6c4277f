"""What the optimizers share: rates by kind of parameter, gradients as they come, and moments in two precisions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.training import OptimConfig
from trainer.optim.slots import Slot, StagePeers

_CHUNKS = {"cpu": 1 << 18}
_CHUNK = 1 << 23


@dataclass(frozen=True)
class Rate:
    """What a kind of parameter makes of the step's learning rate."""

    scale: float
    """Factor on the learning rate."""
    decay: float
    """Weight decay: a step takes `lr * scale * decay` of a value."""


def rate_of(kind: str, optim: OptimConfig, width: int) -> Rate:
    """Rate of a kind of slot in a model of `width`.

    Only matrices decay. With `base_width` the rates of a narrower model carry over: a matrix gets `lr * base / width` and
    `decay * sqrt(width / base)`.
    """
    if kind != "matrix":
        return Rate(1.0, 0.0)
    wider = width / optim.base_width if optim.base_width else 1.0
    return Rate(1 / wider, optim.weight_decay * math.sqrt(wider))


def device_of(slots: Sequence[Slot]) -> torch.device:
    """Device of the slots; the CPU for none."""
    return slots[0].tensor.device if slots else torch.device("cpu")


def chunk_of(device: torch.device) -> int:
    """Elements to work on at a time where a step needs scratch memory.

    32 MiB of fp32 on a GPU, where launches cost more than memory below that; 1 MiB on a CPU, which a core caches.
    """
    return _CHUNKS.get(device.type, _CHUNK)


def moment_dtype(optim: OptimConfig) -> torch.dtype:
    """Type that moments are kept in.

    A bf16 moment is computed in fp32 and rounded to nearest once a step, a relative error of at most 2^-8 each time, which
    fades with the moment: AdamW's updates differ from those of fp32 moments by about half a percent (root mean square)
    at betas 0.9 and 0.95. The configuration refuses decays so near 1 that rounding would keep a moment from falling.
    """
    return torch.float32 if optim.moments == "fp32" else torch.bfloat16


def check(slots: Sequence[Slot]) -> None:
    """Refuse slots that the optimizers' views and kernels would read wrongly.

    Raises:
        ValueError: a tensor isn't contiguous fp32 of its box's shape.
    """
    for slot in slots:
        tensor = slot.tensor
        if (
            tensor.dtype != torch.float32
            or not tensor.is_contiguous()
            or tuple(tensor.shape) != slot.box.shape
        ):
            raise ValueError(
                f"the master of {slot.name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}; an "
                f"optimizer needs contiguous fp32 of its box's shape {slot.box.shape}"
            )


def check_names(slots: Sequence[Slot], peers: StagePeers) -> None:
    """See that `peers` describes these slots, and that every rank knows every parameter, thus its kind.

    Raises:
        ValueError: it doesn't, on all ranks alike.
    """
    mine = [(slot.name, slot.box, slot.replica, slot.replicas) for slot in slots]
    if list(peers.slots[peers.rank]) != mine:
        raise ValueError(f"rank {peers.rank} of the stage has other slots than its peers have on record")
    names = [{name for name, *_ in listed} for listed in peers.slots]
    for rank, known in enumerate(names):
        if missing := set().union(*names) - known:
            raise ValueError(
                f"rank {rank} of the stage has no slot of {min(missing)}; give it one with an empty box"
            )


def gradient(slot: Slot) -> Tensor:
    """The slot's gradient, contiguous fp32; zeros where there is none."""
    grad = slot.gradient
    return torch.zeros_like(slot.tensor) if grad is None else grad.float().contiguous()


def refresh(slots: Iterable[Slot]) -> None:
    """Write the weights that matmuls use from their masters."""
    with torch.no_grad():
        casts = [(slot.cast.weight, slot.tensor) for slot in slots if slot.cast is not None]
        if casts:
            torch._foreach_copy_([weight for weight, _ in casts], [master for _, master in casts])


def ranges(elements: int, size: int) -> Iterator[tuple[int, int]]:
    """Stretches of at most `size` that cover `[0, elements)`."""
    for start in range(0, elements, size):
        yield start, min(elements, start + size)
