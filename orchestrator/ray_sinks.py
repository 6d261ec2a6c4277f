"""Log sinks as detached Ray actors, one per run: they read the run's files and are never waited for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

from configs.compose import load
from configs.paths import RunPaths
from orchestrator.ray_cluster import NAMESPACE
from orchestrator.sinks.lifecycle import run_sink, temporary_files
from orchestrator.sinks.mode import mode_of

_NICENESS = 10
"""A sink yields the processor to the ranks."""


class SinkActor:
    """Pumps one run's log to W&B until the run has ended and everything is written."""

    def __init__(self, run_root: str) -> None:
        os.nice(_NICENESS)
        self._run = RunPaths(Path(run_root))

    def work(self) -> None:
        """Pump to the end, then leave, as after too many failures: an actor that idles would be taken for a working one."""
        with temporary_files(str(self._run.root)):
            run_sink(self._make)
        ray.actor.exit_actor()

    def _make(self) -> Any:
        from orchestrator.sinks.wandb import WandbSink  # wandb loads in this actor's process only

        return WandbSink(self._run, load(self._run.newest_config), endpoints=endpoints)


def endpoints() -> dict[str, str]:
    """By node address, where Ray's agent on it serves its metrics."""
    return {
        node["NodeManagerAddress"]: f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"]
    }


def ensure_sink(run_root: str) -> None:
    """Start the run's sink unless it is running, or none is wanted."""
    if mode_of(load(RunPaths(Path(run_root)).newest_config)) == "disabled":
        return
    options: dict[str, Any] = {
        "name": f"sink-{Path(run_root).name}",
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,  # the process may be killed at any time; what it has logged is in its cursor
        "max_task_retries": -1,
    }
    try:
        ray.get_actor(options["name"], namespace=NAMESPACE)
    except ValueError:
        actor: Any = ray.remote(SinkActor).options(**options).remote(run_root)
        actor.work.remote()
