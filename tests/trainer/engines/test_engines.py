"""Both engines compute the same: losses, norms, gradients and state, which each takes over from the other."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.collectives.ranks import together
from tests.trainer.engines.ranks import EngineRankResult, EngineRun, do, whole

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

ENGINES = ("native", "deepspeed")
OTHER = {"native": "deepspeed", "deepspeed": "native"}
CLOSE = 1e-5
LONG = bool(os.environ.get("MEGARAY_LONG"))
"""All pairs, and fifty steps of the first: else a pair of each kind of world, ZeRO stage, precision and model."""
SPLIT = 4
"""Step after which a run's state is kept, for another run to continue with."""

#: What engines must treat alike, in one model: tied embeddings, a shared expert, a dense layer, losses of routers.
MIXED = {
    "layers": 3, "tie_embeddings": True, "shared_width": 16, "dense_layers": 1, "dense_width": 24, "qk_norm": "head",
    "router": {"balance": "aux", "aux_coefficient": 0.02, "z_coefficient": 0.01},
}  # fmt: skip
WIDE = {"base_width": 16, "clip": 0.5}


@dataclass(frozen=True)
class EnginePair:
    """The same run on both engines."""

    name: str
    world: int
    run: EngineRun

    @property
    def runs(self) -> list[EngineRun]:
        return [dataclasses.replace(self.run, engine=engine) for engine in ("native", "deepspeed")]


def pair(world: int, name: str, end: int = 8, **fields: object) -> EnginePair:
    return EnginePair(name, world, EngineRun("", end=end, **fields))  # type: ignore[arg-type]


PAIRS = [
    pair(1, "one", end=50 if LONG else 12, model=MIXED, optim=WIDE, train={"micro_batch": 4}),
    pair(2, "dp-zero1", model={"layers": 2}, layout={"zero": 1}, train={"micro_batch": 4, "recompute": "full"}),
    pair(2, "ep-zero2", model=MIXED, layout={"ep": 2, "zero": 2}, optim=WIDE, train={"micro_batch": 4}),
    pair(2, "bf16-zero1", end=6, layout={"zero": 1}, train={"micro_batch": 4, "precision": "bf16"}),
    pair(2, "bf16-zero2", end=6, layout={"zero": 2}, train={"micro_batch": 4, "precision": "bf16"}),
    pair(4, "dp-ep-zero1", model=MIXED, layout={"ep": 2, "zero": 1}),
    pair(4, "ep4-zero2", family="zaya", model={"layers": 2}, layout={"ep": 4, "zero": 2}),
]  # fmt: skip
if LONG:
    PAIRS.append(pair(4, "dp-ep-zero2", family="deepseek", model={"layers": 2}, layout={"ep": 2, "zero": 2}))
LAYOUTS = {1: [{}], 2: [{"ep": 2}, {"zero": 2}], 4: [{"ep": 2, "zero": 2}, {"ep": 4}]}
"""Layouts that states are kept in and taken up in."""
FAMILY = "deepseek"


@dataclass(frozen=True)
class EngineRuns:
    """All runs of a world size: what rank 0 saw of each, and the slices' names of all ranks."""

    done: dict[str, EngineRankResult]
    names: dict[str, list[list[str]]]


def work(world: int, root: Path, runs: dict[str, EngineRun]) -> EngineRuns:
    found = together(world, root, do, list(runs.values()))
    return EngineRuns(
        dict(zip(runs, found[0], strict=True)),
        {name: [rank[i].names for rank in found] for i, name in enumerate(runs)},
    )


