"""Logs of ranks that grow too long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.agent import files

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]


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
        assert not files.rotated(path, limit=140) and files.rotated(path, limit=139)
        write(30)
        assert files.rotated(path, limit=139)
        write(2)
        writer.stdin.close()
    read = [
        p.read_text().split() for p in (path.with_name("00000.log.2"), path.with_name("00000.log.1"), path)
    ]
    assert [len(part) for part in read] == [20, 30, 2]
    assert [int(word) for part in read for word in part] == list(range(52)), (
        "nothing is lost while nobody writes"
    )
    assert files.rotated(path, limit=1) and not (tmp_path / "00000.log.3").exists()
