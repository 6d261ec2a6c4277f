"""`prune`: remove runs that ended long ago, and kept code that no run needs any more."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.compose import load
from configs.errors import UserError
from configs.paths import HomePaths, RunPaths
from faulttol.checkpoint.folder import CheckpointFolder
from faulttol.checkpoint.retention import LEASE_SECONDS
from faulttol.checkpoint.store import CheckpointStore
from orchestrator.commands import code_snapshot
from orchestrator.commands.calls import CommandCall
from orchestrator.commands.text import plural, size, span, table
from orchestrator.record.summaries import RunReader

_DAY = 86400.0
_OLDER_DAYS = 30.0
"""Where neither `--keep` nor `--older` is typed."""
_UNFINISHED_SECONDS = 3600.0
"""Age from which a folder without a log, or half a copy of code, is what an interrupted command has left."""


@dataclass(frozen=True)
class Removal:
    """A folder that goes."""

    name: str
    folder: Path
    bytes: int
    why: str


@dataclass(frozen=True)
class PruneSelection:
    """What goes, and which runs stay though they are old enough, with the reason."""

    removed: list[Removal]
    kept: list[tuple[str, str]]


def choose(home: HomePaths, keep: int | None, older: float | None, now: float) -> PruneSelection:
    """Decide what goes.

    A run goes where it has ended, isn't among the newest `keep` of those and ended more than `older` days ago, and no run
    that stays reads its checkpoints: begins from them, saves beside them, or has a log that can't be read, so that nobody
    knows.

    Args:
        home: of the runs.
        keep: newest ended runs that stay; None: no such bound.
        older: days; None: no such bound.
        now: seconds since the epoch.

    Raises:
        UserError: where a bound isn't one.
    """
    if keep is None and older is None:
        older = _OLDER_DAYS
    # NaN is a number to a parser.
    if (keep is not None and keep < 0) or (older is not None and not older >= 0):
        raise UserError("--keep and --older can't be negative or nan; type a number of runs, or of days")
    ended, kept = list[tuple[float, RunPaths]](), list[tuple[str, str]]()
    for run in map(home.run, home.run_ids()):
        when = _ended(run)
        if isinstance(when, str):
            kept.append((run.run_id, when))
        elif when is not None:
            ended.append((when, run))
    ended.sort(key=lambda item: item[0], reverse=True)
    old = {
        run.run_id: run
        for place, (when, run) in enumerate(ended)
        if (keep is None or place >= keep) and (older is None or now - when > older * _DAY)
    }
    needed = _readers(home, old) | {name: why for name, run in old.items() if (why := _held(run, now))}
    kept += [(name, why) for name, why in sorted(needed.items())]
    times = {run.run_id: when for when, run in ended}
    removed = [
        Removal(name, run.root, _bytes(run.root), f"ended {span(now - times[name])} ago")
        for name, run in sorted(old.items())
        if name not in needed
    ]
    gone = {removal.name for removal in removed}
    return PruneSelection(removed + _leftovers(home, now) + _code(home, gone, now), kept)


def _ended(run: RunPaths) -> float | str | None:
    """When a run ended; why that isn't known; None where it hasn't."""
    try:
        reader = RunReader(run)
    except OSError as error:
        return f"its log can't be read ({error.strerror})"
    if reader.damage:
        return f"its log is damaged ({reader.damage[0]})"
    state = reader.view.state
    return reader.view.moved_at if state is not None and state.terminal else None


def _readers(home: HomePaths, old: dict[str, RunPaths]) -> dict[str, str]:
    """Of the runs that may go, those whose checkpoints another one reads, with the reason.

    A run that stays because of one reader may itself begin from a third: so until nothing is added.
    """
    readers: dict[str, str] = {}
    sources = {run_id: _sources(home.run(run_id)) for run_id in home.run_ids()}
    while True:
        staying = {run_id for run_id in sources if run_id not in old or run_id in readers}
        fresh = {
            name: f"run {reader} {how}"
            for reader in sorted(staying)
            for place, how in sources[reader]
            for name, run in old.items()
            if name not in readers and name != reader and (place == "?" or _inside(place, run.root))
        }
        if not fresh:
            return readers
        readers |= fresh


def _sources(run: RunPaths) -> list[tuple[str, str]]:
    """Folders that a run reads checkpoints from or writes them to, and how; `?` where its settings can't be read."""
    try:
        config = load(run.newest_config)
        first = load(run.config)
    except (OSError, UserError) as error:
        ended = _ended(run)
        return [] if isinstance(ended, float) else [("?", f"may read it: {error}")]
    places = []
    for one in (config, first):
        if one.resume is not None and "://" not in one.resume and _needed(run):
            places.append((one.resume, "begins from its checkpoints and has saved none of its own"))
        if one.checkpoint.path is not None and "://" not in one.checkpoint.path:
            places.append((one.checkpoint.path, "saves in its folder"))
    return places


