"""One call of the command line, and what several commands do with it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.paths import HomePaths
from orchestrator import PROGRAM
from orchestrator.record.states import State

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from orchestrator.commands.beginnings import Beginning
    from trainer.sizing.planner import Plan


@dataclass(frozen=True)
class Call:
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
        """`--address`, or `$RAY_ADDRESS`."""
        return self.options.address or os.environ.get("RAY_ADDRESS") or None

    def say(self, text: str, tree: Any = None) -> None:
        """Print `text`, or under `--json` only `tree`."""
        if not self.wants_json:
            print(text, flush=True)
        elif tree is not None:
            print(json.dumps(tree, default=str), flush=True)

    def note(self, text: str) -> None:
        """Print `text` for a person; nothing under `--json`."""
        if not self.wants_json:
            print(text, flush=True)


def watch(call: Call, run_id: str) -> int:
    """Follow a run to its end and print its summary; Ctrl-C leaves the run alone.

    Returns 0 where the run succeeded, 1 where it failed or was cancelled, 130 after Ctrl-C.
    """
    from orchestrator.commands import console
    from orchestrator.record import reading

    run = call.home.run(run_id)
    try:
        state = console.watch(run, call.home, sys.stderr if call.wants_json else sys.stdout)
    except KeyboardInterrupt:
        print(f"\ndetached; {run_id} goes on. `{PROGRAM} watch {run_id}` comes back to it, "
              f"`{PROGRAM} cancel {run_id}` ends it.", file=sys.stderr)  # fmt: skip
        return 130
    row = reading.summary(run, reading.read_queue(call.home))
    call.say(console.final_summary(row, run), asdict(row))
    return 0 if state is State.SUCCEEDED else 1


def begun(config: RunConfig, home: HomePaths) -> tuple[RunConfig, Beginning | None]:
    """The configuration with its `resume` looked up, and what the run begins from; None where it names nothing.

    Raises:
        UserError: where it can't be gone on from.
    """
    if config.resume is None:
        return config, None
    # Loaded here: reading a checkpoint's manifest needs fsspec and numpy, and other commands don't.
    from orchestrator.commands import beginnings

    return beginnings.find(config, home)


def shown(plan: Plan, begins: Beginning | None, home: HomePaths) -> tuple[str, dict[str, Any]]:
    """A plan as text and as a tree, with what the run begins from."""
    from orchestrator.commands import console

    tree = plan.to_json()
    if begins is None:
        return console.plan_table(tree), tree
    from orchestrator.commands import beginnings

    source = beginnings.to_json(plan.config, begins, home)
    return f"{console.plan_table(tree)}\n{console.source(source)}", tree | {"resume": source}
