"""Waiting for device memory that the previous attempt still holds: it takes seconds to end, and this attempt starts
meanwhile."""

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

_PEAK_FACTOR, _RESERVE_BYTES = 1.25, 2 << 30
"""Factor on the previous attempt's peak allocation, and bytes on top of it, for what torch's allocator reserves, NCCL's
buffers and the driver's context."""
_TIMEOUT_SECONDS = 60.0
"""Memory that isn't free so long after all processes of the previous attempt have ended is held by another run."""
_POLL_SECONDS = 0.02


class DeviceMemoryHeld(RuntimeError):
    """A device has too little free memory, though all processes of the previous attempt have ended."""


def retry_out_of_memory(act: Callable[[], T], env: Mapping[str, str] = os.environ) -> T:
    """The result of `act`, tried again if it runs out of device memory while the previous attempt is ending, once
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
        time.sleep(_POLL_SECONDS)
    return act()


def wait_for_memory(rank: RankContext, device: torch.device, env: Mapping[str, str] = os.environ) -> float:
    """Wait until the device has enough free memory: beside the previous attempt, or once its processes have ended.

    Returns:
        Seconds waited; 0 where no attempt is ending here.

    Raises:
        DeviceMemoryHeld: where the memory isn't free a minute after they have.
    """
    gate = env.get(GATE)
    if not gate or device.type != "cuda":
        return 0.0
    previous_peak, started_at = _previous_peak_bytes(rank), time.monotonic()
    ended_at: float | None = None
    while True:
        free, total = torch.cuda.mem_get_info(device)
        if previous_peak is not None and free >= _PEAK_FACTOR * previous_peak + _RESERVE_BYTES:
            break
        if ended_at is None and Path(gate).exists():
            ended_at = time.monotonic()
        if ended_at is not None and (previous_peak is None or free >= previous_peak):
            break
        if ended_at is not None and time.monotonic() - ended_at > _TIMEOUT_SECONDS:
            raise DeviceMemoryHeld(
                f"{device} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, and attempt {rank.attempt - 1} took "
                f"{(previous_peak or 0) / 2**30:.1f}; all its processes ended {_TIMEOUT_SECONDS:.0f} s ago: find who "
                "holds it with nvidia-smi or rocm-smi, or reset the device"
            )
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - started_at


def _previous_peak_bytes(rank: RankContext) -> int | None:
    """Peak allocation of a rank of the previous attempt; None where it says nothing about this one."""
    before = rank.run.attempt(rank.attempt - 1)
    if before.config.exists() or rank.paths.config.exists():  # another layout
        return None
    line = last_step(before.metrics)
    return line.memory_bytes if isinstance(line, StepLine) else None
