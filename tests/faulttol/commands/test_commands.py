"""`python -m faulttol`: what each command finds, does and refuses, on checkpoints that really were saved."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from configs.errors import USER_ERROR_EXIT, UserError
from faulttol import cli
from faulttol.checkpoint import retention
from faulttol.checkpoint.folder import folder_of
from faulttol.checkpoint.hashes import CheckpointSource
from faulttol.checkpoint.manifest import Tensor
from faulttol.checkpoint.store import CheckpointStore
from faulttol.commands import locations, verify
from faulttol.commands.terminal import ByteProgress, size, table
from tests.faulttol.ranks import save_all
from tests.source_tree import ROOT

torch = pytest.importorskip("torch")
from tests.faulttol.commands.commanded import Ask, damage_two, files, flip, newest  # noqa: E402

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]


# ---- what is meant by PATH ----


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with two runs; the second keeps its checkpoints elsewhere."""
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path / "home"))
    for name, path in (("tiny-1", None), ("tiny-2", str(tmp_path / "elsewhere"))):
        run = tmp_path / "home" / "runs" / name
        (run / "checkpoints").mkdir(parents=True)
        (run / "events.jsonl").touch()
        section = {"path": path, "keep": 3, "keep_every": 100}
        (run / "config.yaml").write_text(yaml.safe_dump({"checkpoint": section}))
    return tmp_path / "home"


def test_a_run_is_named_by_its_id_its_folder_or_its_checkpoints(home: Path) -> None:
    run = home / "runs" / "tiny-1"
    for typed in ("tiny-1", run, f"{run}/", run / "checkpoints", f"{run}/checkpoints/step-0000000040"):
        place = locations.find(str(typed))
        assert (place.root, place.run and place.run.root) == (str(run / "checkpoints"), run), typed
        assert place.step == (40 if "step" in str(typed) else None)
        assert place.checkpoint_config()["keep"] == 3
    assert locations.find("tiny-2").root == str(home.parent / "elsewhere")
    (home / "runs" / "tiny-2" / "config-r01.yaml").write_text("checkpoint: {path: /moved, keep: 5}\n")
    assert locations.find("tiny-2").root == "/moved"  # as the newest resume has it
    assert locations.find("tiny-2").checkpoint_config()["keep"] == 5
    assert locations.find("tiny-1", 7, 2).step == 7 and locations.find("tiny-1", 7, 2).attempt == 2


def test_a_run_under_torchrun_has_no_event_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path))
    checkpoints = tmp_path / "runs" / "torchrun-1234" / "checkpoints"
    checkpoints.mkdir(parents=True)
    assert locations.find("torchrun-1234").root == str(checkpoints)


def test_a_folder_or_url_needs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    assert locations.find(str(tmp_path / "x")) == locations.CheckpointLocation(
        str(tmp_path / "x"), str(tmp_path / "x")
    )
    assert locations.find("s3://bucket/run/").root == "s3://bucket/run"
    found = locations.find("s3://bucket/run/step-0000000003")
    assert (found.root, found.step, found.checkpoint_config()) == ("s3://bucket/run", 3, {})
    monkeypatch.chdir(tmp_path / "x")
    assert Path(locations.find("step-0000000003").root).resolve() == tmp_path / "x"


def test_a_path_that_names_nothing_is_refused(home: Path, tmp_path: Path, ask: Ask) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for typed, why in (
        ("tiny", "ambiguous"),
        ("tinny-1", "did you mean 'tiny-1'"),
        (tmp_path / "nothing", "neither a folder nor a run"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "empty", "no checkpoint is committed"),
        ("nope://x", "PATH='nope://x' can't be used"),
    ):
        code, out, err = ask("inspect", typed)
        assert (code, out, err.count("\n")) == (USER_ERROR_EXIT, "", 1) and why in err, err


def test_a_step_that_is_not_there_is_told_with_those_that_are(root: Path, ask: Ask) -> None:
    for words in (("--step", 30), ("--attempt", 2)):
        code, _, err = ask("verify", root, *words)
        assert code == USER_ERROR_EXIT and "there are 10 (attempt 1), 20 (attempt 1)" in err
    code, _, err = ask("verify", root / folder_of(10), "--step", 20)
    assert code == USER_ERROR_EXIT and "isn't the step of" in err


# ---- inspect ----


