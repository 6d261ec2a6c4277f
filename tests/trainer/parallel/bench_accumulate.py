"""Gradients of micro-batches added up as they are, and by a cast of the first and torch's additions, in turn in one run.

python -m tests.trainer.parallel.bench_accumulate [--device cuda] [--elements N] [--micros 4] [--rounds 7]

N is 352 million on a GPU, where a few million would time launches, and 4 million on a CPU. Each line gives, for so many
micro-batches, both medians and their ratio. Without Triton the additions are torch's either way, and so is the time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.trainer.bench_optim import measured
from trainer.kernels.choice import reason
from trainer.parallel.accumulate import accumulate


def deferred(gradients: list[Tensor]) -> Tensor:
    """As the trainer does it."""
    total = gradients[0]
    for gradient in gradients[1:]:
        total = accumulate(total, gradient)
    return total


def cast(gradients: list[Tensor]) -> Tensor:
    """As FSDP does it."""
    total = gradients[0].float()
    for gradient in gradients[1:]:
        total += gradient
    return total


def main(arguments: list[str]) -> None:
    """Print a line for each number of micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--elements", type=int)
    parser.add_argument("--micros", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = options.device
    elements = options.elements or (352_000_000 if device == "cuda" else 1 << 22)
    shape = (options.micros, elements)
    gradients = list(torch.randn(shape, device=device).bfloat16())
    print(f"{elements / 1e6:.1f} M elements on {device}, torch {torch.__version__}, {reason()}")
    for micros in range(2, options.micros + 1):
        given = gradients[:micros]
        assert deferred(given).equal(cast(given))
        ways: dict[str, Callable[[], Any]] = {
            "deferred": partial(deferred, given),
            "cast": partial(cast, given),
        }
        times = measured(ways, options.rounds, device)
        deferred_ms, cast_ms = times["deferred"] * 1e3, times["cast"] * 1e3
        print(
            f"{micros} micro-batches: {deferred_ms:.3f} ms, cast and added {cast_ms:.3f} ms, {cast_ms / deferred_ms:.2f}x"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
