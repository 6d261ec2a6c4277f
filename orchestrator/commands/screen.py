"""A run, or the list of runs, on the whole terminal: drawn anew twice a second, and gone when it ends.

Where there is no terminal, or one that can't be drawn on, `watching` writes lines. Both read files alone.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from rich.console import Console, Group
from rich.text import Text

from configs.metrics import (
    EndedLine,
    EvaluatedLine,
    MeasuredLine,
    MetricLine,
    ResumedLine,
    SavedLine,
    StepLine,
)
from configs.paths import HomePaths, RunPaths
from faulttol.commands.terminal import axes
from orchestrator.commands import console, watching
from orchestrator.commands.text import clean, clock, count, plural, shareable, size, span
from orchestrator.record import summaries
from orchestrator.record.events import Event, StateMoved
from orchestrator.record.following import Follower
from orchestrator.record.ranks import PARTS, RankActivity, RankReader
from orchestrator.record.states import State
from orchestrator.record.summaries import RunSummary

_EVERY = 0.5
"""Seconds between two pictures."""
_LIST_EVERY = 2.0
_RANKS_EVERY = 2.0
"""Seconds between two looks at the ranks, which are a file per node."""
_NARROWEST, _LOWEST = 40, 10
_CATCH_UP = 4 << 20
"""Bytes of metric lines from before the command that are read; the newest."""
_LOSSES = 4000
_KEPT = 200
"""Lines of what happened."""
_COLOUR = {"compute": "green", "data": "blue", "wait": "bright_black", "save": "yellow"}
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.,-=+*#"
_STATES = {State.RUNNING: "green", State.SUCCEEDED: "green", State.FAILED: "red", State.RECOVERING: "red"}


def usable(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can be drawn on, and large enough."""
    if not stream.isatty() or os.environ.get("TERM", "") in ("", "dumb", "unknown"):
        return False
    columns, lines = shutil.get_terminal_size()
    return columns >= _NARROWEST and lines >= _LOWEST


@dataclass
class RunScreen:
    """All that is shown of a run."""

    row: RunSummary | None = None
    newest: StepLine | MeasuredLine | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    """Step and loss; of steps that were lost, what came later."""
    held_out: float | None = None
    checkpoint: SavedLine | None = None
    ranks: list[RankActivity] = field(default_factory=list)
    messages: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT))
    silent: str = ""
    """`summaries.controller_silence`."""
    ended: State | None = None

    def apply(self, items: Iterable[Event | MetricLine]) -> None:
        """Add what is new, in order."""
        for item in items:
            match item:
                case StepLine():
                    self.newest = item
                    if math.isfinite(item.loss):
                        self.losses.append((item.step, item.loss))
                case MeasuredLine():
                    self.newest = item
                case ResumedLine():
                    self.losses = [one for one in self.losses if one[0] <= item.step]
                case EvaluatedLine():
                    self.held_out = item.loss
                case SavedLine():
                    self.checkpoint = item
                case Event(payload=StateMoved() as move):
                    self.ended = move.to if move.to.terminal else None
            if (text := watching.describe(item)) is not None and not isinstance(item, EndedLine):
                self.messages.append(text)
        if len(self.losses) > 2 * _LOSSES:
            self.losses = self.losses[::2]


# ---- lines of the picture ----


