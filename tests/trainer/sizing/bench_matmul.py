"""How well matmul times are predicted on a device: cross-validated on its profile, beside simpler predictors.

python -m tests.trainer.sizing.bench_matmul PROFILE [--worst N]

PROFILE is a name under configs/profiles/device, or a path that ends in .yaml. Shapes are held out in two ways: one in
ten at random, and all that share [n, k] (or [n, k, experts]) with the one that is predicted, which is harder: a
neighbour that differs in rows alone then helps no more.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from configs.compose import compose
from configs.hardware import HardwareConfig
from configs.profile import DeviceProfile, MatmulRate, load
from trainer.sizing.time import fitting
from trainer.sizing.time.kernels import (
    Chip,
    KernelKind,
    KernelPlan,
    MatmulModel,
    MatmulParameters,
    MatmulShape,
)
from trainer.sizing.time.matmul import Kernels

Predictor = Callable[[Sequence[MatmulRate], MatmulRate], tuple[float, float, float]]
_PRECISIONS = {"bfloat16": "bf16", "half": "fp16", "float": "fp32"}


def predictions(
    hardware: HardwareConfig,
    profile: DeviceProfile,
    kept: Sequence[MatmulRate],
    left_out: Sequence[MatmulRate],
) -> list[tuple[float, float, float]]:
    """Predicted over measured time, and the interval's ends over it."""
    kernels = Kernels(hardware, profile.model_copy(update={"matmuls": tuple(kept)}))
    seconds = []
    for row in left_out:
        shape = shape_of(row)
        figure = kernels.matmul_figure("matmul", shape, _PRECISIONS[row.dtype])
        assert figure is not None, kernels.why()
        measured = row.time_us / 1e6
        seconds.append((figure.value / measured, figure.low / measured, figure.high / measured))
    return seconds


def shape_of(row: MatmulRate) -> MatmulShape:
    """The shape of a measured rate."""
    return MatmulShape(row.m, row.n, row.k, row.experts, row.imbalance, row.layout)


def folds(rows: Sequence[MatmulRate], way: str, seed: int = 0) -> list[list[MatmulRate]]:
    """Parts that are held out in turn."""
    if way == "random":
        order = list(rows)
        random.Random(seed).shuffle(order)
        return [order[i::10] for i in range(10)]
    groups: dict[tuple[int, ...], list[MatmulRate]] = {}
    for row in rows:
        groups.setdefault((row.n, row.k, row.experts), []).append(row)
    return list(groups.values())


def cross_validated(
    hardware: HardwareConfig, profile: DeviceProfile, way: str
) -> list[tuple[MatmulRate, tuple[float, float, float]]]:
    """Each shape with what the others predict of it."""
    pairs = []
    for part in folds(profile.matmuls, way):
        out = set(map(id, part))
        kept = [row for row in profile.matmuls if id(row) not in out]
        pairs += zip(part, predictions(hardware, profile, kept, part), strict=True)
    return pairs


def baselines(profile: DeviceProfile, rows: Sequence[MatmulRate]) -> dict[str, float]:
    """Mean error of a constant rate, and of a roofline with the best rate, both told the answer's scale."""
    best = max(row.tflops for row in profile.matmuls if row.dtype == "bfloat16")
    middle = statistics.median(row.tflops for row in rows)
    bandwidth = max(copy.gbps for copy in profile.copies if copy.kind == "device") * 1e9
    constant, roofline = [], []
    for row in rows:
        flops = 2.0 * row.m * row.n * row.k
        moved = 2.0 * (row.m * row.k + row.experts * row.n * row.k + row.m * row.n)
        constant.append(abs(row.tflops / middle - 1))
        roofline.append(abs(max(flops / best / 1e12, moved / bandwidth) / (row.time_us / 1e6) - 1))
    return {"constant rate": statistics.mean(constant), "roofline": statistics.mean(roofline)}


def line(name: str, ratios: Sequence[tuple[float, float, float]]) -> str:
    """Error of the rate (measured over predicted time), in mean, median and tail, and the interval's coverage."""
    errors = sorted(abs(1 / ratio - 1) for ratio, _, _ in ratios)
    inside = sum(low <= 1.0 <= high for _, low, high in ratios) / len(ratios)
    tail = errors[min(len(errors) - 1, round(0.95 * len(errors)))]
    bias = math.exp(statistics.mean(math.log(ratio) for ratio, _, _ in ratios)) - 1
    return (
        f"  {name:<34} {len(ratios):>4} {statistics.mean(errors):>8.1%} {statistics.median(errors):>8.1%} "
        f"{tail:>8.1%} {bias:>+8.1%} {inside:>8.1%}"
    )


class Smooth(MatmulModel):
    """The formula without waves: as if a part of a unit could be left free."""

    def plan(self, shape: MatmulShape) -> KernelPlan:
        plan = super().plan(shape)
        return plan._replace(waves=max(1.0, plan.blocks / self.chip.units))  # type: ignore[arg-type]


