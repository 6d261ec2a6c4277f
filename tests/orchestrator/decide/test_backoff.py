"""Waits between tries."""

from __future__ import annotations

import pytest

from orchestrator.decide import backoff
from orchestrator.local.supervisor import RestartPolicy

pytestmark = [pytest.mark.unit, pytest.mark.timeout(30)]


def test_a_wait_doubles_up_to_its_cap_however_often_it_failed() -> None:
    assert [backoff.exponential_backoff(2.0, n, 60.0) for n in range(1, 8)] == [2, 4, 8, 16, 32, 60, 60]
    assert (
        backoff.exponential_backoff(1.0, 10**6, 15.0) == 15.0
        and backoff.exponential_backoff(0.0, 10**6, 15.0) == 0.0
    )


def test_a_supervisor_asks_for_its_controller_for_ever() -> None:
    watch, now, asked = RestartPolicy(), 0.0, 0
    watch.due("beat", now)
    while asked < 3000:  # a wait of 2 to the power of that would be not a float any more
        now += 15.0
        asked += watch.due("beat", now)
    assert watch.next_try - now <= 15.0
