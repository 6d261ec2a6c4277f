"""Logs of ranks that grow too long."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.paths import RunPaths
from orchestrator.agent import files
from tests.orchestrator.agent.local_runtime import until

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


def test_a_long_log_is_rotated_under_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "00000.log"
    code = f"import os, sys\nfd = os.open({str(path)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
    code += "for n, _ in enumerate(sys.stdin): os.write(fd, b'%06d\\n' % n); print(n, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin and writer.stdout

        def write(count: int) -> None:
            for _ in range(count):
                writer.stdin.write("\n")  # type: ignore[union-attr]
                writer.stdin.flush()  # type: ignore[union-attr]
                writer.stdout.readline()  # type: ignore[union-attr]

        write(20)
        assert not files.rotate_log(path, limit=140) and files.rotate_log(path, limit=139)
        write(30)
        assert files.rotate_log(path, limit=139)
        write(2)
        writer.stdin.close()
    read = [
        p.read_text().split() for p in (path.with_name("00000.log.2"), path.with_name("00000.log.1"), path)
    ]
    assert [len(part) for part in read] == [20, 30, 2]
    assert [int(word) for part in read for word in part] == list(range(52)), (
        "nothing is lost while nobody writes"
    )
    assert files.rotate_log(path, limit=1) and not (tmp_path / "00000.log.3").exists()


def _full(code: int, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of logs end after half."""

    def fail(source: object, target: object) -> None:
        if isinstance(target, Path):
            target.write_text("half")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.shutil, at, fail)


@pytest.mark.parametrize("at", ["copyfile", "copyfileobj"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_copy_that_fails_costs_no_older_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, at: str
) -> None:
    path = tmp_path / "00000.log"
    path.write_text("new " * 100)
    (tmp_path / "00000.log.1").write_text("one")
    (tmp_path / "00000.log.2").write_text("two")
    _full(code, at, monkeypatch)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            files.rotate_log(path, limit=10)
    else:
        assert files.rotate_log(path, limit=10) and not files.rotate_log(path, limit=10)
    left = {one.name: one.read_text() for one in tmp_path.iterdir()}
    kept = "new " * 100 if code == errno.EIO else ""
    assert left == {"00000.log": kept, "00000.log.1": "one", "00000.log.2": "two"}


def test_a_log_that_cannot_be_rotated_keeps_no_other_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotated: list[str] = []

    def rotate(path: Path) -> bool:
        if path.is_relative_to(tmp_path):  # an agent of a test before may still look after its own
            rotated.append(path.name)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "rotate_log", rotate)
    monkeypatch.setattr(files, "_ROTATE_SECONDS", 0.0)
    run = RunPaths(tmp_path / "a-run")
    logs = files.LogFiles(run, 1, (2, 3), [], lambda: None)
    until(lambda: len(rotated) >= 2, "a round")
    assert [Path(name).stem for name in rotated[:2]] == ["00002", "00003"]
    monkeypatch.setattr(files, "last_line", lambda path: 1 / len(path.read_text()) and "words")
    run.attempt(1).log(2).unlink()
    run.attempt(1).log(3).write_text("x")
    logs.request_last_line(2)
    logs.request_last_line(3)
    until(lambda: logs.last_words == {3: "words"}, "the words of the one that can be read")
    logs.close()
