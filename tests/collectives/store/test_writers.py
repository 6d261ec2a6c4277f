"""One writer of a measurement at a time, what is whole only when its files are, and files that are damaged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from collectives import cli
from collectives.store import stream
from collectives.store.lock import lock
from collectives.studies import journal
from collectives.studies.journal import Journal
from configs.compose import load
from configs.errors import UserError
from configs.paths import RunPaths
from configs.rank import RankContext
from tests.collectives.store.test_results import metadata, row, stored
from tests.collectives.store.test_resume import begun, run

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def rank_zero(folder: Path, attempt: int = 1) -> RankContext:
    return RankContext(0, 2, 0, 2, "127.0.0.1", 1, RunPaths(folder), attempt)


HOLD = (
    "import sys; from pathlib import Path; from collectives.store.results import ResultStore; "
    "file = ResultStore(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
)


def test_a_second_writer_is_refused_until_the_first_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both appended to one file, and ended each other's measurement."""
    monkeypatch.setattr(cli.LocalRanks, "start", lambda *_: pytest.fail("ranks were started"))
    store = begun(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout and other.stdout.readline() == "held\n"
        assert run(tmp_path) == 2
        err = capsys.readouterr().err
        assert re.fullmatch(
            rf"megaray: another command measures into {store.folder} now; wait for its end, .*\n", err
        )
        with pytest.raises(UserError, match="another command measures into"):
            Journal(rank_zero(tmp_path)).begin(metadata())
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        # Of a run's attempts the controller has ended the earlier one, whatever a host that nobody reaches still holds.
        assert len(Journal(rank_zero(tmp_path, attempt=2)).begin(metadata())) == 1
        other.kill()
        other.wait()
        store.lock().close()


def test_of_two_commands_that_begin_at_once_one_writes_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each found a folder without a measurement: the second one replaced the first one's configuration and logs."""
    typed = ["run", "--ranks", "2", "--out", str(tmp_path / "out"), "hardware=cpu"]
    codes: list[int] = []

    def start(*_: Any) -> None:
        """The ranks load torch now, and none has locked the rows."""
        assert not codes, "ranks were started twice"
        codes.append(cli.main([*typed, "collectives.seed=7"]))
        raise OSError("no ranks here")

    monkeypatch.setattr(cli.LocalRanks, "start", start)
    assert cli.main([*typed, "collectives.seed=5"]) == 2 and codes == [2]
    refusal, end = capsys.readouterr().err.splitlines()
    assert f"another command measures into {tmp_path / 'out' / 'measurement'} now" in refusal
    assert "no ranks here" in end
    assert load(tmp_path / "out" / "config.yaml").collectives.seed == 5
    codes.clear()  # the first one has ended, so that the folder is another's
    assert cli.main([*typed, "collectives.seed=6"]) == 2
    assert load(tmp_path / "out" / "config.yaml").collectives.seed == 6


def test_a_measurement_that_ended_while_the_folder_was_claimed_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(path: Path, folder: Path) -> BinaryIO:
        """Locked once another command has measured all."""
        begun(path.parent, ended="2026-01-01 00:01:00")
        path.write_text("theirs")
        return lock(path, folder)

    monkeypatch.setattr(cli, "lock", late)
    assert run(tmp_path) == 2
    assert "holds a finished measurement" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "theirs"


def test_a_file_system_without_locks_is_measured_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    stored(tmp_path, row()).lock().close()


def test_a_folder_that_no_rank_may_write_is_reported_by_rank_zero(tmp_path: Path) -> None:
    """Under torchrun its journal was opened before anybody looked, with a traceback."""
    (tmp_path / "file").write_text("")
    opened = Journal(rank_zero(tmp_path / "file" / "run"))
    with pytest.raises(OSError, match="Not a directory"):
        opened.begin(metadata())


def test_a_measurement_is_whole_when_its_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk left one that was marked as whole without its files, and refused to be continued."""
    whole = Journal(rank_zero(tmp_path))
    whole.begin(metadata())
    whole.row(row())
    written = stream.write_tables

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.stream, "write_tables", full)
    with pytest.raises(OSError, match="No space left"):
        whole.end()
    assert whole.store.read().ended is None
    monkeypatch.setattr(journal.stream, "write_tables", written)
    whole.end()
    tree = json.loads((whole.store.folder / "all_reduce.world.json").read_text())
    assert tree["end_time"] == whole.store.read().ended != None  # noqa: E711 (mypy doesn't narrow a chain)


def test_a_split_with_a_slash_has_a_file(tmp_path: Path) -> None:
    """`NCCL_TESTS_SPLIT=/2` measured everything, and then failed for want of a folder `all_reduce.`."""
    store = stored(tmp_path, row(group="/2"))
    assert [path.name for path in stream.write_tables(store, lambda: None)] == [
        "all_reduce.DIV2.json",
        "results.csv",
    ]


LESS: dict[str, Any] = {"software": {}, "method": {}, "started": ""}
METADATA = [
    "", "{", "[]", '{"system": {}}',
    json.dumps(LESS | {"system": {"hardware": "cpu"}, "settings": {"ranks": 2, "layout": {}}}),
    json.dumps(LESS | {"system": None, "settings": {"collectives": {}, "ranks": 2, "layout": {}}}),
    json.dumps(LESS | {"system": {"hardware": "cpu"}, "settings": []}),
]  # fmt: skip


@pytest.mark.parametrize("damage", METADATA)
def test_damaged_metadata_are_named(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = begun(tmp_path)
    store.metadata.write_text(damage)
    for command in (
        ["compare", str(tmp_path)],
        ["run", "--ranks", "2", "--out", str(tmp_path), "hardware=cpu"],
    ):
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert re.fullmatch(rf"megaray: {store.metadata} is damaged \(.*\n", err), err


@pytest.mark.parametrize(
    "damage",
    [
        "\0\0\0", "{}", "[1]", '{"op": "all_reduce", "in_place": 3, "out_of_place": null}',
        json.dumps(asdict(row(size=32)) | {"size": "32"}),
        json.dumps(asdict(row(size=32))).replace('"time_us": ', '"time_us": null, "x": '),
        json.dumps(asdict(row(size=32))).replace('"time_us": ', '"time_us": 0.0, "x": '),
    ],
)  # fmt: skip
def test_a_damaged_row_is_named(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = begun(tmp_path)
    with store.rows.open("a") as file:
        file.write(f"{damage}\n")
    store.append(row(size=16))
    for command in ("compare", "fit", "report"):
        assert cli.main([command, str(tmp_path)]) == 2
        err = capsys.readouterr().err
        assert re.fullmatch(rf"megaray: line 2 of {store.rows} is damaged \(.*\n", err), err
    with pytest.raises(UserError, match=f"line 2 of {store.rows} is damaged"):
        stream.write_tables(store, lambda: None)


@pytest.mark.parametrize("name", ["findings", "comparison", "probes", "moe"])
@pytest.mark.parametrize("damage", ["", '[{"kind', '{"a": 1}', '[{"kind": "unheard_of"}]'])
def test_damaged_outcomes_of_a_study_are_named(
    name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = begun(tmp_path)
    store.append(row(size=16))
    (store.folder / f"{name}.json").write_text(damage)
    for command in ("report", *(["compare"] if name == "findings" else [])):
        assert cli.main([command, str(tmp_path)]) == 2
        err = capsys.readouterr().err
        assert re.fullmatch(rf"megaray: {store.folder}/{name}.json is damaged \(.*\n", err), err


def test_a_measurement_of_an_earlier_version_is_read_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = begun(tmp_path)
    store.append(row(size=16))
    whole = json.loads(store.metadata.read_text())
    whole["system"] |= {"hardware": "cpu", "hosts": whole["system"].get("hosts", [])}
    older = {
        name: value
        for name, value in whole["settings"]["collectives"].items()
        if name not in ("study", "slow_ratio")
    }
    store.metadata.write_text(json.dumps(whole | {"settings": whole["settings"] | {"collectives": older}}))
    assert cli.main(["compare", str(tmp_path)]) in (0, 3), capsys.readouterr().err
    capsys.readouterr()
    for key in ("hardware", "hosts"):
        system = {name: value for name, value in whole["system"].items() if name != key}
        store.metadata.write_text(json.dumps(whole | {"system": system}))
        for command in ("compare", "fit"):
            assert cli.main([command, str(tmp_path)]) == 2
            assert f"metadata.json is damaged (its system has no {key}); put" in capsys.readouterr().err


def test_a_folder_in_a_files_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = begun(tmp_path)
    store.rows.unlink(missing_ok=True)
    store.rows.mkdir()
    for command in ("compare", "fit", "report"):
        assert cli.main([command, str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(f"megaray: {store.rows} can't be read or written (Is a dir")


def test_two_starts_of_one_moment_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both took the name of the second in which they began, and measured into one folder."""
    looked, taken = cli._unused_folder, list[Path]()

    def unused(folder: Path) -> Path:
        free = looked(folder)
        if not taken:
            taken.append(free)
            free.mkdir()  # by the other command, after this one looked
        return free

    monkeypatch.setattr(cli, "_unused_folder", unused)
    assert cli._make_new_folder(tmp_path / "collectives-1").name == "collectives-1_2"
    assert [path.name for path in taken] == ["collectives-1"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written .Not a directory.; name a folder with --out"):
        cli._make_new_folder(tmp_path / "file" / "collectives-1")


def test_logs_that_cannot_be_written_are_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement was continued in a folder that may only be read: a traceback."""

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system", "00000.log")

    monkeypatch.setattr(cli.LocalRanks, "start", refuse)
    assert cli.main(["run", "--ranks", "2", "--out", str(tmp_path), "hardware=cpu"]) == 2
    assert re.fullmatch(
        r"megaray: no ranks were started \(.*Read-only file system: '00000.log'\); name another .*\n",
        capsys.readouterr().err,
    )
