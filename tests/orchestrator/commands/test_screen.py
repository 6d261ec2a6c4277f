"""The full-screen view: its picture as plain data, and `watch` and `list --watch` on real pseudo-terminals."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

import numpy as np
import pytest

from configs.metrics import EvaluatedLine, MeasuredLine, ResumedLine, SavedLine, StepLine
from configs.paths import HomePaths
from faulttol.detect.snapshot import RankObservation
from faulttol.timeline.step_file import STORED, StepFile, folder
from orchestrator.commands import screen
from orchestrator.commands.screen import RunScreen, lines, sparkline, stacked_bar, tail_positions
from orchestrator.commands.text import plain
from orchestrator.record import rank_status, summaries
from orchestrator.record.following import Follower
from orchestrator.record.ranks import RankActivity, RankReader
from tests.conftest import readable
from tests.orchestrator.fake_runtime import step_line
from tests.source_tree import ROOT
from tests.web.made import MadeRun, a_home, queue_file

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

BLOCKS = "▁▂▃▄▅▆▇█"
SILENT = "no controller has been active for 4"


def shown(picture: RunScreen, width: int = 80, height: int = 24, rich: bool = True) -> list[str]:
    return [line.plain for line in lines(picture, width, height, rich)]


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A run of four ranks that was killed at step 15, and continues from step 10."""
    home = a_home(tmp_path / "home")
    run = (
        MadeRun(home, now=time.time() - 120, ranks=4)
        .submit()
        .wait(2)
        .start(1, 3)
        .train(10)
        .save()
        .train(5)
        .fault(detect=2)
    )
    queue_file(home, time.time())
    return run.start(1, 3, step=10, part="restart").train(12)


def picture_of(run: MadeRun) -> RunScreen:
    picture = RunScreen(row=summaries.summary(run.run, {}))
    picture.apply(Follower(run.run).poll())
    return picture


# ---- parts of the picture ----


def test_a_spark_shows_the_course_in_as_many_columns_as_there_are() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8, BLOCKS) == "█▇▆▅▄▃▂▁"
    assert sparkline([1, 1, 8, 8], 2, BLOCKS) == "▁█"
    assert sparkline([3.0, 3.0], 10, BLOCKS) == "▁▁" and sparkline([], 10, BLOCKS) == ""
    assert len(sparkline(list(range(1000)), 37, BLOCKS)) == 37


def test_a_bar_has_its_parts_in_proportion_and_never_more_than_its_width() -> None:
    assert stacked_bar([(1, "a", ""), (2, "b", ""), (1, "c", "")], 8, 4.0).plain == "aabbbbcc"
    assert stacked_bar([(1, "a", ""), (0, "b", "")], 8, 4.0).plain == "aa      "
    assert (
        stacked_bar([(9, "a", "")], 4, 1.0).plain == "aaaa"
        and stacked_bar([(1, "a", "")], 4, 0.0).plain == "    "
    )


def test_text_from_elsewhere_moves_nothing() -> None:
    assert plain("a\x1b[2Jb\rc\nd\x9be\u202ef") == "a [2Jb c d e f"


def test_the_picture_of_a_run_with_a_fault(made: MadeRun) -> None:
    told = shown(picture_of(made))
    assert told[0].startswith(f"{made.run_id}  running")
    assert "attempt 2" in told[1] and "1 incident," in told[1] and "ann" in told[1]
    assert re.search(r"█+░+ 22/100 22\.0%$", told[2]) and len(told[2]) == 80
    assert "64 tok/s | 1 s/step | eta 1:18" in told[3]
    assert told[4].startswith("loss 2.6") and told[4].endswith("steps 1 to 22"), "lost steps are shown once"
    assert told[5][0] == "█" and told[5][-1] == "▁" and len(told[5]) == 22
    assert "events" in told
    assert any("incident 1: rank 1 was killed by SIGKILL" in line for line in told)


def test_a_rewind_takes_the_lost_losses_with_it() -> None:
    picture = RunScreen()
    picture.apply([step_line(1, step, step) for step in range(1, 9)])
    picture.apply([ResumedLine(9.0, 2, 5, "p", "")])
    assert [step for step, _ in picture.losses] == [1, 2, 3, 4, 5]
    picture.apply([step_line(2, 6, 10.0, loss=float("nan"))])
    assert len(picture.losses) == 5 and picture.newest is not None, (
        "what isn't finite has no place in the curve"
    )


def test_memory_is_bounded() -> None:
    picture = RunScreen()
    for step in range(1, 30_000):
        picture.apply([step_line(1, step, float(step)), SavedLine(float(step), 1, step, "p", 1, 0.1)])
    assert len(picture.losses) <= 2 * screen._LOSSES and len(picture.messages) == screen._KEPT
    assert picture.losses[-1][0] > 29_990


