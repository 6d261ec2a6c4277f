"""What a save costs training, and how long it takes until it is durable: ours beside DeepSpeed's and torch's.

Every contestant saves the same state from as many ranks, in a loop of steps with real work that changes every tensor once a
step. Before each save the same bytes are written plainly with fsync, in the same way (training waits, or it continues), so
that both meet the same disk; what is compared with that is their ratio.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from faulttol.bench.contestants import Contestant, Dcp, Ours, PlainFile, size_of
from faulttol.bench.deepspeed_baseline import DeepSpeedSave
from faulttol.bench.gang import BenchRank, run_ranks
from faulttol.bench.state import shapes, share

KINDS = ("ours", "ours waiting", "DeepSpeed", "DCP save", "DCP async thread", "DCP async process")
_QUIET = 3
"""Steps without a save, which the others are compared with."""
_SQUARE = 384
"""Rows of the matrices that a step multiplies."""


@dataclass(frozen=True)
class SaveSpec:
    """What is measured."""

    size: int
    """Bytes of fp32 masters and moments over all ranks."""
    ranks: int
    saves: int
    """Of each contestant, after one that isn't counted: it takes memory that the others find there."""
    step: float
    """Seconds of forward and backward that a step has without a save."""
    root: Path
    """Folder that is written in."""


@dataclass(frozen=True)
class SaveSample:
    """One save."""

    held: float
    """Seconds that training stood still: the call, and the wait before the state may change; the longest of all ranks."""
    slow: float
    """Duration of a step while it was written, over that of a step without; 1 where none was."""
    durable: float
    """Seconds from the call until it was whole on storage."""
    plain: float
    """Seconds that plain writing and fsync of the live bytes took just before."""
    bytes: int
    """On storage."""


# ---- on a rank ----


class _Loop:
    """Training, as far as a save meets it.

    Args:
        seconds: of forward and backward in a step.
    """

    def __init__(self, place: BenchRank, contestant: Contestant, seconds: float) -> None:
        import torch

        self._place, self._contestant = place, contestant
        self._matrix = torch.full((_SQUARE, _SQUARE), 1e-3)
        self._count = 8
        self._place.all(None)  # all ranks at once, as in training
        took = statistics.mean(place.all(self._work())) / self._count
        self._count = max(1, round(seconds / took))

    def _work(self) -> float:
        began = time.monotonic()
        for _ in range(self._count):
            self._matrix @ self._matrix
        return time.monotonic() - began

    def step(self) -> tuple[float, float]:
        """Seconds of a step without the wait for a save, and of that wait."""
        began = time.monotonic()
        self._work()
        ready = time.monotonic()
        self._contestant.settle()
        free = time.monotonic()
        for tensor in self._contestant.tensors:
            tensor.add_(1e-3)
        self._place.all(None)  # as ranks meet to reduce gradients
        return time.monotonic() - began - (free - ready), free - ready

    def until(self, over: Callable[[], bool]) -> tuple[list[float], float]:
        """Steps until something is over on all ranks, at least one: seconds of each, and of all waits for a save."""
        steps: list[float] = []
        waited = 0.0
        while not steps or not all(self._place.all(over())):
            took, wait = self.step()
            steps.append(took)
            waited += wait
        return steps, waited


def _contestant(place: BenchRank, kind: str, spec: SaveSpec) -> Contestant:
    params = shapes(spec.size)
    if kind == "DeepSpeed":
        return DeepSpeedSave(place, params, spec.root)
    shares = share(params, place.rank, place.world)
    if kind.startswith("ours"):
        return Ours(place, shares, spec.root, background=kind == "ours")
    return Dcp(place, shares, spec.root, kind.split()[-1])


def _measure(place: BenchRank, kind: str, spec: SaveSpec) -> list[SaveSample]:
    """All saves of one contestant, on one rank."""
    contestant = _contestant(place, kind, spec)
    plain = PlainFile(contestant.tensors, spec.root / f"plain.{place.rank}", contestant.background)
    loop = _Loop(place, contestant, spec.step)
    samples = [_sample(place, loop, contestant, plain, number) for number in range(1, spec.saves + 2)]
    contestant.close()
    return samples[1:]


def _sample(place: BenchRank, loop: _Loop, contestant: Contestant, plain: PlainFile, step: int) -> SaveSample:
    _rest(place)
    plain.begin()
    if contestant.background:
        loop.until(lambda: plain.seconds is not None)
    plainly = max(place.all(plain.seconds))
    plain.remove()
    _rest(place)
    quiet = statistics.median(loop.step()[0] for _ in range(_QUIET))
    place.all(None)
    began = time.monotonic()
    contestant.begin(step)
    held = time.monotonic() - began
    steps: list[float] = []
    if contestant.background:
        steps, waited = loop.until(lambda: contestant.durable() is not None)
        held += waited
    durable = contestant.durable()
    assert durable is not None, "it is over"
    slow = statistics.mean(place.all(statistics.mean(steps) / quiet if steps else 1.0))
    size = place.broadcast(size_of(contestant.folder()) if place.rank == 0 else None)
    return SaveSample(max(place.all(held)), slow, max(place.all(durable - began)), plainly, size)


