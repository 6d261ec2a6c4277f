"""A resume of a stopped run, from what was typed to the event that the controller appends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs.compose import load
from configs.errors import UserError, from_json
from configs.paths import RunPaths
from configs.schema import RunConfig
from faulttol.checkpoint.folder import parse_checkpoint_path
from faulttol.checkpoint.store import check_writable
from orchestrator.commands import changes, resume_source
from orchestrator.commands.resume_source import ResumeSource
from orchestrator.commands.submission import Submission
from orchestrator.record.events import Amended, GangShape
from orchestrator.record.log import read
from orchestrator.record.run_log import RunLogReader
from orchestrator.record.view import RunView
from trainer.sizing.search.planner import Capacity, plan


@dataclass(frozen=True)
class Resumption:
    """A stopped run that is to continue."""

    run: RunPaths
    view: RunView
    overrides: tuple[str, ...]
    old: RunConfig
    """Resolved, of the run's last attempt."""
    config: RunConfig
    """That the run continues with; with auto fields open until it is `planned`."""
    source: ResumeSource | None
    """The newest checkpoint in storage."""
    gang: GangShape
    layout: dict[str, int]
    code: str = ""
    """Folder of the code that it continues with; empty: as before."""

    @classmethod
    def of(cls, run: RunPaths, overrides: Sequence[str]) -> Resumption:
        """Of a run whose attempts have all ended.

        Raises:
            UserError: for an override that the run can't take, and for checkpoints that can't be read.
        """
        view = RunLogReader.of(run).view
        submitted = view.request
        old = load(run.config_of(view.amendments))
        changes.refuse_fixed(old, overrides, run.run_id)
        config = changes.amended(old, overrides, _chosen(run), submitted.gang.nodes) if overrides else old
        source = _newest(run, old) if old.workload == "train" else None
        return cls(run, view, tuple(overrides), old, config, source, submitted.gang, dict(submitted.layout))

    @property
    def step(self) -> int:
        """Step that the run continues from."""
        return self.source.step if self.source else 0

    @property
    def slots(self) -> int:
        """Ranks that it takes."""
        return self.gang.ranks

    @property
    def start(self) -> str:
        """Where it continues, for a person."""
        memory = self.view.memory
        newer = memory is not None and memory.step > self.step
        return f"step {self.step}" + (
            f", or {memory.step} where memory still holds it" if newer and memory else ""
        )

    def planned(self, capacity: Capacity | None) -> Resumption:
        """With the auto fields filled in.

        Raises:
            UserError: where it doesn't fit the cluster, has no step left, or saves where another run does.
        """
        if self.config.workload == "train" and self.config.train.steps <= self.step:
            raise UserError(
                f"train.steps={self.config.train.steps}: step {self.step} is trained and saved; set it above {self.step}"
            )
        made = plan(self.config, capacity, strict=True)
        config = made.config
        if config.checkpoint.path != self.old.checkpoint.path:
            path = config.checkpoint.path or str(self.run.checkpoints)
            if self.source is not None and (there := resume_source.newest_checkpoint(path)) is None:
                # The state lies where it was saved.
                config = config.model_copy(update={"resume": self.source.root})
            elif (
                self.source is not None
                and there is not None
                and not resume_source.is_own_checkpoint(there, self.run.run_id)
            ):
                resume_source.refuse_foreign_folder(path)
        gang, layout = self.gang, self.layout
        if changes.layout_changed(self.old, config):
            gang, layout = Submission(self.config, made, priority=0).gang(), dict(made.layout)
        return replace(self, config=config, gang=gang, layout=layout)

    def check(self) -> None:
        """Try whether it can save, before it queues.

        Raises:
            UserError: where its folder of checkpoints can't be written.
        """
        if self.config.workload == "train" and self.config.checkpoint.path:
            check_writable(self.config.checkpoint.path)

    def changed(self) -> list[changes.Change]:
        """What is asked for otherwise than before."""
        return changes.changes(self.old, self.config)

    def to_json(self) -> dict[str, Any]:
        """What is shown before it starts."""
        samples = self.source.samples if self.source else None
        return {
            "run": self.run.run_id,
            "from": self.start,
            "step": self.step,
            "changes": [list(change) for change in self.changed()],
            "consequences": changes.consequences(self.old, self.config, self.step, samples),
            "code": self.code,
        }

    @property
    def code_changed(self) -> bool:
        """It continues with other code than it ran before."""
        return bool(self.code) and self.code != self.view.request.code

    def event(self) -> Amended | None:
        """What changes; None where nothing does."""
        code = self.code if self.code_changed else None
        if not self.changed() and code is None:
            return None
        resilience, training = self.config.resilience, self.config.workload == "train"
        return Amended(
            number=self.view.amendments + 1,
            overrides=self.overrides,
            changes=tuple(self.changed()),
            gang=self.gang,
            steps=self.config.train.steps if training else 0,
            max_restarts=resilience.max_restarts,
            backoff_seconds=resilience.backoff_seconds,
            layout=self.layout,
            code=code,
            wall_seconds=None if resilience.wall_hours is None else resilience.wall_hours * 3600.0,
        )


def _newest(run: RunPaths, config: RunConfig) -> ResumeSource | None:
    """The run's own newest checkpoint, else the one that it began from."""
    source = resume_source.newest_checkpoint(config.checkpoint.path or str(run.checkpoints))
    if source is None and config.resume is not None:
        source = resume_source.newest_checkpoint(*parse_checkpoint_path(config.resume))
    return source


def _chosen(run: RunPaths) -> list[str]:
    """Fields that the planner chose at the submission and that no resume has set since."""
    typed = {
        override.partition("=")[0]
        for event in read(run.events)
        if isinstance(event.payload, Amended)
        for override in event.payload.overrides
    }
    try:
        choices = from_json(run.plan.read_text())["choices"]
    except (OSError, ValueError, KeyError):
        return []
    return [choice["field"] for choice in choices if choice["field"] not in typed]
