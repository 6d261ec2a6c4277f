"""`python -m tests.collectives.bench_thousand`: what a measurement of 1,024 ranks costs rank 0, simulated on one machine.

Sockets: those of the groups that control messages go over. Judging: 128 nodes of 8 GPUs, 130,048 directions in three
passes, healthy and with planted faults. Rows: as many as `collectives=acceptance` makes, each as large as one of 1,024
ranks is; the files are made of them as at the end of a measurement. The most memory is that of the whole process, with
torch in it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from collectives.analysis.judge import BandwidthFinding, judge, suspects
from collectives.store import stream
from collectives.store.results import Metadata, ResultStore, SweepRow, Timing
from collectives.studies.faults import ProbeRecord, schedule
from collectives.studies.sweep import series
from collectives.timing import measure
from collectives.timing.tree import levels
from configs.compose import compose

PER_NODE = 8
MESSAGE = 256 << 20
RATE = 46.0
"""GB/s of a sound pair of nodes."""
SOCKETS, JUDGING_SECONDS, ROW_BYTES, MEMORY_BYTES, SILENCE_SECONDS = 64, 5.0, 1e9, 1 << 30, 5.0


@dataclass
class Heartbeats:
    """When a rank showed that it is alive."""

    longest: float = 0.0
    """Seconds of the longest silence."""
    _last: float = field(default_factory=time.monotonic)

    def beat(self) -> None:
        """Show it."""
        now = time.monotonic()
        self.longest, self._last = max(self.longest, now - self._last), now


def most_sockets(world: int) -> int:
    """Of a rank: its peers in the groups of control messages."""
    return max(sum(len(group.ranks) - 1 for group in levels(rank, world)) for rank in range(world))


def recorded(
    world: int, slow_rank: int | None = None, slow_pair: tuple[int, int] | None = None
) -> ProbeRecord:
    """What rank 0 holds after three passes; a slow rank or pair has a quarter of its rate."""
    draw = np.random.default_rng(1)
    members = [
        {"address": f"10.0.0.{rank // PER_NODE}", "local_rank": rank % PER_NODE} for rank in range(world)
    ]
    lanes = [list(range(lane, world, PER_NODE)) for lane in range(PER_NODE)]
    record = ProbeRecord.of(lanes, members, MESSAGE)
    for _ in range(3):
        own = np.concatenate(
            [draw.lognormal(-2.3, 0.03, (world, 2)), draw.lognormal(-6.2, 0.03, (world, 5))], axis=1
        )
        record.add_compute_times(record.ranks, own)
        for pairings in schedule(lanes):
            times = MESSAGE / RATE / 1e9 * draw.lognormal(0, 0.02, (world, 11))
            times[draw.random(times.shape) < 0.01] *= 3
            for m in pairings:
                if slow_rank in (m.a, m.b) or slow_pair == (m.a, m.b):
                    times[[m.a, m.b]] *= 4
                record.add_messages(m, times, alone=False)
    return record


def judged(record: ProbeRecord, folder: Path) -> tuple[list[BandwidthFinding], float, Heartbeats]:
    """Findings, seconds of processor time to the last one with the suspects before, and the heartbeats meanwhile."""
    hardware, probes, beats = compose(["hardware=h100"]).hardware, record.probes(), Heartbeats()
    begun = time.process_time()
    suspects(probes, 0.6, hardware)
    beats.beat()
    found = judge(probes, 0.6, hardware)
    beats.beat()
    seconds = time.process_time() - begun
    with (folder / "probes.json").open("w") as file:
        for part in probes.json_parts():
            file.write(part)
            beats.beat()
    return found, seconds, beats


def rows(world: int) -> Iterator[SweepRow]:
    """The rows of `collectives=acceptance`, each with as many times as one of `world` ranks keeps."""
    config, draw = (
        compose(["collectives=acceptance", "workload=collectives"]).collectives,
        np.random.default_rng(2),
    )
    nodes = [rank // PER_NODE for rank in range(world)]
    layout = {"pp": 1, "dp": world, "cp": 1, "tp": 1, "ep": 1, "etp": 1}
    calls = max(1, measure._KEPT // world)
    own = tuple(tuple(np.round(draw.lognormal(4, 0.1, calls), 3).tolist()) for _ in range(world))
    each = tuple(np.round(draw.lognormal(4, 0.1, 200), 3).tolist())
    timing = Timing(
        time_us=55.0, ci_us=0.5, p50_us=54.0, p95_us=60.0, p99_us=70.0, min_us=50.0, max_us=80.0, stdev_us=3.0,
        first_us=900.0, alg_bw=1.0, bus_bw=2.0, wire_bw=None, warmup=5, wrong=0, rank_times_us=own, times_us=each,
    )  # fmt: skip
    for one in series(config, nodes, layout):
        for count in one.counts:
            yield replace(
                one.row(count, None), out_of_place=timing, in_place=timing if one.op.in_place else None
            )


def stored(folder: Path, world: int, share: float) -> tuple[int, float, Heartbeats, int]:
    """Rows, bytes of all of them, the heartbeats while the files are made, and how many rows were written.

    Args:
        folder: of the measurement.
        world: ranks.
        share: of the operations and groups whose rows are really written; the rest is counted.
    """
    store = ResultStore(folder)
    devices = [
        {"rank": r, "pid": r, "hostname": f"n{r // 8}", "device": r % 8, "group": 0} for r in range(world)
    ]
    hosts = [{"hostname": f"n{n}", "ranks": list(range(8 * n, 8 * n + 8))} for n in range(world // 8)]
    known = compose(["collectives=acceptance", "workload=collectives"]).collectives.model_dump(mode="json")
    settings = {"collectives": known, "arguments": [], "ranks": world, "layout": {}}
    software = {"environment": {}, "nccl_version_code": 0}
    store.begin(
        Metadata({"devices": devices, "hosts": hosts, "hardware": "h100"}, software, settings, {}, "now")
    )
    kinds: dict[tuple[str, str], int] = {}
    for row in rows(world):
        kinds[row.op, row.group] = kinds.get((row.op, row.group), 0) + 1
    wanted = set(list(kinds)[: max(1, round(share * len(kinds)))])
    written, beats = 0, Heartbeats()
    for row in rows(world):
        if (row.op, row.group) in wanted:
            store.append(row)
            written += 1
    total = sum(kinds.values())
    size = store.rows.stat().st_size * total / written
    beats = Heartbeats()
    stream.write_tables(store, beats.beat)
    beats.beat()
    return total, size, beats, written


def main() -> int:
    """Print each figure with its bound; the number of figures beyond theirs."""
    parser = argparse.ArgumentParser(prog="python -m tests.collectives.bench_thousand", description=__doc__)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument(
        "--share", type=float, default=0.1, help="of the rows that are really written; the size is of all"
    )
    options = parser.parse_args()
    beyond = 0

    def show(what: str, value: float, bound: float, unit: str) -> None:
        nonlocal beyond
        beyond += value > bound
        print(
            f"{what:<58} {value:>9.3g} {unit:<4} of at most {bound:.4g}{'  BEYOND' if value > bound else ''}",
            flush=True,
        )

    show(f"sockets of a rank for control, {options.ranks} ranks", most_sockets(options.ranks), SOCKETS, "")
    cases: list[tuple[str, int | None, tuple[int, int] | None]] = [
        ("healthy", None, None), ("slow adapter", 13, None), ("slow pair", None, (24, 40)),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        for name, slow_rank, slow_pair in cases:
            record = recorded(options.ranks, slow_rank, slow_pair)
            found, seconds, beats = judged(record, Path(folder))
            print(f"{name}: {len(record.directions)} directions, {json.dumps([str(one) for one in found])}")
            beyond += len(found) != (name != "healthy")
            show("  judging, with the suspects before (processor)", seconds, JUDGING_SECONDS, "s")
            show("  longest silence, probes.json written too", beats.longest, SILENCE_SECONDS, "s")
            del record
        total, size, beats, written = stored(Path(folder) / "rows", options.ranks, options.share)
        show(
            f"rows of collectives=acceptance ({total}, {written} written)", size / 1e9, ROW_BYTES / 1e9, "GB"
        )
        show("  longest silence while files are made", beats.longest, SILENCE_SECONDS, "s")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    show("memory of rank 0 at most", memory / 2**30, MEMORY_BYTES / 2**30, "GiB")
    return beyond


if __name__ == "__main__":
    sys.exit(main())
