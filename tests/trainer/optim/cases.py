"""A small model's parameters cut up in many ways, steps over them, and ranks that take the steps together."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from configs.training import OptimConfig
from tests.forks import forks
from trainer.optim.build import build
from trainer.optim.muon import Muon
from trainer.optim.shards import Optimizer, ParameterShard, StagePeers
from trainer.state import Box

T = TypeVar("T")
Cut = tuple[Box, int, int]
"""A box with its replica and their number."""
Saved = list[tuple[str, Box | None, torch.Tensor]]

PARAMETERS = {
    "embedding.weight": ((13, 6), "embedding"),
    "wide.weight": ((7, 10), "matrix"),
    "tall.weight": ((10, 4), "matrix"),
    "tiny.weight": ((2, 3), "matrix"),
    "experts.gate_up": ((5, 2, 6, 4), "matrix"),
    "norm.weight": ((9,), "vector"),
}
WIDTH = 64
STEPS = 7
SKIPPED = 3
FACTORS = (1.0, 0.3, 1.0, math.nan, 0.9, 1.0, 0.05)
RATES = (0.02, 0.03, 0.025, 0.02, 0.01, 0.01, 0.02)
CONFIGS = {
    "adamw": OptimConfig(kind="adamw"),
    "muon": OptimConfig(kind="muon", base_width=16),
    "lamb": OptimConfig(kind="lamb", beta2=0.999, weight_decay=0.3),
}


def values(seed: int = 0) -> dict[str, np.ndarray]:
    """Starting values of the whole parameters."""
    noise = np.random.default_rng(seed)
    return {name: noise.normal(size=shape).astype(np.float32) for name, (shape, _) in PARAMETERS.items()}


def gradients(step: int) -> dict[str, np.ndarray]:
    """Gradients of a step; those of the skipped one aren't finite."""
    found = values(100 + step)
    if step == SKIPPED:
        for array in found.values():
            array.flat[::3] = math.nan
            array.flat[1::3] = math.inf
    return found


# ---- ways to cut the parameters up ----


