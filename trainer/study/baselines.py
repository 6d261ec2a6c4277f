"""Trivial forecasts that a model has to beat: constant MFU, a log-linear fit, a naive roofline, a closed form of memory.

The first three have free numbers, which are fitted to one random half of the table and scored on the other; the
forecast isn't fitted to either. All are as simple as they look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from trainer.sizing.model import parameters, weights
from trainer.study.cases import StudyCase

SEED = 0
NAMES = ("constant MFU", "log-linear", "naive roofline")
OUT_OF_MEMORY = 80 * 2**30
Vector = NDArray[np.float64]


def halves(rows: int) -> tuple[list[int], list[int]]:
    """A seeded random half to fit, and the other."""
    order = [int(i) for i in np.random.RandomState(SEED).permutation(rows)]
    return sorted(order[: rows // 2]), sorted(order[rows // 2 :])


def predict(name: str, cases: Sequence[StudyCase], fit: Sequence[int]) -> list[float]:
    """A baseline's seconds for all cases, its numbers from those at `fit`.

    The two that have one number scale their forecast by the median of measured over predicted.
    """
    if name == "log-linear":
        return _log_linear(cases, fit)
    raw = [(at_peak if name == "constant MFU" else _roofline)(case) for case in cases]
    scale = median(measured / raw[i] for i, measured in zip(fit, _measured(cases, fit), strict=True))
    return [scale * value for value in raw]


def at_peak(case: StudyCase) -> float:
    """Seconds of the step's model FLOPs at the peak."""
    return case.tokens * case.flops_per_token / (case.job.layout.ranks * case.peak)


def stretch(case: StudyCase) -> float:
    """A 1F1B pipeline's time over that without its bubble."""
    m, p = case.job.micro_batches, case.job.layout.pp
    return (m + p - 1) / m


def _measured(cases: Sequence[StudyCase], at: Sequence[int]) -> list[float]:
    return [cases[i].seconds or math.nan for i in at]


def _features(case: StudyCase) -> list[float]:
    job = case.job
    numbers = (
        at_peak(case), stretch(case), job.layout.tp, job.layout.dp, job.layout.pp, job.micro_batch, job.micro_batches,
        job.model.hidden, job.model.layers,
    )  # fmt: skip
    return [1.0, *(math.log(number) for number in numbers)]


def _log_linear(cases: Sequence[StudyCase], fit: Sequence[int]) -> list[float]:
    """Ordinary least squares of log seconds on logs of constant-MFU time, bubble, axes, batch and shape."""
    table: Vector = np.array([_features(case) for case in cases])
    target: Vector = np.log(np.array(_measured(cases, fit)))
    weights, *_ = np.linalg.lstsq(table[list(fit)], target, rcond=None)
    return [float(value) for value in np.exp(table @ weights)]


def _roofline(case: StudyCase) -> float:
    """FLOPs at 60 % of the peak with a bubble, ring formulas at fixed rates, 0.8 ms of host a layer and micro-batch."""
    job, layout = case.job, case.job.layout
    m, layers = job.micro_batches, job.model.layers / layout.pp
    activations = 2.0 * job.tokens * job.model.hidden
    rate = 240e9 if layout.tp <= job.node else 45e9
    tensor = 8 * layers * m * (layout.tp - 1) / layout.tp * activations / rate
    weights = parameters.count(job.model).total / (layout.tp * layout.pp)
    replicas = layout.dp * layout.cp
    data = 2 * (replicas - 1) / replicas * weights * 4 / 45e9
    return at_peak(case) / 0.6 * stretch(case) + tensor + data + 0.8e-3 * layers * m


def closed_form(case: StudyCase) -> float:
    """Bytes of a rank: states of the first stage; s b h (18 + 4 f/h) for each layer in flight; logits."""
    job, layout, model = case.job, case.job.layout, case.job.model
    layers = math.ceil(model.layers / layout.pp)
    width = model.dense_width or model.expert_width
    each = weights.total(model, True, "attention") + (3 if model.gated else 2) * model.hidden * width
    local = (layers * each + model.vocab * model.hidden) / layout.tp
    replicas = layout.dp * layout.cp
    states = local * (2 + 4 + 12 / (replicas if job.zero else 1))
    kept = job.tokens * model.hidden * (18 + 4 * width / model.hidden) * layers / layout.tp
    logits = 6.0 * job.tokens * model.vocab / layout.tp
    return states + kept * min(layout.pp, job.micro_batches) + logits


def shy(case: StudyCase) -> tuple[int, int, int]:
    """The rule of thumb for choosing: least tp, then least pp, then the largest micro-batch; higher is better."""
    return -case.job.layout.tp, -case.job.layout.pp, case.job.micro_batch
