"""What a rank does in tests that train with both engines: several runs, one after the other, in one process group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.compose import compose
from configs.rank import RankContext
from configs.schema import RunConfig
from tests.trainer.families import SEQUENCE, batches, drift, family
from trainer.engines.base import Engine
from trainer.parallel.mesh import Mesh, assemble, join
from trainer.state import Slice

SAMPLES, FEWER = 16, 8
"""Samples of a step, and of the first three steps: a batch may grow."""


@dataclass(frozen=True)
class EngineRun:
    """A training run on all ranks of a test."""

    engine: str
    family: str = "mixtral"
    model: dict[str, Any] = field(default_factory=dict)
    """Differences from the family's small model."""
    layout: dict[str, int] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    begin: int = 0
    end: int = 8
    poisoned: int | None = None
    """A step that is taken once before it is taken well, with losses on rank 0 that aren't numbers."""
    load: Path | None = None
    save: Path | None = None
    save_at: int = 0


@dataclass(frozen=True)
class EngineStep:
    """A step's numbers over all ranks."""

    loss: float
    aux_loss: float
    norm: float
    load: list[list[int]]


@dataclass(frozen=True)
class EngineRankResult:
    """What came of a run, on one rank."""

    steps: list[EngineStep]
    evaluated: float
    poisoned: tuple[float, list[str]] | None
    """`skipped` of the poisoned step, and the names of the slices that it changed."""
    names: list[str]
    """Of this rank's slices."""


def config_of(run: EngineRun, world: int) -> RunConfig:
    """A resolved configuration."""
    plain = compose(["model=demo", "hardware=cpu"])
    model = family(run.family).model_dump() | run.model
    train = {
        "steps": 100,
        "global_batch": SAMPLES,
        "precision": "fp32",
        "micro_batch": 2,
        "engine": run.engine,
    }
    optim = {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 3}
    tree = plain.model_dump() | {
        "model": model,
        "parallel": plain.parallel.model_dump() | {"dp": world} | run.layout,
        "optim": plain.optim.model_dump() | optim | run.optim,
        "train": plain.train.model_dump() | train | run.train,
        "data": plain.data.model_dump() | {"sequence": SEQUENCE},
    }
    return RunConfig.model_validate(tree)


def make_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """The engine that a configuration names."""
    if config.train.engine == "deepspeed":
        from trainer.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, mesh)
    from trainer.engines.native import NativeEngine

    return NativeEngine(config, mesh)


def do(rank: RankContext, runs: Sequence[EngineRun]) -> list[EngineRankResult]:
    """All runs; every rank of the process group does the same ones."""
    torch.set_num_threads(1)
    first = join(config_of(runs[0], rank.world), rank, torch.device("cpu"))
    done = []
    for run in runs:
        config = config_of(run, rank.world)
        control, network = first.control_group, first.network
        mesh = assemble(config, rank.rank, rank.world, first.device, control, network)
        done.append(_train(run, config, make_engine(config, mesh), mesh))
    return done


def _train(run: EngineRun, config: RunConfig, engine: Engine, mesh: Mesh) -> EngineRankResult:
    if run.load is not None:
        fill(engine, whole(run.load))
    steps: list[EngineStep] = []
    poisoned = None
    for index in range(run.begin, run.end):
        if index == run.poisoned:
            poisoned = _poison(engine, config, index, mesh.rank)
        steps.append(_step(engine, config, index))
        if run.save is not None and index + 1 == run.save_at:
            keep(engine, run.save, mesh.rank)
    held = batches(1000, SAMPLES, 2, engine.data_parallel.index, engine.data_parallel.size)
    evaluated = _total(engine.evaluate(held, SAMPLES)) + drift(engine, mesh, run.end)
    return EngineRankResult(steps, evaluated, poisoned, [part.name for part in engine.state()])


def _step(engine: Engine, config: RunConfig, index: int) -> EngineStep:
    place, samples = engine.data_parallel, FEWER if index < 3 else SAMPLES
    given = batches(index, samples, config.train.micro_batch, place.index, place.size)
    result = engine.step(given, samples, config.optim.lr, lambda _phase: nullcontext())
    assert float(result.skipped) == 0
    loss, aux_loss = _total(result.loss), _total(result.aux_loss)
    return EngineStep(loss, aux_loss, float(result.grad_norm), result.expert_load.tolist())


def _poison(engine: Engine, config: RunConfig, index: int, rank: int) -> tuple[float, list[str]]:
    before = {place: part.tensor.clone() for place, part in enumerate(engine.state())}
    given = batches(
        index, SAMPLES, config.train.micro_batch, engine.data_parallel.index, engine.data_parallel.size
    )
    samples: Any = math.nan if rank == 0 else SAMPLES
    result = engine.step(given, samples, config.optim.lr, lambda _phase: nullcontext())
    changed = [part.name for place, part in enumerate(engine.state()) if not part.tensor.equal(before[place])]
    return float(result.skipped), changed


def _total(share: Tensor) -> float:
    total = share.double()
    dist.all_reduce(total)
    return float(total)


# ---- state without a checkpoint ----


def keep(engine: Engine, folder: Path, rank: int) -> None:
    """Write this rank's slices."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save([(p.name, p.box, p.replica, p.tensor.clone()) for p in engine.state()], folder / f"{rank}.pt")
    dist.barrier()


def whole(folder: Path) -> dict[str, Tensor]:
    """Global tensors from what all ranks kept; each element must have been kept exactly once."""
    found: dict[str, Tensor] = {}
    count: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.pt")):
        for name, box, replica, values in torch.load(path, weights_only=False):
            if replica:
                continue
            into = found.setdefault(name, torch.zeros(box.whole))
            times = count.setdefault(name, torch.zeros(box.whole, dtype=torch.int64))
            at = box.slices_within(box.full(box.whole))
            into[at], times[at] = values, times[at] + 1
    wrong = [name for name, times in count.items() if not bool((times == 1).all())]
    assert not wrong, f"kept not at all, or twice: {wrong}"
    return found


def fill(engine: Engine, values: dict[str, Tensor]) -> None:
    """Overwrite an engine's state."""
    for part in engine.state():
        part.tensor.copy_(_cut(values[part.name], part))
    engine.after_load()


def _cut(tensor: Tensor, part: Slice) -> Tensor:
    return tensor[part.box.slices_within(part.box.full(part.box.whole))]
