"""`python -m tests.faulttol.kills`: ranks that save again and again are killed at random moments; what is left is judged.

Each place (disk, S3 with faults, a disk that fills up, a folder that turns read-only) has one run. Each kill ends an
attempt of it, and the next attempt continues from what is there, cut elsewhere among its ranks. After each kill the newest
checkpoint must load into a process that had no part in it, hold exactly one step's values, and be not an older than what a
rank was told is saved. At the end a sound attempt must leave nothing behind but the checkpoints that are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.faulttol.staged.kill_orders import KEEP, WORLD, Order
from tests.faulttol.staged.s3_faults import BUCKET, FaultyS3

_PATIENCE = 60.0
"""Seconds until a rank that shows nothing is judged to hang."""
_ROWS, _QUICK_ROWS = 4096, 1024
"""Of 4 KiB each."""
_RATE = 0.1
"""Share of requests to S3 that meet a fault."""
_LONGEST, _QUICK_LONGEST = 1.5, 0.15
"""Seconds from the first save of an attempt to its end, at most."""
_LOOK = 0.002
_MOUNTED = "MEGARAY_KILLS_MOUNTED"
Line = tuple[str, int, int, int, str]


def rows_of(quick: bool) -> int:
    """Rows of the state that is saved."""
    return _QUICK_ROWS if quick else _ROWS


# ---- places ----


@dataclass
class KillPlace:
    """Where a run saves, and what is known of it."""

    name: str
    root: str
    variables: dict[str, str] = field(default_factory=dict)
    attempt: int = 0
    saved: tuple[int, int] = (0, 0)
    """Attempt and step of the newest that a rank was told is saved."""
    begun: int = 0
    """The highest step that any attempt began to save."""
    newest: tuple[int, int] | None = None
    """As it was judged last."""
    cycles: dict[bool, float] = field(default_factory=dict)
    """Seconds from a save to the next, by whether they are in the background."""
    counts: Counter[str] = field(default_factory=Counter)
    sound: bool = True
    """Whether saves have no reason to fail here."""
    readable: bool = True
    """Whether it can be read while it is harmed."""

    def harm(self, noise: random.Random) -> None:
        """Begin to fail."""

    def heal(self) -> None:
        """Be sound again."""


class FlakyStore(KillPlace):
    """S3, whose requests fail now and then."""

    faults: FaultyS3

    def harm(self, noise: random.Random) -> None:
        self.faults.rate = _RATE

    def heal(self) -> None:
        self.faults.rate = 0.0


class Full(KillPlace):
    """A small disk that something else fills up."""

    def _filler(self) -> Path:
        return Path(self.root).parent / "filler"

    def harm(self, noise: random.Random) -> None:
        left = noise.choice((0, 0, 1 << 16, 1 << 20))
        for _ in range(50):  # what ranks give back meanwhile is taken too
            stat = os.statvfs(self.root)
            free = stat.f_bavail * stat.f_frsize - left
            if free <= 0:
                break
            with self._filler().open("ab") as file, contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free)

    def heal(self) -> None:
        self._filler().unlink(missing_ok=True)


class ReadOnly(KillPlace):
    """A folder that is mounted anew without the right to write."""

    def harm(self, noise: random.Random) -> None:
        deadline = time.monotonic() + 5.0
        # Refused while a file is open for writing.
        while _mount("-o", "remount,ro", str(Path(self.root).parent)):
            if time.monotonic() > deadline:
                self.counts["never turned read-only"] += 1
                return

    def heal(self) -> None:
        _mount("-o", "remount,rw", str(Path(self.root).parent))


def _mount(*words: str) -> int:
    return subprocess.run(["mount", *words], capture_output=True).returncode


@contextlib.contextmanager
def places(rows: int, seed: int) -> Iterator[list[KillPlace]]:
    """All places that this machine can make."""
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="megaray-kills-")))
        faults = ends.enter_context(FaultyS3(seed))
        store = FlakyStore("s3", f"s3://{BUCKET}/kills", faults.environment(), sound=False, readable=False)
        store.faults, store.counts = faults, faults.met
        found = [KillPlace("disk", str(folder / "disk")), store]
        small: tuple[tuple[str, type[KillPlace]], ...] = (("full", Full), ("read-only", ReadOnly))
        for name, kind in small if os.environ.get(_MOUNTED) else ():
            mount = folder / name
            mount.mkdir()
            if _mount("-t", "tmpfs", "-o", f"size={rows * 4096 * 5}", "tmpfs", str(mount)):
                raise RuntimeError(f"{mount}: a tmpfs can't be mounted")
            ends.callback(subprocess.run, ["umount", str(mount)], check=False)
            (mount / "checkpoints").mkdir()
            found.append(kind(name, str(mount / "checkpoints"), sound=False))
        yield found


# ---- one kill ----


class Wrong(AssertionError):
    """What must never be."""


@dataclass(frozen=True)
class KillGang:
    """The ranks of an attempt."""

    ranks: list[Any]
    log: str

    def lines(self, rank: int) -> list[Line]:
        """A rank's log: word, attempt, step, monotonic nanoseconds, text."""
        path = Path(f"{self.log}.{rank}")
        rows = (line.split(" ", 4) for line in (path.read_text() if path.exists() else "").splitlines())
        return [(word, int(a), int(s), int(t), text) for word, a, s, t, text in rows]

    def all_lines(self) -> list[Line]:
        """All ranks' logs."""
        return [line for rank in range(WORLD) for line in self.lines(rank)]

    def steps(self, word: str) -> list[int]:
        """The last step with a word, by rank; 0 where there is none."""
        return [max((s for w, _, s, *_ in self.lines(r) if w == word), default=0) for r in range(WORLD)]

    def died(self) -> str:
        """What ranks say of how they ended by themselves."""
        told = [f"rank {r}: {text}" for r in range(WORLD) for w, *_, text in self.lines(r) if w == "died"]
        return "; ".join(told)

    def writers(self) -> list[int]:
        """Process ids of the ranks' writers that still run, in the order of the ranks."""
        found = []
        for rank, process in enumerate(self.ranks):
            pids = [step for word, _, step, *_ in self.lines(rank) if word == "writer"]
            found += [pid for pid in pids[-1:] if _parent(pid) == process.pid]
        return found

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Wait for a state of the ranks.

        Raises:
            Wrong: where it doesn't come, or a rank ends.
        """
        deadline = time.monotonic() + _PATIENCE
        while not until():
            if any(not rank.is_alive() for rank in self.ranks):
                raise Wrong(f"a rank ended before {what}: {self.died() or 'without a word'}")
            if time.monotonic() > deadline:
                raise Wrong(
                    f"{what} didn't come in {_PATIENCE:.0f} s: {[self.lines(r)[-2:] for r in range(WORLD)]}"
                )
            time.sleep(_LOOK)

    def end(self) -> None:
        """Kill what still runs, and see that their writers end with them."""
        writers = self.writers()
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()
        deadline = time.monotonic() + _PATIENCE / 2
        while left := [pid for pid in writers if _parent(pid) is not None]:
            if time.monotonic() > deadline:
                raise Wrong(f"writers {left} outlive their ranks")
            time.sleep(_LOOK)


def _parent(pid: int) -> int | None:
    """Process id of a running process' parent."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return int(parent) if state != "Z" else None