def alone(root: Path, engine: str, world: int, number: int) -> tuple[str, EngineRun]:
    """A run that keeps its state on the way, under one of the world's layouts."""
    name = f"{engine}-{world}-{number}"
    shape, layout = {"layers": 2}, LAYOUTS[world][number]
    return name, EngineRun(engine, FAMILY, shape, layout, end=8, save=root / name, save_at=SPLIT, poisoned=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def both(root: Path, world: int) -> dict[str, EngineRun]:
    """What a world size runs: pairs; runs that keep a state; runs that take up what the world before kept."""
    runs: dict[str, EngineRun] = {}
    for one in PAIRS:
        if one.world == world:
            runs |= {f"{one.name}-{run.engine}": run for run in one.runs}
    if world in (1, 2):
        runs |= dict(alone(root, engine, world, n) for engine in ENGINES for n in range(len(LAYOUTS[world])))
    before = {2: [1], 4: [2]}.get(world, [])
    for old in before:
        for engine in ENGINES:
            for number, layout in enumerate(LAYOUTS[world]):
                kept = f"{OTHER[engine]}-{old}-{min(number, len(LAYOUTS[old]) - 1)}"
                run = EngineRun(engine, FAMILY, {"layers": 2}, layout, begin=SPLIT, end=8, load=root / kept)
                runs[f"{engine}-{world}-{number}-from-{kept}"] = run
    return runs


@pytest.fixture(scope="module")
def one(root: Path) -> EngineRuns:
    return work(1, root, both(root, 1))


@pytest.fixture(scope="module")
def two(root: Path, one: EngineRuns) -> EngineRuns:
    return work(2, root, both(root, 2))


@pytest.fixture(scope="module")
def four(root: Path, two: EngineRuns) -> EngineRuns:
    return work(4, root, both(root, 4))


@pytest.fixture(scope="module")
def worlds(one: EngineRuns, two: EngineRuns, four: EngineRuns) -> dict[int, EngineRuns]:
    return {1: one, 2: two, 4: four}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_both_engines_train_alike(pair: EnginePair, worlds: dict[int, EngineRuns]) -> None:
    native, deepspeed = (worlds[pair.world].done[f"{pair.name}-{engine}"] for engine in ENGINES)
    assert native.steps[-1].loss < 0.85 * native.steps[0].loss
    for ours, theirs in zip(native.steps, deepspeed.steps, strict=True):
        assert theirs.loss == pytest.approx(ours.loss, rel=CLOSE)
        assert theirs.aux_loss == pytest.approx(ours.aux_loss, rel=CLOSE, abs=1e-9)
        assert theirs.norm == pytest.approx(ours.norm, rel=1e-4)
    assert deepspeed.evaluated == pytest.approx(native.evaluated, rel=CLOSE)
    assert [step.load for step in native.steps[:3]] == [step.load for step in deepspeed.steps[:3]]


@pytest.mark.parametrize("world", (1, 2))
def test_a_step_with_gradients_that_are_not_finite_moves_nothing(
    world: int, worlds: dict[int, EngineRuns]
) -> None:
    for engine in ENGINES:
        for number in range(len(LAYOUTS[world])):
            assert worlds[world].done[f"{engine}-{world}-{number}"].poisoned == (1.0, [])


def test_states_of_both_engines_are_equal(root: Path, worlds: dict[int, EngineRuns]) -> None:
    for world in (1, 2):
        for number in range(len(LAYOUTS[world])):
            native, deepspeed = (whole(root / f"{engine}-{world}-{number}") for engine in ENGINES)
            assert sorted(native) == sorted(deepspeed)
            for name, ours in native.items():
                limit = 1e-4 * ours.abs().max().item() + 1e-12
                assert (deepspeed[name] - ours).abs().max().item() <= limit, name


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_goes_on_with_the_others_state(
    engine: str, world: int, worlds: dict[int, EngineRuns]
) -> None:
    taken = {
        name: done
        for name, done in worlds[world].done.items()
        if name.startswith(f"{engine}-{world}-") and "from" in name
    }
    assert len(taken) == len(LAYOUTS[world])
    for name, done in taken.items():
        kept = name.split("-from-")[1]
        expected = worlds[world // 2].done[kept]
        assert [step.loss for step in done.steps] == pytest.approx(
            [s.loss for s in expected.steps[SPLIT:]], rel=CLOSE
        )
        assert [step.norm for step in done.steps] == pytest.approx(
            [s.norm for s in expected.steps[SPLIT:]], rel=1e-4
        )
        assert done.evaluated == pytest.approx(expected.evaluated, rel=CLOSE)


def test_partitions_are_split_over_ranks(worlds: dict[int, EngineRuns]) -> None:
    """Every rank has a part of the state only, not a copy."""
    names = worlds[4].names["dp-ep-zero1-deepspeed"]
    dense = [{name for name in rank if "exp_avg_sq" in name and "experts" not in name} for rank in names]
    assert set().union(*dense) > dense[0]
