"""A process that has loaded what tests need from other projects, and forks for each order: `python nursery.py` as a script.

An order is a line of JSON: `tree`, the folder to run in, `tests`, their ids, `words` for pytest, and `limit`, seconds.
Its answer is one too: `code`, pytest's exit code (-1 past the limit, else minus the signal), `passed` ids, `failed`: id,
phase, and what was raised; and `said`, pytest's own errors. Nothing of the project is loaded here, so a forked child
imports all of it from `tree`, as do the children that it starts. Standard output carries the answers alone; a child's own
goes to a file `log` in the tree.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

FOREIGN = (
    "hydra", "numpy", "pydantic", "pytest", "torch", "torch.distributed", "torch.distributed.fsdp", "torch.multiprocessing",
    "torch.distributed.pipelining", "torch.distributed.tensor", "torch.utils.checkpoint", "fsspec", "psutil", "pyarrow",
)  # fmt: skip


class Notes:
    """A pytest plugin that writes down what came of each test."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[tuple[str, str, str]] = []

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        """Every phase of every test."""
        if call.excinfo is None:
            self.passed += [item.nodeid] if call.when == "call" else []
        elif call.excinfo.typename != "Skipped":
            self._fail(item.nodeid, call.when, call.excinfo.typename, str(call.excinfo.value))

    def pytest_collectreport(self, report: Any) -> None:
        """Modules that couldn't be imported."""
        if report.failed:
            self._fail(report.nodeid, "collect", "ImportError", str(report.longrepr))

    def _fail(self, test: str, phase: str, kind: str, text: str) -> None:
        told = next((line.strip() for line in text.splitlines() if line.strip()), "")
        self.failed.append((test, phase, f"{kind}: {told}"))


def _child(order: dict[str, Any], answer: int) -> None:
    os.setpgid(0, 0)
    log = os.open(str(Path(order["tree"], "log")), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["tree"])
    sys.path[:] = [order["tree"], *(path for path in sys.path if path != str(Path(__file__).parent))]
    os.environ["PYTHONPATH"] = order["tree"]
    import multiprocessing

    import pytest

    # This process is young enough to be forked, so a test's ranks needn't load everything again.
    multiprocessing.set_start_method("fork")
    notes = Notes()
    words = ["-q", "-p", "no:cacheprovider", "--rootdir", order["tree"], *order["words"], *order["tests"]]
    code = pytest.main(words, plugins=[notes])
    sys.stdout.flush()
    said = [line for line in Path(order["tree"], "log").read_text().splitlines() if line.startswith("ERROR")]
    found = {"code": int(code), "passed": notes.passed, "failed": notes.failed, "said": said}
    os.write(answer, json.dumps(found).encode() + b"\n")
    os.close(answer)
    os._exit(0)


def _run(order: dict[str, Any]) -> dict[str, Any]:
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        try:
            _child(order, into)
        finally:
            os._exit(70)
    os.close(into)
    text, late = b"", False
    while not late and not text.endswith(b"\n"):  # a grandchild may hold the pipe open
        ready, _, _ = select.select([out], [], [], order["limit"])
        late = not ready
        part = os.read(out, 1 << 16) if ready else b""
        if not part:
            break
        text += part
    os.close(out)
    try:
        os.killpg(child, signal.SIGKILL)  # and whatever it started
    except ProcessLookupError:
        pass
    _, status = os.waitpid(child, 0)
    if late or not text:
        code = -1 if late else -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return {"code": code, "passed": [], "failed": [], "said": []}
    answer: dict[str, Any] = json.loads(text)
    return answer


def main() -> None:
    """Until the orders end."""
    for name in FOREIGN:
        importlib.import_module(name)
    ours = [
        name
        for name in sys.modules
        if name.split(".")[0] in ("configs", "collectives", "trainer", "tests", "faulttol")
    ]
    assert not ours, f"{ours} would hide a mutant"
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
