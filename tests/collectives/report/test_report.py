"""Plots and report of measurements that are built here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from collectives.report.lateness import lateness
from collectives.report.number import number
from collectives.report.plots import MissingPlot, Plot, ReportData, draw
from collectives.report.write import FittedCurve, write
from collectives.store.results import Metadata, Results, ResultStore, SweepRow, Timing
from collectives.store.series import Baseline, series

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

RANKS = 4
HOSTILE = "<img src=x onerror=alert(1)>&\"'$a$"
FACTORS = {"all_reduce": 1.5, "all_gather": 0.75, "broadcast": 1.0, "barrier": 0.0}
SIZES = tuple(8 << 2 * i for i in range(12))
Speed = Callable[[str, int], float]


def metadata(hosts: Iterable[str] = ("node-a", "node-a", "node-b", "node-b")) -> Metadata:
    names = list(hosts)
    devices = [{"rank": i, "hostname": host, "device_info": "CPU"} for i, host in enumerate(names)]
    where = [
        {"hostname": host, "cores": 8, "ranks": [i for i, name in enumerate(names) if name == host]}
        for host in dict.fromkeys(names)
    ]
    return Metadata(
        system={"hosts": where, "devices": devices},
        software={"torch": "2.13", "environment": {"GLOO_DEVICE": "http://example.org/a"}},
        settings={"collectives": {"ops": ["all_reduce"], "min_size": 8}, "ranks": RANKS, "layout": {}},
        method={"clock": "host"},
        started="2026-01-02 03:04:05",
    )


def timing(size: int, mean: float, factor: float, wrong: int | None = 0, late: int = -1) -> Timing:
    """Times of a call; the rank that is `late` waits for nobody, and takes 0.6 of what the others take."""
    rng = random.Random(size)
    times = [mean * rng.gauss(1, 0.02) for _ in range(20)]
    ordered = sorted(times)
    rate = size / mean / 1e3
    ranks = tuple(tuple(t * (0.6 if r == late else 1.0) for t in times) for r in range(RANKS))
    return Timing(
        time_us=mean, ci_us=0.02 * mean, p50_us=ordered[9], p95_us=ordered[18], p99_us=1.2 * ordered[19],
        min_us=ordered[0], max_us=ordered[19], stdev_us=0.02 * mean, first_us=9 * mean, alg_bw=rate,
        bus_bw=rate * factor, wire_bw=None, warmup=5, wrong=wrong, rank_times_us=ranks, times_us=tuple(times),
    )  # fmt: skip


def row(op: str, size: int, mean: float, group: str = "world", **changes) -> SweepRow:
    known = {"ranks": RANKS, "groups": 1, "dtype": "float", "redop": "none", "root": -1, "sweep": 0}
    known |= {
        "out_of_place": timing(size, mean * 1.1, FACTORS[op]),
        "in_place": timing(size, mean, FACTORS[op]),
    }
    return SweepRow(op=op, group=group, size=size, count=size // 4, **known | changes)


def mean(op: str, size: int) -> float:
    """Microseconds: a latency and two slopes."""
    return 40 + 10 * list(FACTORS).index(op) + size / (2e3 if size < 1 << 20 else 4e3)


def measurement(folder: Path, meta: Metadata | None = None, speed: float = 1.0) -> ResultStore:
    """Three operations in two kinds of group, a barrier, and a size that didn't fit."""
    store = ResultStore(folder)
    store.begin(meta or metadata())
    for group in ("world", "node"):
        ranks = RANKS if group == "world" else RANKS // 2
        for op in ("all_reduce", "all_gather", "broadcast"):
            for size in SIZES:
                more = {"redop": "sum"} if op == "all_reduce" else {"root": 0} if op == "broadcast" else {}
                more |= {"ranks": ranks, "groups": RANKS // ranks}
                store.append(row(op, size, mean(op, size) / speed, group, **more))
    store.append(row("barrier", 0, 55.0))
    note = "out of memory: 32 GiB <wanted>"
    store.append(row("all_reduce", 1 << 35, 1.0, redop="sum", out_of_place=None, in_place=None, note=note))
    store.end("2026-01-02 03:14:05")
    return store


def fit(group: str = "world") -> FittedCurve:
    times = [40 + size / 2.5e3 for size in SIZES]
    low, high = [0.9 * t for t in times], [1.1 * t for t in times]
    return FittedCurve(
        "all_reduce", group, "float", "sum", SIZES, times, low, high, "1 segment", "40 µs and 2.5 GB/s"
    )


class HtmlPage(HTMLParser):
    """Tags, what they would load, and the text of a page; a tag that isn't closed in turn fails."""

    VOID = {"meta", "img", "br"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.events: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.events += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def reasons(report: ReportData) -> dict[str, str]:
    return {plot.title: plot.why for plot in draw(report) if isinstance(plot, MissingPlot)}


def test_everything_is_drawn_and_embedded(tmp_path):
    store = measurement(tmp_path / "now")
    baseline = measurement(tmp_path / "before", speed=1.25).read()
    pairs = [(a, b, 1.0 + a + b) for a in range(RANKS) for b in range(RANKS) if a != b]
    paths = write(
        store, fits=[fit()], baseline=baseline, pairs=pairs, curves=[(2.0, 1.8, 2.0), (1.0, 1.0, 1.0)]
    )
    *images, page = paths
    names = [
        f"{kind}.{group}"
        for kind in ("bandwidth", "latency", "ranks", "baseline")
        for group in ("world", "node")
    ]
    assert sorted(p.stem for p in images) == sorted([*names, "pairs", "residuals.world", "imbalance"])
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.parent == store.folder / "plots" for p in images)
    seen = HtmlPage(page)
    assert page == store.folder / "report.html"
    assert seen.tags.count("img") == len(images)
    assert "Not drawn" not in seen.text
    assert "1 segment: 40 µs and 2.5 GB/s. Median size of its residuals" in seen.text


def test_loads_nothing_and_runs_nothing(tmp_path):
    seen = HtmlPage(write(measurement(tmp_path))[-1])
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in seen.loads)
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert "http://example.org/a" in seen.text