def test_inspect_tells_steps_tensors_and_facts(root: Path, ask: Ask) -> None:
    retention.pin(CheckpointStore(str(root)), 10, "best")
    (root / folder_of(30)).mkdir()
    (root / folder_of(30) / "run-1.a0002.r00000.1234abcd.safetensors").touch()
    code, out, _ = ask("inspect", root, "--tensors", "*experts*")
    assert code == 0
    assert re.search(r"10 +1 +run-1 +2 files +[\d.]+ MiB +dp=2 ep=2 +pinned as best", out), out
    assert re.search(r"20 +1 +run-1 +3 files", out) and "step 30 of attempt 2" in out
    assert "world  " in out and re.search(r"blocks.1.feed.experts.up/exp_avg +float32", out)
    assert "embedding" not in out
    data = json.loads(ask("inspect", root / folder_of(10), "--json")[1])
    assert [c["step"] for c in data["checkpoints"]] == [10, 20] and data["step"] == 10
    assert data["facts"] == {"world": 2} and data["interrupted"] == [
        {"attempt": 2, "step": 30, "run": "run-1"}
    ]
    assert data["tensors"]["embedding"] == {
        "dtype": "bfloat16", "shape": [700, 999], "elements": 699300, "bytes": 1398600, "files": 2,
    }  # fmt: skip
    assert sum(t["bytes"] for t in data["tensors"].values()) <= data["checkpoints"][0]["bytes"]


def test_inspect_tells_the_retention_of_a_run(root: Path, home: Path, ask: Ask) -> None:
    shutil.copytree(root, home / "runs" / "tiny-1" / "checkpoints", dirs_exist_ok=True)
    (home / "runs" / "tiny-1" / "config.yaml").write_text("checkpoint: {keep: 1, keep_every: 7}\n")
    _, out, _ = ask("inspect", "tiny-1")
    assert "retention: the last 1 and every 7th step" in out
    assert re.search(r"10 .*goes next", out) and re.search(r"20 .*by retention", out)


def test_inspect_shows_what_a_command_would_refuse(root: Path, ask: Ask) -> None:
    """Checkpoints of another run, of format 1, and one whose manifest is damaged."""
    save_all(root.parent / "other", 5, run="run-2")
    shutil.copytree(root.parent / "other", root, dirs_exist_ok=True)
    (root / folder_of(5) / "manifest.json").touch()
    flip(next((root / folder_of(20)).glob("*.manifest.json")), 40)
    code, out, _ = ask("inspect", root, "--step", 10)
    assert code == 0 and re.search(r"5 +1 +run-2", out) and "format 1, which isn't read any more: 5" in out
    assert re.search(r"20 .*its manifest", out)
    code, _, err = ask("inspect", root, "--step", 20)
    assert code == 1 and "its manifest" in err
    code, _, err = ask("verify", root)
    assert code == USER_ERROR_EXIT and "format 1" in err
    (root / folder_of(5) / "manifest.json").unlink()
    code, _, err = ask("verify", root)
    assert code == USER_ERROR_EXIT and "several runs" in err


# ---- verify ----


def test_verify_reads_everything(root: Path, ask: Ask) -> None:
    before = files(root)
    code, out, _ = ask("verify", root)
    assert code == 0 and "step 20" in out and "whole" in out and "GB/s" in out
    assert "1 of 2 checkpoints was looked at" in out
    data = json.loads(ask("verify", root, "--all", "--json")[1])
    assert [(one["step"], one["whole"], one["files"]) for one in data] == [(10, True, 2), (20, True, 3)]
    assert all(one["read"] > one["bytes"] * 0.9 and not one["damage"] for one in data)
    assert files(root) == before
    estimate = json.loads(ask("verify", root, "--dry-run", "--json")[1])
    assert estimate["bytes_read"] == data[1]["bytes"] and estimate["bytes_written"] == 0


def _two_bits(root: Path) -> list[str]:
    damage_two(root)
    return ["r00000", "r00001", r"differs from what was saved in \S+\[\d+:\d+, .*bytes \d+ to \d+"]


def _index(root: Path) -> list[str]:
    (path,) = (root / folder_of(20)).glob("*.r00001.*")
    flip(path, path.stat().st_size - 3)
    return ["r00001.*its index differs"]


