"""A measurement as a page that stands alone: verdict, figures as tables, plots, and how it was measured."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl

from collectives.report.canvas import STYLE, size_label
from collectives.report.number import number
from collectives.report.plots import draw
from collectives.report.report_data import FittedCurve, MissingPlot, Plot, ReportData
from collectives.report.summary import is_sweep, summary, title_of
from collectives.store.results import Results, ResultStore, SweepRow, Timing
from collectives.store.series import hosts

__all__ = ["FittedCurve", "write"]

OPEN = 2
"""Tables that are unfolded at most; of more, all are folded, and their headings sum up."""
NOTES = 10
"""Cases without times that the verdict names; the tables hold all."""

_COLUMNS = (("size", "B"), ("count", "elements"), ("type", ""), ("redop", ""), ("root", ""))
_TIMED = (("time", "µs"), ("each call", "µs"), ("algbw", "GB/s"), ("busbw", "GB/s"))
_SEVERITIES = {"critical": "bad", "error": "bad", "warning": "warn", "info": "good"}
_FINDING = ("severity", "what", "where", "evidence")

# Nothing is loaded: the policy says so, and a browser holds the page to it.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">"""

_CSS = """
:root { color-scheme: light dark; --page: #f6f7f8; --card: #fff; --text: #1c1e21; --quiet: #5b6168; --line: #d9dce0;
  --bad: #b3261e; --warn: #8a5a00; --good: #1b6e3c; --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1e2125; --text: #e6e8ea; --quiet: #a3a9b0;
  --line: #3a3f45; --bad: #ff8a80; --warn: #f2c14e; --good: #7bd39b; --link: #8ab8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 16px; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .4em 0; }
h2 { font-size: 1.2rem; margin: 1.6em 0 .5em; }
a { color: var(--link); }
nav a { margin-right: 1em; white-space: nowrap; }
section.card, details, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; margin: 0 0 12px; }
summary { cursor: pointer; }
.quiet { color: var(--quiet); }
.bad { color: var(--bad); font-weight: 600; }
.warn { color: var(--warn); font-weight: 600; }
.good { color: var(--good); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { padding: 3px 9px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
.figures { overflow-wrap: normal; font-variant-numeric: tabular-nums; margin-top: 6px; }
.figures th, .figures td { text-align: right; white-space: nowrap; }
.summary td:nth-child(-n+4) { text-align: left; }
.figures .note { text-align: left; white-space: normal; min-width: 16em; }
.figures .edge { border-left: 1px solid var(--line); }
.figures th.span { text-align: center; }
.facts th { font-weight: 500; color: var(--quiet); min-width: 8em; }
.facts td { min-width: 8em; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 12px;
  align-items: start; }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 620px; height: auto; margin: 0 auto; background: #fff;
  border-radius: 4px; }
figcaption { font-size: .9rem; margin-top: 6px; }
figcaption p { margin: .3em 0; }
"""


def write(
    store: ResultStore,
    *,
    fits: Sequence[FittedCurve] = (),
    findings: Sequence[Mapping[str, Any]] = (),
    baseline: Results | None = None,
    pairs: Sequence[tuple[int, int, float]] = (),
    curves: Sequence[tuple[float, float, float]] = (),
) -> list[Path]:
    """Draw a measurement into `plots/` and `report.html` of its folder, over what is there; the paths of all files.

    Args:
        store: the measurement, whole or as far as it came.
        fits: fitted curves, for their residuals.
        findings: each with `severity`, `what`, `where` and `evidence`; what else one has is shown as evidence.
        baseline: an earlier measurement to compare with.
        pairs: source rank, destination rank, GB/s.
        curves: imbalance (most loaded rank over the mean), time over that of the even load, and its ideal.

    Raises:
        FileNotFoundError: where the folder holds no measurement.
    """
    results = store.read()
    folder = store.folder / "plots"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    shown: list[tuple[Plot, Path]] = []
    missing: list[MissingPlot] = []
    with mpl.rc_context(STYLE):
        for plot in draw(ReportData(results, fits, baseline, pairs, curves)):
            if isinstance(plot, MissingPlot):
                missing.append(plot)
                continue
            path = folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', plot.name)}.png"
            plot.figure.savefig(path)
            shown.append((plot, path))
    page = store.folder / "report.html"
    parts = _page(
        results, findings, shown, missing, list(summary(results, pairs, store.read_json("moe") or ()))
    )
    page.write_text("\n".join(parts), encoding="utf-8")
    return [*(path for _, path in shown), page]


