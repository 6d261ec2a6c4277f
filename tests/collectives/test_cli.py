"""`python -m collectives run`: wrong inputs, lost ranks, interruptions, and continuing after them."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from collectives import cli, commands, launch
from collectives.launch import LauncherEnvironment, detect_launcher
from collectives.store.results import ResultStore, SweepRow
from configs.compose import compose
from configs.errors import UserError

pytestmark = pytest.mark.timeout(120)

FEW = (
    "-w", "0", "-n", "5", "collectives.max_warmup=0", "collectives.max_iterations=5", "hardware=cpu",
    "resilience.timeouts.patience=6",
)  # fmt: skip


def one_line(text: str) -> str:
    """What is said of a mistake: one line, no traceback."""
    assert re.fullmatch(r"megaray: .+\n", text), text
    return text


# ---- mistakes that show before ranks are started ----


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--ops", "allreduce"), "--ops='allreduce' is not one of"),
        (("--ops", ""), "--ops= has no value"),
        (("--ops", "all_reduce", "-d", "float8"), "-d (datatype)='float8'"),
        (("-o", "mean"), "-o (op)='mean'"),
        (("-b", "1M", "-e", "1K"), "-e (maxbytes)=1024 is below -b (minbytes)=1048576"),
        (("-b", "lots"), "-b (minbytes)='lots'"),
        (("-b", "0"), "-b (minbytes)=0"),
        (("-f", "0"), "-f (stepfactor)=0"),
        (("-n", "0"), "-n (iters)=0"),
        (("-r", "-1"), "-r (root)=-1"),
        (("collectives.bakend=gloo",), "collectives.bakend"),
        (("collectives.backend=ucc",), "collectives.backend"),
        (("--rank", "2"), "'--rank' is not an option of `run` (did you mean '--ranks'?)"),
        (("--ranks", "1"), "--ranks=1: a collective needs at least two ranks; type at least --ranks 2"),
        (
            ("--ranks", "100000"),
            "--ranks=100000 is above 1024, the most that are started on one machine; start more",
        ),
        (("--ranks", "0"), "--ranks=0: a collective needs at least two ranks"),
        (("--ranks", "abc"), "--ranks: invalid int value: 'abc'; `python -m collectives run --help`"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    words: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["run", *words]) == 2
    out, err = capsys.readouterr()
    assert told in one_line(err)
    assert not out
    assert not list(tmp_path.iterdir())


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("judge", "sweep"), "'judge' is not a command; use one of run, fit, compare, report, device"),
        (("reprt", "sweep"), "'reprt' is not a command (did you mean 'report'?)"),
    ],
)
def test_a_misspelt_command_is_named(
    words: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(list(words)) == 2
    assert reason in one_line(capsys.readouterr().err)


@pytest.mark.unit
@pytest.mark.parametrize("name", ["", "a/b", "../h100", ".hidden", "two words", "é"])
def test_a_profile_has_a_name_by_which_it_is_found(name: str, tmp_path: Path) -> None:
    """Refused before anything is measured or fitted."""
    reason = re.escape(f"--name='{name}' can't name a profile; type letters")
    with pytest.raises(UserError, match=reason):
        commands.device(compose(["hardware=cpu"]), name, 1.0, None, print)
    with pytest.raises(UserError, match=reason):
        commands.fit(ResultStore(tmp_path), name, 0.95)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("hardware=h100",), "hardware=h100 needs a GPU"),
        (("hardware=cpu", "--seconds", "-1"), "--seconds=-1 must be above 0"),
        (("hardware=cpu", "--against", "nope"), "nope"),
        (("hardware=cpu",), "device.yaml: it is a folder; change to a folder"),
    ],
)
def test_a_device_that_cannot_be_measured_is_refused_first(
    words: tuple[str, ...],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line, not behind one that says how long it takes, nor after those minutes."""
    (tmp_path / ("device.yaml" if "a folder" in reason else "other")).mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["device", *words]) == 2
    assert reason in one_line(capsys.readouterr().err)


@pytest.mark.unit
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["run", "--ranks", "2", "--out", str(tmp_path / "file" / "run")]) == 2
    assert "can't be written (Not a directory); name another folder" in one_line(capsys.readouterr().err)