def _needed(run: RunPaths) -> bool:
    """Whether a run still goes back to where it began: it has committed nothing itself."""
    try:
        config = load(run.newest_config)
        return not CheckpointFolder(CheckpointStore(config.checkpoint.path or str(run.checkpoints))).commits
    except (OSError, UserError):
        return True


def _held(run: RunPaths, now: float) -> str:
    """Why a run's own checkpoints mustn't go at this time; empty where they may."""
    if not run.checkpoints.is_dir():
        return ""
    try:
        folder = CheckpointFolder(CheckpointStore(str(run.checkpoints)))
    except OSError as error:
        return f"its checkpoints can't be listed ({error.strerror})"
    names = sorted({name for given in folder.pins.values() for name in given})
    if names:
        return f"checkpoints of it are pinned as {', '.join(names)}"
    read = any(
        now - renewed < LEASE_SECONDS for commit in folder.uses for renewed in folder.lease_times(commit)
    )
    return "its checkpoints are being read" if read else ""


def _inside(place: str, root: Path) -> bool:
    return Path(place).expanduser().absolute().is_relative_to(root.absolute())


def _leftovers(home: HomePaths, now: float) -> list[Removal]:
    """Folders of submissions that were interrupted before the run was on record."""
    if not home.runs.is_dir():
        return []
    known = set(home.run_ids())
    return [
        Removal(path.name, path, _bytes(path), "its submission was interrupted")
        for path in sorted(home.runs.iterdir())
        if path.is_dir() and path.name not in known and now - path.stat().st_mtime > _UNFINISHED_SECONDS
    ]


def _code(home: HomePaths, gone: set[str], now: float) -> list[Removal]:
    """Copies of code that no run which stays has run."""
    if not home.code.is_dir():
        return []
    needed = set[str]()
    for run_id in set(home.run_ids()) - gone:
        try:
            needed |= code_names(home.run(run_id))
        except OSError:
            return []  # nobody knows what it needs
    return [
        Removal(f"code {path.name}", path, _bytes(path), "no run needs it")
        for path in sorted(home.code.iterdir())
        if path.is_dir() and path.name not in needed and now - path.stat().st_ctime > _UNFINISHED_SECONDS
    ]


def code_names(run: RunPaths) -> set[str]:
    """Names of the kept code that a run's attempts may still start from.

    Raises:
        OSError: where its log can't be read.
    """
    view = RunReader(run).view
    given = [view.submitted.code if view.submitted else "", view.placed.code if view.placed else ""]
    return {Path(code).name for code in given if code}


def _bytes(folder: Path) -> int:
    """What a folder's files take on disk; links are counted as themselves."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except OSError:
            continue
    return total


def prune(call: CommandCall) -> int:
    """Say what goes, ask, and remove it."""
    choice = choose(call.home, call.options.keep, call.options.older, time.time())
    freed = sum(removal.bytes for removal in choice.removed)
    for name, why in choice.kept:
        call.note(f"kept: {name}: {why}")
    tree: dict[str, Any] = {
        "removed": [{"name": r.name, "bytes": r.bytes, "why": r.why} for r in choice.removed],
        "kept": [{"run": name, "why": why} for name, why in choice.kept],
        "bytes": freed,
    }
    if not choice.removed:
        call.say("nothing to remove", tree)
        return 0
    call.note(table([(r.name, size(r.bytes), r.why) for r in choice.removed], right=(1,)))
    amount = f"{plural(len(choice.removed), 'folder')}, {size(freed)}"
    if not _agreed(call, amount):
        call.say(f"nothing was removed; it would free {amount}: --yes removes it", tree | {"removed": []})
        return 1
    for removal in choice.removed:
        _remove(removal.folder)
    call.say(f"removed {amount}", tree)
    return 0


def _agreed(call: CommandCall, amount: str) -> bool:
    """What is removed is gone, so only a person at a terminal or `--yes` agrees."""
    if call.options.yes:
        return True
    if call.wants_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return input(f"Remove {amount}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _remove(folder: Path) -> None:
    """Remove a folder; the log of a run first, so that half a run is never taken for a whole one."""
    RunPaths(folder).events.unlink(missing_ok=True)
    if folder.stat().st_mode & 0o222:
        shutil.rmtree(folder)
    else:
        code_snapshot.remove_read_only(folder)
