"""One agent with one real rank: what orders it is sent, and waits for its answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from configs.paths import RunPaths
from faulttol import proc
from orchestrator.agent.agent import NodeAgent
from orchestrator.agent.orders import AttemptOrder, AttemptPhase, AttemptReport, LaunchSpec
from orchestrator.control.gang import DesiredState

SLEEP = "import os, time; from configs.rank import die_with_parent; die_with_parent(os.environ); print('here', flush=True);"


def order(
    run: RunPaths, desired: DesiredState = DesiredState.STARTED, body: str = "pass", **other: object
) -> AttemptOrder:
    """One rank on one node."""
    launch = LaunchSpec(1, (0,), "127.0.0.1", ("127.0.0.1",), ("-c", f"{SLEEP} {body}; time.sleep(600)"), "")
    return replace(AttemptOrder(1, str(run.root), 1, desired, launch), **other)  # type: ignore[arg-type]


def started(agent: NodeAgent, run: RunPaths, body: str = "pass", attempt: int = 1) -> AttemptReport:
    """Start it as a runtime would."""
    asked = order(run, body=body, attempt=attempt)
    answer = attend_until(agent, asked, lambda a: a.phase is AttemptPhase.READY)
    launch = replace(asked.launch, master=answer.master)  # type: ignore[type-var]
    return attend_until(agent, replace(asked, launch=launch), lambda a: a.phase is AttemptPhase.RUNNING)


def attend_until(
    agent: NodeAgent, what: AttemptOrder, holds: Callable[[AttemptReport], bool]
) -> AttemptReport:
    answer = agent.reconcile(what)
    deadline = time.monotonic() + 30
    while not holds(answer):
        assert time.monotonic() < deadline, f"still {answer}"
        answer = agent.reconcile(replace(what, news=answer.news, serial=answer.serial, wait=0.2))
    return answer


def text(run: RunPaths, rank: int, attempt: int = 1) -> str:
    path = run.attempt(attempt).log(rank)
    return path.read_text() if path.exists() else ""


def alive(pid: int) -> bool:
    return proc.state(pid) not in ("", "Z", "X")
