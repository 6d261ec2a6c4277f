"""Where a shape breaks a rule, what that costs on a device, and the nearest value that doesn't.

A finding is a warning, never an error. Its cost is the percentage of a micro-batch's time that the better value would
save at equal work, by `trainer.sizing.time.price`; where the device's rates are unknown, or nobody published what breaking
a rule costs, it is None.
"""

from __future__ import annotations

import math
from dataclasses import replace

from trainer.sizing.lint import layout as lint_layout
from trainer.sizing.lint import shape as lint_shape
from trainer.sizing.lint.findings import CHECKS, Fits, LintFinding, View
from trainer.sizing.lint.rules import rules
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.price import Prices

_WORSE = 0.5
"""Where following a rule would cost more than this percentage, it isn't advised."""
_REGISTERED = (lint_layout, lint_shape)
"""Modules whose checks are in the register by having been imported."""


def lint(job: TrainingJob, prices: Prices, fits: Fits = lambda _: None) -> list[LintFinding]:
    """All findings, the worst first, those of unknown cost last."""
    view = View(job, prices, fits)
    findings = [
        finding
        for rule in rules()
        if rule.applies(prices.hardware) and rule.check != "none"
        for finding in CHECKS[rule.check](rule, view)
        if finding.cost is None or finding.cost > -_WORSE
    ]
    findings = [f if f.cost is None else replace(f, cost=max(0.0, f.cost)) for f in findings]
    return sorted(findings, key=lambda f: -math.inf if f.cost is None else f.cost, reverse=True)
