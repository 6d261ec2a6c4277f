"""The rows of a measurement one at a time: rank 0 of 1,024 ranks would need gigabytes for all of them at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from collectives.store.results import ResultStore, SweepRow, nccl_tests_json, parse_line, parse_row, write_csv
from configs.errors import from_json
from configs.paths import write_whole

Heartbeat = Callable[[], None]
"""Called between rows, to show that the rank is alive."""
Key = tuple[Any, ...]


class RowIndex:
    """Where the rows of a measurement begin in its file: of a case that was tried again, the last one.

    Args:
        store: a measurement whose rows nobody appends to meanwhile.
        alive: called for each row.
    """

    def __init__(self, store: ResultStore, alive: Heartbeat) -> None:
        self._path, self._alive = store.rows, alive
        self._begins: dict[Key, int] = {}
        self.cases: dict[tuple[str, str], list[int]] = {}
        """Begins of rows by operation and group, in the order they were measured."""
        self.heads: list[SweepRow] = []
        """Each row without its times, where it had some."""
        heads: dict[Key, SweepRow] = {}
        timed: set[Key] = set()
        for begin, row in self._lines():
            self._begins[row.key] = begin
            heads[row.key] = replace(row, out_of_place=None, in_place=None)
            (timed.add if row.timings else timed.discard)(row.key)
        for key, begin in self._begins.items():
            self.cases.setdefault((heads[key].op, heads[key].group), []).append(begin)
        self.heads = [head for key, head in heads.items() if key in timed]

    def _lines(self) -> Iterator[tuple[int, SweepRow]]:
        begin = 0
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):  # still being written, or torn
                    return
                self._alive()
                yield begin, parse_line(self._path, number, line)
                begin += len(line)

    def rows(self, begins: list[int] | None = None) -> Iterator[SweepRow]:
        """The rows that begin there, or all, each read when its turn comes."""
        if not self._begins:
            return
        with self._path.open("rb") as file:
            for begin in self._begins.values() if begins is None else begins:
                file.seek(begin)
                self._alive()
                yield parse_row(from_json(file.readline()))


def write_tables(store: ResultStore, alive: Heartbeat, ended: str | None = None) -> list[Path]:
    """Make nccl-tests' JSON of each operation and group, and the CSV of all rows; their paths.

    Args:
        store: a measurement whose rows nobody appends to meanwhile.
        alive: called for each row.
        ended: when the measurement was whole, of one that isn't marked as such yet.
    """
    about, marked = store.read_metadata()
    index, made = RowIndex(store, alive), list[Path]()
    for (op, group), begins in index.cases.items():
        # "DIV" is nccl-tests' own word for it, as in /2.
        made.append(store.folder / f"{op}.{group.replace('/', 'DIV')}.json")
        write_whole(made[-1], json.dumps(nccl_tests_json(about, list(index.rows(begins)), ended or marked)))
    if index.cases:
        made.append(store.folder / "results.csv")
        write_csv(made[-1], index.rows(), about)
    return made
