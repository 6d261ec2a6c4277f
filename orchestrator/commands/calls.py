"""One call of the command line, and what several commands do with it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import INTERRUPTED_EXIT
from configs.paths import HomePaths
from orchestrator import PROGRAM
from orchestrator.record.states import State

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from orchestrator.commands.resume_source import ResumeSource
    from trainer.sizing.search.planner import RunPlan


@dataclass(frozen=True)
class CommandCall:
    """One call of the command line."""

    options: argparse.Namespace
    home: HomePaths
    arguments: tuple[str, ...]
    """As typed, after the program's name."""

    @property
    def overrides(self) -> list[str]:
        """Configuration overrides, in the order typed."""
        return list(self.options.overrides)

    @property
    def config_file(self) -> Path | None:
        """The user's configuration file."""
        return self.options.config

    @property
    def wants_json(self) -> bool:
        """`--json` was typed."""
        return bool(self.options.json)

    @property
    def address(self) -> str | None:
        """`--address`, or `$RAY_ADDRESS`; `auto` is the newest Ray of this machine, `local` one of its own: None."""
        given = self.options.address or os.environ.get("RAY_ADDRESS") or None
        return None if given == "local" else given

    def say(self, text: str, tree: Any = None) -> None:
        """Print `text`, or under `--json` only `tree`."""
        if not self.wants_json:
            _print(text)
        elif tree is not None:
            _print(json.dumps(tree, default=str))

    def report(self, text: str, tree: Any) -> None:
        """Print what runs have written: `text`, or under `--json` only `tree`, without secrets and with finite numbers."""
        from orchestrator.commands.text import shareable  # its patterns take a while to load

        self.say(text, shareable(tree) if self.wants_json else None)

    def note(self, text: str) -> None:
        """Print `text` for a person; nothing under `--json`."""
        if not self.wants_json:
            _print(text)


def _print(text: str) -> None:
    """Print, and continue where nobody reads it any more: `submit | head -1` submits."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the rest of the process


def watch(call: CommandCall, run_id: str) -> int:
    """Follow a run to its end and print its summary; Ctrl-C leaves the run alone.

    Returns 0 where the run succeeded, 1 where it failed or was cancelled, 130 after Ctrl-C.
    """
    from orchestrator.commands import console, watching
    from orchestrator.record import summaries

    run, stream = call.home.run(run_id), sys.stderr if call.wants_json else sys.stdout
    show = watching.watch
    if stream.isatty():
        from orchestrator.commands import screen  # rich loads where there is a screen alone

        show = screen.watch if screen.usable(stream) else show
    try:
        state = show(run, call.home, stream)
    except KeyboardInterrupt:
        print(f"\ndetached; {run_id} continues. `{PROGRAM} watch {run_id}` comes back to it, "
              f"`{PROGRAM} cancel {run_id}` ends it.", file=sys.stderr)  # fmt: skip
        return INTERRUPTED_EXIT
    row = summaries.summary(run, summaries.read_queue(call.home))
    call.report(console.final_summary(row, run), asdict(row))
    return 0 if state is State.SUCCEEDED else 1


def with_resume_source(config: RunConfig, home: HomePaths) -> tuple[RunConfig, ResumeSource | None]:
    """The configuration with its `resume` looked up, and what the run begins from; None where it names nothing.

    Raises:
        UserError: where it can't be continued from.
    """
    if config.resume is None:
        return config, None
    # Loaded here: reading a checkpoint's manifest needs fsspec and numpy, and other commands don't.
    from orchestrator.commands import resume_source

    return resume_source.resolve(config, home)


def plan_answer(plan: RunPlan, begins: ResumeSource | None, home: HomePaths) -> tuple[str, dict[str, Any]]:
    """A plan as text and as a tree, with what the run begins from."""
    from orchestrator.commands import console
    from orchestrator.commands.plan_text import plan_table

    tree = plan.to_json()
    if begins is None:
        return plan_table(tree), tree
    from orchestrator.commands import resume_source

    source = resume_source.to_json(plan.config, begins, home)
    return f"{plan_table(tree)}\n{console.source(source)}", tree | {"resume": source}
