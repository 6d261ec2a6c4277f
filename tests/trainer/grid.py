"""Layouts against one process: `python -m tests.trainer.grid [--quick] [--only TEXT]`.

Each layout trains a small model of a family for some steps in fp32 on 2, 4 or 8 gloo ranks; its losses, gradient norms and
expert loads must be those of one process (which the tests hold against the fp64 reference). Processes start once and take
part in every case that needs them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from configs.compose import compose
from configs.library_environment import Applied
from configs.rank import free_port
from configs.schema import RunConfig
from tests.forks import forks
from tests.trainer.families import FAMILIES as FAMILIES
from tests.trainer.families import SEQUENCE, batches, drift, family
from trainer.parallel.mesh import assemble

STEPS, QUICK_STEPS, SAMPLES = 20, 4, 16
TOLERANCE = 1e-5


@dataclass(frozen=True)
class GridCase:
    """A family under a layout."""

    family: str
    layout: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return int(self._size("pp") * self._size("dp") * self._size("cp") * self._size("tp"))

    def _size(self, axis: str) -> int:
        return int(self.layout.get(axis, 1))

    @property
    def name(self) -> str:
        words = [f"{key}={value}" for key, value in (self.layout | self.train | self.optim).items()]
        return f"{self.family} {' '.join(words)}"

    @property
    def baseline(self) -> GridCase:
        """The same training in one process."""
        same = {key: value for key, value in self.train.items() if key in ("seed", "precision")}
        return GridCase(self.family, {}, same | {"micro_batch": SAMPLES}, self.optim)


def cases() -> list[GridCase]:
    """All layouts: every axis alone, in pairs, in threes; ZeRO 1 to 3; every schedule; recomputation; optimizers."""
    made: list[GridCase] = []

    def add(
        family: str, micro_batch: int = 2, recompute: str = "none", optim: str = "adamw", **layout: Any
    ) -> None:
        train: dict[str, Any] = {"micro_batch": micro_batch}
        if recompute != "none":
            train["recompute"] = recompute
        made.append(GridCase(family, layout, train, {} if optim == "adamw" else {"kind": optim}))

    # One axis.
    add("mixtral", dp=2)
    add("mixtral", dp=2, zero=2)
    add("mixtral", dp=2, zero=3)
    add("mixtral", dp=4, ep=2)
    add("mixtral", tp=2)
    add("olmoe", tp=4)
    add("qwen3", cp=2)
    add("qwen3", cp=2, context="ulysses")
    add("qwen3", pp=2)
    add("qwen3", pp=2, schedule="interleaved", chunks=2)
    add("qwen3", pp=2, schedule="zbv")
    add("olmoe", dp=2, ep=2)
    add("deepseek", tp=2)
    add("deepseek", cp=2)
    add("deepseek", dp=4, ep=4, zero=3)
    add("deepseek", pp=2)
    add("maverick", dp=2, ep=2)
    add("maverick", pp=2)
    add("maverick", pp=2, schedule="zbv")
    add("zaya-interleaved", pp=2, schedule="zbv")
    add("deepseek", pp=2, schedule="zbv", recompute="selective")
    add("deepseek-tied", pp=2, schedule="zbv")
    add("deepseek-twice", pp=2, schedule="zbv", recompute="full")
    add("zaya", dp=4, ep=4)
    add("zaya", cp=2)
    add("zaya", tp=2)
    add("zaya", pp=2)
    add("megascale", dp=2, zero=2)
    add("megascale", tp=2, recompute="full")
    add("megascale", pp=2, schedule="zbv")
    add("megascale", cp=2)
    add("dropping", dp=2, ep=2)
    add("dropping", cp=2)
    add("dropping", tp=2, ep=2)
    # Two axes.
    add("mixtral", tp=2, ep=2)
    add("mixtral", tp=2, etp=2)
    add("mixtral", dp=2, tp=2, ep=4, zero=2)
    add("olmoe", dp=2, tp=2, ep=2, etp=2)
    add("olmoe", dp=2, cp=2, ep=4, recompute="selective")
    add("qwen3", dp=2, pp=2, zero=2)
    add("qwen3", tp=2, pp=2, ep=2)
    add("qwen3", cp=2, tp=2, ep=4)
    add("deepseek", dp=2, pp=2, ep=2)
    add("deepseek", cp=2, tp=2, context="ulysses")
    add("maverick", tp=2, pp=2, ep=2)
    add("maverick", dp=2, pp=2, zero=2)
    add("zaya", dp=2, cp=2, ep=4, zero=3)
    add("zaya", dp=2, tp=2, ep=4)
    add("megascale", tp=2, cp=2)
    add("dropping", dp=2, tp=2, ep=4)
    # Three axes, and more.
    add("mixtral", dp=2, tp=2, pp=2, ep=4)
    add("mixtral", dp=2, tp=2, cp=2, ep=8, zero=3, recompute="full")
    add("qwen3", dp=2, cp=2, pp=2, ep=4, schedule="interleaved", chunks=2)
    add("qwen3", dp=2, tp=2, pp=2, ep=2, etp=2, schedule="zbv")
    add("deepseek", dp=2, tp=2, cp=2, ep=4, zero=2, recompute="selective")
    add("deepseek", tp=2, cp=2, pp=2, ep=2)
    add("zaya", dp=2, tp=2, pp=2, ep=4)
    add("dropping", dp=2, tp=2, cp=2, ep=2, etp=2)
    # Optimizers whose matrices span ranks.
    add("mixtral", dp=2, tp=2, ep=2, etp=2, optim="muon", zero=2)
    add("deepseek", dp=2, tp=2, ep=4, optim="muon")
    add("zaya", dp=2, pp=2, ep=2, optim="muon")
    add("olmoe", dp=2, tp=2, pp=2, ep=4, optim="lamb")
    add("megascale", dp=4, tp=2, optim="lamb", zero=3)
    return [*made, *LENT]


LENT = [
    GridCase(family, layout | {"lend_rows": 1}, {"micro_batch": 2} | train)
    for family, layout, train in (
        ("olmoe", {"dp": 2, "ep": 2}, {}),
        ("olmoe", {"dp": 4, "ep": 4}, {"micro_batch": 1}),
        ("deepseek", {"dp": 4, "ep": 2, "zero": 3}, {}),
        ("qwen3", {"dp": 2, "tp": 2, "ep": 4}, {"recompute": "full"}),
        ("dropping", {"dp": 4, "ep": 4}, {"recompute": "selective"}),
        ("qwen3", {"pp": 2, "dp": 2, "ep": 2, "schedule": "interleaved", "chunks": 2}, {}),
    )
]
"""Hot experts are lent, in one micro-batch and in several."""


QUICK = (
    "mixtral dp=2 zero=3", "qwen3 pp=2 schedule=zbv", "mixtral tp=2 ep=2", "deepseek cp=2 micro",
    "zaya dp=2 cp=2 ep=4", "olmoe dp=2 tp=2 ep=2 etp=2", "qwen3 dp=2 pp=2 zero=2", "dropping dp=2 tp=2 ep=4",
    "megascale tp=2 micro", "maverick dp=2 ep=2", "maverick pp=2 micro", "zaya-interleaved pp=2",
    "zaya dp=2 pp=2 ep=2 micro_batch=2 kind=muon", "olmoe dp=4 ep=4 lend_rows=1",
)  # fmt: skip
"""What `--quick` runs, by the beginning of a case's name: every axis, family and ZeRO stage, up to four ranks."""


