"""Plots and report of measurements that are built here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from collectives.report.plots import Material, Missing, Plot, draw
from collectives.report.write import Curve, number, write
from collectives.store.results import Metadata, Results, Row, Store, Timing
from collectives.store.series import Baseline, rank_ratios, series

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

RANKS = 4
HOSTILE = "<img src=x onerror=alert(1)>&\"'$a$"
FACTORS = {"all_reduce": 1.5, "all_gather": 0.75, "broadcast": 1.0, "barrier": 0.0}
SIZES = tuple(8 << 2 * i for i in range(12))
Speed = Callable[[str, int], float]


def metadata(hosts: Iterable[str] = ("node-a", "node-a", "node-b", "node-b")) -> Metadata:
    devices = [{"rank": i, "hostname": host, "device_info": "CPU"} for i, host in enumerate(hosts)]
    return Metadata(
        system={"hosts": [{"hostname": host, "cores": 8} for host in hosts], "devices": devices},
        software={"torch": "2.13", "environment": {"GLOO_DEVICE": "http://example.org/a"}},
        settings={"collectives": {"ops": ["all_reduce"], "min_size": 8}, "ranks": RANKS, "layout": {}},
        method={"clock": "host"},
        started="2026-01-02 03:04:05",
    )


def timing(size: int, mean: float, factor: float, wrong: int | None = 0, slow: int = -1) -> Timing:
    rng = random.Random(size)
    times = [mean * rng.gauss(1, 0.02) for _ in range(20)]
    ordered = sorted(times)
    rate = size / mean / 1e3
    ranks = tuple(tuple(t * (1.0 if r == slow or slow < 0 else 0.6) for t in times) for r in range(RANKS))
    return Timing(
        time_us=mean, ci_us=0.02 * mean, p50_us=ordered[9], p95_us=ordered[18], p99_us=1.2 * ordered[19],
        min_us=ordered[0], max_us=ordered[19], stdev_us=0.02 * mean, first_us=9 * mean, alg_bw=rate,
        bus_bw=rate * factor, wire_bw=None, warmup=5, wrong=wrong, rank_times_us=ranks, times_us=tuple(times),
    )  # fmt: skip


def row(op: str, size: int, mean: float, group: str = "world", **changes) -> Row:
    known = {"ranks": RANKS, "groups": 1, "dtype": "float", "redop": "none", "root": -1, "sweep": 0}
    known |= {
        "out_of_place": timing(size, mean * 1.1, FACTORS[op]),
        "in_place": timing(size, mean, FACTORS[op]),
    }
    return Row(op=op, group=group, size=size, count=size // 4, **known | changes)


def mean(op: str, size: int) -> float:
    """Microseconds: a latency and two slopes."""
    return 40 + 10 * list(FACTORS).index(op) + size / (2e3 if size < 1 << 20 else 4e3)


def measurement(folder: Path, meta: Metadata | None = None, speed: float = 1.0) -> Store:
    """Three operations in two kinds of group, a barrier, and a size that didn't fit."""
    store = Store(folder)
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


def fit(group: str = "world") -> Curve:
    times = [40 + size / 2.5e3 for size in SIZES]
    low, high = [0.9 * t for t in times], [1.1 * t for t in times]
    return Curve("all_reduce", group, SIZES, times, low, high, "1 segment", "40 µs and 2.5 GB/s")


class Page(HTMLParser):
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


def reasons(material: Material) -> dict[str, str]:
    return {plot.title: plot.why for plot in draw(material) if isinstance(plot, Missing)}


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
    seen = Page(page)
    assert page == store.folder / "report.html"
    assert seen.tags.count("img") == len(images)
    assert "Not drawn" not in seen.text
    assert "1 segment: 40 µs and 2.5 GB/s. Median size of its residuals" in seen.text


def test_loads_nothing_and_runs_nothing(tmp_path):
    seen = Page(write(measurement(tmp_path))[-1])
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
    seen = Page(paths[-1])
    assert not seen.events and not {"i", "u", "s"} & set(seen.tags)
    assert seen.tags.count("img") == len(paths) - 1
    assert HOSTILE in seen.text and "<s>: 1.235, " in seen.text
    assert all(path.parent == store.folder / "plots" for path in paths[:-1])


