"""Preparing: the same bytes on any number of cores, after any kill, and of the best rows alone."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from configs.errors import UserError
from configs.schema import DataConfig
from tests.trainer.data.test_tokenizer import bpe
from trainer.data import workers
from trainer.data.prepare import prepare

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

FILES = ("tokens.bin", "tokens.idx", "tokens.hash")
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "and",
    "lazy",
    "dog",
    "text",
    "<|endoftext|>",
    "ends",
    "Übermut",
    "\n",
)


def _text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Small and large, packed and not, of all kinds; a glob, so that they may be together."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"text": _text(i, 1 + i % 60), "score": i % 7} for i in range(600)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.txt").write_text(_text(1, 20_000))
    for i in range(20):
        (folder / f"d{i:02d}.txt").write_text(_text(i, i))
    table = pyarrow.table({"text": [row["text"] for row in rows]})
    pyarrow.parquet.write_table(table, folder / "e.parquet", row_group_size=100)
    return folder


def _config(path: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(path=str(path), **{"sequence": 8, **settings})


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.blake2b((folder / name).read_bytes()).hexdigest() for name in FILES}


def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and tasks of a small corpus. Blocks are cut here, so worker processes needn't know."""
    monkeypatch.setattr("trainer.data.blocks.BLOCK_BYTES", 2000)
    monkeypatch.setattr("trainer.data.workers.TASK_BYTES", 5000)


# ---- several cores ----


def test_several_workers_write_what_one_does(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_blocks(monkeypatch)
    name = bpe(tmp_path)
    found = []
    told: list[tuple[str, int, int, int]] = []
    for count in (1, 3):
        out = tmp_path / f"out{count}"
        told.clear()
        store = prepare(
            _config(f"{corpus}/*", tokenizer=name),
            400,
            tmp_path,
            count,
            lambda *one: told.append(one),
            out,
        )
        assert len(told) > 20, "many tasks"
        assert [done for _, done, _, _ in told] == sorted(done for _, done, _, _ in told)
        assert told[-1][1:] == (told[-1][2], told[-1][2], store.count)
        found.append(digests(out))
    assert found[0] == found[1] and store.documents == 600 * 3 + 1 + 19
    assert (store.tokens == store.separator).sum() == store.documents, "what a text spells ends no document"


def test_a_mistake_is_the_first_in_order_whoever_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_blocks(monkeypatch)
    rows = [json.dumps({"text": _text(i, 30)}) for i in range(400)]
    rows[150], rows[151], rows[399] = '{"text": 1}', "{", "{"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match="a.jsonl:151 has no text .* it is a number"):
        prepare(_config(tmp_path / "a.jsonl"), 256, tmp_path / "cache", workers=3)


def test_a_worker_that_dies_is_told(tmp_path: Path) -> None:
    todo = iter([(workers.SourcePosition(), []), (workers.SourcePosition(), [])])
    with pytest.raises(UserError, match="a worker of 2 died .*--workers 1: what is done is kept"):
        list(workers.map_in_order(_die, todo, 2))