def quick() -> list[GridCase]:
    """The cases of `--quick`."""
    return [case for case in cases() if case.name.startswith(QUICK) and case.ranks <= 4]


@cache
def _plain() -> RunConfig:
    return compose(["model=demo", "hardware=cpu"])


def config_of(case: GridCase, steps: int) -> RunConfig:
    """A resolved configuration."""
    plain = _plain()
    optim = {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 3} | case.optim
    train = {"steps": steps, "global_batch": SAMPLES, "precision": "fp32", "engine": "native"} | case.train
    tree = plain.model_dump() | {
        "model": family(case.family).model_dump(),
        "parallel": plain.parallel.model_dump() | {"dp": 1} | case.layout,
        "optim": plain.optim.model_dump() | optim,
        "train": plain.train.model_dump() | train,
        "data": plain.data.model_dump() | {"sequence": SEQUENCE},
    }
    return RunConfig.model_validate(tree)


def train(
    case: GridCase, steps: int, rank: int, store: Any
) -> list[tuple[float, float, list[list[int]], int]]:
    """Train a case on this rank; loss, norm, loads and drops of each step."""
    from trainer.engines.native import NativeEngine

    config = config_of(case, steps)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks)
    try:
        control = dist.group.WORLD
        assert control is not None
        mesh = assemble(config, rank, case.ranks, torch.device("cpu"), control, Applied())
        engine = NativeEngine(config, mesh)
        found = []
        for step in range(steps):
            place = engine.data_parallel
            given = batches(step, SAMPLES, config.train.micro_batch, place.index, place.size)
            result = engine.step(given, SAMPLES, config.optim.lr, lambda _phase: nullcontext())
            shares = torch.stack([result.loss.double(), result.dropped.double(), result.aux_loss.double()])
            dist.all_reduce(shares)
            found.append(
                (
                    float(shares[0] + shares[2]),
                    float(result.grad_norm),
                    result.expert_load.tolist(),
                    int(shares[1]),
                )
            )
        wrong = drift(engine, mesh, steps)
        return [(loss + wrong, norm, load, dropped) for loss, norm, load, dropped in found]
    finally:
        dist.destroy_process_group()


