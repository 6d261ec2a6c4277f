"""Copies that differ are found before a save and laid at the right rank's door; equal ones never are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from configs.compose import compose
from configs.errors import ReplicasDiffer
from configs.metrics import EndedLine, ResumedLine, SavedLine, read_all
from configs.rank import RankContext
from configs.schema import RunConfig
from faulttol import exits
from faulttol.checkpoint import retention
from faulttol.checkpoint.store import CheckpointStore
from faulttol.detect import death
from faulttol.detect.snapshot import RankObservation
from faulttol.verdicts import VerdictKind
from tests.collectives.ranks import together
from tests.faulttol.detect.seen import gang
from tests.trainer.engines.ranks import fill, keep, whole
from tests.trainer.families import batches, family
from tests.trainer.parallel.test_checksums import flip
from trainer import loop
from trainer.engines.native import NativeEngine
from trainer.metric_log import MetricLog
from trainer.parallel.mesh import Mesh, assemble, join
from trainer.parallel.replicas import compare
from trainer.state import Slice

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

SAMPLES, STEPS = 8, 3


# ---- real ranks ----


@dataclass(frozen=True)
class DriftCase:
    """A layout to train under, and what is made wrong in it."""

    layout: dict[str, int]
    precision: str = "bf16"
    family: str = "qwen3"
    optim: str = "adamw"
    wrong: tuple[str, ...] = ()
    """Ends of names of the slices of which a bit is flipped, one after the other, on the last rank that has a copy."""
    zero: int = 2

    def config(self) -> RunConfig:
        words = [f"parallel.{axis}={size}" for axis, size in ({"dp": 1} | self.layout).items()]
        config = compose(
            ["model=demo", "hardware=cpu", "train.engine=native", f"train.precision={self.precision}",
             "train.micro_batch=2", f"train.global_batch={SAMPLES}", f"optim.kind={self.optim}", "optim.lr=0.01",
             "optim.warmup_steps=0", "data.sequence=32", f"parallel.zero={self.zero}", *words]
        )  # fmt: skip
        return config.model_copy(update={"model": family(self.family)})


SMALL = ("norm.weight", "norm.weight/exp_avg", "router.linear.weight/exp_avg_sq", "bias", "optimizer/step")
CASES = {
    2: [
        DriftCase({"dp": 2}, wrong=SMALL),
        DriftCase({"dp": 2, "ep": 2}, "fp32", wrong=("bias", "optimizer/step")),
        DriftCase({"tp": 2}, "fp32", wrong=("norm.weight", "norm.weight/exp_avg")),
        DriftCase({"cp": 2}, "bf16", wrong=("bias",)),
        DriftCase({"pp": 2}, "fp32", "zaya", wrong=("embedding.weight", "embedding.weight/exp_avg")),
        DriftCase({"dp": 2}, "bf16", "mixtral", "muon"),
    ],
    4: [
        DriftCase({"dp": 4, "ep": 4}, wrong=SMALL),
        DriftCase({"dp": 2, "tp": 2, "ep": 2}, wrong=SMALL),
        DriftCase({"dp": 2, "cp": 2}, wrong=("norm.weight", "bias")),
        DriftCase({"tp": 2, "cp": 2, "ep": 2}, "fp32", wrong=("bias",)),
        DriftCase({"dp": 2, "pp": 2}, "fp32", wrong=("bias", "optimizer/step")),
        DriftCase({"dp": 4}, "bf16", "olmoe", "lamb", zero=3),
    ],
}  # fmt: skip


@dataclass
class Traffic:
    """What a comparison sent: bytes of each reduction, and other collectives."""

    reduced: list[int] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@dataclass
class DriftSeen:
    """What came of a comparison on one rank."""

    kind: str
    """Name of the error; empty where copies are equal."""
    text: str
    own: bool
    """The rank says that the error is its own."""
    traffic: Traffic
    copies: int


def look(engine: NativeEngine, mesh: Mesh) -> DriftSeen:
    """Compare, and count what is sent."""
    traffic = Traffic()
    reduce, gather, broadcast = mesh.reduce, mesh.gather, mesh.broadcast

    def reduced(numbers: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        traffic.reduced.append(numbers.numel() * numbers.element_size())
        return reduce(numbers, op)

    def other(name: str, real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda item: (traffic.others.append(name), real(item))[1]

    watched = mock.Mock(
        world=mesh.world, rank=mesh.rank, reduce=reduced, gather=other("gather", gather),
        broadcast=other("broadcast", broadcast),
    )  # fmt: skip
    kind, text, own = "", "", False
    try:
        compare(engine.state(), watched, 6)
    except ReplicasDiffer as error:
        kind, text, own = type(error).__name__, str(error), not exits.blames_peer(error)
    copies = sum(part.replicas > 1 for part in engine.state())
    return DriftSeen(kind, text, own, traffic, copies)


def step(engine: NativeEngine, index: int, samples: Any = SAMPLES) -> float:
    given = batches(index, SAMPLES, 2, engine.data_parallel.index, engine.data_parallel.size)
    return float(engine.step(given, samples, 0.01, lambda _phase: nullcontext()).skipped)


def shared(engine: NativeEngine, ending: str) -> Slice | None:
    """The first of this rank's replicated slices with such a name."""
    parts = (p for p in engine.state() if p.replicas > 1 and p.tensor.numel() and p.name.endswith(ending))
    return next(parts, None)


