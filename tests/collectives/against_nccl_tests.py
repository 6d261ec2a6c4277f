"""nccl-tests and this suite in turn on the same GPUs: times of every operation and size, and their ratios.

    python -m tests.collectives.against_nccl_tests --source NCCL_TESTS_SOURCES [--ops all_reduce,all_gather] [--gpus 4]

nccl-tests' programs come from `--binaries` (or `NCCL_TESTS`), or are built from `--source` (or `NCCL_TESTS_SOURCE`) with
nvcc, against the NCCL that torch uses. With `--mpi` (or an `mpiexec` on PATH, as `pip install mpich` puts there) they run a
process for each GPU, as this suite does. Without, they run a thread for each, which launch one after the other: small calls
of a graph then take up to 1 us longer on four GPUs.

Each operation is timed by nccl-tests with launches one by one, by nccl-tests with a graph that is launched ten times in a
row (`-G 10`), and by this suite, which replays a graph where Python's launches would show. With `-G 1` nccl-tests' time
holds what the host takes for the graph's first launch, 50 to 90 us on H200 for a hundred calls, which the device's clock
doesn't see. A row is compared with the run of nccl-tests that launches likewise; the other ratio stands beside it. Neither
registers the buffers of a graph (`NCCL_GRAPH_REGISTER=0`).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from collectives.store.results import ResultStore, SweepRow
from configs.errors import USER_ERROR_EXIT, UserError
from configs.paths import RunPaths

PROGRAMS = {
    "all_reduce": "all_reduce_perf", "all_gather": "all_gather_perf", "reduce_scatter": "reduce_scatter_perf",
    "all_to_all": "alltoall_perf", "all_to_allv": "alltoallv_perf", "broadcast": "broadcast_perf", "reduce": "reduce_perf",
    "gather": "gather_perf", "scatter": "scatter_perf", "sendrecv": "sendrecv_perf",
}  # fmt: skip
"""Their program of each operation; a barrier has none."""
LARGE = 1 << 20
WITHIN = {False: 0.10, True: 0.03}
"""Allowed difference, below `LARGE` bytes and from there on."""
ROUNDS_OF = ("plain", "graph", "ours")
SECONDS = 300
"""For one program to end."""
_LAUNCHES = 10
"""Of nccl-tests' graph; its time is that of all, over their calls."""
Case = tuple[int, str]
"""Bytes, and placement."""


def parsed(text: str) -> dict[Case, float]:
    """Microseconds of each row that a program of nccl-tests prints.

    A row has size, count, type, redop and root, and for each placement time, algbw, busbw and wrong elements.
    """
    found: dict[Case, float] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) < 13 or not words[0].isdigit():
            continue
        found[int(words[0]), "out_of_place"] = float(words[5])
        found[int(words[0]), "in_place"] = float(words[9])
    return found


def ours_by_case(rows: Iterable[SweepRow]) -> dict[Case, tuple[float, bool]]:
    """Microseconds of each of this suite's rows, and whether a graph was replayed."""
    return {
        (row.size, placement): (timing.time_us, timing.graph)
        for row in rows
        for placement in ("out_of_place", "in_place")
        if (timing := getattr(row, placement)) is not None
    }


def ranks_of(text: str) -> set[int]:
    """Ranks that met in what a program printed. Processes of one built without MPI are each their own rank 0."""
    return {int(one) for one in re.findall(r"^#\s+Rank\s+(\d+)\b", text, re.MULTILINE)}


