"""Kernels compile for devices that no test machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]
if find_spec("triton") is None:
    pytest.skip("kernels need triton", allow_module_level=True)


def compiled(folder: Path, *words: str) -> list[str]:
    """Lines of the command, which must find nothing wrong. In a process of its own: here Triton may be the interpreter."""
    command = [sys.executable, "-m", "tests.trainer.kernels.compiled", *words]
    env = os.environ | {"TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=390, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


def test_kernels_compile_for_an_mi300x(tmp_path: Path) -> None:
    lines = compiled(tmp_path, "--targets", "hip:gfx942", "--models", "olmoe_1b_7b,zaya1_base")
    assert lines[-1].endswith("kernels for hip:gfx942, 0 faults") and int(lines[-1].split()[0]) >= 35


@pytest.mark.long
def test_kernels_of_published_models_compile_for_an_h100_and_an_mi300x(tmp_path: Path) -> None:
    assert compiled(tmp_path)[-1].endswith("kernels for cuda:90,hip:gfx942, 0 faults")
