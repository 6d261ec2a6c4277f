"""What rank 0 of many ranks does: it judges, keeps probes, reads rows one at a time, and shows that it is alive."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from collectives.analysis.judge import FindingKind, judge, suspects
from collectives.analysis.probes import Direction, Endpoint, Probes
from collectives.store import stream
from collectives.store.results import ResultStore
from collectives.store.stream import RowIndex
from collectives.studies.faults import ProbePair, ProbeRecord, _rates_text
from collectives.studies.journal import Journal
from configs.compose import compose
from configs.paths import RunPaths
from configs.rank import RankContext
from tests.collectives.bench_thousand import most_sockets, recorded
from tests.collectives.store.test_results import metadata, row, timing

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

HOPPER = compose(["hardware=h100"]).hardware
LOST = {"out_of_place": None, "in_place": None, "note": "out of memory"}


@pytest.fixture(scope="module")
def record() -> ProbeRecord:
    """Sixteen nodes of eight GPUs with two faults."""
    return recorded(128, slow_rank=13, slow_pair=(24, 40))


def test_two_faults_among_many_nodes_are_named_alone(record: ProbeRecord) -> None:
    probes = record.probes()
    assert len(probes.directions) == 8 * 16 * 15 and len(probes.endpoints) == 128
    found = [(finding.kind, finding.ranks) for finding in judge(probes, 0.6, HOPPER)]
    assert found == [(FindingKind.SLOW_NIC, (13,)), (FindingKind.SLOW_LINK, (24, 40))]
    lane = [rank for rank in range(5, 128, 8) if rank != 13]
    of_adapter = {one for rank in lane for one in ((13, rank), (rank, 13))}
    assert suspects(probes, 0.6, HOPPER) == of_adapter | {(24, 40), (40, 24)}


def test_probes_come_back_from_their_parts(record: ProbeRecord) -> None:
    probes = record.probes()
    parts = list(probes.json_parts())
    assert len(parts) > 3, "a sign of life between them"
    tree = json.loads("".join(parts))
    directions = [Direction(**{**d, "passes": tuple(map(tuple, d["passes"]))}) for d in tree["directions"]]
    again = Probes(tree["size"], tuple(Endpoint(**e) for e in tree["endpoints"]), tuple(directions))
    assert [(a, b) for a, b, _ in again.rates()] == [(a, b) for a, b, _ in probes.rates()]
    assert [r for *_, r in again.rates()] == pytest.approx([r for *_, r in probes.rates()], rel=1e-3)


def test_a_record_keeps_what_each_sender_timed() -> None:
    members = [{"address": f"10.0.0.{n}", "local_rank": 0} for n in range(3)]
    record = ProbeRecord.of([[0, 2]], members, 1000)
    assert record.ranks == [0, 2]
    times = np.array([[9.0, 1e-6, 2e-6, 3e-6], [np.nan] * 4, [8.0, 4e-6, 5e-6, 4e-6]])
    assert record.add_messages(ProbePair(0, 2), times, alone=False) == pytest.approx(0.25), (
        "of the slower way's median"
    )
    record.add_messages(ProbePair(0, 2), 2 * times, alone=True)
    there, back = record.probes().directions
    assert (there.pair, there.first, back.pair, back.first) == ((0, 2), 9.0, (2, 0), 8.0)
    assert np.array(back.passes) == pytest.approx(np.array([[4e-6, 5e-6, 4e-6], [8e-6, 1e-5, 8e-6]]))
    assert len(there.alone) == 1 and list(there.alone[0]) == pytest.approx([2e-6, 4e-6, 6e-6])
    own = np.full((3, 7), np.nan)
    own[0, :2], own[2] = (0.2, 0.1), np.arange(1, 8)
    assert record.add_compute_times([0, 2], own) == [100.0, 1000.0]
    first, last = record.probes().endpoints
    assert (first.cpu_seconds, first.device_seconds) == ((0.2, 0.1), ())
    assert (last.cpu_seconds, last.device_seconds) == ((1, 2), (3, 4, 5, 6, 7))


def test_a_line_of_many_pairs_names_the_slowest() -> None:
    few = {f"{n}-{n + 1}": 10.0 + n for n in range(3)}
    assert _rates_text(few) == "ranks 0-1 10 GB/s, ranks 1-2 11 GB/s, ranks 2-3 12 GB/s"
    text = _rates_text({f"{n}-9": 50.0 - n for n in range(40)})
    slowest = "ranks 39-9 11 GB/s, ranks 38-9 12 GB/s, ranks 37-9 13 GB/s"
    assert text == f"40 pairs, slowest {slowest}, fastest ranks 0-9 50 GB/s"


def kept(folder: Path) -> ResultStore:
    """Rows of two operations, one tried again, one without times, and a line that a killed writer left torn."""
    store = ResultStore(folder)
    store.begin(metadata())
    for one in (row(size=8), row(op="all_gather", redop="none"), row(size=16, **LOST), row(size=8, count=99)):
        store.append(one)
    with store.rows.open("a") as file:
        file.write('{"op": "all_red')
    return store


def test_rows_are_read_one_at_a_time_and_the_last_try_counts(tmp_path: Path) -> None:
    store, signs = kept(tmp_path), []
    index = RowIndex(store, lambda: signs.append(1))
    assert len(signs) == 4
    assert [one.key for one in index.rows()] == [one.key for one in store.finished()]
    assert list(index.rows()) == store.finished()
    assert [(head.size, head.count, head.timings) for head in index.heads] == [
        (8, 99, []),
        (1 << 20, 1 << 18, []),
    ]
    store.append(row(size=8, **LOST))
    assert [head.op for head in RowIndex(store, lambda: None).heads] == ["all_gather"], (
        "its last try has no times"
    )
    assert list(RowIndex(ResultStore(tmp_path / "none"), lambda: None).cases) == []


def test_files_are_those_of_all_rows_at_once(tmp_path: Path) -> None:
    store, signs = kept(tmp_path), []
    made = stream.write_tables(store, lambda: signs.append(1))
    assert [path.name for path in made] == ["all_reduce.world.json", "all_gather.world.json", "results.csv"]
    assert len(signs) == 4 + 3 + 3, "each row shows that the rank is alive, whenever it is read"
    tree = json.loads(made[0].read_text())
    assert [(one["size"], one["count"]) for one in tree["results"]] == [(8, 99)] and tree["errors"] == [
        "out of memory"
    ]
    lines = [line for line in made[2].read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 1 + 2 + 2 + 1


def test_a_resumed_journal_holds_no_times_in_memory(tmp_path: Path) -> None:
    beats: list[tuple[int, bool]] = []
    rank = RankContext(0, 2, 0, 2, "127.0.0.1", 29500, RunPaths(tmp_path), 1)
    kept(rank.run.measurement)
    with contextlib.redirect_stdout(io.StringIO()):
        journal = Journal(rank, lambda case, finished: beats.append((case, finished)))
        heads = journal.begin(metadata())
        assert [head.size for head in heads] == [8, 1 << 20] and not any(head.timings for head in heads)
        assert (journal.timed, journal.first_note, len(beats)) == (2, "", 4 + 3)
        journal.row(row(size=32, **LOST))
        assert (journal.timed, journal.first_note) == (2, "out of memory")
        journal.row(row(size=64, in_place=replace(timing(1.0, 1, 1), wrong=3)))
        assert journal.timed == 3 and [one.kind for one in journal.findings] == [FindingKind.WRONG_DATA]
        before = len(beats)
        journal.end()
    assert len(beats) - before > 5, (
        "making the files of many rows takes longer than a gang waits for a silent rank"
    )
    measured = json.loads(rank.paths.metrics.read_text().splitlines()[-2])
    assert measured["case"]["size"] == 64 and "times_us" not in measured["result"]


def test_the_last_line_waits_for_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it nobody knows that the measurement is done."""
    rank = RankContext(0, 2, 0, 2, "127.0.0.1", 29500, RunPaths(tmp_path), 1)
    kept(rank.run.measurement)
    real, refused = os.write, list[bytes]()

    def write(fd: int, text: bytes) -> int:
        if b'"ended"' in text and not refused:
            refused.append(bytes(text))
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, text)

    with contextlib.redirect_stdout(io.StringIO()):
        journal = Journal(rank)
        journal.begin(metadata())
        monkeypatch.setattr(os, "write", write)
        journal.end()
    assert refused and json.loads(rank.paths.metrics.read_text().splitlines()[-1])["kind"] == "ended"