def test_what_has_no_data_is_told_and_not_drawn(tmp_path):
    store = Store(tmp_path)
    store.begin(metadata())
    store.append(row("barrier", 0, 55.0, in_place=None))
    stale = tmp_path / "plots" / "bandwidth.world.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier report")
    seen = Page(write(store)[-1])
    assert not stale.exists()
    assert seen.tags.count("img") == 1, "the ranks' times at the barrier"
    for why in ("a bus bandwidth above zero", "no row has a size and a time", "no rates of pairs were given",
                "no fit was given", "no baseline was given", "no curve of imbalance was given"):  # fmt: skip
        assert why in seen.text
    assert "interrupted or is still running" in seen.text


def test_an_empty_measurement_is_told(tmp_path):
    store = Store(tmp_path)
    store.begin(metadata())
    paths = write(store)
    assert len(paths) == 1
    seen = Page(paths[0])
    assert "nothing measured" in seen.text and "0 rows, 0 with times" in seen.text
    assert "no row has times of more than one rank" in seen.text


def test_fits_and_baselines_that_dont_meet_the_rows(tmp_path):
    results = measurement(tmp_path / "a").read()
    far = Curve("all_reduce", "world", [1 << 40, 1 << 41], [1, 2], [1, 2], [1, 2], "far", "")
    other = Results(results.metadata, tuple(r for r in results.rows if r.op == "barrier"))
    found = reasons(Material(results, fits=[far], baseline=other))
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
    assert "No findings were reported." in Page(write(store)[-1]).text
    findings = [
        {"severity": "critical", "what": "slow host", "where": "node-b", "evidence": "x0.5", "ranks": [2, 3]},
        {"severity": "info", "what": "cold start", "where": "all", "evidence": ""},
    ]
    page = write(store, findings=findings)[-1]
    text = Page(page).text
    assert "#wrong 7: elements differ" in text
    assert "1 of 149 timings weren't checked" in text
    assert "76 rows, 75 with times" in text
    assert "out of memory: 32 GiB <wanted>" in text
    assert "2 findings: 1 critical, 1 info." in text
    assert "x0.5; ranks: 2, 3" in text
    assert '<td class="bad">7</td>' in page.read_text()


def test_table_has_nccl_tests_columns(tmp_path):
    store = Store(tmp_path)
    store.begin(metadata())
    one = timing(1 << 20, 1234.5678, 1.5)
    store.append(row("all_reduce", 1 << 20, 1.0, redop="sum", out_of_place=one, in_place=None))
    cells = Page(write(store)[-1]).text
    joined = "sizecounttyperedoproot" + "timealgbwbusbw#wrong" * 2 + "Belements" + "µsGB/sGB/s" * 2
    assert joined in "".join(cells.split())
    assert "1048576262144floatsum-1" + "12350.84931.2740" + "N/A" * 4 in "".join(cells.split())


def test_passes_and_multicast_have_their_columns(tmp_path):
    store = Store(tmp_path)
    store.begin(metadata())
    wire = Timing(**vars(timing(4096, 50.0, 1.5)) | {"wire_bw": 0.0512})
    for sweep in (0, 1):
        store.append(row("all_reduce", 4096, 50.0, sweep=sweep, in_place=wire))
    text = "".join(Page(write(store)[-1]).text.split())
    assert "rootpasstimealgbwbusbwwirebw#wrong" in text
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
    plot = next(draw(Material(Results(metadata(), tuple(rows)))))
    assert isinstance(plot, Plot)
    assert plot.details == ("2 other types, reductions or roots are in the tables alone.",)


def test_ranks_are_compared_at_the_largest_size():
    rows = [row("all_reduce", size, 50.0, in_place=timing(size, 50.0, 1.5, slow=2)) for size in (8, 64)]
    rows.append(row("all_reduce", 128, 1.0, in_place=None, out_of_place=None, note="out of memory"))
    assert rank_ratios(rows) == (64, pytest.approx([1, 1, 1 / 0.6, 1]))


def test_baseline_compares_like_with_like():
    now = [row("all_reduce", 4096, 50.0)]
    (line,), _ = series(now, "world")
    before = [row("all_reduce", 4096, 40.0), row("all_reduce", 4096, 40.0, ranks=8)]
    ratios = Baseline(Results(metadata(), tuple(before))).ratios(line, "in_place")
    assert ratios == {4096: (pytest.approx(0.8), pytest.approx(0.8 * 0.02 * 2**0.5))}
    assert Baseline(Results(metadata(), (before[1],))).ratios(line, "in_place") == {}
