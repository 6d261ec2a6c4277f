"""A run stopped at random steps and resumed at changing dp sees the samples of one that never stopped, in their order:
`python -m tests.trainer.stop_and_go [--steps N] [--stops N] [--seed N]`.

Ranks are real processes of the trainer's own loop, killed in the middle; what each step trained on is hashed as the engine
gets it, and compared with the samples as the sampler deals them out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from configs.compose import compose
from configs.paths import RunPaths
from configs.rank import RankContext, free_port
from configs.schema import RunConfig
from tests.forks import forks

BATCH, EVERY = 8, 10
WORDS = (
    "experiment=smoke", "model.layers=1", "model.hidden=16", "model.heads=2", "model.kv_heads=2", "model.head_dim=8",
    "model.experts=4", "model.expert_width=8", "data.sequence=16", "train.micro_batch=1", f"train.global_batch={BATCH}",
    f"checkpoint.every={EVERY}", "optim.warmup_steps=1", "train.precision=fp32", "train.engine=native",
    "train.log_every=10",
)  # fmt: skip


def config_of(steps: int, dp: int, text: Path, home: Path) -> RunConfig:
    """A tiny run on some text."""
    words = [f"train.steps={steps}", f"parallel.dp={dp}", f"data.path={text}", f"data.cache={home / 'data'}"]
    return compose([*WORDS, *words])


class _Witness:
    """An engine that writes down what it is given, and dies at a step."""

    def __init__(self, engine: Any, file: Path, first: int, death: int | None) -> None:
        self._engine, self._file, self._step, self._death = engine, file, first, death

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, batches: Any, samples: int, lr: float, phase: Any, asked: Any) -> Any:
        place = self._engine.data_parallel
        with self._file.open("a") as file:
            for micro, batch in enumerate(batches):
                for row, tokens in enumerate(batch.tokens_BS):
                    at = (micro * place.size + place.index) * len(batch.tokens_BS) + row
                    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
                    file.write(f"{self._step} {at} {digest}\n")
        if self._step == self._death:
            os._exit(9)
        self._step += 1
        return self._engine.step(batches, samples, lr, phase, asked)


def _rank(
    rank: int, dp: int, port: int, run: str, attempt: int, config: RunConfig, death: int | None
) -> None:
    from trainer import checkpoints, loop

    context = RankContext(rank, dp, rank, dp, "127.0.0.1", port, RunPaths(Path(run)), attempt)
    make, restore = loop.make_engine, checkpoints.Checkpoints.restore
    found: list[_Witness] = []

    def witnessed(config: RunConfig, mesh: Any) -> Any:
        file = Path(run) / f"seen-{attempt}-{rank}.txt"
        found.append(_Witness(make(config, mesh), file, 0, death))
        return found[0]

    def restored(self: Any, engine: Any) -> Any:
        loaded = restore(self, engine._engine)
        found[0]._step = 0 if loaded is None else loaded.step
        return loaded

    loop.make_engine, checkpoints.Checkpoints.restore = witnessed, restored  # type: ignore[assignment, method-assign]
    loop.main(config, context)
    os._exit(0)


def _attempt(dp: int, run: Path, attempt: int, config: RunConfig, death: int | None) -> list[int | None]:
    port = free_port()
    context = forks()
    ranks = [
        context.Process(target=_rank, args=(rank, dp, port, str(run), attempt, config, death))
        for rank in range(dp)
    ]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(300)
    return [one.exitcode for one in ranks]


def study(home: Path, steps: int, stops: int, seed: int) -> tuple[int, str]:
    """Run, stop and resume; how many samples were compared, and what differed (empty where nothing did)."""
    from trainer.batch_loader import BatchLoader

    text = home / "text.txt"
    text.write_text(
        "".join(Path(path).read_text() for path in (__file__, argparse.__file__, random.__file__))
    )
    chance = random.Random(seed)
    deaths = sorted(chance.sample(range(1, steps), stops))
    run = home / "run"
    for attempt, death in enumerate([*deaths, None], 1):
        dp = chance.choice((1, 2, 4))
        config = config_of(steps, dp, text, home)
        codes = _attempt(dp, run, attempt, config, death)
        if codes != [9 if death is not None else 0] * dp:
            return 0, f"attempt {attempt} at dp={dp} ended with {codes}"
    sampler = BatchLoader.prepare(config, home / "data")._sampler
    seen: dict[tuple[int, int], set[str]] = defaultdict(set)
    for file in run.glob("seen-*.txt"):
        for line in file.read_text().splitlines():
            step, at, digest = line.split()
            seen[int(step), int(at)].add(digest)
    total = hashlib.sha256()
    for position in range(steps * BATCH):
        tokens = sampler.sample(position).tokens.astype("int64")
        expected = hashlib.sha256(tokens.tobytes()).hexdigest()
        total.update(expected.encode())
        if seen.pop(divmod(position, BATCH), None) != {expected}:
            return position, f"sample {position} of step {position // BATCH} isn't what was trained on there"
    if seen:
        return steps * BATCH, f"trained on {len(seen)} samples too many"
    print(f"{steps * BATCH} samples, {stops} stops, hash of all in order {total.hexdigest()[:16]}")
    return steps * BATCH, ""


def main() -> int:
    """Exit code 1 where a sample differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        count, wrong = study(Path(home), options.steps, options.stops, options.seed)
    print(wrong or f"{count} samples the same, in the same order")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