def sparkline(values: Sequence[float], width: int, letters: str) -> str:
    """A curve in one line: the mean of as many values a column as it takes."""
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [i * len(values) // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    low, high = min(means), max(means)
    scale = (len(letters) - 1) / (high - low) if high > low else 0.0
    return "".join(letters[round((value - low) * scale)] for value in means)


def stacked_bar(parts: Sequence[tuple[float, str, str]], width: int, whole: float) -> Text:
    """Parts (value, letter, colour) beside each other; `whole` is `width` columns."""
    text, done, at = Text(), 0.0, 0
    for value, letter, colour in parts:
        done += value
        until = min(width, round(width * done / whole)) if whole > 0 else 0
        text.append(letter * (until - at), colour)
        at = until
    return text.append(" " * (width - at))


def lines(picture: RunScreen, width: int, height: int, rich: bool) -> list[Text]:
    """The picture in `height` lines at most; `rich` where the terminal has more letters than ASCII."""
    letters = _BLOCKS if rich else _ASCII
    made = [*_head(picture), *_progress(picture, width, rich), *_losses(picture, width, letters)]
    rest = height - len(made)
    ranks = list(_ranks(picture, width, max(2, rest // 2), rich)) if picture.ranks and rest >= 5 else []
    made += ranks
    rest = height - len(made)
    if rest >= 2 and picture.messages:
        newest = list(picture.messages)[-(rest - 1) :]
        made += [Text("events", "bold"), *(Text(f" {text}") for text in newest)]
    for line in made:
        line.truncate(width)
    return made[:height]


def _head(picture: RunScreen) -> Iterator[Text]:
    row = picture.row
    if row is None:
        return
    state = State(row.state)
    why = row.stopping or (row.detail if state is not State.RUNNING else "")
    shown = (row.state, f"bold {_STATES.get(state, 'cyan')}")
    yield Text.assemble((clean(row.run_id), "bold"), "  ", shown, clean(f": {why}" if why else ""))
    nodes = f" on {len(row.nodes)} nodes" if len(row.nodes) > 1 else ""
    shortfall = f" of {row.asked_slots} asked for" if row.slots != row.asked_slots else ""
    facts = [
        row.model,
        axes(row.layout),
        f"{plural(row.slots, 'slot')}{shortfall}{nodes}",
        f"attempt {row.attempt}",
    ]
    facts += [plural(row.incidents, "incident"), *([row.owner] if row.owner else [])]
    yield Text(clean(", ".join(facts)), "bright_black")
    notes = [picture.silent, f"parked: {row.parked}" if row.parked else "", row.saves]
    notes += [f"queued, position {row.position}: {row.waiting_for}"] if row.position is not None else []
    yield from (Text(clean(note), "yellow") for note in notes if note)


def _progress(picture: RunScreen, width: int, rich: bool) -> Iterator[Text]:
    line, row = picture.newest, picture.row
    if line is None or row is None:
        return
    steps = line.steps if isinstance(line, MeasuredLine) else row.steps
    share = min(1.0, line.step / steps) if steps else 0.0
    full, empty = ("█", "░") if rich else ("#", ".")
    text = f" {line.step}/{steps} {share:.1%}"
    room = max(8, width - len(text))
    yield stacked_bar([(share, full, "green"), (1 - share, empty, "bright_black")], room, 1.0).append(text)
    if isinstance(line, MeasuredLine):
        yield Text(clean(line.text))
        return
    left = (steps - line.step) * line.step_seconds
    parts = [f"{count(line.tokens_per_second)} tok/s", f"{line.step_seconds:.3g} s/step", f"eta {span(left)}"]
    parts += [f"mfu {line.mfu:.1%}"] if line.mfu is not None else []
    parts += [f"memory {size(line.memory_bytes)}", f"balance {line.balance_entropy:.3f}"]
    parts += [f"dropped {line.dropped}"] if line.dropped else []
    if (saved := picture.checkpoint) is not None:
        parts.append(f"saved step {saved.step}{'' if saved.tier == 'store' else ' in memory'}")
    yield Text(" | ".join(parts))


def _losses(picture: RunScreen, width: int, letters: str) -> Iterator[Text]:
    if not picture.losses or not isinstance(picture.newest, StepLine):
        return
    held = f", {picture.held_out:.4f} held out" if picture.held_out is not None else ""
    bad = not math.isfinite(picture.newest.loss)
    yield Text.assemble(("loss ", "bold"), (f"{picture.newest.loss:.4f}", "red" if bad else ""), held,
                        (f"  steps {picture.losses[0][0]} to {picture.losses[-1][0]}", "bright_black"))  # fmt: skip
    yield Text(sparkline([loss for _, loss in picture.losses], width - 1, letters), "cyan")


def _ranks(picture: RunScreen, width: int, most: int, rich: bool) -> Iterator[Text]:
    letters = dict(zip(PARTS, "█▓░▒" if rich else "#=.+", strict=True))
    ranks, recorded = picture.ranks, any(one.seconds for one in picture.ranks)
    title = "ranks"
    if len(ranks) > most - 1:
        middle = sorted(one.seconds.get("compute", 0.0) for one in ranks)[len(ranks) // 2]
        ranks = sorted(ranks, key=lambda one: -abs(one.seconds.get("compute", 0.0) - middle))[: most - 1]
        title += f", {len(ranks)} of {len(picture.ranks)} furthest from the median"
    yield Text.assemble(
        (title, "bold"), *([f"  {letters[name]} {name}" for name in PARTS] if recorded else [])
    )
    whole = max((one.total for one in ranks), default=0.0)
    digits = len(str(max(one.rank for one in ranks)))
    room = min(48, max(10, width - digits - 40))
    for one in ranks:
        line = Text(f" {one.rank:>{digits}} ")
        if recorded:
            parts = [(one.seconds.get(name, 0.0), letters[name], _COLOUR[name]) for name in PARTS]
            line.append_text(stacked_bar(parts, room, whole)).append(f" {one.total:.3g} s")
        yield line.append(f"  {clean(one.doing)}", "bright_black")


# ---- what is read ----


def tail_positions(run: RunPaths, most: int = _CATCH_UP) -> dict[str, int]:
    """Where a follower begins, so that at most about `most` bytes of earlier metric lines are read."""
    position = {}
    for attempt in reversed(run.attempt_numbers()):
        path = run.attempt(attempt).metrics
        try:
            with path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - most))
                if end > most:
                    file.readline()  # the rest of a line
                position[str(attempt)] = file.tell()
        except OSError:
            continue
        most = max(0, most - (end - position[str(attempt)]))
    return position


# ---- the terminal ----


@contextmanager
def _full_screen(stream: TextIO) -> Iterator[Callable[[list[Text]], None]]:
    """The whole terminal; what was there comes back at the end, however that comes."""
    made = Console(file=stream, highlight=False, markup=False, emoji=False)
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with made.screen(hide_cursor=True) as screen:
            yield lambda shown: screen.update(Group(*shown))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _letters(stream: TextIO) -> bool:
    """Whether the terminal has more letters than ASCII."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


def watch(
    run: RunPaths, home: HomePaths, stream: TextIO, sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> State:  # fmt: skip
    """Follow a run on the whole terminal until it ends; its final state. What happened is left on the terminal as lines."""
    follower, picture = Follower(run, tail_positions(run)), RunScreen()
    reader, ranks, looked = summaries.RunReader(run), RankReader(run), float("-inf")
    picture.row = reader.summary(summaries.read_queue(home))
    try:
        with _full_screen(stream) as draw:
            while picture.ended is None:
                picture.apply(follower.poll())
                queue = summaries.read_queue(home)
                picture.row = reader.summary(queue)
                picture.silent = summaries.controller_silence(queue, time.time())
                if now() - looked >= _RANKS_EVERY:
                    looked, picture.ranks = now(), ranks.read(picture.row.attempt)
                columns, height = shutil.get_terminal_size()
                draw(lines(picture, columns, height, _letters(stream)))
                if picture.ended is None:
                    sleep(_EVERY)
    finally:
        ranks.close()
        stream.write("".join(f"{text}\n" for text in picture.messages))
        stream.flush()
    return picture.ended


def watch_list(
    home: HomePaths, stream: TextIO, as_json: bool = False, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Show the list of runs until an interrupt: on the whole terminal, elsewhere whenever it has changed.

    As JSON, a line is a new list of rows: whatever else is to be said goes to standard error, as in `list`.
    """
    if not as_json and usable(stream):
        with _full_screen(stream) as draw:
            while True:
                columns, height = shutil.get_terminal_size()
                draw(_listed(summaries.summaries(home), columns, height))
                sleep(_LIST_EVERY)
    rows_before, notes_before = None, None
    while True:
        listing = summaries.summaries(home)
        rows = [asdict(row) for row in listing.rows]
        notes = listing.damage, bool(listing.silent)  # without its seconds, which pass
        if as_json:
            if rows != rows_before:
                stream.write(json.dumps(shareable(rows), default=str) + "\n")
            if notes != notes_before:
                sys.stderr.writelines(f"{line}\n" for line in console.list_notes(listing))
        elif (rows, notes) != (rows_before, notes_before):
            shown = console.run_list(listing.rows, listing.damage, listing.silent)
            stream.write(f"{clock(time.time())}\n{shown}\n")
        stream.flush()
        rows_before, notes_before = rows, notes
        sleep(_LIST_EVERY)


def _listed(listing: summaries.RunListing, width: int, height: int) -> list[Text]:
    """As many runs as there is room for: active ones first, then the newest that have ended; oldest on top."""
    going = [row for row in listing.rows if not row.terminal]
    ended = [row for row in listing.rows if row.terminal]
    room = max(1, height - 2 - min(3, len(listing.damage)) - bool(listing.silent))
    kept = (
        going[-room:]
        if len(going) >= room
        else ended[len(ended) - min(len(ended), room - len(going)) :] + going
    )
    made = [Text(line) for line in console.run_list(kept, listing.damage[:3], listing.silent).splitlines()]
    if made:
        made[0].stylize("bold")
    if len(kept) < len(listing.rows):
        made.append(Text(f"{len(listing.rows) - len(kept)} more; `list` shows all", "bright_black"))
    for line in made:
        line.truncate(width)
    return made[:height]
