"""A run killed on GPUs against one that wasn't, bit for bit: `python -m tests.trainer.gpu.recovery [--gpus N] [words ...]`.

Runs the trainer under torchrun three times on the same text: undisturbed; with a rank killed and started again; and without
`train.deterministic`, for its cost. Also prints the device memory of the fullest rank beside the planner's estimate.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from configs.metrics import MetricLine, StepLine, read_from

WORDS = (
    "model=olmoe_1b_7b", "model.layers=2", "model.experts=16", "model.vocab=4096", "hardware=h100", "data.sequence=1024",
    "train.micro_batch=2", "optim.warmup_steps=2", "checkpoint.every=20",
)  # fmt: skip
STEPS, KILL_AT, LIMIT = 40, 25, 120


def start(gpus: int, run: Path, attempt: int, words: list[str]) -> subprocess.Popen[bytes]:
    """The trainer under torchrun."""
    env = os.environ | {
        "MEGARAY_HOME": str(run.parent), "MEGARAY_RUN": str(run), "MEGARAY_ATTEMPT": str(attempt),
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    with (run.parent / f"{run.name}-{attempt}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, "-m", "trainer", "run", *WORDS, f"train.steps={STEPS}", *words],
            env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def ended(agent: subprocess.Popen[bytes], run: Path, attempt: int) -> bool:
    """Whether a run ended well within the limit; what it printed where it didn't."""
    try:
        code = agent.wait(LIMIT)
    except subprocess.TimeoutExpired:
        agent.terminate()
        code = agent.wait()
    print(f"{run.name}, attempt {attempt}: exit code {code}, {len(steps(run, attempt))} steps", flush=True)
    if code:
        print((run.parent / f"{run.name}-{attempt}.log").read_text()[-4000:], flush=True)
    return code == 0


def lines(run: Path, attempt: int) -> list[MetricLine]:
    """An attempt's metric lines so far."""
    return read_from(run / "attempts" / f"{attempt:03d}" / "metrics.jsonl", 0, 1 << 26)[0]


def steps(run: Path, attempt: int) -> dict[int, StepLine]:
    """Its steps."""
    return {line.step: line for line in lines(run, attempt) if isinstance(line, StepLine)}


def kill_a_rank(agent: subprocess.Popen[bytes], run: Path) -> None:
    """SIGKILL for one rank once the step is reached."""
    while agent.poll() is None and max(steps(run, 1), default=0) < KILL_AT:
        time.sleep(0.05)
    if agent.poll() is None:
        ranks = psutil.Process(agent.pid).children()
        os.kill(ranks[-1].pid, signal.SIGKILL)
    agent.wait()


def planned(words: list[str]) -> float:
    """The planner's estimate for the fullest rank, in bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "plan", "--json", *WORDS, f"train.steps={STEPS}", *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    parts = json.loads(done.stdout)["memory"]
    # What the metric line has is what torch's allocator handed out: neither its own slack nor the driver's and NCCL's.
    return float(sum(size for name, size in parts.items() if name not in ("allocator", "framework")))


def main() -> int:
    """Exit code 1 where the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    words = [*options.words, "train.deterministic=true"]
    with tempfile.TemporaryDirectory() as home:
        whole, killed, free = (Path(home) / name for name in ("whole", "killed", "free"))
        for run, given in ((whole, words), (free, options.words)):
            if not ended(start(options.gpus, run, 1, list(given)), run, 1):
                return 1
        kill_a_rank(start(options.gpus, killed, 1, words), killed)
        if not ended(start(options.gpus, killed, 2, words), killed, 2):
            return 1
        expected, found = steps(whole, 1), steps(killed, 1) | steps(killed, 2)
        differ = [
            step
            for step, line in expected.items()
            if (line.loss, line.grad_norm, line.expert_load)
            != (found[step].loss, found[step].grad_norm, found[step].expert_load)
        ]
        seconds = [
            statistics.median(line.step_seconds for line in list(steps(run, 1).values())[5:])
            for run in (whole, free)
        ]
        print(f"resumed from step {min(steps(killed, 2)) - 1}; {len(differ)} of {len(expected)} steps differ")
        print(f"last loss {expected[STEPS].loss!r} and {found[STEPS].loss!r}")
        print(
            f"a step takes {seconds[0]:.4f} s deterministic, {seconds[1]:.4f} s otherwise: {seconds[0] / seconds[1]:.3f}"
        )
        memory, estimate = expected[STEPS].memory_bytes, planned(list(options.words))
        print(f"memory {memory / 2**30:.2f} GiB, planned {estimate / 2**30:.2f} GiB: {memory / estimate:.3f}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
