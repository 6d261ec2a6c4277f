"""Communication without overlap, to show what overlap with computation is worth (MegaScale, table 3).

Each collective waits for all that was queued before it, and all that is queued after it waits for its end. The host
doesn't wait, so what a step loses is the overlap alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = (
    "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single", "all_reduce",
    "all_to_all_single", "batch_isend_irecv",
)  # fmt: skip
"""Of `torch.distributed`: FSDP, the pipeline and `trainer.parallel.exchange` move data by these."""


@contextmanager
def without_overlap(device: torch.device) -> Iterator[None]:
    """No overlap for what runs inside, by any thread of this process; nothing changes on a CPU, whose collectives have no
    streams."""
    if device.type != "cuda":
        yield
        return
    compute = torch.cuda.current_stream(device)
    kept = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    for name, collective in kept.items():
        setattr(dist, name, _alone(collective, compute))
    try:
        yield
    finally:
        for name, collective in kept.items():
            setattr(dist, name, collective)


def _alone(collective: Callable[..., Any], compute: torch.cuda.Stream) -> Callable[..., Any]:
    @wraps(collective)
    def one(*args: Any, **kwargs: Any) -> Any:
        current = torch.cuda.current_stream(compute.device)
        current.wait_stream(compute)
        work = collective(*args, **kwargs)
        for each in work if isinstance(work, list) else [work]:
            if each is not None:
                each.wait()
        compute.wait_stream(current)
        return work

    return one
