"""A real training of the trainer's own loop on ranks that trace themselves, for the tests of the timeline."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from configs.compose import compose
from configs.paths import RunPaths
from configs.rank import RankContext, RankFiles, free_port
from configs.schema import RunConfig
from faulttol.timeline import command
from faulttol.timeline.hooks import Tracing
from faulttol.timeline.reader import AttemptSteps
from faulttol.timeline.step_file import STORED
from faulttol.timeline.store import StepStore
from tests.faulttol.timeline.trace_events import problems
from tests.forks import forks

WORDS = (
    "experiment=smoke", "model.layers=2", "model.hidden=32", "model.heads=2", "model.kv_heads=2", "model.head_dim=16",
    "model.experts=4", "model.expert_width=16", "data.sequence=32", "train.micro_batch=1", "train.global_batch=8",
    "optim.warmup_steps=1", "train.precision=fp32", "train.engine=native", "train.log_every=10", "train.evaluate_every=0",
)  # fmt: skip


def config_of(folder: Path, steps: int, *words: str) -> RunConfig:
    """A tiny run on a text of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(
            "\n\n".join(f"the {n} quick brown foxes jump over {n + 1} lazy dogs" for n in range(3000))
        )
    return compose(
        [*WORDS, f"train.steps={steps}", f"data.path={text}", f"data.cache={folder / 'data'}", *words]
    )


def _slowed(step: int, seconds: float) -> None:
    """Have this rank sleep before the work of every step from `step` on."""
    from trainer import loop

    make = loop.make_engine

    def slow(config: RunConfig, mesh: object) -> object:
        engine = make(config, mesh)  # type: ignore[arg-type]
        inner, count = engine.step, [0]

        def stepped(*args: object, **options: object) -> object:
            count[0] += 1
            if count[0] > step:
                time.sleep(seconds)
            return inner(*args, **options)  # type: ignore[arg-type]

        engine.step = stepped  # type: ignore[method-assign]
        return engine

    loop.make_engine = slow  # type: ignore[assignment]


def rank_main(
    rank: int,
    world: int,
    port: int,
    run: str,
    rings: str,
    config: RunConfig,
    traced: bool,
    slow: tuple[int, int, float] | None,
) -> None:
    """One rank, from its own process on."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from trainer import loop

    context = RankContext(rank, world, rank, world, "127.0.0.1", port, RunPaths(Path(run)), 1, Path(rings))
    if traced:
        Tracing.start(RankFiles(Path(rings), rank))
    if slow is not None and slow[0] == rank:
        _slowed(slow[1], slow[2])
    loop.main(config, context)
    os._exit(0)


def train(
    folder: Path,
    config: RunConfig,
    world: int,
    beside: Callable[[], None] = lambda: None,
    traced: bool = True,
    slow: tuple[int, int, float] | None = None,
) -> list[int | None]:
    """Train on `world` ranks, and call `beside` again and again until they have ended; their exit codes.

    Args:
        folder: of the run; the rings are in its `rings`.
        config: what to train.
        world: ranks.
        beside: called about ten times a second.
        traced: whether they trace themselves.
        slow: a rank, a step from which on it is slow, and by how many seconds a step.
    """
    rings = folder / "rings"
    rings.mkdir(parents=True, exist_ok=True)
    context = forks()
    args = (world, free_port(), str(folder / "run"), str(rings), config, traced, slow)
    ranks = [context.Process(target=rank_main, args=(rank, *args), daemon=True) for rank in range(world)]
    for one in ranks:
        one.start()
    while any(one.is_alive() for one in ranks):
        ranks[0].join(0.1)
        beside()
    return [one.exitcode for one in ranks]


def main() -> int:
    """`python -m tests.faulttol.timeline.traced_ranks WORLD WORDS...`: train, and print where the steps' seconds went."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world, words = int(sys.argv[1]), sys.argv[2:]
        attempt = RunPaths(folder / "run").attempt(1)
        store = StepStore(attempt.root, "here", range(world), folder / "rings")
        codes = train(folder, config_of(folder, 40, *words), world, store.append)
        store.close()
        steps = AttemptSteps(attempt.root)
        print(f"exit codes {codes}, steps {steps.span}")
        for field in STORED:
            window = steps.window(field, 10, 39, 1)
            print(field, [f"{seconds * 1e3:.2f} ms" for seconds in window.mean[:, 0].tolist()])
        options = argparse.Namespace(
            run=str(folder / "run"), attempt=None, steps=None, ranks=None, out=folder / "t.json"
        )
        print("\n".join(command.run(options).lines))
        tree = json.loads((folder / "t.json").read_text())
        found = problems(tree)
        arrows = sum(event["ph"] == "f" for event in tree["traceEvents"])
        print(f"{arrows} messages joined; {len(found)} problems {found[:3]}")
    return any(codes)


if __name__ == "__main__":
    sys.exit(main())