@dataclass
class CaseSeen:
    """What a rank saw of a case."""

    equal: list[DriftSeen]
    """After steps, a step that was skipped, values that aren't numbers, and a load from another layout."""
    skipped: float
    wrong: dict[str, tuple[DriftSeen, list[int], str]]
    """By what was flipped: what was seen, the ranks that have a copy, and the slice's name."""


def do(rank: RankContext, folder: Path) -> list[CaseSeen]:
    """All cases of a world."""
    torch.set_num_threads(1)
    cases = CASES[rank.world]
    first = join(cases[0].config(), rank, torch.device("cpu"))
    done: list[CaseSeen] = []
    kept: Path | None = None
    for number, case in enumerate(cases):
        config = case.config()
        mesh = assemble(config, rank.rank, rank.world, first.device, first.control_group, first.network)
        engine = NativeEngine(config, mesh)
        for index in range(STEPS):
            step(engine, index)
        equal = [look(engine, mesh)]
        if case.family == "qwen3" and case.optim == "adamw":
            if kept is not None:
                fill(engine, whole(kept))
                equal.append(look(engine, mesh))
                step(engine, STEPS)
                equal.append(look(engine, mesh))
            else:
                kept = folder / f"{rank.world}-{number}"
                keep(engine, kept, rank.rank)
        skipped = step(engine, STEPS, math.nan)
        equal.append(look(engine, mesh))
        wrong = {ending: drifted(engine, mesh, ending) for ending in case.wrong}
        for part in engine.state():
            if part.replicas > 1 and part.tensor.is_floating_point():
                part.tensor.view(-1)[:2] = torch.tensor([math.nan, math.inf])[: part.tensor.numel()]
        equal.append(look(engine, mesh))
        done.append(CaseSeen(equal, skipped, wrong))
    return done


def drifted(engine: NativeEngine, mesh: Mesh, ending: str) -> tuple[DriftSeen, list[int], str]:
    """Flip a bit on the last rank that has a copy, look, and flip it back."""
    mine = shared(engine, ending)
    names: list[Any] = [None] * mesh.world
    dist.all_gather_object(names, (mine.name, str(mine.box)) if mine else None)
    chosen = next(name for name in reversed(names) if name is not None)
    ranks = [r for r, name in enumerate(names) if name == chosen]
    last = mine is not None and mesh.rank == ranks[-1]
    if last and mine is not None:
        flip(mine.tensor, mine.tensor.numel() - 1, 0)
    seen = look(engine, mesh)
    if last and mine is not None:
        flip(mine.tensor, mine.tensor.numel() - 1, 0)
    return seen, ranks, chosen[0]


@pytest.fixture(scope="module", params=[2, 4])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[CaseSeen]]:
    """By case, what the ranks saw; each is a host of its own."""
    world, folder = request.param, tmp_path_factory.mktemp("drift")
    return [list(case) for case in zip(*together(world, folder, on_hosts, folder), strict=True)]


def on_hosts(rank: RankContext, folder: Path) -> list[CaseSeen]:
    with mock.patch.dict("os.environ", MEGARAY_NODE=f"node-{rank.rank}"):
        return do(rank, folder)


def test_equal_copies_are_never_accused_and_cost_one_reduction(outcome: list[list[CaseSeen]]) -> None:
    for case, ranks in zip(CASES[len(outcome[0])], outcome, strict=True):
        for rank in ranks:
            assert rank.skipped == 1.0 and len(rank.equal) >= 3
            for seen in rank.equal:
                assert seen.kind == "" and seen.copies > 0, (case, seen)
                assert seen.traffic == Traffic([8 * 256], []), case


