"""Processes that begin with what training loads: forked from a server that has loaded it once.

A rank that begins with an empty interpreter loads torch and its compiler for three to five seconds of a processor, which
is more than most tests' own work.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LOADED = [
    "torch._dynamo", "torch.distributed.pipelining", "trainer.loop", "trainer.engines.native", "collectives.studies.sweep",
    "tests.trainer.parallel.seam_checks", "tests.preloaded",
]  # fmt: skip
"""Without what touches a GPU when it is loaded: forked processes couldn't use it any more. torch's compiler would be loaded
by every rank, for seconds, at its first FSDP module."""
_METHOD = multiprocessing.get_start_method(allow_none=True) or "forkserver"
"""What the program has set, or a fork server. Asked here since `multiprocessing` sets one itself at its first process."""

LAST_WORDS = 10.0
"""Seconds that the others get once one has failed, as under torchrun."""


def forks() -> Any:
    """The context that ranks of tests start from: one server for all tests of a process, whoever asks first."""
    context: Any = multiprocessing.get_context(_METHOD)
    if _METHOD == "forkserver":
        context.set_forkserver_preload(_LOADED)
    return context


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    returncode: int
    stdout: str
    stderr: str


def trainers(
    words: Sequence[str], variables: Sequence[Mapping[str, str]], seconds: float = 280.0
) -> list[Ended]:
    """`python -m trainer WORDS`, once for each set of variables, all at once; those that run when time is up are killed.

    Each is as a fresh process but for what it has loaded. Where one ends with another code than 0, the others get
    `LAST_WORDS` more.
    """
    context, ranks = forks(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, extra in enumerate(variables):
            outputs = [folder / f"{number}.{stream}" for stream in ("out", "err")]
            for output in outputs:
                output.touch()
            arguments = (list(words), dict(os.environ) | dict(extra), outputs)
            ranks.append(context.Process(target=_trainer, args=arguments))
            ranks[-1].start()
        end, failed = time.monotonic() + seconds, False
        while any(rank.exitcode is None for rank in ranks) and time.monotonic() < end:
            if not failed and any(rank.exitcode for rank in ranks):
                end, failed = min(end, time.monotonic() + LAST_WORDS), True
            next((rank for rank in ranks if rank.exitcode is None), ranks[0]).join(0.05)
        for rank in ranks:
            rank.kill()
            rank.join()
        texts = [
            [(folder / f"{number}.{stream}").read_text() for stream in ("out", "err")]
            for number in range(len(ranks))
        ]
    return [Ended(rank.exitcode, *text) for rank, text in zip(ranks, texts, strict=True)]


def _trainer(words: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    """One rank; never returns."""
    code = 1
    try:
        for fd, output in enumerate(outputs, 1):
            os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), fd)
        os.environ.clear()
        os.environ.update(environment)
        from trainer.cli import main

        code = main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
