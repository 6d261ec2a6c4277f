"""The optimizers' maths again, in plain fp64 loops over whole tensors; no code is shared with `trainer.optim`."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from configs.training import OptimConfig
from tests.trainer.optim.cases import FACTORS, PARAMETERS, RATES, SKIPPED, STEPS, WIDTH, gradients, values


def expected(optim: OptimConfig, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Values after `steps`, in fp64."""
    theta = {name: array.astype(np.float64) for name, array in values().items()}
    slots = {name: [np.zeros_like(array), np.zeros_like(array)] for name, array in theta.items()}
    applied = 0
    for step in range(steps):
        if step == SKIPPED:
            continue
        applied += 1
        for name, array in gradients(step).items():
            gradient = array.astype(np.float64) * FACTORS[step]
            kind, lr, decay = PARAMETERS[name][1], RATES[step], 0.0
            if kind == "matrix":
                decay = optim.weight_decay
                if optim.base_width:
                    lr, decay = (
                        lr * optim.base_width / WIDTH,
                        decay * math.sqrt(WIDTH / optim.base_width),
                    )
            if optim.kind == "muon" and kind == "matrix":
                theta[name] = _muon(theta[name], gradient, slots[name], optim, lr, decay)
            else:
                theta[name] = _adam(theta[name], gradient, slots[name], optim, (lr, decay, applied), kind)
    return theta


def _adam(w, g, moments, optim, numbers, kind) -> np.ndarray:
    lr, decay, applied = numbers
    moments[0] = optim.beta1 * moments[0] + (1 - optim.beta1) * g
    moments[1] = optim.beta2 * moments[1] + (1 - optim.beta2) * g**2
    mean = moments[0] / (1 - optim.beta1**applied)
    square = moments[1] / (1 - optim.beta2**applied)
    move = mean / (np.sqrt(square) + optim.eps)
    if optim.kind != "lamb":
        return w * (1 - lr * decay) - lr * move
    move = move + decay * w
    result = np.empty_like(w)
    for lead in product(*map(range, w.shape[:-2])) if kind == "matrix" else [()]:
        ratio = 1.0
        if kind != "vector":
            ratio = np.sqrt((w[lead] ** 2).sum()) / np.sqrt((move[lead] ** 2).sum())
        result[lead] = w[lead] - lr * ratio * move[lead]
    return result


def _muon(w, g, moments, optim, lr, decay) -> np.ndarray:
    moments[0] = optim.momentum * moments[0] + g
    nesterov = g + optim.momentum * moments[0]
    result = np.empty_like(w)
    for lead in product(*map(range, w.shape[:-2])):
        m, n = w.shape[-2:]
        x = nesterov[lead] if m <= n else nesterov[lead].T
        x = x / (math.sqrt((x * x).sum()) + 1e-7)
        for _ in range(optim.orthogonal_steps):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
        x = x if m <= n else x.T
        result[lead] = w[lead] * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(m, n)) * x
    return result
