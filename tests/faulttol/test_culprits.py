"""The faults of `python -m tests.faulttol.culprits`, which `make long` plays on eight real ranks."""

from __future__ import annotations

import pytest

from tests.faulttol.culprits import DEATH_PLACES, DEATHS, HANGS, LAYOUTS, WORLD, trials


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
