"""The commands about nodes: keep runs off one, and take it back."""

from __future__ import annotations

from orchestrator import PROGRAM
from orchestrator.commands import cluster_target
from orchestrator.commands.calls import CommandCall
from orchestrator.commands.submission import owner_of
from orchestrator.record.summaries import read_queue

_SAID = {
    "cordon": "no run starts on {node} from now on{runs}",
    "uncordon": "runs start on {node} again",
    "drain": "no run starts on {node} from now on{runs}",
    "spare": "{node} is kept for runs that recover from a fault{runs}",
    "unspare": "{node} is used like the others",
}
_RUNS = {"cordon": "continues", "drain": "saves and moves to other nodes", "spare": "continues"}


def _mark(call: CommandCall, what: str) -> int:
    """Mark a node, and say what becomes of the runs on it.

    Raises:
        UserError: where there is no such node or no cluster, or the mark changes nothing.
    """
    node, reason = call.options.node, getattr(call.options, "reason", None) or ""
    with cluster_target.client(call) as controller:
        controller.mark_node(node, what, reason, owner_of(None))
    runs = [
        run
        for row in read_queue(call.home).get("nodes", [])
        if node in (row["ip"], row["hostname"])
        for run in row["runs"]
    ]
    there = "".join(f"; {run} {_RUNS[what]}" for run in runs) if what in _RUNS else ""
    tree = {"node": node, "mark": what, "reason": reason, "runs": runs}
    call.say(_SAID[what].format(node=node, runs=there) + f"\nnext: {PROGRAM} nodes", tree)
    return 0


def cordon(call: CommandCall) -> int:
    """Keep runs from starting on a node."""
    return _mark(call, "cordon")


def uncordon(call: CommandCall) -> int:
    """Let runs start on a node again."""
    return _mark(call, "uncordon")


def drain(call: CommandCall) -> int:
    """Move runs off a node."""
    return _mark(call, "drain")


def spare(call: CommandCall) -> int:
    """Keep a node for runs that recover."""
    return _mark(call, "spare")


def unspare(call: CommandCall) -> int:
    """Use a spare like the other nodes."""
    return _mark(call, "unspare")