def test_the_rank_with_a_flipped_bit_is_named(outcome: list[list[CaseSeen]]) -> None:
    world = len(outcome[0])
    majorities = 0
    for case, ranks in zip(CASES[world], outcome, strict=True):
        for ending in case.wrong:
            for number, (seen, holders, name) in enumerate(rank.wrong[ending] for rank in ranks):
                assert seen.traffic == Traffic([8 * 256], ["gather", "broadcast"])
                assert name in seen.text and len(holders) >= 2, (case, ending)
                assert "[]" not in seen.text, "a count has no box that says anything"
                many = len(holders) > 2
                majorities += many
                assert seen.kind == ("WrongReplica" if many else "ReplicasDiffer"), (case, seen)
                suspects = holders[-1:] if many else holders
                assert seen.own == (number in suspects), (case, ending, number)
                named = [r for r in range(world) if f"rank {r} on" in seen.text]
                assert named == suspects
    assert (majorities > 0) == (world > 2)


def rounded(rank: RankContext) -> tuple[set[tuple[int, int]], DriftSeen, DriftSeen]:
    """Replicas and those of equal bits; what is seen where a group of tp rounded otherwise, and where a bit is wrong."""
    torch.set_num_threads(1)
    config = DriftCase({"dp": 2, "tp": 4}).config()
    mesh = join(config, rank, torch.device("cpu"))
    engine = NativeEngine(config, mesh)
    part = shared(engine, "norm.weight")
    assert part is not None
    if mesh["dp_cp"].index == 1:
        flip(part.tensor, 0, 0)
    parted = look(engine, mesh)
    if mesh.rank == 6:
        flip(part.tensor, 1, 9)
    return {(p.replicas, p.exact) for p in engine.state() if p.replicas > 1}, parted, look(engine, mesh)


def test_groups_that_sum_apart_may_differ_in_a_last_bit(tmp_path: Path) -> None:
    for number, (kinds, parted, wrong) in enumerate(together(8, tmp_path, rounded)):
        # Small weights that tp ranks have alike; those that tp cuts; biases and the count.
        assert kinds == {(8, 4), (2, 0), (8, 0)}
        assert parted.kind == "" and parted.traffic == Traffic([8 * 256], [])
        assert wrong.kind == "WrongReplica" and "in group 1 of rank 6 on" in wrong.text
        assert wrong.own == (number == 6)


# ---- the loop ----


WORDS = (
    "experiment=smoke", "model.layers=1", "model.hidden=16", "model.heads=2", "model.kv_heads=2", "model.head_dim=8",
    "model.experts=4", "model.expert_width=8", "data.sequence=16", "train.micro_batch=1", "train.global_batch=4",
    "train.steps=6", "checkpoint.every=2", "optim.warmup_steps=1", "train.precision=fp32", "train.engine=native",
    "train.log_every=1", "parallel.pp=1",
)  # fmt: skip
FLIPPED = 3
"""Index of the step behind which a bit of a copy is wrong."""


def run_once(rank: RankContext, words: Sequence[str], attempt: int, wrong: int | None) -> str:
    """The training program on one rank; the error that it ended by."""
    config = compose([*WORDS, f"parallel.dp={rank.world}", *words])
    real = NativeEngine.step

    def broken(engine: NativeEngine, *arguments: Any) -> Any:
        result = real(engine, *arguments)
        if engine.mesh.rank == wrong and float(engine._applied_steps) == FLIPPED + 1:
            part = shared(engine, "bias")
            assert part is not None
            flip(part.tensor, 0, 3)
        return result

    context = RankContext(**vars(rank) | {"attempt": attempt})
    context.paths.ranks.mkdir(parents=True, exist_ok=True)
    home = {"MEGARAY_HOME": str(rank.run.root), "MEGARAY_NODE": f"node-{rank.rank}"}

    def message(log: MetricLog, texts: Iterable[str]) -> None:
        if log._writer is not None:
            with (rank.run.root / "notes").open("a") as file:
                file.writelines(f"{text}\n" for text in texts)

    patched = (
        mock.patch.object(NativeEngine, "step", broken),
        mock.patch.object(MetricLog, "message", message),
    )
    with patched[0], patched[1], mock.patch.dict("os.environ", home):
        try:
            loop.main(config, context)
        except ReplicasDiffer as error:
            return f"{type(error).__name__}: {error}"
    return ""


