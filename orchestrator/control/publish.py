"""What the controller publishes for readers: nodes, the queue, and what blocks a run. Derived, never the truth."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from configs.paths import HomePaths, write_whole
from orchestrator.control.node_controller import NodeController
from orchestrator.control.run_controller import RunController
from orchestrator.decide import placement
from orchestrator.record.clock import Instant

_BEAT = 5.0
"""Seconds after which the file is written again though nothing has changed: readers see that the controller turns."""


class Publisher:
    """Writes `queue.json`."""

    def __init__(self, home: HomePaths, epoch: int) -> None:
        self._home, self._epoch = home, epoch
        self._text, self._written = "", float("-inf")

    def publish(
        self,
        nodes: NodeController | None,
        runs: Mapping[str, RunController],
        held: list[dict[str, Any]],
        parked: list[dict[str, str]],
        damage: list[str],
        now: Instant,
    ) -> None:
        """Replace the file where something in it has changed, or it has become old.

        Raises:
            OSError: where the disk doesn't take it.
        """
        holders: dict[str, list[str]] = {}
        for run_id, control in runs.items():
            for share in control.shares:
                holders.setdefault(share.node_id, []).append(run_id)
        busy = [(c.view.gang.resource, c.shares) for c in runs.values() if c.shares]
        free = placement.with_slots_taken(nodes.nodes, busy) if nodes else []
        tree = {
            "epoch": self._epoch,
            "controller_pid": os.getpid(),
            "nodes": [asdict(node) | {"runs": holders.get(node.node_id, [])} for node in free],
            "waiting": held,
            "parked": parked,
            "damage": damage,
        }
        text = json.dumps(tree)
        if text == self._text and now.mono - self._written < _BEAT:
            return
        write_whole(self._home.queue, json.dumps({"time": now.wall, "beat": now.wall} | tree))
        self._text, self._written = text, now.mono
