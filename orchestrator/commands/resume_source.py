"""What a run begins from: its own newest checkpoint, or what `resume=` names. Reads folders of checkpoints; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.compose import load
from configs.errors import UserError
from configs.paths import HomePaths, RunPaths
from configs.schema import RunConfig
from faulttol.checkpoint.folder import CheckpointFolder, folder_of, parse_checkpoint_path, run_tag
from faulttol.checkpoint.manifest import Incomplete
from faulttol.checkpoint.store import CheckpointStore
from orchestrator.commands.changes import Change, changes
from trainer.fingerprint import compare_fingerprints, fingerprint

_TOLD = 4
"""Differences that a refusal names."""


@dataclass(frozen=True)
class ResumeSource:
    """A committed checkpoint, as its manifest tells it."""

    root: str
    """Folder or URL."""
    step: int
    run: str
    """Id of the run that saved it."""
    attempt: int
    layout: dict[str, int]
    """That it was saved under."""
    facts: dict[str, Any]
    """What its trainer wrote beside the state: `samples`, `tokens`, `loss`, `fingerprint`."""

    @property
    def path(self) -> str:
        """Folder of the step."""
        return f"{self.root.rstrip('/')}/{folder_of(self.step)}"

    @property
    def samples(self) -> int | None:
        """Consumed up to it; None where it doesn't say."""
        return int(self.facts["samples"]) if "samples" in self.facts else None


def checkpoints_of(run: RunPaths) -> str:
    """Folder or URL of a run's checkpoints, by its newest configuration."""
    path = load(run.newest_config).checkpoint.path if run.newest_config.exists() else None
    return path or str(run.checkpoints)


def newest_checkpoint(root: str, step: int | None = None) -> ResumeSource | None:
    """The newest checkpoint whose manifest can be read, of one step where it is given; None where nothing is committed.

    Raises:
        UserError: where the folder has checkpoints of format 1 or of several runs, can't be reached, or none can be read.
    """
    try:
        folder = CheckpointFolder(CheckpointStore(root))
    except OSError as error:
        raise UserError(f"'{root}' can't be listed: {error}; check its permissions and credentials") from None
    folder.refuse_others()
    passed = ""
    for commit in reversed(folder.commits):
        if step in (None, commit.step):
            try:
                head = folder.head(commit)
            except Incomplete as error:
                passed = passed or str(error)
                continue
            return ResumeSource(root, head.step, head.run, head.attempt, dict(head.layout), dict(head.facts))
    if passed:
        raise UserError(
            f"no checkpoint in '{root}' can be read: {passed}; restore the files, or name another one"
        )
    return None


def refuse_foreign_folder(path: str) -> None:
    """Refuse a folder of checkpoints that another run owns, for a run that is new.

    Raises:
        UserError: naming the run, and how to continue from it.
    """
    try:
        folder = CheckpointFolder(CheckpointStore(path))
    except OSError:  # whether it can be written is another check's question
        return
    folder.refuse_others()
    if folder.commits:
        owner = folder.commits[-1].run
        raise UserError(
            f"checkpoint.path='{path}' belongs to run {owner}, whose checkpoints are in it: type another folder, and "
            f"resume={path} to start from its state"
        )


def resolve(config: RunConfig, home: HomePaths) -> tuple[RunConfig, ResumeSource]:
    """A configuration with its `resume` as a folder or URL, and the checkpoint that the run begins from.

    Raises:
        UserError: where nothing is there, or it is another model's, optimizer's, corpus's or seed's, or has all steps.
    """
    assert config.resume is not None, "asked only where it is set"
    root, step = _place(config.resume, home)
    start = newest_checkpoint(root, step)
    if start is None:
        what = f"step {step}" if step is not None else "checkpoint"
        raise UserError(
            f"resume='{config.resume}': no {what} is committed in {root}; name a run that has saved one, or its folder"
        )
    source = f"resume='{config.resume}': step {start.step} of run {start.run}"
    old = start.facts.get("fingerprint", {})
    refused, _ = compare_fingerprints(old, fingerprint(config, _data(config, old.get("data") or {})))
    if refused:
        raise UserError(
            f"{source} doesn't fit this run: {'; '.join(refused[:_TOLD])}; {_advice(start, home)}"
        )
    if config.train.steps <= start.step:
        raise UserError(
            f"{source} has trained all of train.steps={config.train.steps}; set train.steps above {start.step} to train on"
        )
    where = start.path if step is not None else root
    return config.model_copy(update={"resume": where}), start


def _advice(start: ResumeSource, home: HomePaths) -> str:
    settings = home.run(start.run).newest_config
    if start.run in home.run_ids() and settings.exists():
        return f"set it back, or take all settings of that run with --config {settings}"
    return "set it back"


def _place(typed: str, home: HomePaths) -> tuple[str, int | None]:
    """Folder or URL of checkpoints, and a step where one was named."""
    root, step = parse_checkpoint_path(typed)
    if "://" in root:
        return root, step
    path = Path(root).expanduser()
    if path.is_dir():
        run = RunPaths(path.absolute())
        return (checkpoints_of(run) if run.config.is_file() else str(path.absolute())), step
    if "/" in root:
        raise UserError(
            f"resume='{typed}': there is no folder {path}; name a run, or a folder or URL of checkpoints"
        )
    try:
        return checkpoints_of(home.existing(root)), step
    except UserError as error:
        raise UserError(f"resume={typed}: {error}") from None


def _data(config: RunConfig, old: dict[str, Any]) -> dict[str, Any]:
    """The corpus as far as it is known before it is prepared: what its tokens are, the ranks compare."""
    data = config.data
    known = {"sequence": data.sequence, "validation": data.validation, "document_mask": data.document_mask}
    parts = list(old.get("parts", []))
    count = len(data.mixture) if data.mixture else 1
    return old | known | {"parts": parts if len(parts) == count else [{}] * count}


def differences(config: RunConfig, start: ResumeSource, home: HomePaths) -> list[Change]:
    """What a new run has otherwise than the one it begins from: field, value there, value here.

    By that run's configuration where this home has it, else by what its checkpoint says.
    """
    there = home.run(start.run).newest_config
    if there.exists():
        return [c for c in changes(load(there), config) if c[0] not in ("name", "resume", "checkpoint.path")]
    now = {axis: config.parallel.size(axis) for axis in ("pp", "dp", "cp", "ep", "etp", "tp")}
    return [
        (f"parallel.{axis}", str(start.layout.get(axis, 1)), str(size))
        for axis, size in now.items()
        if start.layout.get(axis, 1) != size
    ]


def is_own_checkpoint(start: ResumeSource, run_id: str) -> bool:
    """Whether a checkpoint is the run's own."""
    return run_tag(start.run) == run_tag(run_id)


def to_json(config: RunConfig, start: ResumeSource, home: HomePaths) -> dict[str, Any]:
    """What is shown before a run starts that begins from `start`."""
    return {
        "run": start.run, "attempt": start.attempt, "step": start.step, "path": start.path,
        "samples": start.facts.get("samples"), "tokens": start.facts.get("tokens"), "loss": start.facts.get("loss"),
        "differences": [list(change) for change in differences(config, start, home)],
    }  # fmt: skip
