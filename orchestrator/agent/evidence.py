"""Stacks of living ranks and copies of their rings, written before anything is killed."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from json import dumps
from pathlib import Path

from faulttol import proc, recorder
from faulttol.proc import run_bounded

log = logging.getLogger("megaray.agent")

SECONDS = 10.0
"""All of it takes no longer; what isn't there then is left out."""
_DUMP_SECONDS = 6.0
_AT_ONCE = 4


class EvidenceCollector:
    """Writes to a folder, in threads of its own.

    Args:
        folder: where to, on shared storage.
        pids: process id by rank.
        rings: folder of the ranks' rings.
        done: called once, when all is there or the time is over.
    """

    def __init__(self, folder: Path, pids: Mapping[int, int], rings: Path, done: Callable[[], None]) -> None:
        self.done = False
        self._folder, self._pids, self._rings, self._tell = folder, dict(pids), rings, done
        self._once = threading.Lock()
        threading.Thread(target=self._work, name="agent-evidence", daemon=True).start()
        timer = threading.Timer(SECONDS, self._finish)
        timer.daemon = True
        timer.start()

    def _finish(self) -> None:
        with self._once:
            first, self.done = not self.done, True
        if first:
            self._tell()

    def _work(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            pool = ThreadPoolExecutor(_AT_ONCE)
            wait([pool.submit(self._write, rank, pid) for rank, pid in self._pids.items()], timeout=SECONDS)
            pool.shutdown(wait=False, cancel_futures=True)
        except OSError:
            log.exception("evidence in %s", self._folder)
        finally:
            self._finish()

    def _write(self, rank: int, pid: int) -> None:
        (self._folder / f"{rank:05d}.stack.txt").write_text(stacks(pid))
        records = [
            asdict(one) | {"mark": one.mark.name, "phase": one.phase.name}
            for one in recorder.read(self._rings / f"{rank:05d}.ring")
        ]
        (self._folder / f"{rank:05d}.ring.json").write_text(dumps(records))


def stacks(pid: int) -> str:
    """Python stacks of all threads of a process, and what the kernel says that it does."""
    state = proc.state(pid)
    lines = [f"process {pid}, state {state or 'gone'}, {time.strftime('%Y-%m-%d %H:%M:%S')}"]
    for name in ("wchan", "syscall"):
        try:
            lines.append(f"{name}: {Path(f'/proc/{pid}/{name}').read_text().strip()}")
        except OSError as error:
            lines.append(f"{name}: {error.strerror}")
    program = shutil.which("py-spy") or str(Path(sysconfig.get_path("scripts")) / "py-spy")
    words = [program, "dump", "--pid", str(pid)]
    # A process that is stopped can't be paused: py-spy would wait for it forever.
    words += ["--nonblocking"] if state in ("T", "t", "D") else []
    try:
        done = run_bounded(words, _DUMP_SECONDS)
        lines += ["", done.stdout, done.stderr]
    except subprocess.TimeoutExpired:
        lines.append(f"py-spy: no answer in {_DUMP_SECONDS:.0f} s")
    except OSError as error:
        lines.append(f"py-spy: {error.strerror}; install it to have the Python stacks here")
    return "\n".join(lines)
