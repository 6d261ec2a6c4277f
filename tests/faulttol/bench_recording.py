"""`python -m tests.faulttol.bench_recording [--steps N] [--device cpu|cuda]`: what it costs a step to be recorded.

Two real ranks train with the trainer's own loop. Ring, trace and step store are on for a block of steps and off for the
next, in turn (on, off, off, on, …), so both see the same machine; the parent reads the rings once a second, as a node's
agent does. Ratios of a block on and its neighbour off; their median, and the interval that holds it with 95 % (by
bootstrap).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from configs.paths import RunPaths
from configs.rank import RankContext, RankFiles, free_port
from configs.schema import RunConfig
from faulttol.timeline.store import StepStore
from tests.faulttol.timeline.traced_ranks import config_of

SHAPES = {
    "cpu": (
        "model.layers=2", "model.hidden=256", "model.heads=4", "model.kv_heads=2", "model.head_dim=64", "model.experts=8",
        "model.expert_width=256", "data.sequence=256", "train.micro_batch=2", "train.global_batch=8", "parallel.dp=2",
        "parallel.ep=2",
    ),
    "cuda": (
        "model.layers=8", "model.hidden=2048", "model.heads=16", "model.kv_heads=16", "model.head_dim=128",
        "model.experts=16", "model.expert_width=1024", "data.sequence=2048", "train.micro_batch=2", "train.global_batch=8",
        "parallel.dp=2", "parallel.ep=2", "train.precision=bf16", "hardware=h100",
    ),
}  # fmt: skip
_WARM = 10


def is_on(step: int, block: int) -> bool:
    """Whether a step is recorded: on, off, off, on."""
    return step // block % 4 in (0, 3)


def _rank(rank: int, port: int, folder: str, config: RunConfig, block: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    from faulttol import recorder
    from faulttol.timeline.hooks import Tracing
    from trainer import loop

    rings = Path(folder) / "rings"
    context = RankContext(rank, 2, rank, 2, "127.0.0.1", port, RunPaths(Path(folder) / "run"), 1, rings)
    tracing = [Tracing.start(RankFiles(rings, rank))]
    write, step = recorder.Recorder._write, recorder.Recorder.step
    told: list[str] = []
    began = [time.perf_counter(), time.process_time()]

    def stepped(self: recorder.Recorder, number: int) -> None:
        step(self, number)
        if config.hardware.kind != "cpu":
            torch.cuda.synchronize()  # a step's time is the device's
        now = time.perf_counter(), time.process_time()
        told.append(f"{number - 1} {now[0] - began[0]} {now[1] - began[1]}")
        if is_on(number, block) != is_on(number - 1, block):
            if is_on(number, block):
                recorder.Recorder._write = write  # type: ignore[method-assign]
                tracing.append(Tracing.start(RankFiles(rings, rank)))
            else:
                recorder.Recorder._write = lambda self, meaning: None  # type: ignore[method-assign]
                tracing.pop().stop()
        began[:] = time.perf_counter(), time.process_time()

    recorder.Recorder.step = stepped  # type: ignore[method-assign]
    loop.main(config, context)
    (Path(folder) / f"times-{rank}").write_text("\n".join(told))
    os._exit(0)


def call_cost(rounds: int = 30, calls: int = 300) -> float:
    """Seconds of the processor that tracing adds to a call of torch.distributed, measured on and off in turn."""
    import torch.distributed as dist

    from faulttol.timeline.hooks import Tracing

    x, spent = torch.ones(16), {True: [], False: []}
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            for number in range(rounds):
                on = number % 2 == 1
                tracing = Tracing.start(RankFiles(Path(name), 0)) if on else None
                dist.all_reduce(x)
                began = time.thread_time()
                for _ in range(calls):
                    dist.all_reduce(x)
                spent[on].append((time.thread_time() - began) / calls)
                if tracing is not None:
                    tracing.stop()
        finally:
            dist.destroy_process_group()
    return min(spent[True]) - min(spent[False])


def measure(steps: int, block: int, device: str) -> None:
    """Train, and print the ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rings").mkdir()
        config = config_of(
            folder, steps, *SHAPES[device], "train.log_every=1000000", "checkpoint.every=1000000"
        )
        port, context = free_port(), mp.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(r, port, name, config, block)) for r in range(2)]
        for one in ranks:
            one.start()
        store = StepStore(folder / "run" / "attempts" / "001", "here", [0, 1], folder / "rings")
        used, began = time.process_time(), time.perf_counter()
        while any(one.is_alive() for one in ranks):
            ranks[0].join(1.0)
            store.append()
        store.close()
        share = (time.process_time() - used) / (time.perf_counter() - began)
        if any(one.exitcode for one in ranks):
            raise SystemExit(f"a rank ended with {[one.exitcode for one in ranks]}")
        rows = [line.split() for line in (folder / "times-0").read_text().splitlines()]
        calls = sum(1 for _ in _calls(folder)) / max(1, sum(is_on(step, block) for step in range(steps)))
    middle = statistics.median(float(row[1]) for row in rows[_WARM:])
    each = call_cost()
    print(
        f"tracing adds {each * 1e6:.1f} us to a call: {calls * each / middle:.3%} of a step of {middle * 1e3:.0f} ms"
    )
    for name, column in (("wall", 1), ("cpu", 2)):
        report(name, [(int(row[0]), float(row[column])) for row in rows], block)
    print(
        f"step store: {share:.2%} of a core for 2 ranks; {calls:.0f} calls of torch.distributed a step were traced"
    )


def _calls(folder: Path) -> list[object]:
    from faulttol.timeline import detail

    path = folder / "run" / "attempts" / "001" / "steps" / "here.detail"
    return [call for chunk in detail.read(path) if chunk.rank == 0 for call in chunk.calls]


def report(name: str, times: list[tuple[int, float]], block: int) -> None:
    """Print the ratio of blocks that follow each other, one on and one off."""
    blocks: dict[int, list[float]] = {}
    for step, seconds in times:
        if step >= _WARM and step % block:  # the first of a block has just been switched
            blocks.setdefault(step // block, []).append(seconds)
    middle = {number: statistics.median(own) for number, own in blocks.items() if len(own) >= block // 2}
    on = [seconds for number, seconds in middle.items() if is_on(number * block, block)]
    ratios = []
    for number in sorted(middle):
        other = number + 1
        if other in middle and is_on(number * block, block) != is_on(other * block, block):
            pair = (number, other) if is_on(number * block, block) else (other, number)
            ratios.append(middle[pair[0]] / middle[pair[1]])
    draw = random.Random(0)
    means = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    print(
        f"{name}: {statistics.median(on) * 1e3:.2f} ms a step recorded; on/off {statistics.median(ratios):.4f} "
        f"({means[50]:.4f} to {means[-51]:.4f}, {len(ratios)} pairs of {block} steps)"
    )


def main() -> int:
    """Measure as asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.faulttol.bench_recording", description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--block", type=int, default=20, help="steps between switches")
    parser.add_argument("--device", choices=sorted(SHAPES), default="cpu")
    options = parser.parse_args()
    measure(options.steps, options.block, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