def run_in(rank: RankContext, words: Sequence[str], attempt: int, wrong: int | None) -> str:
    torch.set_num_threads(1)
    return run_once(rank, words, attempt, wrong)


def attempt(
    folder: Path, world: int, number: int, wrong: int | None, *words: str
) -> tuple[list[str], list[Any]]:
    """An attempt of a run: how its ranks ended, and rank 0's lines."""
    text = folder / "text.txt"
    text.write_text("".join(chr(97 + n * 7 % 26) for n in range(20000)))
    told = together(world, folder / "run", run_in, [f"data.path={text}", *words], number, wrong)
    return told, list(read_all(folder / "run" / "attempts" / f"{number:03d}" / "metrics.jsonl"))


def saved(lines: list[Any]) -> list[int]:
    return [line.step for line in lines if isinstance(line, SavedLine)]


def test_a_save_of_copies_that_differ_ends_the_attempt_and_is_not_resumed_from(tmp_path: Path) -> None:
    words = ("train.global_batch=6", "train.steps=6", "checkpoint.compare=stop")
    ended, lines = attempt(tmp_path, 3, 1, 1, *words)
    assert saved(lines) == [2], "the save of step 4 isn't there, and the one before it is whole"
    assert all(text.startswith("WrongReplica: the state behind step 4 is wrong: ") for text in ended)
    folder = tmp_path / "run" / "attempts" / "001" / "ranks"
    raised = [exits.read(folder / f"{rank:05d}.raised") for rank in range(3)]
    assert [one.blames_peer for one in raised if one] == [True, False, True]
    ranks = [RankObservation(r, 10 + r, 1, one.time, raised=one) for r, one in enumerate(raised) if one]
    (verdict,) = death.judge(gang(*ranks, now=ranks[0].raised.time + 99))  # type: ignore[union-attr]
    assert (verdict.kind, verdict.rank, verdict.node) == (VerdictKind.REPLICAS_DIFFER, 1, "10.0.0.1")
    ended, lines = attempt(tmp_path, 3, 2, None, *words)
    assert ended == [""] * 3 and saved(lines) == [4, 6]
    assert isinstance(lines[0], ResumedLine) and lines[0].step == 2 and isinstance(lines[-1], EndedLine)


def test_two_copies_accuse_no_node_and_a_gang_of_unlike_devices_may_go_without(tmp_path: Path) -> None:
    ended, lines = attempt(tmp_path, 2, 1, 1, "checkpoint.compare=stop")
    assert saved(lines) == [2] and all(text.startswith("ReplicasDiffer: ") for text in ended)
    folder = tmp_path / "run" / "attempts" / "001" / "ranks"
    raised = [exits.read(folder / f"{rank:05d}.raised") for rank in range(2)]
    ranks = [RankObservation(r, 10 + r, 1, one.time, raised=one) for r, one in enumerate(raised) if one]
    (verdict,) = death.judge(gang(*ranks, now=ranks[0].raised.time + 99))  # type: ignore[union-attr]
    assert (verdict.kind, verdict.rank, verdict.node) == (VerdictKind.REPLICAS_DIFFER, None, None)
    assert "rank 0 on " in verdict.detail and "rank 1 on " in verdict.detail
    ended, lines = attempt(tmp_path, 2, 2, 1, "checkpoint.compare=none")
    assert ended == ["", ""] and saved(lines) == [4, 6]


def test_a_warning_names_the_copies_and_the_run_goes_on(tmp_path: Path) -> None:
    ended, lines = attempt(tmp_path, 2, 1, 1)
    assert ended == ["", ""] and saved(lines)[:2] == [2, 4]
    differs = {line.step: line.differs for line in lines if isinstance(line, SavedLine)}
    assert differs[2] == "" and differs[4].startswith("the state behind step 4 is wrong: "), differs
    warned = (tmp_path / "run" / "notes").read_text().splitlines()
    assert warned and warned[0].startswith("the state behind step 4 is wrong: ")
    assert "; it is saved all the same (checkpoint.compare=stop ends the attempt)" in warned[0]
    assert warned[0].endswith("; step 2 is pinned as agreed-2 until it is unpinned")
    pins = retention.pins(CheckpointStore(str(tmp_path / "run" / "checkpoints")))
    assert {commit.step: names for commit, names in pins.items()} == {2: ["agreed-2"]}, (
        "later saves don't push it out"
    )