def test_hostile_text_is_shown_and_not_run(tmp_path):
    store = measurement(tmp_path, metadata([HOSTILE] * RANKS))
    store.append(row("all_reduce", 64, 50.0, group="../<b>$x$", redop="<i>"))
    findings = [
        {"severity": "<u>", "what": HOSTILE, "where": HOSTILE, "evidence": {"<s>": [1.23456, HOSTILE]}}
    ]
    paths = write(store, findings=findings, pairs=[(0, 1, 2.0)], fits=[fit(HOSTILE)])
    seen = HtmlPage(paths[-1])
    assert not seen.events and not {"i", "u", "s"} & set(seen.tags)
    assert seen.tags.count("img") == len(paths) - 1
    assert HOSTILE in seen.text and "<s>: 1.235, " in seen.text
    assert all(path.parent == store.folder / "plots" for path in paths[:-1])


def test_what_has_no_data_is_told_and_not_drawn(tmp_path):
    store = ResultStore(tmp_path)
    store.begin(metadata())
    store.append(row("barrier", 0, 55.0, in_place=None))
    stale = tmp_path / "plots" / "bandwidth.world.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier report")
    seen = HtmlPage(write(store)[-1])
    assert not stale.exists()
    assert seen.tags.count("img") == 1, "the ranks' times at the barrier"
    for why in ("a bus bandwidth above zero", "no row has a size and a time", "no rates of pairs were given",
                "no fit was given", "no baseline was given", "no curve of imbalance was given"):  # fmt: skip
        assert why in seen.text
    assert "interrupted or is still running" in seen.text


def test_an_empty_measurement_is_told(tmp_path):
    store = ResultStore(tmp_path)
    store.begin(metadata())
    paths = write(store)
    assert len(paths) == 1
    seen = HtmlPage(paths[0])
    assert "nothing measured" in seen.text and "0 rows, 0 with times" in seen.text
    assert "no row has times of more than one rank" in seen.text


def test_fits_and_baselines_that_dont_meet_the_rows(tmp_path):
    results = measurement(tmp_path / "a").read()
    far = FittedCurve(
        "all_reduce", "world", "float", "sum", [1 << 40, 1 << 41], [1, 2], [1, 2], [1, 2], "far", ""
    )
    other = Results(results.metadata, tuple(r for r in results.rows if r.op == "barrier"))
    found = reasons(ReportData(results, fits=[far], baseline=other))
    assert found["Fit residuals, group world"] == "no measured size lies within those of a fit"
    assert "shares no operation" in found["Against the baseline"]


def test_verdict_counts_and_findings(tmp_path):
    store = measurement(tmp_path)
    store.append(
        row(
            "all_gather",
            4096,
            50.0,
            dtype="half",
            in_place=timing(4096, 50.0, 0.75, wrong=7),
            out_of_place=None,
        )
    )
    store.append(row("all_gather", 8192, 50.0, dtype="half", in_place=timing(8192, 50.0, 0.75, wrong=None)))
    assert "No findings were reported." in HtmlPage(write(store)[-1]).text
    findings = [
        {"severity": "critical", "what": "slow host", "where": "node-b", "evidence": "x0.5", "ranks": [2, 3]},
        {"severity": "info", "what": "cold start", "where": "all", "evidence": ""},
    ]
    page = write(store, findings=findings)[-1]
    text = HtmlPage(page).text
    assert "#wrong 7: elements differ" in text
    assert "1 of 149 timings weren't checked" in text
    assert "76 rows, 75 with times" in text
    assert "out of memory: 32 GiB <wanted>" in text
    assert "2 findings: 1 critical, 1 info." in text
    assert "x0.5; ranks: 2, 3" in text
    assert '<td class="bad">7</td>' in page.read_text()


