"""Pairs of layouts through a checkpoint: `python -m tests.faulttol.grid [--quick] [--only TEXT]`.

For each ordered pair A -> B a small model trains some steps under A and is saved. Under B it is loaded over junk and saved
again, then continues; under A that second checkpoint is loaded and continues too. The whole live state (parameters,
optimizer slots, router biases, the count of steps), put together from all ranks, must have the same hashes under A, B and
A; ten losses under B must be those of the run under A that never stopped, to 1e-5 (2e-2 in bf16); under A again they must
be bit for bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from tests.faulttol.grid_ranks import SAMPLES, GridWork, Went, do
from tests.trainer.grid import GridCase, config_of, difference
from tests.trainer.parallel.rank_pool import PooledRankFailed, RankPool

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative error of a loss or norm under another layout, by precision: another layout rounds other sums."""
TIES = {"fp32": 0.0, "bf16": 0.1}
"""Share of a step's pairs that may go to other experts for that."""
SHOWN = 6


@dataclass(frozen=True)
class Steps:
    """How long a pair trains."""

    before: int = 4
    """Steps before the save."""
    after: int = 10
    """Steps after it under B."""
    again: int = 2
    """Steps after it under A again."""
    background: bool = True
    """Whether A's save is written beside its next steps."""


LONG, SHORT = Steps(), Steps(2, 2, 2, background=False)
DEFAULTS = {
    "pp": 1, "dp": 1, "cp": 1, "ep": 1, "etp": 1, "tp": 1, "zero": 1, "schedule": "1f1b", "context": "gather",
}  # fmt: skip
"""What a layout has where it says nothing."""


@dataclass(frozen=True)
class LayoutPair:
    """A run that is saved under one layout and continues under another."""

    one: GridCase
    other: GridCase

    @property
    def precision(self) -> str:
        return str(self.one.train.get("precision", "fp32"))

    @property
    def name(self) -> str:
        return f"{self.one.family} {_words(self.one)} -> {_words(self.other)}"


def _words(one: GridCase) -> str:
    told = one.layout | one.train | one.optim
    return " ".join(f"{key}={value}" for key, value in told.items() if "batch" not in key) or "one rank"