def _page(
    results: Results,
    findings: Sequence[Mapping[str, Any]],
    shown: Sequence[tuple[Plot, Path]],
    missing: Sequence[MissingPlot],
    summed: Sequence[str],
) -> Iterator[str]:
    cases = results.cases()
    title = title_of(results)
    yield f"{_HEAD}\n<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>"
    yield f"<body>\n<h1>{escape(title)}</h1>"
    names = list(dict.fromkeys(hosts(results.metadata).values()))
    on = (
        f" on {', '.join(names[:4])}{f' and {len(names) - 4} hosts more' if len(names) > 4 else ''}"
        if names
        else ""
    )
    ended = f"ended {results.ended}" if results.ended else "not ended"
    yield f'<p class="quiet">{escape(f"Begun {results.metadata.started} UTC, {ended}{on}.")}</p>'
    yield '<section class="card" id="verdict">'
    yield from summed
    yield from _verdict(results)
    yield from _findings(findings)
    yield "</section>"
    tables = '<a href="#tables">Tables</a>' if cases else ""
    yield f'<nav>{tables}<a href="#plots">Plots</a><a href="#metadata">How it was measured</a></nav>'
    if cases:
        yield '<h2 id="tables">Tables</h2>'
        yield '<p class="quiet">time: many calls over their number, as nccl-tests. each call: alone, slowest rank.</p>'
    for rows in cases.values():
        yield from _table(rows, unfolded=len(cases) <= OPEN)
    yield '<h2 id="plots">Plots</h2>\n<div class="plots">'
    for plot, path in shown:
        data = base64.b64encode(path.read_bytes()).decode()
        details = "".join(f'<p class="quiet">{escape(line)}</p>' for line in plot.details)
        yield f'<figure><img alt="{escape(plot.title)}" src="data:image/png;base64,{data}">'
        yield f"<figcaption><p>{escape(plot.caption)}</p>{details}</figcaption></figure>"
    yield "</div>"
    if missing and is_sweep(results):
        reasons = "; ".join(f"{plot.title} ({plot.why})" for plot in missing)
        yield f'<p class="quiet">Not drawn: {escape(reasons)}.</p>'
    yield '<h2 id="metadata">How it was measured</h2>'
    for name, part in asdict(results.metadata).items():
        if isinstance(part, dict):
            yield f"<details><summary>{escape(name.capitalize())}</summary>{_facts(part)}</details>"
    yield "</body>\n</html>"


def _verdict(results: Results) -> Iterator[str]:
    """Rows, errors and gaps, in sentences."""
    timed = [row for row in results.rows if row.timings]
    counts = [t.wrong for row in timed for t in row.timings]
    checked = [count for count in counts if count is not None]
    wrong = sum(checked)
    if wrong:
        yield f'<p class="bad">#wrong {wrong}: elements differ from their exact values. The marked rows show where.</p>'
    elif checked:
        yield f'<p class="good">#wrong 0 in the {len(checked)} timings that were checked.</p>'
    if len(checked) < len(counts):
        yield f'<p class="warn">{len(counts) - len(checked)} of {len(counts)} timings weren\'t checked.</p>'
    if is_sweep(results):
        yield f"<p>{_count(len(results.rows), 'row')}, {len(timed)} with times.</p>"
    if results.ended is None:
        yield '<p class="warn">The measurement was interrupted or is still running: this is what was done so far.</p>'
    notes = [(row, row.note) for row in results.rows if row.note]
    if notes:
        lines = [
            f"{row.op}, group {row.group}, {row.dtype}, {size_label(row.size)}: {note}" for row, note in notes
        ]
        more = f"<li>and {len(lines) - NOTES} more, in the tables</li>" if len(lines) > NOTES else ""
        yield (
            "<p>Notes on rows:</p><ul>"
            + "".join(f"<li>{escape(line)}</li>" for line in lines[:NOTES])
            + more
            + "</ul>"
        )


