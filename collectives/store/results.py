"""What a measurement consists of, and how it is stored: rows, and their files.

`rows.jsonl` is the truth: one row a line, appended when it is finished, so what is done survives whatever
comes. From it `stream.write_tables` makes nccl-tests' JSON (schema version 3, one file per operation and group) and a CSV.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, BinaryIO

from collectives.store.lock import lock
from configs.errors import UserError, from_json
from configs.paths import write_whole

_CHUNK = 1 << 20
_NEEDED = ("collectives", "ranks", "layout")
"""Settings that every reader asks metadata for."""
JSON_VERSION = 3
"""Of nccl-tests' schema (`src/util.cu`, release 2.19)."""


@dataclass(frozen=True)
class Timing:
    """Times of one case in one placement, in microseconds.

    `time_us` is what nccl-tests prints: calls in a row over their number, on each rank, averaged over the ranks. The
    other figures are of single calls, each as long as its slowest rank takes for it, as nccl-tests' `-I 1` has them.
    """

    time_us: float
    """Mean, as nccl-tests: all of the timed interval over its calls; the rates are from it."""
    ci_us: float
    """Half-width of that mean's confidence interval."""
    p50_us: float
    """Of single calls, as all that follow up to `stdev_us`."""
    p95_us: float
    p99_us: float
    min_us: float
    max_us: float
    stdev_us: float
    first_us: float
    """The very first call, which sets up connections."""
    alg_bw: float
    """GB/s: bytes in `size` over the mean time."""
    bus_bw: float
    """GB/s, by nccl-tests' factor."""
    wire_bw: float | None
    """GB/s on a device's link where the switch multiplies and reduces (NVLS, SHARP); None where that doesn't apply."""
    warmup: int
    """Untimed iterations before."""
    wrong: int | None
    """Elements that differ from the exact value, over all ranks; None where they weren't checked."""
    rank_times_us: tuple[tuple[float, ...], ...]
    """Single calls of each rank, by rank: the last ones where all of them would be too many to keep."""
    times_us: tuple[float, ...]
    """Each single call, of the slowest rank."""
    call_us: float = 0.0
    """Mean of single calls."""
    burst: int = 0
    """Calls that were launched in a row and waited for at the end; 0: each was waited for, as on CPUs."""
    graph: bool = False
    """The burst was a replayed graph, and not launched from Python."""
    uncaptured: str = ""
    """Why it was launched from Python where a graph was to be replayed: a rank couldn't capture it."""
    calls: int = 0
    """Calls that `time_us` is the mean of."""

    @property
    def cv(self) -> float:
        """Standard deviation over the mean of the iterations."""
        mean = sum(self.times_us) / len(self.times_us) if self.times_us else 0.0
        return self.stdev_us / mean if mean else 0.0


@dataclass(frozen=True)
class SweepRow:
    """One case of a sweep: an operation, a group, a type and a size."""

    op: str
    group: str
    """Kind of group, as configured."""
    ranks: int
    """Ranks of each group."""
    groups: int
    """Groups that ran at once."""
    size: int
    """Bytes, as nccl-tests prints them: the larger of what a rank sends and receives."""
    count: int
    """Elements of nccl-tests' `count` column."""
    dtype: str
    redop: str
    """`none` where nothing is reduced."""
    root: int
    """-1 where there is none."""
    sweep: int
    """Which pass, from 0."""
    out_of_place: Timing | None = None
    in_place: Timing | None = None
    note: str = ""
    """Why there are no times, where there are none."""
    time: float = 0.0
    """When it was finished, in seconds since the epoch."""

    @property
    def key(self) -> tuple[str | int, ...]:
        """What tells a case from others."""
        return (self.op, self.group, self.dtype, self.redop, self.root, self.size, self.sweep)

    @property
    def timings(self) -> list[Timing]:
        """Those that there are."""
        return [t for t in (self.out_of_place, self.in_place) if t is not None]

    @property
    def best(self) -> Timing | None:
        """The one to compare and to fit: in place where measured, as training does."""
        return self.in_place or self.out_of_place


