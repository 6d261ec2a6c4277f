"""What a measurement writes while it runs: rows, the table, metric lines, findings."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from collectives.analysis.judge import BandwidthFinding, FindingKind
from collectives.report.table import ResultTable
from collectives.store import metadata, stream
from collectives.store.results import Metadata, ResultStore, SweepRow
from collectives.store.stream import RowIndex
from configs.metrics import EndedLine, FindingLine, MeasuredLine, MetricWriter, ResumedLine
from configs.rank import RankContext

Heartbeat = Callable[[int, bool], None]
"""Called with the number of the case, and whether it is finished: how a gang sees that a rank is alive."""


class Journal:
    """Writes a measurement's results on rank 0; on other ranks it only counts the finished cases."""

    def __init__(self, rank: RankContext, beat: Heartbeat | None = None) -> None:
        self.store = ResultStore(rank.run.measurement)
        self.finished = 0
        self.cases = 0
        self.findings: list[BandwidthFinding] = []
        self.timed = 0
        """Rows with times, on rank 0."""
        self.first_note = ""
        """Why the first row without times has none."""
        self._graphs = False
        self._rank, self._beat = rank, beat
        self._writes = rank.rank == 0
        self._lines: MetricWriter | None = None
        self._held: BinaryIO | None = None
        self.table = ResultTable(sys.stdout) if self._writes else None

    def begin(self, about: Metadata) -> list[SweepRow]:
        """Start, or continue the unfinished measurement that the folder holds.

        Returns:
            The rows that are done, without their times.

        Raises:
            UserError: where another command measures into the folder.
            OSError: where the folder can't be written.
        """
        if self._writes and self._rank.attempt == 1:  # of a run's attempts the controller lets one write
            self._held = self.store.lock()
        self._lines = MetricWriter(self._rank.paths.metrics) if self._writes else None
        kept: list[SweepRow] = []
        self._graphs = about.settings["collectives"]["timer"] == "graph"
        if self.store.metadata.exists():
            index = RowIndex(self.store, self.alive)
            kept = index.heads
            # They count for the exit code and in findings.json; the attempt that made the row wrote their lines.
            self.findings = [finding for row in index.rows() for finding in _row_findings(row, self._graphs)]
        else:
            self.store.begin(about)
        self.timed = len(kept)
        if self.table:
            self.table.begin(about, len(kept))
        self.finished = len(kept)
        if self._lines:
            facts = {"software": about.software, "system": about.system}
            self._lines.write(
                ResumedLine(time.time(), self._rank.attempt, len(kept), None, "nothing is trained", facts)
            )
        return kept

    def alive(self) -> None:
        """Send a heartbeat: the rank is at work on a case."""
        if self._beat:
            self._beat(self.finished, False)

    def row(self, row: SweepRow) -> None:
        """A case is finished."""
        self._count()
        if not self._writes:
            return
        self.store.append(row)
        self.timed += bool(row.timings)
        self.first_note = self.first_note or row.note
        if self.table:
            self.table.row(row)
        for finding in _row_findings(row, self._graphs):
            self.finding(finding)
        self._measured({name: getattr(row, name) for name in _CASE}, _figures(row), row.note)

    def step(self, case: dict[str, Any], result: dict[str, Any], text: str) -> None:
        """A step of a study that isn't a sweep is finished."""
        self._count()
        if self.table:
            self.table.line(text)
            self._measured(case, result, "")

    def note(self, text: str) -> None:
        """Print a line that isn't stored."""
        if self.table:
            self.table.line(text)

    def _count(self) -> None:
        self.finished += 1
        if self._beat:
            self._beat(self.finished, True)

    def finding(self, finding: BandwidthFinding) -> None:
        """Something is slow or wrong."""
        self.findings.append(finding)
        if self._lines and self.table:
            self.table.line(f"# {finding}")
            self._lines.write(FindingLine(time.time(), self._rank.attempt, finding.to_json()))

    def end(self) -> None:
        """All is measured; nothing is written after it.

        Raises:
            OSError: where the disk doesn't take the last lines: without them nobody knows that the measurement is done.
        """
        if not self._writes:
            return
        self.store.write_json("findings", [finding.to_json() for finding in self.findings])
        # A measurement that is marked as whole isn't continued: its files have to be there.
        ended = metadata.utc()
        stream.write_tables(self.store, self.alive, ended)
        self.store.end(ended)
        if self.table:
            self.table.end()
            files = sorted(path.name for path in self.store.folder.iterdir())
            self.table.line(f"# results: {self.store.folder} ({', '.join(files)})")
        assert self._lines is not None
        self._lines.write(EndedLine(time.time(), self._rank.attempt, self.finished, None, 0))
        self._lines.close()
        if self._held:
            self._held.close()

    def _measured(self, case: dict[str, Any], result: dict[str, Any], note: str) -> None:
        assert self._lines is not None
        self._lines.write(
            MeasuredLine(time.time(), self._rank.attempt, self.finished, self.cases, case, result, note)
        )


def _row_findings(row: SweepRow, graphs: bool) -> Iterator[BandwidthFinding]:
    """Findings that follow from one row alone.

    Args:
        graphs: a graph was to be replayed (`-G`), so that a row of other launches isn't what was to be measured.
    """
    case = f"{row.op} of {row.size} bytes of {row.dtype}, group {row.group}"
    wrong = sum(timing.wrong or 0 for timing in row.timings)
    evidence = {"op": row.op, "size": row.size}
    if wrong:
        what = f"{wrong} elements are wrong in {case}"
        yield BandwidthFinding(FindingKind.WRONG_DATA, what, evidence=evidence | {"wrong": wrong})
    reason = next((timing.uncaptured for timing in row.timings if timing.uncaptured), "")
    if graphs and reason:
        what = f"not measured by graph (-G), since a rank couldn't capture {case}: {reason}"
        yield BandwidthFinding(FindingKind.UNCAPTURED, what, evidence=evidence | {"reason": reason})


_CASE = ("op", "group", "ranks", "groups", "size", "count", "dtype", "redop", "root", "sweep")


def _figures(row: SweepRow) -> dict[str, Any]:
    """What a metric line holds of a row: the placement that is compared, without single iterations."""
    best = row.best
    if best is None:
        return {}
    tree = {
        name: value
        for name, value in vars(best).items()
        if not name.endswith("times_us")
        and not isinstance(value, str)
        and (value is None or math.isfinite(value))
    }
    return tree | {"cv": best.cv, "iterations": len(best.times_us)}
