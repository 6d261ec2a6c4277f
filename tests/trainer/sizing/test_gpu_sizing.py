"""What is measured on a GPU to check sizing: the cases, a dry run of the measurement, and, on a GPU, the measurement."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.profile import DeviceProfile, load
from tests.trainer.gpu import cases as gpu_cases
from tests.trainer.sizing import bench_device_forecast

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def profile() -> DeviceProfile:
    return load(DeviceProfile, "h100")


def measure(cases: dict[str, Any], folder: Path, *words: str) -> dict[str, Any]:
    """Run the measurement in a process of its own: it puts a stand-in where the schema would be."""
    given, out = folder / "cases.json", folder / "measured.json"
    given.write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.gpu.checks", str(given), str(out), *words],
        cwd=ROOT, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def few(profile: DeviceProfile) -> dict[str, Any]:
    """A case or two of each part."""
    models = [one.to_json() for one in gpu_cases.MODELS]
    sides = {"bad": models[0], "good": models[1]}
    shapes = gpu_cases.matmuls(profile)
    return {
        "models": [models[2], models[4]],
        "pairs": [{"name": "head_80", "mistake": "", "promised": 5.0, "changes": ["model.hidden=8"], **sides}],
        "matmuls": [*shapes[:3], *shapes[-3:]],
        "operators": {"d1024": gpu_cases.OPERATORS["d1024"]},
        "router": {"balance": "bias", "score": "softmax", "renormalize": True, "scale": 1.0},
    }  # fmt: skip


@pytest.mark.unit
def test_the_cases_are_fresh_and_as_many_as_asked(profile: DeviceProfile) -> None:
    cases = gpu_cases.matmuls(profile)
    known = {(r.m, r.n, r.k, r.experts) for r in profile.matmuls}
    keys = [(c["m"], c["n"], c["k"], c["experts"]) for c in cases]
    assert not known & set(keys) and cases == gpu_cases.matmuls(profile)
    assert sum(c["experts"] == 1 for c in cases) == 200 and len(cases) == 250
    assert any(c["n"] % 8 or c["k"] % 8 for c in cases) and any(c["m"] % 2 for c in cases)
    for case in cases[200:]:
        assert sum(case["rows"]) == case["m"] and len(case["rows"]) == case["experts"]
        assert case["imbalance"] == pytest.approx(max(case["rows"]) * case["experts"] / case["m"], abs=0.001)
        assert case["n"] % 8 == case["k"] % 8 == 0


@pytest.mark.unit
def test_the_twelve_models_span_what_they_should() -> None:
    models = [one.model for one in gpu_cases.MODELS]
    tokens = [one.sequence * one.micro_batch for one in gpu_cases.MODELS]
    assert len(models) == 12 and len({one.name for one in gpu_cases.MODELS}) == 12
    for values, low, high in (
        ([m.experts for m in models], 8, 64), ([m.top_k for m in models], 1, 8),
        ([m.expert_width for m in models], 512, 4096), ([m.hidden for m in models], 1024, 4096),
        ([m.layers for m in models], 2, 8), (tokens, 4096, 32768),
    ):  # fmt: skip
        assert (min(values), max(values)) == (low, high)
    assert any(m.shared_width for m in models) and any(m.dense_layers for m in models)


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_dry_run_measures_every_part_and_the_report_reads_it(
    profile: DeviceProfile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = few(profile)
    measured = measure(cases, tmp_path, "--dry", "--seconds", "240")
    assert not measured["errors"]
    assert len(measured["matmuls"]) == 6 and len(measured["models"]) == 2
    assert all(
        measured["operators"][f"d1024/{part}"]["both"] > 0 for part in ("attention", "dispatch", "loss")
    )
    code = bench_device_forecast.main(
        [str(tmp_path / "measured.json"), "--cases", str(tmp_path / "cases.json"), "--profile", "h100"]
    )
    out = capsys.readouterr().out
    assert code == 0
    for words in ("fresh matmuls, error of the rate: 6 of 6", "models: 2 of 2", "step time", "pairs: 1 of 1"):
        assert words in out


@pytest.mark.unit
def test_a_saving_counts_tokens() -> None:
    short, long = {"sequence": 1000, "micro_batch": 2}, {"sequence": 2000, "micro_batch": 2}
    assert bench_device_forecast.saving(1.0, 1.0, short, long) == pytest.approx(50.0)
    assert bench_device_forecast.saving(1.0, 1.1, short, short) == pytest.approx(-10.0)


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_gpu_does_what_the_dry_run_does(profile: DeviceProfile, tmp_path: Path) -> None:
    import torch  # only here: collecting the tests must not load it

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    measured = measure(few(profile), tmp_path, "--seconds", "120")
    assert not measured["errors"] and all(one["memory"]["peak"] > 0 for one in measured["models"].values())
