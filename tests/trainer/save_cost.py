"""What saves cost a run: `python -m tests.trainer.save_cost [--ranks N] [--every 10] [--steps 100] [words ...]`.

Runs the trainer under torchrun twice on the same text, without saves between and with one every few steps, and prints the
speed of the second over the first, the seconds that each save held training by the clock, and how long saves took. On four
H100 the state of the issue's 40 GB is `model=olmoe_1b_7b model.layers=8 hardware=h100 parallel.ep=4`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from configs.metrics import MetricLine, SavedLine, StepLine
from tests.trainer.gpu.recovery import ended, lines, start

WARM = 10
"""Steps that aren't timed."""


def clock(found: list[MetricLine]) -> float:
    """Seconds from the end of the warm-up to the last step, saves and all."""
    times = {line.step: line.time for line in found if isinstance(line, StepLine)}
    return times[max(times)] - times[WARM]


def main() -> int:
    """Exit code 1 where a run doesn't end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        found = {}
        for name, every in (("without", options.steps + WARM), ("with", options.every)):
            run = Path(home) / name
            words = [f"train.steps={options.steps + WARM}", f"checkpoint.every={every}", "train.log_every=1"]
            if not ended(start(options.ranks, run, 1, [*options.words, *words]), run, 1):
                return 1
            found[name] = lines(run, 1)
        saves = [line for line in found["with"] if isinstance(line, SavedLine)]
        count = sum(WARM < line.step < options.steps + WARM for line in saves)
        plain, saving = clock(found["without"]), clock(found["with"])
        size = saves[0].bytes
        print(f"{count} saves of {size / 2**30:.2f} GiB in {saving:.2f} s of training, {plain:.2f} s without")
        print(f"speed with saves over speed without: {plain / saving:.3f}")
        print(f"training held by the clock: {(saving - plain) / max(1, count):.3f} s a save")
        held = statistics.median(line.held for line in saves)
        durable = statistics.median(line.seconds for line in saves)
        print(
            f"median of what ranks waited: {held:.3f} s; until durable {durable:.2f} s, {size / durable / 1e9:.2f} GB/s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