def _call(name: str, *arguments: Any) -> None:
    """Run a function of `kill_ranks`, which imports torch: the fork server has, this process hasn't."""
    getattr(importlib.import_module("tests.faulttol.staged.kill_ranks"), name)(*arguments)


class Killer:
    """Starts, kills and judges; what is random follows from one seed, but for the moments, which the machine shifts."""

    def __init__(self, quick: bool, seed: int, scratch: Path) -> None:
        self._longest = _QUICK_LONGEST if quick else _LONGEST
        self._rows, self._noise, self._scratch = rows_of(quick), random.Random(seed), scratch
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.faulttol.staged.kill_ranks", "s3fs"])
        self.victims: Counter[str] = Counter()
        self.inside = 0
        """Kills in the middle of a save."""

    def once(self, place: KillPlace) -> str:
        """One kill; how it went.

        Raises:
            Wrong: naming what.
        """
        place.attempt += 1
        place.heal()  # where the kill before ended in an error
        background = place.attempt % 2 == 0
        gang = self._start(place, background)
        try:
            gang.wait(lambda: min(gang.steps("begin")) > 0, "the first save")
            self._check_loaded(place, gang)
            if not place.readable:  # its faults come one by one
                place.harm(self._noise)
            if self._noise.random() < 0.75:  # else the first one may be interrupted
                gang.wait(lambda: min(gang.steps("saved")) > 0, "the end of the first save")
            self._wait(place, background)
            if self._noise.random() < 0.75:
                place.harm(self._noise)
                self._wait(place, background)
            told = self._strike(place, gang, background)
        finally:
            gang.end()
            lines = gang.all_lines()
        if place.readable and self._noise.random() < 0.5:
            self._judge(place, lines)
        place.heal()
        begun = sorted(t for word, *_, t, _ in lines if word == "begin")[::WORLD]
        if len(begun) > 2:
            place.cycles[background] = statistics.median(b - a for a, b in pairwise(begun)) / 1e9
        return f"{told} -> {self._judge(place, lines)}"

    def _start(self, place: KillPlace, background: bool, most: int | None = None) -> KillGang:
        log = str(self._scratch / f"{place.name}-{place.attempt}")
        order = Order(place.root, place.attempt, self._rows, background, log, place.variables, most)
        ranks = [self._context.Process(target=_call, args=("run_rank", r, order)) for r in range(WORLD)]
        for rank in ranks:
            rank.start()
        return KillGang(ranks, log)

    def _wait(self, place: KillPlace, background: bool, cycles: float = 2.5) -> None:
        seconds = self._noise.random() * cycles * place.cycles.get(background, 0.1)
        time.sleep(min(seconds, self._longest))

    def _check_loaded(self, place: KillPlace, gang: KillGang) -> None:
        for rank in range(WORLD):
            loaded = [(attempt, step) for word, attempt, step, *_ in gang.lines(rank) if word == "loaded"]
            if loaded != [place.newest] * (place.newest is not None):
                raise Wrong(f"rank {rank} loaded {loaded}, and {place.newest} is the newest")

    def _strike(self, place: KillPlace, gang: KillGang, background: bool) -> str:
        victim = self._noise.choice(
            ("rank 0", "rank 1", "all", *(("writer 0", "writer 1") if background else ()))
        )
        kind, _, number = victim.partition(" ")
        if gang.died():
            raise Wrong(f"a rank ended by itself: {gang.died()}")
        if place.sound and any(word == "failed" for word, *_ in gang.all_lines()):
            raise Wrong(
                f"a save failed where nothing was amiss: {[x for x in gang.all_lines() if x[0] == 'failed'][:2]}"
            )
        if kind == "writer":
            self._strike_writer(place, gang, int(number))
        for rank in gang.ranks if kind == "all" else [gang.ranks[int(number)]]:
            rank.kill()
        inside = any(gang.lines(r)[-1][0] in ("begin", "writer") for r in range(WORLD))
        self.victims[victim] += 1
        self.inside += inside
        if kind == "rank":
            self._wait(place, background, 1.0)  # the other continues until it notices, or is ended
        return f"{victim} of {'background' if background else 'blocking'} at step {max(gang.steps('begin'))}"

    def _strike_writer(self, place: KillPlace, gang: KillGang, rank: int) -> None:
        """Kill a writer alone: its rank must continue, and save again."""
        gang.wait(lambda: len(gang.writers()) == WORLD, "both writers")
        os.kill(gang.writers()[rank], signal.SIGKILL)
        place.heal()
        past = max(gang.steps("begin"))
        gang.wait(
            lambda: min(gang.steps("saved")) > past, f"a save after step {past}, whose writer was killed,"
        )

    def _judge(self, place: KillPlace, lines: list[Line]) -> str:
        saved = [(attempt, step) for word, attempt, step, *_ in lines if word == "saved"]
        place.saved = max([place.saved, *saved])
        place.begun = max([place.begun, *(step for word, _, step, *_ in lines if word == "begin")])
        found = self._ask("judge", place.root, self._rows, place.attempt, place.variables)
        if found.problem:
            raise Wrong(found.problem)
        if (found.newest or (0, 0)) < place.saved:
            raise Wrong(f"{found.newest} is the newest, and {place.saved} was told to be saved")
        place.newest = found.newest
        return f"{found.newest}, {found.commits} committed, {found.begun} not"

    def finish(self, place: KillPlace) -> None:
        """Let a sound attempt save, and see that nothing of all that went before is left over.

        Raises:
            Wrong: naming files.
        """
        place.attempt += 1
        # What was left at a step goes once all that is kept is newer.
        most = place.begun - (place.newest or (0, 0))[1] + KEEP + 1
        gang = self._start(place, True, most)
        try:
            for rank in gang.ranks:
                rank.join(_PATIENCE)
            if min(gang.steps("saved")) == 0 or gang.died():
                raise Wrong(f"a sound attempt didn't save: {gang.died()} {gang.all_lines()[-2:]}")
        finally:
            gang.end()
        self._judge(place, gang.all_lines())
        left = self._ask("strangers", place.root, place.variables)
        if left:
            raise Wrong(f"{len(left)} files are left over: {left[:4]}")

    def _ask(self, act: str, *arguments: Any) -> Any:
        """What a function of `kill_ranks` sends, in a process of its own."""
        here, there = self._context.Pipe()
        process = self._context.Process(target=_call, args=(act, *arguments, there))
        process.start()
        there.close()
        try:
            if not here.poll(_PATIENCE):
                raise Wrong("no answer from who judges")
            return here.recv()
        finally:
            process.kill()
            process.join()
            here.close()


