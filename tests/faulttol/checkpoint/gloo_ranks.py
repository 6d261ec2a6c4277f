"""What real gloo ranks do in tests: save, and restore what all of them want, through the trainer's own `Mesh`."""

from __future__ import annotations

import torch
import torch.distributed as dist

from configs.library_environment import Applied
from faulttol.checkpoint.load import Restored, restore, stored
from faulttol.checkpoint.pieces import LoadTarget, owned
from faulttol.checkpoint.save import Retention, save
from tests.faulttol.ranks import identity
from tests.faulttol.tensors import Layout, blank, equal
from trainer.parallel.mesh import Mesh


def mesh(rank: int, world: int, store: dist.Store) -> Mesh:
    """A mesh without axes over a process group of its own."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None
    return Mesh(rank, world, {}, torch.device("cpu"), {}, group, Applied())


def save_and_restore(
    rank: int, world: int, store: dist.Store, root: str, parts: Layout
) -> tuple[Restored | None, bool]:
    """What this rank has restored, and whether it is what was saved."""
    try:
        peers = mesh(rank, world, store)
        who = identity(rank, world)
        save(root, 1, owned(parts[rank]), who, {}, peers, Retention())
        (there,) = blank([parts[rank]])
        found = restore(
            stored(root), [LoadTarget.from_slice(p.name, p.tensor, p.box) for p in there], peers, who
        )
        return found, equal([there], [parts[rank]])
    finally:
        dist.destroy_process_group()