def _work(rank: int, port: int, todo: list[GridCase], steps: int, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    for number, case in enumerate(todo):
        if rank >= case.ranks:
            continue
        try:
            result: Any = train(case, steps, rank, dist.PrefixStore(f"case{number}", store))
        except Exception as error:
            traceback.print_exc()
            result = f"{type(error).__name__}: {error}"
        if rank == 0 or isinstance(result, str):
            answers.put((number, rank, result))
            if isinstance(result, str):
                # The others of this case may wait for this rank forever; the parent ends all of them.
                time.sleep(3600)


class _Pool:
    """Processes that work through a list of cases together, each taking part in those that need its rank."""

    def __init__(self, todo: list[GridCase], steps: int) -> None:
        port = free_port()
        self._server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        context = forks()
        self.answers: Any = context.Queue()
        ranks = max(case.ranks for case in todo)
        self._workers = [
            context.Process(target=_work, args=(rank, port, todo, steps, self.answers), daemon=True)
            for rank in range(ranks)
        ]
        for worker in self._workers:
            worker.start()

    def end(self) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()


def results(todo: list[GridCase], steps: int) -> Iterator[tuple[GridCase, Any]]:
    """Every case with its result, or the text of what went wrong; after that the rest continues in new processes."""
    while todo:
        pool, failed = _Pool(todo, steps), False
        try:
            for number, case in enumerate(todo):
                done, rank, result = pool.answers.get(timeout=600)
                assert done == number, (done, number)
                failed = isinstance(result, str)
                yield case, f"rank {rank}: {result}" if failed else result
                if failed:
                    break
        finally:
            pool.end()
        todo = todo[number + 1 :] if failed else []


def run(todo: list[GridCase], steps: int, report: Callable[[str], None] = print) -> tuple[int, float]:
    """Train all cases and compare them with one process; how many layouts, and the worst error."""
    baselines = {case.baseline.name: case.baseline for case in todo}
    known: dict[str, Any] = {}
    worst = 0.0
    for case, result in results([*baselines.values(), *sorted(todo, key=lambda c: c.ranks)], steps):
        if case.name in baselines:
            known[case.name] = result
            if not isinstance(result, str):
                continue
        found = known.get(case.baseline.name)
        wrong = next((r for r in (result, found) if isinstance(r, str)), None)
        error = float("inf") if wrong or found is None else difference(result, found)
        worst = max(worst, error)
        report(f"{error:9.1e}  {case.ranks} ranks  {case.name}" + (f": {_short(wrong)}" if wrong else ""))
    return len(todo), worst


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


def difference(one: list[Any], other: list[Any], ties: float = 0.0) -> float:
    """Largest relative difference of losses and norms; infinite where loads or drops differ, or one isn't a number.

    Args:
        ties: share of a step's pairs that may go to other experts, as rounding to bf16 makes many scores equal.
    """
    errors = [0.0]
    for (loss, norm, load, dropped), (loss0, norm0, load0, dropped0) in zip(one, other, strict=True):
        errors += [abs(loss - loss0) / abs(loss0), abs(norm - norm0) / abs(norm0)]
        if load != load0 or dropped != dropped0:
            moved = sum(
                abs(a - b) for r, s in zip(load, load0, strict=True) for a, b in zip(r, s, strict=True)
            )
            # A tie between two experts may fall otherwise when sums are added in another order: one pair in a step.
            most = max(2, 2 * ties * sum(map(sum, load0)))
            errors.append(0.0 if moved <= most and dropped == dropped0 else float("inf"))
    # max() passes over what isn't a number.
    return float("inf") if any(map(math.isnan, errors)) else max(errors)


def main() -> int:
    """Run the grid; exit code 1 where a layout differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fourteen layouts up to four ranks, four steps")
    parser.add_argument("--only", help="cases whose name holds this text")
    options = parser.parse_args()
    todo = quick() if options.quick else cases()
    if options.only:
        todo = [case for case in todo if options.only in case.name]
    count, worst = run(todo, QUICK_STEPS if options.quick else STEPS)
    print(f"{count} layouts, worst error {worst:.1e}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
