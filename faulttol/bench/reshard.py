"""What it costs to continue under another layout: our load beside DeepSpeed's universal conversion and load.

Ours reads the files that another layout has saved, each rank what it needs. DeepSpeed first writes all of it anew. All
start with the files out of the page cache, and with libraries loaded; the processes that DeepSpeed's converter starts are
its own affair. The ceiling is a plain read of our files by as many ranks and threads, which looks at nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import UserError
from faulttol.bench.contestants import fsync_all, size_of
from faulttol.bench.deepspeed_baseline import DeepSpeedSave, live, to_universal
from faulttol.bench.gang import BenchRank, run_ranks
from faulttol.bench.state import Share, shapes, share
from faulttol.checkpoint import load as loading
from faulttol.checkpoint.manifest import Identity
from faulttol.checkpoint.pieces import LoadTarget, owned
from faulttol.checkpoint.retention import Retention
from faulttol.checkpoint.save import save

_THREADS, _CHUNK = 4, 16 << 20
_TIMES_FASTER, _MOST_READ, _BUFFER = 5.0, 1.05, 256 << 20
_ROOM = 6
"""Times the state that the disk holds at once, at most: ours, DeepSpeed's, its fragments and its universal files."""


@dataclass(frozen=True)
class ReshardSpec:
    """What is measured."""

    size: int
    """Bytes of fp32 masters and moments over all ranks."""
    ranks: int
    """That save."""
    to: int
    """That load."""
    root: Path
    """Folder that is written in."""


@dataclass(frozen=True)
class Load:
    """One load of ours."""

    name: str
    """How the ranks cut the tensors."""
    seconds: float
    """On the slowest rank."""
    read: int
    """Bytes that all ranks read of storage."""
    needed: int
    """Bytes of what they wanted."""
    extra: int
    """Bytes of resident memory beside the tensors that were filled, on the rank that took most."""


@dataclass(frozen=True)
class ReshardResult:
    """All that was measured."""

    loads: list[Load]
    ceiling: float
    """Bytes a second of the plain read, the faster of two."""
    bytes: int
    """Of our files."""
    convert: float
    """Seconds of `ds_to_universal`."""
    universal: float
    """Seconds of DeepSpeed's load of what that wrote."""


# ---- on a rank ----


def _save_ours(place: BenchRank, spec: ReshardSpec) -> None:
    shares = share(shapes(spec.size), place.rank, place.world)
    identity = _identity(place)
    save(str(spec.root / "ours"), 1, owned(shares), identity, {}, place, Retention(1))


def _identity(place: BenchRank) -> Identity:
    return Identity("bench", 1, {"ep": place.world}, place.rank, place.world)


def _load_ours(place: BenchRank, spec: ReshardSpec, dim: int) -> Load:
    shares = share(shapes(spec.size), place.rank, place.world, dim)
    right = [float(one.tensor.view(-1)[0]) for one in shares]
    for one in shares:
        one.tensor.fill_(-1.0)  # every page is there before anything is measured
    wanted = [LoadTarget.from_slice(one.name, one.tensor, one.box) for one in shares]
    place.all(None)
    with _Memory() as memory:
        began = time.monotonic()
        restored = loading.restore(loading.stored(str(spec.root / "ours")), wanted, place, _identity(place))
        took = time.monotonic() - began
    assert restored is not None, "it was saved before"
    _check(shares, right)
    needed = sum(one.tensor.numel() * one.tensor.element_size() for one in shares)
    rows = place.all((took, restored.bytes, needed, memory.extra))
    return Load(
        "experts whole" if dim == 0 else "columns of each",
        max(row[0] for row in rows), sum(row[1] for row in rows), sum(row[2] for row in rows),
        max(row[3] for row in rows),
    )  # fmt: skip


def _check(shares: Sequence[Share], right: Sequence[float]) -> None:
    for one, value in zip(shares, right, strict=True):
        if not bool((one.tensor == value).all()):
            raise AssertionError(f"{one.name}{one.box} was loaded wrong")


