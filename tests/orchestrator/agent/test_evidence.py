"""Stacks and records of ranks that live, written when somebody wants them."""

from __future__ import annotations

import json
import os
import signal

import pytest

from configs.paths import RunPaths
from faulttol import proc
from orchestrator.agent.agent import NodeAgent
from orchestrator.control.gang import DesiredState, GangSpec
from orchestrator.record.events import NodeShare
from tests.orchestrator.agent.local_runtime import LocalRuntime, local_runtime, until
from tests.orchestrator.agent.one_agent import SLEEP, alive, attend_until, order, started, text

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


def test_stacks_and_rings_are_kept_of_a_rank_that_is_stopped(agent: NodeAgent, run: RunPaths) -> None:
    body = (
        "from faulttol.recorder import Recorder, RankPhase; from pathlib import Path;"
        "ring = Recorder(Path(os.environ['MEGARAY_RINGS']) / '00000.ring', 0); ring.begin(RankPhase.CHECKPOINT, 41);"
        "lie_down = lambda: time.sleep(600); print('ready', flush=True); lie_down()"
    )
    answer = started(agent, run, body)
    until(lambda: "ready" in text(run, 0), "its record")
    os.kill(answer.pids[0], signal.SIGSTOP)
    until(lambda: proc.state(answer.pids[0]) == "T", "that it stands")
    attend_until(agent, order(run, DesiredState.WATCHED, collect=("one",)), lambda a: a.collected == ("one",))
    folder = run.attempt(1).evidence / "one"
    stack = (folder / "00000.stack.txt").read_text()
    assert "state T" in stack and "<lambda>" in stack and "Thread" in stack
    records = json.loads((folder / "00000.ring.json").read_text())
    assert [(r["phase"], r["mark"], r["step"]) for r in records] == [("CHECKPOINT", "BEGIN", 41)]
    assert alive(answer.pids[0]), "nothing is killed for it"


def test_each_request_has_its_own_stacks_and_the_same_one_again_writes_nothing(run: RunPaths) -> None:
    with local_runtime(slots=1, count=2) as runtime:
        shares = tuple(
            NodeShare(node.node_id, node.ip, node.hostname, (rank,))
            for rank, node in enumerate(runtime.nodes(()))
        )
        program = ("-c", f"{SLEEP} time.sleep(600)")
        spec = GangSpec("slots", str(run.root), 1, shares, "CPU", 2, program, "", 1, heartbeat=0.2)
        runtime.collect(spec, "before there was a gang")
        runtime.ensure(spec, DesiredState.STARTED)
        until(lambda: runtime.status(spec).pids, "ranks")
        assert not runtime.status(spec).collected
        runtime.collect(spec, "by a person")
        runtime.collect(spec, "incident-001")
        until(lambda: len(runtime.status(spec).collected) == 2, "both")
        stacks = {
            (request, rank): run.attempt(1).evidence_of(request) / f"0000{rank}.stack.txt"
            for request in ("by a person", "incident-001")
            for rank in (0, 1)
        }
        assert all("state" in path.read_text() for path in stacks.values())
        for path in stacks.values():
            path.write_text("as they were")
        sent = len(runtime.cluster.orders)
        runtime.collect(spec, "by a person")
        runtime.collect(spec, "incident-002")
        assert runtime.status(spec).collected == {"by a person", "incident-001"}, "not what isn't there yet"
        until(lambda: "incident-002" in runtime.status(spec).collected, "the next one")
        assert all(path.read_text() == "as they were" for path in stacks.values())
        assert {one for _, o in runtime.cluster.orders[sent:] for one in o.collect} == {"incident-002"}
        again = LocalRuntime(cluster=runtime.cluster)  # a controller that follows says it again
        again.ensure(spec, DesiredState.WATCHED)
        until(lambda: again.status(spec).pids, "the same ranks")
        again.collect(spec, "incident-001")
        until(lambda: again.status(spec).collected, "what was there")
        assert all(path.read_text() == "as they were" for path in stacks.values())
        again.close()
        assert {path.name for path in run.attempt(1).evidence.iterdir()} == {
            "by a person", "incident-001", "incident-002",
        }  # fmt: skip
