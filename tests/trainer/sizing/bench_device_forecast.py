"""Predicted against measured on one GPU: matmuls that no profile has, steps and memory of models, promises of `--suggest`.

python -m tests.trainer.sizing.bench_device_forecast [MEASURED.json --cases CASES.json --profile NAME]

Without arguments: what `tests/trainer/gpu/checks.py` measured on an H100, kept in `tests/trainer/sizing/measured/`.
Predictions use the profile alone. A pair has two promises: the one in the cases, written down before anything was
measured, and what is promised now for the same two shapes, whether or not they would be suggested still.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.compose import compose
from configs.hardware import HardwareConfig
from configs.profile import DeviceProfile, load
from configs.schema import ModelConfig
from tests.trainer.sizing.lint.bad_shapes import SHAPES
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model.job import FrameworkMemory, Software, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time import estimate as time
from trainer.sizing.time import schedule
from trainer.sizing.time.cost_model import CostModel
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.kernels import MatmulShape
from trainer.sizing.time.matmul import Kernels
from trainer.sizing.time.rates import Overheads, Rates

PLAIN = Software(
    name="plain torch", eager=True, tuned_attention=True, gradient_bytes=4,
    retention=replace(FrameworkMemory(), late_gradients=2, staging=0.0, update=(0, 0)),
)  # fmt: skip
"""What `gpu_models` does: weights and gradients in bf16, gradients of all weights left until the backward pass ends, then
copied to fp32 ones that stay; no reduction buffers, no flattened copies."""
BARE = Overheads(
    step=0.0, source="forward, backward and update follow each other, with nothing between steps"
)
"""Its host: a step that is timed is those three and no more."""
MEASURED = Path(__file__).with_name("measured")
POINTS = 5.0
"""By how many points a promise may be missed."""
Case = dict[str, Any]


def shape_of(case: Case) -> MatmulShape:
    """A matmul's shape as sizing names it."""
    return MatmulShape(case["m"], case["n"], case["k"], case["experts"], case["imbalance"])


def errors(pairs: Sequence[tuple[float, float]]) -> str:
    """Mean, median and tail of |predicted / measured - 1|, and the bias."""
    sizes = sorted(abs(predicted / measured - 1) for predicted, measured in pairs)
    bias = math.exp(statistics.mean(math.log(predicted / measured) for predicted, measured in pairs)) - 1
    tail = sizes[min(len(sizes) - 1, round(0.95 * len(sizes)))]
    return (
        f"n={len(sizes)}  MAPE {statistics.mean(sizes):.1%}  median {statistics.median(sizes):.1%}  p95 {tail:.1%}  "
        f"bias {bias:+.1%}"
    )


def matmul_report(kernels: Kernels, cases: Sequence[Case], measured: dict[str, Any], title: str) -> list[str]:
    """Errors by kind, coverage of the interval, and the worst shapes."""
    rows = []
    for index, case in enumerate(cases):
        if (timed := measured.get(str(index))) is None:
            continue
        figure = kernels.matmul_figure("matmul", shape_of(case))
        assert figure is not None, kernels.why()
        rows.append((case, figure, timed["seconds"]))
    kinds: dict[str, Callable[[Case], bool]] = {
        "dense": lambda c: c["experts"] == 1,
        "dense, multiples of 64": lambda c: c["experts"] == 1 and c["n"] % 64 == 0 and c["k"] % 64 == 0,
        "dense, of 8": lambda c: (
            c["experts"] == 1 and (c["n"] % 64 or c["k"] % 64) and not (c["n"] % 8 or c["k"] % 8)
        ),
        "dense, neither": lambda c: c["experts"] == 1 and bool(c["n"] % 8 or c["k"] % 8),
        "grouped": lambda c: c["experts"] > 1,
    }
    lines = [f"{title}: {len(rows)} of {len(cases)} measured"]
    for kind, fits in kinds.items():
        part = [(figure, seconds) for case, figure, seconds in rows if fits(case)]
        if part:
            inside = sum(figure.low <= seconds <= figure.high for figure, seconds in part) / len(part)
            # Rates: predicted over measured rate is measured over predicted time.
            lines.append(
                f"  {kind:<28} {errors([(seconds, figure.value) for figure, seconds in part])}  covered {inside:.0%}"
            )
    worst = sorted(rows, key=lambda row: -abs(math.log(row[2] / row[1].value)))[:8]
    for case, figure, seconds in worst:
        name = f"{case['m']} x {case['n']} x {case['k']}, {case['experts']} experts, imbalance {case['imbalance']}"
        lines.append(f"    {name}: predicted {figure.value * 1e6:.1f} us, measured {seconds * 1e6:.1f} us")
    return lines


def job_of(case: Case, software: Software, imbalance: float = 1.0) -> TrainingJob:
    """One model and batch on one device."""
    return TrainingJob(
        model=ModelConfig.model_validate(case["model"]), layout=Layout(1, 1, 1, 1, 1, 1), sequence=case["sequence"],
        micro_batch=case["micro_batch"], global_batch=case["micro_batch"], zero=0, imbalance=imbalance, node=1,
        software=software,
    )  # fmt: skip


