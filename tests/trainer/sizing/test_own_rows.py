"""The forecast beside what the bench measured of this trainer on GPUs, so that it can't drift from that.

Rows that calibrated a constant are marked; the others check it. `missed` says why a row's step isn't within the limit, and
`fullest` what an untrained router gave the fullest rank.
`python -m tests.trainer.sizing.test_own_rows` prints them all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig
from trainer.bench import variants
from trainer.bench.options import Options
from trainer.sizing.search import auto
from trainer.sizing.search.legal import AXES

pytestmark = pytest.mark.dist

KNOWN: dict[str, Any] = json.loads((Path(__file__).with_name("measured") / "own.json").read_text())
ROWS: list[dict[str, Any]] = KNOWN["rows"]
STEP, MEMORY = 0.10, 0.05
"""Largest errors of a row's forecast."""
CHOICE = 1.03
"""Most that the planner's choice may take over the best that was measured."""


def name(row: dict[str, Any]) -> str:
    set_up = f"{row['model']} layers={row['layers']} {row['words']} {row['variant']} {row['routing']}"
    return f"{hardware(row)} {set_up}".replace("  ", " ")


def hardware(row: dict[str, Any]) -> str:
    """The preset of the GPUs that a row was measured on."""
    preset: str = row.get("hardware", KNOWN["hardware"])
    return preset


def config(row: dict[str, Any], variant: str | None = None) -> RunConfig:
    """A row's configuration, or one of its model under another variant."""
    words = (f"hardware={hardware(row)}", *row["words"].split())
    options = Options(words, row["model"], row["layers"], row["routing"], 4, (), None)
    (one,) = variants.parse(row["variant"] if variant is None else variant, options)
    return variants.resolve(one.options, row["gpus"], on_gpu=True)[0]


def errors(row: dict[str, Any]) -> tuple[float, float]:
    """Of a row's step and memory, forecast over measured less one."""
    imbalance = row.get("fullest", variants.imbalance_of(row["routing"]))
    seconds, size = variants.forecast(config(row), row["gpus"], imbalance)
    assert seconds is not None
    return seconds * 1e3 / row["step_ms"] - 1, size / 1e9 / row["memory_gb"] - 1


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_the_forecast_holds(row: dict[str, Any]) -> None:
    step, memory = errors(row)
    assert abs(memory) <= MEMORY, f"memory {memory:+.1%}"
    # Where the reason of a miss is mended, its note goes.
    assert (abs(step) <= STEP) == ("missed" not in row), f"step {step:+.1%}"


def test_errors_lie_on_both_sides_and_few_rows_calibrate() -> None:
    made = [errors(row) for row in ROWS if "missed" not in row]
    assert abs(sum(step for step, _ in made) / len(made)) <= 0.04
    assert abs(sum(memory for _, memory in made) / len(made)) <= 0.02
    assert sum(row["calibrates"] for row in ROWS) == 4
    assert sum("missed" in row for row in ROWS) <= 1


@pytest.mark.parametrize(("gpus", "count"), [(2, 5), (4, 3)])
def test_the_planner_chooses_what_is_fastest(gpus: int, count: int) -> None:
    """Of one model's layouts that were measured on the same GPUs with real text, hot experts lent among them."""
    real = [
        row for row in ROWS if (row["gpus"], row["routing"], row["model"]) == (gpus, "real", "qwen3_30b_a3b")
    ]
    where = KNOWN["hardware"]
    ours = [row for row in real if row["layers"] == 2 * gpus and (gpus == 2 or hardware(row) == where)]
    assert len(ours) == count

    def set_up(made: RunConfig) -> tuple[object, ...]:
        return *(made.parallel.size(axis) for axis in AXES), made.parallel.lend_rows

    measured = {set_up(config(row)): row["step_ms"] for row in ours}
    assert measured[set_up(config(ours[0], variants.AUTO))] <= CHOICE * min(measured.values())


def test_a_balanced_route_is_forecast_as_one() -> None:
    row = next(one for one in ROWS if one["routing"] == "balanced" and one["variant"] == "ep=2")
    even, uneven = (variants.forecast(config(row), 2, imbalance) for imbalance in (1.0, None))
    assert even[0] is not None and uneven[0] is not None and even[0] < uneven[0] and even[1] < uneven[1]
    assert auto.job_of(config(row), auto.Layout(1, 2, 1, 2, 1, 1), 2).imbalance > 1


def main() -> None:
    """Print each row's errors."""
    for row in ROWS:
        step, memory = errors(row)
        note = f": missed, {row['missed']}" if "missed" in row else ""
        kind = "calibrates" if row["calibrates"] else ""
        print(f"{step:+7.1%} {memory:+7.1%} {kind:<10} {name(row)}{note}")


if __name__ == "__main__":
    main()
