"""What the pure deciders take of a processor for 12,288 ranks on 1,536 nodes: a turn's worth of each, and what is rare.

python -m tests.orchestrator.bench_deciders

`tests.orchestrator.bench_scale` has the whole controller. A turn is that of a cluster in use: the large gang runs, a
thousand small ones wait behind it, nodes have labels, marks and a past.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from configs.compose import compose
from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.commands.submission import Submission
from orchestrator.decide import elastic, placement, queue
from orchestrator.decide import nodes as deciding
from orchestrator.decide.placement import Node, Unschedulable
from orchestrator.decide.queue import QueuePolicy, RunningRun, WaitingRun
from orchestrator.record import cluster_log
from orchestrator.record.cluster_log import NodesView, Suspected
from orchestrator.record.events import Event, GangShape, NodeShare
from tests.orchestrator.decide.cluster_sim import make_nodes
from trainer.sizing.search.planner import Capacity, plan

NODES, SLOTS = 1536, 8
GIANT = GangShape(NODES * SLOTS, 8, resource="GPU")
DEEPSEEK = (
    "model=deepseek_v3", "hardware=h100", "parallel.pp=16", "parallel.dp=768", "parallel.ep=64",
    "train.global_batch=15360", "train.micro_batch=1", "data.sequence=4096", "train.recompute=full",
)  # fmt: skip


def cpu(act: Callable[[], object], times: int = 5) -> float:
    """CPU seconds of a call, the least of several."""
    found = []
    for _ in range(times):
        start = time.process_time()
        act()
        found.append(time.process_time() - start)
    return min(found)


def labelled(count: int) -> list[Node]:
    """Nodes in racks of four, under rail switches of 32."""
    return [
        replace(node, labels={"rail": f"p{i // 32}", "rack": f"r{i // 4}", "nvlink": f"d{i // 4}"})
        for i, node in enumerate(make_nodes(count, SLOTS, "GPU"))
    ]


def past(nodes: list[Node]) -> NodesView:
    """A cluster of which some nodes are marked and many were suspected."""
    rng = random.Random(1)
    payloads = deciding.observe(NodesView(), nodes, 0.0)
    payloads += [Suspected(rng.choice(nodes).ip, 0.5, f"r{i}", "hang", "rank 3 hangs") for i in range(400)]
    view = cluster_log.fold(Event(i, 0.0, p, float(i)) for i, p in enumerate(payloads))  # type: ignore[arg-type]
    marks = [deciding.mark_event(view, node.ip, "spare", "", "ann") for node in nodes[-16:]]
    marks += [deciding.mark_event(view, node.ip, "cordon", "a fan", "ann") for node in nodes[-24:-16]]
    return cluster_log.apply(view, [Event(0, 0.0, p, 2000.0) for p in marks])  # type: ignore[arg-type]


def small(count: int) -> list[WaitingRun]:
    """Runs of all shapes that wait."""
    rng = random.Random(2)
    return [
        WaitingRun(f"w{i:04d}", rng.randint(0, 3), float(i), float(i), GangShape(b * rng.randint(1, 64), b, resource="GPU"),
                owner=f"o{i % 20}")
        for i in range(count)
        for b in [rng.choice([1, 2, 4, 8])]
    ]  # fmt: skip


def on(gang: GangShape, nodes: list[Node]) -> tuple[NodeShare, ...]:
    """A placement that is there."""
    placed = placement.place(gang, nodes)
    assert not isinstance(placed, Unschedulable), placed.reason
    return placed


def turn() -> list[tuple[str, float]]:
    """CPU seconds of what each turn asks."""
    nodes = labelled(NODES + 24)
    view = past(nodes)
    marked = deciding.with_marks(nodes, view, 3000.0)
    giant = RunningRun("giant", 9, "o", GIANT, on(GIANT, marked))
    held = [("GPU", giant.shares)]
    free = placement.with_slots_taken(marked, held)
    policy = QueuePolicy(60.0, {"*": 20_000})
    waiting = small(1000)
    return [
        ("observe: who joined and left", cpu(lambda: deciding.observe(view, nodes, 3000.0))),
        ("marked: barred, spare, suspicion", cpu(lambda: deciding.with_marks(nodes, view, 3000.0))),
        ("occupied: what is free", cpu(lambda: placement.with_slots_taken(marked, held))),
        ("decide: nobody waits", cpu(lambda: queue.decide([], [giant], free, policy))),
        ("decide: 1,000 wait behind the gang", cpu(lambda: queue.decide(waiting, [giant], free, policy))),
        ("draining: who has to move", cpu(lambda: deciding.draining_runs(view, [giant]))),
    ]


def rare() -> list[tuple[str, float]]:
    """CPU seconds of what happens now and then."""
    nodes = labelled(NODES)
    ask = WaitingRun("giant", 9, 0.0, 100.0, GIANT)
    one = GangShape(8, 8, resource="GPU")
    lower = [RunningRun(f"r{i}", i % 3, "o", one, on(one, [node])) for i, node in enumerate(nodes)]
    busy = placement.with_slots_taken(nodes, [("GPU", r.shares) for r in lower])
    view = past(labelled(NODES + 24))
    verdict = Verdict(VerdictKind.NODE_LOST, "its agent is silent", node=nodes[0].ip)
    config = compose(list(DEEPSEEK), None)
    made = plan(config, Capacity.of_nodes([SLOTS] * NODES))
    asked = Submission(config, made, 0).gang()
    left = Capacity.of_nodes([SLOTS] * (NODES - 2))
    search, pieces = elastic.SmallerLayoutSearch(made.config, left, asked), list[float]()
    while not search.done:
        pieces.append(cpu(search.step, 1))
    rng = random.Random(3)
    events = [
        Event(i, 0.0, Suspected(rng.choice(nodes).ip, 0.5, "r", "hang", ""), float(i))  # type: ignore[arg-type]
        for i in range(100_000)
    ]
    return [
        (
            "decide: the gang of 12,288 ranks is placed",
            cpu(lambda: queue.decide([ask], [], nodes, QueuePolicy())),
        ),
        (
            "decide: 1,536 runs are stopped for it",
            cpu(lambda: queue.decide([ask], lower, busy, QueuePolicy())),
        ),
        (
            "suspect: a node's fault",
            cpu(lambda: deciding.suspicion_events(view, verdict, "r", nodes[0].ip, 3000.0)),
        ),
        ("smaller: a layout without two nodes", sum(pieces)),
        (f"smaller: the longest of its {len(pieces)} pieces, one a turn", max(pieces)),
        ("smaller: the same asked again", cpu(lambda: search.matches(made.config, left, asked))),
        ("fold: 100,000 events of the cluster's log", cpu(lambda: cluster_log.fold(events), 1)),
    ]


def main() -> None:
    """Print a line for each."""
    write = sys.stdout.write
    write(f"{NODES * SLOTS} ranks on {NODES} nodes; CPU milliseconds\n")
    each = turn()
    for name, seconds in each:
        write(f"  {name:48}{seconds * 1000:10.2f}\n")
    total = sum(seconds for _, seconds in each)
    write(f"  {'a turn':48}{total * 1000:10.2f}   {total:.1%} of a core at 1 Hz\n")
    write("now and then\n")
    for name, seconds in rare():
        write(f"  {name:48}{seconds * 1000:10.2f}\n")


if __name__ == "__main__":
    main()