def _spans(length: int, parts: int) -> list[tuple[int, int]]:
    """As torch.chunk cuts: equal parts rounded up, the last ones short or empty."""
    size = -(-length // parts)
    return [(min(length, part * size), min(length, (part + 1) * size)) for part in range(parts)]


def _along(shape: tuple[int, ...], dim: int, rank: int, size: int) -> Box:
    start, end = _spans(shape[dim], size)[rank]
    begins = tuple(start if d == dim else 0 for d in range(len(shape)))
    return Box(shape, begins, tuple(end - start if d == dim else n for d, n in enumerate(shape)))


def rows(shape: tuple[int, ...], rank: int, size: int) -> list[Cut]:
    """FSDP: dim 0, whatever it counts."""
    return [(_along(shape, 0, rank, size), 0, 1)]


def columns(shape: tuple[int, ...], rank: int, size: int) -> list[Cut]:
    """Tensor parallelism on the last dim; vectors are replicated."""
    if len(shape) == 1:
        return [(Box.full(shape), rank, size)]
    return [(_along(shape, len(shape) - 1, rank, size), 0, 1)]


def middle(shape: tuple[int, ...], rank: int, size: int) -> list[Cut]:
    """Each matrix of a stack split by rows."""
    return [(_along(shape, max(0, len(shape) - 2), rank, size), 0, 1)]


def copies(shape: tuple[int, ...], rank: int, size: int) -> list[Cut]:
    """Rows over half of the ranks, twice; on two ranks all of it on both."""
    half = size // 2
    return [(_along(shape, 0, rank % half, half), rank // half, 2)]


def grid(shape: tuple[int, ...], rank: int, size: int) -> list[Cut]:
    """Rows over half of the ranks, columns over two."""
    if len(shape) == 1:
        return copies(shape, rank, size)
    half = size // 2
    one, two = _along(shape, 0, rank % half, half), _along(shape, len(shape) - 1, rank // half, 2)
    box = one.overlap(two)
    return [(box or Box(shape, (0,) * len(shape), (0,) * len(shape)), 0, 1)]


def patches(shape: tuple[int, ...], rank: int, size: int) -> list[Cut]:
    """Stretches of dim 0 of length 1 dealt in turn: several boxes of a parameter on a rank, a stack's matrices whole."""
    starts = [start for start in range(shape[0]) if start % size == rank]
    boxes = [Box(shape, (start, *[0] * (len(shape) - 1)), (1, *shape[1:])) for start in starts]
    return [(box, 0, 1) for box in boxes] or [(Box(shape, (0,) * len(shape), (0, *shape[1:])), 0, 1)]


def owned(shape: tuple[int, ...], rank: int, size: int) -> list[Cut]:
    """All of a parameter on one rank, which one by its shape; the others have nothing."""
    here = sum(shape) % size == rank
    return [(Box.full(shape) if here else Box(shape, (0,) * len(shape), (0, *shape[1:])), 0, 1)]


def lopsided(shape: tuple[int, ...], rank: int, size: int) -> list[Cut]:
    """The first half of dim 0 on all ranks, the rest split among them."""
    half = shape[0] // 2
    start, end = _spans(shape[0] - half, size)[rank]
    begins = [0] * (len(shape) - 1)
    return [
        (Box(shape, (0, *begins), (half, *shape[1:])), rank, size),
        (Box(shape, (half + start, *begins), (end - start, *shape[1:])), 0, 1),
    ]


CUTS: dict[str, Callable[[tuple[int, ...], int, int], list[Cut]]] = {
    cut.__name__: cut for cut in (rows, columns, middle, copies, grid, patches, owned, lopsided)
}


def whole(shape: tuple[int, ...], rank: int, size: int) -> list[Cut]:
    """One rank alone."""
    return [(Box.full(shape), 0, 1)]


# ---- ranks ----


@dataclass
class OptimRank:
    """One rank's shards and optimizer."""

    shards: list[ParameterShard]
    optimizer: Optimizer

    @classmethod
    def make(
        cls,
        optim: OptimConfig,
        cut: Callable[[tuple[int, ...], int, int], list[Cut]] = whole,
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        device: str = "cpu",
    ) -> OptimRank:
        """A rank that starts from `values`."""
        size = group.size() if group is not None else 1
        listed = [
            [(name, *one) for name, (shape, _) in PARAMETERS.items() for one in cut(shape, r, size)]
            for r in range(size)
        ]
        start = values()
        shards = [
            ParameterShard(
                name, _part(start[name], box).to(device), box, PARAMETERS[name][1], replica, replicas
            )
            for name, box, replica, replicas in listed[rank]
        ]
        peers = StagePeers(group, rank, size, listed)
        if optim.kind == "muon":
            # Small buckets, so that there are several.
            return cls(shards, Muon(shards, optim, WIDTH, peers, bucket=150))
        return cls(shards, build(optim, WIDTH, shards, peers))

    def go(self, start: int = 0, end: int = STEPS) -> OptimRank:
        """Take the steps from `start` to `end`."""
        for step in range(start, end):
            arrays = gradients(step)
            device = self.shards[0].tensor.device
            for shard in self.shards:
                shard.tensor.grad = _part(arrays[shard.name], shard.box).to(device)
            factor = torch.tensor(FACTORS[step], device=device)
            self.optimizer.step(RATES[step], factor, torch.tensor(float(step == SKIPPED), device=device))
        return self

    def unwaiting(self) -> None:
        """Take a step in which waiting for the GPU is an error."""
        factor, skip = torch.tensor(0.5, device="cuda"), torch.tensor(0.0, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.optimizer.step(0.1, factor, skip)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def saved(self) -> Saved:
        """Copies of values and state, on the host."""
        found: Saved = [(shard.name, shard.box, shard.tensor.cpu().clone()) for shard in self.shards]
        for part, tensor, shard in self.optimizer.state():
            found.append(
                (f"{shard.name}/{part}" if shard else part, shard and shard.box, tensor.cpu().clone())
            )
        return found

    def load(self, saved: Sequence[Saved]) -> OptimRank:
        """Take up what several ranks saved, at any other cut."""
        live = [(shard.name, shard.box, shard.tensor) for shard in self.shards]
        live += [
            (f"{shard.name}/{part}" if shard else part, shard and shard.box, tensor)
            for part, tensor, shard in self.optimizer.state()
        ]
        pieces: dict[str, list[tuple[Box | None, torch.Tensor]]] = {}
        for name, box, tensor in (piece for rank in saved for piece in rank):
            pieces.setdefault(name, []).append((box, tensor))
        for name, box, tensor in live:
            for other, piece in pieces[name]:
                if box is None or other is None:
                    tensor.copy_(piece)
                elif shared := box.overlap(other):
                    tensor[shared.slices_within(box)] = piece[shared.slices_within(other)]
        return self


def _part(array: np.ndarray, box: Box) -> torch.Tensor:
    return torch.from_numpy(array)[box.slices_within(Box.full(box.whole))].contiguous().clone()


def gathered(saved: Sequence[Saved]) -> dict[str, np.ndarray]:
    """Whole tensors from all ranks' parts. Copies of an element must agree in every bit."""
    found: dict[str, np.ndarray] = {}
    for name, box, tensor in (piece for rank in saved for piece in rank):
        array = tensor.float().numpy()
        shape = box.whole if box else ()
        at = box.slices_within(Box.full(box.whole)) if box else ()
        target = found.setdefault(name, np.full(shape, np.nan, np.float32))
        known = ~np.isnan(target[at])
        assert (target[at][known] == array[known]).all(), f"copies of {name} differ"
        target[at] = array
    return found


def together(world: int, folder: Path, backend: str, act: Callable[..., T], *arguments: Any) -> list[T]:
    """`act(rank, *arguments)` on `world` ranks; over gloo they are forked with torch loaded. What each returned."""
    # What looks for a GPU while it is loaded would spoil it for all that are forked later.
    context = multiprocessing.get_context("spawn") if backend == "nccl" else forks()
    with ProcessPoolExecutor(world, mp_context=context) as pool:
        ends = list(pool.map(partial(_one, act, arguments, world, folder / "store", backend), range(world)))
    # Each tensor that comes from another process keeps a file open: thousands, where `select` takes 1,024.
    return tree_map_only(torch.Tensor, torch.Tensor.clone, ends)


def _one(
    act: Callable[..., T], arguments: tuple[Any, ...], world: int, store: Path, backend: str, rank: int
) -> T:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=dist.FileStore(str(store), world), rank=rank, world_size=world)
    try:
        return act(rank, *arguments)
    finally:
        dist.destroy_process_group()


def cases() -> Iterator[tuple[str, str]]:
    """Names of optimizer and cut."""
    yield from product(CONFIGS, CUTS)


def all_cases(rank: int, device: str) -> dict[tuple[str, str], tuple[Saved, Saved]]:
    """What every case ends with on a rank, without and with a new start in between."""
    group = dist.group.WORLD
    found = {}
    for kind, cut in cases():
        optim = CONFIGS[kind]
        begun = OptimRank.make(optim, CUTS[cut], rank, group, device).go(0, 2)
        state = begun.saved()
        straight = begun.go(2).saved()
        resumed = OptimRank.make(optim, CUTS[cut], rank, group, device).load([state]).go(2).saved()
        if device == "cuda":
            begun.unwaiting()
        found[kind, cut] = straight, resumed
    return found
