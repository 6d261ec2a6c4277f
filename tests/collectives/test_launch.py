"""Ranks that are started here: which of several ends is the verdict, and which launcher started a rank."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest

from collectives import launch
from collectives.launch import LocalRanks, detect_launcher
from configs.paths import RunPaths

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]

MISTAKE = "print('megaray: a size of 10 bytes is not whole elements', file=sys.stderr, flush=True)"
LOST = "print('megaray: rank 0 lost its peers: Connection closed by peer [127.0.0.1]', file=sys.stderr, flush=True)"
OWN = "sys.exit('ValueError: the message of a defect')"


def verdict(folder: Path, *programs: str) -> tuple[int, str]:
    """Of ranks that each run a program of their own."""
    cases = "\n".join(f"if rank == {rank}: {program}" for rank, program in enumerate(programs))
    code = f"import os, signal, sys, time; rank = int(os.environ['RANK'])\n{cases}"
    return LocalRanks.start(RunPaths(folder), len(programs), ["-c", code]).wait(fine=(0, 3))


def test_a_mistake_counts_before_what_it_does_to_the_others(tmp_path: Path) -> None:
    """A library may abort when its peer is gone, which isn't the reason why that one went."""
    abort = "os.kill(os.getpid(), signal.SIGABRT)"
    mistake = f"{MISTAKE}; sys.exit(2)"
    assert verdict(tmp_path, mistake, abort) == (2, "a size of 10 bytes is not whole elements")
    assert verdict(tmp_path, f"{LOST}; sys.exit(1)", mistake) == (
        2,
        "a size of 10 bytes is not whole elements",
    )


def test_a_rank_that_says_why_it_ends_has_time_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seconds after the first end it was killed, and the exit code was that of the rank that had lost it."""
    monkeypatch.setattr(launch, "_GRACE", 0.5)
    slow = f"{MISTAKE}; time.sleep(2); os._exit(2)"
    assert verdict(tmp_path, f"time.sleep(1); {LOST}; sys.exit(1)", slow)[0] == 2


def test_a_rank_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_GRACE", "_LEAVING"):
        monkeypatch.setattr(launch, name, 0.5)
    code, words = verdict(tmp_path, f"time.sleep(1); {OWN}", f"{MISTAKE}; time.sleep(50)")
    assert code == 1 and words.startswith("rank 0: ValueError: the message of a defect")


@pytest.mark.parametrize("echo", [f"{LOST}; sys.exit(1)", "os.kill(os.getpid(), signal.SIGABRT)"])
def test_the_rank_with_an_error_of_its_own_is_named(echo: str, tmp_path: Path) -> None:
    """Both end within a moment: the first by number was named, whose only trouble was that the other had gone."""
    code, words = verdict(tmp_path, echo, OWN)
    assert code == 1
    assert words.startswith("rank 1: ValueError: the message of a defect (all of it is in ")


def test_a_rank_that_the_system_killed_is_named(tmp_path: Path) -> None:
    killed = "os.kill(os.getpid(), signal.SIGKILL)"
    assert verdict(tmp_path, f"{LOST}; sys.exit(1)", killed) == (
        1,
        f"rank 1 was ended by {signal.SIGKILL.name}",
    )
    assert verdict(tmp_path, "sys.exit(3)", "sys.exit(0)") == (3, "")


def test_a_disk_that_is_full_is_named_where_it_has_swallowed_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict was an exit code and the path of an empty log."""

    def full(_path: Path, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, words = verdict(tmp_path, "sys.exit(1)", "sys.exit(0)")
    folder = tmp_path / "attempts" / "001" / "ranks"
    assert code == 1
    assert words == (
        f"rank 0: it ended with exit code 1; {folder} takes nothing more (No space left on device); {launch.DISK_ADVICE}"
    )
    monkeypatch.undo()
    assert verdict(tmp_path, "sys.exit(1)", "sys.exit(0)")[1].endswith(
        f"(all of it is in {folder}/00000.log)"
    )
    assert not list(folder.glob(".*")), "nothing of it is left"


@pytest.mark.unit
def test_inside_slurm_mpiruns_ranks_are_not_those_of_its_daemons() -> None:
    """MPICH's mpirun starts a daemon on each node by srun: all ranks of a node had the daemon's number for theirs."""
    master = {"MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}
    daemon = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }
    mpich = {"PMI_RANK": "11", "PMI_SIZE": "16", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "8"}
    ranks = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
    assert detect_launcher(daemon | mpich | master) == launch.LauncherEnvironment("MPICH", ranks)
    task = {
        "SLURM_PROCID": "11",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "3",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    }
    pmi = {"PMI_RANK": "11", "PMI_SIZE": "16"}  # of srun --mpi=pmi2
    assert detect_launcher(task | pmi | master) == launch.LauncherEnvironment("srun", ranks)
