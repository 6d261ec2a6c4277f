"""`python -m trainer validate`: the forecast against published runs, as one report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from trainer.study import (
    cases,
    lint,
    memory_table,
    methods,
    metrics,
    nanotron,
    published,
    score,
    sweeps,
    vtrain,
)
from trainer.study.cases import Cases, Row
from trainer.study.metrics import Errors
from trainer.study.score import MemoryScore, MethodScore, RankingScore, TimeScore
from trainer.study.sweeps import CollectiveScore

TABLES = (
    f"{nanotron.TABLE}.csv",
    f"{vtrain.SINGLE}.csv",
    f"{vtrain.MULTI}.csv",
    "published_runs.csv",
    f"{memory_table.TABLE}.csv",
    "allreduce_sweeps.csv",
    "mscclpp_baselines.csv",
)
"""Tables that a data folder may have, by file name."""


@dataclass
class Study:
    """All that was compared."""

    files: list[str] = field(default_factory=list)
    times: list[TimeScore] = field(default_factory=list)
    choices: list[RankingScore] = field(default_factory=list)
    sound_choices: list[RankingScore] = field(default_factory=list)
    """Without rows whose own record says that something was broken."""
    memory: MemoryScore | None = None
    methods: MethodScore | None = None
    collectives: list[CollectiveScore] = field(default_factory=list)
    table: list[memory_table.TableFigure] = field(default_factory=list)
    """Korthikanti et al.'s memory figure."""
    findings: dict[str, list[lint.TableFinding]] = field(default_factory=dict)
    """What the data lint found, by file."""

    @property
    def targets(self) -> list[ErrorTarget]:
        """What was to be reached, and what was."""
        return [target for make in _TARGETS for target in make(self)]


@dataclass(frozen=True)
class ErrorTarget:
    """A promise about an error, and what came of it."""

    what: str
    value: float
    bound: float
    at_most: bool = True
    unit: str = "%"

    @property
    def met(self) -> bool:
        """Whether it was kept."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        verdict, sign = "met" if self.met else "missed", "<=" if self.at_most else ">="
        return f"{self.what}: {self.show(self.value)} ({verdict}: {sign} {self.show(self.bound)})"

    def show(self, value: float) -> str:
        """A value as a person reads it."""
        return f"{value:.1%}" if self.unit == "%" else f"{value:.3f}"


def validate(data: Path | None, runs: Path | None) -> Study:
    """Compare with one table, or with all that a folder has.

    Args:
        data: folder of the published tables; None: MEGARAY_DATA, or `shared/data` beside the repository.
        runs: one table with the columns of a known one; then no folder is needed.

    Raises:
        UserError: where a file or folder isn't there, or has columns that aren't known.
    """
    study = Study()
    if runs is not None:
        _add(study, runs.name, cases.read(runs))
        return study
    folder = cases.data_folder(data)
    paths = [folder / name for name in TABLES if (folder / name).is_file()]
    if not paths:
        raise UserError(f"--data: {folder} has none of {', '.join(TABLES)}; name the folder that has them")
    for path in paths:
        _add(study, path.name, cases.read(path))
    return study


def _add(study: Study, name: str, rows: Sequence[Row]) -> None:
    """One table's part of the study, by its header."""
    if cases.has_columns(rows, nanotron.COLUMNS):
        _add_nanotron(study, nanotron.cases(rows))
    elif cases.has_columns(rows, vtrain.COLUMNS):
        study.times.append(score.times(vtrain.cases(rows)))
    elif cases.has_columns(rows, published.COLUMNS):
        study.times += [score.times(block_cases) for block_cases in published.cases(rows)]
        made, skipped = methods.runs(rows)
        if made or skipped:
            study.methods = score.methods(made, skipped)
    elif cases.has_columns(rows, sweeps.BASELINE_COLUMNS) or cases.has_columns(rows, sweeps.SWEEP_COLUMNS):
        study.collectives.append(sweeps.collectives(rows, name.removesuffix(".csv")))
        study.files.append(name)
        return
    elif cases.has_columns(rows, memory_table.COLUMNS):
        study.table = memory_table.lines(rows)
    else:
        columns = [word for word in rows[0] if word]  # cells behind the last of them have none
        raise UserError(
            f"--runs: {name} has the columns {', '.join(columns[:6])}, …, which no known table has; known are "
            f"{', '.join(TABLES)}"
        )
    study.files.append(name)
    study.findings[name] = lint.findings(rows)


def _add_nanotron(study: Study, sweep: Cases) -> None:
    timed = score.times(sweep)
    study.times.append(timed)
    study.choices = score.choices(timed.timed)
    study.sound_choices = score.choices([row for row in timed.timed if not row.case.note])
    study.memory = score.memories(sweep)


# ---- targets ----


