"""bf16 weights beside their masters train as FSDP's do, bit for bit, and are never behind their masters."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.compose import compose
from configs.rank import RankContext
from configs.schema import RunConfig
from tests.collectives.ranks import together
from tests.trainer.families import batches, family
from trainer.engines.native import NativeEngine
from trainer.model.decoder import DecoderStage
from trainer.model.moe import Experts
from trainer.parallel import apply, resident
from trainer.parallel.mesh import Mesh, assemble, join

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

SAMPLES, STEPS = 8, 3


@dataclass(frozen=True)
class ResidentCase:
    """What differs between runs."""

    micro: int
    kind: str = "adamw"
    layout: tuple[tuple[str, int], ...] = ()


CASES = {
    1: [ResidentCase(8), ResidentCase(2), ResidentCase(4, "muon"), ResidentCase(4, "lamb")],
    2: [ResidentCase(4, layout=(("dp", 2), ("ep", 2))), ResidentCase(2, layout=(("dp", 2), ("ep", 2))),
        ResidentCase(4, layout=(("dp", 1), ("tp", 2), ("ep", 2)))],
    4: [ResidentCase(2, layout=(("dp", 2), ("tp", 2), ("ep", 2))), ResidentCase(2, "muon", (("dp", 4), ("ep", 2)))],
}  # fmt: skip


def config_of(case: ResidentCase) -> RunConfig:
    layout = {"dp": 1} | dict(case.layout)
    words = [f"parallel.{axis}={size}" for axis, size in layout.items()]
    config = compose(
        ["model=demo", "hardware=cpu", "train.engine=native", "train.precision=bf16", f"train.micro_batch={case.micro}",
         f"train.global_batch={SAMPLES}", f"optim.kind={case.kind}", "optim.lr=0.01", "optim.warmup_steps=0",
         "data.sequence=32", "parallel.zero=2", *words]
    )  # fmt: skip
    return config.model_copy(update={"model": family("olmoe").model_copy(update={"shared_width": 16})})


State = dict[str, tuple[torch.Tensor, tuple[int, ...]]]
"""By name: a rank's part of a tensor, and where it begins."""


def state(engine: NativeEngine) -> State:
    return {part.name: (part.tensor.clone(), part.box.start) for part in engine.state()}


def same(shard: tuple[torch.Tensor, tuple[int, ...]], whole: tuple[torch.Tensor, tuple[int, ...]]) -> bool:
    """Whether a rank's shard is the same as that stretch of what the other way keeps, which may be more."""
    (tensor, begins), (more, first) = shard, whole
    for dim, (begin, zero, size) in enumerate(zip(begins, first, tensor.shape, strict=True)):
        more = more.narrow(dim, begin - zero, size)
    return tensor.equal(more)


def steps(config: RunConfig, mesh: Mesh) -> tuple[list[float], State, NativeEngine]:
    """Losses and the state after some steps."""
    engine = NativeEngine(config, mesh)
    losses = []
    for step in range(STEPS):
        given = batches(
            step, SAMPLES, config.train.micro_batch, engine.data_parallel.index, engine.data_parallel.size
        )
        result = engine.step(given, SAMPLES, 0.01, lambda _phase: nullcontext())
        losses += [float(result.loss), float(result.grad_norm)]
    return losses, state(engine), engine


def both(rank: RankContext) -> list[Any]:
    """By case: what each way gave, whether any weight is resident, and how many weights are behind their masters."""
    torch.set_num_threads(1)
    cases = CASES[rank.world]
    first = join(config_of(cases[0]), rank, torch.device("cpu"))
    chosen, found = resident.whole, []
    for case in cases:
        config = config_of(case)
        mesh = assemble(config, rank.rank, rank.world, first.device, first.control_group, first.network)
        ours, after, engine = steps(config, mesh)
        resident_shards = [shard for shard in engine._shards if shard.compute_weight is not None]
        resident_weights = len(resident_shards)
        behind = sum(
            not shard.compute_weight.tensor.equal(shard.tensor.bfloat16())
            for shard in resident_shards
            if shard.compute_weight
        )
        for part in engine.state():
            part.tensor.mul_(0.5)
        engine.after_load()
        behind += sum(
            not shard.compute_weight.tensor.equal(shard.tensor.bfloat16())
            for shard in resident_shards
            if shard.compute_weight
        )
        resident.whole = lambda *_: set()  # type: ignore[assignment]
        theirs, expected, _ = steps(config, mesh)
        resident.whole = chosen
        alive = weakref.ref(engine._parameters[0])
        del engine, resident_shards, part
        gc.collect()
        behind += alive() is not None  # the next case would have no room on a device
        differ = [name for name, tensor in expected.items() if not same(tensor, after[name])]
        found.append((case, ours, theirs, resident_weights, behind, differ))
    return found


@pytest.mark.parametrize("world", (1, 2, 4))
def test_weights_beside_their_masters_train_as_under_fsdp(world: int, tmp_path: Path) -> None:
    for rank in together(world, tmp_path, both):
        for case, ours, theirs, resident_shards, behind, differ in rank:
            assert resident_shards > 0 and behind == 0, case
            assert ours == theirs, case
            assert not differ, (case, differ)


@pytest.mark.parametrize(
    ("left", "alone", "expected"), [(True, False, 2), (False, False, 4), (True, True, 4)]
)
def test_blocks_share_a_collective_by_what_fsdp_has_of_them(left: bool, alone: bool, expected: int) -> None:
    """Blocks of 6.0 M elements beside experts of 201 M: two make a unit where each rank has its experts for itself."""
    model = compose(["model=zaya1_base", "hardware=cpu"]).model.model_copy(update={"layers": 4})
    with torch.device("meta"):
        stage = DecoderStage(model, 0, 4)
    experts = {p for module in stage.modules() if isinstance(module, Experts) for p in module.parameters()}
    units = apply._units(stage, alone, experts if left else set())
    assert len(units) == expected and [block for unit in units for block in unit] == list(
        stage.blocks.values()
    )