def _header(root: Path) -> list[str]:
    (path,) = (root / folder_of(20)).glob("*.r00002.*")
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"embedding[', b'"embeddinh[', 1))
    return ["r00002.*the header tells embeddin"]


def _header_length(root: Path) -> list[str]:
    (path,) = (root / folder_of(20)).glob("*.r00002.*")
    flip(path, 1)
    return ["r00002.*the header is unreadable"]


def _appended(root: Path) -> list[str]:
    (path,) = (root / folder_of(20)).glob("*.r00000.*")
    path.write_bytes(path.read_bytes() + b"x")
    return ["r00000.*has more than the"]


def _truncated(root: Path) -> list[str]:
    (path,) = (root / folder_of(20)).glob("*.r00000.*")
    path.write_bytes(path.read_bytes()[:-7])
    return ["r00000.*is truncated"]


def _missing(root: Path) -> list[str]:
    next((root / folder_of(20)).glob("*.r00001.*")).unlink()
    return ["r00001.*is missing"]


def _mixed(root: Path) -> list[str]:
    """Rank 0's file of step 10, under the name of step 20's."""
    (here,), (there,) = ((root / folder_of(step)).glob("*.r00000.*") for step in (20, 10))
    data = there.read_bytes()
    here.write_bytes(data[:-1000] + data[-1000:] + bytes(max(0, here.stat().st_size - len(data))))
    return ["r00000"]


def _manifest(root: Path) -> list[str]:
    flip(next((root / folder_of(20)).glob("*.manifest.json")), 50)
    return ["manifest.json"]


def _directory(root: Path) -> list[str]:
    flip(next((root / folder_of(20)).glob("*.jsonl")), 50)
    return [r"directory.*jsonl differs"]


DAMAGE = [
    _two_bits, _index, _header, _header_length, _appended, _truncated, _missing, _mixed, _manifest, _directory,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_verify_names_damage(root: Path, ask: Ask, damage: Callable[[Path], list[str]]) -> None:
    told = damage(root)
    code, out, _ = ask("verify", root)
    assert code == 1 and "is damaged" in out
    for pattern in told:
        assert re.search(pattern, out), out
    code, out, _ = ask("verify", root, "--all", "--json")
    assert code == 1 and [one["whole"] for one in json.loads(out)] == [True, False]


def test_verify_wants_every_element_once(root: Path) -> None:
    """Directory and files must agree of tensors: an index that lacks, doubles or renames a piece doesn't."""
    source = CheckpointSource(*newest(root))
    pieces = [piece for rank in range(3) for piece in source.file(rank)]
    tensors = source.tensors
    assert not list(verify.coverage(tensors, pieces))
    lost = next(p for p in pieces if p.entry.name == "embedding")
    (text,) = verify.coverage(tensors, [p for p in pieces if p is not lost])
    assert text.startswith("embedding[0:") and "no source" in text
    (text,) = verify.coverage(tensors, [*pieces, lost])
    assert text.startswith("embedding[0:") and "two sources" in text
    other = {**tensors, "embedding": Tensor("float16", (700, 999), ((0, 2),))}
    assert "bfloat16[700, 999], and float16[700, 999]" in next(verify.coverage(other, pieces))
    del other["embedding"]
    (text,) = verify.coverage(other, pieces)
    assert "has embedding, which isn't in the manifest" in text
    (text,) = verify.coverage({**tensors, "ghost": Tensor("bool", (2,), ((0, 0),))}, pieces)
    assert text.startswith("ghost[0:2]") and "no source" in text


# ---- the command line ----


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("inspekt x", "'inspekt' is not a command (did you mean 'inspect'?)"),
        ("", "the following arguments are required: COMMAND"),
        ("verify", "the following arguments are required: PATH"),
        ("verify x --al", "'--al' is not an option of `verify` (did you mean '--all'?)"),
        ("verify x y", "`verify` doesn't take the word 'y'"),
        ("verify x --step two", "'two' is not a whole number"),
        ("export x --out y --shard-size 5X", "'5X' is not a number of bytes"),
        ("import x --out y", "the following arguments are required: --from"),
        ("grow x --out y", "the following arguments are required: --layers"),
        ("diff x", "the following arguments are required: SECOND"),
        ("bench load", "argument bench: invalid choice: 'load'"),
        ("bench save --ranks 3", "argument --ranks: invalid choice: 3"),
    ],
)
def test_a_wrong_word_is_told_in_one_line(ask: Ask, words: str, why: str) -> None:
    code, out, err = ask(*words.split())
    assert (code, out, err.count("\n")) == (USER_ERROR_EXIT, "", 1) and why in err, err


