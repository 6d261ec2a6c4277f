"""`watch` in lines, where there is no terminal."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

from orchestrator.commands import watching
from orchestrator.record import summaries
from tests.web.made import MadeRun, a_home, queue_file

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def test_watch_says_the_same_of_a_silent_controller_in_lines_and_once(tmp_path: Path) -> None:
    home = a_home(tmp_path)
    made = MadeRun(home, now=time.time() - 60).submit().start().train(10)
    queue_file(home, time.time())
    out, turns = io.StringIO(), iter(range(9))

    def sleep(_: float) -> None:
        turn = next(turns)
        queue_file(home, time.time() - (45 + turn if 1 <= turn < 4 else 0))
        if turn == 6:
            made.finish()

    watching.watch(made.run, home, out, sleep)
    told = [line for line in out.getvalue().splitlines() if "controller" in line]
    assert (
        len(told) == 2
        and told[0].startswith("no controller has been active for 4")
        and told[1] == "the controller is back"
    ), told
    assert told[0].endswith(summaries.controller_silence({"beat": 0.0}, 60.0).partition(": ")[2]), (
        "as `list` has it"
    )
