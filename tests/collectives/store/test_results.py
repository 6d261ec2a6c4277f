"""What a measurement leaves behind: nccl-tests' JSON and table, the CSV, and rows that survive."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from collectives.report.table import ResultTable, number
from collectives.store import stream
from collectives.store.results import Metadata, ResultStore, SweepRow, Timing

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

# ---- nccl-tests' JSON, version 3, as src/util.cu of 2.19.6 writes it: which values are texts is theirs ----

INT, NUMBER, TEXT, FLAG, NUMBER_OR_NULL = "int", "number", "text", "flag", "number or null"
PLACEMENT = {"time": NUMBER, "alg_bw": NUMBER, "bus_bw": NUMBER, "nwrong": NUMBER_OR_NULL}
PER_ITERATION = {
    "skipped_iterations": INT, "min_us": NUMBER, "max_us": NUMBER, "avg_us": NUMBER, "p50_us": NUMBER, "p95_us": NUMBER,
    "p99_us": NUMBER, "stdev_us": NUMBER, "cv_pct": NUMBER, "times_us": [NUMBER], "per_process_max_times_us": [[NUMBER]],
}  # fmt: skip
DEVICE = {
    "rank": INT, "group": INT, "pid": INT, "hostname": TEXT, "device": INT, "device_hex": TEXT, "device_info": TEXT,
}  # fmt: skip
RESULT = {
    "size": INT, "count": INT, "type": TEXT, "redop": TEXT, "root": TEXT, "out_of_place": PLACEMENT,
    "out_of_place_per_iter": PER_ITERATION, "in_place": PLACEMENT, "in_place_per_iter": PER_ITERATION,
    "actual_iterations": INT, "experiment_name": TEXT,
}  # fmt: skip
CONFIG = {
    "nthreads": INT, "ngpus": INT, "minimum_bytes": INT, "maximum_bytes": INT, "step_factor": INT, "warmup_iters": INT,
    "iterations": INT, "aggregated_iterations": INT, "validation": INT, "graph": INT, "blocking_collectives": FLAG,
    "per_iter_timing": FLAG, "per_iter_skip": INT, "parallel_init": FLAG, "devices": [DEVICE],
}  # fmt: skip
SCHEMA = {
    "version": INT, "start_time": TEXT, "args": [TEXT], "env": [TEXT], "nccl_version": INT, "config": CONFIG,
    "results": [RESULT], "out_of_bounds": {"count": INT, "okay": FLAG},
    "average_bus_bandwidth": {"bandwidth": NUMBER, "okay": TEXT}, "errors": [TEXT], "end_time": TEXT,
}  # fmt: skip


def strays(value: Any, schema: Any, place: str = "") -> list[str]:
    """Places where a tree lacks what the schema says, or has another type; what it has besides is its own affair."""
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [place]
        return [stray for i, item in enumerate(value) for stray in strays(item, schema[0], f"{place}[{i}]")]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [place]
        return [s for k, kind in schema.items() for s in strays(value.get(k, ...), kind, f"{place}.{k}")]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        INT: number and isinstance(value, int),
        NUMBER: number and math.isfinite(value),
        TEXT: isinstance(value, str),
        FLAG: value in ("true", "false"),
        NUMBER_OR_NULL: value is None or number,
    }
    return [] if fits[schema] else [f"{place}: {value!r} is not a {schema}"]


def metadata(**settings: Any) -> Metadata:
    names = {
        "study": "sweep", "min_size": 8, "max_size": 1 << 20, "step_factor": 2, "step_size": None, "min_warmup": 1,
        "min_iterations": 20, "check": True, "timer": "auto", "sync": "loop",
    } | settings  # fmt: skip
    device = {"rank": 0, "group": 0, "pid": 4711, "hostname": "node-a", "device": 0, "device_hex": "0000:07:00",
              "device_info": "NVIDIA H100 80GB HBM3"}  # fmt: skip
    return Metadata(
        system={"devices": [device, device | {"rank": 1, "pid": 4712, "device": 1, "device_hex": "0000:0a:00"}]},
        software={"torch": "2.13.0", "backend": "nccl", "nccl_version": "2.29.3", "nccl_version_code": 22903,
                  "environment": {"NCCL_DEBUG": "WARN"}},
        settings={"collectives": names, "ranks": 2, "layout": {}, "network": "none", "arguments": ["run", "-b", "8"]},
        method={"clock": "host"},
        started="2026-01-02 03:04:05",
    )  # fmt: skip


def timing(mean: float, alg: float, bus: float, wrong: int | None = 0) -> Timing:
    ranks = ((mean, 2 * mean, 3 * mean, 4 * mean), (2 * mean, mean, 3 * mean, mean))
    return Timing(
        time_us=mean, ci_us=0.1, p50_us=mean, p95_us=mean, p99_us=mean, min_us=mean, max_us=mean, stdev_us=0.5,
        first_us=9.0, alg_bw=alg, bus_bw=bus, wire_bw=None, warmup=5, wrong=wrong, rank_times_us=ranks,
        times_us=(mean,) * 4,
    )  # fmt: skip


def row(**changes: Any) -> SweepRow:
    known: dict[str, Any] = {
        "op": "all_reduce", "group": "world", "ranks": 2, "groups": 1, "size": 1 << 20, "count": 1 << 18, "dtype": "float",
        "redop": "sum", "root": -1, "sweep": 0, "out_of_place": timing(12.5, 83.886, 83.886),
        "in_place": timing(10.0, 104.858, 104.858),
    }  # fmt: skip
    return SweepRow(**known | changes)


def stored(folder: Path, *rows: SweepRow, **settings: Any) -> ResultStore:
    store = ResultStore(folder)
    store.begin(metadata(**settings))
    for one in rows:
        store.append(one)
    return store


def written(store: ResultStore, name: str = "all_reduce.world") -> dict[str, Any]:
    store.end("2026-01-02 03:05:06")
    stream.write_tables(store, lambda: None)
    found = json.loads((store.folder / f"{name}.json").read_text())
    assert isinstance(found, dict)
    return found


def test_the_json_has_nccl_tests_schema(tmp_path: Path) -> None:
    tree = written(
        stored(tmp_path, row(), row(size=8, count=2), row(size=16, out_of_place=timing(1.0, 1, 1, None)))
    )
    assert strays(tree, SCHEMA) == []
    assert tree["version"] == 3
    assert [r["size"] for r in tree["results"]] == [1 << 20, 8, 16]
    assert [r["out_of_place"]["nwrong"] for r in tree["results"]] == [0, 0, None]
    assert tree["average_bus_bandwidth"]["okay"] == "unchecked"
    assert tree["megaray"]["started"] == tree["start_time"]


def test_a_step_in_bytes_and_an_unfinished_measurement(tmp_path: Path) -> None:
    store = stored(tmp_path, row(), step_size=64, sync="barrier", timer="graph")
    stream.write_tables(store, lambda: None)
    tree = json.loads((tmp_path / "all_reduce.world.json").read_text())
    assert tree["config"]["step_bytes"] == 64
    assert "step_factor" not in tree["config"]
    assert (tree["config"]["blocking_collectives"], tree["config"]["graph"]) == ("true", 1)
    assert tree["end_time"] is None


def test_wrong_elements_and_what_was_left_out(tmp_path: Path) -> None:
    left_out = row(size=1 << 40, out_of_place=None, in_place=None, note="out of memory")
    one_way = row(op="all_to_all", in_place=None)
    store = stored(
        tmp_path,
        row(in_place=timing(1.0, 1, 1, 3)),
        row(size=8, out_of_place=timing(1.0, 1, 1, 4)),
        left_out,
        one_way,
    )
    tree = written(store)
    assert tree["out_of_bounds"] == {"count": 7, "okay": "false"}
    assert (len(tree["results"]), tree["errors"]) == (2, ["out of memory"])
    lone = json.loads((tmp_path / "all_to_all.world.json").read_text())["results"][0]
    assert lone["in_place"] is None
    assert strays(lone, {k: v for k, v in RESULT.items() if not k.startswith("in_place")}) == []


def test_per_iteration_statistics_are_over_the_slowest_process(tmp_path: Path) -> None:
    found = written(stored(tmp_path, row()))["results"][0]["in_place_per_iter"]
    assert found["times_us"] == [20.0, 20.0, 30.0, 40.0]
    assert found["times_us"] == [max(times) for times in zip(*found["per_process_max_times_us"], strict=True)]
    figures = [found[f"{name}_us"] for name in ("min", "max", "avg", "p50", "p95", "p99", "stdev")]
    assert figures == pytest.approx([20.0, 40.0, 27.5, 30.0, 40.0, 40.0, 68.75**0.5])
    assert found["cv_pct"] == pytest.approx(100 * 68.75**0.5 / 27.5)


def test_the_csv_has_a_line_for_each_placement(tmp_path: Path) -> None:
    store = stored(
        tmp_path,
        row(),
        row(op="all_to_all", in_place=None),
        row(size=1 << 40, out_of_place=None, in_place=None, note="n"),
    )
    stream.write_tables(store, lambda: None)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    head = [line for line in lines if line.startswith("# ")]
    assert [line.split(":")[0][2:] for line in head] == [
        "system",
        "software",
        "settings",
        "method",
        "started",
    ]
    found = list(csv.DictReader(lines[len(head) :]))
    assert [(r["op"], r["placement"]) for r in found] == [
        ("all_reduce", "out_of_place"), ("all_reduce", "in_place"), ("all_to_all", "out_of_place"), ("all_reduce", None),
    ]  # fmt: skip
    assert (found[1]["time_us"], found[1]["bus_bw"], found[1]["iterations"]) == ("10.0", "104.858", "4")


def test_rows_come_back_as_they_were_and_a_torn_one_does_not(tmp_path: Path) -> None:
    store = stored(tmp_path, row(), row(size=8, in_place=None))
    with store.rows.open("ab") as file:
        file.write(b'{"op": "all_red')
    assert store.finished() == [row(), row(size=8, in_place=None)]
    store.append(row(size=16))
    assert [r.size for r in store.read().rows] == [1 << 20, 8, 16]
    assert store.read().ended is None


def test_of_a_case_that_was_tried_again_the_last_counts(tmp_path: Path) -> None:
    without = row(size=8, out_of_place=None, in_place=None, note="out of memory")
    store = stored(tmp_path, row(), without, row(size=16), without)
    assert store.finished() == [row(), without, row(size=16)]
    store.append(row(size=8))
    assert store.finished() == [row(), row(size=8), row(size=16)]


# ---- the table ----

GOLDEN = """\
#
# Collective test starting: all_reduce, 1 group of 2 ranks (world)
#                                                              out-of-place                       in-place          
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)        
     1048576        262144     float     sum      -1    12.50   83.89   83.89       0    10.00  104.86  104.86       0
           8             2  bfloat16     avg       0  1234567    0.00    0.00       0  1.2e+07  1234.5  123456     N/A
 17179869184    4294967296     int32    bxor       7     5.00    6.00    7.00       3      N/A     N/A     N/A     N/A