def case(family: str, text: str, shared: str = "", micros: int = 2) -> GridCase:
    """A case from words like `dp=2 zero=3`.

    Args:
        shared: settings of the optimizer, and the precision.
        micros: micro-batches of a step; a pipeline has at least as many as stages.
    """
    layout: dict[str, Any] = {}
    train: dict[str, Any] = {"global_batch": SAMPLES}
    optim: dict[str, Any] = {}
    words = [(word, layout) for word in text.split()] + [(word, optim) for word in shared.split()]
    for word, place in words:
        key, value = word.split("=")
        into = train if key in ("engine", "recompute", "precision") else place
        into[key] = int(value) if value.isdigit() else value
    count = max(micros, layout.get("pp", 1))
    train["micro_batch"] = max(1, SAMPLES // layout.get("dp", 1) // count)
    return GridCase(family, layout, train, optim)


TWICE: tuple[tuple[str, str, str, str], ...] = (
    # One axis, and experts with it wherever ranks are there for them.
    ("mixtral", "", "dp=8 ep=8 zero=3", ""),
    ("mixtral", "dp=2", "dp=2 ep=2 zero=2", ""),
    ("mixtral", "dp=2 ep=2 zero=3", "dp=4 ep=4", ""),
    ("mixtral", "dp=2 zero=3", "dp=2 ep=2 zero=2", ""),
    ("mixtral", "tp=2 ep=2", "tp=2 etp=2", ""),
    ("qwen3", "cp=2", "ep=2 tp=2", ""),
    ("qwen3", "cp=2 context=ulysses ep=2", "cp=2", ""),
    ("qwen3", "pp=4", "dp=4 ep=2", ""),
    ("deepseek", "", "tp=2 ep=2", ""),
    ("olmoe", "tp=2 ep=2", "dp=2 zero=3", ""),
    ("zaya", "dp=4 ep=4", "cp=2 ep=2", ""),
    ("zaya", "pp=2", "cp=2 ep=2", ""),
    ("maverick", "pp=2", "tp=2 ep=2", ""),
    ("zaya-interleaved", "pp=2 schedule=zbv", "dp=2 ep=2", ""),
    ("dropping", "dp=2 ep=2", "tp=2", ""),
    # Two axes.
    ("mixtral", "dp=2 tp=2 ep=4 zero=2", "dp=2 tp=2 cp=2 ep=8 zero=3 recompute=full", ""),
    ("olmoe", "tp=4", "dp=2 ep=2", ""),
    ("olmoe", "dp=2 tp=2 ep=2 etp=2", "dp=2 cp=2 ep=4", ""),
    ("olmoe", "cp=2 ep=2", "cp=4 ep=4 context=ulysses", ""),
    ("deepseek", "dp=4 ep=4 zero=3", "cp=2 tp=2 ep=2 context=ulysses", ""),
    ("zaya", "dp=2 cp=2 ep=4 zero=3", "pp=2", ""),
    ("zaya", "tp=2", "dp=2 tp=2 ep=4", ""),
    ("dropping", "dp=2 tp=2 cp=2 ep=2 etp=2", "dp=2 tp=2 ep=4", ""),
    # Pipelines and their schedules; tied and copied embeddings.
    ("qwen3", "dp=2 pp=2", "dp=2 pp=2 ep=2 schedule=interleaved chunks=2", ""),
    ("qwen3", "dp=2 pp=2 zero=2", "dp=2 pp=2 ep=2 schedule=zbv", ""),
    ("qwen3", "pp=2 schedule=interleaved chunks=2", "dp=2 pp=2 ep=2 schedule=zbv", ""),
    ("qwen3", "dp=2 tp=2 pp=2 ep=2 etp=2 schedule=zbv", "dp=2 cp=2 pp=2 ep=4 schedule=interleaved chunks=2", ""),
    ("mixtral", "dp=2 tp=2 pp=2 ep=4", "dp=4 ep=2", ""),
    ("deepseek", "", "dp=2 pp=2 ep=2", ""),
    ("deepseek", "tp=2 cp=2 pp=2 ep=2", "dp=2 tp=2 cp=2 ep=4 zero=2 recompute=selective", ""),
    ("deepseek", "pp=2 schedule=zbv", "dp=2 ep=2", ""),
    ("zaya", "dp=2 tp=2 pp=2 ep=4", "dp=2 pp=2 ep=2 zero=3", ""),
    ("megascale", "dp=2 pp=2 ep=2 schedule=zbv", "dp=2 zero=2", ""),
    ("megascale", "dp=2 pp=2 ep=2", "tp=2 cp=2 ep=4", ""),
    ("megascale", "tp=2 pp=2 ep=2", "pp=2 schedule=zbv", ""),
    # Optimizers.
    ("mixtral", "dp=2 tp=2 ep=2 etp=2 zero=2", "dp=2", "kind=muon"),
    ("mixtral", "tp=2 etp=2", "dp=2 ep=2", "kind=muon"),
    ("mixtral", "dp=2 zero=2", "tp=2 ep=2", "moments=bf16"),
    ("deepseek", "dp=2 tp=2 ep=4", "dp=2 pp=2", "kind=muon"),
    ("zaya", "dp=2 pp=2 ep=2", "dp=4 ep=4 zero=3", "kind=muon"),
    ("olmoe", "dp=2 tp=2 pp=2 ep=4", "dp=2 zero=2", "kind=lamb"),
    ("megascale", "dp=4 tp=2 ep=8 zero=3", "tp=2 pp=2 ep=2", "kind=lamb"),
    # bf16, where weights stay beside their masters.
    ("zaya", "dp=2 ep=2", "tp=2", "precision=bf16"),
    ("olmoe", "dp=4 ep=2 zero=3", "dp=2 tp=2 ep=4", "precision=bf16"),
    ("qwen3", "", "dp=2 cp=2 ep=4", "precision=bf16"),
    ("deepseek", "dp=2 tp=2 ep=2", "pp=2", "precision=bf16"),
    ("zaya", "dp=2 cp=2 ep=4", "dp=2 pp=2 ep=2", "precision=bf16 kind=muon"),
    # Engines.
    ("mixtral", "dp=2 engine=deepspeed", "tp=2 ep=2", ""),
    ("mixtral", "dp=4 ep=2 zero=2 engine=deepspeed", "dp=2 engine=deepspeed", ""),
    ("olmoe", "dp=4 ep=4 zero=3", "dp=2 ep=2 zero=2 engine=deepspeed", ""),
    ("deepseek", "dp=4 ep=4 zero=2 engine=deepspeed", "dp=2 pp=2 ep=2", ""),
    ("zaya", "dp=2 ep=2 engine=deepspeed", "cp=2 tp=2 ep=4", ""),
    ("maverick", "dp=2 engine=deepspeed", "dp=2 pp=2 ep=2", ""),
)  # fmt: skip
"""Family, two layouts that go over into each other both ways, and settings of the optimizer."""

QUICK = (
    "mixtral dp=2 zero=3 -> ", "mixtral dp=2 ep=2 kind=muon -> tp=2", "mixtral dp=2 engine=deepspeed -> tp=2",
    "olmoe dp=2 zero=3 -> tp=2 ep=2", "qwen3 cp=2 -> ep=2", "deepseek one rank -> tp=2", "zaya pp=2 -> cp=2",
    "megascale pp=2 schedule=zbv -> ", "dropping tp=2 -> ", "maverick pp=2 -> tp=2 ep=2",
    "zaya-interleaved pp=2 schedule=zbv -> dp=2 ep=2", "zaya dp=2 ep=2 precision=bf16 -> tp=2",
    "deepseek dp=2 tp=2 ep=2 precision=bf16 -> pp=2",
)  # fmt: skip
"""What `--quick` runs, by the beginning of a pair's name."""


def pairs(micros: int = 2) -> list[LayoutPair]:
    """All ordered pairs, with so many micro-batches in a step."""
    made = []
    for family, one, other, shared in TWICE:
        a, b = case(family, one, shared, micros), case(family, other, shared, micros)
        made += [LayoutPair(a, b), LayoutPair(b, a)]
    return made


def quick() -> list[LayoutPair]:
    """The pairs of `--quick`."""
    return [pair for pair in pairs(1) if pair.name.startswith(QUICK)]


class GridRanks:
    """Processes for every layout. DeepSpeed keeps its groups for life, so it has processes of its own for each world."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def do(self, world: int, work: GridWork) -> Went:
        """What came of a piece of work; what went wrong is one of its problems."""
        kept = world if work.config.train.engine == "deepspeed" else 0
        pool = self._pools.setdefault(kept, RankPool())
        try:
            went: Went = pool.run(world, do, work)[0]
        except PooledRankFailed as error:
            return Went(problems=(" ".join(str(error).split())[:400],))
        return went

    def end(self) -> None:
        """End the processes."""
        for pool in self._pools.values():
            pool.end()


class Grid:
    """Goes through pairs; what the first layout of a pair gives is kept for the next pair that begins with it."""

    def __init__(self, folder: Path, steps: Steps) -> None:
        self._folder, self._steps = folder, steps
        self._ranks = GridRanks()
        self._trained: dict[str, tuple[str, Went]] = {}

    def end(self) -> None:
        """End the processes."""
        self._ranks.end()

    def check(self, pair: LayoutPair, spoil: int | None = None) -> tuple[list[str], float]:
        """What is unequal, and the largest relative error of losses and norms under the second layout.

        Args:
            spoil: seed of a bit that is flipped after the load under the second layout.
        """
        steps = self._steps
        if pair.one.name not in self._trained:
            source = self._new()
            work = GridWork(self._config(pair.one), None, steps.before, source, steps.after, steps.background)
            self._trained[pair.one.name] = source, self._ranks.do(pair.one.ranks, work)
        source, first = self._trained[pair.one.name]
        moved = self._new()
        work = GridWork(self._config(pair.other), source, target=moved, after=steps.after, spoil=spoil)
        there = self._ranks.do(pair.other.ranks, work) if not first.problems else Went()
        work = GridWork(self._config(pair.one), moved, after=steps.again)
        back = self._ranks.do(pair.one.ranks, work) if there.lines else Went()
        return judge(first, there, back, steps, pair.precision)

    def _config(self, one: GridCase) -> RunConfig:
        return config_of(one, self._steps.before + self._steps.after)

    def _new(self) -> str:
        return tempfile.mkdtemp(dir=self._folder)


def judge(
    first: Went, there: Went, back: Went, steps: Steps, precision: str = "fp32"
) -> tuple[list[str], float]:
    """What is unequal in a pair, and the largest relative error of losses and norms under the second layout.

    Args:
        first: training under the first layout that never stopped.
        there: what was loaded under the second, and the steps from there.
        back: the same under the first again.
        precision: of the run.
    """
    runs = {"trained": first, "there": there, "back": back}
    wrong = [f"{where}: {problem}" for where, went in runs.items() for problem in went.problems]
    if any(not went.lines for went in runs.values()):  # a piece of work failed
        return wrong or ["nothing was trained"], float("inf")
    for where in ("there", "back"):
        wrong += [f"{where}: {name} differs" for name in unequal(first.hashes, runs[where].hashes)]
    went_on = first.lines[steps.before :]
    error = difference(list(there.lines), list(went_on), TIES[precision])
    if error > TOLERANCE[precision]:
        wrong.append(f"there: a loss, a norm or loads are off by {error:.1e}")
    if back.lines != went_on[: steps.again]:
        wrong.append("back: the next steps aren't bit for bit those of the run that never stopped")
    return wrong, error


def unequal(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names whose hashes differ, or that one of both hasn't."""
    if not one:
        return ["all"]
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def run(todo: Iterable[LayoutPair], steps: Steps, report: Callable[[str], None] = print) -> tuple[int, int]:
    """Check all pairs; how many, and how many are unequal."""
    count = bad = 0
    with tempfile.TemporaryDirectory() as folder:
        grid = Grid(Path(folder), steps)
        try:
            for pair in todo:
                wrong, error = grid.check(pair)
                count, bad = count + 1, bad + bool(wrong)
                ranks = f"{pair.one.ranks} -> {pair.other.ranks} ranks"
                report(f"{'unequal' if wrong else 'equal':7}  {error:7.1e}  {ranks}  {pair.name}")
                for text in wrong[:SHOWN]:
                    report(f"         {text}")
                if len(wrong) > SHOWN:
                    report(f"         and {len(wrong) - SHOWN} more")
        finally:
            grid.end()
    return count, bad


def main() -> int:
    """Run the grid; exit code 1 where a pair is unequal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="nine pairs up to four ranks, few steps")
    parser.add_argument("--only", help="pairs whose name holds this text")
    options = parser.parse_args()
    todo = quick() if options.quick else pairs()
    if options.only:
        todo = [pair for pair in todo if options.only in pair.name]
    count, bad = run(todo, SHORT if options.quick else LONG, partial(print, flush=True))
    print(f"{count} pairs, {bad} unequal")
    return 0 if count and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
