"""The comparison with nccl-tests, on recorded output: what is read, what is compared with what, and what is said."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from collectives.store.results import SweepRow
from tests.collectives import against_nccl_tests as against
from tests.collectives.store.test_results import row, timing

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

RECORDED = """\
# nccl-tests version 2.19.6 nccl-headers=22809 nccl-library=22809
# Collective test starting: all_reduce_perf
# nThread 4 nGpus 1 minBytes 8 maxBytes 1048576 step: 131072(factor) warmup iters: 5 iters: 100 agg iters: 1 validation: 0 graph: {graph} unalign: 0
#
# Using devices
{ranks}
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)
           8             2     float     sum      -1  {small}    0.00    0.00     N/A  {small}    0.00    0.00     N/A
     1048576        262144     float     sum      -1    40.00   26.21   39.32     N/A    40.50   25.89   38.84     N/A
  1073741824     268435456     float     sum      -1  1.2e+07    0.09    0.13     N/A  1234567    0.87    1.30     N/A
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 0
#
# Collective test concluded: all_reduce_perf
"""  # noqa: E501
"""Heads and widths as release 2.19.6 prints them."""


RANK = "#  Rank {:2} Group  0 Pid   4711 on     node-a device {:2} [0000:07:00] NVIDIA H100 80GB HBM3"


def recorded(graph: bool, ranks: int = 4) -> str:
    listed = "\n".join(RANK.format(rank, rank) for rank in range(ranks))
    return RECORDED.format(graph=int(graph), small="  10.00" if graph else "  20.00", ranks=listed)


def test_rows_are_read_and_nothing_else() -> None:
    assert against.parsed(recorded(False)) == {
        (8, "out_of_place"): 20.0, (8, "in_place"): 20.0, (1 << 20, "out_of_place"): 40.0, (1 << 20, "in_place"): 40.5,
        (1 << 30, "out_of_place"): 1.2e7, (1 << 30, "in_place"): 1234567.0,
    }  # fmt: skip
    assert against.parsed("") == against.parsed("# 8 2 float sum -1 1 1 1 1 1 1 1 1") == {}


def measured(small: float, large: float, replayed: bool) -> list[SweepRow]:
    """Rows of this suite: one small that a graph launched, one large, and one that nccl-tests doesn't have."""
    first = timing(small, 0, 0)
    one = type(first)(**vars(first) | {"graph": replayed})
    big = timing(large, 0, 0)
    return [
        row(size=8, count=2, out_of_place=one, in_place=None),
        row(size=1 << 20, out_of_place=big, in_place=big),
        row(size=64, out_of_place=big, in_place=big),
    ]


def test_a_row_is_compared_with_the_run_that_launches_likewise() -> None:
    plain, graph = against.parsed(recorded(False)), against.parsed(recorded(True))
    mine = against.ours_by_case(measured(10.5, 41.0, True))
    lines = against.lines_of("all_reduce", [plain], [graph], [mine])
    assert [(line.size, line.placement, line.replayed) for line in lines] == [
        (8, "out_of_place", True), (1 << 20, "out_of_place", False), (1 << 20, "in_place", False),
    ]  # fmt: skip
    assert [round(line.ratio, 3) for line in lines] == [1.05, 1.025, 1.012]
    assert all(line.inside for line in lines)
    plain_launch = against.lines_of(
        "all_reduce", [plain], [graph], [against.ours_by_case(measured(10.5, 41, False))]
    )
    assert plain_launch[0].ratio == pytest.approx(10.5 / 20) and not plain_launch[0].inside


@pytest.mark.parametrize(
    ("size", "ours", "inside"),
    [(8, 109.0, True), (8, 111.0, False), (8, 91.0, True), (8, 89.0, False), ((1 << 20) - 4, 109.0, True),
     (1 << 20, 102.0, True), (1 << 20, 104.0, False), (1 << 30, 98.0, True), (1 << 30, 96.0, False)],
)  # fmt: skip
def test_what_is_within(size: int, ours: float, inside: bool) -> None:
    assert against.Line("reduce", size, "in_place", (1.0,), (100.0,), (ours,), True).inside is inside


def test_the_median_of_the_rounds_counts() -> None:
    sides: list[dict[against.Case, float]] = [{(8, "in_place"): value} for value in (1.0, 100.0, 3.0)]
    mine: list[dict[against.Case, tuple[float, bool]]] = [
        {(8, "in_place"): (value, True)} for value in (7.0, 5.0, 6.0)
    ]
    (line,) = against.lines_of("gather", sides, sides, mine)
    assert line.ratio == 2.0 and line.ours == (7.0, 5.0, 6.0)
    assert str(line).split()[3:6] == ["3.00", "3.00", "6.00"] and str(line).split()[-3:-1] == [
        "1.00-100.00",
        "5.00-7.00",
    ]


