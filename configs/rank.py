"""What a rank is given when it starts: the contract between a gang and the program it runs, and where ranks can meet."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from configs.errors import UserError
from configs.paths import AttemptPaths, RunPaths

#: Variables of `torchrun`'s contract that a gang sets in the same way.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PARENT = "MEGARAY_PARENT"
"""Variable with the process that started this one as a rank, and whose end ends it."""
GATE = "MEGARAY_GATE"
"""Variable with a file that appears once nothing is left of the attempt before, whose device memory this one takes."""
_LOWEST = 20_000
"""Below are ports that services are known by."""
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL = 32_768
"""Where Linux begins to give ports to whoever asks for any."""


@dataclass(frozen=True)
class RankFiles:
    """What one rank writes for its observers."""

    folder: Path
    """In the node's memory under a gang, so that no storage can hold a rank or its observer up."""
    rank: int

    @property
    def ring(self) -> Path:
        """Its phase changes (`faulttol.recorder`)."""
        return self.folder / f"{self.rank:05d}.ring"

    @property
    def signs(self) -> Path:
        """Its communicators and what it waits for (`faulttol.progress_report`)."""
        return self.folder / f"{self.rank:05d}.signs"

    @property
    def raised(self) -> Path:
        """The error that it ends by (`faulttol.exits`)."""
        return self.folder / f"{self.rank:05d}.raised"


@dataclass(frozen=True)
class RankContext:
    """Identity of one rank. A program is `main(config: RunConfig, rank: RankContext) -> None`."""

    rank: int
    """Global rank, 0 <= rank < world."""
    world: int
    """Ranks of the gang."""
    local_rank: int
    """Rank within the node; also the device index."""
    local_world: int
    """Ranks on this node."""
    master_addr: str
    """Address of rank 0's node."""
    master_port: int
    """Port of the rendezvous store."""
    run: RunPaths
    """The run's folder."""
    attempt: int
    """Attempt within the run, from 1."""
    rings: Path | None = None
    """Folder in this node's memory for what the rank writes for its observers; None: nobody watches, as under torchrun."""

    @property
    def paths(self) -> AttemptPaths:
        """Folder of this attempt."""
        return self.run.attempt(self.attempt)

    @property
    def files(self) -> RankFiles:
        """What this rank writes for its observers."""
        return RankFiles(self.rings or self.paths.ranks, self.rank)

    @classmethod
    def from_environment(cls, env: Mapping[str, str], run_root: Path) -> RankContext:
        """Read the variables that both a gang and `torchrun` set; without them, one rank alone.

        Args:
            env: the environment.
            run_root: the run's folder where `MEGARAY_RUN` isn't set, as under torchrun.

        Raises:
            UserError: where some of the variables are set and others aren't, or one isn't the number that it should be.
        """
        missing = [name for name in TORCHRUN_VARIABLES if name not in env]
        if missing and len(missing) < len(TORCHRUN_VARIABLES) and "RANK" in env:
            raise UserError(
                f"{', '.join(missing)} not set, though RANK={env['RANK']} is; start the ranks with "
                "torchrun or `python -m orchestrator submit`"
            )
        alone = "RANK" not in env
        world = 1 if alone else _number(env, "WORLD_SIZE", 1)
        local_world = 1 if alone else _number(env, "LOCAL_WORLD_SIZE", 1, world)
        return cls(
            rank=0 if alone else _number(env, "RANK", 0, world - 1),
            world=world,
            local_rank=0 if alone else _number(env, "LOCAL_RANK", 0, local_world - 1),
            local_world=local_world,
            master_addr="127.0.0.1" if alone else env["MASTER_ADDR"],
            master_port=0 if alone else _number(env, "MASTER_PORT", 0, 65_535),
            run=RunPaths(Path(env.get("MEGARAY_RUN") or run_root)),
            attempt=_number(env, "MEGARAY_ATTEMPT", 1) if env.get("MEGARAY_ATTEMPT") else 1,
            rings=Path(env["MEGARAY_RINGS"]) if env.get("MEGARAY_RINGS") else None,
        )

    def environment(self) -> dict[str, str]:
        """The variables that tell a child process this context; the inverse of `from_environment`."""
        rings = {"MEGARAY_RINGS": str(self.rings)} if self.rings is not None else {}
        return rings | {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "MEGARAY_RUN": str(self.run.root),
            "MEGARAY_ATTEMPT": str(self.attempt),
        }


def _number(env: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    """A variable's number.

    Raises:
        UserError: where it isn't one, or is out of its range.
    """
    text = env[name].strip()
    if text.isdecimal() and least <= int(text) and (most is None or int(text) <= most):
        return int(text)
    between = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise UserError(
        f"{name}='{env[name]}' is not a whole number {between}; torchrun and `python -m orchestrator submit` set it, or "
        "unset RANK and MEGARAY_ATTEMPT for one rank alone"
    )


def threads(env: Mapping[str, str]) -> int:
    """CPU threads of this rank: the first number of `OMP_NUM_THREADS`, which may be a list by nesting; 1 without it.

    Raises:
        UserError: where that isn't a number.
    """
    count = env.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if count and not (count.isdecimal() and int(count)):
        raise UserError(
            f"OMP_NUM_THREADS='{env['OMP_NUM_THREADS']}' doesn't begin with a number of threads; set it to one, such as 4, "
            "or unset it"
        )
    return int(count or 1)


def die_with_parent(env: Mapping[str, str]) -> None:
    """Have the kernel kill this process when the one that started it ends (Linux `PR_SET_PDEATHSIG`).

    A gang passes its own id in `MEGARAY_PARENT`; without it, as under torchrun, nothing happens. A parent
    that ended before the call is noticed by the changed parent id.
    """
    expected = env.get(PARENT)
    if expected is None:
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(expected):
        os.kill(os.getpid(), signal.SIGKILL)


def free_port() -> int:
    """A port that nobody has, on whatever address of this machine; never the same twice in this process.

    It is one that the kernel gives to nobody who asks for any port. One from there is taken by the next connection of
    another process, and ranks load torch for seconds before rank 0 listens.

    Raises:
        OSError: where none is left.
    """
    below, numbers = _ports()
    for _ in range(below):
        port = _LOWEST + next(numbers) % below
        if are_free([port]):
            return port
    raise OSError(f"no port from {_LOWEST} to {_LOWEST + below - 1} is free")


def are_free(ports: Sequence[int]) -> bool:
    """Whether nobody listens at any of these ports, on whatever address of this machine."""
    for port in ports:
        with socket.socket() as item:
            # Connections that have ended don't count.
            item.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                item.bind(("", port))
            except OSError:
                return False
    return True


@cache
def _ports() -> tuple[int, itertools.count[int]]:
    """How many ports there are to choose from, and numbers that begin anywhere."""
    try:
        first = int(_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = _USUAL
    # Where the kernel gives away all from far below, there is no better choice than any.
    below = first - _LOWEST if first > _LOWEST + 1000 else _USUAL - _LOWEST
    return below, itertools.count(random.SystemRandom().randrange(below))
