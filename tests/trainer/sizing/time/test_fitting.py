"""What was fitted to a profile is kept beside it, found again, and done anew where the profile has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs import profile
from trainer.sizing.time import fitting
from trainer.sizing.time.kernels import GROUPED, TILES, Chip, MatmulModel, MatmulParameters, MatmulShape
from trainer.sizing.time.matmul import DEFAULTS

pytestmark = pytest.mark.unit

CHIP = Chip(132, TILES["hopper"], GROUPED["hopper"])
START = MatmulParameters(**(DEFAULTS.__dict__ | {"rate": 8e14, "bandwidth": 3e12}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(profile, "FOLDER", tmp_path)
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "lab.yaml").write_text("measured: here\n")
    yield tmp_path / "device"


def rows(rate: float) -> list[fitting.Measured]:
    """Shapes as a device of that rate takes them."""
    form = MatmulModel(CHIP, MatmulParameters(**(START.__dict__ | {"rate": rate})))
    shapes = [
        MatmulShape(m, n, k) for m in (512, 2048, 8192) for n in (1024, 4096) for k in (1024, 4096, 8192)
    ]
    return [(shape, form.choose(shape).seconds) for shape in shapes]


def fitted(
    dense: list[fitting.Measured],
    start: MatmulParameters = START,
    name: str = "lab",
    is_whole: Callable[[], bool] = lambda: True,
) -> tuple[MatmulParameters, list[float], list[float]]:
    return fitting.load_or_fit(name, CHIP, start, dense, [], is_whole)


def test_a_known_rate_is_found_again(folder: Path) -> None:
    tuning, off, _ = fitted(rows(6.5e14))
    assert max(abs(miss) for miss in off) < 0.03
    assert tuning.rate == pytest.approx(6.5e14, rel=0.1)


def test_the_second_time_nothing_is_fitted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fitted(rows(6.5e14))
    assert json.loads((folder / "lab.fit.json").read_text())["tuning"]["rate"] == first[0].rate
    monkeypatch.setattr(fitting, "dense", lambda *_: pytest.fail("fitted twice"))
    assert fitted(rows(6.5e14)) == first


def test_a_processor_with_another_last_digit_finds_the_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is solved for with exp and log, whose last bit differs between processors."""
    measured = rows(6.5e14)
    first = fitted(measured)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "dense", lambda *_: pytest.fail("fitted twice"))
        off = replace(START, rate=START.rate * (1 + 1e-13))
        assert fitted([(shape, s * (1 - 1e-14)) for shape, s in measured], start=off) == first
    fitted_anew: list[MatmulParameters] = []
    monkeypatch.setattr(fitting, "dense", lambda chip, start, rows: fitted_anew.append(start) or start)
    for other in (replace(START, rate=START.rate * 1.000001), replace(START, launch=5e-6)):
        fitted(measured, start=other)
    fitted(measured[1:])
    assert len(fitted_anew) == 3


def test_of_other_measurements_the_whole_of_them_alone_is_kept(folder: Path) -> None:
    kept = folder / "lab.fit.json"
    fitted(rows(6.5e14))
    before = kept.read_text()
    slower, _, _ = fitted(rows(5e14)[:12], is_whole=lambda: False)
    assert slower.rate < 6e14 and kept.read_text() == before
    fitted(rows(5e14))
    assert kept.read_text() != before


def test_a_plan_with_a_device_of_other_figures_leaves_the_kept_fit_alone(folder: Path) -> None:
    """In a fresh clone the profile is newer than its fit by a moment: the first such plan put its own in place of it."""
    kept = folder / "lab.fit.json"
    fitted(rows(6.5e14))
    before = kept.read_text()
    later = kept.stat().st_mtime + 10
    os.utime(folder / "lab.yaml", (later, later))
    fitted(rows(6.5e14), start=replace(START, bandwidth=2e12))
    assert kept.read_text() == before


def test_a_broken_file_or_a_folder_that_is_not_there_costs_a_fit_and_no_more(folder: Path) -> None:
    (folder / "lab.fit.json").write_text("{half")
    assert fitted(rows(6.5e14))[0].rate > 0
    assert fitted(rows(6.5e14), name="nowhere", is_whole=lambda: False)[0].rate > 0
    assert sorted(path.name for path in folder.iterdir()) == ["lab.fit.json", "lab.yaml"]


def test_a_folder_that_cannot_be_written_costs_the_next_plan_the_same_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _text: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(fitting, "write_whole", full)
    assert fitted(rows(6.5e14))[0].rate > 0
    assert [path.name for path in folder.iterdir()] == ["lab.yaml"]


def test_the_shipped_fit_is_that_of_the_shipped_profile() -> None:
    code = (
        "import sys; from configs.compose import compose; from trainer.sizing.search import auto; "
        "assert auto.rates_of(compose(['hardware=h100']).hardware).kernels.matmul(4096, 4096, 4096); "
        "assert not {'scipy', 'numpy', 'hydra', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
