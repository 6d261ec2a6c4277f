"""From a killed rank to the next step: megaray against torchrun's and Ray Train's restart, in turn in one run.

    python -m tests.cluster.bench_recovery [--ranks 2] [--gpus N] [--repeats 3] [--only megaray,torchrun] [FIELD=VALUE …]

All three train the same model with the same program from checkpoints of the same interval. In each repeat each of them
loses rank 1 to SIGKILL after the same number of seconds of training, and the first metric line of a step after the
checkpoint was loaded ends the clock. Printed are medians, the ratio, and where each second goes; likewise the start before
it, from the placing (for the baselines: from the command) to the first step, and the seconds of a step between saves.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from configs.metrics import MetricLine, ResumedLine, SavedLine, StepLine, read_from
from configs.paths import HomePaths, RunPaths
from orchestrator.record.events import AttemptPlaced, RanksStarted, VerdictFound
from orchestrator.record.log import read
from tests.cluster.conftest import Shell

RUN = (
    "tracking.wandb=disabled", "train.steps=100000000", "train.log_every=1", "checkpoint.every=20",
    "resilience.max_restarts=50",
)  # fmt: skip
PATIENCE = 300.0
WARM_SECONDS = 25.0
"""Of training before a rank is killed."""


@dataclass(frozen=True)
class Recovery:
    """Seconds from the kill, and of what was before it."""

    total: float
    parts: dict[str, float]
    """What they went to, in order."""
    start: float
    """From the placing, or the command, to the first step."""
    start_parts: dict[str, float]
    """What it went to: the time before the ranks' program, what they say of theirs, and the first step."""
    step: float
    """Median of a step, by the clock between two lines without a save between them."""


@dataclass
class MetricFollower:
    """Metric lines of one file as they come."""

    path: Path
    offset: int = 0
    lines: list[MetricLine] = field(default_factory=list)

    def look(self) -> list[MetricLine]:
        """All lines so far."""
        while True:
            found, end = read_from(self.path, self.offset)
            if end == self.offset:
                return self.lines
            self.lines += found
            self.offset = end

    def resumed_after(self, when: float) -> ResumedLine | None:
        """The first start after `when`."""
        return next((x for x in self.look() if isinstance(x, ResumedLine) and x.time > when), None)

    def step_after(self, when: float) -> StepLine | None:
        """The first step after `when`."""
        return next((x for x in self.look() if isinstance(x, StepLine) and x.time > when), None)


def until(what: Callable[[], object], why: str, ended: Callable[[], bool]) -> None:
    """Wait for `what`, for at most `PATIENCE` seconds and only while the contestant has not ended."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        if ended() or time.monotonic() > deadline:
            raise RuntimeError(f"{'ended' if ended() else 'timed out'} before: {why}")
        time.sleep(0.02)


class RecoveryContestant(ABC):
    """A way to keep ranks running."""

    name: str
    _process: subprocess.Popen[bytes] | None = None
    """Its process, where it is one of this benchmark's."""

    def __init__(self) -> None:
        self._begun = time.time()

    @abstractmethod
    def lines(self) -> MetricFollower:
        """Metric lines of the ranks that train now."""

    @abstractmethod
    def victim(self) -> int:
        """Process id of rank 1."""

    def lines_after(self, when: float) -> MetricFollower:
        """Where lines of the ranks that follow are written."""
        return self.lines()

    def ended(self) -> bool:
        """Whether it is known to be over."""
        return self._process is not None and self._process.poll() is not None

    def began(self, when: float) -> dict[str, float]:
        """What happened after the kill at `when`, as far as it is on record: name -> time."""
        return {}

    def placed(self) -> float:
        """When its ranks could be started, seconds since the epoch."""
        return self._begun

    def last_words(self, folder: Path) -> str:
        """The end of what its process wrote, where it is one of this benchmark's."""
        log = folder / "log"
        return log.read_text(errors="replace")[-1000:] if log.exists() else ""

    def measure(self, warm: float) -> Recovery:
        """Train for a while, kill, and wait for the next step."""
        begun = time.time()
        until(
            lambda: any(isinstance(x, SavedLine) and x.time > begun for x in self.lines().look()),
            "a checkpoint",
            self.ended,
        )
        first = self.lines().look()
        resumed = next(line for line in first if isinstance(line, ResumedLine))
        placed, stepped_at = self.placed(), next(line.time for line in first if isinstance(line, StepLine))
        started = stepped_at - placed
        own = dict(resumed.facts.get("start_seconds") or {})
        before = {"until the ranks run": resumed.time - placed - sum(map(float, own.values()))}
        own = before | own | {"first step": stepped_at - resumed.time}
        time.sleep(max(0.0, warm - (time.time() - begun)))
        step = step_seconds(self.lines().look())
        killed = time.time()
        os.kill(self.victim(), signal.SIGKILL)
        found: list[float] = []

        def stepped() -> bool:
            follower = self.lines_after(killed)
            resumed = follower.resumed_after(killed)
            step = follower.step_after(resumed.time) if resumed else None
            if resumed and step:
                assert resumed.step > 0, "nothing was loaded"
                found.extend((resumed.time, step.time))
            return bool(found)

        until(stepped, f"a step of {self.name} after the kill", self.ended)
        marks = {**self.began(killed), "loaded": found[0], "first step": found[1]}
        parts, last = {}, killed
        for name, at in sorted(marks.items(), key=lambda mark: mark[1]):
            parts[name], last = at - last, at
        start = self.lines_after(killed).resumed_after(killed)
        assert start is not None
        inside = start.facts.get("start_seconds")
        if isinstance(inside, dict):
            parts |= {f"  of it {name}": float(seconds) for name, seconds in inside.items()}
        return Recovery(found[1] - killed, parts, started, own, step)