def _sweep(study: Study) -> list[ErrorTarget]:
    timed = _time(study, nanotron.TABLE)
    out = []
    if timed and timed.scored:
        out.append(ErrorTarget("nanotron sweep, step time, MAPE", timed.scored.mean, 0.20))
        out.append(ErrorTarget("nanotron sweep, step time, median error", timed.scored.median, 0.15))
    if study.memory:
        if study.memory.peak:
            out.append(ErrorTarget("nanotron sweep, peak memory, MAPE", study.memory.peak.mean, 0.10))
        fits = study.memory.fits[score.MODEL]
        out.append(ErrorTarget("nanotron sweep, fits or not, accuracy", fits.accuracy, 0.97, at_most=False))
    for label, chosen in (("", study.choices), (", without rows on broken links", study.sound_choices)):
        if chosen:
            regret, tau = score.over(chosen, score.MODEL)
            out.append(ErrorTarget(f"nanotron sweep, regret of the chosen layout{label}", regret, 0.05))
            out.append(ErrorTarget(f"nanotron sweep, Kendall tau{label}", tau, 0.8, at_most=False, unit="1"))
    return out


def _mape(table: str, what: str, bound: float) -> Callable[[Study], list[ErrorTarget]]:
    def make(study: Study) -> list[ErrorTarget]:
        timed = _time(study, table)
        return [ErrorTarget(what, timed.scored.mean, bound)] if timed and timed.scored else []

    return make


def _methods(study: Study) -> list[ErrorTarget]:
    scored = study.methods
    if scored is None or scored.mfu is None:
        return []
    out = [ErrorTarget("MoE Parallel Folding, MFU, MAPE", scored.mfu.mean, 0.12)]
    if scored.pairs:
        out.append(
            ErrorTarget("MoE Parallel Folding, pairs of methods in order", scored.share, 0.90, at_most=False)
        )
    return out


def _over_tables(study: Study) -> list[ErrorTarget]:
    """Mixtures of experts and AMD's devices over all tables that print their layout, and how often an interval holds."""
    judged = [row for timed in study.times for row in timed.timed if not row.case.calibrates]
    out = []
    for what, chosen in (
        ("MoE tables, step time, MAPE", [row for row in judged if row.case.job.model.experts > 1]),
        ("AMD, step time, MAPE", [row for row in judged if row.case.rates.hardware.kind == "rocm"]),
    ):
        errors = metrics.errors([row.seconds for row in chosen], [row.measured for row in chosen])
        out += [ErrorTarget(what, errors.mean, 0.15)] if errors else []
    if judged:
        inside = metrics.inside(*zip(*((row.low, row.high, row.measured) for row in judged), strict=True))
        out.append(ErrorTarget("all tables, measurements inside the interval", inside, 0.90, at_most=False))
    return out


def _time(study: Study, table: str) -> TimeScore | None:
    return next((timed for timed in study.times if timed.table == table), None)


_TARGETS: tuple[Callable[[Study], list[ErrorTarget]], ...] = (
    _sweep,
    _mape(vtrain.MULTI, "vTrain, many nodes, MAPE", 0.10),
    _mape(vtrain.SINGLE, "vTrain, one node, MAPE", 0.08),
    _methods,
    _mape("megascale", "MegaScale, strong scaling, MAPE", 0.08),
    _over_tables,
)


# ---- as data ----


def as_data(study: Study) -> dict[str, Any]:
    """All blocks with how many of their rows are predicted, how well, and why others aren't; and the targets."""
    blocks = [
        *(_block(one.table, one.lines, one.skipped, one.scored, one.calibrated,
                 inside=one.covered) for one in study.times),
        *(_block(one.table, sorted(one.lines), one.skipped, one.errors, len(one.lines) if one.calibrates else 0)
          for one in study.collectives),
    ]  # fmt: skip
    if study.methods:
        scored, lines = study.methods, [run.line for run in study.methods.runs]
        blocks.append(
            _block(methods.TABLE, lines, scored.skipped, scored.mfu, pairs=scored.pairs, right=scored.right)
        )
    if study.table:
        blocks.append(_block(memory_table.TABLE, sorted({line.line for line in study.table}), {}, None))
    return {
        "files": study.files,
        "rows": sum(block["rows"] for block in blocks),
        "predicted": sum(block["predicted"] for block in blocks),
        "blocks": blocks,
        "targets": [
            {"what": one.what, "value": _finite(one.value), "bound": one.bound, "at_most": one.at_most, "met": one.met}
            for one in study.targets
        ],
    }  # fmt: skip


def _block(
    name: str,
    predicted: Sequence[int],
    skipped: Mapping[str, Sequence[int]],
    errors: Errors | None,
    calibrated: int = 0,
    **more: float,
) -> dict[str, Any]:
    missing = sum(len(lines) for lines in skipped.values())
    made: dict[str, Any] = {
        "block": name,
        "rows": len(predicted) + missing,
        "predicted": len(predicted),
        "calibrated": calibrated,
        "not_predicted": [{"reason": why, "lines": list(lines)} for why, lines in skipped.items()],
    }
    if errors:
        made |= {"scored": errors.rows, "mape": errors.mean, "median": errors.median, "bias": errors.bias}
    return made | {key: _finite(value) for key, value in more.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