# 34359738368 B float sum: out of memory
# Out of bounds values : 3 FAILED
"""  # noqa: W291
"""Head, widths and figures as src/util.cu of nccl-tests 2.19.6 prints them: what it ends with a blank more ends here."""


def test_the_table_is_nccl_tests() -> None:
    out = io.StringIO()
    table = ResultTable(out)
    table.row(row())
    slow, wide = timing(1234567.0, 0.004, 0.004), timing(12_345_678.0, 1234.5, 123456.4, None)
    table.row(row(size=8, count=2, dtype="bfloat16", redop="avg", root=0, out_of_place=slow, in_place=wide))
    table.row(
        row(
            size=1 << 34,
            count=1 << 32,
            dtype="int32",
            redop="bxor",
            root=7,
            out_of_place=timing(5, 6, 7, 3),
            in_place=None,
        )
    )
    table.row(row(size=1 << 35, out_of_place=None, in_place=None, note="out of memory"))
    table.end()
    lines = out.getvalue().splitlines(keepends=True)
    assert "".join(lines[:10]) == GOLDEN
    assert lines[10].startswith("# Avg bus bandwidth    : 24730.4 ")


def test_the_table_begins_with_settings_and_devices() -> None:
    out = io.StringIO()
    ResultTable(out).begin(metadata(), 0)
    lines = out.getvalue().splitlines()
    assert "nThread 1 nGpus 1 minBytes 8 maxBytes 1048576 step: 2(factor)" in lines[1]
    assert lines[3:] == [
        "# Using devices",
        "#  Rank  0 Group  0 Pid   4711 on     node-a device  0 [0000:07:00] NVIDIA H100 80GB HBM3",
        "#  Rank  1 Group  0 Pid   4712 on     node-a device  1 [0000:0a:00] NVIDIA H100 80GB HBM3",
    ]


@pytest.mark.parametrize(
    ("value", "width", "text"),
    # getFloatStr in src/util.cu.
    [(0.004, 6, "0.00"), (999.99, 6, "999.99"), (999.996, 6, "1000.0"), (9999.94, 6, "9999.9"), (9999.96, 6, "10000"),
     (999999.4, 6, "999999"), (1e6, 6, "1e+06"), (9999.99, 7, "9999.99"), (12345678.0, 7, "1.2e+07")],
)  # fmt: skip
def test_a_figure_fits_its_column_as_nccl_tests_has_it(value: float, width: int, text: str) -> None:
    assert number(value, width) == text


def test_the_schema_finds_strays() -> None:
    assert strays({"count": 1, "okay": True}, {"count": INT, "okay": FLAG}) == [".okay: True is not a flag"]
    assert strays({"a": [1, "x"]}, {"a": [NUMBER]}) == [".a[1]: 'x' is not a number"]
    assert strays({"a": 1}, {"a": [INT]}) == [".a"]
