"""Going on in a folder: only with the same cases, method, software and machines; and readers that change nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from collectives import cli, commands
from collectives.analysis.judge import BandwidthFinding, FindingKind
from collectives.store.results import Metadata, ResultStore
from collectives.store.resume import difference, settings_of
from configs import profile as profiles
from configs.compose import compose, dump, load
from configs.errors import UserError
from tests.collectives.store.test_results import row

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

USUAL = compose(["workload=collectives", "hardware=cpu"])


def about(**changes: Any) -> Metadata:
    """Metadata of a measurement on two hosts, with some of it changed: `section__name=value`."""
    host = {"hostname": "a", "address": "10.0.0.1", "machine": "x", "device_info": "H100", "ranks": [0, 1]}
    tree: dict[str, dict[str, Any]] = {
        "system": {
            "hosts": [host, host | {"hostname": "b", "ranks": [2, 3]}], "devices": [], "hardware": "cpu",
        },
        "software": {
            "torch": "2.11", "python": "3.12.1", "cuda": "13.0", "hip": None, "backend": "nccl", "nccl_version": "2.28.9",
            "nccl_version_code": 22809, "environment": {"NCCL_ALGO": "Ring"},
        },
        "settings": {
            "collectives": settings_of(USUAL.collectives), "network": {"name": "none"}, "ranks": 4, "layout": {"dp": 4},
            "arguments": [],
        },
    }  # fmt: skip
    for place, value in changes.items():
        section, _, name = place.partition("__")
        tree[section][name] = value
    return Metadata(**tree, method={}, started="2026-01-01 00:00:00")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"settings__arguments": ["run"]}, ""),
        ({"settings__collectives": settings_of(USUAL.collectives) | {"seed": 7}}, "collectives.seed=1"),
        ({"settings__ranks": 8}, "ranks=4"),
        ({"settings__layout": {"dp": 2, "tp": 2}}, "layout={'dp': 4}"),
        ({"settings__network": {"name": "infiniband"}}, "network={'name': 'none'}"),
        ({"software__backend": "gloo"}, "backend nccl, now gloo"),
        ({"software__torch": "2.13"}, "torch 2.11, now 2.13"),
        ({"software__nccl_version": "2.29.1"}, "nccl_version 2.28.9, now 2.29.1"),
        ({"software__environment": {}}, "NCCL_ALGO=Ring in the environment, now unset"),
        (
            {"software__environment": {"NCCL_ALGO": "Ring", "NCCL_NVLS_ENABLE": "0"}},
            "NCCL_NVLS_ENABLE=unset in the environment, now 0",
        ),
        ({"system__hardware": "h100"}, "hardware=cpu"),
        (
            {"system__hosts": [{"hostname": "a", "device_info": "H100", "ranks": [0, 1]},
                               {"hostname": "c", "device_info": "H100", "ranks": [2, 3]}]},
            "on a (H100, ranks 0 to 1), b (H100, ranks 2 to 3), now a (H100, ranks 0 to 1), c (H100, ranks 2 to 3)",
        ),
        (
            {"system__hosts": [{"hostname": "a", "device_info": "H200", "ranks": [0, 1]},
                               {"hostname": "b", "device_info": "H100", "ranks": [2, 3]}]},
            "on a (H100, ranks 0 to 1), b (H100, ranks 2 to 3), now a (H200, ranks 0 to 1), b (H100, ranks 2 to 3)",
        ),
    ],
)  # fmt: skip
def test_what_differs_is_named(changes: dict[str, Any], told: str) -> None:
    assert difference(about(), about(**changes)) == told


def test_a_field_that_is_newer_than_the_measurement_has_its_default_there() -> None:
    old = about()
    older = {name: value for name, value in old.settings["collectives"].items() if name != "average"}
    assert difference(about(settings__collectives=older), old) == ""
    now = settings_of(USUAL.collectives) | {"average": "max"}
    assert (
        difference(about(settings__collectives=older), about(settings__collectives=now))
        == "collectives.average=mean"
    )


# ---- the program's side ----


def begun(tmp_path: Path, ended: str | None = None, **changes: Any) -> ResultStore:
    store = ResultStore(tmp_path / "measurement")
    store.begin(about(**changes))
    store.append(row())
    if ended:
        store.end(ended)
    return store


def make_way(store: ResultStore, attempt: int, **changes: Any) -> None:
    from collectives.studies.program import _prepare_folder  # loads torch

    _prepare_folder(cast(Any, SimpleNamespace(store=store)), about(**changes), attempt)


def test_another_measurement_and_a_finished_one_are_refused(tmp_path: Path) -> None:
    store = begun(tmp_path)
    make_way(store, 1)
    with pytest.raises(
        UserError, match=r"holds another measurement \(torch 2.11, now 2.13\); name another folder"
    ):
        make_way(store, 1, software__torch="2.13")
    store.end("2026-01-02")
    with pytest.raises(UserError, match="holds a finished measurement; name another folder with --out"):
        make_way(store, 1)
    assert len(store.finished()) == 1


def test_a_later_attempt_on_other_hosts_measures_anew_and_keeps_the_earlier_rows_aside(
    tmp_path: Path,
) -> None:
    store = begun(tmp_path)
    make_way(store, 2)
    assert store.metadata.exists()
    make_way(store, 2, system__hardware="h100")
    assert not store.metadata.exists()
    assert len(ResultStore(tmp_path / "measurement-before-attempt-2").finished()) == 1


# ---- the command's side: refused before anything is written ----


def run(out: Path, *words: str) -> int:
    return cli.main(["run", "--ranks", "4", "--out", str(out), "hardware=cpu", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--ops", "all_gather"), "holds another measurement (collectives.ops=['all_reduce'])"),
        (("--ranks", "2"), "holds another measurement (ranks=4)"),
    ],
)
def test_a_refused_command_writes_nothing(
    words: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(tmp_path)
    (tmp_path / "config.yaml").write_text("as it was")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(tmp_path, *words) == 2
    err = capsys.readouterr().err
    assert told in err and "kept" not in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_flags_beside_a_configuration_file_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were dropped without a word."""
    file = tmp_path / "config.yaml"
    file.write_text(
        dump(
            compose(["workload=collectives", "hardware=cpu", "collectives.seed=9", "collectives.max_size=1K"])
        )
    )
    seen: list[Any] = []
    monkeypatch.setattr(cli, "_run_locally", lambda config, ranks, folder: seen.append((config, ranks)) or 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    assert (
        cli.main(
            ["run", "--config", str(file), "-e", "2M", "--ops", "broadcast", "collectives.root=1", "-g", "3"]
        )
        == 0
    )
    (config, ranks), settings = seen[0], seen[0][0].collectives
    assert (settings.seed, settings.max_size, settings.ops, settings.root, ranks) == (
        9,
        2 << 20,
        ("broadcast",),
        1,
        3,
    )
    assert config.hardware.name == "cpu"
    assert cli.main(["run", "--config", str(file)]) == 0
    assert seen[1][0] == load(file)


# ---- exit codes ----

FOUND = BandwidthFinding(FindingKind.WRONG_DATA, "3 elements are wrong", evidence={"wrong": 3})


@pytest.mark.parametrize(("launcher", "code"), [({}, 3), ({"TORCHELASTIC_RUN_ID": "none"}, 0)])
def test_torchrun_gets_no_exit_code_that_it_takes_for_a_crash(
    launcher: dict[str, str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    env = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    for name, value in (env | launcher | {"MEGARAY_RUN": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("collectives.studies.program.main", lambda *_, **__: [FOUND])
    assert cli.main(["run", "--out", str(tmp_path), "hardware=cpu"]) == code
    out = capsys.readouterr().out
    assert (
        f"# 1 findings; `python -m collectives compare {tmp_path}` prints them, with exit code 3" in out
    ) == (not code)


def test_compare_gives_what_a_measurement_found_itself_and_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = settings_of(USUAL.collectives) | {"study": "faults"}
    store = begun(tmp_path, settings__collectives=study)
    store.write_json("findings", [FOUND.to_json()])
    assert cli.main(["compare", str(tmp_path)]) == 3
    assert capsys.readouterr().out == f"{FOUND}\n"
    store.write_json("findings", [])
    assert cli.main(["compare", str(tmp_path)]) == 0


# ---- readers ----


def test_a_reader_leaves_a_line_that_is_being_written_alone(tmp_path: Path) -> None:
    store = begun(tmp_path)
    whole = json.dumps(asdict(row(size=16))) + "\n"
    with store.rows.open("a") as file:
        file.write(whole[:100])
    assert [r.size for r in ResultStore(store.folder).finished()] == [1 << 20]
    with store.rows.open("a") as file:
        file.write(whole[100:])
    assert [r.size for r in store.finished()] == [1 << 20, 16]


@pytest.mark.parametrize("chunk", [8, 1 << 20])
@pytest.mark.parametrize("torn", ["{", '{"op": "all_reduce", "group": "wor' * 20])
def test_the_writer_cuts_off_what_a_killed_one_left(
    torn: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collectives.store.results._CHUNK", chunk)
    store = begun(tmp_path)
    with store.rows.open("a") as file:
        file.write(torn)
    ResultStore(store.folder).append(row(size=16))
    assert [r.size for r in store.finished()] == [1 << 20, 16]
    store.rows.write_text(torn)
    store.append(row(size=8))
    assert [r.size for r in store.finished()] == [8]


def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As a folder of somebody else: its files are there, and none can be written."""

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise (
            PermissionError(13, "Permission denied", str(path))
            if path.is_relative_to(folder)
            else AssertionError(path)
        )

    monkeypatch.setattr("collectives.store.results.write_whole", refuse)
    monkeypatch.setattr("collectives.report.write.write", lambda store, **_: refuse(store.folder))
    monkeypatch.setattr(profiles, "save", lambda _, path: refuse(path))


def test_what_may_only_be_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = begun(tmp_path)
    for size in (1 << e for e in range(3, 20)):
        store.append(row(size=size))
    read_only(monkeypatch, tmp_path)
    assert cli.main(["compare", str(tmp_path)]) in (0, 3)
    assert "not kept for `report`" in capsys.readouterr().err
    text = commands.fit(store, None, 0.95)
    assert (
        f"# not kept: {store.folder}/fabric.yaml can't be written (Permission denied); --name keeps it"
        in text
    )
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "copy the measurement to a folder that you may write" in capsys.readouterr().err