def rules(profile: DeviceProfile, chip: Chip, start: MatmulParameters) -> list[str]:
    """What each rule of tiles and waves explains: error of the formula fitted with and without it, nothing smoothed."""
    rows = [
        (shape_of(r), r.time_us / 1e6)
        for r in profile.matmuls
        if r.dtype == "bfloat16" and shape_of(r).kind == KernelKind.ALIGNED
    ]
    dense, grouped = ([row for row in rows if (row[0].experts > 1) == many] for many in (False, True))
    rule = chip.grouped
    variants: list[tuple[str, Chip, type[MatmulModel]]] = [
        ("as it is", chip, MatmulModel),
        ("no waves", chip, Smooth),
        ("one tile, 128 x 256", replace(chip, tiles=((128, 256),)), MatmulModel),
        (
            "tiles of powers of two",
            replace(chip, tiles=tuple(t for t in chip.tiles if {*t} <= {64, 128, 256})),
            MatmulModel,
        ),
    ]
    if rule:
        variants.append(
            ("grouped: tiles not in pairs", replace(chip, grouped=replace(rule, cluster=1)), MatmulModel)
        )
        variants.append(
            ("grouped: large tile always", replace(chip, grouped=replace(rule, few=0)), MatmulModel)
        )
    lines = [f"  {'rules, error in sample':<34} {'dense':>8} {'grouped':>8}"]
    for name, one, kind in variants:
        tuning = fitting.fit(one, fitting.dense(one, start, dense), fitting.GROUPED, grouped)
        form = kind(one, tuning)
        errors = [
            statistics.mean(abs(seconds / form.choose(shape).seconds - 1) for shape, seconds in part)
            for part in (dense, grouped)
        ]
        lines.append(f"  {name:<34} {errors[0]:>8.1%} {errors[1]:>8.1%}")
    return lines


def main(arguments: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("--worst", type=int, default=8, help="shapes that are summaries by name")
    options = parser.parse_args(arguments)
    profile = load(DeviceProfile, options.profile)
    hardware = compose([f"hardware={profile.hardware}"]).hardware
    begun = time.process_time()
    whole = Kernels(hardware, profile)
    whole.matmul(4096, 4096, 4096)
    fit = time.process_time() - begun
    timed = whole.model("bf16")
    assert not isinstance(timed, str)
    model = timed.form
    print(
        f"profile {profile.name} of {profile.hardware}: {len(profile.matmuls)} matmuls; fitted in {fit * 1e3:.0f} ms"
    )
    summaries = {
        name: f"{value:.4g}" if isinstance(value, float) else "/".join(f"{x:.3g}" for x in value)
        for name, value in vars(model.tuning).items()
    }
    print("  " + ", ".join(f"{name}={value}" for name, value in summaries.items()))
    print(f"  {'held out':<34} {'n':>4} {'MAPE':>8} {'median':>8} {'p95':>8} {'bias':>8} {'covered':>8}")
    kinds: dict[str, Callable[[MatmulRate], bool]] = {
        "dense bf16": lambda r: r.experts == 1 and r.dtype == "bfloat16",
        "dense bf16, aligned": lambda r: (
            r.experts == 1 and r.dtype == "bfloat16" and shape_of(r).kind == KernelKind.ALIGNED
        ),
        "dense bf16, not aligned": lambda r: (
            r.experts == 1 and r.dtype == "bfloat16" and shape_of(r).kind != KernelKind.ALIGNED
        ),
        "dense half and float": lambda r: r.dtype != "bfloat16",
        "grouped, even": lambda r: r.experts > 1 and r.imbalance <= 1.01,
        "grouped, uneven": lambda r: r.experts > 1 and r.imbalance > 1.01,
    }
    for way in ("random", "same [n, k]"):
        pairs = cross_validated(hardware, profile, way)
        for kind, fits in kinds.items():
            part = [ratio for row, ratio in pairs if fits(row)]
            if part:
                print(line(f"{kind}, {way}", part))
        worst = sorted(pairs, key=lambda item: -abs(math.log(item[1][0])))[: options.worst]
        for row, (ratio, _, _) in worst:
            shape = f"{row.m} x {row.n} x {row.k} {row.dtype} {row.experts} experts, {row.imbalance:g}"
            print(
                f"    {shape}: predicted {ratio * row.time_us:.1f} us, measured {row.time_us:.1f} us ({1 / ratio - 1:+.1%})"
            )
    for kind in ("dense bf16", "grouped, even", "grouped, uneven"):
        rows = [row for row in profile.matmuls if kinds[kind](row)]
        if rows:
            print(
                f"  baselines, {kind}: "
                + ", ".join(f"{n} {v:.1%}" for n, v in baselines(profile, rows).items())
            )
    print("\n".join(rules(profile, model.chip, model.tuning)))
    empty = profile.model_copy(update={"matmuls": ()})
    rows = [row for row in profile.matmuls if kinds["dense bf16"](row)]
    print(line("dense bf16 from the catalogue", predictions(hardware, empty, (), rows)))
    rows = [row for row in profile.matmuls if row.experts > 1]
    if rows:
        print(line("grouped from the catalogue", predictions(hardware, empty, (), rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