@dataclass(frozen=True)
class Metadata:
    """What was measured on what, by which method."""

    system: dict[str, Any]
    """Hosts, devices by rank (nccl-tests' `devices`), processors, memory, kernel."""
    software: dict[str, Any]
    """Versions, backend, and the communication library's environment."""
    settings: dict[str, Any]
    """The configuration's `collectives`, network, ranks and layout."""
    method: dict[str, str]
    """How a figure comes about: clock, statistic, formulas."""
    started: str
    """UTC."""


@dataclass(frozen=True)
class Results:
    """A measurement, whole or as far as it came."""

    metadata: Metadata
    rows: tuple[SweepRow, ...]
    ended: str | None = None
    """UTC; None while it runs or where it was interrupted."""

    def cases(self) -> dict[tuple[str, str], list[SweepRow]]:
        """Rows by operation and group, in the order they were measured."""
        by_case: dict[tuple[str, str], list[SweepRow]] = {}
        for row in self.rows:
            by_case.setdefault((row.op, row.group), []).append(row)
        return by_case


class ResultStore:
    """The folder of one measurement."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def rows(self) -> Path:
        """One finished row a line."""
        return self.folder / "rows.jsonl"

    @property
    def metadata(self) -> Path:
        """System, software, settings, method."""
        return self.folder / "metadata.json"

    def begin(self, metadata: Metadata) -> None:
        """Make the folder, and write the metadata."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.metadata, json.dumps(asdict(metadata), indent=1))

    def append(self, row: SweepRow) -> None:
        """Keep a finished row; it has reached the kernel when this returns."""
        line = (json.dumps(asdict(row)) + "\n").encode()
        fd = os.open(self.rows, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _drop_torn_line(fd)
            while line:  # a full disk or a signal may cut a write short
                line = line[os.write(fd, line) :]
        finally:
            os.close(fd)

    def finished(self) -> list[SweepRow]:
        """Rows that are kept: of a case that was tried again the last, and no line that is still being written."""
        if not self.rows.exists():
            return []
        data = self.rows.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        rows = [parse_line(self.rows, number, line) for number, line in enumerate(lines, start=1)]
        return list({row.key: row for row in rows}.values())

    def read(self) -> Results:
        """The measurement as it stands.

        Raises:
            FileNotFoundError: where the folder holds none.
        """
        about, ended = self.read_metadata()
        return Results(about, tuple(self.finished()), ended)

    def read_metadata(self) -> tuple[Metadata, str | None]:
        """The metadata, and when the measurement ended; None where it runs or was interrupted.

        Raises:
            FileNotFoundError: where the folder holds none.
            UserError: where the file isn't what was written.
        """
        try:
            tree = from_json(self.metadata.read_text())
            ended = tree.pop("ended", None)
            about = Metadata(**tree)
            if missing := [key for key in _NEEDED if key not in about.settings]:
                raise TypeError(f"its settings have no {', '.join(missing)}")
            if not isinstance(about.system, dict):
                raise TypeError(f"system={about.system} is not an object")
            return about, ended
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.metadata} is damaged ({error}); put a copy of it there, or measure into another folder"
            ) from None

    def lock(self) -> BinaryIO:
        """Lock the folder against other writers, as long as what is returned is open and this process lives.

        Raises:
            UserError: where another process measures into it.
            OSError: where the folder can't be written.
        """
        return lock(self.rows, self.folder)

    def end(self, ended: str) -> None:
        """Mark the measurement as whole."""
        tree = from_json(self.metadata.read_text())
        write_whole(self.metadata, json.dumps(tree | {"ended": ended}, indent=1))

    def write_json(self, name: str, tree: Any) -> None:
        """Write the result of a study that isn't a sweep, as `name`.json."""
        write_whole(self.folder / f"{name}.json", json.dumps(tree, indent=1))

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote; None where it didn't."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        with self.readable(name):
            return from_json(path.read_text())

    @contextmanager
    def readable(self, name: str) -> Iterator[None]:
        """Around what reads the tree of `name`.json.

        Raises:
            UserError: where it isn't what was written.
        """
        try:
            yield
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(
                f"{self.folder / name}.json is damaged ({type(error).__name__}: {error}); put a copy of it there, or move "
                "it away to read what else was measured"
            ) from None


