"""Device memory that the attempt before still holds: its end takes seconds, and this one starts meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from configs.metrics import StepLine, last_step
from configs.rank import GATE, RankContext

T = TypeVar("T")

_MORE, _SPARE = 1.25, 2 << 30
"""Of what the attempt before had allocated at its peak, and bytes beside it: what torch's allocator reserves for it, NCCL's
buffers and the driver's context."""
_HELD_SECONDS = 60.0
"""Memory that isn't free so long after all processes of the attempt before have ended is held by nobody of this run."""
_LOOK_SECONDS = 0.02


class DeviceMemoryHeld(RuntimeError):
    """A device has too little free memory, though nothing is left of the attempt before."""


def with_room(act: Callable[[], T], env: Mapping[str, str] = os.environ) -> T:
    """What `act` gives; where it fails for want of device memory while the attempt before is ending, it is tried again once
    that one's processes have ended. A driver's context alone takes half a GB.

    Raises:
        Exception: what `act` raises.
    """
    gate = env.get(GATE)
    try:
        return act()
    except RuntimeError as error:
        if not gate or "out of memory" not in str(error):
            raise
    while not Path(gate).exists():
        time.sleep(_LOOK_SECONDS)
    return act()


def await_memory(rank: RankContext, device: torch.device, env: Mapping[str, str] = os.environ) -> float:
    """Wait until this attempt has room on its device: beside the one before, or once that one's processes have ended.

    Returns:
        Seconds that it took; 0 where no attempt is ending here.

    Raises:
        DeviceMemoryHeld: where the memory isn't free a minute after they have.
    """
    gate = env.get(GATE)
    if not gate or device.type != "cuda":
        return 0.0
    took, began = _taken(rank), time.monotonic()
    opened: float | None = None
    while True:
        free, total = torch.cuda.mem_get_info(device)
        if took is not None and free >= _MORE * took + _SPARE:
            break
        if opened is None and Path(gate).exists():
            opened = time.monotonic()
        if opened is not None and (took is None or free >= took):
            break
        if opened is not None and time.monotonic() - opened > _HELD_SECONDS:
            raise DeviceMemoryHeld(
                f"{device} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, and attempt {rank.attempt - 1} took "
                f"{(took or 0) / 2**30:.1f}; all its processes ended {_HELD_SECONDS:.0f} s ago: find who holds it with "
                "nvidia-smi or rocm-smi, or reset the device"
            )
        time.sleep(_LOOK_SECONDS)
    return time.monotonic() - began


def _taken(rank: RankContext) -> int | None:
    """Bytes that a rank of the attempt before had allocated at most; None where that says nothing of this one."""
    before = rank.run.attempt(rank.attempt - 1)
    if before.config.exists() or rank.paths.config.exists():  # another layout
        return None
    line = last_step(before.metrics)
    return line.memory_bytes if isinstance(line, StepLine) else None