@dataclass(frozen=True)
class Line:
    """One case by all three, microseconds by round."""

    op: str
    size: int
    placement: str
    plain: tuple[float, ...]
    """By nccl-tests, launches one by one."""
    graph: tuple[float, ...]
    """By nccl-tests, a replayed graph."""
    ours: tuple[float, ...]
    replayed: bool
    """Whether this suite replayed a graph."""

    @property
    def theirs(self) -> tuple[float, ...]:
        """By nccl-tests, launching as this suite did."""
        return self.graph if self.replayed else self.plain

    @property
    def ratio(self) -> float:
        """This suite's median over that of nccl-tests launching likewise."""
        return median(self.ours) / median(self.theirs)

    @property
    def inside(self) -> bool:
        """Within what is allowed for the size."""
        return abs(self.ratio - 1) <= WITHIN[self.size >= LARGE]

    @property
    def overlap(self) -> bool:
        """Whether some round of either side lies between the other's, so that a difference may be chance."""
        return min(self.ours) <= max(self.theirs) and min(self.theirs) <= max(self.ours)

    def __str__(self) -> str:
        launch = "graph" if self.replayed else "plain"
        rounds = [f"{min(side):.2f}-{max(side):.2f}" for side in (self.theirs, self.ours)]
        return (
            f"{self.op:<14} {self.size:>11} {self.placement:<12} {median(self.plain):>10.2f} {median(self.graph):>10.2f} "
            f"{median(self.ours):>10.2f} {launch:<6} {self.ratio:>7.3f} {median(self.ours) / median(self.plain):>8.3f} "
            f"{rounds[0]:>19} {rounds[1]:>19}{'' if self.inside else '  <-'}"
        )


HEAD = (
    f"{'operation':<14} {'bytes':>11} {'placement':<12} {'plain us':>10} {'graph us':>10} {'ours us':>10} {'as':<6} "
    f"{'ratio':>7} {'to plain':>8} {'their rounds':>19} {'our rounds':>19}"
)


def lines_of(
    op: str,
    plain: Sequence[dict[Case, float]],
    graph: Sequence[dict[Case, float]],
    ours: Sequence[dict[Case, tuple[float, bool]]],
) -> list[Line]:
    """Cases that all three have; what only one side has is left out."""
    cases = [case for case in ours[0] if all(case in one for side in (plain, graph, ours) for one in side)]
    return [
        Line(
            op, *case, tuple(one[case] for one in plain), tuple(one[case] for one in graph),
            tuple(one[case][0] for one in ours), ours[-1][case][1],
        )
        for case in cases
    ]  # fmt: skip


def summary(lines: Sequence[Line]) -> list[str]:
    """Two lines on either side of the bound, and the last: `N of M within`, and how many of the others may be chance."""
    told = []
    for large, name in ((False, "below 1 MiB"), (True, "from 1 MiB")):
        part = [line for line in lines if (line.size >= LARGE) == large]
        if part:
            worst = max(part, key=lambda line: abs(line.ratio - 1))
            to_plain = median(median(line.ours) / median(line.plain) for line in part)
            told.append(
                f"{name}: {sum(line.inside for line in part)} of {len(part)} within {WITHIN[large]:.0%}; median ratio "
                f"{median(line.ratio for line in part):.3f}, worst {worst.ratio:.3f} ({worst.op}, {worst.size} bytes, "
                f"{worst.placement}); against plain launches median {to_plain:.3f}"
            )
    outside = [line for line in lines if not line.inside]
    last = f"{len(lines) - len(outside)} of {len(lines)} within"
    if outside:
        last += f"; of the other {len(outside)}, both sides' rounds overlap in {sum(line.overlap for line in outside)}"
    return [*told, last]


# ---- nccl-tests ----


def nccl_home(into: Path) -> Path:
    """A folder with `include/nccl.h` and `lib/libnccl.so` of the NCCL that torch loads.

    Raises:
        UserError: where there are no headers.
    """
    spec = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
    roots = [Path(path) for path in (spec.submodule_search_locations or ()) if spec] if spec else []
    for root in [*roots, Path("/usr"), Path("/usr/local")]:
        libraries = sorted(path for path in root.glob("lib*/**/libnccl.so*") if path.is_file())
        if (root / "include/nccl.h").exists() and libraries:
            into.mkdir(parents=True, exist_ok=True)
            (into / "include").symlink_to(root / "include")
            (into / "lib").mkdir()
            for name in ("libnccl.so", "libnccl.so.2"):
                (into / "lib" / name).symlink_to(libraries[0])
            return into
    raise UserError(
        "no nccl.h beside torch's NCCL or under /usr; install NCCL's headers, or name built --binaries"
    )


def mpi_home(named: Path | None) -> Path | None:
    """The folder of an MPI: the named one, or that of the `mpiexec` on PATH; None where there is none.

    Raises:
        UserError: where the named one has no `bin/mpiexec`.
    """
    if named is not None:
        if not (named / "bin" / "mpiexec").exists():
            raise UserError(f"--mpi={named} has no bin/mpiexec; name the folder that MPI is installed in")
        return named
    known = shutil.which("mpiexec")
    return Path(known).absolute().parents[1] if known else None


