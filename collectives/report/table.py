"""The table as nccl-tests prints it, line by line as the cases are finished."""

from __future__ import annotations

from typing import TextIO

from collectives.store.results import Metadata, SweepRow, Timing

_HEAD = "# {:>10}  {:>12}  {:>8}  {:>6}  {:>6}"
_BODY = "{:12d}  {:12d}  {:>8}  {:>6}  {:>6}"
_CELLS = "  {:>7}  {:>6}  {:>6}  {:>6}"


def number(value: float, width: int) -> str:
    """A figure in at most `width` characters: two decimals, one, none, or as a power of ten."""
    for decimals in (2, 1, 0):
        text = f"{value:.{decimals}f}"
        if len(text) <= width:
            return text
    return f"{value:.1e}" if width >= 7 else f"{value:.0e}"


class ResultTable:
    """Prints a measurement as it runs: heads, rows, and the summary that nccl-tests ends with."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._open = ""
        self._wrong = 0
        self._rates: list[float] = []

    def begin(self, metadata: Metadata, kept: int) -> None:
        """What is measured, on what."""
        settings, software = metadata.settings["collectives"], metadata.software
        what = "as nccl-tests 2.19" if settings["study"] == "sweep" else f"study {settings['study']}"
        step = (
            f"{settings['step_size']}(bytes)"
            if settings["step_size"]
            else f"{settings['step_factor']}(factor)"
        )
        version = f" {software['nccl_version']}" if software["nccl_version"] else ""
        self.line(f"# megaray collectives, torch {software['torch']}, {software['backend']}{version}, {what}")
        if settings["study"] == "sweep":
            self.line(
                f"# nThread 1 nGpus 1 minBytes {settings['min_size']} maxBytes {settings['max_size']} step: {step} "
                f"warmup iters: {settings['min_warmup']}+ iters: {settings['min_iterations']}+ agg iters: 1 "
                f"validation: {int(settings['check'])} graph: {int(settings['timer'] == 'graph')}"
            )
        self.line("#")
        self.line("# Using devices")
        for d in metadata.system["devices"]:
            self.line(
                f"#  Rank {d['rank']:2d} Group {d['group']:2d} Pid {d['pid']:6d} on {d['hostname']:>10} device "
                f"{d['device']:2d} [{d['device_hex']}] {d['device_info']}"
            )
        if kept:
            self.line(f"# {kept} rows are already measured; the sweep continues after them")

    def row(self, row: SweepRow) -> None:
        """One finished case, under a head where a new operation begins."""
        case = f"{row.op}, {row.groups} group{'s' * (row.groups > 1)} of {row.ranks} ranks ({row.group})"
        if case != self._open:
            self._head(case)
        for timing in row.timings:
            self._wrong += timing.wrong or 0
            self._rates.append(timing.bus_bw)
        body = _BODY.format(row.size, row.count, row.dtype, row.redop, str(row.root))
        cells = _cells(row.out_of_place) + _cells(row.in_place)
        self.line(f"# {row.size} B {row.dtype} {row.redop}: {row.note}" if row.note else body + cells)

    def _head(self, case: str) -> None:
        self._open = case
        blank = _HEAD.format(*[""] * 5)
        units = ("(us)", "(GB/s)", "(GB/s)", "")
        names = ("time", "algbw", "busbw", "#wrong")
        self.line("#")
        self.line(f"# Collective test starting: {case}")
        self.line(f"{blank}           out-of-place                       in-place          ")
        self.line(_HEAD.format("size", "count", "type", "redop", "root") + 2 * _CELLS.format(*names))
        self.line(_HEAD.format("(B)", "(elements)", "", "", "") + 2 * _CELLS.format(*units))

    def end(self) -> None:
        """The sums of a sweep."""
        if not self._rates:
            return
        mean = sum(self._rates) / len(self._rates)
        self.line(f"# Out of bounds values : {self._wrong} {'FAILED' if self._wrong else 'OK'}")
        self.line(
            f"# Avg bus bandwidth    : {mean:g} (over all rows; comparable between the same sweeps only)"
        )
        self.line("#")

    def line(self, text: str) -> None:
        """Print one line now."""
        self._stream.write(text + "\n")
        self._stream.flush()


def _cells(timing: Timing | None) -> str:
    if timing is None:
        return _CELLS.format("N/A", "N/A", "N/A", "N/A")
    wrong = "N/A" if timing.wrong is None else f"{timing.wrong:g}"
    return _CELLS.format(
        number(timing.time_us, 7), number(timing.alg_bw, 6), number(timing.bus_bw, 6), wrong
    )  # fmt: skip