def model_report(rates: Rates, cases: Sequence[Case], measured: dict[str, Any]) -> list[str]:
    """Step time and peak memory of each model."""
    lines = [
        f"models: {len(measured)} of {len(cases)} measured",
        f"  {'':<22} {'step ms':>17} {'':>7} {'peak GiB':>15}",
    ]
    times, peaks = [], []
    for case in cases:
        if (timed := measured.get(case["name"])) is None:
            continue
        job = job_of(case, PLAIN)
        predicted = time.parts(job, rates)
        used = memory.usage(job, rates.hardware.kind, 0, schedule.job_stages(job)[0])
        peak, step = timed["memory"].get("peak"), timed["step"]
        times.append((predicted.step, step))
        line = f"  {case['name']:<22} {predicted.step * 1e3:8.1f} {step * 1e3:8.1f} {predicted.step / step - 1:+7.1%}"
        if peak:
            peaks.append((used.allocated, peak))
            line += f" {used.allocated / 2**30:7.2f} {peak / 2**30:7.2f} {used.allocated / peak - 1:+7.1%}"
        shares = ", ".join(
            f"{name} {value * 1e3:.1f}" for name, value in vars(predicted).items() if value > 1e-4
        )
        phases = ", ".join(f"{name} {timed[name] * 1e3:.1f}" for name in ("forward", "backward", "optimizer"))
        lines += [
            line,
            f"      predicted ms: {shares}",
            f"      measured ms: {phases}; imbalance {max(timed['imbalance'] or [1]):.2f}",
        ]
    if times:
        lines.append(f"  step time    {errors(times)}")
    if peaks:
        lines.append(f"  peak memory  {errors(peaks)}")
    return lines


def saving(now: float, then: float, bad: Case, good: Case) -> float:
    """Percent of the time of a token that a better shape saves."""
    per_bad, per_good = bad["sequence"] * bad["micro_batch"], good["sequence"] * good["micro_batch"]
    return 100.0 * (1 - then / per_good / (now / per_bad))


def promise(costs: CostModel, case: Case) -> float:
    """What is promised now for a pair's two shapes."""
    job = next(shape for shape in SHAPES if shape.name == case["name"]).job(costs.hardware.name)
    seconds = []
    for side in (case["bad"], case["good"]):
        model = ModelConfig.model_validate(side["model"])
        one = replace(job, model=model, sequence=side["sequence"], micro_batch=side["micro_batch"])
        price = costs.micro_batch(one)
        assert price is not None
        seconds.append(price.seconds)
    return saving(*seconds, case["bad"], case["good"])


def pair_report(costs: CostModel, cases: Sequence[Case], measured: dict[str, Any]) -> list[str]:
    """What was promised, before and now, what was measured, and whether they agree."""
    lines = [
        f"pairs: {len(measured)} of {len(cases)} measured; percent of a token's time saved, forward and backward"
    ]
    faster = before = now = 0
    for case in cases:
        if (timed := measured.get(case["name"])) is None:
            continue
        sides = {side: timed[side]["forward"] + timed[side]["backward"] for side in ("bad", "good")}
        is_saved = saving(sides["bad"], sides["good"], case["bad"], case["good"])
        step = saving(timed["bad"]["step"], timed["good"]["step"], case["bad"], case["good"])
        spread = max(timed["ratios"]) / min(timed["ratios"]) - 1
        promised = promise(costs, case)
        kept = abs(is_saved - promised) <= POINTS
        before += abs(is_saved - case["promised"]) <= POINTS
        now, faster = now + kept, faster + (is_saved > 0)
        lines.append(
            f"  {case['name']:<16} promised {case['promised']:5.1f} before, {promised:5.1f} now, measured {is_saved:5.1f} "
            f"(whole step {step:5.1f}), turns within {spread:.1%}: {'kept' if kept else 'missed'}; "
            f"{', '.join(case['changes'])}"
        )
    return [
        *lines,
        f"  within {POINTS:g} points: {now} of {len(measured)}, {before} as promised before the measurement; faster: "
        f"{faster} of {len(measured)}",
    ]


def main(arguments: list[str]) -> int:
    """Print the three parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", type=Path, nargs="?", default=MEASURED / "h100.json")
    parser.add_argument("--cases", type=Path, default=MEASURED / "h100_cases.json")
    parser.add_argument("--profile", default="h100")
    options = parser.parse_args(arguments)
    measured, cases = json.loads(options.measured.read_text()), json.loads(options.cases.read_text())
    profile = load(DeviceProfile, options.profile)
    hardware: HardwareConfig = compose([f"hardware={profile.hardware}"]).hardware
    kernels = Kernels(hardware, profile)
    machine = measured["machine"]
    print(
        f"{machine.get('device', 'CPU')}, torch {machine['torch']}; profile {profile.name}: {len(profile.matmuls)} matmuls"
    )
    print(
        "\n".join(
            matmul_report(kernels, cases["matmuls"], measured["matmuls"], "fresh matmuls, error of the rate")
        )
    )
    rates = Rates(hardware, from_catalogue(hardware), profile, BARE)
    print("\n".join(model_report(rates, cases["models"], measured["models"])))
    print("\n".join(pair_report(CostModel(hardware, profile), cases["pairs"], measured["pairs"])))
    for name, reason in measured["errors"].items():
        print(f"not measured: {name}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
