"""`python -m trainer validate`: the forecast against published runs, as one report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import UserError
from trainer.study import cases, lint, memory_table, methods, nanotron, published, score, vtrain
from trainer.study.cases import Cases, Row
from trainer.study.score import Choice, MemoryScore, MethodScore, TimeScore

TABLES = (
    f"{nanotron.TABLE}.csv",
    f"{vtrain.SINGLE}.csv",
    f"{vtrain.MULTI}.csv",
    "published_runs.csv",
    f"{memory_table.TABLE}.csv",
)
"""Tables that a data folder may have, by file name."""


@dataclass
class Study:
    """All that was compared."""

    files: list[str] = field(default_factory=list)
    times: list[TimeScore] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    sound_choices: list[Choice] = field(default_factory=list)
    """Without rows whose own record says that something was broken."""
    memory: MemoryScore | None = None
    methods: MethodScore | None = None
    table: list[memory_table.Line] = field(default_factory=list)
    """Korthikanti et al.'s memory figure."""
    findings: dict[str, list[lint.Finding]] = field(default_factory=dict)
    """What the data lint found, by file."""

    @property
    def targets(self) -> list[Target]:
        """What was to be reached, and what was."""
        return [target for make in _TARGETS for target in make(self)]


@dataclass(frozen=True)
class Target:
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
        sign, show = (
            ("<=" if self.at_most else ">="),
            (lambda v: f"{v:.1%}" if self.unit == "%" else f"{v:.3f}"),
        )
        return (
            f"{self.what}: {show(self.value)} ({'met' if self.met else 'missed'}: {sign} {show(self.bound)})"
        )


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
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if not found:
        raise UserError(f"--data: {folder} has none of {', '.join(TABLES)}; name the folder that has them")
    for path in found:
        _add(study, path.name, cases.read(path))
    return study


def _add(study: Study, name: str, rows: Sequence[Row]) -> None:
    """One table's part of the study, by its header."""
    if cases.has_columns(rows, nanotron.COLUMNS):
        _add_nanotron(study, nanotron.cases(rows))
    elif cases.has_columns(rows, vtrain.COLUMNS):
        study.times.append(score.times(vtrain.cases(rows)))
    elif cases.has_columns(rows, published.COLUMNS):
        study.times += [score.times(found) for found in published.cases(rows) if found.cases]
        made, _ = methods.runs(rows)
        if made:
            study.methods = score.methods(made)
    elif cases.has_columns(rows, memory_table.COLUMNS):
        study.table = memory_table.lines(rows)
    else:
        raise UserError(
            f"--runs: {name} has the columns {', '.join(list(rows[0])[:6])}, …, which no known table has; known are "
            f"{', '.join(TABLES)}"
        )
    study.files.append(name)
    study.findings[name] = lint.findings(rows)


def _add_nanotron(study: Study, found: Cases) -> None:
    timed = score.times(found)
    study.times.append(timed)
    study.choices = score.choices(timed.timed)
    study.sound_choices = score.choices([row for row in timed.timed if not row.case.note])
    study.memory = score.memories(found)


# ---- targets ----


def _sweep(study: Study) -> list[Target]:
    timed = _time(study, nanotron.TABLE)
    out = []
    if timed and timed.scored:
        out.append(Target("nanotron sweep, step time, MAPE", timed.scored.mean, 0.20))
        out.append(Target("nanotron sweep, step time, median error", timed.scored.median, 0.15))
    if study.memory:
        if study.memory.peak:
            out.append(Target("nanotron sweep, peak memory, MAPE", study.memory.peak.mean, 0.10))
        fits = study.memory.fits[score.MODEL]
        out.append(Target("nanotron sweep, fits or not, accuracy", fits.accuracy, 0.97, at_most=False))
    for label, chosen in (("", study.choices), (", without rows on broken links", study.sound_choices)):
        if chosen:
            regret, tau = score.over(chosen, score.MODEL)
            out.append(Target(f"nanotron sweep, regret of the chosen layout{label}", regret, 0.05))
            out.append(Target(f"nanotron sweep, Kendall tau{label}", tau, 0.8, at_most=False, unit="1"))
    return out


def _mape(table: str, what: str, bound: float) -> Callable[[Study], list[Target]]:
    def make(study: Study) -> list[Target]:
        timed = _time(study, table)
        return [Target(what, timed.scored.mean, bound)] if timed and timed.scored else []

    return make


def _methods(study: Study) -> list[Target]:
    found = study.methods
    if found is None or found.mfu is None:
        return []
    out = [Target("MoE Parallel Folding, MFU, MAPE", found.mfu.mean, 0.12)]
    if found.pairs:
        out.append(
            Target("MoE Parallel Folding, pairs of methods in order", found.share, 0.90, at_most=False)
        )
    return out


def _time(study: Study, table: str) -> TimeScore | None:
    return next((timed for timed in study.times if timed.table == table), None)


_TARGETS: tuple[Callable[[Study], list[Target]], ...] = (
    _sweep,
    _mape(vtrain.MULTI, "vTrain, many nodes, MAPE", 0.10),
    _mape(vtrain.SINGLE, "vTrain, one node, MAPE", 0.08),
    _methods,
    _mape("megascale", "MegaScale, strong scaling, MAPE", 0.08),
)