def _findings(findings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was found to be slow or broken, as a table."""
    if not findings:
        yield "<p>No findings were reported.</p>"
        return
    kinds = Counter(str(finding.get("severity", "unrated")) for finding in findings)
    summary = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    yield f"<p>{_count(len(findings), 'finding')}: {escape(summary)}.</p>"
    yield '<div class="scroll"><table><tr>' + "".join(f"<th>{name}</th>" for name in _FINDING) + "</tr>"
    for finding in findings:
        severity = str(finding.get("severity", "unrated"))
        other = {name: value for name, value in finding.items() if name not in _FINDING}
        evidence = "; ".join(
            filter(None, (_text(finding.get("evidence", "")), _text(other) if other else ""))
        )
        cells = (_text(finding.get("what", "")), _text(finding.get("where", "")), evidence)
        yield (
            f'<tr><td class="{_SEVERITIES.get(severity.lower(), "")}">{escape(severity)}</td>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    yield "</table></div>"


def _table(rows: Sequence[SweepRow], *, unfolded: bool) -> Iterator[str]:
    """Rows of one operation and group in nccl-tests' columns."""
    wires = any(t.wire_bw is not None for row in rows for t in row.timings)
    timed = (*_TIMED, *((("wirebw", "GB/s"),) if wires else ()), ("#wrong", ""))
    passes = len({row.sweep for row in rows}) > 1
    left = (*_COLUMNS, *((("pass", ""),) if passes else ()))
    first = rows[0]
    shape = ", ".join(filter(None, (_count(first.groups, "group"), f"{first.ranks} ranks each")))
    best = max((t.bus_bw for row in rows for t in row.timings), default=0.0)
    wrong = sum(t.wrong or 0 for row in rows for t in row.timings)
    yield f"<details{' open' if unfolded else ''}><summary><b>{escape(f'{first.op}, group {first.group}')}</b>"
    yield f'<span class="quiet"> ({shape}): best busbw {number(best)} GB/s</span>'
    yield f' <span class="bad">#wrong {wrong}</span></summary>' if wrong else "</summary>"
    yield '<div class="scroll"><table class="figures"><thead>'
    span = f'<th class="span edge" colspan="{len(timed)}">'
    yield f'<tr><th colspan="{len(left)}"></th>{span}out-of-place</th>{span}in-place</th></tr>'
    for which in (0, 1):
        heads = [f"<th>{pair[which]}</th>" for pair in left]
        edge, *others = (pair[which] for pair in timed)
        block = [f'<th class="edge">{edge}</th>', *(f"<th>{name}</th>" for name in others)]
        yield "<tr>" + "".join([*heads, *block, *block]) + "</tr>"
    yield "</thead><tbody>"
    for row in rows:
        values = (row.size, row.count, row.dtype, row.redop, row.root, *((row.sweep,) if passes else ()))
        cells = "".join(f"<td>{escape(str(value))}</td>" for value in values)
        if row.timings:
            cells += _timing(row.out_of_place, wires) + _timing(row.in_place, wires)
        else:
            cells += f'<td class="note edge" colspan="{2 * len(timed)}">{escape(row.note or "no times")}</td>'
        yield f'<tr title="{escape(size_label(row.size))}">{cells}</tr>'
    yield "</tbody></table></div></details>"


def _timing(timing: Timing | None, wires: bool) -> str:
    """Cells of one placement; N/A, as in nccl-tests, where there is none."""
    if timing is None:
        return '<td class="edge">N/A</td>' + "<td>N/A</td>" * (4 + wires)
    rates = [timing.alg_bw, timing.bus_bw, *([timing.wire_bw] if wires else [])]
    figures = "".join(f"<td>{'N/A' if rate is None else number(rate)}</td>" for rate in rates)
    wrong = "N/A" if timing.wrong is None else str(timing.wrong)
    mark = ' class="bad"' if timing.wrong else ""
    alone = number(timing.call_us) if timing.call_us else "N/A"
    return f'<td class="edge">{number(timing.time_us)}</td><td>{alone}</td>{figures}<td{mark}>{wrong}</td>'


def _facts(tree: Mapping[str, Any]) -> str:
    """A tree as a table of names and values; a list of trees as a table of its own."""
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{_listing(value) if _is_listing(value) else escape(_text(value))}</td></tr>"
        for name, value in _leaves(tree)
    )
    return f'<div class="scroll"><table class="facts">{lines}</table></div>'


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values with their dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_listing(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _listing(items: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for item in items for name in item))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(item.get(name)))}</td>" for name in names) + "</tr>"
        for item in items
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(value: Any) -> str:
    """A value for reading."""
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_text(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
