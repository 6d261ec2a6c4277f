"""A made-up device profile with the shapes of a real one: its times come from other formulas than sizing's."""

from __future__ import annotations

import math
import random

from collectives.device.kernels import matmuls
from configs.profile import CopyRate, DeviceProfile, MatmulRate

UNITS, RATE, BANDWIDTH, FLOAT_RATE = 132, 800e12, 2.9e12, 50e12
_TILES = ((64, 64, 0.55), (64, 128, 0.7), (128, 64, 0.7), (128, 128, 0.85), (128, 256, 1.0), (256, 128, 1.0))


def seconds(
    m: int, n: int, k: int, experts: int, rows: tuple[int, ...], dtype: str, layout: str = "forward"
) -> float:
    """One matmul: shares of the peak by tile instead of a formula, arithmetic and memory added instead of blended."""
    rate = FLOAT_RATE if dtype == "float" else RATE
    width = 4 if dtype == "float" else 2
    best = math.inf
    for a, b, share in _TILES if experts == 1 else ((128, 256, 0.9),):
        tiles = sum(-(-row // a) for row in rows) * -(-n // b)
        waves = -(-tiles // UNITS)
        best = min(best, waves * (k + 120) * 2 * a * b / (rate * share / UNITS))
    operand = {"forward": k, "inputs": k, "weights": m}[layout]
    if operand % 8 or n % 8:
        best *= 2.0 if operand % 2 == n % 2 == 0 else 4.0
    memory = width * (m * k + experts * k * n + m * n) / BANDWIDTH
    return 3e-6 * (2 if experts > 1 else 1) + best + 0.15 * memory + max(0.0, memory - best)


def profile(seed: int = 0, noise: float = 0.02) -> DeviceProfile:
    """A profile with multiplicative noise."""
    rng = random.Random(seed)
    rates = [
        case.rate(
            1e6
            * seconds(case.m, case.n, case.k, case.experts, case.rows, case.dtype, case.layout)
            * rng.lognormvariate(0, noise),
            noise,
        )
        for case in matmuls(gpu=True)
    ]
    copies = [
        CopyRate(kind="device", size=1 << e, time_us=3 + 2 * (1 << e) / BANDWIDTH * 1e6, gbps=1.0, cv=0.0)
        for e in range(16, 33)
    ]
    return DeviceProfile(
        name="synthetic", hardware="h100", conditions={}, matmuls=tuple(rates), copies=tuple(copies)
    )


def fresh(count: int, seed: int) -> list[MatmulRate]:
    """Dense shapes that no profile has."""
    rng = random.Random(seed)
    shapes = []
    for _ in range(count):
        m, n, k = (8 * round(math.exp(rng.uniform(math.log(32), math.log(2048)))) for _ in range(3))
        time = seconds(m, n, k, 1, (m,), "bfloat16") * 1e6
        shapes.append(
            MatmulRate(
                m=m, n=n, k=k, dtype="bfloat16", time_us=time, tflops=2 * m * n * k / time / 1e6, cv=0.0
            )
        )
    return shapes
