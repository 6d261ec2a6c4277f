"""Every path of a run has its one home here; nothing else builds file names."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError, nearest


def own_folder(path: Path) -> bool:
    """Make a folder for this user alone where anyone may make some, as in `/tmp`.

    False where a link or another user's folder has the name: files could be exchanged below it.

    Raises:
        OSError: where it can't be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = path.lstat()
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()


def default_home() -> Path:
    """`$MEGARAY_HOME`, or `~/.megaray`: the folder that holds the runs; shared by all nodes of a cluster.

    Without symlinks and `..`, since controllers, agents and processes know a home by its path: spelled in two ways it
    would be two homes in one folder.

    Raises:
        UserError: where neither is known.
    """
    try:
        named = Path(os.environ.get("MEGARAY_HOME") or Path.home() / ".megaray").expanduser()
    except RuntimeError:
        raise UserError(
            f"no home folder is known: HOME is not set and user id {os.getuid()} has no entry; set MEGARAY_HOME to "
            "a folder that you may write"
        ) from None
    # `resolve` raises for a symlink to itself; what uses the path says so.
    return Path(os.path.realpath(named))


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it finds the old text or the new one, whole.

    Several processes and threads may write one file at once; the last one wins.

    Raises:
        OSError: where it can't be written; the old file stays, and nothing of the new one.
    """
    # Another writer's half must not become the file, so each has a name of its own; `tempfile` would make one that only its
    # own account may read.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class HomePaths:
    """Paths that belong to the cluster and not to one run."""

    home: Path

    @property
    def runs(self) -> Path:
        """One folder per run."""
        return self.home / "runs"

    @property
    def cluster(self) -> Path:
        """Record of the local Ray that `up` or `submit` started: address, process ids, slots."""
        return self.home / "cluster.json"

    @property
    def cluster_lock(self) -> Path:
        """Held by the one command that starts or ends the local Ray."""
        return self.home / "cluster.lock"

    @property
    def ray_log(self) -> Path:
        """What the local Ray said when it was started."""
        return self.home / "ray-start.log"

    @property
    def queue(self) -> Path:
        """The controller's published view of slots and waiting runs; derived, never the truth."""
        return self.home / "queue.json"

    @property
    def epochs(self) -> Path:
        """Folder of the controllers that have served this home, one file each; the highest number owns it."""
        return self.home / "controllers"

    @property
    def cluster_log(self) -> Path:
        """The cluster's event log: nodes, cordons, suspicions; written by the controller alone."""
        return self.home / "cluster.jsonl"

    @property
    def quotas(self) -> Path:
        """Slots by owner, written by whoever runs the cluster; without it there are no quotas."""
        return self.home / "quotas.yaml"

    @property
    def dashboard(self) -> Path:
        """Where the dashboard is served; of its account alone, since it holds a token."""
        return self.home / "dashboard.json"

    @property
    def dashboard_tokens(self) -> Path:
        """Tokens that the dashboard lets in."""
        return self.home / "dashboard.token"

    @property
    def dashboard_actions(self) -> Path:
        """What people did through the dashboard, a line each."""
        return self.home / "dashboard-actions.jsonl"

    @property
    def code(self) -> Path:
        """Code that runs were submitted with, one folder per content."""
        return self.home / "code"

    @property
    def data(self) -> Path:
        """Default folder of prepared tokens."""
        return self.home / "data"

    def ensure(self) -> None:
        """Make the home's folders.

        Raises:
            UserError: where that isn't allowed.
        """
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.runs):
                pass
        except OSError as error:
            raise UserError(
                f"MEGARAY_HOME={self.home} can't be written ({error.strerror}); set it to a folder that you may write"
            ) from None

    def run(self, run_id: str) -> RunPaths:
        """Paths of one run."""
        return RunPaths(self.runs / run_id)

    def existing(self, run_id: str) -> RunPaths:
        """Paths of a run that exists; `run_id` may be any unambiguous prefix.

        Raises:
            UserError: where no run or more than one fits.
        """
        known = self.run_ids()
        if run_id in known:
            return self.run(run_id)
        fitting = [name for name in known if name.startswith(run_id)] if run_id else []
        if len(fitting) == 1:
            return self.run(fitting[0])
        if fitting:
            raise UserError(
                f"run '{run_id}' is ambiguous: it fits {', '.join(fitting[:5])}; type more of the id"
            )
        raise UserError(
            f"run '{run_id}' does not exist in {self.runs}{nearest(run_id, known)}; "
            "`python -m orchestrator list` shows the runs"
        )

    def run_ids(self) -> list[str]:
        """Ids of all runs, oldest first."""
        if not self.runs.is_dir():
            return []
        ids = [p.name for p in self.runs.iterdir() if (p / "events.jsonl").exists()]
        return sorted(ids, key=lambda name: (name.split("-")[-3:], name))


