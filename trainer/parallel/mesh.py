"""Who a rank is in the layout, and the process groups that follow from it.

Ranks are numbered with pp outermost and ep innermost, so an expert group is `ep` neighbouring ranks and stays
inside a node: with dp=4 and ep=2 the expert groups are {0,1} {2,3}, and the ranks {0,2} {1,3} hold the same
experts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from collectives.team import meet
from configs.errors import UserError
from configs.library_environment import Applied
from configs.rank import RankContext
from configs.schema import RunConfig


@dataclass(frozen=True)
class Mesh:
    """Groups of one rank. Every rank must build its mesh at the same point of its program."""

    rank: int
    world: int
    layout: dict[str, int]
    """Size by axis: pp, dp, cp, ep, etp, tp."""
    device: torch.device
    ep_group: dist.ProcessGroup
    """Ranks that exchange tokens, in the order of their experts."""
    control_group: dist.ProcessGroup
    """All ranks over gloo, for objects and small numbers on the host."""
    network: Applied
    """What became of the network preset's variables."""

    @property
    def ep_rank(self) -> int:
        """Place in the expert group: this rank holds experts [ep_rank * E/ep, (ep_rank + 1) * E/ep)."""
        return self.rank % self.layout["ep"]

    def gather(self, item: Any) -> list[Any] | None:
        """All ranks' items on rank 0, in rank order; None elsewhere."""
        items = [None] * self.world if self.rank == 0 else None
        dist.gather_object(item, items, dst=0, group=self.control_group)
        return items

    def broadcast(self, item: Any) -> Any:
        """Rank 0's item on all ranks."""
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def reduce(self, numbers: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        """`numbers` reduced over all ranks, on the host, equal everywhere."""
        host = numbers.detach().to("cpu", copy=True)
        dist.all_reduce(host, op=op, group=self.control_group)
        return host


def refuse_unsupported(config: RunConfig, world: int) -> None:
    """Refuse a layout that this trainer can't run.

    Raises:
        UserError: for an axis that isn't implemented, or ranks that don't make up the layout.
    """
    parallel = config.parallel
    for axis in ("tp", "pp", "cp", "etp"):
        size = getattr(parallel, axis)
        if size != 1:
            raise UserError(f"parallel.{axis}={size}: the trainer runs dp and ep only; set parallel.{axis}=1")
    if parallel.dp != world:
        raise UserError(f"parallel.dp={parallel.dp} makes {parallel.dp} ranks, but {world} were started")


def join(config: RunConfig, rank: RankContext, device: torch.device) -> Mesh:
    """Join the process group and build the mesh."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    network = meet(config, rank, backend)
    # DeepSpeed loads late: it looks for its accelerator when it is imported.
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import groups

    # Compiled at first use, for an inference collective that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    ep = config.parallel.size("ep")
    # DeepSpeed makes the expert groups, of neighbouring ranks, and finds them again by this name.
    groups._create_expert_and_data_parallel(ep)
    collective = timedelta(seconds=config.resilience.timeouts.seconds("collective"))
    control = dist.new_group(backend="gloo", timeout=collective)
    parallel = config.parallel
    assert parallel.dp is not None, "the plan fills parallel.dp in"
    layout = {axis: parallel.size(axis) for axis in ("pp", "dp", "cp", "ep", "etp", "tp")}
    experts = groups._get_expert_parallel_group(f"ep_size_{ep}")
    return Mesh(rank.rank, rank.world, layout, device, experts, control, network)