def step_seconds(lines: Sequence[MetricLine]) -> float:
    """Median seconds between two neighbouring steps with nothing but steps between them; the first ten aren't counted."""
    pairs = zip(lines, lines[1:], strict=False)
    steps = [
        (b.time - a.time) / (b.step - a.step)
        for a, b in pairs
        if isinstance(a, StepLine) and isinstance(b, StepLine)
    ]
    return median(steps[10:] or steps)


class Megaray(RecoveryContestant):
    """A submitted run."""

    name = "megaray"

    def __init__(self, shell: Shell, words: Sequence[str]) -> None:
        super().__init__()
        self._shell, self._run = shell, shell.submit(*words)
        self._followers: dict[int, MetricFollower] = {}

    @property
    def run(self) -> RunPaths:
        """Its folder."""
        return self._shell.home.run(self._run)

    def _follower(self, attempt: int) -> MetricFollower:
        if attempt not in self._followers:
            self._followers[attempt] = MetricFollower(self.run.attempt(attempt).metrics)
        return self._followers[attempt]

    def lines(self) -> MetricFollower:
        return self._follower(max(self.run.attempt_numbers(), default=1))

    def placed(self) -> float:
        return next(e.time for e in read(self.run.events) if isinstance(e.payload, AttemptPlaced))

    def victim(self) -> int:
        started = [e.payload for e in read(self.run.events) if isinstance(e.payload, RanksStarted)]
        return started[-1].pids["1"]

    def began(self, when: float) -> dict[str, float]:
        names = {VerdictFound: "found", RanksStarted: "started"}
        marks: dict[str, float] = {}
        log = read(self.run.events)
        if sum(isinstance(e.payload, RanksStarted) and e.time > when for e in log) > 1:
            print(self._shell.run("incidents", self._run), file=sys.stderr)
        for event in log:
            name = names.get(type(event.payload))
            if name and event.time > when:
                marks.setdefault(name, event.time)
        return marks


class Torchrun(RecoveryContestant):
    """`torchrun --max-restarts`."""

    name = "torchrun"

    def __init__(self, folder: Path, config: Path, ranks: int, ends: ExitStack) -> None:
        super().__init__()
        self._follower = MetricFollower(RunPaths(folder).attempt(1).metrics)
        words = [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc-per-node={ranks}",
                "--max-restarts=50",
            ),
            *(
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=127.0.0.1:0",
            ),
            *("-m", "trainer", "run", "--config", str(config)),
        ]
        self._process = launched(words, folder, ends, {"MEGARAY_RUN": str(folder)})

    def lines(self) -> MetricFollower:
        return self._follower

    def _ranks(self) -> dict[str, psutil.Process]:
        assert self._process is not None
        found = {}
        # Its children alone: ranks have children with the same variables.
        for child in psutil.Process(self._process.pid).children():
            try:
                found[child.environ().get("RANK", "")] = child
            except psutil.Error:
                continue
        return found

    def victim(self) -> int:
        return self._ranks()["1"].pid

    def began(self, when: float) -> dict[str, float]:
        return {"started": max(one.create_time() for rank, one in self._ranks().items() if rank)}


class RayTrain(RecoveryContestant):
    """`ray.train` with `FailureConfig(max_failures=…)`."""

    name = "Ray Train"

    def __init__(self, folder: Path, config: Path, ranks: int, gpus: int, ends: ExitStack) -> None:
        super().__init__()
        self._folder, self._follower = folder, MetricFollower(RunPaths(folder).attempt(1).metrics)
        module = "tests.cluster.ray_train_baseline"
        words = [sys.executable, "-m", module, str(config), str(folder), str(ranks), str(gpus)]
        self._process = launched(words, folder, ends, {"RAY_ADDRESS": ""})

    def lines(self) -> MetricFollower:
        return self._follower

    def victim(self) -> int:
        return int((self._folder / "pid-1").read_text())

    def began(self, when: float) -> dict[str, float]:
        return {"started": psutil.Process(self.victim()).create_time()}