@dataclass(frozen=True)
class RunPaths:
    """Paths of one run; the folder's name is the run id."""

    root: Path

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.root.name

    @property
    def config(self) -> Path:
        """Resolved configuration of the submission."""
        return self.root / "config.yaml"

    def config_of(self, number: int) -> Path:
        """Resolved configuration of the resume with that number that changed some of it; of the submission for 0."""
        return self.root / f"config-r{number:02d}.yaml" if number else self.config

    @property
    def newest_config(self) -> Path:
        """Resolved configuration of the newest resume that changed some of it, else of the submission."""
        number = 0
        while self.config_of(number + 1).exists():
            number += 1
        return self.config_of(number)

    @property
    def plan(self) -> Path:
        """The plan that was shown before the start."""
        return self.root / "plan.json"

    @property
    def source(self) -> Path:
        """Git commit, package versions and command line of the submission."""
        return self.root / "source.json"

    @property
    def source_diff(self) -> Path:
        """Uncommitted changes at submission."""
        return self.root / "source.diff"

    @property
    def events(self) -> Path:
        """The append-only event log; written by the controller alone."""
        return self.root / "events.jsonl"

    @property
    def view(self) -> Path:
        """The run as folded up to some byte of its log, so that nobody folds a long log again; derived, never the truth."""
        return self.root / "view.json"

    @property
    def parked(self) -> Path:
        """Traceback of the controller's newest error at this run."""
        return self.root / "controller-error.txt"

    @property
    def checkpoints(self) -> Path:
        """Default checkpoint folder."""
        return self.root / "checkpoints"

    @property
    def measurement(self) -> Path:
        """Folder of what a `collectives` run measures."""
        return self.root / "measurement"

    @property
    def wandb(self) -> Path:
        """The W&B sink's own folder."""
        return self.root / "wandb"

    @property
    def attempts(self) -> Path:
        """One folder per attempt."""
        return self.root / "attempts"

    def attempt(self, number: int) -> AttemptPaths:
        """Paths of one attempt, counted from 1."""
        return AttemptPaths(self.attempts / f"{number:03d}")

    def attempt_numbers(self) -> list[int]:
        """Attempts that have a folder, oldest first."""
        if not self.attempts.is_dir():
            return []
        return sorted(int(p.name) for p in self.attempts.iterdir() if p.name.isdigit())


@dataclass(frozen=True)
class AttemptPaths:
    """Paths of one gang start within a run."""

    root: Path

    @property
    def metrics(self) -> Path:
        """Metric lines (`configs.metrics`), appended by rank 0 alone."""
        return self.root / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """Resolved configuration of this attempt, where it differs from the run's."""
        return self.root / "config.yaml"

    @property
    def evidence(self) -> Path:
        """Folder of stacks and rings of living ranks, with a folder for each time that they were written."""
        return self.root / "evidence"

    def evidence_of(self, request: str) -> Path:
        """Folder of what one request for stacks has had written."""
        return self.evidence / request

    @property
    def seen(self) -> Path:
        """Folder of what each node's agent last saw of its ranks."""
        return self.root / "seen"

    @property
    def steps(self) -> Path:
        """Folder of what each node's agent kept of its ranks' steps."""
        return self.root / "steps"

    @property
    def ranks(self) -> Path:
        """Folder of the ranks' logs and records."""
        return self.root / "ranks"

    def log(self, rank: int) -> Path:
        """Standard output and error of a rank."""
        return self.ranks / f"{rank:05d}.log"