def test_every_size_fits(made: MadeRun) -> None:
    picture = picture_of(made)
    picture.ranks = [
        RankActivity(rank, {"compute": 0.3, "wait": 0.1}, "step 12, forward") for rank in range(500)
    ]
    picture.silent = "no controller has been active for 30 s"
    for width in (40, 41, 57, 80, 200):
        for height in (1, 5, 10, 24, 60):
            told = shown(picture, width, height)
            assert len(told) <= height and all(len(line) <= width for line in told)
    assert all(line.isascii() for line in shown(picture, rich=False))
    assert any(
        line.startswith("###") and line.endswith("22/100 22.0%") for line in shown(picture, rich=False)
    )


def test_of_many_ranks_those_furthest_from_the_others_are_shown(made: MadeRun) -> None:
    picture = picture_of(made)
    picture.ranks = [
        RankActivity(rank, {"compute": 0.3, "wait": 0.2}, "step 12, waits in all_reduce")
        for rank in range(12_288)
    ]
    picture.ranks[9111] = RankActivity(9111, {"compute": 0.5, "wait": 0.0}, "step 12, forward")
    told = shown(picture)
    at = next(i for i, line in enumerate(told) if line.startswith("ranks"))
    assert told[at].startswith("ranks, 8 of 12288 furthest from the median  █ compute  ▓ data")
    assert told[at + 1].startswith(" 9111 ██") and "0.5 s  step 12, forward" in told[at + 1]
    assert "░" in told[at + 2] and "0.5 s" in told[at + 2]


def test_ranks_are_read_from_their_steps_and_looks(made: MadeRun) -> None:
    paths = made.run.attempt(2)
    seconds = np.zeros((len(STORED), 2, 20))
    seconds[STORED.index("compute")] = [[0.25] * 20, [0.5] * 20]
    seconds[STORED.index("wait")] = [[0.25] * 20, [0.0] * 20]
    starts = (1_700_000_000 + np.arange(20)) * 10**9
    StepFile(folder(paths.root) / "n1.steps", "n1", (0, 1)).append(1, starts, seconds)
    rank_status.write_statuses(
        paths.seen,
        "n1",
        [RankObservation(1, 101, waits="all_reduce"), RankObservation(2, 102, exit_code=-9)],
        time.time(),
    )
    reader = RankReader(made.run)
    ranks = reader.read(2)
    assert [one.rank for one in ranks] == [0, 1, 2]
    assert ranks[0].seconds["compute"] == pytest.approx(0.25, rel=0.02) and ranks[0].total == pytest.approx(
        0.5, rel=0.02
    )
    assert ranks[1].doing == "waits in all_reduce" and ranks[2].doing == "ended with -9"
    assert reader.read(1) == [], "another attempt has ranks of its own"
    reader.close()


def test_a_measurement_has_a_line_in_place_of_losses(made: MadeRun) -> None:
    picture = picture_of(made)
    picture.losses.clear()
    picture.apply(
        [
            MeasuredLine(
                1.0,
                1,
                3,
                12,
                {"op": "all_reduce", "group": "world", "size": 1024},
                {"time_us": 10.0, "bus_bw": 3.5},
            )
        ]
    )
    told = shown(picture)
    assert told[2].endswith(" 3/12 25.0%") and told[3].startswith(
        "case 3/12 | all_reduce world | 1024 B | 10 us | busbw 3.5 GB/s"
    )
    assert not any(line.startswith("loss") for line in told)


def test_held_out_loss_and_saves_are_told() -> None:
    picture = RunScreen()
    picture.apply(
        [
            step_line(1, 5, 5.0),
            EvaluatedLine(6.0, 1, 5, 2.75, 8, 1.0),
            SavedLine(7.0, 1, 5, "p", 10, 0.5, tier="memory"),
        ]
    )
    assert picture.held_out == 2.75 and picture.checkpoint is not None and picture.checkpoint.tier == "memory"


def test_a_long_past_is_read_from_its_end_at_the_beginning_of_a_line(made: MadeRun) -> None:
    sizes = {n: made.run.attempt(n).metrics.stat().st_size for n in (1, 2)}
    assert tail_positions(made.run) == {"2": 0, "1": 0}
    at = tail_positions(made.run, 1000)
    assert at["1"] == sizes[1], "an older attempt has none of what is read"
    data = made.run.attempt(2).metrics.read_bytes()
    assert sizes[2] - 1000 < at["2"] < sizes[2] and data[at["2"] - 1 : at["2"]] == b"\n"
    steps = [item.step for item in Follower(made.run, at).poll() if isinstance(item, StepLine)]
    assert steps and steps[-1] == 22 and steps[0] > 15


# ---- terminals ----