def launched(
    words: Sequence[str], folder: Path, ends: ExitStack, more: dict[str, str]
) -> subprocess.Popen[bytes]:
    """A baseline's process; it ends with everything below it."""
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS",)} | more
    log = ends.enter_context((folder / "log").open("wb"))
    process = subprocess.Popen(
        words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )

    def end() -> None:
        try:
            leader = psutil.Process(process.pid)
            alive = [*leader.children(recursive=True), leader]
        except psutil.NoSuchProcess:
            alive = []
        for one in alive:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()

    ends.callback(end)
    return process


@contextmanager
def megaray(folder: Path, words: Sequence[str], ranks: int) -> Iterator[Megaray]:
    """A run on a local Ray of its own."""
    shell = Shell(HomePaths(folder / "home"), {"MEGARAY_STANDBYS": ""})  # as users have it
    shell.run("up", *(["--slots", str(ranks)]))
    try:
        yield Megaray(shell, words)
    finally:
        shell.run("down", "--yes")


def report(found: dict[str, list[Recovery]]) -> None:
    """Medians, ratios, parts."""
    middle = {name: median(one.total for one in each) for name, each in found.items()}
    for name, each in found.items():
        totals = " ".join(f"{one.total:.2f}" for one in each)
        print(f"{name:<10} kill to next step: median {middle[name]:.2f} s ({totals})")
        for part in each[0].parts:
            seconds = median(one.parts.get(part, 0.0) for one in each)
            print(f"    {part:<24} {seconds:8.3f} s")
        print(
            f"    first start {median(one.start for one in each):.2f} s, a step {median(one.step for one in each):.4f} s"
        )
        for part, seconds in each[0].start_parts.items():
            print(f"      of the start {part:<19} {seconds:6.3f} s")
    for name, each in found.items():
        if name != "megaray" and "megaray" in found:
            own = found["megaray"]
            steps = median(one.step for one in own) / median(one.step for one in each)
            starts = median(one.start for one in own) / median(one.start for one in each)
            print(
                f"megaray over {name}: {middle['megaray'] / middle[name]:.3f} (first start {starts:.3f}, step {steps:.4f})"
            )


def main(arguments: list[str]) -> None:
    """Measure in turn, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks, where there are no GPUs")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs, a rank each; say hardware=NAME too")
    parser.add_argument("--repeats", type=int, default=3, help="kills of each")
    parser.add_argument("--warm", type=float, default=WARM_SECONDS, help="seconds of training before a kill")
    parser.add_argument("--only", default="megaray,torchrun,raytrain", help="which of them")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument(
        "overrides", nargs="*", default=[], help="configuration, such as model=… hardware=h100"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    ranks, only = options.gpus or options.ranks, options.only.split(",")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    model = (
        []
        if any(word.startswith(("model=", "experiment=")) for word in options.overrides)
        else ["experiment=smoke"]
    )
    words = [*model, *RUN, f"parallel.dp={ranks}", *options.overrides]
    found: dict[str, list[Recovery]] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        config = resolved(Path(folder), words, ranks)
        for number in range(options.repeats):
            # One at a time: two that train would take the cores from each other.
            for name in only:
                place = Path(folder) / f"{name}-{number}"
                place.mkdir()
                with ExitStack() as ends:
                    if name == "megaray":
                        one: RecoveryContestant = ends.enter_context(megaray(place, words, ranks))
                    elif name == "torchrun":
                        one = Torchrun(place, config, ranks, ends)
                    elif why := cannot_import("ray.train"):
                        print(f"Ray Train is left out: {why}; pip install 'ray[train]'", flush=True)
                        continue
                    else:
                        one = RayTrain(place, config, ranks, options.gpus, ends)
                    try:
                        found.setdefault(one.name, []).append(one.measure(options.warm))
                    except RuntimeError as reason:
                        # What the others gave took minutes of GPUs; it isn't lost with this one.
                        print(f"{one.name}: {reason}\n{one.last_words(place)}", file=sys.stderr, flush=True)
                        failed.append(one.name)
                        continue
                    print(f"{one.name}: {found[one.name][-1].total:.2f} s", flush=True)
                if options.json:
                    options.json.write_text(
                        json.dumps({n: [vars(one) for one in each] for n, each in found.items()}, indent=1)
                    )
    report({name: each for name, each in found.items() if each})
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def cannot_import(module: str) -> str:
    """Why a program of this interpreter can't import it, in a line; empty where it can."""
    tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["no reason given"])[-1]


def resolved(folder: Path, words: Sequence[str], ranks: int) -> Path:
    """The configuration as a submission resolves it."""
    from configs.compose import compose, dump
    from trainer.sizing.search.planner import Capacity, plan

    path = folder / "config.yaml"
    path.write_text(dump(plan(compose(list(words)), Capacity.of_nodes([ranks]), strict=True).config))
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
