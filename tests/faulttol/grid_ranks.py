"""What a rank does for the grid of layout pairs: train and save under one layout; load, save and continue under another."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs.library_environment import Applied
from configs.schema import RunConfig
from faulttol.checkpoint.load import Identity, LoadTarget, restore, stored
from faulttol.checkpoint.save import Retention, owned, save
from faulttol.staged.saver import SavePolicy, Saver
from tests.trainer.engines.ranks import make_engine
from tests.trainer.families import batches
from trainer.engines.base import Engine
from trainer.optim.schedule import learning_rate
from trainer.parallel.mesh import Mesh, assemble

Line = tuple[float, float, list[list[int]], int]
"""Loss, gradient norm, loads and drops of a step."""
SAMPLES = 8
"""Of a step."""
JUNK = 77
"""What all state is overwritten with before a load, so that an element that isn't loaded shows."""


@dataclass(frozen=True)
class GridWork:
    """A piece of work of all ranks of a layout."""

    config: RunConfig
    source: str | None = None
    """Checkpoint folder to load from, on top of junk; None: train from the start."""
    before: int = 0
    """Steps before the state is hashed and saved."""
    target: str | None = None
    """Checkpoint folder to save to."""
    after: int = 0
    """Steps after that, in the same process."""
    background: bool = False
    """Whether the save is written beside those steps, as a run does."""
    spoil: int | None = None
    """Seed of one bit of the state that is flipped on one rank once all is loaded: the grid must see it."""


@dataclass(frozen=True)
class Went:
    """What came of it, on rank 0."""

    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every global tensor of the live state, independent of the layout."""
    problems: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()
    """Of all steps, those before the save first."""


def do(rank: int, world: int, store: Any, work: GridWork) -> Went:
    """Do a piece of work; every rank of its layout calls this."""
    config = work.config
    with _met(config, rank, world, store) as mesh:
        engine = make_engine(config, mesh)
        start = 0 if work.source is None else _load(engine, mesh, work.source)
        if work.spoil is not None:
            _spoil(engine, mesh, work.spoil)
        lines = [_step(engine, config, start + index) for index in range(work.before)]
        hashes, problems = hashes_of(engine, mesh)
        reached = start + work.before
        with _saving(engine, mesh, work, reached) as settle:
            lines += [_step(engine, config, reached + index, settle) for index in range(work.after)]
        return Went(hashes, tuple(problems), tuple(lines)) if rank == 0 else Went()


@contextmanager
def _met(config: RunConfig, rank: int, world: int, store: Any) -> Iterator[Mesh]:
    """The mesh of a layout. DeepSpeed remembers groups as long as a process lives, so there the process group stays."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's, of many ranks
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    stays = config.train.engine == "deepspeed"
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        control = dist.group.WORLD
        assert control is not None and control.size() == world
        yield assemble(config, rank, world, torch.device("cpu"), control, Applied())
    finally:
        if not stays:
            dist.destroy_process_group()


def _step(engine: Engine, config: RunConfig, index: int, settle: Callable[[], None] = lambda: None) -> Line:
    """A step; `settle` is called before the optimizer changes anything."""

    def phase(name: str) -> AbstractContextManager[None]:
        if name == "optimizer":
            settle()
        return nullcontext()

    place, micro_batch = engine.data_parallel, config.train.micro_batch
    given = batches(index, SAMPLES, micro_batch, place.index, place.size)
    lr = learning_rate(config.optim, index, config.train.steps)
    result = engine.step(given, SAMPLES, lr, phase)
    shares = torch.stack([result.loss.double(), result.aux_loss.double(), result.dropped.double()])
    dist.all_reduce(shares)
    loss, aux_loss, dropped = shares.tolist()
    return loss + aux_loss, float(result.grad_norm), result.expert_load.tolist(), int(dropped)


# ---- checkpoints ----


