"""Whether Triton's kernels run, or torch's operators that compute the same; and why.

Triton compiles for CUDA and for ROCm alike, so nothing here is one vendor's.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

VARIABLE = "MEGARAY_KERNELS"
"""`torch` in this environment variable keeps Triton's kernels off."""


LEAST = 1 << 17
"""Elements from which on a tensor is worth a launch of its own: Triton's costs the host more than torch's."""


def interpreted() -> bool:
    """Whether Triton runs its kernels on the host, as tests have it (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def why_not() -> str:
    """Why torch's operators run; empty where the kernels do."""
    if os.environ.get(VARIABLE) == "torch":
        return f"{VARIABLE}=torch is set"
    if find_spec("triton") is None:
        return "triton isn't installed"
    return "" if torch.cuda.is_available() or interpreted() else "there is no GPU"


def reason() -> str:
    """The choice, as a person reads it."""
    return f"torch's operators, since {why_not()}" if why_not() else "Triton's kernels"


def use_kernels(x: Tensor) -> bool:
    """Whether kernels take over what is done to `x`: activations in bf16 on a GPU.

    In fp32 and fp64, where a run is compared with a reference, torch's operators stay.
    """
    return x.dtype == torch.bfloat16 and usable(x.device)


def usable(device: torch.device) -> bool:
    """Whether kernels run on a device."""
    return (device.type == "cuda" or interpreted()) and not why_not()


def programs(device: torch.device, each: int = 4) -> int:
    """Programs that fill a device whose kernels loop over their work."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * each


def loop(rows: int, tile: int, device: torch.device, each: int = 4, across: int = 1) -> tuple[int, int]:
    """Programs of a pass that loops over tiles of rows, and turns of each.

    Args:
        tile: rows of a tile.
        each: programs of a multiprocessor, as in `programs`.
        across: programs side by side that share a tile's columns.
    """
    blocks = max(1, -(-rows // tile))
    turns = -(-blocks // max(1, programs(device, each) // across))
    return -(-blocks // turns), turns


def next_power_of_2(width: int, most: int) -> int:
    """The power of two that covers `width`, at most `most`."""
    return min(1 << max(width - 1, 1).bit_length(), most)
