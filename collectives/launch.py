"""How the ranks of a measurement come to be: here, or by torchrun, srun or mpirun."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import USER_ERROR_EXIT, UserError
from configs.paths import RunPaths
from configs.rank import PARENT, RankContext, free_port

_GRACE = 5.0
"""Seconds in which the others notice that a rank ended and say so, before they are ended too."""
_LEAVING = 60.0
"""Seconds that a rank has to end which has said why it does: to give a GPU back may take that long on a busy machine."""
_ERROR = re.compile(r"megaray: |[\w.]*(Error|Exception|Interrupt): ")
_CONSEQUENCE = re.compile(
    r"lost its peers|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE
)
"""What a rank says whose peer has ended: not why that one did."""
DISK_ADVICE = "free or fix that disk and type the same command again, or name another folder with --out"
"""What to do where a measurement's folder takes nothing more."""
_LAUNCHERS = (
    (
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    ("MPICH", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    ("srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")),
)  # fmt: skip
"""Rank, world, local rank and local world as launchers set them. Slurm's are those of a step: a batch script has a rank
and a number of tasks too, though nobody started it as one of several. It comes last, since inside Slurm each mpirun
starts its daemons by srun, and the ranks inherit a daemon's place; srun with PMI sets MPICH's rank without a local one."""


@dataclass(frozen=True)
class LauncherEnvironment:
    """The launcher that started this process as one of several ranks."""

    by: str
    """The launcher's name; empty where another start of ours set the variables, or nobody says who."""
    variables: dict[str, str]
    """torchrun's variables that aren't set yet."""

    @property
    def keeps_codes(self) -> bool:
        """Whether the launcher hands an exit code on; others print any but 0 as a crash, and hide which it was."""
        return self.by in ("", "srun")


def detect_launcher(env: Mapping[str, str]) -> LauncherEnvironment | None:
    """The launcher of this process; None where it wasn't started as a rank.

    Raises:
        UserError: where the launcher says too little.
    """
    if "RANK" in env:
        return LauncherEnvironment("torchrun" if "TORCHELASTIC_RUN_ID" in env else "", {})
    several = [one for one in _LAUNCHERS if one[1][0] in env and int(env.get(one[1][1], "1")) > 1]
    for name, names in sorted(several, key=lambda one: one[1][2] not in env)[:1]:
        missing = [variable for variable in (names[2], "MASTER_ADDR", "MASTER_PORT") if variable not in env]
        if missing:
            raise UserError(
                f"{names[0]}={env[names[0]]} is set, {', '.join(missing)} not; export MASTER_ADDR=<host of rank 0> and "
                "MASTER_PORT=29500 before srun or mpirun"
            )
        rank, world, local = (env[variable] for variable in names[:3])
        width = re.match(r"\d+", env.get(names[3], world))  # Slurm's is a list such as 8(x4)
        variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local}
        return LauncherEnvironment(name, variables | {"LOCAL_WORLD_SIZE": width[0] if width else world})
    return None


def refuse_both(env: Mapping[str, str], ranks: int) -> None:
    """Refuse `--ranks` in a process that a launcher started as one of several.

    Raises:
        UserError: where one did.
    """
    for name, size in (("torchrun", "WORLD_SIZE"), *((name, names[1]) for name, names in _LAUNCHERS)):
        if int(env.get(size) or 1) > 1 and (name != "torchrun" or "RANK" in env):
            raise UserError(
                f"--ranks={ranks} inside {name}, which has started {env[size]} ranks itself; leave --ranks (-g, -t) out, "
                f"or type the command without {name}"
            )


@dataclass
class LocalRanks:
    """Ranks on this machine, as child processes that end with this one."""

    run: RunPaths
    processes: list[subprocess.Popen[bytes]]

    @classmethod
    def start(cls, run: RunPaths, world: int, program: list[str]) -> LocalRanks:
        """Start `world` ranks of `program`; rank 0 prints here, the others into their logs."""
        port = free_port()
        paths = run.attempt(1)
        paths.ranks.mkdir(parents=True, exist_ok=True)
        processes = []
        for rank in range(world):
            context = RankContext(rank, world, rank, world, "127.0.0.1", port, run, 1)
            env = os.environ | context.environment() | {PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
            env.setdefault("OMP_NUM_THREADS", "1")
            with paths.log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, *program],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else log,
                    stderr=log,
                    start_new_session=True,
                )
            processes.append(process)
        return cls(run, processes)

    def wait(self, fine: tuple[int, ...]) -> tuple[int, str]:
        """Wait for the end of all, by exit codes that are `fine`.

        Returns:
            The exit code, and what went wrong in one line; empty where nothing did.
        """
        codes = [process.poll() for process in self.processes]
        while None in codes and all(code is None or code in fine for code in codes):
            time.sleep(0.05)
            codes = [process.poll() for process in self.processes]
        if all(code in fine for code in codes):
            return max(code or 0 for code in codes), ""
        self._until_ended(range(len(codes)), _GRACE)
        # A rank that needs longer says why it ends before it has, and its exit code is the verdict.
        self._until_ended(
            [rank for rank in range(len(codes)) if self._words(rank).startswith("megaray: ")], _LEAVING
        )
        return self._verdict(fine)

    def _until_ended(self, ranks: Sequence[int], seconds: float) -> None:
        """Wait for these ranks."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(self.processes[rank].poll() is None for rank in ranks):
            time.sleep(0.05)

    def _words(self, rank: int) -> str:
        return _last_words(self.run.attempt(1).log(rank))

    def _verdict(self, fine: tuple[int, ...]) -> tuple[int, str]:
        """Exit code and words of the rank to blame; those that run now are ended, and to blame for nothing."""
        codes = {
            rank: code for rank, process in enumerate(self.processes) if (code := process.poll()) is not None
        }
        self.end()
        wrong = {rank: code for rank, code in codes.items() if code not in fine}
        rank = min(wrong, key=lambda rank: (_blame_order(wrong[rank], self._words(rank)), rank))
        if wrong[rank] < 0:
            return 1, f"rank {rank} was ended by {signal.Signals(-wrong[rank]).name}"
        words = self._words(rank)
        if words.startswith("megaray: "):
            return wrong[rank], words.removeprefix("megaray: ")
        what, log = words or f"it ended with exit code {wrong[rank]}", self.run.attempt(1).log(rank)
        if refusal := _write_refusal(log.parent):  # so that the log has less than the rank said
            return wrong[rank], f"rank {rank}: {what}; {refusal}"
        return wrong[rank], f"rank {rank}: {what} (all of it is in {log})"

    def end(self) -> None:
        """End what still runs, by process id."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def _blame_order(code: int, words: str) -> int:
    """Sort key of failed ranks, 0 for the likeliest cause: others fail because of it, some by a library's abort."""
    if code == USER_ERROR_EXIT:
        return 0
    if code < 0:
        return 3 if code == -signal.SIGABRT else 1
    return 4 if _CONSEQUENCE.search(words) else 2


def _write_refusal(folder: Path) -> str:
    """Why nothing can be written there, as on a full disk, and what to do; empty where something can."""
    probe = folder / ".probe"
    try:
        probe.write_bytes(bytes(1 << 16))
    except OSError as error:
        return f"{folder} takes nothing more ({error.strerror}); {DISK_ADVICE}"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return ""


def _last_words(log: Path) -> str:
    """The last line that names an error, else the last one: some errors are followed by lines of advice."""
    rows = [row.strip() for row in log.read_text(errors="replace").splitlines() if row.strip()]
    errors = [row for row in rows if _ERROR.match(row)]
    return (errors or rows or [""])[-1]
