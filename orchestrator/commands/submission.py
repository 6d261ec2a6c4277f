"""From a configuration to a run's folder: id, plan, and what is kept to know later what was run."""

from __future__ import annotations

import base64
import contextlib
import getpass
import json
import os
import re
import secrets
import shutil
import subprocess
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from configs.compose import dump
from configs.errors import UserError, from_json
from configs.paths import HomePaths, RunPaths
from configs.schema import RunConfig
from configs.section import NAME_CHARACTERS
from orchestrator.commands.code_snapshot import CODE, snapshot_code
from orchestrator.record.events import GangShape, Submitted
from trainer.sizing.model.layout import Layout
from trainer.sizing.search.planner import RunPlan

_PACKAGES = ("torch", "ray", "deepspeed", "wandb", "pydantic", "hydra-core", "fsspec", "numpy")
_TRAVELLING = "MEGARAY_SOURCE"
_TRAVELLING_BYTES = 96 << 10
_OWNER = "MEGARAY_OWNER"
_ID_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # none that is easily taken for another


@dataclass(frozen=True)
class Submission:
    """A planned run that isn't written yet."""

    config: RunConfig
    """As the user gave it, with auto fields still open."""
    plan: RunPlan
    priority: int
    owner: str = ""

    def gang(self) -> GangShape:
        """What the queue is asked for; a number of nodes only where the user asked for one."""
        plan = self.plan
        inner = Layout(**plan.layout).inner
        per_node = plan.config.cluster.slots_per_node or plan.ranks
        return GangShape(
            ranks=plan.ranks,
            block=inner if inner <= per_node else 1,
            nodes=plan.nodes if self.config.cluster.nodes or self.config.cluster.slots_per_node else None,
            resource=slot_resource(plan.config),
        )

    def event(self, runtime_env: dict[str, Any], code: str) -> Submitted:
        """The first event of the run's log.

        Args:
            runtime_env: of the submission.
            code: folder of the code that it runs.
        """
        config = self.plan.config
        hours = config.resilience.wall_hours
        return Submitted(
            priority=self.priority,
            gang=self.gang(),
            steps=config.train.steps if config.workload == "train" else 0,
            max_restarts=config.resilience.max_restarts,
            backoff_seconds=config.resilience.backoff_seconds,
            model=_subject(config),
            layout=dict(self.plan.layout),
            runtime_env=runtime_env,
            owner=self.owner,
            code=code,
            wall_seconds=None if hours is None else hours * 3600.0,
        )


def slot_resource(config: RunConfig) -> str:
    """Ray resource of which one unit is one slot."""
    return "CPU" if config.hardware.kind == "cpu" else "GPU"


def _subject(config: RunConfig) -> str:
    """What a run is about: its model, or what it measures."""
    return (
        config.model.name if config.workload == "train" else f"{config.workload} {config.collectives.study}"
    )


def new_run_id(config: RunConfig) -> str:
    """`<name>-<date>-<time>-<four letters>`, in UTC; sorts by time within a name."""
    words = (config.name or _subject(config))[:NAME_CHARACTERS].lower()
    name = re.sub(r"[^a-z0-9_]+", "_", words).strip("_") or "run"
    tail = "".join(secrets.choice(_ID_LETTERS) for _ in range(4))
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{tail}"


def owner_of(typed: str | None) -> str:
    """Who submits: what was typed, else who typed it on a laptop, else the account.

    Raises:
        UserError: where an empty name was typed.
    """
    if typed is not None:
        if not typed.strip():
            raise UserError("--owner '' is not a name; type one, or leave it out for your account's")
        return typed.strip()
    if travelled := os.environ.get(_OWNER):
        return travelled
    with contextlib.suppress(KeyError, OSError):  # an account without an entry, as in many containers
        return getpass.getuser()
    return f"uid-{os.getuid()}"


def write_run(home: HomePaths, submission: Submission, arguments: Sequence[str]) -> tuple[RunPaths, str]:
    """Write a new run's folder: resolved configuration, plan, commit, uncommitted changes, versions.

    Returns:
        Its paths, and the folder of the code that it runs.

    Raises:
        UserError: where it can't be written; nothing is left behind then.
    """
    home.ensure()
    paths = home.run(new_run_id(submission.config))
    state = code_state()
    code = snapshot_code(home, state)
    try:
        paths.root.mkdir()
        paths.config.write_text(dump(submission.plan.config))
        paths.plan.write_text(json.dumps(submission.plan.to_json(), indent=1))
        paths.source.write_text(json.dumps(_source(arguments, state) | {"code": str(code)}, indent=1))
        if state["diff"]:
            paths.source_diff.write_text(state["diff"])
    except OSError as error:
        shutil.rmtree(paths.root, ignore_errors=True)
        raise UserError(
            f"can't write {paths.root} ({error.strerror}); free some space and submit again"
        ) from None
    return paths, str(code)


def _source(arguments: Sequence[str], state: dict[str, Any]) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "arguments": list(arguments),
        "commit": state["commit"],
        "uncommitted": state["uncommitted"],
        "versions": versions,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def source_variables() -> dict[str, str]:
    """The state of the code and who sends it as variables, for a command that is carried to a cluster.

    Git's folder doesn't travel with the code. A diff too large for a variable is cut, and says so.
    """
    state = code_state()
    packed = _packed(state)
    if len(packed) > _TRAVELLING_BYTES:
        packed = _packed(state | {"diff": "the diff was too large to travel with the submission\n"})
    return {_TRAVELLING: packed, _OWNER: owner_of(None)}


def code_state() -> dict[str, Any]:
    """Commit, changed files and diff of the code; empty where there is no repository. It may have come from a laptop."""
    if travelled := _unpacked(os.environ.get(_TRAVELLING, "")):
        return travelled
    commit = _git("rev-parse", "HEAD").strip()
    status = _git("status", "--porcelain").splitlines() if commit else []
    return {"commit": commit or None, "uncommitted": status, "diff": _git("diff", "HEAD") if status else ""}


def _packed(state: dict[str, Any]) -> str:
    return base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()


def _unpacked(text: str) -> dict[str, Any]:
    return dict(from_json(zlib.decompress(base64.b64decode(text)))) if text else {}


def _git(*arguments: str) -> str:
    """Output of a git command in the code's folder; empty where there is no git or no repository."""
    if not (CODE / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=CODE, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