@pytest.mark.parametrize("words", [("inspect",), ("verify",), ("prune", "--yes"), ("export", "--out", "y")])
def test_an_empty_path_is_not_the_folder_that_one_stands_in(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """`prune "$RUN"` in a shell without RUN."""
    save_all(tmp_path, 7)
    monkeypatch.chdir(tmp_path)
    code, out, err = ask(words[0], "", *words[1:])
    assert (code, out, err.count("\n")) == (
        USER_ERROR_EXIT,
        "",
        1,
    ) and "PATH is empty; name a run's id" in err


def test_sizes_are_typed_with_units() -> None:
    def typed(text: str) -> int:
        return int(cli.parse(["export", "x", "--out", "y", f"--shard-size={text}"]).shard_size)

    assert [typed(t) for t in ("7", "2K", "3kb", "4MiB", "5G")] == [7, 2048, 3072, 4 << 20, 5 << 30]
    assert cli.parse(["export", "x", "--out", "y"]).shard_size == 5 << 30


def test_looking_and_removing_start_without_torch(root: Path) -> None:
    script = (
        "import contextlib, sys\n"
        "from faulttol.cli import main\n"
        f"root = {str(root)!r}\n"
        "for words in (['inspect', root], ['verify', root], ['diff', root, root + '/step-0000000010'],\n"
        "              ['reshard', root, '--out', root + 'x', '--files', '2'], ['prune', root, '--keep', '1'],\n"
        "              ['--help']):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        assert main(words) == 0, words\n"
        "found = {'torch', 'ray', 'deepspeed', 'pydantic', 'hydra'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_program_is_the_command_line(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "faulttol", "verify", str(root), "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "" and json.loads(done.stdout)["whole"]


def test_a_bar_is_drawn_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "100")
    clock = iter(range(100))
    screen, plain = Terminal(), io.StringIO()
    with (
        ByteProgress(screen, "verify", lambda: float(next(clock))) as bar,
        ByteProgress(plain, "verify") as silent,
    ):
        bar(1 << 30, 4 << 30)
        silent(4, 4)
        assert "25% 1 GiB of 4 GiB, 1.07 GB/s, 0:03 left" in screen.getvalue()
        bar(4 << 30, 4 << 30)
    assert screen.getvalue().endswith("\r") and plain.getvalue() == ""
    quick = Terminal()
    with ByteProgress(quick, "x", lambda: 0.0) as bar:
        bar(1, 2)
        assert quick.getvalue() == ""  # too soon after the one before
        bar(2, 2)
        assert "100%" in quick.getvalue()
    assert size(1023) == "1023 B" and size(1 << 40) == "1 TiB" and size(1023.9 * (1 << 20)) == "1024 MiB"
    assert table([("a", "1"), ("bcd", "22")], right=(1,)) == ["a     1", "bcd  22"]


def test_every_command_of_the_page_can_be_typed() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    found = re.findall(r"python -m faulttol +([a-z][^\n`#|;]*)", page)
    assert {words.split()[0] for words in found} >= {
        "inspect", "verify", "diff", "reshard", "export", "import", "grow", "prune", "bench",
    }  # fmt: skip
    for words in found:
        cli.parse(shlex.split(words))
    with pytest.raises(UserError):
        cli.parse(["verify", "x", "--stepp", "3"])


@pytest.mark.parametrize(
    "words",
    [
        "reshard {root} --files 2 --out {root}/new",
        "export {root} --to dcp --out {root}/new",
        "import {root}/hf --from hf --out {root}/new",
    ],
)
def test_what_the_system_refuses_is_one_line(
    ask: Ask, tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No traceback for a disk that is full, or a folder in a file's place."""

    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    save_all(tmp_path, 7)
    (tmp_path / "hf/config.json").mkdir(parents=True)
    monkeypatch.setattr(Path, "mkdir", full)
    code, out, err = ask(*words.format(root=tmp_path).split())
    (line,) = err.splitlines()
    assert code == 1 and not out
    assert re.fullmatch(
        rf"megaray: \w+ has failed: \[Errno \d+\] .*'{tmp_path}/.*'; fix that, or name another place", line
    )


def test_an_object_store_that_does_not_answer_is_one_line(
    ask: Ask, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("EndpointConnectionError:\nno answer")

    monkeypatch.setattr(CheckpointStore(memory)._fs, "ls", fail)
    code, out, err = ask("inspect", memory)
    assert (code, out) == (1, "") and err.startswith(
        "megaray: inspect has failed: [Errno 5] RuntimeError: EndpointConnectionError: no answer: "
    )
