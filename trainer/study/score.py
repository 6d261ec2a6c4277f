"""Scores of a table's cases: the forecast beside the baselines, and against the target."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.sizing.memory import estimate as memory
from trainer.sizing.time import estimate as time
from trainer.sizing.time import step
from trainer.study import baselines, metrics
from trainer.study.cases import Cases, StudyCase
from trainer.study.methods import PaperRun

MODEL = "megaray"
GROUP = 8
"""Rows that a group must have for a choice among them to mean something."""
HEURISTIC = "least tp, least pp, largest micro-batch"


@dataclass(frozen=True)
class Timed:
    """A case with its predicted step."""

    case: StudyCase
    seconds: float
    low: float
    high: float
    parts: time.StepParts

    @property
    def measured(self) -> float:
        """Measured seconds."""
        return self.case.seconds or math.nan

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.seconds / self.measured


@dataclass
class TimeScore:
    """Step times of a table."""

    table: str
    timed: list[Timed]
    """Every row with a time."""
    errors: dict[str, metrics.Errors] = field(default_factory=dict)
    """By forecaster, on the half that no baseline was fitted to, without rows that calibrated."""
    scored: metrics.Errors | None = None
    """The forecast's on all rows that didn't calibrate it."""
    sound: metrics.Errors | None = None
    """The same without rows whose own record says that something was broken."""
    broken: int = 0
    covered: float = math.nan
    """Share of the measurements inside the forecast's interval."""
    calibrated: int = 0
    lines: list[int] = field(default_factory=list)
    """Of rows with a prediction, of time or of memory."""
    skipped: dict[str, list[int]] = field(default_factory=dict)
    """Lines of rows that weren't predicted, by reason."""


def timed(case: StudyCase) -> Timed:
    """A case's predicted step with its interval."""
    parts = time.parts(case.job, case.rates)
    low, high = step.interval(parts)
    return Timed(case, parts.step, low, high, parts)


def times(table: Cases) -> TimeScore:
    """Errors of a table's step times."""
    rows = [timed(case) for case in table.cases if case.seconds]
    score = TimeScore(table.table, rows, lines=[case.line for case in table.cases], skipped=table.skipped)
    judged = [row for row in rows if not row.case.calibrates]
    score.calibrated = len(rows) - len(judged)
    score.scored = _errors(judged)
    sound = [row for row in judged if not row.case.note]
    score.broken = len(judged) - len(sound)
    score.sound = _errors(sound)
    if judged:
        score.covered = metrics.inside(
            [r.low for r in judged], [r.high for r in judged], [r.measured for r in judged]
        )
    if len(rows) >= 2 * GROUP:
        cases = [row.case for row in rows]
        fit, test = baselines.halves(len(rows))
        test = [i for i in test if not cases[i].calibrates]
        measured = [rows[i].measured for i in test]
        forecasts = {name: baselines.predict(name, cases, fit) for name in baselines.NAMES}
        for name, seconds in ({MODEL: [row.seconds for row in rows]} | forecasts).items():
            errors = metrics.errors([seconds[i] for i in test], measured)
            if errors:
                score.errors[name] = errors
    return score


def _errors(rows: Sequence[Timed]) -> metrics.Errors | None:
    return metrics.errors([row.seconds for row in rows], [row.measured for row in rows])


@dataclass(frozen=True)
class RankingScore:
    """A group of rows to choose among: what is lost, and how well the order is predicted, by forecaster."""

    group: str
    rows: int
    regret: dict[str, float]
    tau: dict[str, float]
    picked: str
    best: str


def choices(rows: Sequence[Timed]) -> list[RankingScore]:
    """Choices among the rows of each group that is large enough."""
    groups: dict[str, list[Timed]] = defaultdict(list)
    for row in rows:
        if row.case.group:
            groups[row.case.group].append(row)
    return [_choice(name, group) for name, group in sorted(groups.items()) if len(group) >= GROUP]