WATCH = (
    "import sys\nfrom pathlib import Path\nfrom configs.paths import HomePaths\n"
    "from orchestrator.commands import screen, watching\n"
    "home = HomePaths(Path(sys.argv[1]))\nrun = home.existing(sys.argv[2])\n"
    "show = screen.watch if screen.usable(sys.stdout) else watching.watch\n"
    "print('ended:', show(run, home, sys.stdout))\n"
)
LIST = (
    "import sys\nfrom pathlib import Path\nfrom configs.paths import HomePaths\nfrom orchestrator.commands import screen\n"
    "screen.watch_list(HomePaths(Path(sys.argv[1])), sys.stdout, *map(bool, sys.argv[3:]))\n"
)
OPENED, CLOSED = b"\x1b[?1049h", b"\x1b[?1049l"


def _in_front() -> None:
    """The terminal's foreground job, which heeds Ctrl-C also where the tests run in a shell's background."""
    ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(
        self, code: str, home: HomePaths, columns: int, rows: int, words: list[str], **environment: str
    ) -> None:
        self._own, other = pty.openpty()
        self.resize(columns, rows)
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in ("NO_COLOR", "COLUMNS", "LINES", "COLORTERM")
        }
        known = kept | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT)} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(home.home), *words], stdin=other, stdout=other, stderr=other, env=known,
            start_new_session=True, preexec_fn=_in_front,
        )  # fmt: skip
        os.close(other)
        self.data = b""

    def resize(self, columns: int, rows: int) -> None:
        ioctl(self._own, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, wanted: bytes, seconds: float = 40.0) -> bytes:
        """All that it has written, once `wanted` is in it."""
        deadline = time.monotonic() + seconds
        while wanted not in self.data:
            assert time.monotonic() < deadline, self.data[-3000:]
            assert self._read(0.5), self.data[-3000:]
        return self.data

    def _read(self, wait: float) -> bool:
        if not readable(self._own, wait):
            return True
        try:
            data = os.read(self._own, 1 << 16)
        except OSError:
            return False
        self.data += data
        return bool(data)

    def end(self, seconds: float = 30.0) -> int:
        """Read to the end; the exit code."""
        deadline = time.monotonic() + seconds
        while self._read(0.2) and time.monotonic() < deadline:
            pass
        return self.process.wait(5)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._own)


@contextmanager
def terminal(
    code: str, home: HomePaths, *words: str, columns: int = 90, rows: int = 26, **environment: str
) -> Iterator[Terminal]:
    made = Terminal(code, home, columns, rows, list(words), **environment)
    try:
        yield made
    finally:
        made.close()


def colours(data: bytes) -> list[bytes]:
    """Parameters of SGR sequences that set a colour."""
    codes = [code for sequence in re.findall(rb"\x1b\[([\d;]*)m", data) for code in sequence.split(b";")]
    return [code for code in codes if code.isdigit() and (30 <= int(code) <= 49 or 90 <= int(code) <= 107)]


def test_a_run_is_followed_to_its_end_and_the_terminal_is_as_it_was(made: MadeRun) -> None:
    with terminal(WATCH, made.home, made.run_id) as shown_on:
        before = shown_on.until(b"22/100")
        assert (
            before.count(OPENED) == 1 and CLOSED not in before and "█".encode() in before and colours(before)
        )
        shown_on.resize(60, 16)
        made.now = time.time()
        made.train(1, 0.1)
        shown_on.until(b"23/100")
        made.finish()
        assert shown_on.end() == 0
    after = shown_on.data.rpartition(CLOSED)[2].decode()
    assert shown_on.data.count(CLOSED) == 1 and b"\x1b[?25h" in shown_on.data, "the cursor is back"
    assert "incident 1: rank 1 was killed" in after and after.rstrip().endswith("ended: succeeded")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_it_the_terminal_is_as_it_was(made: MadeRun, number: signal.Signals) -> None:
    with terminal(WATCH, made.home, made.run_id) as shown_on:
        shown_on.until(b"22/100")
        shown_on.process.send_signal(number)
        code = shown_on.end()
    assert code in (1, 130, -signal.SIGINT) if number is signal.SIGINT else code == 128 + number
    assert shown_on.data.count(CLOSED) == 1 and b"\x1b[?25h" in shown_on.data


@pytest.mark.parametrize(
    ("term", "columns", "rows", "can"),
    [
        ("xterm", 40, 10, True),
        ("xterm", 39, 26, False),
        ("xterm", 90, 9, False),
        ("dumb", 90, 26, False),
        ("", 90, 26, False),
    ],
)
def test_what_can_be_drawn_on(
    monkeypatch: pytest.MonkeyPatch, term: str, columns: int, rows: int, can: bool
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, rows)))
    assert screen.usable(Stream()) is can and not screen.usable(io.StringIO())


