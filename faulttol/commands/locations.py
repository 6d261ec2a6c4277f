"""Which checkpoint a person means: a run's id, its folder, a folder or URL of checkpoints, or one step of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.paths import HomePaths, RunPaths, default_home
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder, folder_of
from faulttol.checkpoint.store import CheckpointStore

_STEP = re.compile(r"step-(\d{10,})")


@dataclass(frozen=True)
class CheckpointLocation:
    """A folder of checkpoints, and the one that was named in it."""

    typed: str
    root: str
    """Folder or URL."""
    step: int | None = None
    """The step that was named; None: the newest."""
    attempt: int | None = None
    """Likewise."""
    run: RunPaths | None = None
    """The run, where its id or folder was named."""

    @property
    def store(self) -> CheckpointStore:
        """Where the files lie."""
        return CheckpointStore(self.root, "PATH" if self.run is None else "checkpoint.path")

    def commits(self, folder: CheckpointFolder) -> list[CheckpointCommit]:
        """Commits of the step and attempt that were named, or all; oldest first.

        Raises:
            UserError: where there are none.
        """
        commits = [
            commit
            for commit in folder.commits
            if self.step in (None, commit.step) and self.attempt in (None, commit.attempt)
        ]
        if commits:
            return commits
        if folder.old:
            folder.refuse_others()
        if self.step is None and self.attempt is None or not folder.commits:
            begun = f"; {len(folder.begun)} were begun and not committed" if folder.begun else ""
            raise UserError(
                f"PATH='{self.typed}': no checkpoint is committed in {self.root}{begun}; name another run or folder"
            )
        raise UserError(self._absent(folder.commits))

    def _absent(self, there: list[CheckpointCommit]) -> str:
        steps = ", ".join(f"{c.step} (attempt {c.attempt})" for c in there[-5:])
        what = f"step {self.step}" if self.step is not None else "a checkpoint"
        of_it = f" of attempt {self.attempt}" if self.attempt is not None else ""
        return f"PATH='{self.typed}': {what}{of_it} isn't committed in {self.root}; there are {steps}: name one of them"

    def commit(self, folder: CheckpointFolder | None = None) -> CheckpointCommit:
        """The commit that was named, or the newest.

        Raises:
            UserError: where there is none, or the folder has several runs' or format 1.
        """
        folder = CheckpointFolder(self.store) if folder is None else folder
        commits = self.commits(folder)
        folder.refuse_others()
        return commits[-1]

    def checkpoint_config(self) -> dict[str, Any]:
        """The section `checkpoint` of the run's configuration; empty where no run was named or it has none."""
        if self.run is None or not self.run.config.is_file():
            return {}
        return dict(_yaml(self.run.newest_config).get("checkpoint") or {})


def find(typed: str, step: int | None = None, attempt: int | None = None) -> CheckpointLocation:
    """The place that was typed.

    Args:
        typed: a run's id or an unambiguous beginning of it, the run's folder, a folder or URL of checkpoints, a step's
            folder in one.
        step: that was typed beside it.
        attempt: likewise.

    Raises:
        UserError: where it is none of these, or names two steps.
    """
    if not typed.strip():  # an unset variable of a shell, and not the folder that one stands in
        raise UserError(
            "PATH is empty; name a run's id, a folder or URL of checkpoints, or the folder of a step"
        )
    base, _, last = typed.rstrip("/").rpartition("/")
    named = _STEP.fullmatch(last)
    if named:
        if step not in (None, int(named[1])):
            raise UserError(
                f"--step={step} isn't the step of PATH='{typed}': leave one of them out, or type {folder_of(step or 0)}"
            )
        place = find(base or ("/" if typed.startswith("/") else "."), int(named[1]), attempt)
        return CheckpointLocation(typed, place.root, place.step, attempt, place.run)
    if "://" in typed:
        return CheckpointLocation(typed, typed.rstrip("/"), step, attempt)
    path = Path(typed).expanduser()
    if path.is_dir():
        run = RunPaths(path.resolve())
        if run.config.is_file() or run.checkpoints.is_dir():
            return CheckpointLocation(typed, _checkpoints(run), step, attempt, run)
        owner = RunPaths(run.root.parent)
        mine = owner.checkpoints == run.root and owner.config.is_file()
        return CheckpointLocation(typed, str(path), step, attempt, owner if mine else None)
    if path.exists():
        raise UserError(
            f"PATH='{typed}' is a file: name a run, a folder of checkpoints, or the folder of a step"
        )
    run = _run(typed)
    return CheckpointLocation(typed, _checkpoints(run), step, attempt, run)


def output(typed: str) -> CheckpointStore:
    """The folder or URL that `--out` names; nothing is made there.

    Raises:
        UserError: where it can't become a folder, before anything is read for it.
    """
    if not typed.strip():
        raise UserError("--out is empty; name a folder, or a URL such as s3://bucket/path")
    store = CheckpointStore(typed, "--out")
    if "://" in typed:
        return store
    path = Path(typed).absolute()
    try:
        there = next(folder for folder in (path, *path.parents) if folder.exists())
    except OSError as error:  # a name that is too long
        raise UserError(f"--out={typed}: {error.strerror}; name another folder") from None
    if not there.is_dir():
        where = "" if there == path else f"{there} "
        raise UserError(f"--out={typed}: {where}is a file; name a folder, or one that isn't there yet")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out={typed}: {there} can't be written; name a folder that you may write")
    return store


def _run(typed: str) -> RunPaths:
    home = HomePaths(default_home())
    # A run under torchrun has no event log.
    if typed and "/" not in typed and home.run(typed).checkpoints.is_dir():
        return home.run(typed)
    if "/" in typed or not home.run_ids():
        raise UserError(
            f"PATH='{typed}' is neither a folder nor a run of {home.runs}: name a run's id, a folder or URL of "
            "checkpoints, or the folder of a step"
        )
    return home.existing(typed)


def _checkpoints(run: RunPaths) -> str:
    """Where a run keeps its checkpoints."""
    path = (_yaml(run.newest_config).get("checkpoint") or {}).get("path") if run.config.is_file() else None
    return str(path or run.checkpoints)


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} can't be read: {reason}; name the folder of checkpoints itself") from None
    return tree if isinstance(tree, dict) else {}