def build(source: Path, folder: Path, mpi: Path | None) -> tuple[Path, dict[str, str]]:
    """Build nccl-tests for this machine's GPUs; the folder of the programs, and the variables that they need.

    Raises:
        UserError: where sources, nvcc or NCCL are missing, or the build fails.
    """
    if not (source / "src" / "common.cu").exists():
        raise UserError(
            f"--source={source} doesn't hold nccl-tests (src/common.cu is missing); name its folder"
        )
    nvcc = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")
    if not Path(nvcc).exists():
        raise UserError(f"{nvcc} is missing; put nvcc on PATH, or name built --binaries")
    import torch  # only where there is something to build

    cuda, nccl = Path(nvcc).resolve().parents[1], nccl_home(folder / "nccl")
    arch = "".join(map(str, torch.cuda.get_device_capability(0)))
    words = [
        "make", "-C", str(source), f"-j{os.cpu_count() or 4}", f"BUILDDIR={folder / 'build'}", f"CUDA_HOME={cuda}",
        f"NCCL_HOME={nccl}", f"NVCC_GENCODE=-gencode=arch=compute_{arch},code=sm_{arch}",
        *(("MPI=1", f"MPI_HOME={mpi}") if mpi else ()),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"nccl-tests can't be built: {' '.join((done.stderr or done.stdout).split())[-600:]}")
    return folder / "build", libraries(nccl / "lib", cuda / "lib64", *([mpi / "lib"] if mpi else []))


def libraries(*folders: Path) -> dict[str, str]:
    """The search path of shared libraries, these folders first."""
    before = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": ":".join([*map(str, folders), *([before] if before else [])])}


@dataclass(frozen=True)
class Theirs:
    """nccl-tests' programs, and how they are started."""

    binaries: Path
    env: dict[str, str]
    mpi: Path | None
    """Starts a process for each GPU; None: they run threads."""

    def words(self, op: str, gpus: int) -> list[str]:
        """What starts an operation's program."""
        program = str(self.binaries / PROGRAMS[op])
        if self.mpi is None:
            return [program, "-t", str(gpus), "-g", "1"]
        return [str(self.mpi / "bin" / "mpiexec"), "-n", str(gpus), program, "-t", "1", "-g", "1"]


