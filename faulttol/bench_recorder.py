"""`python -m faulttol.bench_recorder`: what a record costs, against a JSON line appended to a file."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from faulttol.recorder import RankPhase, Recorder

_RECORDS = 20_000
_ROUNDS = 5


def _nanoseconds(write: Callable[[int], object]) -> float:
    """Time of one call in ns: the best of some rounds, since other processes only ever add to it."""
    rounds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter_ns()
        for step in range(_RECORDS):
            write(step)
        rounds.append((time.perf_counter_ns() - began) / _RECORDS)
    return min(rounds)


def main() -> None:
    """Measure both in turn and write the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder, "ring"), rank=0)
        ring = _nanoseconds(lambda step: recorder.begin(RankPhase.FORWARD, step))
        recorder.close()
        with Path(folder, "lines").open("a") as file:

            def line(step: int) -> None:
                file.write(json.dumps({"time": time.time_ns(), "phase": "forward", "step": step}) + "\n")
                file.flush()

            lines = _nanoseconds(line)
    sys.stdout.write(
        f"recorder: {ring:.0f} ns a record; JSON line, flushed: {lines:.0f} ns; ratio {lines / ring:.1f}\n"
    )


if __name__ == "__main__":
    main()