class _Memory:
    """The most resident memory of this process within a `with`, over that before."""

    extra = 0
    """In bytes."""

    def __enter__(self) -> _Memory:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.extra = max(0, _status("VmHWM") - self._before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def _read_plainly(place: BenchRank, spec: ReshardSpec) -> tuple[int, float]:
    """Read our files, each by one rank; bytes over all ranks, and seconds of the slowest."""
    files = sorted(path for path in (spec.root / "ours").rglob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    first, last = (total * turn // place.world for turn in (place.rank, place.rank + 1))
    spans, at = [], 0
    for path in files:
        size = path.stat().st_size
        begin, end = max(first - at, 0), min(last - at, size)
        spans += [(path, place_, min(_CHUNK, end - place_)) for place_ in range(begin, end, _CHUNK)]
        at += size
    place.all(None)
    began = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        count = sum(pool.map(_read_span, spans))
    took = time.monotonic() - began
    rows = place.all((count, took))
    return sum(row[0] for row in rows), max(row[1] for row in rows)


def _read_span(span: tuple[Path, int, int]) -> int:
    path, at, size = span
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        view, count = memoryview(bytearray(size)), 0
        while count < size:
            got = file.readinto(view[count:])
            if not got:
                break
            count += got
    return count


def _save_deepspeed(place: BenchRank, spec: ReshardSpec) -> None:
    contestant = DeepSpeedSave(place, shapes(spec.size), spec.root)
    contestant.begin(1)
    contestant.durable()


def _convert(place: BenchRank, spec: ReshardSpec) -> float:  # noqa: ARG001  (the one rank that there is)
    folder = spec.root / "deepspeed"
    return to_universal(folder / "1", folder / "1_universal", spec.ranks)


def _load_universal(place: BenchRank, spec: ReshardSpec) -> float:
    contestant = DeepSpeedSave(place, shapes(spec.size), spec.root, universal=True)
    for tensor in contestant.tensors:
        tensor.fill_(-1.0)
    place.all(None)
    began = time.monotonic()
    contestant.engine.load_checkpoint(str(spec.root / "deepspeed"), tag="1_universal")
    took = time.monotonic() - began
    left = [number for number, one in enumerate(live(contestant.engine)) if bool((one == -1.0).any())]
    if left:
        raise AssertionError(f"DeepSpeed's load left tensors {left} of masters and moments as they were")
    return max(place.all(took))


# ---- the whole ----


def measure(spec: ReshardSpec, progress: Callable[[str], None] = lambda _: None) -> ReshardResult:
    """Save once in each way, then load under another layout, one after the other.

    Args:
        progress: gets the name of each part when it begins.

    Raises:
        UserError: where the folder's disk hasn't the room.
    """
    free = shutil.disk_usage(spec.root).free
    if free < _ROOM * spec.size:
        raise UserError(
            f"--path={spec.root} has {free >> 20} MiB free, and {_ROOM * spec.size >> 20} MiB are needed: name another "
            "folder, or type a smaller --gib"
        )
    with tempfile.TemporaryDirectory(prefix="megaray-bench-", dir=spec.root) as folder:
        here = replace(spec, root=Path(folder))
        progress("ours saves")
        run_ranks(spec.ranks, _save_ours, here)
        loads, rates = [], []
        for dim in (0, -1):
            progress("plain read")
            _forget(here.root)
            count, seconds = run_ranks(spec.to, _read_plainly, here)[0]
            rates.append(count / seconds)
            progress(f"ours loads, cut along {dim}")
            _forget(here.root)
            loads.append(run_ranks(spec.to, _load_ours, here, dim)[0])
        size = size_of(here.root / "ours")
        shutil.rmtree(here.root / "ours")
        progress("DeepSpeed saves")
        run_ranks(spec.ranks, _save_deepspeed, here)
        _forget(here.root)
        progress("ds_to_universal")
        convert = run_ranks(1, _convert, here)[0]
        _forget(here.root)
        progress("DeepSpeed loads")
        universal = run_ranks(spec.to, _load_universal, here)[0]
    return ReshardResult(loads, max(rates), size, convert, universal)


def _forget(folder: Path) -> None:
    """Have the files of a folder on the disk alone, not in the page cache."""
    fsync_all(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


@dataclass(frozen=True)
class ReshardBound:
    """A bound that ours must keep."""

    what: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def kept(self) -> bool:
        """Whether it does."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def bars(result: ReshardResult) -> list[ReshardBound]:
    """What was measured, against its bounds."""
    theirs = result.convert + result.universal
    kept = []
    for one in result.loads:
        kept.append(
            ReshardBound(
                f"{one.name}: times faster than DeepSpeed", theirs / one.seconds, _TIMES_FASTER, True
            )
        )
        kept.append(
            ReshardBound(f"{one.name}: bytes read, of what is needed", one.read / one.needed, _MOST_READ)
        )
        kept.append(ReshardBound(f"{one.name}: MiB of memory beside", one.extra / 2**20, _BUFFER / 2**20))
    return kept


def report(spec: ReshardSpec, result: ReshardResult) -> str:
    """A table and the bars."""
    lines = [
        f"{spec.size / 2**30:.2f} GiB of fp32 masters and moments, saved by {spec.ranks} ranks, loaded by {spec.to}; "
        f"{len(os.sched_getaffinity(0))} cores; files out of the page cache"
    ]
    for one in result.loads:
        rate = one.needed / one.seconds / 1e9
        lines.append(
            f"ours, {one.name:16} {one.seconds:8.2f} s {rate:6.2f} GB/s, {rate * 1e9 / result.ceiling:.2f} of the ceiling; "
            f"{one.extra >> 20} MiB beside"
        )
    lines.append(
        f"plain read             {result.bytes / result.ceiling:8.2f} s {result.ceiling / 1e9:6.2f} GB/s: the ceiling"
    )
    lines.append(
        f"DeepSpeed              {result.convert:8.2f} s to convert, {result.universal:.2f} s to load"
    )
    for bar in bars(result):
        word = "at least" if bar.at_least else "at most"
        lines.append(f"{'ok' if bar.kept else 'MISSED':6} {bar.what}: {bar.value:.2f} ({word} {bar.bound:g})")
    return "\n".join(lines)


def plain_data(spec: ReshardSpec, result: ReshardResult) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "bytes": spec.size,
        "ranks": spec.ranks,
        "to": spec.to,
        **asdict(result),
        "bars": [asdict(bar) | {"kept": bar.kept} for bar in bars(result)],
    }