@pytest.mark.parametrize(
    ("theirs", "ours", "overlap"),
    [((10.0, 12.0), (12.0, 13.0), True), ((12.0, 13.0), (10.0, 12.0), True), ((10.0, 14.0), (11.0, 12.0), True),
     ((10.0, 12.0), (12.1, 13.0), False), ((12.1, 13.0), (10.0, 12.0), False)],
)  # fmt: skip
def test_rounds_that_overlap(theirs: tuple[float, ...], ours: tuple[float, ...], overlap: bool) -> None:
    assert against.Line("reduce", 8, "in_place", (1.0,), theirs, ours, True).overlap is overlap
    assert against.Line("reduce", 8, "in_place", theirs, (1.0,), ours, False).overlap is overlap


def test_the_last_line_counts_all_and_the_others_each_side_of_the_bound() -> None:
    lines = [
        against.Line("reduce", 8, "in_place", (20.0,), (10.0,), (10.0,), True),
        against.Line("reduce", 64, "in_place", (20.0,), (10.0,), (15.0,), True),
        against.Line("reduce", 1 << 20, "in_place", (40.0,), (40.0,), (40.0,), False),
    ]
    below, above, last = against.summary(lines)
    assert below.startswith(
        "below 1 MiB: 1 of 2 within 10%; median ratio 1.250, worst 1.500 (reduce, 64 bytes, in_place)"
    )
    assert below.endswith("against plain launches median 0.625")
    assert above.startswith("from 1 MiB: 1 of 1 within 3%")
    assert last == "2 of 3 within; of the other 1, both sides' rounds overlap in 0"
    assert against.summary([lines[0], lines[2]])[-1] == "2 of 2 within"
    assert str(lines[1]).endswith("<-") and not str(lines[0]).endswith("<-")


# ---- the command, with programs that print what was recorded ----