@pytest.mark.unit
def test_launchers_variables_become_torchruns() -> None:
    master = {"MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    slurm = batch | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}
    mpi = {f"OMPI_COMM_WORLD_{name}": value for name, value in
           (("RANK", "3"), ("SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2"))}  # fmt: skip
    mpich = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert [detect_launcher(env | master) for env in (slurm, mpi, mpich)] == [
        LauncherEnvironment(name, torchrun) for name in ("srun", "Open MPI", "MPICH")
    ]
    assert detect_launcher(torchrun | master) == LauncherEnvironment("", {})
    assert detect_launcher(torchrun | master | {"TORCHELASTIC_RUN_ID": "none"}) == LauncherEnvironment(
        "torchrun", {}
    )
    assert detect_launcher({}) is detect_launcher(slurm | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    # A batch script, which no srun started.
    assert detect_launcher(batch) is detect_launcher(batch | master) is None
    hands_on = [
        LauncherEnvironment(name, {}).keeps_codes for name in ("", "srun", "torchrun", "Open MPI", "MPICH")
    ]
    assert hands_on == [True, True, False, False, False]
    with pytest.raises(
        UserError, match="SLURM_PROCID=3 is set, MASTER_ADDR, MASTER_PORT not; export MASTER_ADDR="
    ):
        detect_launcher(slurm)


@pytest.mark.unit
def test_a_device_is_not_measured_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into a file, too: a line at the start, and one every ten seconds."""
    now = [100.0]

    def device(config: Any, name: Any, seconds: float, against: Any, progress: Any) -> tuple[str, bool]:
        for case in range(30):
            progress(f"case {case}")
            now[0] += 1.0
        return "the table", True

    monkeypatch.setattr("collectives.commands.device", device)
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    assert cli.main(["device", "hardware=cpu", "--seconds", "30"]) == 0
    out, err = capsys.readouterr()
    assert out == "the table\n"
    assert err.splitlines() == [
        "# measuring for about 30 s; Ctrl-C keeps what is measured so far", "# case 0", "# case 10", "# case 20",
    ]  # fmt: skip


# ---- mistakes that ranks find: every rank tells, as under torchrun ----

REFUSED = [
    (("-b", "10", "-i", "4"), "a size of 10 bytes is not whole elements of float (4 bytes each); set collectives.min_size"),
    (("collectives.groups=nodes",), "collectives.groups=nodes is not a kind of group (did you mean 'node'?); use world"),
    (("collectives.groups=MOD2",), "collectives.groups=MOD2 gives groups of one rank"),
    (("-o", "band"), "collectives.reductions=band takes whole numbers, not float; use int8"),
    (("-o", "avg", "-d", "int32"), "collectives.reductions=avg takes half, bfloat16, float or double, not int32; use sum"),
    (("--ops", "broadcast", "-r", "2"), "collectives.root=2 is not in a group of 2 ranks; set it from 0 to 1"),
    (("--ops", "all_gather", "-e", "16"), "no size from 8 to 16 bytes has 16 bytes for each rank; raise"),
    (("collectives.backend=mpi",), "collectives.backend=mpi isn't built into torch"),
    (("collectives.backend=nccl",), "collectives.backend=nccl"),
    (("parallel.tp=4",), "parallel.pp*dp*cp*tp=4, but 2 ranks were started; leave parallel.dp out, or"),
]  # fmt: skip


def refused(rank: Any, ports: list[int]) -> list[tuple[int, str]]:
    """Exit code and words of this rank, as launched by torchrun, for each mistake."""
    import torch.distributed as dist

    found = []
    for (words, _), port in zip(REFUSED, ports, strict=True):
        os.environ.update(rank.environment() | {"MASTER_PORT": str(port)})
        with contextlib.redirect_stderr(io.StringIO()) as told:
            code = cli.main(["run", *FEW, *words, "--out", str(rank.run.root)])
        found.append((code, told.getvalue()))
        if dist.is_initialized():
            dist.destroy_process_group()
    return found


@pytest.mark.dist
def test_ranks_refuse_what_cannot_be_measured(tmp_path: Path) -> None:
    from configs.rank import free_port
    from tests.collectives.ranks import together  # loads torch

    for found in together(2, tmp_path / "run", refused, [free_port() for _ in REFUSED]):
        for (code, err), (words, told) in zip(found, REFUSED, strict=True):
            assert (code, words) == (2, words), err
            assert told in one_line(err)
    assert not (tmp_path / "run" / "measurement").exists()


def measured_twice(rank: Any, folder: str, ports: list[int]) -> list[int]:
    """Exit codes of two measurements without --out, as torchrun starts them one after the other."""
    import torch.distributed as dist

    os.chdir(folder)
    codes = []
    for port in ports:
        os.environ.update(rank.environment() | {"MASTER_PORT": str(port)})
        del os.environ["MEGARAY_RUN"]
        with contextlib.redirect_stdout(io.StringIO()):
            codes.append(cli.main(["run", *FEW, "-b", "8", "-e", "8", "-J", "copy.json"]))
        dist.destroy_process_group()
    return codes


@pytest.mark.dist
def test_a_second_launch_without_a_folder_measures_into_one_of_its_own(tmp_path: Path) -> None:
    """It took the first one's for its own, measured nothing and returned 0."""
    from configs.rank import free_port
    from tests.collectives.ranks import together

    (tmp_path / "here").mkdir()
    ports = [free_port(), free_port()]
    codes = together(2, tmp_path / "unused", measured_twice, str(tmp_path / "here"), ports)
    assert codes == [[0, 0], [0, 0]]
    folders = sorted(path for path in (tmp_path / "here").iterdir() if path.is_dir())
    assert [[r.size for r in rows(folder)] for folder in folders] == [[8], [8]]
    whole = json.loads((tmp_path / "here" / "copy.json").read_text())
    assert [r["size"] for r in whole["results"]] == [8]


# ---- real commands ----


def command(out: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    env = (
        {name: value for name, value in os.environ.items() if name != "RANK"}
        | {"OMP_NUM_THREADS": "1"}
        | more
    )
    return subprocess.Popen(
        [sys.executable, "-m", "collectives", "run", "--ranks", "2", "--out", str(out), "hardware=cpu", *words],
        env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A terminal's foreground job heeds Ctrl-C, also where this test runs in a shell's background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def result(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def rows(out: Path) -> list[SweepRow]:
    return ResultStore(out / "measurement").finished()


def pids(out: Path) -> list[int]:
    devices = json.loads((out / "measurement" / "metadata.json").read_text())["system"]["devices"]
    return [device["pid"] for device in devices]


def living_ranks(process: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    return (
        child for child in psutil.Process(process.pid).children() if child.status() != psutil.STATUS_ZOMBIE
    )


def wait_for_rows(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Until so many rows are finished, or the command has ended."""
    file = ResultStore(out / "measurement").rows
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= count):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


@pytest.mark.dist
def test_a_mistake_that_ranks_find_is_told_once(tmp_path: Path) -> None:
    code, out, err = result(command(tmp_path / "run", "-b", "10", "-i", "4"))
    assert (code, out) == (2, ""), err
    assert "a size of 10 bytes is not whole elements of float" in one_line(err)


@pytest.mark.dist
def test_a_batch_script_starts_its_ranks_and_nothing_measured_is_a_failure(tmp_path: Path) -> None:
    """Inside sbatch there are a rank and tasks without srun; a size that doesn't fit leaves nothing to call done."""
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    words = ("--ops", "all_gather", "-b", "1T", "-e", "1T", *FEW)
    code, out, err = result(command(tmp_path / "run", *words, **batch, **master))
    assert code == 1
    assert "larger sizes are left out" in out
    assert one_line(err).startswith("megaray: nothing was measured: out of memory, rank 0: ")
    assert "kept" not in err


@pytest.mark.dist
def test_a_size_that_does_not_fit_ends_its_operation_alone(tmp_path: Path) -> None:
    words = ("-b", "8", "-e", "8T", "-f", "1048576", "--ops", "all_reduce,broadcast", *FEW)
    code, out, err = result(command(tmp_path / "run", *words))
    assert (code, err) == (0, "")
    told = [line for line in out.splitlines() if "out of memory" in line]
    assert len(told) == 2
    assert re.match(
        r"# 8796093022208 B float sum: out of memory, rank 0: 1.64e\+04 GiB of buffers, .* left out", told[0]
    )
    found = rows(tmp_path / "run")
    assert [(row.op, row.size, len(row.timings)) for row in found] == [
        (op, size, 0 if size == 8 << 40 else 2)
        for op in ("all_reduce", "broadcast")
        for size in (8, 8 << 20, 8 << 40)
    ]
    tree = json.loads((tmp_path / "run" / "measurement" / "all_reduce.world.json").read_text())
    assert [r["size"] for r in tree["results"]] == [8, 8 << 20]
    assert tree["errors"] == [found[2].note]


@pytest.mark.unit
@pytest.mark.parametrize("filename", ["out/results.csv", None])
def test_a_full_disk_is_one_line_and_hides_not_why_ranks_ended(
    filename: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", filename)

    monkeypatch.setattr(commands, "open_measurement", full)
    assert cli.main(["report", str(tmp_path)]) == 1
    told = one_line(capsys.readouterr().err)
    assert (filename or "a file of the measurement") in told and "No space left on device" in told
    assert launch.DISK_ADVICE in told
    store = mock.Mock(folder=tmp_path)
    store.finished.return_value = [mock.Mock(timings=[1])] * 3
    monkeypatch.setattr(cli.stream, "write_tables", full)
    assert cli._write_finished_rows(store) == (
        f"3 rows are kept in {tmp_path}, without tables (No space left on device), and the same command with this --out "
        "continues after them"
    )


@pytest.mark.dist
def test_a_killed_rank_and_an_interruption_lose_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("-b", "1K", "-e", "16K", "-i", "1K", "-w", "0", "-n", "120", "collectives.max_warmup=0",
             "collectives.max_iterations=120", "resilience.timeouts.patience=6")  # fmt: skip

    process = command(out, *words)
    wait_for_rows(process, out, 2)
    os.kill(pids(out)[1], signal.SIGKILL)
    code, _, err = result(process)
    after_kill = rows(out)
    assert code == 1
    assert one_line(err).startswith(
        f"megaray: rank 1 was ended by SIGKILL; {len(after_kill)} rows are kept in {out}/measurement"
    )
    assert err.endswith("the same command with this --out continues after them\n")
    assert 2 <= len(after_kill) < 16
    assert len(json.loads((out / "measurement" / "all_reduce.world.json").read_text())["results"]) == len(
        after_kill
    )

    process = command(out, *words)
    wait_for_rows(process, out, len(after_kill) + 2)
    ranks = list(living_ranks(process))
    os.kill(process.pid, signal.SIGINT)
    code, _, err = result(process)
    after_interrupt = rows(out)
    assert code == 130
    assert one_line(err).startswith(
        f"megaray: interrupted; {len(after_interrupt)} rows are kept in {out}/measurement"
    )
    assert len(ranks) == 2
    assert not any(rank.is_running() for rank in ranks)
    assert after_interrupt[: len(after_kill)] == after_kill
    assert len(after_kill) + 2 <= len(after_interrupt) < 16

    code, told, err = result(command(out, *words, "-d", "double"))
    assert (code, told) == (2, "")
    assert (
        "holds another measurement (collectives.dtypes=['float']); name another folder with --out"
        in one_line(err)
    )
    assert rows(out) == after_interrupt

    code, told, err = result(command(out, *words))
    assert (code, err) == (0, "")
    assert f"# {len(after_interrupt)} rows are already measured; the sweep continues after them" in told
    whole = rows(out)
    assert whole[: len(after_interrupt)] == after_interrupt
    assert [row.size for row in whole] == [1024 * i for i in range(1, 17)]
    assert all(timing.wrong == 0 for row in whole for timing in row.timings)

    assert ResultStore(out / "measurement").read().ended
    code, told, err = result(command(out, *words))
    assert (code, told) == (2, "")
    assert f"--out={out} holds a finished measurement; name another folder, or remove it" in one_line(err)
    assert rows(out) == whole


def one_collective(tmp_path: Path) -> tuple[Path, list[str]]:
    sizes = [f"collectives.{name}" for name in ("min_size=1K", "max_size=64K", "step_size=1K")]
    return tmp_path / "out", ["collectives.ops=all_reduce", *sizes, "collectives.min_iterations=50"]


@pytest.mark.dist
@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_a_signal_ends_says_what_is_kept_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    out, words = one_collective(tmp_path)
    (tmp_path / "tmp").mkdir()
    process = command(out, *words, TMPDIR=str(tmp_path / "tmp"))
    wait_for_rows(process, out, 2)
    ranks = list(living_ranks(process))
    os.kill(process.pid, number)
    code, _, err = result(process)
    assert code == 128 + number
    assert one_line(err).startswith(
        f"megaray: ended by {number.name}; {len(rows(out))} rows are kept in {out}/measurement"
    )
    assert (out / "measurement" / "results.csv").exists()
    assert len(ranks) == 2 and not any(rank.is_running() for rank in ranks)
    assert not list((tmp_path / "tmp").glob("*.yaml"))


@pytest.mark.dist
@pytest.mark.timeout(120)
@pytest.mark.parametrize("count", [0, 2])
def test_a_reader_of_the_table_that_ends_is_named_and_the_rows_are_kept(tmp_path: Path, count: int) -> None:
    """With its first line it blamed the folder, and later a rank's log."""
    out, words = one_collective(tmp_path)
    process = command(out, *words)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    wait_for_rows(process, out, count)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert one_line(err).startswith(
        "megaray: whoever read the output has ended, as `| head` does; send it to a file"
    )
    assert len(rows(out)) >= count and ("kept in" in err) == bool(rows(out))


@pytest.mark.unit
def test_an_empty_name_of_a_folder_is_not_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--ranks", "2", "--out", "", "hardware=cpu"]) == 2
    assert "argument --out: '' is not a name; type one, or . for the current folder" in one_line(
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
