"""Removes what a retention doesn't keep, or steps by name; pins what is to stay."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.errors import UserError
from faulttol.checkpoint import retention as retaining
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder, folder_of
from faulttol.checkpoint.manifest import Incomplete
from faulttol.checkpoint.retention import PruneCandidate, Retention
from faulttol.checkpoint.store import StoreLike
from faulttol.commands.locations import CheckpointLocation
from faulttol.commands.terminal import plural, size, table


@dataclass
class Pruned:
    """What goes or went, and what stays."""

    path: str
    gone: list[dict[str, Any]] = field(default_factory=list)
    """Step, attempt, bytes (None where the manifest is damaged) and why, of each; oldest first."""
    spared: list[dict[str, Any]] = field(default_factory=list)
    """Likewise, of what was to go and stays after all."""
    interrupted: list[dict[str, Any]] = field(default_factory=list)
    """Step and attempt of saves that were never committed, whose files go or went."""
    left: int = 0
    """Checkpoints that stay."""
    dry: bool = True

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dict(vars(self))

    def lines(self) -> list[str]:
        """For a person."""
        would, freed = "would go" if self.dry else "removed", sum(one["bytes"] or 0 for one in self.gone)
        lines = [f"checkpoints in {self.path}: {len(self.gone)} {would}, {size(freed)}; {self.left} stay"]
        lines += table([(f"  {_name(one)}", size(one["bytes"] or 0), one["why"]) for one in self.gone])
        lines += [f"  {_name(one)} stays: {one['why']}" for one in self.spared]
        return lines + [f"  {_name(one)}, which was never committed" for one in self.interrupted]


def _name(one: dict[str, Any]) -> str:
    return f"step {one['step']}, attempt {one['attempt']}"


def retention_of(place: CheckpointLocation) -> Retention | None:
    """The retention that the run is configured with; None where that isn't known."""
    section = place.checkpoint_config()
    keep, every = section.get("keep"), section.get("keep_every")
    return Retention(int(keep), every) if keep else None


def keep_reasons(folder: CheckpointFolder, retention: Retention | None) -> dict[CheckpointCommit, list[str]]:
    """Why each commit stays: its pins, its readers, the retention; nothing for those that go at the next removal."""
    now = time.time()
    going = {one.commit for one in retaining.plan(folder, retention, now)} if retention else set()
    reasons: dict[CheckpointCommit, list[str]] = {}
    for commit in folder.commits:
        why = [f"pinned as {name}" for name in folder.pins.get(commit, ())]
        if any(now - renewed < retaining.LEASE_SECONDS for renewed in folder.lease_times(commit)):
            why.append("being read")
        if retention and commit not in going and not why:
            why.append("by retention")
        reasons[commit] = why
    return reasons


def candidates(
    folder: CheckpointFolder,
    retention: Retention | None,
    steps: Sequence[int],
    broken: Collection[CheckpointCommit] = (),
) -> list[PruneCandidate]:
    """What is to go: the steps that were named, or what the retention doesn't keep.

    Args:
        broken: commits that are known to be damaged inside.

    Raises:
        UserError: where a step isn't there or is pinned, or neither steps nor a retention are known.
    """
    if not steps:
        if retention is None:
            raise UserError(
                "no retention is configured for this folder: type --keep 2 for the newest two, or --steps with what "
                "is to go"
            )
        return retaining.plan(folder, retention, time.time(), broken)
    going: list[PruneCandidate] = []
    for step in steps:
        commits = [commit for commit in folder.commits if commit.step == step]
        if not commits:
            there = ", ".join(str(commit.step) for commit in folder.commits[-5:])
            raise UserError(
                f"--steps={step}: no such step is committed; there are {there}: type some of them"
            )
        for commit in commits:
            if folder.pins.get(commit):
                name = folder.pins[commit][0]
                raise UserError(
                    f"--steps={step} is pinned as {name}: type --unpin {name} --step {step} first"
                )
            going.append(PruneCandidate(commit, "named"))
    return sorted(going, key=lambda one: one.commit)


def interrupted(folder: CheckpointFolder) -> list[CheckpointCommit]:
    """Saves that were begun before the newest commit and never committed: nobody writes them any more."""
    newest = folder.commits[-1] if folder.commits else None
    return sorted(commit for commit in folder.begun if newest is not None and commit < newest)


def prune(
    store: StoreLike, going: Sequence[PruneCandidate], left_over: Sequence[CheckpointCommit], dry: bool
) -> Pruned:
    """Remove checkpoints, manifests first, and what interrupted saves left.

    What has been pinned or is being read stays, and so does the only checkpoint that is whole.

    Args:
        dry: whether only to tell what would go.
    """
    folder = CheckpointFolder(store)
    rows = {one.commit: _row(folder, one) for one in going}
    gone = {one.commit for one in (going if dry else retaining.remove(store, going))}
    for commit in () if dry else left_over:
        for name in folder.names(commit):
            store.remove(f"{folder_of(commit.step)}/{name}")
    return Pruned(
        path=store.url,
        gone=[row for commit, row in rows.items() if commit in gone],
        spared=[
            {**row, "why": "it is pinned, being read, or the only one that is whole"}
            for commit, row in rows.items()
            if commit not in gone
        ],
        interrupted=[{"step": commit.step, "attempt": commit.attempt} for commit in left_over],
        left=len(folder.commits) - len(gone),
        dry=dry,
    )


def _row(folder: CheckpointFolder, one: PruneCandidate) -> dict[str, Any]:
    try:
        count: int | None = folder.head(one.commit).size
    except Incomplete:
        count = None
    return {"step": one.commit.step, "attempt": one.commit.attempt, "bytes": count, "why": one.why}


def parse_steps(text: str | None) -> list[int]:
    """`100,200` as numbers.

    Raises:
        UserError: where one is not a whole number.
    """
    words = [word for word in (text or "").split(",") if word]
    for word in words:
        if not word.isdecimal():
            raise UserError(f"--steps={text}: '{word}' is not a step; type e.g. --steps 100,200")
    if text is not None and not words:
        raise UserError("--steps is empty; type e.g. --steps 100,200")
    return [int(word) for word in words]


def question(pruned: Pruned) -> str:
    """What a person is asked before it is done."""
    what = plural(len(pruned.gone), "checkpoint")
    return f"Remove {what} for good? [y/N] "
