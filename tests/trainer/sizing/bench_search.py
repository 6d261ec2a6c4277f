"""The layout search for 12,288 GPUs, in CPU seconds, against pricing every legal set-up without pruning.

python -m tests.trainer.sizing.bench_search

Every set-up is too many to price in a benchmark: a seeded sample of 400 is, in the same run, and the time of all is
that of the sample, multiplied. Where a task is small enough, all are priced, and both ways must find the same.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace

from configs.compose import compose
from tests.trainer.sizing.search.exhaustive import exhaustive, set_ups
from trainer.sizing.model import frameworks
from trainer.sizing.model.job import Software
from trainer.sizing.search import layouts as search
from trainer.sizing.search import legal
from trainer.sizing.search.auto import rates_of
from trainer.sizing.search.legal import Task

SAMPLE = 400
MEGATRON = Software(name="megatron", overlap_dp=True, overlap_tp=True, retention=frameworks.MEGATRON)
TASKS = [
    # model, hardware, ranks, sequence, global batch
    ("deepseek_v3", "h100", 12288, 4096, 12288),
    ("deepseek_v3", "h200", 12288, 4096, 18432),
    ("deepseek_v3", "mi300x", 12288, 32768, 6144),
    ("mixtral_8x7b", "h100", 12288, 8192, 12288),
    ("qwen3_30b_a3b", "mi300x", 12288, 4096, 24576),
]
SMALL = [("mixtral_8x7b", "h100", 64, 8192, 256), ("qwen3_30b_a3b", "mi300x", 64, 4096, 512)]


def cpu(call: object) -> tuple[float, search.SearchResult]:
    """CPU seconds of a call, and what it gave."""
    start = time.process_time()
    result = call()  # type: ignore[operator]
    return time.process_time() - start, result


def priced(task: Task, name: str) -> tuple[float, int]:
    """CPU seconds of pricing all legal set-ups, from a sample; and how many there are."""
    hardware = compose([f"hardware={name}"]).hardware
    rates = rates_of(hardware)
    everything = [(layout, job) for layout in legal.layouts(task) for job in set_ups(task, layout)]
    sample = random.Random(0).sample(everything, min(SAMPLE, len(everything)))
    start = time.process_time()
    for _, job in sample:
        search.candidate(job, hardware, rates)
    return (time.process_time() - start) / len(sample) * len(everything), len(everything)


def main() -> None:
    """Print a line for each task."""
    write = sys.stdout.write
    write(f"{'task':44}{'legal':>8}{'priced':>8}{'search':>10}{'all':>10}{'ratio':>8}  best\n")
    for model, device, ranks, sequence, batch in TASKS:
        hardware = compose([f"hardware={device}"]).hardware
        task = Task(compose([f"model={model}"]).model, ranks, sequence, batch, software=MEGATRON)
        rates = rates_of(hardware)
        seconds, quick = cpu(
            lambda task=task, hardware=hardware, rates=rates: search.search(task, hardware, rates)
        )
        # Nothing cached by the search.
        all_seconds, count = priced(replace(task, imbalance=task.expert_imbalance + 1e-9), device)
        name = f"{model} {device} x{ranks}, {sequence} tokens"
        best = quick.best.label if quick.best else quick.reason
        write(
            f"{name:44}{count:8}{quick.priced:8}{seconds:8.2f} s{all_seconds:8.1f} s{all_seconds / seconds:7.0f}x  {best}\n"
        )
    for model, device, ranks, sequence, batch in SMALL:
        hardware = compose([f"hardware={device}"]).hardware
        task = Task(compose([f"model={model}"]).model, ranks, sequence, batch, software=MEGATRON)
        one, two = rates_of(hardware), rates_of(hardware)
        seconds, quick = cpu(
            lambda task=task, hardware=hardware, rates=one: search.search(task, hardware, rates)
        )
        whole, other = cpu(lambda task=task, hardware=hardware, rates=two: exhaustive(task, hardware, rates))
        same = (
            "the same best"
            if quick.best and other.best and quick.best.job == other.best.job
            else "ANOTHER best"
        )
        name = f"{model} {device} x{ranks}, {sequence} tokens"
        write(
            f"{name:44}{other.legal:8}{quick.priced:8}{seconds:8.2f} s{whole:8.1f} s{whole / seconds:7.0f}x  {same}\n"
        )


if __name__ == "__main__":
    main()