def nccl_tests_json(metadata: Metadata, rows: Sequence[SweepRow], ended: str | None) -> dict[str, Any]:
    """Rows of one operation and group in nccl-tests' schema; what that lacks is under `megaray`."""
    settings = metadata.settings["collectives"]
    wrong = sum(t.wrong or 0 for row in rows for t in row.timings)
    rates = [t.bus_bw for row in rows for t in row.timings]
    step = (
        {"step_bytes": settings["step_size"]}
        if settings["step_size"]
        else {"step_factor": settings["step_factor"]}
    )
    return {
        "version": JSON_VERSION,
        "start_time": metadata.started,
        "args": metadata.settings["arguments"],
        "env": [f"{name}={value}" for name, value in metadata.software["environment"].items()],
        "nccl_version": metadata.software["nccl_version_code"],
        "config": {
            "nthreads": 1,
            "ngpus": 1,
            "minimum_bytes": settings["min_size"],
            "maximum_bytes": settings["max_size"],
            **step,
            "warmup_iters": settings["min_warmup"],
            "iterations": settings["min_iterations"],
            "aggregated_iterations": 1,
            "validation": int(settings["check"]),
            "graph": int(settings["timer"] == "graph"),
            "blocking_collectives": _flag(settings["sync"] != "loop"),
            "per_iter_timing": _flag(True),
            "per_iter_skip": 0,
            "parallel_init": _flag(False),
            "devices": metadata.system["devices"],
        },
        "results": [_result(row) for row in rows if row.timings],
        "out_of_bounds": {"count": wrong, "okay": _flag(wrong == 0)},
        "average_bus_bandwidth": {
            "bandwidth": sum(rates) / len(rates) if rates else 0.0,
            "okay": "unchecked",
        },
        "errors": [text for row in rows for text in _errors(row)],
        "end_time": ended,
        "megaray": asdict(metadata),
    }


def _errors(row: SweepRow) -> Iterator[str]:
    """Why a row has no times, or not those of a graph."""
    if row.note:
        yield row.note
    for reason in dict.fromkeys(timing.uncaptured for timing in row.timings if timing.uncaptured):
        yield f"{row.size} B {row.dtype} {row.redop}: not measured by graph: {reason}"


def _result(row: SweepRow) -> dict[str, Any]:
    result: dict[str, Any] = {
        "size": row.size,
        "count": row.count,
        "type": row.dtype,
        "redop": row.redop,
        "root": str(row.root),
    }
    for name, timing in (("out_of_place", row.out_of_place), ("in_place", row.in_place)):
        if timing is None:
            result[name] = None
            continue
        result[name] = {
            "time": timing.time_us,
            "alg_bw": timing.alg_bw,
            "bus_bw": timing.bus_bw,
            "nwrong": timing.wrong,
        }
        result[f"{name}_per_iter"] = _per_iteration(timing.rank_times_us)
    most = max(len(t.times_us) for t in row.timings)
    return result | {"actual_iterations": most, "experiment_name": f"{row.op}.{row.group}", "pass": row.sweep}