def run(times: int, quick: bool, seed: int, verbose: bool, only: str | None = None) -> int:
    """Kill so many times, at all places in turn; how often something was wrong."""
    wrong = 0
    with (
        places(rows_of(quick), seed) as found,
        tempfile.TemporaryDirectory(prefix="megaray-kills-") as scratch,
    ):
        killer = Killer(quick, seed, Path(scratch))
        if not os.environ.get(_MOUNTED):
            print("left out, since mounts need root: a full disk, a folder that turns read-only")
        # A client of S3 takes each process a second to make, which `make test` hasn't often.
        turns = [*found, *[place for place in found if place.name != "s3"] * 3] if quick else found
        turns = [place for place in turns if only in (None, place.name)]
        for number in range(times):
            place = turns[number % len(turns)]
            wrong += _attempted(lambda p=place: killer.once(p), f"{number + 1} {place.name}", verbose)
        for place in turns[:1] if quick else turns:
            wrong += _attempted(lambda p=place: killer.finish(p), f"the end of {place.name}", verbose)
        for place in found:
            extra = f"; requests by fault: {dict(place.counts)}" if place.counts else ""
            print(f"{place.name}: {place.attempt} attempts, step {place.newest and place.newest[1]}{extra}")
        print(
            f"killed: {dict(killer.victims)}; {killer.inside} of {times} in the middle of a save; seed {seed}"
        )
    return wrong


def _attempted(act: Callable[[], object], name: str, verbose: bool) -> bool:
    try:
        told = act()
    except Wrong as error:
        print(f"WRONG: {name}: {error}")
        return True
    if verbose and told:
        print(f"{name}: {told}")
    return False


def main() -> int:
    """Parse the command line, with mounts of this process alone where they can be had; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faulttol.kills", description=__doc__)
    parser.add_argument("--times", type=int, default=None, help="kills (200)")
    parser.add_argument("--quick", action="store_true", help="8 kills of a small state")
    parser.add_argument("--only", default=None, help="one place: disk, s3, full, read-only")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--verbose", action="store_true", help="a line for each kill")
    options = parser.parse_args()
    unshare = shutil.which("unshare")
    if _MOUNTED not in os.environ and unshare and os.geteuid() == 0:
        words = [unshare, "--mount", "--propagation", "private", sys.executable, "-m", "tests.faulttol.kills"]
        os.execve(unshare, [*words, *sys.argv[1:]], {**os.environ, _MOUNTED: "1"})
    times = options.times or (8 if options.quick else 200)
    wrong = run(times, options.quick, options.seed, options.verbose, options.only)
    print(f"{times} kills, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
