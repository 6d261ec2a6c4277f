"""Eight real ranks, and the one that began it: three of the faults of `python -m tests.faulttol.culprits`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faulttol.culprits import DEATH_PLACES, DEATHS, HANGS, LAYOUTS, WORLD, trials

ROOT = Path(__file__).parents[2]
CASES = "leave:middle,sleep:reading,stop_writer:writing"


@pytest.mark.dist
@pytest.mark.timeout(280)
def test_the_rank_that_began_it_is_named() -> None:
    """Those that are the hardest to tell: no signal, no error, no state of the kernel that names the rank itself."""
    command = [
        sys.executable,
        "-m",
        "tests.faulttol.culprits",
        "--only",
        CASES,
        "--count",
        "36",
        "--seed",
        "5",
    ]
    done = subprocess.run(
        [*command, "--patience", "15"],
        cwd=ROOT, capture_output=True, text=True, timeout=270, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 of 3 named right"), done.stdout


@pytest.mark.dist
@pytest.mark.timeout(60)
def test_a_hundred_faults_are_of_all_kinds() -> None:
    drawn = trials(100, 1)
    assert len(drawn) == 100 and trials(100, 1) == drawn != trials(100, 2)
    faults = [trial.fault for trial in drawn]
    assert {fault.act for fault in faults if not fault.hangs} == set(DEATHS)
    assert {(fault.act, fault.where) for fault in faults if fault.hangs} == set(HANGS)
    assert {fault.where for fault in faults if not fault.hangs} == set(DEATH_PLACES)
    assert {fault.rank for fault in faults} == set(range(WORLD))
    assert {trial.layout for trial in drawn} == set(range(len(LAYOUTS)))
    assert {trial.first for trial in drawn} == {0, 1}
