"""States of torch tensors, cut among ranks in many ways, saved and restored."""

from __future__ import annotations

import random
from math import prod

import torch
from torch import Tensor

from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.load import LoadTarget, Restored, restore, stored
from faulttol.checkpoint.save import Retention, Saved, owned, save
from tests.faulttol.ranks import identity, together, values
from trainer.state import Slice

Layout = list[list[Slice]]
"""By rank."""
KINDS = ("rows", "flat", "boxes")


def state(seed: int) -> dict[str, Tensor]:
    """Tensors of no to five dims, odd sizes and several dtypes, one of them empty."""
    noise, found = random.Random(seed), {}
    torch.manual_seed(seed)
    shapes = [
        (),
        (1,),
        (0, 3),
        *(
            tuple(noise.randint(1, 11 - 2 * dims + dims // 3) for _ in range(dims))
            for dims in (1, 2, 3, 4, 5)
        ),
    ]
    dtypes = ("float32", "bfloat16", "int64", "float16", "bool", "uint8", "float64", "float32")
    for shape, dtype in zip(shapes, dtypes, strict=True):
        tensor = (torch.randn(shape) * 100).to(getattr(torch, dtype))
        found[f"blocks.{len(found)}.weight/{dtype}"] = tensor
    found["steps"] = torch.tensor(float(seed))
    return found


def cut(box: Box, noise: random.Random) -> list[Box]:
    """A box cut at random into boxes that tile it."""
    dims = [d for d, size in enumerate(box.shape) if size > 1]
    if not dims or noise.random() < 0.3:
        return [box]
    d = noise.choice(dims)
    at = noise.randrange(1, box.shape[d])
    return cut(box.cut(d, 0, at), noise) + cut(box.cut(d, at, box.shape[d]), noise)


def layout(tensors: dict[str, Tensor], world: int, seed: int, kind: str) -> Layout:
    """The tensors' values cut among ranks: by uneven rows, flat as ZeRO does, or at random with replicas."""
    noise, ranks = random.Random(seed), list(range(world))
    parts: Layout = [[] for _ in ranks]
    for name, tensor in tensors.items():
        whole = Box.full(tuple(tensor.shape))
        holders: list[tuple[Box, list[int]]]
        if not tensor.shape or not tensor.numel():
            holders = [(whole, ranks)]
        elif kind == "boxes":
            holders = [(b, noise.sample(ranks, noise.randint(1, world))) for b in cut(whole, noise)]
        else:
            count = prod(tensor.shape) if kind == "flat" else tensor.shape[0]
            each = -(-count // world)
            ends = [(min(r * each, count), min((r + 1) * each, count)) for r in ranks]
            rows = [whole.flat(a, b) if kind == "flat" else [whole.cut(0, a, b)] for a, b in ends]
            holders = [(box, [rank]) for rank in ranks for box in rows[rank]]
        for box, owners in holders:
            part = tensor[box.slices_within(whole)].clone()
            for replica, rank in enumerate(owners):
                parts[rank].append(Slice(name, part.clone(), box, replica, len(owners)))
    return parts


def save_layout(root: object, step: int, parts: Layout, keep: int = 3) -> list[Saved | Exception]:
    """Save on all ranks what each owns."""
    world = len(parts)
    return together(
        world,
        lambda rank, peers: save(
            str(root),
            step,
            owned(parts[rank]),
            identity(rank, world),
            {"world": world},
            peers,
            Retention(keep),
        ),
    )


def blank(parts: Layout) -> Layout:
    """The same boxes with other values."""
    return [[Slice(p.name, _other(p.tensor), p.box, p.replica, p.replicas) for p in mine] for mine in parts]


def _other(tensor: Tensor) -> Tensor:
    return ~tensor if tensor.dtype == torch.bool else torch.full_like(tensor, 77)


def restore_layout(root: object, parts: Layout, attempt: int = 1) -> list[Restored | None | Exception]:
    """Fill all slices of all ranks."""
    world = len(parts)

    def one(rank: int, peers: object) -> Restored | None:
        wanted = [LoadTarget.from_slice(p.name, p.tensor, p.box) for p in parts[rank]]
        return restore(stored(str(root)), wanted, peers, identity(rank, world, attempt=attempt))  # type: ignore[arg-type]

    return together(world, one)


def restored(root: object, parts: Layout, attempt: int = 1) -> Restored:
    """What all ranks have restored alike, into all slices."""
    answers = restore_layout(root, parts, attempt)
    assert all(isinstance(a, Restored) for a in answers), answers
    assert len({(a.step, a.path, a.passed) for a in answers if isinstance(a, Restored)}) == 1
    (first, *_) = answers
    assert isinstance(first, Restored)
    return first


def bits(tensor: Tensor) -> bytes:
    """Its bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def equal(one: Layout, other: Layout) -> bool:
    """Whether all ranks hold the same bytes under the same names and boxes."""
    return [[(p.name, p.box, bits(p.tensor)) for p in mine] for mine in one] == [
        [(p.name, p.box, bits(p.tensor)) for p in mine] for mine in other
    ]


def flat_bytes(saved_world: int, step: int, world: int, size: int = 1000) -> Layout:
    """The state of bytes that `ranks.save_all` saves, cut by rows among other ranks."""
    tensors = {
        name: torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for name, data in values(saved_world, step, size).items()
    }
    return layout(tensors, world, 0, "rows")