def _die(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_script_without_a_guard_prepares_once(tmp_path: Path) -> None:
    """Workers don't import the script that started them."""
    (tmp_path / "a.txt").write_text(_text(1, 2000))
    (tmp_path / "script.py").write_text(
        "from pathlib import Path\nfrom configs.schema import DataConfig\nfrom trainer.data.prepare import prepare\n"
        f"home = Path({str(tmp_path)!r})\n"
        "print(prepare(DataConfig(path=str(home / 'a.txt')), 256, home / 'cache', workers=2).documents)\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 9})
    assert workers.cores() == 3


# ---- stopped and resumed ----

_SLOW = """
import multiprocessing, sys, time
from pathlib import Path
from configs.schema import DataConfig
from trainer.data import blocks, build, workers
from trainer.data.prepare import prepare
blocks.BLOCK_BYTES, workers.TASK_BYTES = 2000, 5000
path, name, out, count, log = sys.argv[1:]
def slow(phase, done, total, tokens):
    with open(log, "a") as file:
        file.write(f"{phase} {[child.pid for child in multiprocessing.active_children()]}\\n")
    time.sleep(0.05)
prepare(DataConfig(path=path, tokenizer=name, sequence=8), 400, Path(out), int(count), slow, Path(out))
"""


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_preparation_goes_on_and_writes_the_same(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """SIGKILL again and again, each time some tasks later; then it is whole, and nothing was done twice."""
    name, out, log = bpe(tmp_path), tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-c", _SLOW, f"{corpus}/*", name, str(out), str(count), str(log)]
    kills = 0
    for _ in range(3):
        log.write_text("")
        process = subprocess.Popen(command)
        while log.read_text().count("tokens") < 8 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        children = json.loads(log.read_text().splitlines()[-2].partition(" ")[2])
        assert len(children) == (count if count > 1 else 0)
        _gone(children)
        assert not (out / "meta.json").exists()
    assert kills == 3
    told: list[str] = []
    _small_blocks(monkeypatch)
    data = _config(f"{corpus}/*", tokenizer=name)
    prepare(data, 400, tmp_path, 1, lambda phase, *_: told.append(phase), out)
    assert told.count("verify") >= 24, "what three killed ones wrote is kept"
    fresh: list[str] = []
    prepare(data, 400, tmp_path, 1, lambda phase, *_: fresh.append(phase), tmp_path / "fresh")
    assert len(fresh) == len(told) and "verify" not in fresh
    assert digests(out) == digests(tmp_path / "fresh")
    assert sorted(p.name for p in out.iterdir()) == ["lock", "meta.json", *sorted(FILES)]


def _gone(pids: list[int]) -> None:
    """Wait until processes have ended: workers die with the one that started them."""
    until = time.monotonic() + 20
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < until, f"{left} live on"
        time.sleep(0.01)


class _Stop(Exception):
    pass


@pytest.mark.parametrize(
    "damage", ["none", "ids", "short ids", "ends", "journal line", "journal gone", "other key"]
)
def test_what_was_kept_is_checked(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    _small_blocks(monkeypatch)
    data, out, kept = _config(f"{corpus}/*"), tmp_path / "out", 10

    def stop(phase: str, *_: int) -> None:
        told.append(phase)
        if len(told) == kept:
            raise _Stop

    told: list[str] = []
    with pytest.raises(_Stop):
        prepare(data, 256, tmp_path, 1, stop, out)
    ids, ends, journal = (out / name for name in ("tokens.bin.part", "ends.part", "journal.part"))
    lines = journal.read_text().splitlines()
    assert len(lines) == 1 + kept
    if damage == "ids":
        ids.write_bytes(ids.read_bytes()[:-9] + b"X" + ids.read_bytes()[-8:])
    elif damage == "short ids":
        ids.write_bytes(ids.read_bytes()[:-1])
    elif damage == "ends":
        ends.write_bytes(b"\1" + ends.read_bytes()[1:])
    elif damage == "journal line":
        journal.write_text("\n".join(lines)[:-20])
    elif damage == "journal gone":
        journal.unlink()
    elif damage == "other key":
        journal.write_text("\n".join(['{"key": "another"}', *lines[1:]]))
    good = {"none": 10, "ids": 9, "short ids": 9, "journal line": 9}.get(damage, 0)
    after: list[str] = []
    prepare(data, 256, tmp_path, 1, lambda phase, *_: after.append(phase), out)
    assert after.count("verify") == good
    prepare(data, 256, tmp_path, 1, out=tmp_path / "fresh")
    assert digests(out) == digests(tmp_path / "fresh")


def test_another_corpus_in_the_folder_is_refused(corpus: Path, tmp_path: Path) -> None:
    prepare(_config(corpus / "c.txt"), 256, tmp_path, out=tmp_path / "out")
    prepare(_config(corpus / "c.txt"), 256, tmp_path, out=tmp_path / "out")
    with pytest.raises(UserError, match="--out .*out holds another prepared corpus; name a new folder"):
        prepare(_config(corpus / "d09.txt"), 256, tmp_path, out=tmp_path / "out")
