"""Step times of the engines side by side: `python -m tests.trainer.bench_engines [--rounds N] [--steps N] [--model NAME]`.

Native and DeepSpeed on one rank and on two; on one rank also a plain loop over the same model with fused AdamW. They
take turns in one process, a few steps each; a ratio is of two times of the same turn, given as the median over turns and
the range of the middle half. CPU time stands beside wall time: on a busy machine it tells more, but it leaves out waiting.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from configs.compose import compose
from configs.rank import RankContext
from configs.schema import RunConfig
from tests.collectives.ranks import together
from tests.trainer.engines.ranks import make_engine
from trainer.engines.base import Batch, Engine
from trainer.model.decoder import inputs
from trainer.model.initial import build, kind
from trainer.model.seams import MicroBatch, Tally
from trainer.parallel.mesh import assemble, join

Stepper = Callable[[], None]
TARGETS = {"deepspeed": 1.05, "plain": 1.05}
"""What native may take, over each of the others."""
LAYOUTS: dict[int, list[dict[str, int]]] = {1: [{}], 2: [{"ep": 1}, {"ep": 2}]}


def config_of(model: str, engine: str, world: int, layout: dict[str, int]) -> RunConfig:
    """A run of a preset in fp32 on CPUs, two micro-batches a step."""
    words = [f"parallel.{axis}={size}" for axis, size in layout.items()]
    return compose(
        [f"model={model}", "hardware=cpu", f"train.engine={engine}", "train.precision=fp32", "train.micro_batch=4",
         f"train.global_batch={8 * world}", f"parallel.dp={world}", "data.sequence=128", *words]
    )  # fmt: skip


def of_engine(engine: Engine, config: RunConfig) -> Stepper:
    """A step of an engine on tokens that stay the same."""
    samples = config.train.global_batch or 1
    batches = tokens(config, samples // engine.data_parallel.size)

    def step() -> None:
        engine.step(batches, samples, config.optim.lr, lambda _phase: nullcontext())

    return step


def plain(config: RunConfig) -> Stepper:
    """What anyone would write: the model, a loop over micro-batches, clipping, torch's fused AdamW."""
    stage = build(config.model, config.train.seed)
    named = list(stage.named_parameters())
    decayed = [parameter for name, parameter in named if kind(name) == "matrix"]
    rest = [parameter for name, parameter in named if kind(name) != "matrix"]
    optim = config.optim
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True,
    )  # fmt: skip
    samples = config.train.global_batch or 1
    batches, positions_S = tokens(config, samples), torch.arange(config.data.sequence)

    def step() -> None:
        tally = Tally()
        for batch in batches:
            micro = MicroBatch(batch.tokens_BS, positions_S, None, 1.0 / samples, tally)
            stage(inputs(micro), micro).backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters(), optim.clip, foreach=True)
        adamw.step()
        adamw.zero_grad()

    return step


def tokens(config: RunConfig, samples: int) -> list[Batch]:
    """A rank's micro-batches."""
    generator = torch.Generator().manual_seed(1)
    shape = (samples, config.data.sequence + 1)
    drawn = torch.randint(config.model.vocab, shape, generator=generator)
    return [Batch(part, None) for part in drawn.split(config.train.micro_batch)]


Times = dict[str, list[tuple[float, float]]]
"""By engine, wall and CPU seconds of a step in each turn."""


def measure(rank: RankContext, model: str, rounds: int, steps: int) -> list[tuple[str, Times]]:
    """All engines on this rank, layout by layout, in turns."""
    torch.set_num_threads(1)
    first = join(config_of(model, "native", rank.world, {}), rank, torch.device("cpu"))
    found = []
    for layout in LAYOUTS[rank.world]:
        steppers: dict[str, Stepper] = {}
        for engine in ("native", "deepspeed"):
            config = config_of(model, engine, rank.world, layout)
            mesh = assemble(config, rank.rank, rank.world, first.device, first.control_group, first.network)
            steppers[engine] = of_engine(make_engine(config, mesh), config)
        if rank.world == 1:
            steppers["plain"] = plain(config)
        name = " ".join(
            [f"{rank.world} rank{'s' * (rank.world > 1)}", *(f"{a}={n}" for a, n in layout.items())]
        )
        found.append((name, take_turns(steppers, rounds, steps)))
    return found


def take_turns(steppers: dict[str, Stepper], rounds: int, steps: int) -> Times:
    """Time of a step in each turn, the first of which isn't counted."""
    times: Times = {name: [] for name in steppers}
    order = list(steppers)
    for turn in range(rounds + 1):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            began, worked = time.perf_counter(), time.process_time()
            for _ in range(steps):
                steppers[name]()
            if turn:
                spent = (time.perf_counter() - began) / steps, (time.process_time() - worked) / steps
                times[name].append(spent)
    return times


def spread(values: Sequence[float]) -> str:
    """Median and the middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def report(name: str, times: Times) -> None:
    """Seconds, and native over each other engine against its target."""
    for engine, pairs in times.items():
        wall, cpu = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        print(f"{name:14}  {engine:10} {wall * 1e3:8.1f} ms a step, {cpu * 1e3:8.1f} ms of CPU")
    for engine, target in TARGETS.items():
        if engine not in times:
            continue
        paired = list(zip(times["native"], times[engine], strict=True))
        wall, cpu = ([ours[i] / theirs[i] for ours, theirs in paired] for i in (0, 1))
        print(
            f"{name:14}  native/{engine}: wall {spread(wall)}, CPU {spread(cpu)}; target at most {target:.2f}"
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="of each engine in a turn")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--ranks", type=int, choices=tuple(LAYOUTS), help="one number of ranks alone")
    options = parser.parse_args()
    for world in LAYOUTS if options.ranks is None else (options.ranks,):
        with tempfile.TemporaryDirectory() as folder:
            found = together(world, Path(folder), measure, options.model, options.rounds, options.steps)
        for name, times in found[0]:
            report(name, times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
