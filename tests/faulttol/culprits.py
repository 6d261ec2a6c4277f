"""Who began it: `python -m tests.faulttol.culprits [--count N] [--seed N] [--only WORD] [--patience SECONDS]`.

Eight real ranks of a small training over gloo, a fault in one of them, and detectors that look at default patience. Between
them, ranks that only take long: they compute, or wait for a file. The last line says how often the right rank was named,
how late the slowest hang, and how often somebody was named who only took long.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from configs.compose import compose, dump
from configs.schema import RunConfig
from faulttol.verdicts import VerdictKind
from tests.faulttol.watched import RankFault, WatchedGang
from trainer.sizing.search.planner import Capacity, plan

WORLD = 8
LAYOUTS = (
    ("parallel.dp=8",),
    ("parallel.dp=4", "parallel.pp=2"),
    ("parallel.dp=2", "parallel.pp=2", "parallel.tp=2"),
    ("parallel.dp=8", "parallel.ep=4"),
)
DEATHS = ("kill", "segv", "abort", "raise", "memory", "user", "exit", "leave", "term")
DEATH_PLACES = ("step", "middle", "data", "save", "writing", "load", "reading", "rendezvous")
HANGS = (
    ("stop", "step"), ("stop", "middle"), ("stop", "data"), ("stop", "save"), ("stop", "writing"), ("stop", "load"),
    ("stop", "reading"), ("stop", "rendezvous"), ("sleep", "step"), ("sleep", "middle"), ("sleep", "data"),
    ("sleep", "save"), ("sleep", "writing"), ("sleep", "load"), ("sleep", "reading"), ("sleep", "rendezvous"),
    ("stop_writer", "writing"),
)  # fmt: skip
LONG = (
    ("busy", "step"), ("file", "data"), ("busy", "save"), ("file", "writing"), ("busy", "load"), ("file", "reading"),
    ("busy", "middle"), ("file", "save"), ("busy", "rendezvous"), ("file", "load"),
)  # fmt: skip
"""What takes long and is not a fault."""
_LONG_SECONDS = 20.0
MOST = 15.0
"""Seconds in which a hang must be named."""
_GIVE_UP = 45.0
_EVERY = 10
"""Faults between two ranks that only take long."""


@dataclass(frozen=True)
class CulpritTrial:
    """One fault in one layout."""

    layout: int
    fault: RankFault
    first: int
    """The node that is asked first."""


def trials(count: int, seed: int) -> list[CulpritTrial]:
    """Faults in turn over all kinds, with places and ranks drawn."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        step = draw.choice([0, 0, 1, 3, 5])
        rank = draw.randrange(WORLD)
        if number % 2:
            act, where = HANGS[number // 2 % len(HANGS)]
        else:
            act = DEATHS[number // 2 % len(DEATHS)]
            where = draw.choice(DEATH_PLACES)
            if where == "writing" and act not in ("kill", "segv", "abort", "exit", "leave"):
                where = "save"  # an error in the thread of a save is that save's, and training continues
            if act == "term" or (act in ("raise", "memory") and where == "reading"):
                # An unreadable file is passed over by all ranks.
                where = draw.choice(("step", "middle", "data"))
        layout = draw.randrange(len(LAYOUTS))
        found.append(CulpritTrial(layout, RankFault(rank, act, where, step), draw.randrange(2)))
    return found


def config_of(layout: int, text: Path, home: Path, *words: str) -> RunConfig:
    """A small training; it continues forever, and saves each second step."""
    asked = compose([
        "experiment=smoke", "model.layers=2", "model.hidden=16", "model.heads=2", "model.kv_heads=2", "model.head_dim=8",
        "model.experts=4", "model.expert_width=8", "data.sequence=16", "train.micro_batch=1", "train.global_batch=16",
        "train.steps=100000", "train.precision=fp32", "train.engine=native", "train.log_every=1", "checkpoint.every=2",
        "optim.warmup_steps=1", f"data.path={text}", f"data.cache={home / 'data'}", *LAYOUTS[layout], *words,
    ])  # fmt: skip
    return plan(asked, Capacity.of_nodes([WORLD])).config


class TrialSetup:
    """Where trials run: one folder, and a checkpoint of each layout to load."""

    def __init__(self, folder: Path, memory: Path, patience: float) -> None:
        self._folder, self._memory, self._count = folder, memory, 0
        self._patience = f"resilience.timeouts.patience={patience}"
        self._text = folder / "text.txt"
        self._text.write_text("".join(chr(97 + n * 7 % 26) for n in range(20000)))

    def gang(self, layout: int, fault: RankFault | None) -> WatchedGang:
        """Start a gang; where the fault is in a load, there is something to load."""
        self._count += 1
        run = self._folder / str(self._count) / "run"  # checkpoints belong to the run of that name
        run.mkdir(parents=True)
        config = config_of(layout, self._text, self._folder, self._patience)
        if fault is not None and fault.where in ("load", "reading"):
            shutil.copytree(self._saved(layout), run / "checkpoints")
        (run / "config.yaml").write_text(dump(config))
        return WatchedGang(run, config, WORLD, self._memory / f"{self._count}", fault)

    def _saved(self, layout: int) -> Path:
        """Checkpoints of a run of the layout, made once."""
        kept = self._folder / f"saved-{layout}"
        if not kept.is_dir():
            run = self._folder / f"made-{layout}" / "run"
            run.mkdir(parents=True)
            config = config_of(layout, self._text, self._folder, "train.steps=2")
            (run / "config.yaml").write_text(dump(config))
            gang = WatchedGang(run, config, WORLD, self._memory / f"made-{layout}", None)
            found = gang.judged(120.0, enough=WatchedGang.all_ended)
            assert not found and set(gang.codes().values()) == {0}, (found, gang.codes())
            shutil.copytree(run / "checkpoints", kept)
        return kept


def expected(fault: RankFault) -> VerdictKind:
    """Kind of the verdict."""
    if fault.hangs:
        return VerdictKind.HANG
    return VerdictKind.USER_ERROR if fault.act == "user" else VerdictKind.RANK_EXIT


def tried(bench: TrialSetup, trial: CulpritTrial) -> tuple[bool, float, str]:
    """Whether the right rank was named, the seconds that it took from the fault, and what was said."""
    gang = bench.gang(trial.layout, trial.fault)
    try:
        verdicts = gang.judged(90.0, trial.first, lambda g: g.mark.exists() and g.since_fault() > _GIVE_UP)
        took = gang.since_fault() if gang.mark.exists() else -1.0
        if not verdicts:
            return False, took, "nothing was found" if gang.mark.exists() else "the fault never came"
        cause = verdicts[0]
        right = cause.rank == trial.fault.rank and cause.kind is expected(trial.fault)
        return right and (not trial.fault.hangs or took <= MOST), took, f"{cause.kind}: {cause.detail}"
    finally:
        gang.kill()
        shutil.rmtree(gang.paths.root.parents[2], ignore_errors=True)


def patient(bench: TrialSetup, number: int) -> str:
    """What was said while a rank only took long; empty where nothing was."""
    act, where = LONG[number % len(LONG)]
    gang = bench.gang(
        number % len(LAYOUTS), RankFault(number * 3 % WORLD, act, where, number % 3, _LONG_SECONDS)
    )
    try:
        found = gang.judged(90.0, 0, lambda g: g.mark.exists() and g.since_fault() > _LONG_SECONDS + 3)
        if not gang.mark.exists():
            return "it never came"
        return f"{found[0].kind}: {found[0].detail}" if found else ""
    finally:
        gang.kill()
        shutil.rmtree(gang.paths.root.parents[2], ignore_errors=True)


def _is_asked(fault: RankFault, only: str) -> bool:
    pairs = only.split(",") if ":" in only else []
    return only in ("", fault.act, fault.where) or f"{fault.act}:{fault.where}" in pairs


def main() -> int:
    """Run the campaign; 0 where every fault was named right."""
    parser = argparse.ArgumentParser(prog="python -m tests.faulttol.culprits", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", default="", help="faults of this act or place alone, or of ACT:PLACE,ACT:PLACE"
    )
    parser.add_argument("--patience", type=float, default=30.0)
    options = parser.parse_args()
    # Before the first fork, so that ranks begin warm: the compiler would be loaded at the first FSDP module.
    import torch._dynamo  # noqa: F401

    import trainer.engines.native
    import trainer.loop  # noqa: F401

    right, slowest, false, wrong = 0, 0.0, 0, Counter[str]()
    chosen = [trial for trial in trials(options.count, options.seed) if _is_asked(trial.fault, options.only)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        bench = TrialSetup(Path(folder), Path(memory), options.patience)
        for number, trial in enumerate(chosen, 1):
            began, fault = time.monotonic(), trial.fault
            good, took, said = tried(bench, trial)
            right += good
            if fault.hangs:
                slowest = max(slowest, took)
            if not good:
                wrong[f"{fault.act} in {fault.where}"] += 1
            what = f"{fault.act} in {fault.where} of rank {fault.rank}, step {fault.step}"
            word = "right" if good else "WRONG"
            spent = time.monotonic() - began
            print(
                f"{number:3d} {word} {took:5.1f} s | {what}, layout {trial.layout} | {said[:160]} | {spent:.0f} s",
                flush=True,
            )
            if number % _EVERY == 0:
                act, where = LONG[number // _EVERY % len(LONG)]
                said = patient(bench, number // _EVERY)
                false += bool(said)
                print(
                    f"    {'WRONG' if said else 'right'} nobody is named | {act} in {where} | {said}",
                    flush=True,
                )
    for name, count in wrong.items():
        print(f"wrong: {name}: {count}")
    print(
        f"{right} of {len(chosen)} named right; the slowest hang after {slowest:.1f} s; {false} of "
        f"{len(chosen) // _EVERY} named that only took long"
    )
    return 0 if right == len(chosen) and not false else 1


if __name__ == "__main__":
    sys.exit(main())