def test_table_has_nccl_tests_columns(tmp_path):
    store = ResultStore(tmp_path)
    store.begin(metadata())
    one = replace(timing(1 << 20, 1234.5678, 1.5), call_us=2000.0)
    store.append(row("all_reduce", 1 << 20, 1.0, redop="sum", out_of_place=one, in_place=None))
    cells = HtmlPage(write(store)[-1]).text
    joined = "sizecounttyperedoproot" + "timeeachcallalgbwbusbw#wrong" * 2 + "Belements" + "µsµsGB/sGB/s" * 2
    assert joined in "".join(cells.split())
    assert "1048576262144floatsum-1" + "123520000.84931.2740" + "N/A" * 5 in "".join(cells.split())


def test_passes_and_multicast_have_their_columns(tmp_path):
    store = ResultStore(tmp_path)
    store.begin(metadata())
    wire = Timing(**vars(timing(4096, 50.0, 1.5)) | {"wire_bw": 0.0512})
    for sweep in (0, 1):
        store.append(row("all_reduce", 4096, 50.0, sweep=sweep, in_place=wire))
    text = "".join(HtmlPage(write(store)[-1]).text.split())
    assert "rootpasstimeeachcallalgbwbusbwwirebw#wrong" in text
    assert "0.05120" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (1234.5678, "1235"), (12345678.9, "12345679"), (12.3456, "12.35"), (0.99999, "1.0000"),
     (0.012345, "0.0123"), (0.00001234, "1.2e-05"), (float("inf"), "N/A")],
)  # fmt: skip
def test_numbers_have_sensible_digits(value, text):
    assert number(value) == text


def test_lines_are_bounded_and_the_rest_is_counted(tmp_path):
    kinds = ("float", "double", "half", "int8", "int32", "int64")
    rows = [row("all_reduce", size, 50.0, dtype=kind, redop="sum") for kind in kinds for size in (8, 64)]
    lines, left = series(rows, "world")
    assert [line.label for line in lines] == [f"all_reduce {kind} sum" for kind in kinds[:4]]
    assert left == 2
    plot = next(draw(ReportData(Results(metadata(), tuple(rows)))))
    assert isinstance(plot, Plot)
    assert plot.details == ("2 other types, reductions or roots are in the tables alone.",)