def _rest(place: BenchRank) -> None:
    """Let the disk get done with what was written before."""
    if place.rank == 0:
        os.sync()
    place.all(None)


# ---- the whole ----


@dataclass(frozen=True)
class SaveMedians:
    """Medians of a contestant's saves."""

    name: str
    held: float
    slow: float
    durable: float
    plain: float
    ratio: float
    """Of durable to plain, save by save."""
    bytes: int


def measure(
    spec: SaveSpec, kinds: Sequence[str] = KINDS, progress: Callable[[str], None] = lambda _: None
) -> list[SaveMedians]:
    """All contestants, one after the other, each with processes of its own.

    Args:
        progress: gets the name of each when it begins.

    Raises:
        UserError: where the folder's disk hasn't the room.
    """
    free = shutil.disk_usage(spec.root).free
    if free < 4 * spec.size:
        raise UserError(
            f"--path={spec.root} has {free >> 20} MiB free, and {4 * spec.size >> 20} MiB are needed: name another folder, "
            "or type a smaller --gib"
        )
    rows = []
    for kind in kinds:
        progress(kind)
        with tempfile.TemporaryDirectory(prefix="megaray-bench-", dir=spec.root) as folder:
            here = SaveSpec(spec.size, spec.ranks, spec.saves, spec.step, Path(folder))
            samples = run_ranks(spec.ranks, _measure, kind, here)[0]
        rows.append(_row(kind, samples))
    return rows


def _row(kind: str, samples: Sequence[SaveSample]) -> SaveMedians:
    def middle(value: Callable[[SaveSample], float]) -> float:
        return statistics.median(value(sample) for sample in samples)

    return SaveMedians(
        kind,
        middle(lambda s: s.held),
        middle(lambda s: s.slow),
        middle(lambda s: s.durable),
        middle(lambda s: s.plain),
        middle(lambda s: s.durable / s.plain),
        samples[-1].bytes,
    )


@dataclass(frozen=True)
class RatioBound:
    """A ratio that ours must keep."""

    what: str
    ratio: float
    most: float

    @property
    def kept(self) -> bool:
        """Whether it does."""
        return self.ratio <= self.most


def bars(rows: Sequence[SaveMedians]) -> list[RatioBound]:
    """What the measured contestants say of ours."""
    by = {row.name: row for row in rows}
    ours = by.get("ours")
    ratios = []
    if ours is not None and "DeepSpeed" in by:
        ratios.append(RatioBound("held, of DeepSpeed's", ours.held / by["DeepSpeed"].held, 0.1))
    rivals = [row for row in rows if row.name.startswith("DCP async")]
    if ours is not None and rivals:
        best = min(rivals, key=lambda row: row.held)
        ratios.append(RatioBound(f"held, of {best.name}'s", ours.held / best.held, 0.7))
    for name, how in (("ours", "beside training"), ("ours waiting", "training waits")):
        if name in by:
            ratios.append(RatioBound(f"durable, of plain writing, {how}", by[name].ratio, 1.2))
    return ratios


def report(spec: SaveSpec, rows: Sequence[SaveMedians]) -> str:
    """A table and the bars."""
    head = f"{spec.size / 2**30:.2f} GiB of fp32 masters and moments, {spec.ranks} ranks, {spec.saves} saves each, "
    head += f"forward and backward {spec.step:.2f} s, {len(os.sched_getaffinity(0))} cores; medians"
    lines = [
        head,
        f"{'':20} {'held s':>8} {'steps x':>8} {'durable s':>10} {'plain s':>8} {'of plain':>9} {'GiB':>6}",
    ]
    for row in rows:
        lines.append(
            f"{row.name:20} {row.held:8.3f} {row.slow:8.2f} {row.durable:10.2f} {row.plain:8.2f} {row.ratio:9.2f} "
            f"{row.bytes / 2**30:6.2f}"
        )
    for bar in bars(rows):
        lines.append(f"{'ok' if bar.kept else 'MISSED':6} {bar.what}: {bar.ratio:.3f} (at most {bar.most})")
    return "\n".join(lines)


def plain_data(spec: SaveSpec, rows: Sequence[SaveMedians]) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "bytes": spec.size,
        "ranks": spec.ranks,
        "rows": [asdict(row) for row in rows],
        "bars": [asdict(bar) | {"kept": bar.kept} for bar in bars(rows)],
    }