@contextmanager
def _saving(engine: Engine, mesh: Mesh, work: GridWork, step: int) -> Iterator[Callable[[], None]]:
    """Save before what follows, or beside it; gives what is called before anything that is being saved changes."""
    if work.target is None:
        yield lambda: None
        return
    pieces, identity, facts, kept = owned(engine.state()), _identity(mesh), {"step": step}, Retention()
    if not work.background:
        save(work.target, step, pieces, identity, facts, mesh, kept)
        yield lambda: None
        return
    first = mesh.rank == 0
    own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if first else None
    port = mesh.broadcast(own.port if own is not None else None)
    control = own or dist.TCPStore("127.0.0.1", port, is_master=False)
    saver = Saver(SavePolicy(work.target, kept), identity, mesh, control, mesh.device)
    try:
        saver.stage(step, pieces, facts)
        yield saver.settle
    finally:
        saver.close()
    (outcome,) = saver.poll()
    if outcome.error is not None:
        raise outcome.error
    dist.barrier()  # rank 0 serves the store


def _load(engine: Engine, mesh: Mesh, root: str) -> int:
    """Fill the engine's state; the step that it is of."""
    with torch.no_grad():
        for part in engine.state():
            part.tensor.fill_(JUNK)
    wanted = [LoadTarget.from_slice(part.name, part.tensor, part.box) for part in engine.state()]
    found = restore(stored(root), wanted, mesh, _identity(mesh))
    if found is None or found.passed or found.facts != {"step": found.step}:
        raise AssertionError(f"{root} gave {found}")
    engine.after_load()
    return found.step


def _identity(mesh: Mesh) -> Identity:
    return Identity("grid", 1, mesh.layout, mesh.rank, mesh.world)


# ---- state ----


@dataclass(frozen=True)
class SentPart:
    """A rank's part of a global tensor, as it is sent to rank 0."""

    name: str
    dtype: str
    whole: tuple[int, ...]
    """Shape of the global tensor."""
    place: tuple[slice, ...]
    """Of the part in it."""
    data: bytes
    """Row-major."""


def hashes_of(engine: Engine, mesh: Mesh) -> tuple[dict[str, str], list[str]]:
    """On rank 0 the hash of each global tensor of the live state of all ranks, and what is wrong with their parts."""
    mine = []
    for part in engine.state():
        flat = part.tensor.detach().contiguous().view(-1)
        place = tuple(slice(s, s + n) for s, n in zip(part.box.start, part.box.shape, strict=True))
        data = flat.view(torch.uint8).numpy().tobytes()
        dtype = str(flat.dtype).removeprefix("torch.")
        mine.append(SentPart(part.name, dtype, part.box.whole, place, data))
    everybody = mesh.gather(mine)
    return ({}, []) if everybody is None else hashes_from([part for rank in everybody for part in rank])


def hashes_from(parts: Iterable[SentPart]) -> tuple[dict[str, str], list[str]]:
    """SHA-256 of dtype, shape and row-major bytes of each tensor that parts make up, and what is wrong with them.

    Every element must be held by some part, by all holders alike.
    """
    wholes: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}
    problems: dict[str, None] = {}
    for part in parts:
        if part.name not in wholes:
            item = getattr(torch, part.dtype).itemsize
            values, held = np.zeros((*part.whole, item), np.uint8), np.zeros(part.whole, bool)
            wholes[part.name] = part.dtype, values, held
        dtype, values, held = wholes[part.name]
        if (dtype, held.shape) != (part.dtype, part.whole):
            told = f"{dtype}{list(held.shape)} and {part.dtype}{list(part.whole)}"
            problems[f"{part.name} is {told}"] = None
            continue
        given = np.frombuffer(part.data, np.uint8).reshape(values[part.place].shape)
        if (values[part.place] != given).any(-1)[held[part.place]].any():
            problems[f"copies of {part.name} differ"] = None
        values[part.place], held[part.place] = given, True
    hashes = {}
    for name, (dtype, values, held) in sorted(wholes.items()):
        if not held.all():
            problems[f"{held.size - int(held.sum())} elements of {name} are nowhere"] = None
        hashes[name] = hashlib.sha256(f"{dtype}{list(held.shape)}".encode() + values.tobytes()).hexdigest()
    return hashes, list(problems)


def _spoil(engine: Engine, mesh: Mesh, seed: int) -> None:
    """Flip one bit of one element on one rank."""
    noise = Random(seed)
    if mesh.rank != noise.randrange(mesh.world):
        return
    part = noise.choice([part for part in engine.state() if part.tensor.numel()])
    data = part.tensor.detach().view(-1).view(torch.uint8)
    data[noise.randrange(data.numel())] ^= 1 << noise.randrange(8)