def test_the_late_rank_is_the_guilty_one_not_those_that_wait_for_it():
    rows = [row("all_reduce", size, 50.0, in_place=timing(size, 50.0, 1.5, late=2)) for size in (8, 64)]
    rows.append(row("all_reduce", 128, 1.0, in_place=None, out_of_place=None, note="out of memory"))
    assert lateness(rows, [range(RANKS)]) == (64, pytest.approx([0, 0, 0.4, 0]))
    one_of_two = lateness(rows, [(0, 1), (2, 3)])
    assert one_of_two == (64, pytest.approx([0, 0, 0.4, 0])), "each in its own group"
    slow_pair = timing(64, 50.0, 1.5)
    slow_pair = replace(
        slow_pair,
        rank_times_us=tuple((t * (1 + r // 2),) for r, (t, *_) in enumerate(slow_pair.rank_times_us)),
    )
    alone = lateness([row("all_reduce", 64, 50.0, in_place=slow_pair)], [(0, 1), (2, 3)])
    assert alone == (64, pytest.approx([0, 0, 0, 0])), "a slower group keeps no other one waiting"
    assert lateness([row("barrier", 0, 5.0, in_place=None, out_of_place=None)], [range(RANKS)]) is None


def test_a_rank_that_was_idle_is_not_late():
    """Of three ranks one is in no pair: its empty calls were the shortest, and so it seemed to keep the others waiting."""
    meta = metadata(("node-a", "node-a", "node-a"))
    meta = replace(meta, settings=meta.settings | {"ranks": 3})
    pair = timing(64, 50.0, 1.0)
    idle = replace(pair, rank_times_us=((0.1,) * 20, *pair.rank_times_us[:2]))
    rows = (row("all_reduce", 64, 50.0, group="pairs1", ranks=2, in_place=idle),)
    (plot,) = [p for p in draw(ReportData(Results(meta, rows))) if p.title.startswith("Lateness")]
    shares = plot.figure.axes[0].images[0].get_array()[:, 0]
    assert shares.mask.tolist() == [True, False, False] and shares[1:].tolist() == pytest.approx([0, 0])


def test_the_darkest_cell_of_the_map_of_ranks_is_the_late_rank():
    rows = [row(op, 64, 50.0, in_place=timing(64, 50.0, 1.5, late=1)) for op in ("all_reduce", "broadcast")]
    (plot,) = [
        p for p in draw(ReportData(Results(metadata(), tuple(rows)))) if p.title.startswith("Lateness")
    ]
    assert isinstance(plot, Plot)
    (image,) = plot.figure.axes[0].images
    colours = image.cmap(image.norm(image.get_array()))[:, 0, :3].sum(axis=1)
    assert colours.argmin() == 1 and (colours[[0, 2, 3]] > colours[1] + 1).all()
    assert image.get_array().shape == (RANKS, 1) and plot.details == (
        "Not shown, as some of its ranks may leave early: broadcast.",
    )


def test_residuals_are_of_medians_and_of_the_same_type_and_reduction():
    """A mean far above the median, and rows of another type, lie outside of a fit of medians of one type."""
    curve = fit()
    rows = []
    for size, us in zip(SIZES, curve.time_us, strict=True):
        rows.append(
            row(
                "all_reduce",
                size,
                us,
                redop="sum",
                in_place=replace(timing(size, us, 1.5), time_us=3 * us, p50_us=us),
            )
        )
        rows.append(row("all_reduce", size, 5 * us, redop="sum", dtype="half"))
        rows.append(row("all_reduce", size, 5 * us, redop="max"))
    (plot,) = [
        p
        for p in draw(ReportData(Results(metadata(), tuple(rows)), fits=[curve]))
        if p.title.startswith("Fit")
    ]
    assert isinstance(plot, Plot)
    assert f"{len(SIZES)} of {len(SIZES)} points within the interval" in plot.details[0]


def test_the_page_begins_with_a_table_of_what_was_measured(tmp_path):
    text = HtmlPage(write(measurement(tmp_path))[-1]).text
    begin, words = text[: text.index("Tables")], "".join(text.split())
    assert "time of the smallest (µs)" in begin and "best busbw (GB/s)" in begin
    first = (mean("all_reduce", 8) + 1.1 * mean("all_reduce", 8)) / 2
    assert f"all_reduceworldfloat8Bto32MiB{number(first)}" in words
    best = max(size / mean("all_reduce", size) / 1e3 * 1.5 for size in SIZES)
    assert f"{number(first)}{number(best)}32MiB0" in words


def test_a_page_of_a_study_says_what_it_probed(tmp_path):
    store = ResultStore(tmp_path)
    store.begin(
        replace(metadata(), settings={"collectives": {"study": "faults"}, "ranks": RANKS, "layout": {}})
    )
    pairs = [(a, b, 1.0 + a + b) for a in range(RANKS) for b in range(RANKS) if a != b]
    text = HtmlPage(write(store, pairs=pairs)[-1]).text
    assert "Collectives: what is slow" in text and "nothing measured" not in text and "0 rows" not in text
    assert "4 ranks, 12 directions: 2.000 to 6.000 GB/s, median 4.000. Slowest: rank 0 to 1 2.000" in text
    assert "Not drawn" not in text and "Tables" not in text
    store.begin(replace(metadata(), settings={"collectives": {"study": "moe"}, "ranks": RANKS, "layout": {}}))
    layer = {"routing": "zipf", "imbalance": 1.5, "bytes": 4096, "dispatch_us": 12.5, "hidden": None}
    store.write_json("moe", [layer])
    words = "".join(HtmlPage(write(store)[-1]).text.split())
    assert "expert-paralleltraffic" in words and "zipf1.500409612.50" in words


def test_words_are_not_split_in_the_middle(tmp_path):
    page = write(measurement(tmp_path))[-1].read_text()
    assert "overflow-wrap: anywhere" not in page and "word-break: break-all" not in page


def test_baseline_compares_like_with_like():
    now = [row("all_reduce", 4096, 50.0)]
    (line,), _ = series(now, "world")
    before = [row("all_reduce", 4096, 40.0), row("all_reduce", 4096, 40.0, ranks=8)]
    ratios = Baseline(Results(metadata(), tuple(before))).ratios(line, "in_place")
    assert ratios == {4096: (pytest.approx(0.8), pytest.approx(0.8 * 0.02 * 2**0.5))}
    assert Baseline(Results(metadata(), (before[1],))).ratios(line, "in_place") == {}
