"""How the ranks of a measurement come to be: here, or by torchrun, srun or mpirun."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.paths import RunPaths
from configs.rank import RankContext, free_port

_GRACE = 5.0
"""Seconds in which the others notice that a rank ended and say so, before they are ended too."""
_ERROR = re.compile(r"megaray: |[\w.]*(Error|Exception|Interrupt): ")
_LAUNCHERS = (
    (
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    ("srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")),
    ("MPICH", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
)  # fmt: skip
"""Rank, world, local rank and local world as launchers set them. Slurm's are those of a step: a batch script has a rank
and a number of tasks too, though nobody started it as one of several."""


@dataclass(frozen=True)
class Launched:
    """How this process came to be one of several ranks."""

    by: str
    """The launcher's name; empty where another start of ours set the variables, or nobody says who."""
    variables: dict[str, str]
    """torchrun's variables that aren't set yet."""

    @property
    def keeps_codes(self) -> bool:
        """Whether the launcher hands an exit code on; others print any but 0 as a crash, and hide which it was."""
        return self.by in ("", "srun")


def launched(env: Mapping[str, str]) -> Launched | None:
    """What started this process as a rank; None where nothing did.

    Raises:
        UserError: where the launcher says too little.
    """
    if "RANK" in env:
        return Launched("torchrun" if "TORCHELASTIC_RUN_ID" in env else "", {})
    for name, names in _LAUNCHERS:
        if names[0] not in env or int(env.get(names[1], "1")) < 2:
            continue
        missing = [variable for variable in (names[2], "MASTER_ADDR", "MASTER_PORT") if variable not in env]
        if missing:
            raise UserError(
                f"{names[0]}={env[names[0]]} is set, {', '.join(missing)} not; export MASTER_ADDR=<host of rank 0> and "
                "MASTER_PORT=29500 before srun or mpirun"
            )
        rank, world, local = (env[variable] for variable in names[:3])
        width = re.match(r"\d+", env.get(names[3], world))  # Slurm's is a list such as 8(x4)
        variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local}
        return Launched(name, variables | {"LOCAL_WORLD_SIZE": width[0] if width else world})
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
            env = (
                os.environ
                | context.environment()
                | {"MEGARAY_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
            )
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
        first = next((rank for rank, code in enumerate(codes) if code is not None and code not in fine), None)
        if first is None:
            return max(code or 0 for code in codes), ""
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            time.sleep(0.05)
        return self._verdict(first)

    def _verdict(self, first: int) -> tuple[int, str]:
        """Who is to blame: a rank that a signal ended, one that refuses its input, or the first that gave up."""
        codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
        self.end()
        killed = [rank for rank, code in codes.items() if code is not None and code < 0]
        if killed:
            number = -(codes[killed[0]] or 0)
            return 1, f"rank {killed[0]} was ended by {signal.Signals(number).name}"
        refused = [rank for rank, code in codes.items() if code == 2]
        rank = refused[0] if refused else first
        log = self.run.attempt(1).log(rank)
        words = _last_words(log)
        if words.startswith("megaray: "):
            return codes[rank] or 1, words.removeprefix("megaray: ")
        what = words or f"it ended with exit code {codes[rank]}"
        return codes[rank] or 1, f"rank {rank}: {what} (all of it is in {log})"

    def end(self) -> None:
        """End what still runs, by process id."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def _last_words(log: Path) -> str:
    """The last line that names an error, else the last one: some errors are followed by lines of advice."""
    rows = [row.strip() for row in log.read_text(errors="replace").splitlines() if row.strip()]
    errors = [row for row in rows if _ERROR.match(row)]
    return (errors or rows or [""])[-1]
