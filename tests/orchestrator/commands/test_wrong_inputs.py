"""Wrong inputs: one clear line, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from configs.paths import HomePaths
from orchestrator.cli import main
from orchestrator.local import cluster
from orchestrator.local.cluster import LocalCluster
from orchestrator.record.events import GangShape, StateMoved, Submitted
from orchestrator.record.states import Reason, State
from tests.orchestrator.logs import Writer

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HomePaths:
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path / "the home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a short text")
    (tmp_path / "corpus.txt").write_text("some text\n" * 1000)
    (tmp_path / "torn.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"content": "fine", "id": 1}\n')
    (tmp_path / "not.parquet").write_text("no parquet at all")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "body.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "torn.yaml").write_text("train:\n  steps: [1\nmodel: demo\n")
    (tmp_path / "typo.yaml").write_text("train:\n  stepz: 3\n")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    return HomePaths(tmp_path / "the home")


RECORD = LocalCluster("127.0.0.1:1", "http://127.0.0.1:2", 1, 1, "", "", 2, 0, "/tmp")
"""Of a local Ray whose supervisor is alive, and whose head is not."""


def ended(home: HomePaths, run_id: str, to: State) -> None:
    run = home.run(run_id)
    log = Writer(run)
    log.append(Submitted(0, GangShape(2, 1), 20, 3, 1.0, "demo", {"dp": 2}), 1.0)
    moves = {
        State.SUCCEEDED: [State.QUEUED, State.PLACING, State.STARTING, State.SUCCEEDED],
        State.CANCELLED: [State.QUEUED, State.CANCELLED],
        State.QUEUED: [State.QUEUED],
    }[to]
    for state in moves:
        log.append(StateMoved(state, Reason.SUBMITTED), 2.0)
    log.close()


SUBMIT = {
    "a key that doesn't exist": (["train.stpes=3"], ["train.stpes", "train.steps"]),
    "a group that doesn't exist": (["experimnt=demo"], ["experimnt", "'experiment'"]),
    "a section that doesn't exist": (["trian.steps=3"], ["trian", "train"]),
    "a preset that doesn't exist": (["model=dmeo"], ["dmeo", "demo"]),
    "a device that doesn't exist": (["hardware=h1000"], ["h1000", "h100"]),
    "no value": (["train.steps"], ["train.steps"]),
    "an empty value": (["train.steps="], ["train.steps"]),
    "no steps": (["train.steps=0"], ["train.steps", "0"]),
    "words for a number": (["train.steps=many"], ["train.steps", "many"]),
    "half a step": (["train.steps=1.5"], ["train.steps", "1.5"]),
    "a choice that isn't one": (["train.precision=fp13"], ["train.precision", "fp13", "bf16"]),
    "experts that can't be shared out": (["parallel.ep=3"], ["parallel.ep", "3", "model.experts"]),
    "ranks that ep doesn't divide": (["parallel.dp=3", "parallel.ep=2"], ["parallel.ep", "parallel.dp"]),
    "a batch that can't be dealt out": (
        ["parallel.dp=2", "train.micro_batch=2", "train.global_batch=7"],
        ["train.global_batch", "7"],
    ),
    "a warm-up as long as the run": (["train.steps=5", "optim.warmup_steps=5"], ["optim.warmup_steps", "5"]),
    "a floor above the peak": (["optim.min_lr=1"], ["optim.min_lr"]),
    "heads that can't be grouped": (["model.kv_heads=3"], ["model.heads", "model.kv_heads"]),
    "more choices than experts": (["model.top_k=9"], ["model.top_k", "model.experts"]),
    "an axis that splits nothing evenly": (["parallel.tp=3"], ["parallel.tp=3", "model.heads", "parallel.tp=2"]),
    "more pipeline stages than layers": (["parallel.pp=8"], ["parallel.pp=8", "model.layers", "parallel.pp=4"]),
    "an engine on what it doesn't run": (
        ["train.engine=deepspeed", "parallel.cp=2"], ["parallel.cp=2", "deepspeed", "native"],
    ),
    "timeouts in an order that can't work": (["resilience.timeouts.collective=5"], ["collective", "hang"]),
    "no patience": (["resilience.timeouts.patience=0"], ["patience"]),
    "a secret": (["tracking.api_key=abc"], ["WANDB_API_KEY"]),
    "data that isn't there": (["data.path=corpsu.txt"], ["data.path", "corpsu.txt", "corpus.txt"]),
    "empty data": (["data.path=empty.txt"], ["data.path", "empty"]),
    "a folder without files": (["data.path=folder"], ["data.path", "no files"]),
    "a glob that finds nothing": (["data.path=*.csv"], ["data.path", "*.csv"]),
    "a sequence longer than the data": (["data.path=short.txt"], ["data.sequence", "longer than the data"]),
    "jsonl that isn't": (["data.path=torn.jsonl"], ["torn.jsonl:2"]),
    "jsonl without the text": (["data.path=other.jsonl"], ["data.text_field", "content"]),
    "parquet that isn't": (["data.path=not.parquet"], ["not.parquet", "parquet"]),
    "parquet without the text": (["data.path=body.parquet"], ["data.text_field", "body"]),
    "a protocol that isn't one": (["data.path=foo://bucket/x"], ["data.path", "foo"]),
    "a vocabulary below the bytes": (["model.vocab=100"], ["model.vocab", "256"]),
    "a tokenizer that isn't there": (["data.tokenizer=tok.json"], ["data.tokenizer", "tok.json"]),
    "a checkpoint folder that can't be": (["checkpoint.path=/dev/null/x"], ["checkpoint.path", "/dev/null/x"]),
    "a checkpoint protocol that isn't one": (["checkpoint.path=foo://x"], ["checkpoint.path", "foo"]),
    "a device without a cluster": (["hardware=h100"], ["hardware=h100", "--address"]),
    "a node count that doesn't divide": (["parallel.dp=4", "cluster.nodes=3"], ["cluster.nodes"]),
    "slots that contradict": (
        ["parallel.dp=4", "cluster.nodes=2", "cluster.slots_per_node=4"],
        ["cluster.nodes", "cluster.slots_per_node"],
    ),
    "a malformed file": (["--config", "torn.yaml"], ["torn.yaml"]),
    "a file that isn't there": (["--config", "gone.yaml"], ["gone.yaml"]),
    "a typo in a file": (["--config", "typo.yaml"], ["stepz", "steps"]),
    "a file that isn't a tree": (["--config", "list.yaml"], ["list.yaml"]),
    "an address that isn't one": (["--address", "nonsense"], ["--address", "nonsense"]),
    "an address of Ray's client": (["--address", "ray://127.0.0.1:10001"], ["--address", "ray://"]),
    "an address where nobody is": (["--address", "127.0.0.1:1"], ["--address", "127.0.0.1:1"]),
    "a port that isn't one": (["--address", "127.0.0.1:99999"], ["--address", "99999"]),
    "a dashboard where nobody is": (["--address", "http://127.0.0.1:1"], ["--address", "http://127.0.0.1:1"]),
    "a priority that isn't one": (["--priority", "high"], ["--priority", "high"]),
    "an option that isn't one": (["--detatch"], ["--detatch", "--detach"]),
}  # fmt: skip

OTHERS = {
    "a command that isn't one": (["sumbit"], ["sumbit", "submit"]),
    "no command": ([], ["COMMAND"]),
    "status of nothing": (["status", "nothing"], ["nothing", "list"]),
    "watch of nothing": (["watch", "nothing"], ["nothing"]),
    "logs of nothing": (["logs", "nothing"], ["nothing"]),
    "incidents of nothing": (["incidents", "nothing"], ["nothing"]),
    "cancel of nothing": (["cancel", "nothing"], ["nothing"]),
    "resume of nothing": (["resume", "nothing"], ["nothing"]),
    "an ambiguous beginning": (["status", "run"], ["run", "run-a-b-c", "run-a-b-d"]),
    "resume of a finished run": (["resume", "run-a-b-c"], ["succeeded", "train.steps"]),
    "cancel of a finished run": (["cancel", "run-a-b-c"], ["succeeded"]),
    "cancel without a cluster": (["cancel", "run-a-b-d"], ["up"]),
    "resume of a waiting run": (["resume", "run-a-b-d"], ["queued"]),
    "logs of an attempt before the first": (["logs", "rux", "--attempt", "0"], ["no attempt 0", "it has 1"]),
    "a pruning age that isn't one": (["prune", "--older", "nan"], ["--older"]),
    "logs of a run without attempts": (["logs", "run-a-b-c"], ["attempt"]),
    "nodes without a cluster": (["nodes"], ["up"]),
    "down without a cluster": (["down"], ["nothing to take down"]),
    "a cluster without slots": (["up", "--slots", "0"], ["--slots 0"]),
    "a plan without slots": (["plan", "--slots", "0"], ["slots"]),
    "a plan for too few slots": (["plan", "parallel.dp=8", "--slots", "2"], ["8 slots", "2"]),
    "a word too many": (["list", "everything"], ["everything"]),
}


@pytest.mark.parametrize("name", SUBMIT)
def test_submit(name: str, home: HomePaths, capsys: pytest.CaptureFixture[str]) -> None:
    words, told = SUBMIT[name]
    assert main(["submit", "--yes", *words]) == 2
    said_once(capsys, told)
    left = [p for p in home.home.rglob("*") if p.is_file()] if home.home.exists() else []
    assert not left, f"left behind: {left}"


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str, home: HomePaths, capsys: pytest.CaptureFixture[str]) -> None:
    ended(home, "run-a-b-c", State.SUCCEEDED)
    ended(home, "run-a-b-d", State.QUEUED)
    ended(home, "rux-a-b-e", State.SUCCEEDED)
    home.run("rux-a-b-e").attempt(1).log(0).parent.mkdir(parents=True)
    words, told = OTHERS[name]
    assert main(words) == 2
    said_once(capsys, told)


def test_a_home_that_cannot_be(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARAY_HOME", "/dev/null/home")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for words in (["submit", "--yes"], ["up"]):
        assert main(words) == 2
        said_once(capsys, ["MEGARAY_HOME", "/dev/null/home"])


def test_reading_an_empty_home_is_no_mistake(home: HomePaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0 and "submit" in capsys.readouterr().out
    assert main(["list", "--json"]) == 0 and json.loads(capsys.readouterr().out) == []


def said_once(capsys: pytest.CaptureFixture[str], told: list[str]) -> None:
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("megaray: ")
    for word in told:
        assert word in lines[0], f"'{word}' is not in: {lines[0]}"


@pytest.mark.parametrize(
    "words", [["nodes"], ["cancel", "run-a-b-d"], ["submit", "--yes", "experiment=smoke"]]
)
def test_a_local_ray_that_is_being_started_again_is_no_mistyped_address(
    words: list[str],
    home: HomePaths,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended(home, "run-a-b-d", State.QUEUED)
    monkeypatch.setattr(cluster, "live_cluster", lambda home: RECORD)
    assert main(words) == 2
    said_once(capsys, ["the local Ray at 127.0.0.1:1 doesn't answer", "again in a minute", "down"])


def test_down_names_the_runs_that_it_could_not_cancel(
    home: HomePaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(home, "run-a-b-d", State.QUEUED)
    monkeypatch.setattr(cluster, "live_cluster", lambda home: RECORD)
    monkeypatch.setattr(cluster, "stop_cluster", lambda home: True)
    assert main(["down", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "not cancelled: run-a-b-d" in out and "up` continues it" in out
    assert main(["down", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"cancelled": [], "left": ["run-a-b-d"]}


@pytest.mark.parametrize("command", ["status", "watch", "incidents", "logs"])
def test_a_file_that_cannot_be_read_is_named_in_one_line(
    command: str, home: HomePaths, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as the log of a run of another account; a folder in its place is unreadable to root too."""
    ended(home, "run-a-b-c", State.SUCCEEDED)
    run = home.run("run-a-b-c")
    path = run.attempt(1).log(0) if command == "logs" else run.events
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)
    assert main([command, "run-a-b-c"]) == 2
    said_once(capsys, [str(path), "Is a directory", "permissions"])


def test_a_full_disk_is_said_in_one_line(
    home: HomePaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("orchestrator.record.summaries.summaries", full)
    assert main(["list"]) == 2
    said_once(capsys, ["No space left on device", str(home.home)])

    def ours(*_: object) -> None:
        raise OSError("a mistake of ours")

    monkeypatch.setattr("orchestrator.record.summaries.summaries", ours)
    with pytest.raises(OSError, match="a mistake of ours"):
        main(["list"])
