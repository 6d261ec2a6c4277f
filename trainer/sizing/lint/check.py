"""Where a shape breaks a rule, what that costs on a device, and the nearest value that doesn't.

A finding is a warning, never an error. Its cost is the percentage of a micro-batch's time that the better value would
save at equal work, by `trainer.sizing.time.cost_model`; it is None where the device's rates are unknown, or
nobody published what breaking a rule costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from trainer.sizing.lint import layout, shape
from trainer.sizing.lint.rules import Fits, LintContext, LintFinding, rules
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.cost_model import CostModel

_WORSE = 0.5
"""Where following a rule would cost more than this percentage, it isn't advised."""


def check_function(name: str) -> Callable[[LintContext], Iterator[LintFinding]]:
    """The function of this name that looks for a broken rule."""
    check: Callable[[LintContext], Iterator[LintFinding]] = getattr(
        shape if hasattr(shape, name) else layout, name
    )
    return check


def lint(job: TrainingJob, costs: CostModel, fits: Fits = lambda _: None) -> list[LintFinding]:
    """All findings, the worst first, those of unknown cost last."""
    findings = [
        finding if finding.cost is None else replace(finding, cost=max(0.0, finding.cost))
        for rule in rules()
        if rule.applies(costs.hardware) and rule.check != "none"
        for finding in check_function(rule.check)(LintContext(rule, job, costs, fits))
        if finding.cost is None or finding.cost > -_WORSE
    ]
    return sorted(findings, key=lambda one: -math.inf if one.cost is None else one.cost, reverse=True)