def ended(words: Sequence[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A program that has ended, with these variables beside those of this process.

    Raises:
        UserError: where it doesn't end.
    """
    try:
        return subprocess.run(
            words, capture_output=True, text=True, env=os.environ | env, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{' '.join(words)} didn't end within {SECONDS} s") from None


def theirs(by: Theirs, op: str, gpus: int, sizes: Sequence[str], graph: bool) -> dict[Case, float]:
    """One program of nccl-tests.

    Raises:
        UserError: where it is missing, doesn't end, fails, with its last words, or measures fewer GPUs.
    """
    program = by.binaries / PROGRAMS[op]
    if not program.exists():
        raise UserError(f"{program} is missing; name the folder with nccl-tests' programs as --binaries")
    words = [*by.words(op, gpus), *sizes, "-w", "5", "-c", "0", "-G", str(_LAUNCHES * graph)]
    done = ended(words, by.env | _SAME)
    found = parsed(done.stdout)
    if done.returncode or not found:
        last = " ".join((done.stderr or done.stdout).split())[-300:]
        raise UserError(f"{' '.join(words)} failed with exit code {done.returncode}: {last}")
    if (ranks := ranks_of(done.stdout)) and len(ranks) < gpus:
        raise UserError(
            f"{program} measured {len(ranks)} of {gpus} GPUs, as programs do that are built without MPI; build them with "
            "MPI=1, or take mpiexec off PATH"
        )
    return found


# ---- this suite ----


def ours(op: str, gpus: int, sizes: Sequence[str], hardware: str, env: dict[str, str]) -> list[SweepRow]:
    """This suite's rows of one operation.

    Raises:
        UserError: where the measurement doesn't end, or fails, with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [
            *(sys.executable, "-m", "collectives", "run", "--ranks", str(gpus), "--ops", op, *sizes, "-c", "0"),
            *("--out", folder, f"hardware={hardware}", "collectives.max_iterations=500", "collectives.seconds_per_size=1"),
        ]  # fmt: skip
        done = ended(words, env)
        if done.returncode:
            last = " ".join((done.stderr or done.stdout).split())[-300:]
            raise UserError(f"{' '.join(words)} failed with exit code {done.returncode}: {last}")
        return ResultStore(RunPaths(Path(folder)).measurement).finished()


def compared(op: str, by: Theirs, options: argparse.Namespace) -> list[Line]:
    """One operation by all three, in turn, in each round the other way round."""
    sizes = ["-b", options.b, "-e", options.e, "-f", str(options.f), "-n", str(options.n)]
    plain, graph, mine = (
        list[dict[Case, float]](),
        list[dict[Case, float]](),
        list[dict[Case, tuple[float, bool]]](),
    )
    for number in range(options.rounds):
        for who in ROUNDS_OF if number % 2 == 0 else ROUNDS_OF[::-1]:
            if who == "ours":
                mine.append(ours_by_case(ours(op, options.gpus, sizes, options.hardware, _SAME)))
            else:
                side = graph if who == "graph" else plain
                side.append(theirs(by, op, options.gpus, sizes, who == "graph"))
    return lines_of(op, plain, graph, mine)


_SAME = {"NCCL_GRAPH_REGISTER": "0", "NCCL_TESTS_ALLTOALLV_SPREAD": "1"}
"""Both sides: graphs move as plain launches do, and alltoallv is as uneven as `collectives.spread=1`."""


def options_of(arguments: list[str]) -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--binaries", type=Path, default=os.environ.get("NCCL_TESTS"), help="folder of *_perf"
    )
    parser.add_argument(
        "--source", type=Path, default=os.environ.get("NCCL_TESTS_SOURCE"), help="nccl-tests' sources"
    )
    parser.add_argument("--mpi", type=Path, help="folder of an MPI, for a process on each GPU")
    parser.add_argument("--ops", default=",".join(PROGRAMS), help="operations, with commas")
    parser.add_argument("--gpus", type=int, help="default: all of this machine")
    parser.add_argument("--hardware", default="h100", help="preset of the GPUs")
    parser.add_argument("--rounds", type=int, default=1, help="times that all three measure an operation")
    parser.add_argument("-b", default="8", help="smallest size")
    parser.add_argument("-e", default="1G", help="largest size")
    parser.add_argument("-f", type=int, default=2, help="factor from one size to the next")
    parser.add_argument("-n", type=int, default=100, help="calls in a burst or graph, on both sides")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[Line]:
    """Measure, and print a line for each case as soon as its operation is done.

    Raises:
        UserError: for an operation that nobody has, or where there is nothing to compare with.
    """
    ops = options.ops.split(",")
    if unknown := [op for op in ops if op not in PROGRAMS]:
        raise UserError(f"--ops={unknown[0]} has no program in nccl-tests; use some of {','.join(PROGRAMS)}")
    if options.binaries is None and options.source is None:
        raise UserError(
            "nothing to compare with; name nccl-tests' sources as --source, or its programs as --binaries"
        )
    if options.gpus is None:
        import torch

        options.gpus = torch.cuda.device_count()
    if options.gpus < 2:
        raise UserError(
            f"--gpus={options.gpus}: a collective needs at least two GPUs; run this where they are"
        )
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        mpi = mpi_home(options.mpi)
        binaries, env = (
            (options.binaries, libraries(*([mpi / "lib"] if mpi else [])))
            if options.binaries
            else build(options.source, Path(folder), mpi)
        )
        print(
            f"nccl-tests: {f'a process for each GPU, by {mpi}' if mpi else 'threads of one process, without MPI'}"
        )
        print(HEAD)
        for op in ops:
            found = compared(op, Theirs(Path(binaries), env, mpi), options)
            print("\n".join(map(str, found)), flush=True)
            lines += found
    return lines


def main(arguments: list[str]) -> int:
    """Print the table; exit code 0 where every case is within, 3 where some isn't."""
    try:
        lines = run(options_of(arguments))
    except UserError as error:
        print(f"megaray: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    print("\n".join(summary(lines)))
    return 0 if lines and all(line.inside for line in lines) else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
