"""What was fitted to a profile is kept beside it, found again, and done anew where the profile has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import profile
from trainer.sizing.time import fits, fitting
from trainer.sizing.time.kernels import GROUPED, TILES, Chip, Form, MatmulShape, Tuning
from trainer.sizing.time.matmul import DEFAULTS

pytestmark = pytest.mark.unit

CHIP = Chip(132, TILES["hopper"], GROUPED["hopper"])
START = Tuning(**(DEFAULTS.__dict__ | {"rate": 8e14, "bandwidth": 3e12}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(profile, "FOLDER", tmp_path)
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "lab.yaml").write_text("measured: here\n")
    yield tmp_path / "device"


def rows(rate: float) -> list[fitting.Measured]:
    """Shapes as a device of that rate takes them."""
    form = Form(CHIP, Tuning(**(START.__dict__ | {"rate": rate})))
    shapes = [
        MatmulShape(m, n, k) for m in (512, 2048, 8192) for n in (1024, 4096) for k in (1024, 4096, 8192)
    ]
    return [(shape, form.choose(shape).seconds) for shape in shapes]


def test_a_known_rate_is_found_again(folder: Path) -> None:
    tuning, off, _ = fits.fitted("lab", CHIP, START, rows(6.5e14), [])
    assert max(abs(miss) for miss in off) < 0.03
    assert tuning.rate == pytest.approx(6.5e14, rel=0.1)


def test_the_second_time_nothing_is_fitted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fits.fitted("lab", CHIP, START, rows(6.5e14), [])
    assert json.loads((folder / "lab.fit.json").read_text())["tuning"]["rate"] == first[0].rate
    monkeypatch.setattr(fitting, "dense", lambda *_: pytest.fail("fitted twice"))
    assert fits.fitted("lab", CHIP, START, rows(6.5e14), []) == first


def test_another_profile_of_the_name_is_fitted_and_not_kept_until_it_is_newer(folder: Path) -> None:
    kept = folder / "lab.fit.json"
    fits.fitted("lab", CHIP, START, rows(6.5e14), [])
    before = kept.read_text()
    slower, _, _ = fits.fitted("lab", CHIP, START, rows(5e14)[:12], [])
    assert slower.rate < 6e14 and kept.read_text() == before
    later = kept.stat().st_mtime + 10
    os.utime(folder / "lab.yaml", (later, later))
    fits.fitted("lab", CHIP, START, rows(5e14), [])
    assert kept.read_text() != before


def test_a_broken_file_or_a_folder_that_is_not_there_costs_a_fit_and_no_more(folder: Path) -> None:
    (folder / "lab.fit.json").write_text("{half")
    assert fits.fitted("lab", CHIP, START, rows(6.5e14), [])[0].rate > 0
    assert fits.fitted("nowhere", CHIP, START, rows(6.5e14), [])[0].rate > 0
    assert sorted(path.name for path in folder.iterdir()) == ["lab.fit.json", "lab.yaml"]


def test_a_folder_that_cannot_be_written_costs_the_next_plan_the_same_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _text: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(fits, "write_whole", full)
    assert fits.fitted("lab", CHIP, START, rows(6.5e14), [])[0].rate > 0
    assert [path.name for path in folder.iterdir()] == ["lab.yaml"]


def test_the_shipped_fit_is_that_of_the_shipped_profile() -> None:
    code = (
        "import sys; from configs.compose import compose; from trainer.sizing.search import auto; "
        "assert auto.rates_of(compose(['hardware=h100']).hardware).kernels.matmul(4096, 4096, 4096); "
        "assert not {'scipy', 'numpy', 'hydra', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