@pytest.fixture
def binaries(tmp_path: Path) -> Path:
    """Programs in the place of nccl-tests': each prints the recording of its launches, and notes how it was called."""
    for name in ("all_reduce_perf", "alltoall_perf"):
        program = tmp_path / name
        texts = {graph: recorded(bool(graph)) for graph in (0, 1)}
        program.write_text(
            f'#!/bin/sh\necho "$0 $* $NCCL_GRAPH_REGISTER" >> {tmp_path}/calls\n'
            + "".join(
                f'case "$*" in *"-G {graph}"*) cat <<X\n{text}X\n;; esac\n' for graph, text in texts.items()
            )
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def test_all_three_measure_in_turn_and_the_table_ends_with_the_count(
    binaries: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ours(op: str, gpus: int, sizes: Any, hardware: str, env: dict[str, str]) -> list[SweepRow]:
        with (binaries / "calls").open("a") as file:
            file.write(f"ours {op} {gpus} {hardware} {env['NCCL_GRAPH_REGISTER']}\n")
        return measured(10.0, 40.0, True)

    monkeypatch.setattr(against, "ours", ours)
    monkeypatch.setattr(against.shutil, "which", lambda _: None)
    words = [
        "--binaries",
        str(binaries),
        "--ops",
        "all_reduce,all_to_all",
        "--gpus",
        "4",
        "--rounds",
        "2",
        "-n",
        "50",
    ]
    assert against.main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "nccl-tests: threads of one process, without MPI"
    assert out[1] == against.HEAD and len(out) == 2 + 6 + 3
    assert out[-1] == "6 of 6 within"
    calls = [line.removeprefix(f"{binaries}/") for line in (binaries / "calls").read_text().splitlines()]
    usual = "-t 4 -g 1 -b 8 -e 1G -f 2 -n 50 -w 5 -c 0"
    first = [
        f"all_reduce_perf {usual} -G 0 0",
        f"all_reduce_perf {usual} -G 10 0",
        "ours all_reduce 4 h100 0",
    ]
    assert calls[:6] == [*first, *first[::-1]]
    assert calls[6].startswith("alltoall_perf ")

    monkeypatch.setattr(against, "ours", lambda *_: measured(12.0, 40.0, True))
    assert against.main([*words, "--ops", "all_reduce"]) == 3
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "2 of 3 within; of the other 1, both sides' rounds overlap in 0"
    )


@pytest.mark.parametrize("named", [True, False])
def test_with_mpi_each_gpu_has_a_process(
    named: bool, binaries: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(against, "ours", lambda *_: measured(10.0, 40.0, True))
    starter = binaries / "bin" / "mpiexec"
    starter.parent.mkdir()
    starter.write_text(
        f'#!/bin/sh\necho "mpiexec $1 $2 $LD_LIBRARY_PATH" >> {binaries}/calls; shift 2; exec "$@"\n'
    )
    starter.chmod(starter.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(against.shutil, "which", lambda _: None if named else str(starter))
    words = [
        "--binaries",
        str(binaries),
        "--ops",
        "all_reduce",
        "--gpus",
        "4",
        *(["--mpi", str(binaries)] * named),
    ]
    assert against.main(words) == 0
    assert f"nccl-tests: a process for each GPU, by {binaries}" in capsys.readouterr().out
    first, second = (binaries / "calls").read_text().splitlines()[:2]
    assert first.startswith(f"mpiexec -n 4 {binaries}/lib")
    assert second.startswith(f"{binaries}/all_reduce_perf -t 1 -g 1 -b 8")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--binaries", ".", "--gpus", "2", "--mpi", "nowhere"], "--mpi=nowhere has no bin/mpiexec; name the folder"),
        (["--ops", "all_reduce"], "nothing to compare with; name nccl-tests' sources as --source"),
        (["--ops", "barrier"], "--ops=barrier has no program in nccl-tests; use some of all_reduce,"),
        (["--binaries", ".", "--gpus", "1"], "--gpus=1: a collective needs at least two GPUs"),
        (["--binaries", "nowhere", "--gpus", "2"], "all_reduce_perf is missing; name the folder with nccl-tests' programs"),
        (["--source", "nowhere", "--gpus", "2"], "--source=nowhere doesn't hold nccl-tests (src/common.cu is missing)"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_in_one_line(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("NCCL_TESTS", "NCCL_TESTS_SOURCE"):
        monkeypatch.delenv(name, raising=False)
    assert against.main(words) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_a_program_that_fails_says_its_last_words(binaries: Path) -> None:
    (binaries / "all_reduce_perf").write_text(
        "#!/bin/sh\necho 'no CUDA-capable device is detected'; exit 3\n"
    )
    with pytest.raises(
        against.UserError, match="failed with exit code 3: no CUDA-capable device is detected"
    ):
        against.theirs(against.Theirs(binaries, {}, None), "all_reduce", 2, [], False)


def test_a_program_that_does_not_end_is_said_in_one_line(
    binaries: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a traceback, after five minutes."""
    (binaries / "all_reduce_perf").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(against, "SECONDS", 0.2)
    monkeypatch.setattr(against.shutil, "which", lambda _: None)
    assert against.main(["--binaries", str(binaries), "--ops", "all_reduce", "--gpus", "2"]) == 2
    err = capsys.readouterr().err
    assert f"{binaries}/all_reduce_perf -t 2" in err and err.endswith("didn't end within 0.2 s\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("ranks", [1, 3])
def test_programs_that_measure_fewer_gpus_are_refused(ranks: int, tmp_path: Path) -> None:
    """Without MPI in them, each process that mpiexec starts measures itself alone: a copy on one GPU was compared."""
    program = tmp_path / "all_reduce_perf"
    program.write_text(f"#!/bin/sh\ncat <<X\n{recorded(False, ranks) * 2}X\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(
        against.UserError,
        match=f"all_reduce_perf measured {ranks} of 4 GPUs, .* without MPI; build them with MPI=1, or take mpiexec off",
    ):
        against.theirs(against.Theirs(tmp_path, {}, None), "all_reduce", 4, [], False)
    assert against.theirs(against.Theirs(tmp_path, {}, None), "all_reduce", ranks, [], False)


@pytest.mark.parametrize("before", [None, "/opt/lib"])
@pytest.mark.parametrize("mpi", [None, Path("/opt/mpi")])
def test_programs_are_built_with_the_mpi_that_starts_them(
    mpi: Path | None, before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And find its libraries, torch's NCCL among them, before others of the same names."""
    import torch

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "common.cu").write_text("")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("")
    typed: list[list[str]] = []

    def make(words: list[str], **_: Any) -> Any:
        typed.append(words)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(against.shutil, "which", lambda _: str(nvcc))
    monkeypatch.setattr(against.subprocess, "run", make)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(against, "nccl_home", lambda into: into)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    if before is not None:
        monkeypatch.setenv("LD_LIBRARY_PATH", before)
    binaries, env = against.build(tmp_path, tmp_path / "made", mpi)
    assert binaries == tmp_path / "made" / "build"
    (words,) = typed
    assert f"NCCL_HOME={tmp_path}/made/nccl" in words and f"CUDA_HOME={tmp_path}/cuda" in words
    assert "NVCC_GENCODE=-gencode=arch=compute_90,code=sm_90" in words
    assert [word for word in words if word.startswith("MPI")] == (
        ["MPI=1", "MPI_HOME=/opt/mpi"] if mpi else []
    )
    assert env["LD_LIBRARY_PATH"].split(":") == [
        f"{tmp_path}/made/nccl/lib", f"{tmp_path}/cuda/lib64", *(["/opt/mpi/lib"] if mpi else []),
        *([before] if before else []),
    ]  # fmt: skip


def test_the_build_links_the_nccl_that_torch_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "nvidia" / "nccl"
    (package / "include").mkdir(parents=True)
    (package / "lib").mkdir()
    (package / "include" / "nccl.h").write_text("")
    (package / "lib" / "libnccl.so.2").write_text("the library")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    home = against.nccl_home(tmp_path / "home")
    assert (home / "include" / "nccl.h").exists()
    assert {path.name: path.read_text() for path in (home / "lib").iterdir()} == {
        "libnccl.so": "the library", "libnccl.so.2": "the library",
    }  # fmt: skip
