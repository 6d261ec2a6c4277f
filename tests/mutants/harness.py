"""Plants mutants one by one in a copy of the tree, and sees which of them their tests kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from tests.mutants.listed import Mutant, misplaced, mutants
from tests.source_tree import ROOMS, ROOT

LIMIT = 150
"""Seconds for a mutant's test; more than any test's own timeout."""
BASE_LIMIT = 900
COPIED = (*ROOMS, "tests", "pyproject.toml")


@dataclass(frozen=True)
class MutantResult:
    """What came of a mutant."""

    mutant: Mutant
    killed: bool
    why: str
    """Of the test's failure, or why the mutant lives."""
    seconds: float


class Tree:
    """A copy of the project with a nursery that runs tests in it."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        for name in COPIED:
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source / name, folder / name)
        script = folder / "tests" / "mutants" / "nursery.py"
        env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        self._nursery = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=env,
        )  # fmt: skip

    def test(self, ids: Sequence[str], limit: float, *words: str) -> dict[str, Any]:
        """The nursery's answer."""
        assert self._nursery.stdin is not None and self._nursery.stdout is not None
        order = {"tree": str(self.folder), "tests": list(ids), "words": list(words), "limit": limit}
        self._nursery.stdin.write(json.dumps(order) + "\n")
        self._nursery.stdin.flush()
        line = self._nursery.stdout.readline()
        if not line:
            raise RuntimeError("the nursery ended; see the messages above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """The tree with a mutant in it."""
        path = self.folder / mutant.file
        whole = path.read_text()
        self._write(path, whole.replace(mutant.old, mutant.new))
        try:
            yield
        finally:
            self._write(path, whole)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text)
        # Compiled files are trusted where time in seconds and size are right, which a patch may leave as they were.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()

    def end(self) -> None:
        """End the nursery."""
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        self._nursery.wait(30)


def judge(mutant: Mutant, answer: dict[str, Any], seconds: float) -> MutantResult:
    """A mutant is killed where its test says that something is wrong: an assertion failed. A crash proves nothing, as
    the patch may only have broken the code."""
    if answer["code"] == -1:
        return MutantResult(mutant, False, "the test doesn't end", seconds)
    if answer["code"] == 0:
        return MutantResult(mutant, False, "the test passes", seconds)
    told = answer["failed"][0] if answer["failed"] else ("", "", f"exit code {answer['code']}")
    _, phase, why = told
    asserted = why.startswith(("AssertionError", "Failed")) and "Timeout" not in why
    if answer["code"] == 1 and asserted and phase == "call":
        return MutantResult(mutant, True, why, seconds)
    return MutantResult(mutant, False, f"the test breaks instead of failing ({phase}): {why}", seconds)


def broken(answer: dict[str, Any], ids: Sequence[str]) -> list[str]:
    """What is wrong with a run of the unmutated tree: tests that failed, or of which nothing passed."""
    lines = [f"{test} fails without a mutant ({phase}): {why}" for test, phase, why in answer["failed"]]
    if answer["code"] and not lines:
        lines += answer["said"] or [f"the tests end with exit code {answer['code']} without a mutant"]
    if not lines:
        passed = [name.partition("[")[0] for name in answer["passed"]] + answer["passed"]
        lines = [f"{test} doesn't run: it is skipped or misspelt" for test in ids if test not in passed]
    return lines


def run(
    only: str, jobs: int, report: Callable[[str], None], source: Path = ROOT
) -> tuple[int, int, list[str]]:
    """Test the tree as it is, then every mutant.

    Args:
        only: text in the name, file or test of the mutants to run.
        jobs: mutants at a time.

    Returns:
        Mutants killed, mutants run, and what is wrong, a line each.
    """
    todo = [m for m in mutants() if only in f"{m.name} {m.file} {m.test}"]
    wrong = misplaced(todo, {m.file: (source / m.file).read_text() for m in todo})
    if wrong or not todo:
        return 0, len(todo), wrong or [f"no mutant has {only!r} in its name, file or test"]
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        trees: Queue[Tree] = Queue()
        for job in range(jobs):
            tree = Tree(Path(folder, str(job)), source)
            ends.callback(tree.end)
            trees.put(tree)
        pool = ends.enter_context(ThreadPoolExecutor(jobs))

        def base(ids: Sequence[str]) -> list[str]:
            tree = trees.get()
            try:
                return broken(tree.test(ids, BASE_LIMIT), ids)
            finally:
                trees.put(tree)

        def plant(mutant: Mutant) -> MutantResult:
            tree, began = trees.get(), time.perf_counter()
            try:
                with tree.planted(mutant):
                    answer = tree.test([mutant.test], LIMIT, "-x")
            finally:
                trees.put(tree)
            verdict = judge(mutant, answer, time.perf_counter() - began)
            with lock:
                mark = "killed " if verdict.killed else "SURVIVES"
                report(f"{mark} {verdict.seconds:5.1f} s  {mutant.name}: {verdict.why[:110]}")
            return verdict

        ids = sorted({mutant.test for mutant in todo})
        began = time.perf_counter()
        shares = [share for share in _shares(ids, jobs) if share]
        wrong = [line for lines in pool.map(base, shares) for line in lines]
        if wrong:
            return 0, len(todo), wrong
        report(f"unmutated: {len(ids)} tests pass in {time.perf_counter() - began:.0f} s")
        verdicts = list(pool.map(plant, todo))
    return (
        sum(verdict.killed for verdict in verdicts),
        len(todo),
        [f"{v.mutant.name}: {v.why} ({v.mutant.test})" for v in verdicts if not v.killed],
    )


def _shares(ids: Sequence[str], jobs: int) -> list[list[str]]:
    """Tests by module, so that a module's fixtures are made once, dealt out to the jobs."""
    by_module: dict[str, list[str]] = {}
    for test in ids:
        by_module.setdefault(test.partition("::")[0], []).append(test)
    shares: list[list[str]] = [[] for _ in range(jobs)]
    for group in sorted(by_module.values(), key=len, reverse=True):
        min(shares, key=len).extend(group)
    return shares