def _choice(name: str, rows: list[Timed]) -> RankingScore:
    speeds = [row.case.tokens / row.measured for row in rows]
    mine = [row.case.tokens / row.seconds for row in rows]
    cases = [row.case for row in rows]
    everyone = list(range(len(rows)))
    naive = [
        c.tokens / s for c, s in zip(cases, baselines.predict("naive roofline", cases, everyone), strict=True)
    ]
    ranked = sorted(everyone, key=lambda i: baselines.shy(cases[i]))
    shy = [float(ranked.index(i)) for i in everyone]
    scores = {MODEL: mine, HEURISTIC: shy, "naive roofline": naive}
    at, best = mine.index(max(mine)), speeds.index(max(speeds))
    return RankingScore(
        name,
        len(rows),
        {who: metrics.regret(score, speeds) for who, score in scores.items()},
        {who: metrics.kendall(score, speeds) or 0.0 for who, score in scores.items()},
        cases[at].label,
        cases[best].label,
    )


def over(choices: Sequence[RankingScore], who: str) -> tuple[float, float]:
    """Mean regret and mean tau over groups; NaN where there are none."""
    if not choices:
        return math.nan, math.nan
    regret = sum(choice.regret[who] for choice in choices) / len(choices)
    return regret, sum(choice.tau[who] for choice in choices) / len(choices)


@dataclass(frozen=True)
class MemoryScore:
    """Memory of a table."""

    fits: dict[str, metrics.Classified]
    """By forecaster: does it fit."""
    peak: metrics.Errors | None
    """Peak bytes that the allocator held."""


def memories(table: Cases) -> MemoryScore | None:
    """Fits-or-not and peaks; None where the table has neither."""
    known = [case for case in table.cases if case.fits is not None]
    if not known:
        return None
    did = [bool(case.fits) for case in known]
    mine = metrics.classified([bool(memory.fits(case.job, case.rates.hardware)) for case in known], did)
    closed = metrics.classified(
        [baselines.closed_form(case) <= baselines.OUT_OF_MEMORY for case in known], did
    )
    held = [case for case in known if case.reserved]
    predicted = [memory.worst(case.job, case.rates.hardware.kind)[1].reserved for case in held]
    peak = metrics.errors(predicted, [case.reserved or math.nan for case in held])
    return MemoryScore({k: v for k, v in ((MODEL, mine), ("closed form, 80 GiB", closed)) if v}, peak)


@dataclass(frozen=True)
class MethodScore:
    """MoE Parallel Folding's methods."""

    runs: list[PaperRun]
    mfu: metrics.Errors | None
    right: int
    pairs: int
    """Pairs of methods at one setting, and how many are in the right order; out of memory counts as the slowest."""
    memory: metrics.Classified | None
    skipped: dict[str, list[int]] = field(default_factory=dict)
    """Lines of rows that weren't predicted, by reason."""

    @property
    def share(self) -> float:
        """Of pairs in the right order."""
        return self.right / self.pairs if self.pairs else math.nan


def methods(runs: list[PaperRun], skipped: dict[str, list[int]] | None = None) -> MethodScore:
    """Errors of MFU, and the ranking of methods at each setting."""
    both = [run for run in runs if run.mfu and run.predicted]
    mfu = metrics.errors([run.predicted or math.nan for run in both], [run.mfu or math.nan for run in both])
    settings: dict[tuple[str, int, int, int], list[PaperRun]] = defaultdict(list)
    for run in runs:
        settings[run.setting].append(run)
    right = pairs = 0
    for group in settings.values():
        one, two = metrics.right_pairs(
            [run.predicted or 0.0 for run in group], [run.mfu or 0.0 for run in group]
        )
        right, pairs = right + one, pairs + two
    fits = metrics.classified(
        [run.predicted is not None for run in runs], [run.mfu is not None for run in runs]
    )
    return MethodScore(runs, mfu, right, pairs, fits, skipped or {})