def _per_iteration(ranks: Sequence[Sequence[float]]) -> dict[str, Any]:
    """nccl-tests' own statistics: an iteration lasts as long as the longest that a rank took for it by itself.

    On comparable clocks that includes what a rank waited for one that came later, and `time_us` doesn't.
    """
    times = [max(column) for column in zip(*ranks, strict=True)]
    ordered, count, mean, deviation = sorted(times), len(times), fmean(times), pstdev(times)
    return {
        "skipped_iterations": 0,
        "min_us": ordered[0],
        "max_us": ordered[-1],
        "avg_us": mean,
        "p50_us": ordered[count // 2],
        "p95_us": ordered[(count * 95 + 99) // 100 - 1],
        "p99_us": ordered[(count * 99 + 99) // 100 - 1],
        "stdev_us": deviation,
        "cv_pct": 100 * deviation / mean if mean else 0.0,
        "times_us": times,
        "per_process_max_times_us": [list(row) for row in ranks],
    }


_PLAIN = (
    "time_us", "ci_us", "calls", "burst", "graph", "uncaptured", "call_us", "p50_us", "p95_us", "p99_us", "min_us",
    "max_us", "cv", "alg_bw", "bus_bw", "wire_bw", "warmup", "first_us", "wrong",
)  # fmt: skip


def write_csv(path: Path, rows: Iterable[SweepRow], metadata: Metadata) -> None:
    """One line for each case and placement, under `# key: value` lines with the metadata."""
    names = ("op", "group", "ranks", "groups", "size", "count", "dtype", "redop", "root", "sweep", "note")
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        for name, value in asdict(metadata).items():
            file.write(f"# {name}: {json.dumps(value)}\n")
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*names, "placement", "iterations", *_PLAIN])
        for row in rows:
            base = [getattr(row, name) for name in names]
            for placement, timing in (("out_of_place", row.out_of_place), ("in_place", row.in_place)):
                if timing is not None:
                    values = [getattr(timing, name) for name in _PLAIN]
                    out.writerow([*base, placement, len(timing.times_us), *values])
            if not row.timings:
                out.writerow(base)
    temporary.replace(path)


def parse_line(path: Path, number: int, line: bytes) -> SweepRow:
    """The row of a line.

    Raises:
        UserError: where it isn't what `ResultStore.append` wrote.
    """
    try:
        return parse_row(from_json(line))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"line {number} of {path} is damaged ({type(error).__name__}: {error}); remove the line, and its case is "
            "measured anew where the measurement isn't finished"
        ) from None


def parse_row(tree: dict[str, Any]) -> SweepRow:
    """A row that `ResultStore.append` wrote, from its line's tree."""
    names = {f.name for f in fields(Timing)}
    for placement in ("out_of_place", "in_place"):
        timing = tree[placement]
        if timing is not None:
            timing["rank_times_us"] = tuple(map(tuple, timing["rank_times_us"]))
            timing["times_us"] = tuple(timing["times_us"])
            tree[placement] = Timing(**{name: value for name, value in timing.items() if name in names})
            _check_numbers(tree[placement])
            if not tree[placement].time_us > 0:
                raise ValueError(f"time_us={tree[placement].time_us} is not above 0")
    row = SweepRow(**tree)
    _check_numbers(row)
    return row


def _check_numbers(part: SweepRow | Timing) -> None:
    """Refuse what isn't a number where one must be: it would fail far from the damaged line."""
    for field in fields(part):
        value = getattr(part, field.name)
        if field.type in ("int", "float") and not isinstance(value, int | float):
            raise TypeError(f"{field.name}={value!r} is not a number")


def _drop_torn_line(fd: int) -> None:
    """Cut a line off that a writer left without its end: it is of a rank that was killed, and its case is measured anew."""
    size = begin = os.lseek(fd, 0, os.SEEK_END)
    if not size or os.pread(fd, 1, size - 1) == b"\n":
        return
    place = -1
    while begin and place < 0:
        begin = max(0, begin - _CHUNK)
        place = os.pread(fd, _CHUNK, begin).rfind(b"\n")
    if begin + place + 1 < size:
        os.ftruncate(fd, begin + place + 1)


def _flag(value: bool) -> str:
    """nccl-tests writes truth values as text, and its readers expect that."""
    return "true" if value else "false"
