"""Nodes: which can't be reached, couldn't start ranks, or are gone with all of the attempt."""

from __future__ import annotations

from faulttol.detect.snapshot import Snapshot
from faulttol.verdicts import Verdict, VerdictKind


def judge(snapshot: Snapshot) -> list[Verdict]:
    """Verdicts on nodes and on the gang as a whole.

    Where the set-up is refused or nothing of the attempt is left, that is said alone: it explains everything else.
    Silence is a verdict past `timeouts.agent`; the node that was silent first comes first.
    """
    if snapshot.refused:
        return [Verdict(VerdictKind.USER_ERROR, snapshot.refused)]
    if snapshot.gone:
        return [Verdict(VerdictKind.CLUSTER_LOST, snapshot.gone)]
    if not (snapshot.unfit or snapshot.lost or snapshot.silent):
        return []
    first = {node: rank for rank, node in sorted(snapshot.nodes.items(), reverse=True)}
    verdicts = [
        Verdict(VerdictKind.NODE_UNFIT, why, first.get(node), node) for node, why in snapshot.unfit.items()
    ]
    verdicts += [
        Verdict(VerdictKind.AGENT_LOST, why, first.get(node), node) for node, why in snapshot.lost.items()
    ]
    limit = snapshot.timeouts.seconds("agent")
    for node, seconds in sorted(snapshot.silent.items(), key=lambda item: -item[1]):
        if seconds > limit and node not in snapshot.lost and node not in snapshot.unfit:
            detail = f"no answer from the node's agent for {seconds:.0f} s"
            since = snapshot.now - seconds
            verdicts.append(Verdict(VerdictKind.NODE_LOST, detail, first.get(node), node, since))
    return verdicts