def test_what_was_wrong_before_an_interruption_counts_at_the_end(tmp_path: Path) -> None:
    """Else the exit code would depend on when the first part was stopped."""
    rank = RankContext(0, 2, 0, 2, "127.0.0.1", 29500, RunPaths(tmp_path), 2)
    store = kept(rank.run.measurement)
    store.append(row(size=64, in_place=replace(timing(1.0, 1, 1), wrong=3)))
    store.append(row(size=16, in_place=replace(timing(1.0, 1, 1), wrong=2)))
    store.append(row(size=16))  # tried again, and right
    with contextlib.redirect_stdout(io.StringIO()):
        journal = Journal(rank)
        journal.begin(metadata())
        journal.end()
    assert [one.evidence["size"] for one in journal.findings] == [64]
    assert [one["kind"] for one in store.read_json("findings")] == ["wrong_data"]
    assert "finding" not in rank.paths.metrics.read_text(), "the attempt that made the row has said it"


def test_a_measurement_that_was_interrupted_before_its_first_row_is_resumed(tmp_path: Path) -> None:
    rank = RankContext(0, 2, 0, 2, "127.0.0.1", 29500, RunPaths(tmp_path), 2)
    ResultStore(rank.run.measurement).begin(metadata())
    with contextlib.redirect_stdout(io.StringIO()):
        journal = Journal(rank)
        assert journal.begin(metadata()) == [] and journal.findings == []


