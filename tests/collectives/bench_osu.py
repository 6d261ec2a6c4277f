"""This suite's gloo times beside those of the OSU micro-benchmarks over MPI, on the same sizes and number of ranks.

python -m tests.collectives.bench_osu [--osu DIR] [--ranks N]

`DIR` is where the OSU micro-benchmarks were installed; without it they are looked for on PATH. MPI is timed twice: over
TCP, as gloo works, and over shared memory, which it takes within a machine when left to itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from collectives.store.results import SweepRow
from collectives.timing.team import Team
from configs.compose import compose
from configs.rank import RankContext
from tests.collectives.ranks import measure, together

PROGRAMS = {"all_reduce": ("osu_allreduce", False), "all_gather": ("osu_allgather", True)}
"""By operation; and whether OSU names the size of one rank's part where this suite, as nccl-tests, names the whole's."""
TRANSPORTS = {"MPI over TCP": ("--mca", "btl", "tcp,self"), "MPI as it comes": ()}
LARGEST = 16 << 20
WORDS = (
    "workload=collectives", "hardware=cpu", "collectives.ops=all_reduce,all_gather", "collectives.placements=in_place",
    "collectives.min_size=8", f"collectives.max_size={LARGEST}", "collectives.step_factor=8",
    "collectives.seconds_per_size=1", "collectives.check=0",
)  # fmt: skip
SECONDS = 120
"""For one program to end."""
HOW = """no {name} on PATH{where}, so there is nothing to compare with. To get it on Debian:
  apt-get install -y openmpi-bin libopenmpi-dev
  get https://mvapich.cse.ohio-state.edu/benchmarks and, in its folder:
  ./configure CC=mpicc CXX=mpicxx --prefix=/tmp/osu && make install
then: python -m tests.collectives.bench_osu --osu /tmp/osu"""


def find(name: str, folder: Path | None) -> Path | None:
    """A program of the OSU micro-benchmarks, in a folder or on PATH."""
    if folder is not None:
        return next((path for path in sorted(folder.rglob(name)) if os.access(path, os.X_OK)), None)
    found = shutil.which(name)
    return Path(found) if found else None


def parsed(text: str) -> dict[int, float]:
    """Mean microseconds by bytes, of what a program of OSU prints."""
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {int(words[0]): float(words[1]) for words in lines if len(words) > 1 and words[0].isdigit()}


def osu(program: Path, ranks: int, transport: tuple[str, ...]) -> dict[int, float]:
    """Run a program over MPI.

    Raises:
        RuntimeError: where it fails, with its last words.
    """
    usage = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=SECONDS).stdout
    floats = ["-T", "mpi_float"] if "mpi_float" in usage else []  # those before 7 have no other type
    command = ["mpirun", "-n", str(ranks), "--oversubscribe", *transport, str(program), "-m", f"4:{LARGEST}"]
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run([*command, *floats], capture_output=True, text=True, env=env, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return parsed(done.stdout)


def sweep(rank: RankContext, folder: Path) -> list[SweepRow]:
    """This suite's rows, on rank 0."""
    config = compose(list(WORDS))
    layout = dict.fromkeys(("pp", "dp", "cp", "ep", "etp", "tp"), 1)
    return measure(Team.join(config, rank), config, layout, folder)


def main(arguments: list[str]) -> None:
    """Print a table of microseconds and ratios, or how to get what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--osu", type=Path, help="folder of the OSU micro-benchmarks")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args(arguments)
    programs = {op: find(name, options.osu) for op, (name, _) in PROGRAMS.items()}
    if shutil.which("mpirun") is None or None in programs.values():
        where = f" or in {options.osu}" if options.osu else ""
        print(HOW.format(name="mpirun, or OSU micro-benchmarks", where=where))
        return
    with contextlib.suppress(PermissionError):  # not root: what else runs is in the times
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # inherited by the ranks of both
    with tempfile.TemporaryDirectory() as folder:
        rows = together(options.ranks, Path(folder), sweep, Path(folder) / "measurement")[0]
    print(f"{options.ranks} ranks, us{'bytes':>18}{'gloo, here':>12}", end="")
    print("".join(f"{name:>17}{'gloo/MPI':>10}" for name in TRANSPORTS))
    for op, program in programs.items():
        assert program is not None
        columns = [osu(program, options.ranks, transport) for transport in TRANSPORTS.values()]
        for row in rows:
            size = row.size // options.ranks if PROGRAMS[op][1] else row.size
            if row.op != op or row.in_place is None or any(size not in column for column in columns):
                continue
            ours = row.in_place.time_us
            print(f"{op:14}{row.size:15}{ours:12.1f}", end="")
            print("".join(f"{column[size]:17.1f}{ours / column[size]:10.1f}" for column in columns))


if __name__ == "__main__":
    main(sys.argv[1:])
