"""Figures of the fit: held-out errors on published sweeps, and on measurements of one's own, with coverage.

python -m tests.collectives.bench_fit [--sweep DIR [--fresh DIR]]

`--sweep` is a folder that `python -m collectives run --out` made, `--fresh` a second one of the same sweep: the share of
its times within the first one's intervals should be 90 to 98 %.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np

from collectives.analysis.curves import cases, measured
from collectives.analysis.fit import FEWEST, CurveFit, fit_curve
from collectives.store.results import Results, ResultStore
from configs.paths import RunPaths

PUBLISHED = Path(__file__).with_name("allreduce_sweeps.csv")


def published() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Bytes, and microseconds by series."""
    lines = [line for line in PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    return columns.pop("size_bytes"), columns


def least_squares(sizes: np.ndarray, times: np.ndarray) -> float:
    """Mean relative error of the ordinary straight line, of absolute errors and fitted to all sizes."""
    scale = sizes.max()
    matrix = np.stack([np.ones_like(sizes), sizes / scale], axis=1)
    line = matrix @ np.linalg.lstsq(matrix, times, rcond=None)[0]
    return float(np.abs(line / times - 1).mean())


def between_neighbours(sizes: np.ndarray, times: np.ndarray) -> float:
    """Mean relative error of reading each inner size off its neighbours, straight in log-log space."""
    x, y = np.log(sizes), np.log(times)
    read = y[:-2] + (y[2:] - y[:-2]) * (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    return float(np.abs(np.expm1(read - y[1:-1])).mean())


def line_of(name: str, fit: CurveFit, sizes: np.ndarray, times: np.ndarray, took: float) -> str:
    """Figures of one curve."""
    error = np.abs(fit.errors)
    kept, large = ~np.isin(fit.sizes, fit.outliers), fit.sizes >= 1024
    figures = (
        error.mean(), np.median(error), error[kept].mean(), error[large].mean() if large.any() else np.nan,
        fit.line_error, least_squares(sizes, times), between_neighbours(sizes, times),
    )  # fmt: skip
    text = "".join(f"{value:8.1%}" for value in figures)
    low, high = fit.interval
    outliers = f"  outliers {','.join(map(str, fit.outliers))}" if fit.outliers else ""
    return f"{name:32}{len(fit.segments):4}{text}{low:8.3f}{high:7.3f}{took:7.2f}{outliers}"


HEAD = (
    f"{'held-out, nested':32}{'seg':>4}{'mean':>8}{'median':>8}{'w/o out':>8}{'>=1K':>8}{'line':>8}{'lstsq':>8}"
    f"{'neighb.':>8}{'low':>8}{'high':>7}{'s':>7}"
)


def read(folder: Path) -> Results:
    """The measurement that `run --out` left in a folder."""
    return ResultStore(RunPaths(folder).measurement).read()


def main(arguments: list[str]) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", type=Path, help="a measurement to fit")
    parser.add_argument("--fresh", type=Path, help="another, to be covered by the fit")
    options = parser.parse_args(arguments)
    print(HEAD)
    if options.sweep is None:
        sizes, series = published()
        for name, times in series.items():
            started = time.perf_counter()
            fit = fit_curve(sizes, times)
            print(line_of(name, fit, sizes, times, time.perf_counter() - started))
        return
    fresh = cases(read(options.fresh)) if options.fresh else {}
    inside, total = 0, 0
    for case, rows in cases(read(options.sweep)).items():
        if len({row.size for row in rows}) < FEWEST:
            continue
        started = time.perf_counter()
        swept = measured(rows)
        fit = fit_curve(*swept)
        middle = np.array(
            [np.median([t for s, t, _ in zip(*swept, strict=True) if s == x]) for x in fit.sizes]
        )
        name = ", ".join((case[0], case[1], case[4]))
        print(
            line_of(name, fit, fit.sizes, middle, time.perf_counter() - started),
            f"drift {fit.drift:.1%}",
            end="",
        )
        if fresh.get(case):
            ratios = [t / fit.time_us(s) for s, t, _ in zip(*measured(fresh[case]), strict=True)]
            covered = sum(fit.interval[0] <= ratio <= fit.interval[1] for ratio in ratios)
            print(f"  covers {covered} of {len(ratios)}, {covered / len(ratios):.1%}", end="")
            inside, total = inside + covered, total + len(ratios)
        print()
    if total:
        print(f"all: covers {inside} of {total}, {inside / total:.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