@pytest.mark.parametrize("timer", ["graph", "auto"])
def test_a_row_that_no_graph_held_says_so_where_one_was_to(timer: str, tmp_path: Path) -> None:
    """The times stay, as those of single launches; with `-G` the command then ends with exit code 3."""
    rank = RankContext(0, 2, 0, 2, "127.0.0.1", 29500, RunPaths(tmp_path), 1)
    single = replace(timing(1.0, 1, 1), uncaptured="operation not permitted when stream is capturing")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        journal = Journal(rank)
        journal.begin(metadata(timer=timer))
        journal.row(row(size=32, in_place=replace(timing(1.0, 1, 1), graph=True)))
        journal.row(row(size=64, in_place=single))
        journal.end()
    text = (
        "warning uncaptured: not measured by graph (-G), since a rank couldn't capture all_reduce of 64 bytes of float, "
        "group world: operation not permitted when stream is capturing"
    )
    assert [str(one) for one in journal.findings] == ([text] if timer == "graph" else [])
    assert (f"# {text}" in shown.getvalue().splitlines()) is (timer == "graph")
    tree = json.loads((rank.run.measurement / "all_reduce.world.json").read_text())
    assert tree["errors"] == [
        "64 B float sum: not measured by graph: operation not permitted when stream is capturing"
    ]
    lines = [
        line for line in (rank.run.measurement / "results.csv").read_text().splitlines() if line[0] != "#"
    ]
    cells = [
        (one["size"], one["graph"], one["uncaptured"])
        for one in csv.DictReader(lines)
        if one["placement"] == "in_place"
    ]
    assert cells == [("32", "True", ""), ("64", "False", single.uncaptured)]


def test_a_rank_has_few_sockets() -> None:
    assert most_sockets(1024) == 33