@pytest.mark.parametrize(("environment", "columns", "rows"), [({"TERM": "dumb"}, 90, 26), ({}, 39, 26)])
def test_where_nothing_can_be_drawn_lines_are_written(
    made: MadeRun, environment: dict[str, str], columns: int, rows: int
) -> None:
    made.now = time.time()
    made.finish()
    with terminal(WATCH, made.home, made.run_id, columns=columns, rows=rows, **environment) as shown_on:
        assert shown_on.end() == 0
    assert OPENED not in shown_on.data and not colours(shown_on.data)
    assert b"incident 1: rank 1 was killed" in shown_on.data and b"ended: succeeded" in shown_on.data


def test_no_color_and_letters_of_the_locale_are_kept_to(made: MadeRun) -> None:
    with terminal(
        WATCH, made.home, made.run_id, NO_COLOR="1", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    ) as shown_on:
        data = shown_on.until(b"22/100")
    assert not colours(data) and b"##" in data and data.isascii()


def test_an_event_can_not_write_on_the_terminal(made: MadeRun) -> None:
    made.now = time.time()
    made.save_failed("rank 0: \x1b]0;owned\x07\x1b[31mred")
    with terminal(WATCH, made.home, made.run_id) as shown_on:
        data = shown_on.until(b"owned")
        made.finish()
        shown_on.end()
    assert b"\x1b]0;" not in shown_on.data and b"\x07" not in data and b"\x1b[31mred" not in shown_on.data


def test_a_silent_controller_is_told_and_its_return_too(
    made: MadeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[list[str]]()

    @contextmanager
    def drawn(_: object) -> Iterator[object]:
        yield lambda shown: told.append([line.plain for line in shown])

    def sleep(_: float) -> None:
        if len(told) == 1:
            queue_file(made.home, time.time() - 45)
        if len(told) == 4:
            queue_file(made.home, time.time())
        if len(told) == 6:
            made.finish()

    monkeypatch.setattr(screen, "_full_screen", drawn)
    with Path(os.devnull).open("w") as nowhere:
        screen.watch(made.run, made.home, nowhere, sleep)
    silent = [any(line.startswith(SILENT) for line in lines_) for lines_ in told]
    assert silent == [False, True, True, True, False, False, False]


def test_the_list_is_drawn_again_with_what_is_new(made: MadeRun) -> None:
    with terminal(LIST, made.home, "-") as shown_on:
        shown_on.until(b"22/100")
        made.now = time.time()
        made.train(1, 0.1)
        shown_on.until(b"23/100")
        shown_on.process.send_signal(signal.SIGINT)
        shown_on.end()
    assert shown_on.data.count(OPENED) == 1 and shown_on.data.count(CLOSED) == 1


def test_of_many_runs_those_that_go_on_are_shown(tmp_path: Path) -> None:
    home = a_home(tmp_path)
    for i in range(30):
        run = MadeRun(home, f"old-1126-1200{i:02d}-aaaa").submit().start().train(1)
        run.finish()
    MadeRun(home, "new-1126-130000-aaaa").submit()
    MadeRun(home, "old-1126-110000-aaaa").submit().start().train(3)
    queue_file(home, time.time())
    told = [line.plain for line in screen._listed(summaries.summaries(home), 100, 12)]
    assert len(told) <= 12 and told[-1] == "22 more; `list` shows all"
    assert sum("succeeded" in line for line in told) == 8
    assert any(line.startswith("new-") for line in told) and any("3/100" in line for line in told)


@pytest.mark.parametrize("as_json", [False, True])
def test_without_a_terminal_the_list_is_written_where_it_changed(made: MadeRun, as_json: bool) -> None:
    class Enough(Exception):
        pass

    turns = iter(range(5))

    def sleep(_: float) -> None:
        turn = next(turns)
        if turn == 2:
            made.train(1)
        if turn == 4:
            raise Enough

    path = made.home.home / "out.txt"
    with path.open("w") as out, pytest.raises(Enough):
        screen.watch_list(made.home, out, as_json, sleep)
    text = path.read_text()
    assert "\x1b" not in text and text.count(made.run_id) >= 2
    assert (text.count("\n[{") + text.startswith("[{") if as_json else text.count("RUN ")) == 2


def test_a_line_of_json_is_a_new_list_and_a_silent_controller_is_none(
    made: MadeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = iter(range(5))

    def sleep(_: float) -> None:
        turn = next(turns)
        queue_file(made.home, time.time() - 45 - turn)
        if turn == 2:
            made.train(1)
        if turn == 4:
            raise KeyboardInterrupt

    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        screen.watch_list(made.home, out, True, sleep)
    assert [json.loads(line)[0]["step"] for line in out.getvalue().splitlines()] == [22, 23]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"megaray: {SILENT}"), "once, where `list --json` has it"
